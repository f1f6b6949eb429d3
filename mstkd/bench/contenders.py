"""The ways of reading that are compared, each as an epoch of samples: name -> contiguous, writable tensor."""

import io
import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from mstkd.bench.reading import Stopwatch, digests, dtype_of, to_tensor
from mstkd.bench.volumes import SEQUENCES, Truth, normalise
from mstkd.data.crop import crop
from mstkd.data.store import ShardStore
from mstkd.shards.spec import BRAIN, IMAGE, LABEL, META

Shape = tuple[int, int, int]
PARTS = {"image": IMAGE, "brain": BRAIN, "label": LABEL}


class Contender(Protocol):
    """Something that delivers samples and is asked for its rate round by round."""

    name: str
    absent: str | None  # how to get it, where it is not installed
    dtype: str  # of the first tensor that it delivers; known once checked

    def check(self, truths: list[Truth]) -> None:
        """Reads everything once, which also warms the page cache. RuntimeError if it differs from what was written."""

    def rate(self, seconds: float) -> float:
        """Samples per second."""

    def versions(self) -> dict[str, str]:
        """Package -> version, of what is special to it."""


class Local:
    """A contender in this process. `epoch()` of a subclass yields each subject once, in stored order."""

    name = ""
    absent: str | None = None
    dtype = ""
    package: str | None = None

    def __init__(self, folder: Path):
        self.folder = folder
        self.tars = sorted(folder.glob("*.tar"))
        self._stopwatch = Stopwatch(self.epoch)

    def epoch(self) -> Iterator[dict[str, torch.Tensor]]:
        raise NotImplementedError

    def check(self, truths: list[Truth]) -> None:
        compare(self.name, [self._look(sample) for sample in self.epoch()], truths)

    def _look(self, sample: dict[str, torch.Tensor]) -> dict[str, str]:
        self.dtype = dtype_of(sample)
        return digests(sample)

    def rate(self, seconds: float) -> float:
        return self._stopwatch.rate(seconds)

    def versions(self) -> dict[str, str]:
        return {self.package: version(self.package)} if self.package else {}


def compare(name: str, found: list[dict[str, str]], truths: list[Truth]) -> None:
    """RuntimeError unless `found`, sha256 by member per subject, is what was written."""
    if len(found) != len(truths):
        raise RuntimeError(f"{name} delivered {len(found)} of {len(truths)} subjects")
    for got, truth in zip(found, truths, strict=True):
        if got != truth.sha256:
            raise RuntimeError(f"{name} delivered other data for subject {truth.subject} than was written")


class RawRead(Local):
    """The tars front to back, one subject's bytes into one tensor: what the page cache can give at best."""

    name = "raw sequential read"

    def epoch(self) -> Iterator[dict[str, torch.Tensor]]:
        for entry in ShardStore(self.folder).index.shards:
            with open(self.folder / entry.file, "rb", buffering=0) as tar:
                ends = [max(offset + size for offset, size in subject.members.values()) for subject in entry.subjects]
                for start, end in zip([0, *ends], ends, strict=False):
                    whole = torch.empty(end - start, dtype=torch.uint8)
                    tar.readinto(whole.numpy())
                    yield {"bytes": whole}

    def check(self, truths: list[Truth]) -> None:
        count = total = 0
        for sample in self.epoch():
            self._look(sample)
            count, total = count + 1, total + len(sample["bytes"])
        stored = sum(size for entry in ShardStore(self.folder).subjects.values() for _, size in entry.members.values())
        if count != len(truths) or total < stored:
            raise RuntimeError(f"{self.name} delivered {count} of {len(truths)} subjects, {total} bytes; their members have {stored}")


class TarAndNumpy(Local):
    name = "tarfile + np.load"

    def epoch(self) -> Iterator[dict[str, torch.Tensor]]:
        for path in self.tars:
            with tarfile.open(path, "r:") as tar:
                members: dict = {}
                for info in tar:
                    suffix = info.name.partition(".")[2]
                    payload = tar.extractfile(info).read()
                    members[suffix] = json.loads(payload) if suffix == META else np.load(io.BytesIO(payload), allow_pickle=False)
                    if suffix == META:
                        yield {name: to_tensor(members[member]) for name, member in PARTS.items()}
                        members = {}


class PlainWebDataset(Local):
    name = "plain WebDataset .decode()"
    package = "webdataset"

    def epoch(self) -> Iterator[dict[str, torch.Tensor]]:
        import webdataset

        for sample in webdataset.WebDataset([str(path) for path in self.tars], shardshuffle=False).decode():
            yield {name: to_tensor(sample[member]) for name, member in PARTS.items()}


class Ours(Local):
    """What evaluation and prediction read: a subject by its key."""

    name = "mstkd, full volumes"

    def __init__(self, folder: Path):
        super().__init__(folder)
        self._store = ShardStore(folder)

    def epoch(self) -> Iterator[dict[str, torch.Tensor]]:
        for key in self._store.subjects:
            sample = self._store.subject(key)
            yield {name: to_tensor(getattr(sample, name)) for name in PARTS}


class OurPatches(Local):
    """What training reads: a random crop of a random subject, by the loader's own function."""

    def __init__(self, folder: Path, size: Shape):
        super().__init__(folder)
        self.name = f"mstkd, random {'x'.join(map(str, size))} patches"
        self._store, self._size = ShardStore(folder), size
        self._draws = np.random.default_rng(0)

    def epoch(self) -> Iterator[dict[str, torch.Tensor]]:
        keys = list(self._store.subjects)
        for number in self._draws.permutation(len(keys)):
            patch = crop(self._store.subject(keys[number]), self._size, 0.0, self._draws)
            yield {name: to_tensor(getattr(patch, name)) for name in PARTS}

    def check(self, truths: list[Truth]) -> None:
        for sample in self.epoch():
            self._look(sample)
            if sample["image"].shape != (len(SEQUENCES), *self._size):
                raise RuntimeError(f"{self.name}: delivered {tuple(sample['image'].shape)}")


class NiftiFolder(Local):
    """The usual way: every epoch decompresses the files and normalises them."""

    name = "NIfTI, get_fdata of .nii.gz"
    package = "nibabel"

    def __init__(self, folder: Path):
        super().__init__(folder)
        self._cases = sorted(path for path in folder.iterdir() if path.is_dir())

    def epoch(self) -> Iterator[dict[str, torch.Tensor]]:
        import nibabel as nib

        for case in self._cases:
            files = [case / f"{case.name}_{name}.nii.gz" for name in (*SEQUENCES, "seg")]
            *volumes, label = (nib.load(path).get_fdata(dtype=np.float32) for path in files)
            image = np.stack(volumes)
            brain = (image != 0).any(axis=0).astype(np.uint8)
            sample = {"image": normalise(image, brain), "brain": brain, "label": label.astype(np.uint8)}
            yield {name: to_tensor(array) for name, array in sample.items()}

    def check(self, truths: list[Truth]) -> None:
        super().check(truths[: len(self._cases)])


@dataclass
class Rates:
    """The rates of one contender, a value per round."""

    contender: Contender
    per_second: list[float]


def in_turn(contenders: list[Contender], rounds: int, seconds: float) -> list[Rates]:
    """`rounds` times each contender in turn (A B C, A B C, ...), so that a busy moment of the machine hits all alike."""
    rates = [Rates(contender, []) for contender in contenders]
    for _ in range(rounds):
        for measured in rates:
            if measured.contender.absent is None:
                measured.per_second.append(measured.contender.rate(seconds / rounds))
    return rates

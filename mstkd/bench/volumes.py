"""The data that every contender reads: generated heads, as a shard set and as NIfTI files."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mstkd.files import whole_file
from mstkd.shards.layout import INDEX, SPLITS, write_model
from mstkd.shards.members import encode_array
from mstkd.shards.shard_writer import add_member, shard_entry, tar_writer
from mstkd.shards.spec import BRAIN, IMAGE, LABEL, META, Fold, SequenceStats, ShardEntry, ShardIndex, Splits, SubjectEntry, SubjectMeta

SEQUENCES = ("flair", "t1", "t1ce", "t2")
SUBJECTS_PER_TAR = 8
VOXEL_BYTES = 2 * len(SEQUENCES) + 2  # float16 images, uint8 brain and label
MEAN, STD = 300.0, 100.0  # of the raw intensities
TEXTURES = 4  # heads drawn anew; the others shift their intensities, which no contender can make use of

Shape = tuple[int, int, int]


@dataclass(frozen=True)
class Head:
    """One subject, raw: what a scanner file holds."""

    subject: str
    volumes: np.ndarray  # (M, X, Y, Z) int16, 0 outside the brain
    brain: np.ndarray  # (X, Y, Z) uint8
    label: np.ndarray  # (X, Y, Z) uint8

    def image(self) -> np.ndarray:
        """As stored: float16 (M, X, Y, Z), exactly 0 outside the brain."""
        return normalise(self.volumes, self.brain)

    def members(self) -> dict[str, bytes]:
        """The payloads of the four members of a tar, in their order."""
        arrays = {IMAGE: self.image(), BRAIN: self.brain, LABEL: self.label}
        return {**{name: encode_array(array) for name, array in arrays.items()}, META: self._meta().model_dump_json().encode()}

    def _meta(self) -> SubjectMeta:
        shape = self.brain.shape
        stats = SequenceStats(mean=MEAN, std=STD, min=1, max=1000, p0_1=10, p0_5=20, p99_5=600, p99_9=700)
        return SubjectMeta(
            subject=self.subject, patient=self.subject, sequences=SEQUENCES, stats=dict.fromkeys(SEQUENCES, stats), spacing_mm=(1, 1, 1),
            original_shape=shape, original_affine=np.eye(4).tolist(), orientation="RAS", crop_box=tuple((0, n) for n in shape),
        )  # fmt: skip


def normalise(volumes: np.ndarray, brain: np.ndarray) -> np.ndarray:
    """Raw intensities (M, X, Y, Z) -> float16 z-scores, 0 where `brain` (X, Y, Z) is."""
    return ((volumes.astype(np.float32) - np.float32(MEAN)) / np.float32(STD) * brain).astype(np.float16)


def heads(count: int, shape: Shape) -> Iterator[Head]:
    """`count` heads of `shape` voxels, the same at each call: an ellipsoid that touches every side, with noise and a lesion."""
    grid = np.meshgrid(*[np.linspace(-1, 1, n, dtype=np.float32) for n in shape], indexing="ij", sparse=True)
    brain = (sum(g**2 for g in grid) <= 1 + 1 / min(shape)).astype(np.uint8)
    lesion = sum((g - 0.2) ** 2 for g in grid)
    label = np.select([lesion < 0.02, lesion < 0.05, lesion < 0.1], [1, 4, 2], 0).astype(np.uint8)
    draws = np.random.default_rng(0)
    textures = []
    for number in range(count):
        if number < TEXTURES:
            noise = draws.standard_normal((len(SEQUENCES), *shape), dtype=np.float32)
            textures.append(MEAN + STD * (0.6 * noise + 0.5 * grid[0]) + 80 * (label > 0))
        volumes = np.clip(textures[number % TEXTURES] + number // TEXTURES, 1, 1000).astype(np.int16) * brain
        yield Head(f"bench-{number:05d}", volumes, brain, label)


@dataclass(frozen=True)
class Truth:
    """What a contender must deliver for one subject: sha256 of the bytes of its tensors, by member."""

    subject: str
    sha256: dict[str, str]


def write_shards(folder: Path, count: int, shape: Shape) -> list[Truth]:
    """A shard set of `count` subjects in `folder`, all of them for training; the digests of what was stored."""
    folder.mkdir()
    truths, shards, batch = [], [], []
    for head in heads(count, shape):
        batch.append((head.subject, head.members()))
        arrays = {"image": head.image(), "brain": head.brain, "label": head.label}
        truths.append(Truth(head.subject, {name: hashlib.sha256(array.tobytes()).hexdigest() for name, array in arrays.items()}))
        if len(batch) == SUBJECTS_PER_TAR or head.subject == f"bench-{count - 1:05d}":
            shards.append(_write_tar(folder / f"bench-{len(shards):06d}.tar", batch, shape))
            batch = []
    index = ShardIndex(dataset="bench", spec_sha256="0" * 64, sequences=SEQUENCES, label_scheme="brats2018", shards=tuple(shards))
    write_model(folder / INDEX, index)
    splits = Splits(folds=(Fold(train=tuple(truth.subject for truth in truths), val=()),))
    write_model(folder / SPLITS, splits)
    return truths


def _write_tar(path: Path, subjects: list[tuple[str, dict[str, bytes]]], shape: Shape) -> ShardEntry:
    with whole_file(path) as stream, tar_writer(stream) as writer:
        for subject, members in subjects:
            for suffix, payload in members.items():
                add_member(writer, subject, suffix, payload)
    facts = {"sequences": SEQUENCES, "members": {}, "shape": shape, "fingerprint": {}}
    return shard_entry(path, [SubjectEntry(subject=subject, patient=subject, **facts) for subject, _ in subjects])


def write_nifti(folder: Path, count: int, shape: Shape) -> list[str]:
    """The first `count` heads as .nii.gz, int16, in the layout of the `phantom` spec; the subjects."""
    import nibabel as nib

    subjects = []
    for head in heads(count, shape):
        place = folder / head.subject
        place.mkdir(parents=True)
        for name, volume in zip((*SEQUENCES, "seg"), (*head.volumes, head.label), strict=True):
            nib.save(nib.Nifti1Image(volume, np.eye(4)), place / f"{head.subject}_{name}.nii.gz")
        subjects.append(head.subject)
    return subjects


def write_splits(path: Path, subjects: list[str]) -> Path:
    """A splits.json with the first subject for testing, the second for validation and the others for training."""
    test, val, *train = subjects
    write_model(path, Splits(folds=(Fold(train=tuple(train), val=(val,)),), test=(test,)))
    return path

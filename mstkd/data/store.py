"""A shard set on disk: index -> byte range -> array.

Tars are memory-mapped and members found by the offsets in index.json. Only `.npy` without objects and `.json` are
decoded; nothing is ever unpickled.
"""

import io
import json
import mmap
from collections import OrderedDict
from pathlib import Path

import numpy as np
from numpy.lib import format as npy
from pydantic import ValidationError

from mstkd.data.sample import Sample
from mstkd.data.staging import StagingCache
from mstkd.errors import UserError
from mstkd.shards.spec import BRAIN, IMAGE, LABEL, META, Fold, ShardEntry, ShardIndex, SubjectMeta, read_index, read_splits

OPEN_TARS = 16  # each map holds a file descriptor
NPY_HEADER_LIMIT = 4096


class BadSample(UserError):
    """One subject's bytes cannot be decoded; the others may be fine."""


class ShardStore:
    """Random access to the subjects of a shard set. Cheap to send to a worker process: tars are mapped on first use."""

    def __init__(self, folder: Path | str, cache_dir: Path | str | None = None, cache_gib: float = 100.0):
        """Reads index.json and splits.json. Raises UserError: folder or file missing, tar missing or truncated."""
        self.folder = Path(folder)
        self.index: ShardIndex = _read(self.folder, "index.json", read_index)
        self.splits = _read(self.folder, "splits.json", read_splits)
        self.subjects = self.index.subjects()
        self._tar_of = {entry.subject: tar for tar in self.index.shards for entry in tar.subjects}
        self._cache = StagingCache(Path(cache_dir), cache_gib) if cache_dir else None
        self._maps: OrderedDict[str, mmap.mmap] = OrderedDict()
        self._check()

    def fold(self, number: int) -> Fold:
        """The training and validation subjects of fold `number`. Raises UserError if there is no such fold."""
        if not 0 <= number < len(self.splits.folds):
            raise UserError(f"data.fold {number}: {self.folder / 'splits.json'} has folds 0 to {len(self.splits.folds) - 1}")
        return self.splits.folds[number]

    def subject(self, key: str) -> Sample:
        """The whole stored volume of a subject; image float16 (M, X, Y, Z), brain and label are read-only views on the tar.

        Raises BadSample (a UserError) if its members cannot be decoded, UserError if there is no such subject.
        """
        if key not in self.subjects:
            raise UserError(f"{self.folder}: no subject {key!r} in index.json")
        tar, members = self._tar_of[key], self.subjects[key].members
        mapped = self._map(tar)
        try:
            meta = SubjectMeta.model_validate(json.loads(bytes(_payload(mapped, members, META))))
            image = _array(_payload(mapped, members, IMAGE), np.float16, 4)
            brain = _array(_payload(mapped, members, BRAIN), np.uint8, 3)
            label = _array(_payload(mapped, members, LABEL), np.uint8, 3) if LABEL in members else None
            self._check_agreement(key, meta, image, brain, label)
        except (ValueError, KeyError) as error:  # pydantic's and json's errors are ValueErrors
            reason = str(error).splitlines()[0]
            raise BadSample(f"{self.folder / tar.file}: subject {key} cannot be decoded ({reason}); run `mstkd shards verify {self.folder}`") from None
        return Sample(image, brain, label, meta)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_maps": OrderedDict()}

    def _map(self, tar: ShardEntry) -> mmap.mmap:
        if tar.file not in self._maps:
            path = self.folder / tar.file
            try:
                with self._cache.open(path, tar) if self._cache else open(path, "rb") as file:
                    self._maps[tar.file] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            except (OSError, ValueError) as error:
                raise UserError(f"{path}: cannot be mapped ({error})") from None
            if len(self._maps) > OPEN_TARS:
                self._maps.popitem(last=False)  # arrays still in use keep their map alive
        self._maps.move_to_end(tar.file)
        return self._maps[tar.file]

    def _check(self) -> None:
        allowed = {IMAGE, BRAIN, LABEL, META, *self.index.extra_members}
        for tar in self.index.shards:
            path = self.folder / tar.file
            if not path.is_file():
                raise UserError(f"{path}: named in index.json, but not there")
            size = path.stat().st_size
            if size != tar.bytes:
                kind = "truncated" if size < tar.bytes else "changed"
                raise UserError(f"{path}: {kind}: {size} bytes, index.json says {tar.bytes}; copy or build the shard set again")
            for entry in tar.subjects:
                for member in entry.members:
                    if member not in allowed or not member.endswith((".npy", ".json")):
                        raise UserError(f"{path}: subject {entry.subject} has member {member}; a shard set holds .npy and .json members only")

    def _check_agreement(self, key: str, meta: SubjectMeta, image: np.ndarray, brain: np.ndarray, label: np.ndarray | None) -> None:
        if meta.subject != key or meta.sequences != self.subjects[key].sequences:
            raise ValueError("meta.json and index.json disagree")
        shapes = {image.shape[1:], brain.shape, *([] if label is None else [label.shape])}
        if len(shapes) > 1 or len(image) != len(self.index.sequences):
            raise ValueError(f"shapes do not fit: image {image.shape}, others {shapes - {image.shape[1:]}}, {len(self.index.sequences)} sequences")


def _read(folder: Path, name: str, reader):
    if not folder.is_dir():
        raise UserError(f"shard set {folder}: no such folder; make one with `mstkd shards build`")
    try:
        return reader(folder)
    except FileNotFoundError:
        raise UserError(f"shard set {folder}: {name} is missing; is this the folder that `mstkd shards build` wrote?") from None
    except ValidationError as error:
        problem = error.errors()[0]
        raise UserError(f"{folder / name}: {'.'.join(map(str, problem['loc']))}: {problem['msg']}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / name}: cannot be read ({error})") from None


def _payload(mapped: mmap.mmap, members: dict[str, tuple[int, int]], member: str) -> memoryview:
    if member not in members:
        raise ValueError(f"{member} is missing")
    offset, size = members[member]
    if offset < 0 or size <= 0 or offset + size > len(mapped):
        raise ValueError(f"{member} lies outside the tar")
    return memoryview(mapped)[offset : offset + size]


def _array(payload: memoryview, dtype: type, ndim: int) -> np.ndarray:
    """A read-only view of an `.npy` payload; any other type, order or size is a ValueError."""
    header = io.BytesIO(payload[:NPY_HEADER_LIMIT])
    version = npy.read_magic(header)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"npy version {version}")
    read_header = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    shape, fortran_order, found = read_header(header, max_header_size=NPY_HEADER_LIMIT)
    if found != np.dtype(dtype) or fortran_order or len(shape) != ndim:
        raise ValueError(f"npy holds {found} {shape}, expected {np.dtype(dtype)} in C order with {ndim} axes")
    array = np.frombuffer(payload[header.tell() :], dtype=dtype)
    return array.reshape(shape)

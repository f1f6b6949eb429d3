"""A shard set on disk: index -> byte range -> array.

Tars are memory-mapped and members found by the offsets in index.json. What the index says is checked before a tar is
opened (`mstkd.shards.layout`), a tar's size and first header when it is mapped, a member's header before it is read.
Only `.npy` without objects and `.json` are decoded; nothing is ever unpickled.
"""

import hashlib
import mmap
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import numpy as np

from mstkd.data.location import check_location
from mstkd.data.remote import RemoteFolder, shown
from mstkd.data.sample import Sample, ViewSample
from mstkd.data.staging import StagingCache
from mstkd.errors import UserError
from mstkd.shards.layout import INDEX, INDEX_LIMIT_BYTES, SPLITS, SPLITS_LIMIT_BYTES, parse_index, parse_splits, read_set, unlisted_tars
from mstkd.shards.members import decode_array, decode_meta, decode_view_meta
from mstkd.shards.spec import BRAIN, CLAHE, FILE_LABEL, IMAGE, LABEL, META, Fold, ShardEntry, ShardIndex, Splits, SubjectMeta, ViewMeta, view_member
from mstkd.shards.tar_walk import BLOCK_BYTES, read_header

OPEN_TARS = 16  # each map holds a file descriptor


class BadSample(UserError):
    """One subject's bytes cannot be decoded; the others may be fine."""


class ShardStore:
    """Random access to the subjects of a shard set. Cheap to send to a worker process: tars are mapped on first use."""

    def __init__(
        self, folder: Path | str, cache_dir: Path | str | None = None, cache_gib: float = 100.0, verify_sha256: bool = False,
        hide_synthetic: bool = False,
    ):  # fmt: skip
        """Reads index.json and splits.json. `folder` may be an http, https or s3 address; its tars are staged in `cache_dir`.

        Raises UserError: an address that is not read from, a file of the set missing, an index that cannot be true, a
        local tar missing, truncated, altered in size or not in the index.

        With `verify_sha256` each process also hashes every tar it opens, once: a whole read of it at the hash's speed.
        With `hide_synthetic` sequences that a network made count as missing.
        """
        remote = check_location(str(folder))
        if remote and not cache_dir:
            raise UserError(f"data.cache_dir: not set, and {shown(folder)} lies on a server; name a folder on a local disk for its tars")
        self.folder: Path | RemoteFolder = RemoteFolder(str(folder)) if remote else Path(folder)
        self.index, self.splits = _fetch_set(self.folder) if isinstance(self.folder, RemoteFolder) else read_set(self.folder)
        self._indexed = self.index.subjects()
        self._hide_synthetic = hide_synthetic
        self.subjects = {key: entry.model_copy(update={"sequences": entry.measured}) for key, entry in self._indexed.items()} if hide_synthetic else self._indexed
        self._tar_of = {entry.subject: tar for tar in self.index.shards for entry in tar.subjects}
        self._cache = StagingCache(Path(cache_dir), cache_gib) if cache_dir else None
        self._maps: OrderedDict[str, mmap.mmap] = OrderedDict()
        self._verify_sha256 = verify_sha256
        self._hashed: set[str] = set()  # tars whose sha256 was right
        self._located: set[str] = set()  # subjects whose members' headers were right
        self._check()

    @property
    def place(self) -> str:
        """The absolute path of the folder, links followed, or its URL without credentials: equal for the same set."""
        return str(self.folder.resolve() if isinstance(self.folder, Path) else self.folder)

    def fold(self, number: int) -> Fold:
        """The training and validation subjects of fold `number`. Raises UserError if there is no such fold."""
        if not 0 <= number < len(self.splits.folds):
            raise UserError(f"data.fold {number}: {self.folder / 'splits.json'} has folds 0 to {len(self.splits.folds) - 1}")
        return self.splits.folds[number]

    def subject(self, key: str) -> Sample | ViewSample:
        """A subject as stored: its whole volume, image float16 (M, X, Y, Z), brain and label; of a set for classification
        its views. Arrays are read-only views on the tar.

        Raises BadSample (a UserError) if its members cannot be decoded, UserError if there is no such subject, or if
        the tar is not the one that the index describes.
        """
        if key not in self.subjects:
            raise UserError(f"{self.folder}: no subject {key!r} in index.json")
        tar, members = self._tar_of[key], self.subjects[key].members
        mapped = self._map(tar)
        if key not in self._located:
            self._check_headers(mapped, tar, key)
        try:
            return (self._volume if self.index.classification is None else self._views)(key, mapped, members)
        except ValueError as error:  # pydantic's and json's errors are ValueErrors
            reason, advice = str(error).splitlines()[0], f"run `mstkd shards verify {self.folder}`"
            raise BadSample(f"{self.folder / tar.file}: subject {key} cannot be decoded ({reason}); {advice}") from None

    def _volume(self, key: str, mapped: mmap.mmap, members: dict[str, tuple[int, int]]) -> Sample:
        meta = decode_meta(_payload(mapped, members, META))
        image = _array(_payload(mapped, members, IMAGE), np.float16, 4)
        brain = _array(_payload(mapped, members, BRAIN), np.uint8, 3)
        label = _array(_payload(mapped, members, LABEL), np.uint8, 3) if LABEL in members else None
        self._check_agreement(key, meta, image, brain, label)
        shown = meta.model_copy(update={"sequences": self.subjects[key].sequences}) if self._hide_synthetic else meta
        return Sample(image, brain, label, shown)

    def _views(self, key: str, mapped: mmap.mmap, members: dict[str, tuple[int, int]]) -> ViewSample:
        facts, meta = self.index.classification, decode_view_meta(_payload(mapped, members, META))
        self._check_meta(key, meta)
        views = {name: _array(_payload(mapped, members, view_member(name)), np.float16, len(facts.views[name])) for name in meta.sequences}
        if meta.label not in facts.classes or any(view.shape != facts.views[name] for name, view in views.items()):
            raise ValueError("its class or a view's shape is not one of index.json")
        return ViewSample(views, facts.classes.index(meta.label), meta)

    def file_label(self, key: str) -> np.ndarray | None:
        """Of a subject that was resampled: its label (X, Y, Z) on the grid and in the axes of its file. As `subject` otherwise."""
        tar, members = self._tar_of[key], self.subjects[key].members
        if FILE_LABEL not in members:
            return None
        try:
            return _array(_payload(self._map(tar), members, FILE_LABEL), np.uint8, 3)
        except ValueError as error:
            raise BadSample(f"{self.folder / tar.file}: subject {key}: {FILE_LABEL} cannot be decoded ({error})") from None

    def equalised(self, key: str) -> np.ndarray:
        """A subject's image (M, X, Y, Z) float16 with its contrast equalised, in [0, 1]. As `subject` otherwise; UserError if the set has none."""
        tar, members = self._tar_of[key], self.subjects[key].members
        if CLAHE not in members:
            raise UserError(f"{self.folder}: has no {CLAHE}; build it with preprocessing: {{clahe: true}} in the spec, or use another method.intensity.kind")
        try:
            return _array(_payload(self._map(tar), members, CLAHE), np.float16, 4)
        except ValueError as error:
            raise BadSample(f"{self.folder / tar.file}: subject {key}: {CLAHE} cannot be decoded ({error})") from None

    def tar_of(self, key: str) -> ShardEntry:
        """The tar that a subject of the set lies in."""
        return self._tar_of[key]

    @property
    def cache_bytes(self) -> int | None:
        """What the staged tars of this and other sets may take together; None: tars are read where they lie."""
        return self._cache.limit_bytes if self._cache else None

    def stage(self, tar: ShardEntry, stopped: Callable[[], bool]) -> BinaryIO:
        """Brings a tar into the cache before a subject of it is read; evicted last while the result is open.

        For another thread than the reader's. Raises as `StagingCache.open_ahead`.
        """
        return self._cache.open_ahead(self._source(tar), tar, stopped)

    def release(self, tar: ShardEntry) -> None:
        """No subject of this tar is read soon: once no array lies in it, the cache may evict it before others."""
        self._maps.pop(tar.file, None)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_maps": OrderedDict()}

    def _source(self, tar: ShardEntry) -> Path | RemoteFolder:
        return self.folder / tar.file if isinstance(self.folder, Path) else self.folder

    def _map(self, tar: ShardEntry) -> mmap.mmap:
        if tar.file not in self._maps:
            path = self.folder / tar.file
            try:
                with self._cache.open(self._source(tar), tar) if self._cache else open(path, "rb") as file:
                    mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            except (OSError, ValueError) as error:
                raise UserError(f"{path}: cannot be mapped ({error})") from None
            self._check_opened(mapped, tar)
            self._maps[tar.file] = mapped
            if len(self._maps) > OPEN_TARS:
                self._maps.popitem(last=False)  # arrays still in use keep their map alive
        self._maps.move_to_end(tar.file)
        self._check_size(tar, self._maps[tar.file].size())  # of the file now: reading beyond its end would be a bus error
        return self._maps[tar.file]

    def _check_opened(self, mapped: mmap.mmap, tar: ShardEntry) -> None:
        """A tar may have been cut or replaced since the set was opened."""
        self._check_size(tar, len(mapped))
        self._check_headers(mapped, tar, tar.subjects[0].subject)
        if self._verify_sha256 and tar.file not in self._hashed:
            if hashlib.sha256(mapped).hexdigest() != tar.sha256:
                raise UserError(self._other_tar(tar, "its sha256 differs from index.json"))
            self._hashed.add(tar.file)

    def _check_headers(self, mapped: mmap.mmap, tar: ShardEntry, key: str) -> None:
        """Where the index says that the subject's members are, the tar has them."""
        for suffix, (offset, size) in self.subjects[key].members.items():
            try:
                found = read_header(mapped[offset - BLOCK_BYTES : offset])
            except ValueError as error:
                raise UserError(self._other_tar(tar, f"at byte {offset - BLOCK_BYTES}: {error}")) from None
            if found != (f"{key}.{suffix}", size):
                there = f"{found[0]!r}, {found[1]} bytes"
                raise UserError(self._other_tar(tar, f"it has {there}, where index.json has {key}.{suffix}, {size} bytes"))
        self._located.add(key)

    def _check(self) -> None:
        for number, fold in enumerate(self.splits.folds):
            if unknown := sorted({*fold.train, *fold.val, *fold.test, *self.splits.test} - self.subjects.keys()):
                named = f"fold {number} or the test split names {unknown[0]}"
                raise UserError(f"{self.folder / SPLITS}: {named}, which is not in index.json")
        if isinstance(self.folder, Path):
            self._check_files(self.folder)

    def _check_files(self, folder: Path) -> None:
        for tar in self.index.shards:
            path = folder / tar.file
            if not path.is_file():
                raise UserError(f"{path}: named in index.json, but not there; copy the shard set again")
            self._check_size(tar, path.stat().st_size)
        if unlisted := unlisted_tars(folder, self.index):
            raise UserError(f"{folder / unlisted[0]}: not in index.json; remove it, or build the shard set again")

    def _check_size(self, tar: ShardEntry, size: int) -> None:
        if size != tar.bytes:
            kind = "truncated" if size < tar.bytes else "changed"
            differs = f"{kind}: {size} bytes, index.json says {tar.bytes}"
            raise UserError(f"{self.folder / tar.file}: {differs}; copy or build the shard set again")

    def _other_tar(self, tar: ShardEntry, reason: str) -> str:
        return f"{self.folder / tar.file}: altered since the index was made: {reason}; copy or build the shard set again"

    def _check_agreement(self, key: str, meta: SubjectMeta, image: np.ndarray, brain: np.ndarray, label: np.ndarray | None) -> None:
        self._check_meta(key, meta)
        entry = self.subjects[key]
        shapes = {image.shape[1:], brain.shape, *([] if label is None else [label.shape]), *([entry.shape] if entry.shape else [])}
        if len(shapes) > 1 or len(image) != len(self.index.sequences):
            others = shapes - {image.shape[1:]}
            raise ValueError(f"shapes do not fit: image {image.shape}, others {others}, {len(self.index.sequences)} sequences")

    def _check_meta(self, key: str, meta: SubjectMeta | ViewMeta) -> None:
        entry = self._indexed[key]
        if (meta.subject, meta.patient, meta.sequences) != (key, entry.patient, entry.sequences):
            raise ValueError("meta.json and index.json disagree")


def _fetch_set(folder: RemoteFolder) -> tuple[ShardIndex, Splits]:
    try:
        index = parse_index(folder.read_bytes(INDEX, INDEX_LIMIT_BYTES), folder / INDEX)
        return index, parse_splits(folder.read_bytes(SPLITS, SPLITS_LIMIT_BYTES), folder / SPLITS)
    except FileNotFoundError:
        raise UserError(f"shard set {folder}: {INDEX} or {SPLITS} is missing; is this what `mstkd shards build` wrote?") from None


def _payload(mapped: mmap.mmap, members: dict[str, tuple[int, int]], member: str) -> memoryview:
    """A member's bytes; that they lie in the tar was checked with the index and when the tar was mapped."""
    if member not in members:
        raise ValueError(f"{member} is missing")
    offset, size = members[member]
    return memoryview(mapped)[offset : offset + size]


def _array(payload: memoryview, dtype: type, ndim: int) -> np.ndarray:
    array = decode_array(payload)
    if array.dtype != dtype or array.ndim != ndim:
        raise ValueError(f"npy holds {array.dtype} {array.shape}, expected {np.dtype(dtype)} with {ndim} axes")
    return array

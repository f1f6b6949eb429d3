"""A node-local cache of whole tars, for shard sets on remote or slow disks."""

import fcntl
import hashlib
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from mstkd.errors import UserError
from mstkd.shards.spec import ShardEntry


class StagingCache:
    """Tars copied into `folder`, at most `limit_gib` of them; the least recently opened leaves first.

    Shared by all processes of a node: each tar is copied once, under a lock. Names start with the tar's sha256, so
    sets may share a cache.
    """

    def __init__(self, folder: Path, limit_gib: float):
        self._folder, self._limit_bytes, self._limit_gib = Path(folder), int(limit_gib * 2**30), limit_gib
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"data.cache_dir {folder}: cannot be created ({error.strerror}); name a folder on a local disk") from None

    def open(self, tar: Path, entry: ShardEntry) -> BinaryIO:
        """`tar`'s staged copy, opened for reading; it stays readable when the copy is evicted. Raises UserError."""
        staged = self._folder / f"{entry.sha256[:16]}-{entry.file}"
        try:
            return _open_marked(staged)
        except FileNotFoundError:
            pass
        with self._locked():
            if not staged.exists():  # another process may have copied it while this one waited
                self._make_room(entry)
                self._copy(tar, entry, staged)
            return _open_marked(staged)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with open(self._folder / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # the system releases it if the process dies
            yield

    def _make_room(self, entry: ShardEntry) -> None:
        if entry.bytes > self._limit_bytes:
            raise UserError(f"data.cache_gib {self._limit_gib}: smaller than {entry.file} ({entry.bytes / 2**30:.2f} GiB); raise it")
        for part in self._folder.glob("*.part"):  # left by a process that died while copying
            part.unlink()
        staged = sorted(((path.stat(), path) for path in self._folder.glob("*.tar")), key=lambda pair: pair[0].st_mtime_ns)
        total = sum(stat.st_size for stat, _ in staged)
        for stat, path in staged:
            if total + entry.bytes <= self._limit_bytes:
                return
            path.unlink()
            total -= stat.st_size

    @staticmethod
    def _copy(tar: Path, entry: ShardEntry, staged: Path) -> None:
        part = staged.with_suffix(".part")
        try:
            shutil.copyfile(tar, part)
        except OSError as error:
            part.unlink(missing_ok=True)
            raise UserError(f"{tar}: cannot be staged into data.cache_dir {staged.parent} ({error.strerror})") from None
        with open(part, "rb") as copy:
            digest = hashlib.file_digest(copy, "sha256").hexdigest()
        if digest != entry.sha256:
            part.unlink()
            raise UserError(f"{tar}: its sha256 differs from index.json; run `mstkd shards verify {tar.parent}`")
        os.replace(part, staged)


def _open_marked(staged: Path) -> BinaryIO:
    file = open(staged, "rb")
    now = time.time_ns()  # finer than the kernel's own stamp
    os.utime(file.fileno(), ns=(now, now))  # the time of last use, which eviction sorts by
    return file

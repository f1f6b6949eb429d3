"""A node-local cache of whole tars, for shard sets on servers or slow disks."""

import errno
import fcntl
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from mstkd.data.remote import LocalFolder, Receiver, RemoteFolder
from mstkd.errors import UserError
from mstkd.shards.spec import ShardEntry

log = logging.getLogger(__name__)

SHARED, EXCLUSIVE, UNLOCK = fcntl.LOCK_SH, fcntl.LOCK_EX, fcntl.LOCK_UN
WRITE_BACK_BYTES = 2**23

Folder = Path | LocalFolder | RemoteFolder


class NoRoom(Exception):
    """Only copies in use could make room."""


class CopyStopped(Exception):
    """The copy is no longer wanted."""


class StagingCache:
    """Tars copied into `folder`, at most `limit_gib` of them; the least recently opened leaves first.

    Shared by all processes of a node: each tar is copied once. Names start with the tar's sha256, so sets may share a
    cache. A copy is a `.part`, of full size and locked by its writer, until its hash is right; opened copies are locked
    as shared, so that those in use are evicted last. One that is evicted while mapped stays readable, and its disk
    space returns when the map is closed. The system releases the locks of a process that dies; all but those of copies
    in use are released by hand, since a child forked meanwhile would keep them.
    """

    def __init__(self, folder: Path, limit_gib: float):
        self._folder, self.limit_bytes, self._limit_gib = Path(folder), int(limit_gib * 2**30), limit_gib
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"data.cache_dir {folder}: cannot be created ({error.strerror}); name a folder on a local disk") from None

    def open(self, source: Folder, entry: ShardEntry) -> BinaryIO:
        """The staged copy of the tar `entry` of the folder `source`, opened for reading. Raises UserError."""
        return self._open(source, entry, spare_used=False, stopped=lambda: False)

    def open_ahead(self, source: Folder, entry: ShardEntry, stopped: Callable[[], bool]) -> BinaryIO:
        """As `open`, for a copy that nobody waits for yet: raises NoRoom rather than evict one in use, CopyStopped once `stopped()`."""
        return self._open(source, entry, spare_used=True, stopped=stopped)

    def _open(self, source: Folder, entry: ShardEntry, spare_used: bool, stopped: Callable[[], bool]) -> BinaryIO:
        folder = LocalFolder(source.parent) if isinstance(source, Path) else source
        staged = self._folder / f"{entry.sha256[:16]}-{entry.file}"
        while True:
            try:
                copy = open(staged, "rb")
                if os.fstat(copy.fileno()).st_size == entry.bytes:
                    return _marked(copy)
                copy.close()
                log.warning("%s: not of the size that index.json says; it is fetched again", staged)
                with self._locked():  # others may be looking at what there is
                    staged.unlink(missing_ok=True)
            except FileNotFoundError:
                pass
            with self._locked():
                part, ours = self._claim(staged, entry, spare_used)
            if ours:
                return self._fill(PartReceiver(part, entry.bytes, stopped), folder, entry, staged)
            with part:
                fcntl.flock(part, SHARED)  # until its writer is done, or dead

    @contextmanager
    def _locked(self) -> Iterator[None]:
        try:
            lock = open(self._folder / "lock", "a")
        except OSError as error:
            raise UserError(f"data.cache_dir {self._folder}: cannot be written to ({error.strerror}); name a folder of your own") from None
        with lock:
            with _flocked(lock, EXCLUSIVE):
                yield

    def _claim(self, staged: Path, entry: ShardEntry, spare_used: bool) -> tuple[BinaryIO, bool]:
        """(the part to be filled, True), or (another writer's part, False), whose end is to be waited for."""
        if entry.bytes > self.limit_bytes:
            raise UserError(f"data.cache_gib {self._limit_gib}: smaller than {entry.file} ({entry.bytes / 2**30:.2f} GiB); raise it")
        path = staged.with_suffix(".part")
        if staged.exists():  # finished while we waited for the lock
            return open(staged, "rb"), False
        busy = dict(_parts_in_work(self._folder))
        blocking = None
        try:
            blocking = busy.get(path) or self._make_room(entry, list(busy.values()), spare_used)
        finally:
            for part in busy.values():
                if part is not blocking:
                    part.close()
        if blocking:
            return blocking, False
        part = open(path, "x+b")
        fcntl.flock(part, EXCLUSIVE)
        try:
            os.posix_fallocate(part.fileno(), 0, entry.bytes)  # a disk that cannot hold it says so now
        except OSError as error:
            _discard(part)
            raise UserError(self._no_space(entry, error)) from None
        return part, True

    def _make_room(self, entry: ShardEntry, busy: list[BinaryIO], spare_used: bool) -> BinaryIO | None:
        """Evict until `entry` fits; a writer's part if its end must be waited for. Raises NoRoom."""
        writing = sum(os.fstat(part.fileno()).st_size for part in busy)
        if busy and writing + entry.bytes > self.limit_bytes:
            return busy[0]
        staged = sorted(((path.stat(), path) for path in self._folder.glob("*.tar")), key=lambda pair: pair[0].st_mtime_ns)
        excess = writing + sum(stat.st_size for stat, _ in staged) + entry.bytes - self.limit_bytes
        leaving = []
        for in_use in (False,) if spare_used else (False, True):
            for stat, path in staged:
                if excess > 0 and path not in leaving and (in_use or _idle(path)):
                    leaving.append(path)
                    excess -= stat.st_size
        if excess > 0:
            raise NoRoom
        for path in leaving:
            path.unlink()
        return None

    def _fill(self, receiver: "PartReceiver", folder: LocalFolder | RemoteFolder, entry: ShardEntry, staged: Path) -> BinaryIO:
        part = receiver.file
        try:
            folder.download(entry.file, receiver)
            if receiver.received_bytes < entry.bytes or receiver.sha256 != entry.sha256:
                raise UserError(
                    f"{folder}/{entry.file}: its sha256 differs from index.json; run `mstkd shards verify` on the set and copy it again"
                )
            part.flush()
            # the name says that the hash was right and nobody hashes again: without this a power cut may leave the name,
            # the size and sound headers, and zeros for voxels
            os.fsync(part.fileno())
            os.replace(part.name, staged)
        except BaseException:
            _discard(part)
            raise
        part.seek(0)
        return _marked(part)

    def _no_space(self, entry: ShardEntry, error: OSError) -> str:
        if error.errno != errno.ENOSPC:
            return f"data.cache_dir {self._folder}: cannot be written to ({error.strerror})"
        free_gib = shutil.disk_usage(self._folder).free / 2**30
        return (
            f"data.cache_dir {self._folder}: disk full: {entry.file} needs {entry.bytes / 2**30:.3g} GiB, {free_gib:.3g} GiB are free; "
            f"make room or lower data.cache_gib ({self._limit_gib:g})"
        )


class PartReceiver(Receiver):
    """Fills a part. The disk writes what has come while more is coming, so that the sync at the end finds little to do."""

    def __init__(self, part: BinaryIO, expected_bytes: int, stopped: Callable[[], bool]):
        self._stopped = stopped
        super().__init__(part, expected_bytes)

    def restart(self) -> None:
        super().restart()
        self._written_bytes = 0

    def write(self, data: bytes) -> int:
        """As Receiver's; raises CopyStopped once `stopped()`."""
        if self._stopped():
            raise CopyStopped
        count = super().write(data)
        if (fresh_bytes := self.received_bytes - self._written_bytes) >= WRITE_BACK_BYTES:
            self.file.flush()
            # makes the system begin to write them; it drops pages already on disk, which none of these are
            os.posix_fadvise(self.file.fileno(), self._written_bytes, fresh_bytes, os.POSIX_FADV_DONTNEED)
            self._written_bytes = self.received_bytes
        return count


@contextmanager
def _flocked(file: BinaryIO, kind: int) -> Iterator[None]:
    """Raises BlockingIOError, if `kind` says so."""
    fcntl.flock(file, kind)
    try:
        yield
    finally:
        fcntl.flock(file, UNLOCK)


def _parts_in_work(folder: Path) -> Iterator[tuple[Path, BinaryIO]]:
    """The parts that live processes are writing; those of dead ones are removed."""
    for path in sorted(folder.glob("*.part")):
        try:
            part = open(path, "rb")
        except FileNotFoundError:  # finished just now
            continue
        try:
            with _flocked(part, EXCLUSIVE | fcntl.LOCK_NB):
                _remove_unless_finished(path, part)
            part.close()
        except BlockingIOError:
            yield path, part


def _remove_unless_finished(path: Path, part: BinaryIO) -> None:
    if path.exists() and os.fstat(part.fileno()).st_ino == path.stat().st_ino:
        path.unlink()


def _discard(part: BinaryIO) -> None:
    Path(part.name).unlink(missing_ok=True)
    fcntl.flock(part, UNLOCK)  # who waits for it goes on
    part.close()


def _idle(path: Path) -> bool:
    """Whether no process has this copy open."""
    with open(path, "rb") as copy:
        try:
            with _flocked(copy, EXCLUSIVE | fcntl.LOCK_NB):
                return True
        except BlockingIOError:
            return False


def _marked(file: BinaryIO) -> BinaryIO:
    """`file` locked as in use and stamped with the time of its use, which eviction sorts by."""
    fcntl.flock(file, SHARED)
    now = time.time_ns()  # finer than the kernel's own stamp
    os.utime(file.fileno(), ns=(now, now))
    return file

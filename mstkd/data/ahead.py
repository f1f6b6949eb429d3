"""Staging what a stream is about to read: while subjects of one tar are read, a thread brings the tars that come next.

Every process that reads has its own; the cache's locks see to it that a tar comes once per node.
"""

import logging
import threading
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from typing import BinaryIO

from mstkd.data.sample import Item
from mstkd.data.staging import CopyStopped, NoRoom
from mstkd.data.store import ShardStore
from mstkd.shards.spec import ShardEntry

log = logging.getLogger(__name__)

Key = tuple[int, str]  # index of the store, file of the tar
THREAD = "mstkd-staging"


def staged_ahead(items: Iterator[Item], stores: Sequence[ShardStore], most_tars: int) -> Iterator[Item]:
    """`items`, unchanged, each to be read before the next is asked for; tars of later ones are staged in the order of their use.

    Ahead means: up to `most_tars` tars from the item being read on, as many as fit into the cache together, and no
    further than the next epoch. What fails ahead of time is tried again by the reader, who hears the reason; it is no
    error of a tar that nobody comes to read. Sets that are read where they lie start no thread.
    """
    limits_bytes = [store.cache_bytes for store in stores if store.cache_bytes is not None]
    if not limits_bytes:
        yield from items
        return
    stager = Stager(stores)
    horizon = _Horizon(stores, stager, most_tars, min(limits_bytes))
    try:
        beyond = next(items, None)
        while beyond or horizon.items:
            while beyond and horizon.admits(beyond):
                horizon.add(beyond)
                beyond = next(items, None)
            yield horizon.items[0]
            horizon.pass_first()
    finally:
        stager.stop()


class _Horizon:
    """The items from the one being read to the last one looked at, and the tars that they lie in."""

    def __init__(self, stores: Sequence[ShardStore], stager: "Stager", most_tars: int, limit_bytes: int):
        self.items: deque[Item] = deque()
        self._stores, self._stager, self._most_tars, self._limit_bytes = stores, stager, most_tars, limit_bytes
        self._uses: Counter[Key] = Counter()
        self._bytes = 0

    def admits(self, item: Item) -> bool:
        if not self.items:
            return True
        key, tar = self._tar(item)
        fits = len(self._uses) < self._most_tars and self._bytes + tar.bytes <= self._limit_bytes
        return (key in self._uses or fits) and item.epoch <= self.items[0].epoch + 1  # the order remembers two epochs

    def add(self, item: Item) -> None:
        key, tar = self._tar(item)
        if key not in self._uses:
            self._bytes += tar.bytes
            self._stager.want(key, tar)
        self._uses[key] += 1
        self.items.append(item)

    def pass_first(self) -> None:
        key, tar = self._tar(self.items.popleft())
        self._uses[key] -= 1
        if not self._uses[key]:
            del self._uses[key]
            self._bytes -= tar.bytes
            self._stores[key[0]].release(tar)
            self._stager.release(key)
        self._stager.retry()

    def _tar(self, item: Item) -> tuple[Key, ShardEntry]:
        tar = self._stores[item.source].tar_of(item.subject)
        return (item.source, tar.file), tar


class Stager:
    """One thread that brings tars into the cache in the order in which they were wanted, and keeps them there until released.

    It starts with the first tar wanted, which is after a worker process was forked, and ends with `stop` or the process.
    """

    def __init__(self, stores: Sequence[ShardStore]):
        self._stores = stores
        self._queue: deque[tuple[Key, ShardEntry]] = deque()
        self._wanted: dict[Key, BinaryIO | None] = {}  # the copy, once it is there
        self._changed = threading.Condition()
        self._passed, self._stopped, self._started = 0, False, False

    def want(self, key: Key, tar: ShardEntry) -> None:
        """Returns at once."""
        with self._changed:
            self._wanted[key] = None
            self._queue.append((key, tar))
            self._changed.notify()
        if not self._started:
            self._started = True
            # daemon: a process that ends does not wait for a download; what is left of it is never used
            threading.Thread(target=self._run, name=THREAD, daemon=True).start()

    def release(self, key: Key) -> None:
        with self._changed:
            copy = self._wanted.pop(key)
        if copy:
            copy.close()

    def retry(self) -> None:
        """There may be room now."""
        with self._changed:
            self._passed += 1
            self._changed.notify()

    def stop(self) -> None:
        """The thread ends at the next bytes of its download, whose part it removes."""
        with self._changed:
            self._stopped = True
            copies = [copy for copy in self._wanted.values() if copy]
            self._wanted.clear()
            self._changed.notify()
        for copy in copies:
            copy.close()

    def _run(self) -> None:
        while task := self._next():
            key, tar = task
            try:
                self._keep(key, self._bring(key, tar))
            except CopyStopped:
                log.debug("%s: no longer wanted", tar.file)
            except Exception as error:
                log.info("not staged ahead, its reader will try again: %s", error)

    def _next(self) -> tuple[Key, ShardEntry] | None:
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._stopped)
            return None if self._stopped else self._queue.popleft()

    def _bring(self, key: Key, tar: ShardEntry) -> BinaryIO:
        while key in self._wanted:
            passed = self._passed
            try:
                return self._stores[key[0]].stage(tar, lambda: key not in self._wanted)
            except NoRoom:
                with self._changed:
                    self._changed.wait_for(lambda: self._passed > passed or key not in self._wanted)
        raise CopyStopped

    def _keep(self, key: Key, copy: BinaryIO) -> None:
        with self._changed:
            if self._wanted.get(key, copy) is None:
                self._wanted[key] = copy
                return
        copy.close()  # released meanwhile, or wanted twice

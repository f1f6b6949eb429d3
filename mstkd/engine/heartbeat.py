"""Signs of life of every rank, and the watchdog that ends a run which hangs and names who holds it up.

Each rank writes <run>/heartbeats/rank-<n>.json every few seconds from a thread of its own, whatever its main thread
is waiting for. A rank without progress for `watchdog.hang_min` reads all of them and says which rank is missing,
silent or behind; all ranks then end, and the batch script decides whether to start again.
Cost: one small file per rank and interval; at 512 ranks and 10 s about 50 writes/s on the shared file system.
"""

import json
import logging
import os
import socket
import threading
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from mstkd import attempts
from mstkd.config import WatchdogConfig
from mstkd.engine.environment import Ranks

log = logging.getLogger(__name__)
HUNG = 75  # exit code of a rank that the watchdog ended
SILENT_BEATS = 4  # a rank that missed so many beats is gone or stopped
PHASES = ("start", "save", "validate", "data", "agree", "step", "end")  # as they follow each other between two updates


@dataclass
class Beat:
    """What a rank was doing at its last sign of life."""

    rank: int
    host: str
    pid: int
    attempt: int
    stage: str | None = None
    step: int = 0  # updates done
    total_steps: int = 0
    phase: str = "start"  # one of PHASES
    part: int = 0  # inside a phase: validation cases done
    steps_per_s: float | None = None
    progress: float = 0.0  # seconds since 1970: the last change of phase or step, by the rank's own clock


class Heartbeat:
    """As a context manager: writes beats and watches. `at` alone, without the context, only remembers."""

    def __init__(self, run_dir: Path, ranks: Ranks, attempt: int, config: WatchdogConfig):
        self.run_dir, self.ranks, self.config = Path(run_dir), ranks, config
        self.folder = self.run_dir / "heartbeats"
        self.beat = Beat(ranks.rank, socket.gethostname(), os.getpid(), attempt, progress=time.time())
        self._moved = time.monotonic()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="heartbeat", daemon=True)

    def __enter__(self) -> "Heartbeat":
        self.folder.mkdir(parents=True, exist_ok=True)
        self._write()
        self._thread.start()
        return self

    def __exit__(self, *_error) -> None:
        self.at("end")
        self._over.set()
        self._thread.join()
        self._write()

    def at(self, phase: str, **changes) -> None:
        """The main thread has come to `phase`; `changes` are other fields of the beat. Costs nothing."""
        self.beat = replace(self.beat, **{"part": 0, **changes}, phase=phase, progress=time.time())
        self._moved = time.monotonic()

    def keep_out(self) -> None:
        """End this process if another attempt has started: after a cut link two may be alive, and one may write."""
        if attempts.latest(self.run_dir) > self.beat.attempt:
            self._end("another attempt of this run has started; this one ends without saving", say=False)

    def _watch(self) -> None:
        while not self._over.wait(self.config.heartbeat_s):
            try:
                self._write()
                self.keep_out()
                if time.monotonic() - self._moved > 60 * self.config.hang_min:
                    self._end(diagnosis(read_beats(self.folder), self.beat.attempt, self.ranks.world, self.config))
            except (OSError, ValueError, TypeError) as error:  # a shared file system may stall or vanish for a while
                log.warning("heartbeat: %s", error)

    def _end(self, reason: str, say: bool = True) -> None:
        log.critical("%s", reason)
        if say:
            attempts.end(self.run_dir, self.beat.attempt, attempts.Ending("hung", reason, self.beat.stage, self.beat.step))
        logging.shutdown()
        os._exit(HUNG)  # the main thread may sit in a collective for ever

    def _write(self) -> None:
        path = self.folder / f"rank-{self.ranks.rank}.json"
        partial = path.with_suffix(".tmp")
        partial.write_text(json.dumps(asdict(self.beat)))
        os.replace(partial, path)  # not forced onto the disk: a busy one would make a rank look silent


def read_beats(folder: Path) -> dict[int, tuple[Beat, float]]:
    """By rank: the last beat, and when the file system wrote it (one clock for all ranks), in seconds since 1970."""
    found = {}
    for path in Path(folder).glob("rank-*.json"):
        try:
            beat = Beat(**json.loads(path.read_text()))
            found[beat.rank] = beat, path.stat().st_mtime
        except FileNotFoundError:
            continue  # being replaced just now
    return found


def diagnosis(beats: dict[int, tuple[Beat, float]], attempt: int, world: int, config: WatchdogConfig) -> str:
    """One line: which rank holds the run up, where it is and what it was doing."""
    beats = {rank: seen for rank, seen in beats.items() if seen[0].attempt == attempt}
    limit = f"no progress for {config.hang_min:g} min (watchdog.hang_min)"
    if absent := sorted(set(range(world)) - set(beats)):
        return f"{limit}: rank {_numbers(absent)} never started"
    newest = max(written for _, written in beats.values())
    silent = [beat for beat, written in beats.values() if newest - written > SILENT_BEATS * config.heartbeat_s]
    if silent:
        return f"{limit}: no sign of life from {_named(silent)}"
    places = {rank: (beat.step, PHASES.index(beat.phase), beat.part) for rank, (beat, _) in beats.items()}
    late = [beats[rank][0] for rank, place in places.items() if place == min(places.values())]
    if len(late) < world:
        return f"{limit}: the others wait for {_named(late)}"
    return f"{limit}: all ranks wait for each other, a node or a link between them may be down: {_named(late)}"


def _named(beats: list[Beat], most: int = 4) -> str:
    named = [f"rank {b.rank} on {b.host} (step {b.step}, {b.phase})" for b in sorted(beats, key=lambda b: b.rank)[:most]]
    return ", ".join(named) + (f" and {len(beats) - most} more" if len(beats) > most else "")


def _numbers(ranks: list[int], most: int = 8) -> str:
    return ", ".join(map(str, ranks[:most])) + (f" and {len(ranks) - most} more" if len(ranks) > most else "")

"""The starts of a run and how each one ended, kept where every rank and the batch script can write.

<run>/attempts/0003.json            the start: job, ranks (written by rank 0)
<run>/attempts/0003.end.json        the ending, by whoever knows it first: a rank, its watchdog, or the batch script
"""

from __future__ import annotations  # the batch script's python3 may be older than the container's

import json
import os
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

Outcome = Literal["finished", "interrupted", "stopped", "bad_input", "failed", "hung", "killed"]
"""interrupted: USR2, the time limit or a preemption is near. stopped: SIGTERM or Ctrl-C, somebody decided.
failed: an exception. hung: the watchdog ended it. killed: gone without a word (kill -9, a node, memory)."""
CRASHES = ("failed", "hung", "killed")


@dataclass(frozen=True)
class Ending:
    outcome: Outcome
    reason: str  # one line
    stage: str | None = None
    step: int | None = None  # updates done in the stage


@dataclass(frozen=True)
class Attempt:
    number: int  # from 1
    started: str
    world_size: int
    job: str | None  # SLURM's job id, <array>_<task> in an array
    commit: str | None  # of the code that ran
    versions: dict[str, str]  # of what it ran with
    ending: Ending | None  # None: it runs, or nothing could write how it ended


def begin(run_dir: Path, world_size: int, job: str | None, commit: str | None = None, versions: dict[str, str] | None = None) -> int:
    """Note a start; returns its number."""
    folder = Path(run_dir) / "attempts"
    folder.mkdir(parents=True, exist_ok=True)
    start = {"started": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "world_size": world_size, "job": job, "commit": commit, "versions": versions or {}}
    number = latest(run_dir) + 1
    while not _write_new(folder / f"{number:04d}.json", start):  # another start came first
        number += 1
    return number


def end(run_dir: Path, number: int, ending: Ending) -> bool:
    """Note how an attempt ended. The first word stays: False if there was one."""
    return _write_new(_end_path(run_dir, number), asdict(ending))


def latest(run_dir: Path) -> int:
    """The number of the newest attempt, 0 before the first."""
    return max((int(path.name[:4]) for path in (Path(run_dir) / "attempts").glob("????.json")), default=0)


def read(run_dir: Path) -> list[Attempt]:
    """All attempts, oldest first."""
    found = []
    for path in sorted((Path(run_dir) / "attempts").glob("????.json")):
        number = int(path.name[:4])
        end_path = _end_path(run_dir, number)
        ending = Ending(**json.loads(end_path.read_text())) if end_path.is_file() else None
        found.append(Attempt(number, **json.loads(path.read_text()), ending=ending))
    return found


def _end_path(run_dir: Path, number: int) -> Path:
    return Path(run_dir) / "attempts" / f"{number:04d}.end.json"


def _write_new(path: Path, content: dict) -> bool:
    """Write in one move; False, and nothing happens, if the file exists."""
    partial = path.with_name(f".{path.name}.{os.uname().nodename}.{os.getpid()}.{threading.get_ident()}")
    partial.write_text(json.dumps(content))
    try:
        os.link(partial, path)  # fails if it exists, also on NFS, where O_EXCL may not
    except FileExistsError:
        return False
    finally:
        partial.unlink()
    return True

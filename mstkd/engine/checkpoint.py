"""Step-exact checkpoints of one stage.

<run>/<stage>/checkpoints/
    step-00000120/            120 updates done
        state.json            step, best score, sha256 of every other file; written last
        <role>/...            DeepSpeed's weights and optimiser state
        <role>.safetensors    consolidated weights, keys <network>.<parameter>; where `best` points
    latest, best              the names of such folders

A folder is written as *.tmp and renamed when complete; `latest` moves after that. So whatever happens,
`latest` names something sound, and what is damaged later is found by its checksum.
"""

import hashlib
import json
import logging
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

from mstkd.engine.distributed import Ranks, barrier

log = logging.getLogger(__name__)
STATE = "state.json"


@dataclass
class TrainState:
    """What a stage's loop needs to go on, besides the roles' own states."""

    step: int = 0
    best_score: float | None = None
    best_step: int | None = None
    finished: bool = False


class Checkpoints:
    """The checkpoint folder of one stage."""

    def __init__(self, folder: Path, ranks: Ranks, keep: int):
        self.folder, self.ranks, self.keep = folder, ranks, keep
        self._saved_step: int | None = None

    def save(self, state: TrainState, write_roles, write_best=None) -> None:
        """Write step-<state.step>. Collective.

        `write_roles(folder)` is called on every rank; `write_best(folder)`, if given, too, and `best` then points here.
        """
        if self._saved_step == state.step and write_best is None:
            return
        final = self.folder / f"step-{state.step:08d}"
        partial = final.with_suffix(".tmp")
        if self.ranks.main:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        barrier(self.ranks)
        write_roles(partial)
        if write_best is not None:
            write_best(partial)
        barrier(self.ranks)
        if self.ranks.main:
            self._commit(partial, final, state, is_best=write_best is not None)
        barrier(self.ranks)
        self._saved_step = state.step

    def newest_sound(self) -> Path | None:
        """The newest checkpoint whose files match their checksums; warns of each one passed over."""
        for folder in sorted(self.folder.glob("step-????????"), reverse=True):
            problem = damage(folder)
            if problem is None:
                return folder
            log.warning("checkpoint %s is damaged (%s); falling back to the one before", folder.name, problem)
        return None

    def pointer(self, name: str) -> Path | None:
        """The folder that `latest` or `best` names, if any."""
        path = self.folder / name
        return self.folder / path.read_text().strip() if path.is_file() else None

    def _commit(self, partial: Path, final: Path, state: TrainState, is_best: bool) -> None:
        files = sorted(p for p in partial.rglob("*") if p.is_file())
        checksums = {str(p.relative_to(partial)): _sha256(p) for p in files}
        _write_durably(partial / STATE, json.dumps({"state": asdict(state), "sha256": checksums}, indent=1))
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        if is_best:
            self._point("best", final)
        self._point("latest", final)
        self._prune()

    def _point(self, name: str, target: Path) -> None:
        partial = self.folder / f"{name}.tmp"
        _write_durably(partial, target.name + "\n")
        os.replace(partial, self.folder / name)

    def _prune(self) -> None:
        best = self.pointer("best")
        newest_first = sorted(self.folder.glob("step-????????"), reverse=True)
        for folder in newest_first[self.keep :]:
            if folder != best:
                shutil.rmtree(folder)


def read_state(folder: Path) -> TrainState:
    return TrainState(**json.loads((folder / STATE).read_text())["state"])


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint folder, or None."""
    try:
        checksums = json.loads((folder / STATE).read_text())["sha256"]
    except (OSError, ValueError, KeyError):
        return f"no readable {STATE}"
    for name, expected in checksums.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if _sha256(path) != expected:
            return f"{name} does not match its checksum"
    return None


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _write_durably(path: Path, text: str) -> None:
    with path.open("w") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())

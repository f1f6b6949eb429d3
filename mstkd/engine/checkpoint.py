"""Step-exact checkpoints of one stage.

<run>/<stage>/checkpoints/
    step-00000120/            120 updates done
        state.json            step, best score, sha256 of every other file; written last
        <role>/...            DeepSpeed's weights and optimiser state
        <role>.safetensors    consolidated weights, keys <network>.<parameter>; where `best` points
    latest, best              the names of such folders

A folder is written as *.tmp and renamed when complete; `latest` moves after that. So whatever happens,
`latest` names something sound; what is damaged later is found by its checksum and set aside as *.damaged.
"""

import hashlib
import json
import logging
import os
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path

from mstkd.engine.distributed import barrier
from mstkd.engine.environment import Ranks
from mstkd.errors import UserError

log = logging.getLogger(__name__)
STATE = "state.json"


@dataclass
class TrainState:
    """What a stage's loop needs to go on, besides the roles' own states."""

    step: int = 0
    best_score: float | None = None
    best_step: int | None = None
    validated_step: int | None = None  # the last step whose validation is done
    finished: bool = False
    bad_samples: int = 0  # skipped so far, by all ranks in all attempts
    frozen: dict[str, dict[str, str]] = field(default_factory=dict)  # networks that the stage uses and does not train: "path", "sha256"


class Checkpoints:
    """The checkpoint folder of one stage."""

    def __init__(self, folder: Path, ranks: Ranks, keep: int, sharded: bool):
        """`sharded`: some role's optimiser state is cut by ranks (ZeRO 1-3), so that only as many ranks can load it."""
        self.folder, self.ranks, self.keep, self.sharded = folder, ranks, keep, sharded
        self.saved_step: int | None = None  # the newest one written or resumed from

    def save(self, state: TrainState, write_roles) -> None:
        """Write step-<state.step>; `write_roles(folder)` is called on every rank. Collective."""
        final = self._step_folder(state)
        partial = final.with_suffix(".tmp")
        if self.ranks.main:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        barrier(self.ranks)
        write_roles(partial)
        barrier(self.ranks)
        if self.ranks.main:
            _seal(partial, state, self.ranks.world, _checksums(partial))
            shutil.rmtree(final, ignore_errors=True)
            partial.rename(final)
            self._point("latest", final)
            self._prune()
        barrier(self.ranks)
        self.saved_step = state.step

    def amend(self, state: TrainState, write_best=None) -> None:
        """Replace the state kept in step-<state.step>, which `save` wrote before. Collective.

        `write_best(folder)`, if given, is called on every rank; its files are added, and `best` then points here.
        """
        final = self._step_folder(state)
        partial = final.with_suffix(".tmp")
        if self.ranks.main and write_best is not None:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
        barrier(self.ranks)
        if write_best is not None:
            write_best(partial)
        if self.ranks.main:
            before = _read(final)
            checksums = before["sha256"]
            if write_best is not None:
                checksums |= _checksums(partial)
                for file in partial.iterdir():
                    os.replace(file, final / file.name)
                partial.rmdir()
            _seal(final, state, before["ranks"], checksums)
            if write_best is not None:
                self._point("best", final)
                self._prune()
        barrier(self.ranks)

    def newest_sound(self) -> tuple[Path, TrainState] | None:
        """The newest checkpoint whose files match their checksums, and its state; None if none was ever written.

        Each damaged one is named in a warning and set aside. Raises UserError, and changes nothing, if there are
        checkpoints but none is sound, or if another number of ranks wrote it and its state is cut by ranks.
        """
        sound, damaged = None, []
        for folder in sorted(self.folder.glob("step-????????"), reverse=True):
            problem = damage(folder)
            if problem is None:
                sound = folder
                break
            damaged.append((folder, problem))
        if sound is None and (damaged or any(self.folder.glob("step-*.damaged"))):
            raise UserError(
                f"{self.folder}: every checkpoint is damaged; restore one from a copy, delete this folder to train the stage anew, "
                "or start another run with name=..."
            )
        if sound is None:
            return None
        self._check_ranks(sound)
        for folder, problem in damaged:
            aside = folder.with_suffix(".damaged")
            shutil.rmtree(aside, ignore_errors=True)
            folder.rename(aside)
            log.warning("checkpoint %s is damaged (%s): set aside as %s; falling back to the one before", folder.name, problem, aside.name)
        return sound, self._state_of(sound)

    def pointer(self, name: str) -> Path | None:
        """The folder that `latest` or `best` names, if any."""
        path = self.folder / name
        return self.folder / path.read_text().strip() if path.is_file() else None

    def _step_folder(self, state: TrainState) -> Path:
        return self.folder / f"step-{state.step:08d}"

    def _check_ranks(self, folder: Path) -> None:
        wrote = _read(folder)["ranks"]
        if self.sharded and wrote != self.ranks.world:
            raise UserError(
                f"{folder}: {wrote} ranks wrote it and {self.ranks.world} are here; the optimiser state of ZeRO 1-3 is cut by ranks: "
                f"resume on {wrote}, or start another run from its weights with name=... init_from=RUN"
            )

    def _state_of(self, folder: Path) -> TrainState:
        """The state in a sound checkpoint; a best checkpoint that no longer exists is forgotten, with a warning."""
        state, best = read_state(folder), self.pointer("best")
        if best is not None and not best.is_dir():
            log.warning("the best checkpoint, %s, is gone; the next validation names a new one", best.name)
            (self.folder / "best").unlink()
            state.best_score = state.best_step = None
        return state

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
    return TrainState(**_read(folder)["state"])


def is_finished(folder: Path) -> bool:
    """Whether the stage whose checkpoints lie in `folder` has been trained to its end."""
    latest = folder / "latest"
    if not latest.is_file():
        return False
    state = folder / latest.read_text().strip() / STATE
    return state.is_file() and read_state(state.parent).finished


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint folder, or None."""
    try:
        checksums = _read(folder)["sha256"]
    except (OSError, ValueError, KeyError):
        return f"no readable {STATE}"
    for name, expected in checksums.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if _sha256(path) != expected:
            return f"{name} does not match its checksum"
    return None


def _read(folder: Path) -> dict:
    return json.loads((folder / STATE).read_text())


def _seal(folder: Path, state: TrainState, ranks: int, checksums: dict[str, str]) -> None:
    """Write state.json in one move: until then the folder counts as what it was."""
    partial = folder / f"{STATE}.tmp"
    _write_durably(partial, json.dumps({"state": asdict(state), "ranks": ranks, "sha256": checksums}, indent=1))
    os.replace(partial, folder / STATE)


def _checksums(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): _sha256(p) for p in sorted(folder.rglob("*")) if p.is_file()}


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _write_durably(path: Path, text: str) -> None:
    with path.open("w") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())

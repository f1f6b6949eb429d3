"""Step-exact checkpoints of one stage.

<run>/<stage>/checkpoints/
    step-00000120/            120 updates done
        state.json            step, best score, the roles' shapes, sha256 of every other file; written last
        <role>/...            DeepSpeed's weights and optimiser state
        <role>.safetensors    consolidated weights, keys <network>.<parameter>; where `best` points
    latest, best              the names of such folders

A folder is written as *.tmp and renamed when complete; `latest` moves after that. So whatever happens,
`latest` names something sound; what is damaged later is found by its checksum and set aside as *.damaged.
"""

import json
import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from mstkd.config import CheckpointConfig
from mstkd.engine.distributed import barrier, from_all, from_main
from mstkd.engine.environment import Ranks
from mstkd.engine.new_files import NewFiles, write_durably
from mstkd.errors import UserError
from mstkd.files import sha256_of

log = logging.getLogger(__name__)
STATE = "state.json"


class NotWrittenError(Exception):
    """What was to be written is not there, and everything that was there before is; says which rank failed, where and why."""

    def __init__(self, problem: str, step: int):
        super().__init__(problem)
        self.step = step


@dataclass
class TrainState:
    """What a stage's loop needs to go on, besides the roles' own states."""

    step: int = 0
    best_score: float | None = None
    best_step: int | None = None
    validated_step: int | None = None  # the last step whose validation is done
    finished: bool = False
    bad_samples: int = 0  # skipped so far, by all ranks in all attempts
    skipped_updates: int = 0  # because of non-finite gradients, in all attempts
    failed_saves: int = 0  # in all attempts that could save afterwards
    frozen: dict[str, dict[str, str]] = field(default_factory=dict)  # networks that the stage uses and does not train: "path", "sha256"


@dataclass
class _Unsealed:
    """A folder whose files are being written."""

    files: NewFiles
    publish: Callable[[Path, dict[str, str]], None]  # makes the folder count, on rank 0
    step: int


class Checkpoints:
    """The checkpoint folder of one stage."""

    def __init__(self, folder: Path, ranks: Ranks, policy: CheckpointConfig):
        self.folder, self.ranks, self.policy = folder, ranks, policy
        self.saved_step: int | None = None  # the newest one written or resumed from
        self._unsealed: _Unsealed | None = None  # the same on all ranks

    def save(
        self, state: TrainState, shapes: dict[str, dict[str, list[int]]], write: Callable[[NewFiles], None], background: bool = False
    ) -> None:
        """Write step-<state.step>. Collective. Raises NotWrittenError on all ranks if one fails.

        `write(files)` is called on every rank; `shapes`: by role and name, what a resume compares with its own networks.
        In the `background` the files are written after this returns; nothing counts, or fails, until `finish` is called.
        """
        final, kept = self._step_folder(state), asdict(state)

        def publish(partial: Path, sha256: dict[str, str]) -> None:
            _seal(partial, {"state": kept, "ranks": self.ranks.world, "roles": shapes, "sha256": sha256})
            latest = self._pointing_at(final, "latest")
            shutil.rmtree(final, ignore_errors=True)
            partial.rename(final)  # from here on nothing needs room on the disk
            os.replace(latest, self.folder / "latest")

        self._begin(state, write, publish, background)
        if not background:
            self.finish()

    def amend(self, state: TrainState, write_best: Callable[[NewFiles], None] | None = None) -> None:
        """Replace the state kept in step-<state.step>, which `save` wrote before. Collective. Raises as `save`.

        `write_best(files)`, if given, is called on every rank; its files are added, and `best` then points here.
        """
        final = self._step_folder(state)

        def publish(partial: Path, sha256: dict[str, str]) -> None:
            before = read_sealed(final)
            _seal(partial, before | {"state": asdict(state), "sha256": before["sha256"] | sha256})
            best = self._pointing_at(final, "best") if write_best else None
            for name in sha256:
                os.replace(partial / name, final / name)
            if best is not None:
                os.replace(best, self.folder / "best")
            os.replace(partial / STATE, final / STATE)  # last: what ends in between is validated again
            partial.rmdir()

        self._begin(state, write_best or (lambda files: None), publish)
        self.finish()

    @property
    def pending(self) -> bool:
        """Whether something was saved in the background and does not count yet: the same on all ranks."""
        return self._unsealed is not None

    @property
    def writing(self) -> bool:
        """Whether this rank's thread is still at what was saved in the background."""
        return self.pending and not self._unsealed.files.done

    def finish(self) -> None:
        """Make what was saved in the background count, if anything was, once it is written. Collective. Raises as `save`."""
        if not self.pending:
            return
        unsealed, self._unsealed = self._unsealed, None
        files = unsealed.files
        files.wait()
        told = from_all((files.problem, files.sha256), self.ranks)  # each rank has hashed its own files
        problem = next((f"rank {rank}: {problem}" for rank, (problem, _) in enumerate(told) if problem), None)
        if problem is None:
            if self.ranks.main:
                with files.guarded():
                    known = {name: digest for _, sha256 in told for name, digest in sha256.items()}
                    unsealed.publish(files.folder, checksums(files.folder, known))
            problem = from_main(files.problem and f"rank 0: {files.problem}", self.ranks)
        if self.ranks.main:
            if problem is None:
                self._prune()
            else:
                shutil.rmtree(files.folder, ignore_errors=True)
        barrier(self.ranks)
        if problem is not None:
            raise NotWrittenError(problem, unsealed.step)
        self.saved_step = unsealed.step

    def newest_sound(self) -> tuple[Path, TrainState] | None:
        """The newest checkpoint whose files match their checksums, and its state; None if none was ever written.

        Each damaged one is named in a warning and set aside. Raises UserError, and changes nothing, if there are
        checkpoints but none is sound.
        """
        sound, damaged = None, []
        for folder in self._newest_first():
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

    def _begin(self, state: TrainState, write: Callable, publish: Callable, background: bool = False) -> None:
        """Every rank writes into a new folder beside the step's own. Collective."""
        files = NewFiles(self._step_folder(state).with_suffix(".tmp"), background)
        if self.ranks.main:
            with files.guarded():
                shutil.rmtree(files.folder, ignore_errors=True)
                files.folder.mkdir(parents=True)
        barrier(self.ranks)
        self._unsealed = _Unsealed(files, publish, state.step)
        write(files)

    def _step_folder(self, state: TrainState) -> Path:
        return self.folder / f"step-{state.step:08d}"

    def _newest_first(self) -> list[Path]:
        return sorted(self.folder.glob("step-????????"), reverse=True)

    def _state_of(self, folder: Path) -> TrainState:
        """The state in a sound checkpoint; a best checkpoint that is not there is forgotten, with a warning."""
        state, best = read_state(folder), self.pointer("best")
        if best is not None and not best.is_dir():
            log.warning("the best checkpoint, %s, is gone; the next validation names a new one", best.name)
            (self.folder / "best").unlink()
            best = None
        if best is None:
            state.best_score = state.best_step = None
        return state

    def _pointing_at(self, target: Path, name: str) -> Path:
        """A file to become `latest` or `best`."""
        partial = self.folder / f"{name}.tmp"
        write_durably(partial, target.name + "\n")
        return partial

    def _prune(self) -> None:
        """Remove what the policy does not keep, and what earlier attempts left unfinished or converted."""
        newest_first, every = self._newest_first(), self.policy.keep_every
        kept = {self.pointer("best"), *newest_first[: self.policy.keep]}
        kept |= {folder for folder in newest_first if every and int(folder.name.removeprefix("step-")) % every == 0}
        passing = [*self.folder.glob("step-*.tmp"), *self.folder.glob("step-*.universal")]
        for folder in [*(folder for folder in newest_first if folder not in kept), *passing]:
            try:
                shutil.rmtree(folder)
            except OSError as error:
                log.warning("%s: cannot be removed: %s", error.filename or folder, error.strerror or error)


def read_state(folder: Path) -> TrainState:
    return TrainState(**read_sealed(folder)["state"])


def read_sealed(folder: Path) -> dict:
    """state.json of a folder: what was written last, when all else lay there."""
    return json.loads((folder / STATE).read_text())


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
        sha256 = read_sealed(folder)["sha256"]
    except (OSError, ValueError, KeyError):
        return f"no readable {STATE}"
    for name, expected in sha256.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if sha256_of(path) != expected:
            return f"{name} does not match its checksum"
    return None


def checksums(folder: Path, known: dict[str, str] = {}) -> dict[str, str]:
    """sha256 by name of every file below `folder`; those in `known` are not read again (and another node's may not show up yet)."""
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    return known | {name: sha256_of(folder / name) for name in sorted(names - known.keys())}


def _seal(folder: Path, sealed: dict) -> None:
    write_durably(folder / STATE, json.dumps(sealed, indent=1))

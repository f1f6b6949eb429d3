"""The runs of a study as processes: several at once, each one resumable by itself."""

import fcntl
import os
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import yaml

from mstkd.compare.runs import evaluated_since
from mstkd.engine.checkpoint import is_finished, read_state
from mstkd.errors import UserError
from mstkd.methods import load, stage_names
from mstkd.run_folder import evaluation_folder, leaves

MSTKD = str(Path(sysconfig.get_path("scripts")) / "mstkd")
POLL_S = 0.2
FREE = ("runs_dir", "data.shards", "teacher.path")  # of a run's recipe: the study's folder may move


@dataclass(frozen=True, eq=False)  # told apart by identity
class StudyRun:
    """One run of a study."""

    arm: str
    values: dict[str, Any]  # its recipe
    notes: Path  # the folder for the recipe as a file and for what the run says
    evaluate: bool  # score the test split after training
    after: tuple["StudyRun", ...] = ()  # those whose networks it takes

    @property
    def name(self) -> str:
        return self.values["name"]

    @property
    def folder(self) -> Path:
        return Path(self.values["runs_dir"]) / self.name

    @property
    def log(self) -> Path:
        return self.notes / f"{self.name}.log"

    @property
    def recipe(self) -> Path:
        return self.notes / f"{self.name}.yaml"

    @property
    def best(self) -> Path:
        """The last stage's pointer to its best checkpoint."""
        method = load(self.values["method"]["name"])
        asked = stage_names(self.values["method"], self.values.get("stages")) or method.stages
        return self.folder / [stage for stage in method.stages if stage in asked][-1] / "checkpoints" / "best"

    @property
    def trained(self) -> bool:
        return is_finished(self.best.parent)

    @property
    def done(self) -> bool:
        """Trained and, if asked for, evaluated since."""
        return self.trained and (not self.evaluate or (self.folder / "evaluation" / "summary.json").is_file() and evaluated_since(self.folder))

    @property
    def ready(self) -> bool:
        """Whether there is what it takes."""
        return all(before.trained for before in self.after)

    @property
    def best_score(self) -> float | None:
        """The last stage's best validation score; None if there is none."""
        return read_state(self.best.parent / self.best.read_text().strip()).best_score if self.best.is_file() else None

    def check(self) -> None:
        """Raise UserError if the run was begun with another recipe."""
        if not self.recipe.is_file():
            return
        before, now = (dict(leaves(recipe)) for recipe in (yaml.safe_load(self.recipe.read_text()), self.values))
        for key in sorted(before.keys() | now.keys()):
            if before.get(key) != now.get(key) and not any(key == free or key.startswith(f"{free}.") for free in FREE):
                raise UserError(
                    f"run {self.name} was begun with {key}={before.get(key)} and is now asked for with {now.get(key)}; undo the change, give the study "
                    f"another name=..., or remove {self.folder} and {self.recipe}"
                )

    def command(self) -> list[str]:
        """What brings it forward: training until that is over, then the evaluation."""
        if self.trained:
            return [MSTKD, "evaluate", str(self.folder)]
        self.note()
        return [MSTKD, "train", str(self.recipe)]

    def note(self) -> None:
        """Leave the recipe for `check`."""
        self.notes.mkdir(parents=True, exist_ok=True)
        self.recipe.write_text(yaml.safe_dump(self.values, sort_keys=False))


@dataclass(frozen=True, eq=False)
class AnotherEvaluation(StudyRun):
    """A run of the study that is trained already, evaluated with other settings of how it predicts."""

    overrides: tuple[str, ...] = ()  # the settings

    @property
    def of(self) -> StudyRun:
        return self.after[0]

    @property
    def ready(self) -> bool:
        """Two evaluations of one run would write into its folder at once."""
        return self.of.done

    @property
    def folder(self) -> Path:
        """The evaluation's."""
        shards = self.values["data"]["shards"]
        places = [shards] if isinstance(shards, str) else [one["path"] for one in shards]
        return evaluation_folder(self.of.folder, places, "test", self.overrides)

    @property
    def trained(self) -> bool:
        return self.of.trained

    @property
    def done(self) -> bool:
        return (self.folder / "summary.json").is_file() and evaluated_since(self.folder)

    def command(self) -> list[str]:
        self.note()
        return [MSTKD, "evaluate", str(self.of.folder), *self.overrides]


@contextmanager
def alone(folder: Path) -> Iterator[IO]:
    """The study's lock, which its children hold, too: an orphan of a killed study is still at work. Raises UserError if it is taken."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{folder}: another `mstkd study`, or a run that it left behind, is at work here; wait for it, or end it") from None
        yield lock


def run_all(runs: Sequence[StudyRun], jobs: int, lock: IO, say: Callable[[str], None]) -> list[StudyRun]:
    """Bring every run to its end, `jobs` at once; those that are done already are left alone. Returns those that failed.

    A failed run does not stop the others but for those that take from it. What ends this call, a signal too, is passed on
    to the running ones, which save.
    """
    waiting, failed = [run for run in runs if not run.done], []
    say(f"{len(runs) - len(waiting)} of {len(runs)} runs are done, {len(waiting)} to go")
    began, ended = time.monotonic(), 0
    with _children() as running:
        while waiting or running:
            while len(running) < jobs and (run := next((run for run in waiting if run.ready), None)):
                waiting.remove(run)
                running[run] = _start(run, lock)
            for run, (process, trained_before) in list(running.items()):
                if process.poll() is None:
                    continue
                del running[run]
                if process.returncode == 0 and run.trained and not trained_before and not run.done:
                    waiting.insert(0, run)  # trained: now its evaluation
                    continue
                good = process.returncode == 0 and run.done
                lost = [] if good else _give_up(waiting, run)
                failed += [] if good else [run, *lost]
                ended += 1
                left = (time.monotonic() - began) / ended * (len(waiting) + len(running)) / 60
                say(f"{run.name}: {'done' if good else f'FAILED, see {run.log}'} ({len(waiting) + len(running)} left, about {left:.0f} min)")
                for one in lost:
                    say(f"{one.name}: not begun, since {run.name} failed")
            time.sleep(POLL_S)
    return failed


def _give_up(waiting: list[StudyRun], failed: StudyRun) -> list[StudyRun]:
    """Take those out of `waiting` that need what a failed run lacks; returns them."""
    lost = [run for run in waiting if failed in run.after and not run.ready]
    for run in lost:
        waiting.remove(run)
    return lost + [further for run in lost for further in _give_up(waiting, run)]


def _start(run: StudyRun, lock: IO) -> tuple[subprocess.Popen, bool]:
    """The process, and whether the run was trained before it: one thread each, since they share the machine."""
    before, words = run.trained, run.command()
    with run.log.open("a") as log:
        return subprocess.Popen(
            words, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": "1"}, start_new_session=True, pass_fds=[lock.fileno()]
        ), before


@contextmanager
def _children() -> Iterator[dict[StudyRun, tuple[subprocess.Popen, bool]]]:
    """The running processes by run; those that are left when the block ends, for whatever reason, are told to stop and waited for."""
    running: dict[StudyRun, tuple[subprocess.Popen, bool]] = {}
    before = {number: signal.signal(number, lambda number, _: sys.exit(128 + number)) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield running
    finally:
        for process, _ in running.values():
            process.send_signal(signal.SIGTERM)
        for process, _ in running.values():
            process.wait()
        for number, handler in before.items():
            signal.signal(number, handler)

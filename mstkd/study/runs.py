"""The runs of a study as processes: several at once, each one resumable by itself."""

import os
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mstkd.engine.checkpoint import is_finished, read_state
from mstkd.methods import load

POLL_S = 0.2


@dataclass(frozen=True, eq=False)  # told apart by identity
class StudyRun:
    """One run of a study."""

    arm: str
    values: dict[str, Any]  # its recipe
    notes: Path  # the folder for the recipe as a file and for what the run says
    evaluate: bool  # score the test split after training

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
    def checkpoints(self) -> Path:
        """Of its last stage."""
        return self.folder / load(self.values["method"]["name"]).stages[-1] / "checkpoints"

    @property
    def trained(self) -> bool:
        return is_finished(self.checkpoints)

    @property
    def done(self) -> bool:
        return self.trained and (not self.evaluate or (self.folder / "evaluation" / "summary.json").is_file())

    @property
    def best_score(self) -> float | None:
        """The last stage's best validation score."""
        return read_state(self.checkpoints / (self.checkpoints / "best").read_text().strip()).best_score

    def command(self) -> list[str]:
        """What brings it forward: training until that is over, then the evaluation."""
        recipe = self.notes / f"{self.name}.yaml"
        mstkd = str(Path(sysconfig.get_path("scripts")) / "mstkd")
        if self.trained:
            return [mstkd, "evaluate", str(self.folder)]
        self.notes.mkdir(parents=True, exist_ok=True)
        recipe.write_text(yaml.safe_dump(self.values, sort_keys=False))
        return [mstkd, "train", str(recipe)]


def run_all(runs: Sequence[StudyRun], jobs: int, say: Callable[[str], None]) -> list[StudyRun]:
    """Bring every run to its end, `jobs` at once; those that are done already are left alone. Returns those that failed.

    A failed run does not stop the others. What ends this call, a signal too, is passed on to the running ones, which save.
    """
    waiting, failed = [run for run in runs if not run.done], []
    say(f"{len(runs) - len(waiting)} of {len(runs)} runs are done, {len(waiting)} to go")
    began, ended = time.monotonic(), 0
    with _children() as running:
        while waiting or running:
            while waiting and len(running) < jobs:
                run = waiting.pop(0)
                running[run] = _start(run)
            for run, process in list(running.items()):
                if process.poll() is None:
                    continue
                del running[run]
                if process.returncode == 0 and not run.done:
                    waiting.insert(0, run)  # trained: now its evaluation
                    continue
                ended += 1
                left = (time.monotonic() - began) / ended * (len(waiting) + len(running)) / 60
                say(f"{run.name}: {'done' if run.done else f'FAILED, see {run.log}'} ({len(waiting) + len(running)} left, about {left:.0f} min)")
                failed += [] if run.done else [run]
            time.sleep(POLL_S)
    return failed


def _start(run: StudyRun) -> subprocess.Popen:
    words = run.command()
    with run.log.open("a") as log:  # one thread each: they share the machine
        return subprocess.Popen(words, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": "1"}, start_new_session=True)


@contextmanager
def _children():
    """The running processes by run; those that are left when the block ends, for whatever reason, are told to stop and waited for."""
    running: dict[StudyRun, subprocess.Popen] = {}
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield running
    finally:
        for process in running.values():
            process.send_signal(signal.SIGTERM)
        for process in running.values():
            process.wait()
        signal.signal(signal.SIGTERM, before)

"""A store as it stands at one moment, also while its job writes: what `merge` and `sync` read from."""

import fcntl
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities import Run

from mstkd.errors import UserError
from mstkd.track.database import DATABASE, LOCK_WAIT_S, check_schema, connect, unreadable
from mstkd.track.ranking import all_runs
from mstkd.track.session import PARENT

PAGES_PER_STEP = 25_000  # of 4 KiB: between steps the job may write, and within one it waits no more than about a second


class Snapshot:
    """One data base after another, copied into the same file: MLflow never closes what it has opened."""

    def __init__(self, path: Path):
        self.path = path
        self._client: MlflowClient | None = None

    def copy(self, database: Path) -> None:
        """Take a consistent copy. Raises UserError if it is not possible."""
        until = time.monotonic() + 3 * LOCK_WAIT_S

        def still_in_time(_status: int, _remaining: int, _total: int) -> None:
            if time.monotonic() > until:
                raise TimeoutError

        try:
            with closing(connect(database)) as original, closing(sqlite3.connect(self.path)) as copy:
                original.backup(copy, pages=PAGES_PER_STEP, progress=still_in_time)
                (verdict,) = copy.execute("pragma quick_check(1)").fetchone()  # where locks do not work, a copy can be torn
        except TimeoutError:
            raise UserError(f"{database}: locked, or written without a pause; try again later") from None
        except sqlite3.Error as error:
            raise unreadable(database, error) from None
        if verdict != "ok":
            raise unreadable(database, verdict.splitlines()[0])
        check_schema(self.path, database)

    @property
    def client(self) -> MlflowClient:
        """A client of the copy; to be asked for after the first `copy`."""
        if self._client is None:
            self._client = MlflowClient(f"sqlite:///{self.path}")
        return self._client

    def trees(self) -> Iterator["Tree"]:
        """The runs of the copy, each with all that hangs below it, in the order in which they began."""
        for experiment in self.client.search_experiments():
            runs = all_runs(self.client, experiment.experiment_id)
            above = {run.info.run_id: run.data.tags.get(PARENT) for run in runs}
            trees: dict[str, list[Run]] = {}
            for run in sorted(runs, key=lambda run: (len(_line(run.info.run_id, above)), run.info.start_time, run.info.run_id)):
                trees.setdefault(_line(run.info.run_id, above)[-1], []).append(run)
            for members in sorted(trees.values(), key=lambda members: members[0].info.start_time):
                yield Tree(experiment.name, members)


@dataclass(frozen=True)
class Tree:
    """A run and what hangs below it, parents first."""

    experiment: str
    runs: list[Run]

    def around(self, run_id: str) -> "Tree | None":
        """The tree with nothing in it but the run, what is below and what is above it; None if the run is not in it."""
        above = {run.info.run_id: run.data.tags.get(PARENT) for run in self.runs}
        if run_id not in above:
            return None
        ancestors = _line(run_id, above)
        return Tree(self.experiment, [run for run in self.runs if run.info.run_id in ancestors or run_id in _line(run.info.run_id, above)])


def _line(run_id: str, above: dict[str, str | None]) -> list[str]:
    """The run and those above it."""
    line = [run_id]
    while (parent := above[line[-1]]) in above and parent not in line:
        line.append(parent)
    return line


def run_databases(runs_dir: Path) -> list[Path]:
    """The data bases of the run folders in `runs_dir`, by name."""
    return sorted(Path(runs_dir).glob(f"*/{DATABASE}"))


@contextmanager
def alone(folder: Path, work: str) -> Iterator[None]:
    """Two at once would both find a run missing, and have it twice. `work`: "merge" or "sync"."""
    try:
        file = (folder / f".mlflow-{work}.lock").open("w")
    except OSError as error:
        raise UserError(f"{folder}: cannot write here ({error.strerror}); {work} as the owner of the folder, or a copy of it") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{folder}: another mstkd mlflow {work} is at work here; wait until it is done") from None
        yield

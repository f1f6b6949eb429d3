"""`mstkd mlflow merge`: the data bases of submitted runs, joined into the one that the MLflow page shows.

Each <runs>/<run>/mlflow.db is copied as it stands at one moment, also while its job writes, and what <runs>/mlflow.db
lacks of it is logged there through MLflow's client. A merged run has the tag `merged_from`, its source's run id, by
which a later merge finds it again. What a person adds, renames or deletes in the merged data base stays so.
"""

import fcntl
import filecmp
import itertools
import math
import sqlite3
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, Run, RunTag, ViewType

from mstkd.errors import UserError
from mstkd.track.database import ARTIFACTS, DATABASE, LOCK_WAIT_S, check_schema, connect, prepare_database, unreadable
from mstkd.track.mlflow_tracker import EXPERIMENT_TAGS
from mstkd.track.ranking import PARENT, Ranking, all_runs

Outcome = Literal["new", "updated", "unchanged", "empty", "deleted", "unreadable"]

MERGED_FROM, MERGED_SWEEP = "merged_from", "merged_sweep"  # the tags by which a run, and a sweep's parent, is found again
RUN_NAME = "mlflow.runName"
POINTS_PER_CALL = 1000  # MLflow takes no more
PAGES_PER_STEP = 25_000  # of 4 KiB: between steps the job may write, and within one it waits no more than about a second


@dataclass(frozen=True)
class Merged:
    """What became of one run folder's data base, or of one sweep."""

    name: str
    outcome: Outcome
    reason: str = ""  # why it is unreadable


def merge(runs_dir: Path) -> Iterator[Merged]:
    """Bring `runs_dir`/mlflow.db up to date with the data base of every run folder in it; one result per folder, then one per sweep.

    One that cannot be read is reported and the rest goes on. Raises UserError if there is nothing to merge, or if
    `runs_dir`/mlflow.db cannot take it.
    """
    runs_dir = Path(runs_dir).resolve()
    databases = run_databases(runs_dir)
    if not databases:
        raise UserError(f"{runs_dir}: no run in it has an {DATABASE} of its own; give the folder of the submitted runs (others need no merge)")
    with _alone(runs_dir), tempfile.TemporaryDirectory() as scratch:
        prepare_database(runs_dir)
        target = Target(runs_dir)
        source = Source(Path(scratch) / DATABASE)
        for database in databases:
            name = database.parent.name
            try:
                source.copy(database)
            except UserError as error:
                yield Merged(name, "unreadable", str(error))
            else:
                yield Merged(name, target.take(source.client(), database.parent / ARTIFACTS))
        for (experiment_id, sweep), parent_id in target.sweeps.items():
            ranking = Ranking(target.client, experiment_id, sweep, runs_dir / sweep / "sweep.json")
            changed = ranking.log(parent_id) if parent_id else False
            new = parent_id in target.new_sweeps
            yield Merged(sweep, "deleted" if parent_id is None else "new" if new else "updated" if changed else "unchanged")


def run_databases(runs_dir: Path) -> list[Path]:
    """The data bases of the run folders in `runs_dir`, by name."""
    return sorted(Path(runs_dir).glob(f"*/{DATABASE}"))


@contextmanager
def _alone(runs_dir: Path) -> Iterator[None]:
    """Two merges at once would both find a run missing, and have it twice."""
    try:
        file = (runs_dir / ".mlflow-merge.lock").open("w")
    except OSError as error:
        raise UserError(f"{runs_dir}: cannot write here ({error.strerror}); merge as the owner of the folder, or a copy of it") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{runs_dir}: another mstkd mlflow merge is at work here; wait until it is done") from None
        yield


class Source:
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
            raise UserError(f"{database}: locked, or written without a pause; merge again later") from None
        except sqlite3.Error as error:
            raise unreadable(database, error) from None
        if verdict != "ok":
            raise unreadable(database, verdict.splitlines()[0])
        check_schema(self.path, database)

    def client(self) -> MlflowClient:
        """A client of the copy; to be called after the first `copy`."""
        if self._client is None:
            self._client = MlflowClient(f"sqlite:///{self.path}")
        return self._client


class Target:
    """The data base that everything is joined in."""

    def __init__(self, runs_dir: Path):
        self.runs_dir = runs_dir
        self.client = MlflowClient(f"sqlite:///{runs_dir / DATABASE}")
        self.sweeps: dict[tuple[str, str], str | None] = {}  # (experiment id, sweep) -> its parent's run id, None if deleted
        self.new_sweeps: set[str] = set()  # run ids
        self._experiments: dict[str, str] = {}

    def take(self, source: MlflowClient, artifacts: Path) -> Outcome:
        """Log what is missing here of the runs of one data base. `artifacts`: the folder beside it that holds their files."""
        outcomes, merged = set(), {}
        for experiment in source.search_experiments():
            for run in _parents_first(all_runs(source, experiment.experiment_id)):
                experiment_id = self._experiment(experiment.name)
                outcome, merged[run.info.run_id] = self._take_run(source, run, experiment_id, merged, artifacts)
                outcomes.add(outcome)
        if not outcomes:
            return "empty"
        if outcomes in ({"new"}, {"deleted"}):
            return outcomes.pop()
        return "updated" if outcomes & {"new", "updated"} else "unchanged"

    def _take_run(
        self, source: MlflowClient, run: Run, experiment_id: str, merged: dict[str, str | None], artifacts: Path
    ) -> tuple[Outcome, str | None]:
        """What became of the run, and its id here; None if somebody has deleted it here."""
        tags = {name: text for name, text in run.data.tags.items() if name not in (PARENT, RUN_NAME)} | {MERGED_FROM: run.info.run_id}
        here = find_run(self.client, experiment_id, MERGED_FROM, run.info.run_id)
        parent_deleted = merged.get(run.data.tags.get(PARENT), "") is None
        if here.info.lifecycle_stage == "deleted" if here else parent_deleted:
            return "deleted", None
        if parent := self._parent(run, experiment_id, merged):
            tags[PARENT] = parent
        new = here is None
        if new:
            here = self.client.create_run(experiment_id, run.info.start_time, tags, run.info.run_name)
        changed = self._log_missing(source, run, here, tags)
        changed |= self._copy_artifacts(artifacts / run.info.run_id / "artifacts", here)
        changed |= self._end_alike(run, here)
        return "new" if new else "updated" if changed else "unchanged", here.info.run_id

    def _parent(self, run: Run, experiment_id: str, merged: dict[str, str | None]) -> str | None:
        """The id here of the run's parent, for a member of a sweep that of the sweep."""
        above = run.data.tags.get(PARENT)
        if above is not None:
            return merged.get(above)
        sweep = run.data.tags.get("sweep")
        if sweep is None:
            return None
        key = (experiment_id, sweep)
        if key not in self.sweeps:
            parent = find_run(self.client, experiment_id, MERGED_SWEEP, sweep)
            if parent is None:
                tags = {MERGED_SWEEP: sweep, "mlflow.user": "mstkd", "mlflow.source.name": "mstkd"}
                parent = self.client.create_run(experiment_id, run.info.start_time, tags, sweep)
                self.new_sweeps.add(parent.info.run_id)
            self.sweeps[key] = parent.info.run_id if parent.info.lifecycle_stage == "active" else None
        return self.sweeps[key]

    def _log_missing(self, source: MlflowClient, run: Run, here: Run, tags: dict[str, str]) -> bool:
        new_tags = [RunTag(name, text) for name, text in tags.items() if here.data.tags.get(name) != text]
        new_params = [Param(name, text) for name, text in run.data.params.items() if name not in here.data.params]
        known = {_dataset_key(used) for used in here.inputs.dataset_inputs}
        new_datasets = [used for used in run.inputs.dataset_inputs if _dataset_key(used) not in known]
        if new_tags or new_params:
            self.client.log_batch(here.info.run_id, params=new_params, tags=new_tags)
        if new_datasets:
            self.client.log_inputs(here.info.run_id, new_datasets)
        points = self._missing_points(source, run, here)
        logged = False
        while chunk := list(itertools.islice(points, POINTS_PER_CALL)):
            self.client.log_batch(here.info.run_id, metrics=chunk)
            logged = True
        return bool(new_tags or new_params or new_datasets or logged)

    def _missing_points(self, source: MlflowClient, run: Run, here: Run) -> Iterator[Metric]:
        """Per metric in the order in which MLflow calls a point the latest: so where the latest is the same here, nothing is missing."""
        latest = {metric.key: _place(metric) for metric in here.data.to_proto().metrics}
        for metric in run.data.to_proto().metrics:
            if latest.get(metric.key) == _place(metric):
                continue
            known = {_place(point) for point in self.client.get_metric_history(here.info.run_id, metric.key)} if metric.key in latest else set()
            history = source.get_metric_history(run.info.run_id, metric.key)
            yield from sorted((point for point in history if _place(point) not in known), key=lambda point: (point.step, point.timestamp, point.value))

    def _copy_artifacts(self, folder: Path, here: Run) -> bool:
        """Copy the files of `folder` that are not here or differ."""
        kept = Path(here.info.artifact_uri)  # a plain path: `_experiment` made it so
        changed = False
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            relative = path.relative_to(folder)
            if not (kept / relative).is_file() or not filecmp.cmp(path, kept / relative, shallow=False):
                above = relative.parent.as_posix()
                self.client.log_artifact(here.info.run_id, str(path), None if above == "." else above)
                changed = True
        return changed

    def _end_alike(self, run: Run, here: Run) -> bool:
        status, end_ms = run.info.status, run.info.end_time
        if (here.info.status, here.info.end_time) == (status, end_ms):
            return False
        if end_ms is None:
            self.client.update_run(here.info.run_id, status=status)
        else:
            self.client.set_terminated(here.info.run_id, status, end_ms)
        return True

    def _experiment(self, name: str) -> str:
        """The id here of the experiment `name`, created if absent. Raises UserError if it cannot take runs."""
        if name not in self._experiments:
            experiment = self.client.get_experiment_by_name(name)
            if experiment is None:
                location = str(self.runs_dir / ARTIFACTS)
                experiment = self.client.get_experiment(self.client.create_experiment(name, location, EXPERIMENT_TAGS))
            where = f"experiment {name} in {self.runs_dir / DATABASE}"
            if experiment.lifecycle_stage != "active":
                raise UserError(f"{where} is deleted; restore it with: mlflow experiments restore -x {experiment.experiment_id}, or move that file aside")
            location = Path(experiment.artifact_location)
            if location.is_absolute() and not location.parent.is_dir():
                raise UserError(f"{where} keeps its files in {location}, which is not on this machine; move {DATABASE} aside and merge anew")
            self._experiments[name] = experiment.experiment_id
        return self._experiments[name]


def find_run(client: MlflowClient, experiment_id: str, tag: str, text: str) -> Run | None:
    """The run whose `tag` is `text`, deleted or not; None without one."""
    found = client.search_runs([experiment_id], f"tags.{tag} = '{text}'", ViewType.ALL, max_results=1)
    return found[0] if found else None


def _parents_first(runs: list[Run]) -> list[Run]:
    by_id = {run.info.run_id: run for run in runs}

    def depth(run: Run) -> int:
        parent = by_id.get(run.data.tags.get(PARENT))
        return 0 if parent is None else 1 + depth(parent)

    return sorted(runs, key=lambda run: (depth(run), run.info.start_time, run.info.run_id))


def _place(point: Metric) -> tuple[int, int, float | None]:
    """What makes a point of a metric unlike the others."""
    return point.step, point.timestamp, None if math.isnan(point.value) else point.value


def _dataset_key(used) -> tuple[str, str]:
    return used.dataset.name, used.dataset.digest

"""A run from one MLflow store into another through MLflow's clients: whole at first, afterwards what it lacks there.

A copied run has the tag `merged_from`, the id that it had where it was trained, by which it is found again, wherever it is
copied from. What a person adds, renames or deletes in the target stays so. Every call can be repeated: a copy that was
killed is completed by the next one.
"""

import hashlib
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, Run, RunTag, ViewType

from mstkd.errors import UserError
from mstkd.track.database import ARTIFACTS
from mstkd.track.models import copy_models
from mstkd.track.ranking import Ranking
from mstkd.track.session import EXPERIMENT_TAGS, PARENT
from mstkd.track.snapshot import Tree

Outcome = Literal["new", "updated", "unchanged", "empty", "deleted", "unreadable"]

MERGED_FROM, MERGED_SWEEP = "merged_from", "merged_sweep"  # the tags by which a run, and a sweep's parent, is found again
MERGED_FILES = "merged_files"  # the digest of the artifacts that a copied run has
RUN_NAME = "mlflow.runName"
POINTS_PER_CALL = 1000  # MLflow takes no more


@dataclass(frozen=True)
class Copied:
    """What became of one run, one run folder's data base, or one sweep."""

    name: str
    outcome: Outcome
    reason: str = ""  # why it is unreadable


class Target:
    """The store that runs are copied into."""

    def __init__(self, client: MlflowClient, name: str, artifacts: Path | None, elsewhere: str):
        """`name`: of the store, in messages. `artifacts`: where the files of new experiments go; None: where the server says.
        `elsewhere`: what to do if an experiment keeps its files on another machine."""
        self.client, self.name, self.artifacts, self.elsewhere = client, name, artifacts, elsewhere
        self.sweeps: dict[tuple[str, str], str | None] = {}  # (experiment id, sweep) -> its parent's run id, None if deleted
        self.taken: set[str] = set()  # the origins of the runs that were looked at
        self._new_sweeps: set[str] = set()  # run ids
        self._descriptions: dict[tuple[str, str], Path] = {}  # as `sweeps`: its sweep.json
        self._experiments: dict[str, str] = {}

    def take(self, source: MlflowClient, trees: list[Tree], folder: Path) -> Outcome:
        """Log what is missing here of `trees`. `folder`: where their data base and the files of the runs lie."""
        outcomes = set()
        for tree in trees:
            merged: dict[str, str | None] = {}
            experiment_id = self._experiment(tree.experiment)
            for run in tree.runs:
                outcome, merged[run.info.run_id] = self._take_run(source, run, experiment_id, merged, folder)
                outcomes.add(outcome)
        if not outcomes:
            return "empty"
        if outcomes in ({"new"}, {"deleted"}):
            return outcomes.pop()
        return "updated" if outcomes & {"new", "updated"} else "unchanged"

    def rank_sweeps(self) -> Iterator[Copied]:
        """Bring the parents of the sweeps up to date that runs were taken of."""
        for key, parent_id in self.sweeps.items():
            changed = Ranking(self.client, key[0], parent_id, self._descriptions[key]).log() if parent_id else False
            new = parent_id in self._new_sweeps
            outcome = "deleted" if parent_id is None else "new" if new else "updated" if changed else "unchanged"
            yield Copied(self._descriptions[key].parent.name, outcome)

    def _take_run(
        self, source: MlflowClient, run: Run, experiment_id: str, merged: dict[str, str | None], folder: Path
    ) -> tuple[Outcome, str | None]:
        """What became of the run, and its id here; None if somebody has deleted it here."""
        tags = {name: text for name, text in run.data.tags.items() if name not in (PARENT, RUN_NAME, MERGED_FILES)}
        key = MERGED_SWEEP if MERGED_SWEEP in tags else MERGED_FROM
        tags = {key: run.info.run_id} | tags  # what was copied once keeps its origin
        self.taken.add(tags[key])
        here = find_run(self.client, experiment_id, key, tags[key])
        parent_deleted = merged.get(run.data.tags.get(PARENT), "") is None
        if here.info.lifecycle_stage == "deleted" if here else parent_deleted:
            return "deleted", None
        if parent := self._parent(run, experiment_id, merged, folder):
            tags[PARENT] = parent
        new = here is None
        if new:
            here = self.client.create_run(experiment_id, run.info.start_time, tags, run.info.run_name)
        changed = self._log_missing(source, run, here, tags)
        changed |= self._copy_artifacts(folder / ARTIFACTS / run.info.run_id / "artifacts", here)
        changed |= copy_models(source, self.client, run, here, folder / ARTIFACTS)
        changed |= self._end_alike(run, here)
        return "new" if new else "updated" if changed else "unchanged", here.info.run_id

    def _parent(self, run: Run, experiment_id: str, merged: dict[str, str | None], folder: Path) -> str | None:
        """The id here of the run's parent, for a member of a sweep that of the sweep."""
        above = run.data.tags.get(PARENT)
        if above is not None:
            return merged.get(above)
        sweep = run.data.tags.get("sweep")
        if sweep is None:
            return None
        key = (experiment_id, run.data.tags.get("sweep_id", sweep))
        if key not in self.sweeps:
            parent = find_run(self.client, experiment_id, MERGED_SWEEP, key[1])
            if parent is None:
                tags = {MERGED_SWEEP: key[1], "mlflow.user": "mstkd", "mlflow.source.name": "mstkd"}
                parent = self.client.create_run(experiment_id, run.info.start_time, tags, sweep)
                self._new_sweeps.add(parent.info.run_id)
            self._descriptions[key] = folder.parent / sweep / "sweep.json"
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
        """Copy the files of `folder`, all of them if any is new or another one than at the last copy; that is noted once they are here."""
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        if not files:
            return False
        digest = hashlib.sha256()
        for path in files:
            digest.update(f"{path.relative_to(folder).as_posix()}\0{hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
        if here.data.tags.get(MERGED_FILES) == digest.hexdigest():
            return False
        for path in files:
            above = path.relative_to(folder).parent.as_posix()
            self.client.log_artifact(here.info.run_id, str(path), None if above == "." else above)
        self.client.set_tag(here.info.run_id, MERGED_FILES, digest.hexdigest())
        return True

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
                location = None if self.artifacts is None else str(self.artifacts)
                experiment = self.client.get_experiment(self.client.create_experiment(name, location, EXPERIMENT_TAGS))
            where = f"experiment {name} in {self.name}"
            if experiment.lifecycle_stage != "active":
                raise UserError(f"{where} is deleted; restore it with: mlflow experiments restore -x {experiment.experiment_id}, or {self.elsewhere}")
            location = Path(experiment.artifact_location)
            if location.is_absolute() and not location.parent.is_dir():
                raise UserError(f"{where} keeps its files in {location}, which is not on this machine; {self.elsewhere}")
            self._experiments[name] = experiment.experiment_id
        return self._experiments[name]


def find_run(client: MlflowClient, experiment_id: str, tag: str, text: str) -> Run | None:
    """The run whose `tag` is `text`, deleted or not; None without one."""
    found = client.search_runs([experiment_id], f"tags.{tag} = '{text}'", ViewType.ALL, max_results=1)
    return found[0] if found else None


def _place(point: Metric) -> tuple[int, int, float | None]:
    """What makes a point of a metric unlike the others."""
    return point.step, point.timestamp, None if math.isnan(point.value) else point.value


def _dataset_key(used) -> tuple[str, str]:
    return used.dataset.name, used.dataset.digest

"""The ranking of a sweep's runs inside an MLflow data base."""

import json
from collections.abc import Iterator
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities import Run, RunTag

from mstkd.config import RunConfig
from mstkd.track.leading import SCORE, best_scores, leading
from mstkd.track.notes import markdown_table
from mstkd.track.session import NOTE, PARENT, sweep_tags, tracking_uri

class Ranking:
    """The merged runs of a sweep, ranked as `leading` says; those without a score in its stage have no rank."""

    def __init__(self, client: MlflowClient, experiment_id: str, parent_id: str, description: Path):
        """`description`: the sweep's sweep.json; without it the ranking tells no axes."""
        self.client, self.experiment_id, self.parent_id = client, experiment_id, parent_id
        members = all_runs(client, experiment_id, f"tags.`{PARENT}` = '{parent_id}'")
        self.members = sorted(members, key=lambda member: (member.info.run_name, member.info.start_time))
        self.stage, self.scores = leading({member.info.run_id: best_scores(self._points(member)) for member in self.members})
        content = json.loads(description.read_text()) if description.is_file() else {"axes": {}, "runs": []}
        self.axes, self.planned = list(content["axes"]), len(content["runs"])

    def log(self) -> bool:
        """Write ranks to the members, the table and the state to the parent; False if all was so already."""
        changed = False
        for member in self.members:
            score = self.scores.get(member.info.run_id)
            if score is None:
                stale = {"sweep.rank", "sweep.val_score"} & member.data.tags.keys()
                for name in stale:
                    self.client.delete_tag(member.info.run_id, name)
                changed |= bool(stale)
            else:
                changed |= self._tag(member, {"sweep.rank": self._rank(score[0]), "sweep.val_score": f"{score[0]:.6g}"})
        parent = self.client.get_run(self.parent_id)
        changed |= self._tag(parent, {NOTE: self._table()})
        return changed | self._set_state(parent)

    def _points(self, member: Run) -> Iterator[tuple[str, float, int]]:
        """(stage, validation score, step) in the order of training."""
        parts = all_runs(self.client, self.experiment_id, f"tags.`{PARENT}` = '{member.info.run_id}'")
        for part in sorted(parts, key=lambda part: part.info.start_time):
            if SCORE in part.data.metrics:
                stage, points = part.info.run_name.rpartition("/")[2], self.client.get_metric_history(part.info.run_id, SCORE)
                yield from ((stage, point.value, point.step) for point in sorted(points, key=lambda point: point.step))

    def _rank(self, score: float) -> str:
        """From 1, equal for equal scores, padded so that the page sorts it."""
        better = sum(other > score for other, _ in self.scores.values())
        return str(better + 1).zfill(len(str(len(self.members))))

    def _table(self) -> str:
        """The ranking in Markdown: MLflow shows it as the run's description."""
        members, rows = {member.info.run_id: member for member in self.members}, []
        for run_id, (score, step) in self.scores.items():
            values = [members[run_id].data.params.get(axis, "") for axis in self.axes]
            rows.append([self._rank(score), members[run_id].info.run_name, *values, f"{score:.4f}", str(step)])
        says = f"Validation data only, stage {self.stage}." if rows else "No validation score yet."
        table = markdown_table(["rank", "run", *self.axes, f"best {SCORE}", "at step"], rows)
        return f"{says} Ranked: {len(rows)} of {max(self.planned, len(self.members))} runs.\n\n{table}"

    def _tag(self, run: Run, tags: dict[str, str]) -> bool:
        new = [RunTag(name, text) for name, text in tags.items() if run.data.tags.get(name) != text]
        if new:
            self.client.log_batch(run.info.run_id, tags=new)
        return bool(new)

    def _set_state(self, parent: Run) -> bool:
        states = {member.info.status for member in self.members}
        if "RUNNING" in states or len(self.members) < self.planned:
            if parent.info.status == "RUNNING":
                return False
            self.client.update_run(parent.info.run_id, status="RUNNING")
            return True
        status = next(state for state in ("FAILED", "KILLED", "FINISHED") if state in states)
        end_ms = max(member.info.end_time for member in self.members)
        if (parent.info.status, parent.info.end_time) == (status, end_ms):
            return False
        self.client.set_terminated(parent.info.run_id, status, end_ms)
        return True


def rank_on_server(config: RunConfig, run_dir: Path) -> None:
    """Bring the parent of the run's sweep up to date; nothing if the run has none on a server. Raises what MLflow raises."""
    tags = sweep_tags(run_dir)
    if parent_id := tags.get(PARENT):
        client = MlflowClient(tracking_uri(config, run_dir))
        experiment_id = client.get_run(parent_id).info.experiment_id
        Ranking(client, experiment_id, parent_id, Path(run_dir).resolve().parent / tags["sweep"] / "sweep.json").log()


def all_runs(client: MlflowClient, experiment_id: str, filter_string: str = "") -> list[Run]:
    """The experiment's runs that are not deleted."""
    page = client.search_runs([experiment_id], filter_string)
    runs = list(page)
    while page.token:
        page = client.search_runs([experiment_id], filter_string, page_token=page.token)
        runs += page
    return runs

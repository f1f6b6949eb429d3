"""MLflow through its client alone: one parent run per training run, one child per stage and for the evaluation.

No call reaches the training thread, and no failure of MLflow or its server ends a run.
"""

import json
import logging
import math
import re
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from mlflow.entities import Metric, Param, RunTag
from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

from mstkd.config import RunConfig, resolved
from mstkd.files import write_json
from mstkd.recipe import run_params
from mstkd.track.database import prepare_database
from mstkd.track.pictures import validation_bars
from mstkd.track.protocol import Status, Tracker
from mstkd.track.session import PARENT, STUDY, Session, study_tags

log = logging.getLogger(__name__)

METRICS_PER_CALL = 1000  # MLflow takes no more at once; an evaluation of 27 regions has thousands
IDENTIFYING_FILES = {"per_case.csv", "copy_per_case.csv", "report.html", "config.yaml", "record.json"}  # subject keys, paths


class Writer:
    """Calls MLflow in order on a thread of its own; after the first failure it warns once and drops the rest."""

    def __init__(self):
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="mlflow")
        self._broken = False

    def later(self, call: Callable, *args: Any) -> None:
        self._pool.submit(self._guarded, call, args)

    def now(self, call: Callable, *args: Any) -> Any:
        """The call's result, or None if MLflow is or becomes unusable."""
        return self._pool.submit(self._guarded, call, args).result()

    def at_last(self, call: Callable, *args: Any) -> None:
        """As `later`, but also tried after a failure: a run that has ended should not look alive."""
        self._pool.submit(self._guarded, call, args, always=True)

    def close(self) -> None:
        self._pool.shutdown(wait=True)

    def _guarded(self, call: Callable, args: tuple, always: bool = False) -> Any:
        if self._broken and not always:
            return None
        try:
            return call(*args)
        except Exception as error:  # whatever it is, the run is worth more than its copy in MLflow
            if not self._broken:
                reason = f"{type(error).__name__}: {error}".splitlines()[0][:300]
                log.warning("MLflow is off for the rest of this attempt, metrics.jsonl goes on: %s", reason)
            self._broken = True
            return None


class MlflowTracker(Tracker):
    """One MLflow run. Infinite and NaN values are left out, because they ruin a chart."""

    def __init__(self, session: Session, writer: Writer, run_id: str, *, replays: bool):
        self._session, self._writer, self.run_id = session, writer, run_id
        self._last_step: dict[str, int] | None = {} if replays else None  # per metric, asked for when first needed
        self._children: list[MlflowTracker] = []
        self._finished = False

    def log_metrics(self, values: dict[str, float], step: int, stage: str) -> None:
        now_ms = int(time.time() * 1000)
        metrics = [Metric(metric_name(k), float(v), now_ms, step) for k, v in values.items() if math.isfinite(v)]
        self._writer.later(self._log_new, metrics)

    def log_validation(self, figures: dict[str, float], step: int, stage: str) -> None:
        """Also drawn, which costs a fraction of a second of the writer's thread."""
        super().log_validation(figures, step, stage)
        finite = {name: float(value) for name, value in figures.items() if math.isfinite(value)}
        self._writer.later(lambda: self._session.client.log_image(self.run_id, validation_bars(finite, step, stage), key="validation", step=step))

    def log_params(self, params: dict[str, object]) -> None:
        self._writer.later(self._log_missing_params, params)

    def set_tags(self, tags: dict[str, object]) -> None:
        self._log_batch(tags=[RunTag(name, str(value)) for name, value in tags.items()])

    def log_artifact(self, path: Path, folder: str) -> None:
        """Keep a copy of the file `path`, unless it tells subjects or paths and `tracking.identify` is off."""
        if self._session.identify or Path(path).name not in IDENTIFYING_FILES:
            self._writer.later(self._session.client.log_artifact, self.run_id, str(path), folder)

    def log_table(self, columns: dict[str, list], file: str) -> None:
        self._writer.later(self._session.log_table, self.run_id, columns, file)

    def log_dataset(self, dataset: dict[str, Any], context: str) -> None:
        self._writer.later(self._session.log_dataset, self.run_id, dataset, context)

    def describe(self, text: str, heading: str = "") -> None:
        self._writer.later(self._session.describe, self.run_id, text, heading)

    def whole_run(self) -> Tracker:
        return MlflowTracker(self._session, self._writer, self._session.ids.run_id, replays=False)

    def log_model(self, folder: Path, name: str, register: str | None) -> None:
        self._writer.now(self._session.log_model, self.run_id, folder, name, register)

    def child(self, name: str, tags: dict[str, object] | None = None, *, start_step: int | None = None) -> Tracker:
        found = self._writer.now(self._session.child, self.run_id, name)
        if found is None:
            return Tracker()
        run_id, existed = found
        child = MlflowTracker(self._session, self._writer, run_id, replays=existed and start_step is not None)
        child.set_tags(tags or {})
        self._children.append(child)
        return child

    def finish(self, status: Status) -> None:
        if self._finished:
            return
        self._finished = True
        for child in self._children:
            child.finish(status)
        self._writer.at_last(self._session.client.set_terminated, self.run_id, status)

    def _log_batch(self, **entities: list) -> None:
        self._writer.later(lambda: self._session.client.log_batch(self.run_id, **entities))

    def _log_new(self, metrics: list[Metric]) -> None:
        """Log `metrics` less those that an earlier attempt logged: MLflow would append them a second time."""
        client = self._session.client
        if self._last_step is not None:
            for key in {metric.key for metric in metrics} - self._last_step.keys():
                history = client.get_metric_history(self.run_id, key)
                self._last_step[key] = max((metric.step for metric in history), default=-1)
            metrics = [metric for metric in metrics if metric.step > self._last_step[metric.key]]
        for first in range(0, len(metrics), METRICS_PER_CALL):
            client.log_batch(self.run_id, metrics=metrics[first : first + METRICS_PER_CALL])

    def _log_missing_params(self, params: dict[str, object]) -> None:
        """Log what the run does not have: MLflow refuses to change a parameter."""
        kept = self._session.client.get_run(self.run_id).data.params
        texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in params.items()}
        new = [Param(name, text) for name, text in texts.items() if name not in kept]
        self._session.client.log_batch(self.run_id, params=new)


class MlflowRun(MlflowTracker):
    """The parent run: also samples processor, memory and GPU load (`system/...`), and owns the writer's thread."""

    def __init__(self, session: Session, writer: Writer, run_id: str, *, existed: bool):
        super().__init__(session, writer, run_id, replays=False)
        self._monitor = SystemMetricsMonitor(run_id, resume_logging=existed, tracking_uri=session.uri)
        self._monitor.start()

    def finish(self, status: Status) -> None:
        if not self._finished:
            self._monitor.finish()
            super().finish(status)
            self._writer.close()


def create_sweep_parent(config: RunConfig, name: str, run_dir: Path) -> str:
    """A run on the tracking server for the members of sweep `name` to hang below; returns its id. Called once, when submitting."""
    session = Session(config, run_dir)
    return session.new_run(name, {})


def open_mlflow(config: RunConfig, run_dir: Path, dataset: dict[str, Any]) -> list[Tracker]:
    """The run's MLflow tracker, its settings logged; [] (and one warning) if MLflow cannot be used."""
    writer = Writer()

    def start() -> MlflowRun:
        session = Session(config, run_dir)
        run_id, existed = session.root(dataset)
        return MlflowRun(session, writer, run_id, existed=existed)

    run = writer.now(start)
    if run is None:
        writer.close()
        return []
    run.log_params(run_params(resolved(config)))
    return [run]


class LaterRun(MlflowTracker):
    """A run opened after training, for an evaluation or a comparison: the training run's status stays what it was."""

    def finish(self, status: Status) -> None:
        super().finish(status)
        self._writer.close()


class StudyParent(LaterRun):
    """The run above those of a study; with it end those that stand between."""

    def __init__(self, session: Session, writer: Writer, parents: dict[str, str]):
        first, *others = parents.values()
        super().__init__(session, writer, first, replays=False)
        self._children = [MlflowTracker(session, writer, run_id, replays=False) for run_id in others]

    def child(self, name: str, tags: dict[str, object] | None = None, *, start_step: int | None = None) -> Tracker:
        raise NotImplementedError("the runs of a study find their parent themselves, see `study_tags`")


def open_evaluation(config: RunConfig, run_dir: Path, name: str) -> Tracker:
    """The child run `name` of a tracked training run; one that keeps nothing if there is none or MLflow cannot be used."""
    return _open_later(config, run_dir, lambda session: session.child(session.ids.run_id, name)[0])


def open_comparison(config: RunConfig, run_dir: Path, name: str) -> Tracker:
    """A new run `name` beside a tracked training run, in its experiment, or that of its study, once; as `open_evaluation` otherwise."""
    study = {name: text for name, text in study_tags(run_dir).items() if name != "arm"}  # it is of several

    def find(session: Session) -> str:
        known = session.below(study[PARENT], name) if PARENT in study else None
        return known or session.new_run(name, study)

    return _open_later(config, run_dir, find)


def open_study(config: RunConfig, folder: Path, kinds: Sequence[str], arms: dict[str, str]) -> Tracker:
    """The run above those of a study in `folder`, continued if it exists, and one below it for every kind of run but the first.

    `kinds`: the folders of runs; `arms`: run -> arm; study.json then tells the runs where they belong. `config`: of any of them. A study
    that was begun without it stays without.
    """
    if not (folder / STUDY).is_file() and any((folder / kind).exists() for kind in kinds):
        return Tracker()
    writer = Writer()

    def start() -> LaterRun:
        content = json.loads((folder / STUDY).read_text()) if (folder / STUDY).is_file() else {"mlflow_parents": {}}
        parents = content["mlflow_parents"]
        if config.tracking.uri is None:
            prepare_database(folder)
        write_json(folder / STUDY, {"mlflow_parents": parents, "arms": arms})
        session = Session(config, folder / kinds[0] / config.name)
        for kind in kinds:
            if kind not in parents or not session.exists(parents[kind]):
                tags = {"study": folder.name} | ({PARENT: parents[kinds[0]]} if kind != kinds[0] else {})
                parents[kind] = session.new_run(folder.name if kind == kinds[0] else f"{folder.name}/{kind}", tags)
            session.client.update_run(parents[kind], status="RUNNING")
        write_json(folder / STUDY, {"mlflow_parents": parents, "arms": arms})
        return StudyParent(session, writer, parents)

    run = writer.now(start)
    if run is None:
        writer.close()
        return Tracker()
    return run


def _open_later(config: RunConfig, run_dir: Path, find: Callable[[Session], str]) -> Tracker:
    """The run whose id `find` gives; one that keeps nothing if training was not tracked or MLflow cannot be used."""
    writer = Writer()

    def start() -> LaterRun | None:
        session = Session(config.model_copy(update={"runs_dir": str(run_dir.parent)}), run_dir)
        if session.ids.run_id is None or not session.exists(session.ids.run_id):
            return None
        return LaterRun(session, writer, find(session), replays=False)

    run = writer.now(start)
    if run is None:
        writer.close()
        return Tracker()
    return run


def metric_name(name: str) -> str:
    """`name` in MLflow's alphabet: "dice_et/flair+t1" -> "dice_et/flair_t1", "psnr/t1->t2" -> "psnr/t1_to_t2"."""
    return re.sub(r"[^\w./ :-]", "_", name.replace("->", "_to_"), flags=re.ASCII)

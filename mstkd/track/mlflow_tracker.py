"""MLflow through its client alone: one parent run per training run, one child per stage and for the evaluation.

No call reaches the training thread, and no failure of MLflow or its server ends a run. By default nothing here
tells a host, a user, a path or a subject; only the experiment's artifact folder, on this machine, is a path.
"""

import getpass
import json
import logging
import math
import os
import re
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")  # MLflow's own 7 delay the end of a run by minutes
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")

from mlflow import MlflowClient  # noqa: E402  (reads the environment above)
from mlflow.entities import Dataset, DatasetInput, LoggedModel, LoggedModelOutput, Metric, Param, RunTag  # noqa: E402
from mlflow.exceptions import MlflowException  # noqa: E402
from mlflow.models import Model  # noqa: E402
from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor  # noqa: E402
from mlflow.telemetry import set_telemetry_client  # noqa: E402

from mstkd.config import RunConfig, resolved  # noqa: E402
from mstkd.track.database import ARTIFACTS, DATABASE, prepare_database  # noqa: E402, F401  (the launcher's)
from mstkd.track.protocol import Status, Tracker  # noqa: E402

# others (MONAI) may have imported MLflow earlier, without the environment above
set_telemetry_client()
logging.getLogger("mlflow").setLevel(logging.WARNING)

log = logging.getLogger(__name__)

METRICS_PER_CALL = 1000  # MLflow takes no more at once; an evaluation of 27 regions has thousands
DIGEST_CHARS = 36  # as many as MLflow's data base holds
IDENTIFYING_FILES = {"per_case.csv", "copy_per_case.csv", "report.html", "config.yaml", "record.json"}  # subject keys, paths
EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}  # the page then opens on training runs
PATH_KEYS = {"runs_dir", "path", "cache_dir", "init_from", "uri"}


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


class RunIds:
    """`mlflow.json` of a run folder: {"run_id": ..., "children": {name: run id}}."""

    def __init__(self, path: Path):
        self.path = path
        ids = json.loads(path.read_text()) if path.exists() else {}
        self.run_id: str | None = ids.get("run_id")
        self.children: dict[str, str] = ids.get("children", {})

    def save(self) -> None:
        partial = self.path.with_suffix(".json.partial")
        partial.write_text(json.dumps({"run_id": self.run_id, "children": self.children}, indent=2) + "\n")
        partial.replace(self.path)


class Session:
    """One MLflow experiment and the ids of this run in it. Everything here is called on the writer's thread."""

    def __init__(self, config: RunConfig, run_dir: Path):
        self.uri = tracking_uri(config, run_dir)
        self.name = config.name
        self.identify = config.tracking.identify
        self.sweep_tags = sweep_tags(run_dir)
        self.client = MlflowClient(tracking_uri=self.uri)
        self.ids = RunIds(run_dir / "mlflow.json")
        # a server says itself where artifacts go; a data base would put them into the working directory
        artifacts = None if self.uri.startswith("http") else str(_store_folder(config, run_dir) / ARTIFACTS)
        self.experiment_id = self._experiment(config.tracking.experiment, artifacts)

    def root(self, dataset: dict[str, str]) -> tuple[str, bool]:
        """(id, whether it existed) of the parent run."""
        run_id, existed = self._run(self.ids.run_id, self.name, self.sweep_tags)
        if not existed:
            self.ids.run_id, self.ids.children = run_id, {}
            self.ids.save()
            digest = dataset["digest"][:DIGEST_CHARS]
            self.client.log_inputs(run_id, [DatasetInput(Dataset(dataset["name"], digest, source_type="mstkd", source="{}"))])
        return run_id, existed

    def child(self, parent_id: str, name: str) -> tuple[str, bool]:
        """(id, whether it existed) of the child run `name`."""
        run_id, existed = self._run(self.ids.children.get(name), f"{self.name}/{name}", {"mlflow.parentRunId": parent_id})
        self.ids.children[name] = run_id
        self.ids.save()
        return run_id, existed

    def _run(self, known: str | None, name: str, tags: dict[str, str]) -> tuple[str, bool]:
        if known is not None and self.exists(known):
            self.client.update_run(known, status="RUNNING")
            return known, True
        return self.new_run(name, tags), False

    def new_run(self, name: str, tags: dict[str, str]) -> str:
        source = {"mlflow.user": "mstkd", "mlflow.source.name": "mstkd"}
        if self.identify:
            source |= {"mlflow.user": getpass.getuser(), "host": socket.gethostname()}
        return self.client.create_run(self.experiment_id, run_name=name, tags=source | tags).info.run_id

    def log_model(self, run_id: str, folder: Path, name: str, register: str | None) -> None:
        """The model in `folder`, which is told its ids, as one that the run `run_id` made."""
        logged = self.client.create_logged_model(self.experiment_id, name=name, source_run_id=run_id)
        model = Model.load(str(folder))
        model.run_id, model.model_id, model.model_uuid, model.artifact_path = run_id, logged.model_id, logged.model_id, name
        model.save(str(folder / "MLmodel"))
        self.client.log_model_artifacts(logged.model_id, str(folder))
        self.client.finalize_logged_model(logged.model_id, "READY")
        self.client.log_outputs(run_id, [LoggedModelOutput(logged.model_id, step=0)])
        if register is not None:
            self._register(logged, run_id, register)

    def _register(self, logged: LoggedModel, run_id: str, name: str) -> None:
        """As the next version of the registered model `name`."""
        try:
            self.client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        # not models:/<id>, which the client would look up where the environment says, not in `uri`
        version = self.client.create_model_version(name, logged.artifact_location, run_id, model_id=logged.model_id).version
        # a server does this itself, a data base does not; the page needs it to find the version
        self.client.set_logged_model_tags(logged.model_id, {"mlflow.modelVersions": json.dumps([{"name": name, "version": version}])})

    def exists(self, run_id: str) -> bool:
        try:
            self.client.get_run(run_id)
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":  # another data base, or a deleted one
                return False
            raise
        return True

    def _experiment(self, name: str, artifacts: str | None) -> str:
        experiment = self.client.get_experiment_by_name(name)
        if experiment is None:
            try:
                return self.client.create_experiment(name, artifact_location=artifacts, tags=EXPERIMENT_TAGS)
            except MlflowException:  # a run beside this one was faster
                experiment = self.client.get_experiment_by_name(name)
                if experiment is None:
                    raise
        return experiment.experiment_id


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

    def log_params(self, params: dict[str, object]) -> None:
        self._writer.later(self._log_missing_params, params)

    def set_tags(self, tags: dict[str, object]) -> None:
        self._log_batch(tags=[RunTag(name, str(value)) for name, value in tags.items()])

    def log_artifact(self, path: Path, folder: str) -> None:
        """Keep a copy of the file `path`, unless it tells subjects or paths and `tracking.identify` is off."""
        if self._session.identify or Path(path).name not in IDENTIFYING_FILES:
            self._writer.later(self._session.client.log_artifact, self.run_id, str(path), folder)

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


def open_mlflow(config: RunConfig, run_dir: Path, dataset: dict[str, str]) -> list[Tracker]:
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
    run.log_params(run_params(config))
    return [run]


class LaterRun(MlflowTracker):
    """A run opened after training, for an evaluation or a comparison: the training run's status stays what it was."""

    def finish(self, status: Status) -> None:
        super().finish(status)
        self._writer.close()


def open_evaluation(config: RunConfig, run_dir: Path, name: str) -> Tracker:
    """The child run `name` of a tracked training run; one that keeps nothing if there is none or MLflow cannot be used."""
    return _open_later(config, run_dir, lambda session: session.child(session.ids.run_id, name)[0])


def open_comparison(config: RunConfig, run_dir: Path, name: str) -> Tracker:
    """A new run `name` beside a tracked training run, in its experiment; as `open_evaluation` otherwise."""
    return _open_later(config, run_dir, lambda session: session.new_run(name, {}))


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


def tracking_uri(config: RunConfig, run_dir: Path | None = None) -> str:
    """`tracking.uri`, or the run's own SQLite file if `prepare_database` made one, or the one in `runs_dir`.

    `run_dir`: where the run lies, if not at `config.run_dir`. The last file is created by whoever first opens it.
    """
    if config.tracking.uri is not None:
        return config.tracking.uri
    folder = _store_folder(config, run_dir or config.run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    return f"sqlite:///{folder / DATABASE}"


def _store_folder(config: RunConfig, run_dir: Path) -> Path:
    """Where this run's data base and artifacts lie, unless `tracking.uri` says otherwise."""
    own = config.tracking.uri is None and (run_dir / DATABASE).is_file()
    return Path(run_dir if own else config.runs_dir).resolve()


def sweep_tags(run_dir: Path) -> dict[str, str]:
    """What says that the run in `run_dir` is a member of a sweep: the folder beside it whose sweep.json lists it.

    With a tracking server the sweep's parent exists already, "mlflow_parent" there; else `merge` makes one.
    """
    for path in sorted(Path(run_dir).resolve().parent.glob("*/sweep.json")):
        try:
            sweep = json.loads(path.read_text())
            if Path(run_dir).name not in sweep["runs"]:
                continue
        except (OSError, ValueError, KeyError, TypeError) as error:
            log.warning("%s is not readable as a sweep (%s: %s): left out", path, type(error).__name__, error)
            continue
        parent = sweep.get("mlflow_parent")
        return {"sweep": path.parent.name, **({"mlflow.parentRunId": parent} if parent else {})}
    return {}


def metric_name(name: str) -> str:
    """`name` in MLflow's alphabet: "dice_et/flair+t1" -> "dice_et/flair_t1", "psnr/t1->t2" -> "psnr/t1_to_t2"."""
    return re.sub(r"[^\w./ :-]", "_", name.replace("->", "_to_"), flags=re.ASCII)


def run_params(config: RunConfig) -> dict[str, object]:
    """The resolved recipe by dotted key, without paths."""
    flat = dict(_flatten(resolved(config), ""))
    return {key: value for key, value in flat.items() if not _is_path(key, value)}


def _is_path(key: str, value: object) -> bool:
    return not PATH_KEYS.isdisjoint(key.split(".")) or (isinstance(value, str) and ("/" in value or "\\" in value))


def _flatten(value: object, prefix: str) -> Iterator[tuple[str, object]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _flatten(inner, f"{prefix}.{key}" if prefix else key)
    elif isinstance(value, list) and any(isinstance(inner, dict | list) for inner in value):
        for position, inner in enumerate(value):
            yield from _flatten(inner, f"{prefix}.{position}")
    else:
        yield prefix, value

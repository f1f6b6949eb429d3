"""Where a run is kept in MLflow: its store, its experiment, its ids, and what it hangs below. By default nothing here tells
a host, a user, a path or a subject; only the experiment's artifact folder, on this machine, is a path.
"""

import getpass
import json
import logging
import os
import socket
from pathlib import Path
from typing import Any

os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")  # MLflow's own 7 delay the end of a run by minutes
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # two lines for every run that ends

from mlflow import MlflowClient  # noqa: E402  (reads the environment above)
from mlflow.entities import Dataset, DatasetInput, InputTag  # noqa: E402
from mlflow.exceptions import MlflowException  # noqa: E402
from mlflow.telemetry import set_telemetry_client  # noqa: E402
from mlflow.utils.mlflow_tags import MLFLOW_LOGGED_ARTIFACTS  # noqa: E402

from mstkd.config import RunConfig  # noqa: E402
from mstkd.files import write_json  # noqa: E402
from mstkd.track.database import ARTIFACTS, DATABASE  # noqa: E402
from mstkd.track.models import log_model  # noqa: E402
from mstkd.track.notes import with_section  # noqa: E402

# others (MONAI) may have imported MLflow earlier, without the environment above
set_telemetry_client()
logging.getLogger("mlflow").setLevel(logging.WARNING)

log = logging.getLogger(__name__)

DIGEST_CHARS = 36  # as many as MLflow's data base holds
EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}  # the page then opens on training runs
NOTE, PARENT = "mlflow.note.content", "mlflow.parentRunId"
STUDY = "study.json"  # in the folder of a study that is tracked as one: {"mlflow_parents": {folder of runs: run id}, "arms": {run: arm}}


class RunIds:
    """`mlflow.json` of a run folder: {"run_id": ..., "children": {name: run id}}."""

    def __init__(self, path: Path):
        self.path = path
        ids = json.loads(path.read_text()) if path.exists() else {}
        self.run_id: str | None = ids.get("run_id")
        self.children: dict[str, str] = ids.get("children", {})

    def save(self) -> None:
        write_json(self.path, {"run_id": self.run_id, "children": self.children})


class Session:
    """One MLflow experiment and the ids of this run in it. Everything here is called on the writer's thread."""

    def __init__(self, config: RunConfig, run_dir: Path):
        self.uri = tracking_uri(config, run_dir)
        self.name = config.name
        self.facts = {"run": config.name, "method": config.method["name"], "fold": str(config.data.fold), "seed": str(config.seed)}
        self.identify = config.tracking.identify
        self.parents = sweep_tags(run_dir) or study_tags(run_dir)
        self.client = MlflowClient(tracking_uri=self.uri)
        self.ids = RunIds(run_dir / "mlflow.json")
        # a server says itself where artifacts go; a data base would put them into the working directory
        artifacts = None if self.uri.startswith("http") else str(_store_folder(config, run_dir) / ARTIFACTS)
        self.experiment_id = self._experiment(config.tracking.experiment, artifacts)

    def root(self, dataset: dict[str, Any]) -> tuple[str, bool]:
        """(id, whether it existed) of the parent run."""
        run_id, existed = self._run(self.ids.run_id, self.name, self.parents)
        if not existed:
            self.ids.run_id, self.ids.children = run_id, {}
            self.ids.save()
            self.log_dataset(run_id, dataset, "training")
        return run_id, existed

    def log_dataset(self, run_id: str, dataset: dict[str, Any], context: str) -> None:
        """What the run reads, see `Tracker.log_dataset`. Its source is named and nothing else: a path would tell a machine."""
        texts = {key: json.dumps(dataset[key]) for key in ("schema", "profile") if key in dataset}
        used = Dataset(dataset["name"], dataset["digest"][:DIGEST_CHARS], source_type="mstkd", source="{}", **texts)
        self.client.log_inputs(run_id, [DatasetInput(used, [InputTag("mlflow.data.context", context)])])

    def describe(self, run_id: str, text: str, heading: str = "") -> None:
        """Say `text`, Markdown, of the run, under a heading if it is one of several things."""
        before = self.client.get_run(run_id).data.tags.get(NOTE, "")
        self.client.set_tag(run_id, NOTE, with_section(before, text, heading))

    def log_table(self, run_id: str, columns: dict[str, list], file: str) -> None:
        """A table that the page shows as one. `file`: e.g. "tables/subsets.json"; one that exists is replaced, which MLflow's own call does not."""
        rows = [list(row) for row in zip(*columns.values(), strict=True)]
        self.client.log_text(run_id, json.dumps({"columns": list(columns), "data": rows}), file)
        known = json.loads(self.client.get_run(run_id).data.tags.get(MLFLOW_LOGGED_ARTIFACTS, "[]"))
        if (entry := {"path": file, "type": "table"}) not in known:
            self.client.set_tag(run_id, MLFLOW_LOGGED_ARTIFACTS, json.dumps([*known, entry]))

    def child(self, parent_id: str, name: str) -> tuple[str, bool]:
        """(id, whether it existed) of the child run `name`."""
        run_id, existed = self._run(self.ids.children.get(name), f"{self.name}/{name}", {PARENT: parent_id})
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
        log_model(self.client, self.experiment_id, run_id, folder, name, register, self.facts)

    def below(self, parent_id: str, name: str) -> str | None:
        """The id of the run `name` right below another one; None if there is none."""
        found = self.client.search_runs([self.experiment_id], f"tags.`{PARENT}` = '{parent_id}' and attributes.run_name = '{name}'", max_results=1)
        return found[0].info.run_id if found else None

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


def tracking_uri(config: RunConfig, run_dir: Path | None = None) -> str:
    """`tracking.uri`, or the run's own SQLite file if `prepare_database` made one, or its study's, or the one in `runs_dir`.

    `run_dir`: where the run lies, if not at `config.run_dir`. The last file is created by whoever first opens it.
    """
    if config.tracking.uri is not None:
        return config.tracking.uri
    folder = _store_folder(config, run_dir or config.run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    return f"sqlite:///{folder / DATABASE}"


def _store_folder(config: RunConfig, run_dir: Path) -> Path:
    """Where this run's data base and artifacts lie, unless `tracking.uri` says otherwise."""
    if config.tracking.uri is None:
        for folder in (run_dir, _study_of(run_dir)):
            if folder is not None and (folder / DATABASE).is_file():
                return Path(folder).resolve()
    return Path(config.runs_dir).resolve()


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
        known = {"sweep_id": sweep.get("id"), PARENT: parent}
        return {"sweep": path.parent.name, **{name: text for name, text in known.items() if text}}
    return {}


def study_tags(run_dir: Path) -> dict[str, str]:
    """As `sweep_tags`, for a run of a study, which lies in <study>/runs/ or <study>/tuning/: the study's study.json names its parent."""
    run_dir = Path(run_dir).resolve()
    study = _study_of(run_dir)
    if study is None:
        return {}
    try:
        content = json.loads((study / STUDY).read_text())
        parent, arm = content["mlflow_parents"].get(run_dir.parent.name), content["arms"].get(run_dir.name)
        return {"study": study.name, **{name: text for name, text in {"arm": arm, PARENT: parent}.items() if text}}
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.warning("%s is not readable as a study (%s: %s): left out", study / STUDY, type(error).__name__, error)
        return {}


def _study_of(run_dir: Path) -> Path | None:
    """The folder of the study that the run belongs to."""
    folder = Path(run_dir).resolve().parent.parent
    return folder if (folder / STUDY).is_file() else None

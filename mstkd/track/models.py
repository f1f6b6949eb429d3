"""Models in an MLflow store: logged by the run that made them, registered on request, and copied with their run."""

import json
import shutil
import tempfile
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities import LoggedModel, LoggedModelOutput, LoggedModelStatus, Run
from mlflow.exceptions import MlflowException
from mlflow.models import Model

COPY_OF = "merged_from"  # the tag by which a copied model is found again
VERSIONS = "mlflow.modelVersions"


def log_model(
    client: MlflowClient, experiment_id: str, run_id: str, folder: Path, name: str, register_as: str | None, params: dict[str, str]
) -> None:
    """The model in `folder`, which is told its ids, as one that the run made, and as the next version of `register_as`, if given.

    `params`: what the page says of it.
    """
    logged = client.create_logged_model(experiment_id, name=name, source_run_id=run_id, params=params)
    _upload(client, logged, run_id, folder)
    client.log_outputs(run_id, [LoggedModelOutput(logged.model_id, step=0)])
    if register_as is not None:
        _register(client, logged, run_id, register_as)


def copy_models(source: MlflowClient, target: MlflowClient, run: Run, here: Run, files: Path) -> bool:
    """Bring the models of `run` to the run `here` of another store, and their registrations. `files`: the source's artifacts; False if all was there.

    What a kill interrupted is done again: a model counts once it is READY, and a version once it names its model.
    """
    changed = False
    for output in source.get_run(run.info.run_id).outputs.model_outputs:
        original = source.get_logged_model(output.model_id)
        folder = files / "models" / original.model_id / "artifacts"
        if original.status != LoggedModelStatus.READY or not folder.is_dir():
            continue
        copy = _copy_of(target, original.model_id, here.info.experiment_id)
        if copy is None:
            tags = {name: text for name, text in original.tags.items() if name != VERSIONS} | {COPY_OF: original.model_id}
            copy = target.create_logged_model(here.info.experiment_id, original.name, here.info.run_id, tags, original.params, original.model_type)
        if copy.status != LoggedModelStatus.READY:
            with tempfile.TemporaryDirectory() as scratch:
                _upload(target, copy, here.info.run_id, Path(shutil.copytree(folder, Path(scratch) / "model")))
            changed = True
        outputs = target.get_run(here.info.run_id).outputs
        if copy.model_id not in {known.model_id for known in (outputs.model_outputs if outputs else ())}:
            target.log_outputs(here.info.run_id, [LoggedModelOutput(copy.model_id, output.step)])
            changed = True
        for version in json.loads(original.tags.get(VERSIONS, "[]")):
            changed |= _register(target, copy, here.info.run_id, version["name"])
    return changed


def _copy_of(client: MlflowClient, model_id: str, experiment_id: str) -> LoggedModel | None:
    found = client.search_logged_models([experiment_id], f"tags.{COPY_OF} = '{model_id}'", max_results=1)
    return found[0] if found else None


def _upload(client: MlflowClient, logged: LoggedModel, run_id: str, folder: Path) -> None:
    model = Model.load(str(folder))
    model.run_id, model.model_id, model.model_uuid, model.artifact_path = run_id, logged.model_id, logged.model_id, logged.name
    model.save(str(folder / "MLmodel"))
    client.log_model_artifacts(logged.model_id, str(folder))
    client.finalize_logged_model(logged.model_id, "READY")


def _register(client: MlflowClient, logged: LoggedModel, run_id: str, name: str) -> bool:
    """As the next version of the registered model `name`; False if it is a version of it already."""
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    if any(known.source == logged.artifact_location for known in client.search_model_versions(f"name = '{name}'")):
        return False
    # not models:/<id>, which the client would look up where the environment says, not in its own store
    version = client.create_model_version(name, logged.artifact_location, run_id, model_id=logged.model_id).version
    # a server does this itself, a data base does not; the page needs it to find the version
    known = json.loads(client.get_logged_model(logged.model_id).tags.get(VERSIONS, "[]"))
    if name not in {version["name"] for version in known}:
        client.set_logged_model_tags(logged.model_id, {VERSIONS: json.dumps([*known, {"name": name, "version": version}])})
    return True

"""The student in MLflow: logged by an evaluation, registered, served by a real process, and found to predict as `mstkd predict` does."""

import base64
import gzip
import json
import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import yaml
from exported_runs import case_files, refuse_identifying, unet_run
from mlflow import MlflowClient
from mlflow.models import Model
from tracked_runs import answers, free_port, wait_for

import mstkd
from mstkd.config import RunConfig
from mstkd.errors import UserError
from mstkd.evaluate.run import evaluate_run
from mstkd.export import export
from mstkd.run_folder import read_run_config
from mstkd.track import open_trackers


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Tracked, its student logged and registered by an evaluation."""
    folder = unet_run(tmp_path_factory.mktemp("served"))
    config = folder / "config.yaml"
    recipe = yaml.safe_load(config.read_text())
    recipe["tracking"] |= {"log_model": True, "register_as": "unet-phantom"}
    recipe["evaluate"]["networks"] = ["student"]
    config.write_text(yaml.safe_dump(recipe))
    with open_trackers(read_run_config(folder), folder, attempt=1, tags={}, dataset={"name": "phantom", "digest": "0" * 64}):
        pass
    evaluate_run(folder)
    return folder


@pytest.fixture(scope="module")
def client(run):
    return MlflowClient(f"sqlite:///{run.parent / 'mlflow.db'}")


@pytest.fixture(scope="module")
def url(run, tmp_path_factory):
    """Where `mlflow models serve` answers for the registered model."""
    port = free_port()
    store = f"sqlite:///{run.parent / 'mlflow.db'}"
    words = ["-m", "models:/unet-phantom/1", "--env-manager", "local", "--port", str(port), "--workers", "1"]
    command = [sys.executable, "-m", "mlflow", "models", "serve", *words]
    log = tmp_path_factory.mktemp("log") / "server.log"
    with log.open("w") as stream:
        environment = os.environ | {"MLFLOW_TRACKING_URI": store, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        server = subprocess.Popen(command, env=environment, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        wait_for(lambda: answers(f"http://127.0.0.1:{port}/ping", server, log), seconds=600)
        yield f"http://127.0.0.1:{port}/invocations"
    finally:
        if server.poll() is None:
            os.killpg(server.pid, signal.SIGTERM)
            server.wait(60)


def ask(url: str, body: dict) -> tuple[int, dict]:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=300) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def labels_of(text: str) -> nib.Nifti1Image:
    return nib.Nifti1Image.from_bytes(gzip.decompress(base64.b64decode(text)))


def encoded(files: dict[str, Path]) -> dict[str, str]:
    return {name: base64.b64encode(file.read_bytes()).decode() for name, file in files.items()}


def test_a_served_model_answers_as_the_command_predicts(run, url):
    """Two cases in one request, one of which lacks sequences."""
    whole, part = case_files(run), case_files(run, "t1ce", "t2")
    status, answer = ask(url, {"dataframe_records": [encoded(whole), encoded(part)]})
    assert status == 200, answer
    model = mstkd.load(run)
    for row, files in zip(answer["predictions"], (whole, part), strict=True):
        served, expected = labels_of(row["labels"]), model.predict(files)
        np.testing.assert_array_equal(np.asanyarray(served.dataobj), expected.labels)
        assert served.header == expected.image.header and row["subset"] == expected.subset == "+".join(files)
    status, answer = ask(url, {"dataframe_records": [{"t1": "no NIfTI"}]})
    assert status == 400 and "t1: no base64 text; send the bytes of a NIfTI file so" in json.dumps(answer)


def test_the_logged_model_is_described_and_tells_nobody(run, client, tmp_path):
    evaluation = client.get_run(json.loads((run / "mlflow.json").read_text())["children"]["evaluation"])
    [output] = evaluation.outputs.model_outputs
    logged, version = client.get_logged_model(output.model_id), client.get_model_version("unet-phantom", "1")
    assert logged.name == "student" and str(logged.status) == "READY" and logged.source_run_id == evaluation.info.run_id == version.run_id
    assert version.source == logged.artifact_location
    assert [(entry["name"], str(entry["version"])) for entry in json.loads(logged.tags["mlflow.modelVersions"])] == [("unet-phantom", "1")]
    folder = Path(logged.artifact_location.removeprefix("file://"))
    model = Model.load(str(folder))
    assert model.model_id == logged.model_id and model.run_id == evaluation.info.run_id
    inputs, outputs = model.signature.inputs, model.signature.outputs
    assert inputs.input_names() == ["flair", "t1", "t1ce", "t2"] and inputs.required_input_names() == []
    assert outputs.input_names() == ["labels", "subset"]
    assert model.load_input_example(str(folder)).columns.tolist() == ["flair", "t1", "t1ce", "t2"]
    requirements = (folder / "requirements.txt").read_text().split()
    assert f"mstkd=={mstkd.__version__}" in requirements and not [line for line in requirements if "/" in line or "+" in line or "@" in line]
    refuse_identifying(folder, run)
    assert not logged.tags.get("mlflow.user")


def test_its_own_example_is_answered_and_an_exported_folder_is_the_same_model(run, tmp_path):
    import mlflow

    folder = export(run, tmp_path / "model", "mlflow")
    loaded = mlflow.pyfunc.load_model(str(folder))
    answer = loaded.predict(loaded.input_example)
    assert answer["subset"].tolist() == ["flair+t1+t1ce+t2"] and labels_of(answer["labels"][0]).shape == (16, 16, 16)
    refuse_identifying(folder, run)


def test_what_cannot_be_served_is_said_before_anything_is_scored(run, tmp_path):
    with pytest.raises(ValueError, match="tracking.register_as needs tracking.log_model=true"):
        RunConfig.model_validate(yaml.safe_load((run / "config.yaml").read_text()) | {"tracking": {"register_as": "unet"}})
    record = (run / "record.json").read_text()
    try:
        (run / "record.json").write_text(record.replace('"phantom"', '"mine"'))
        with pytest.raises(UserError, match="data set mine has no packaged spec"):
            evaluate_run(run)
    finally:
        (run / "record.json").write_text(record)

"""Trackers: what a resumed, failed or private run leaves in metrics.jsonl and in a real MLflow on SQLite."""

import getpass
import json
import logging
import math
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tracked_runs
from headless import chrome
from hypothesis import given, settings
from hypothesis import strategies as st
from mlflow import MlflowClient
from tracked_runs import DATASET, answers, free_port, wait_for

from mstkd.config import RunConfig, load_config, resolved
from mstkd.recipe import run_params
from mstkd.track import NullTracker, open_trackers
from mstkd.track.jsonl import JsonlTracker, read_records
from mstkd.track.mlflow_tracker import metric_name

@pytest.fixture
def config(tmp_path) -> RunConfig:
    config = load_config("mst_kdnet_phantom", [f"runs_dir={tmp_path / 'runs'}", f"data.shards={tmp_path / 'shards'}"])
    config.run_dir.mkdir(parents=True)
    return config


def opened(config: RunConfig, attempt: int = 1, **tags):
    return open_trackers(config, config.run_dir, attempt=attempt, tags=tags, dataset=DATASET)


def client(config: RunConfig) -> MlflowClient:
    return tracked_runs.client(Path(config.runs_dir))


def runs(config: RunConfig) -> dict:
    """MLflow runs by name."""
    return tracked_runs.runs(Path(config.runs_dir))


def history(config: RunConfig, run: str, metric: str) -> list[tuple[int, float]]:
    points = client(config).get_metric_history(runs(config)[run].info.run_id, metric)
    return [(point.step, point.value) for point in points]


# metrics.jsonl


def test_a_record_says_stage_step_time_and_attempt(tmp_path):
    before = time.time()
    JsonlTracker(tmp_path / "metrics.jsonl", attempt=3).log_metrics({"train/loss": 0.5, "val/hd95": math.inf}, 7, "student")
    (record,) = read_records(tmp_path / "metrics.jsonl")
    assert round(before, 3) <= record.pop("time") <= round(time.time(), 3)
    assert record == {"stage": "student", "step": 7, "attempt": 3, "train/loss": 0.5, "val/hd95": None}


def test_a_metric_cannot_take_the_place_of_the_step(tmp_path):
    with pytest.raises(ValueError, match="step"):
        JsonlTracker(tmp_path / "metrics.jsonl", attempt=1).log_metrics({"step": 1.0}, 1, "student")


@settings(max_examples=50)
@given(kills=st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9)), max_size=4))
def test_a_stage_killed_and_resumed_any_number_of_times_has_every_step_once(tmp_path_factory, kills):
    path = tmp_path_factory.mktemp("run") / "metrics.jsonl"
    done_before = JsonlTracker(path, attempt=1)
    done_before.log_metrics({"loss": 0.0}, 4, "teacher")
    start, total = 0, 10
    for attempt, (updates, lost) in enumerate([*kills, (total, 0)], start=1):
        stage = JsonlTracker(path, attempt).child("student", start_step=start)
        reached = min(start + updates, total)
        for step in range(start or -1, reached):
            stage.log_metrics({"loss": 1.0}, step + 1, "student")
        start = max(start, reached - lost) if attempt <= len(kills) else total
    steps = [record["step"] for record in read_records(path) if record["stage"] == "student"]
    assert steps == list(range(total + 1))
    assert [record["step"] for record in read_records(path) if record["stage"] == "teacher"] == [4]


def test_half_a_line_left_by_a_kill_is_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    JsonlTracker(path, attempt=1).log_metrics({"loss": 1.0}, 1, "student")
    with path.open("a") as file:
        file.write('{"stage": "student", "st')
    JsonlTracker(path, attempt=2).log_metrics({"loss": 2.0}, 2, "student")
    assert [record["step"] for record in read_records(path)] == [1, 2]


# MLflow


def test_a_run_is_a_parent_with_a_child_per_part(config):
    with opened(config, ranks=2, task="segmentation", git="abc123") as tracker:
        student = tracker.child("student", {"stage": "student"}, start_step=0)
        student.log_metrics({"val/dice_et/flair+t1": 0.5, "train/loss": 2.0}, 10, "student")
        tracker.child("evaluation").log_metrics({"psnr/t1->t2": 31.0}, 10, "evaluation")
    name = config.name
    found = runs(config)
    assert set(found) == {name, f"{name}/student", f"{name}/evaluation"}
    assert {run.info.status for run in found.values()} == {"FINISHED"}
    parent = found[name]
    for part in ("student", "evaluation"):
        assert found[f"{name}/{part}"].data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert found[f"{name}/student"].data.metrics == {"val/dice_et/flair_t1": 0.5, "train/loss": 2.0}
    assert found[f"{name}/evaluation"].data.metrics == {"psnr/t1_to_t2": 31.0}
    expected = {"ranks": "2", "task": "segmentation", "git": "abc123", "method": "mst_kdnet", "data_digest": DATASET["digest"], "attempt": "1"}
    assert expected.items() <= parent.data.tags.items()
    assert parent.data.params["train.steps"] == str(config.train.steps)
    assert parent.data.params["data.crop"] == json.dumps(list(config.data.crop))
    (used,) = parent.inputs.dataset_inputs
    assert used.dataset.name == "phantom" and DATASET["digest"].startswith(used.dataset.digest)
    ids = json.loads((config.run_dir / "mlflow.json").read_text())
    assert ids["run_id"] == parent.info.run_id and set(ids["children"]) == {"student", "evaluation"}


@pytest.mark.parametrize(
    ("leave", "status"), [(ValueError("boom"), "FAILED"), (SystemExit(-1), "KILLED"), (KeyboardInterrupt(), "KILLED")]
)
def test_every_exit_leaves_the_right_status(config, leave, status):
    with pytest.raises(type(leave)), opened(config) as tracker:
        tracker.child("student", start_step=0)
        raise leave
    assert {run.info.status for run in runs(config).values()} == {status}


def test_the_first_status_stays(config):
    with opened(config) as tracker:
        tracker.finish("KILLED")
    assert runs(config)[config.name].info.status == "KILLED"


def test_a_resumed_run_goes_on_in_the_same_mlflow_run_and_repeats_no_step(config):
    with pytest.raises(SystemExit), opened(config) as tracker:
        stage = tracker.child("student", start_step=0)
        for step in (1, 2, 3):
            stage.log_metrics({"train/loss": 10.0 - step}, step, "student")
        raise SystemExit(140)
    before = runs(config)

    longer = config.model_copy(update={"train": config.train.model_copy(update={"steps": 4321})})
    with opened(longer, attempt=2) as tracker:
        stage = tracker.child("student", start_step=2)
        assert runs(config)[config.name].info.status == "RUNNING"
        for step in (3, 4):
            stage.log_metrics({"train/loss": 10.0 - step, **({"val/score": 0.7} if step == 3 else {})}, step, "student")
    after = runs(config)
    assert {name: run.info.run_id for name, run in after.items()} == {name: run.info.run_id for name, run in before.items()}
    assert {run.info.status for run in after.values()} == {"FINISHED"}
    assert history(config, f"{config.name}/student", "train/loss") == [(1, 9.0), (2, 8.0), (3, 7.0), (4, 6.0)]
    # killed between the loss and the score of step 3: the score is new and must not be taken for a repetition
    assert history(config, f"{config.name}/student", "val/score") == [(3, 0.7)]
    assert after[config.name].data.params["train.steps"] == str(config.train.steps)
    assert after[config.name].data.tags["attempt"] == "2"
    steps = [(record["step"], record["attempt"]) for record in read_records(config.run_dir / "metrics.jsonl")]
    assert steps == [(1, 1), (2, 1), (3, 2), (4, 2)]


def test_in_a_data_base_that_does_not_know_the_run_a_new_one_begins(config):
    with opened(config):
        first = runs(config)[config.name].info.run_id
    uri = f"sqlite:///{config.runs_dir}/other.db"
    with opened(config.model_copy(update={"tracking": config.tracking.model_copy(update={"uri": uri})}), attempt=2):
        second = json.loads((config.run_dir / "mlflow.json").read_text())["run_id"]
    assert second != first and MlflowClient(uri).get_run(second).info.status == "FINISHED"


def test_values_that_ruin_a_chart_stay_out_of_mlflow(config):
    with opened(config) as tracker:
        tracker.child("student").log_metrics({"a": math.inf, "b": math.nan, "c": 1.0}, 1, "student")
    assert runs(config)[f"{config.name}/student"].data.metrics == {"c": 1.0}
    (record,) = read_records(config.run_dir / "metrics.jsonl")
    assert (record["a"], record["b"], record["c"]) == (None, None, 1.0)


def test_more_figures_than_mlflow_takes_at_once_all_arrive(config):
    figures = {f"dice/region{n}/flair+t1": n / 2500 for n in range(2500)}
    with opened(config) as tracker:
        tracker.child("evaluation").log_metrics(figures, 0, "evaluation")
    assert len(runs(config)[f"{config.name}/evaluation"].data.metrics) == 2500


@pytest.mark.parametrize("name", ["dice_et/flair+t1ce", "psnr/t1+t2->flair", "hd95 (mm)", "lr@x"])
def test_any_metric_name_becomes_one_that_mlflow_takes(config, name):
    with opened(config) as tracker:
        tracker.child("student").log_metrics({name: 1.0}, 1, "student")
    assert set(runs(config)[f"{config.name}/student"].data.metrics) == {metric_name(name)}


def test_parameters_are_the_recipe_without_paths(config, tmp_path):
    params = run_params(resolved(config.model_copy(update={"init_from": str(tmp_path)})))
    assert params["data.augment.flip_prob"] == config.data.augment.flip_prob and params["method.name"] == "mst_kdnet"
    assert not any(key in params for key in ("runs_dir", "init_from", "tracking.uri", "data.cache_dir", "data.shards.0.path"))
    assert str(tmp_path) not in json.dumps(params)


def _texts(database: Path) -> list[tuple[str, str]]:
    """(table.column, text) of every text in the data base."""
    with sqlite3.connect(database) as connection:
        tables = [row[0] for row in connection.execute("select name from sqlite_master where type='table'")]
        found = []
        for table in tables:
            cursor = connection.execute(f'select * from "{table}"')
            names = [column[0] for column in cursor.description]
            found += [(f"{table}.{name}", str(value)) for row in cursor for name, value in zip(names, row, strict=True)]
        return found


def test_mlflow_holds_no_host_user_path_or_subject(config, tmp_path):
    per_case, summary = tmp_path / "per_case.csv", tmp_path / "summary.json"
    per_case.write_text("subject,dice\nPhantom_0000,0.5\n")
    summary.write_text("{}")
    with opened(config, ranks=1) as tracker:
        evaluation = tracker.child("evaluation")
        evaluation.log_artifact(per_case, "evaluation")
        evaluation.log_artifact(summary, "evaluation")
    # where the artifacts lie on this machine must be a path
    artifact_columns = {"experiments.artifact_location", "runs.artifact_uri"}
    for column, text in _texts(Path(config.runs_dir) / "mlflow.db"):
        assert column in artifact_columns or str(tmp_path) not in text, column
        assert socket.gethostname() not in text, column
        assert text != getpass.getuser(), column
    stored = {path.name for path in (Path(config.runs_dir) / "mlartifacts").rglob("*") if path.is_file()}
    assert stored == {"summary.json"}


def test_identify_lets_subjects_host_and_user_in(config, tmp_path):
    config = config.model_copy(update={"tracking": config.tracking.model_copy(update={"identify": True})})
    (tmp_path / "per_case.csv").write_text("subject\n")
    with opened(config) as tracker:
        tracker.log_artifact(tmp_path / "per_case.csv", "evaluation")
    tags = runs(config)[config.name].data.tags
    assert tags["host"] == socket.gethostname() and tags["mlflow.user"] == getpass.getuser()
    assert [item.path for item in client(config).list_artifacts(runs(config)[config.name].info.run_id, "evaluation")] == ["evaluation/per_case.csv"]


def test_a_server_that_is_not_there_costs_a_warning_and_nothing_else(config, caplog, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    config = config.model_copy(update={"tracking": config.tracking.model_copy(update={"uri": f"http://127.0.0.1:{free_port()}"})})
    with caplog.at_level(logging.WARNING, "mstkd"), opened(config) as tracker:
        tracker.child("student", start_step=0).log_metrics({"loss": 1.0}, 1, "student")
    assert [record.message.startswith("MLflow is off") for record in caplog.records if record.name.startswith("mstkd")] == [True]
    assert [record["loss"] for record in read_records(config.run_dir / "metrics.jsonl")] == [1.0]


def test_a_data_base_that_breaks_midway_costs_one_warning(config, caplog):
    with caplog.at_level(logging.WARNING, "mstkd"), opened(config) as tracker:
        stage = tracker.child("student", start_step=0)
        with sqlite3.connect(Path(config.runs_dir) / "mlflow.db") as connection:
            connection.execute("drop table metrics")
        for step in (1, 2, 3):
            stage.log_metrics({"loss": 1.0}, step, "student")
        tracker.child("evaluation").log_metrics({"loss": 1.0}, 3, "evaluation")
    assert [record.message.startswith("MLflow is off") for record in caplog.records if record.name.startswith("mstkd")] == [True]
    assert [record["step"] for record in read_records(config.run_dir / "metrics.jsonl")] == [1, 2, 3, 3]


def test_a_run_that_outlives_its_mlflow_still_ends_there(config):
    database = Path(config.runs_dir) / "mlflow.db"
    with opened(config) as tracker:
        stage = tracker.child("student", start_step=0)
        with sqlite3.connect(database) as connection:
            connection.execute("drop table metrics")
        stage.log_metrics({"loss": 1.0}, 1, "student")
    with sqlite3.connect(database) as connection:
        assert connection.execute("select distinct status from runs").fetchall() == [("FINISHED",)]


def test_mlflow_sends_no_telemetry_even_if_it_was_imported_before():
    code = """
import mlflow.telemetry
print(mlflow.telemetry.get_telemetry_client() is None)
import mstkd.track.mlflow_tracker
print(mlflow.telemetry.get_telemetry_client() is None)
"""
    # MLflow keeps silent by itself under pytest and CI: hide both
    plain = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    done = subprocess.run([sys.executable, "-c", code], env=plain, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True"]


def test_load_of_the_machine_is_sampled(config, monkeypatch):
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.2")
    with opened(config):
        deadline = time.monotonic() + 60
        while not (metrics := runs(config)[config.name].data.metrics) and time.monotonic() < deadline:
            time.sleep(0.2)
    assert 0 <= metrics["system/cpu_utilization_percentage"] <= 100
    assert metrics["system/system_memory_usage_megabytes"] > 0


def test_other_ranks_keep_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with NullTracker() as tracker:
        tracker.child("student", start_step=0).log_metrics({"loss": 1.0}, 1, "student")
    assert not any(tmp_path.iterdir())


# the page


@pytest.fixture
def served(config):
    """(url, config) of a real `mstkd mlflow ui` over one finished run."""
    with opened(config, ranks=2, task="segmentation") as tracker:
        stage = tracker.child("student", start_step=0)
        for step in range(1, 21):
            stage.log_metrics({"train/loss": 1.0 / step}, step, "student")
    port = free_port()
    command = [str(Path(sys.executable).parent / "mstkd"), "mlflow", "ui", "--port", str(port), "--runs-dir", config.runs_dir]
    with (Path(config.runs_dir) / "server.log").open("w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    url = f"http://127.0.0.1:{port}"
    try:
        wait_for(lambda: answers(f"{url}/health", server, Path(log.name)), seconds=120)
        yield url, config
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(30)


@pytest.mark.browser
def test_the_mlflow_page_shows_the_run_and_its_stage(served, tmp_path):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    url, config = served
    experiment = client(config).get_experiment_by_name("mstkd").experiment_id
    stage = runs(config)[f"{config.name}/student"].info.run_id
    browser = chrome(tmp_path / "profile")
    screenshots = Path(os.environ.get("MSTKD_SCREENSHOTS", tmp_path))
    try:
        for page, words in {
            f"experiments/{experiment}/runs": (config.name, "phantom (01234567"),
            f"experiments/{experiment}/runs/{stage}": (f"{config.name}/student", "train/loss", "Finished"),
        }.items():
            browser.get(f"{url}/#/{page}")
            body = lambda driver: driver.find_element(By.TAG_NAME, "body").text  # noqa: E731
            WebDriverWait(browser, 60).until(lambda driver: all(word in body(driver) for word in words), message=f"{page}: {words}")
            browser.save_screenshot(str(screenshots / f"mlflow_{page.count('/')}.png"))
    finally:
        browser.quit()

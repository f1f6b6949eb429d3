"""What a person finds on the page of a real MLflow server: descriptions, tree, tables, pictures, data, models, and nothing that identifies."""

import getpass
import json
import os
import socket
import sqlite3
from pathlib import Path

import pandas as pd
import pytest
import yaml
from exported_runs import UNET
from headless import chrome
from mlflow import MlflowClient
from tracked_runs import tracking_server
from trained_run import make_run, write_run

from mstkd.config import RunConfig
from mstkd.data.training import open_training
from mstkd.evaluate.run import evaluate_run
from mstkd.run_folder import read_run_config, record_attempt
from mstkd.track import open_study
from mstkd.track.notes import MAX_CHARS, with_section
from mstkd.tracked import track
from mstkd.train import build_method

DIFF = "diff --git a/secret.py b/secret.py"
REGIONS = ("WT", "TC", "ET")
MLFLOWS_OWN = ("users/current", "ResizeObserver loop")  # what its pages say of themselves in the browser's console: no users, a resized chart
OPEN_TREE = "document.querySelectorAll('[role=gridcell] button path[d^=\"M7.25 7.25\"]').forEach(plus => plus.closest('button').click())"
SHOW_MORE = "[...document.querySelectorAll('button')].find(button => button.textContent.trim() == 'Show more')?.click()"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("server") / "store"
    with tracking_server(folder) as address:
        yield address, folder


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    root = tmp_path_factory.mktemp("cohort")
    make_run(root)
    return root


def trained(cohort: Path, root: Path, tracking: dict) -> Path:
    """A run of a study that tells what training tells, and is evaluated; its record holds a diff."""
    (root / "shards").symlink_to(cohort / "shards")
    values = {"name": "unet", "runs_dir": str(root / "runs"), "method": UNET, "data": {"shards": str(root / "shards"), "crop": [24] * 3},
              "train": {"global_batch": 1, "steps": 1}, "tracking": tracking}  # fmt: skip
    with open_study(RunConfig.model_validate(values), root, ["runs", "tuning"], {"unet": "plain"}) as study:
        study.describe("**Study**: one arm")
        run = write_run(root, "unet", UNET)
        recipe = yaml.safe_load((run / "config.yaml").read_text())
        recipe["tracking"] |= tracking
        recipe["inference"]["precision"] = "fp32"
        recipe["evaluate"]["networks"] = ["student"]
        (run / "config.yaml").write_text(yaml.safe_dump(recipe))
        config = read_run_config(run)
        attempt = record_attempt(config, 2)
        record = json.loads((run / "record.json").read_text())
        record["git"] = {"commit": "0123456789abcdef", "diff": DIFF}
        (run / "record.json").write_text(json.dumps(record))
        training = open_training(config.data, config.seed, False)
        method, config = build_method(config, training)
        with track(config, method, training, list(method.stages), 2, attempt) as tracker:
            stage = tracker.child(method.stages[0], start_step=0)
            for step in (10, 20, 30):
                stage.log_metrics({"train/loss": 1.0 / step}, step, method.stages[0])
                stage.log_validation({"score": step / 40, "dice_WT": step / 40, "dice_flair+t1": step / 50}, step, method.stages[0])
        evaluate_run(run)
    return run


@pytest.fixture(scope="module")
def run(server, cohort, tmp_path_factory):
    return trained(cohort, tmp_path_factory.mktemp("study"), {"uri": server[0], "log_model": True, "register_as": "unet-page"})


@pytest.fixture(scope="module")
def found(server, run) -> dict:
    """The runs by name, whole."""
    client = MlflowClient(server[0])
    listed = client.search_runs([client.get_experiment_by_name("mstkd").experiment_id])
    return {one.info.run_name: client.get_run(one.info.run_id) for one in listed}


def test_runs_hang_below_their_study_and_can_be_searched(run, found):
    study = run.parents[1].name
    names = {one.info.run_id: name for name, one in found.items()}
    above = {name: names.get(one.data.tags.get("mlflow.parentRunId")) for name, one in found.items()}
    assert above == {study: None, f"{study}/tuning": study, "unet": study, "unet/train": "unet", "unet/evaluation": "unet"}
    assert {one.info.status for one in found.values()} == {"FINISHED"}
    tags = {
        "study": study, "arm": "plain", "method": "monai_network", "task": "segmentation", "stages": "train", "data": "phantom", "fold": "0", "seed": "0",
        "ranks": "2", "zero_stage": "1", "precision": "bf16", "git": "0123456789abcdef", "attempt": "2",
    }  # fmt: skip
    assert tags.items() <= found["unet"].data.tags.items()
    assert {"method": "monai_network", "split": "test", "data": "phantom", "cases": "2"}.items() <= found["unet/evaluation"].data.tags.items()


def test_a_run_says_what_it_is_and_after_the_evaluation_how_good(run, found):
    note = found["unet"].data.tags["mlflow.note.content"]
    for words in ("**monai_network**", "MONAI's networks", "fold 0: subjects 6 to train, 2 to validate, 2 to test", "2, ZeRO 1, bf16", "commit 0123456789ab"):
        assert words in note
    mean = json.loads((run / "evaluation" / "summary.json").read_text())["mean"]
    assert "## evaluation: phantom, test split, 2 cases" in note and "the run `unet/evaluation`, artifact `tables/subsets_student.json`" in note
    for region in REGIONS:
        assert f"| student | {region} | {mean[region]['dice']:.4g} | {mean[region]['dice_nonempty']:.4g} | {mean[region]['hd95_mm']:.4g} |" in note
        assert found["unet"].data.metrics[f"test/student/dice_{region}"] == pytest.approx(mean[region]["dice"])
        assert f"| student | {region} | {mean[region]['dice']:.4g} |" in found["unet/evaluation"].data.tags["mlflow.note.content"]


def test_the_subsets_are_a_table_from_one_sequence_to_all(server, run, found, tmp_path):
    evaluation = found["unet/evaluation"]
    assert json.loads(evaluation.data.tags["mlflow.loggedArtifacts"]) == [{"path": "tables/subsets_student.json", "type": "table"}]
    path = MlflowClient(server[0]).download_artifacts(evaluation.info.run_id, "tables/subsets_student.json", str(tmp_path))
    table = pd.read_json(path, orient="split")
    summary = json.loads((run / "evaluation" / "summary.json").read_text())
    assert table["given"].tolist() == [name for name in (*summary["subsets"], "mean") for _ in REGIONS]
    assert table["number given"].tolist()[:-3] == sorted(table["number given"].tolist()[:-3])
    line = table[(table["given"] == "flair+t1ce") & (table["region"] == "ET")].iloc[0]
    assert line["dice"] == pytest.approx(summary["subsets"]["flair+t1ce"]["ET"]["dice"], abs=1e-4)


def test_figures_have_a_curve_over_the_number_of_given_sequences(server, run, found):
    client, evaluation = MlflowClient(server[0]), found["unet/evaluation"]
    subsets = json.loads((run / "evaluation" / "summary.json").read_text())["subsets"]
    curve = client.get_metric_history(evaluation.info.run_id, "student/by_number_given/dice_WT")
    assert [point.step for point in curve] == [1, 2, 3, 4]
    of_three = [cells["WT"]["dice"] for name, cells in subsets.items() if name.count("+") == 2]
    assert curve[2].value == pytest.approx(sum(of_three) / 4)
    assert evaluation.data.metrics["student/dice/WT/flair_t1"] == pytest.approx(subsets["flair+t1"]["WT"]["dice"])


def test_data_pictures_and_model_are_there(server, run, found):
    client = MlflowClient(server[0])
    (training,) = found["unet"].inputs.dataset_inputs
    assert training.dataset.name == "phantom" and training.dataset.source == "{}" and training.tags[0].value == "training"
    assert json.loads(training.dataset.profile)["train"] == 6 and "t1ce" in training.dataset.schema
    (testing,) = found["unet/evaluation"].inputs.dataset_inputs
    assert testing.tags[0].value == "testing" and testing.dataset.digest == training.dataset.digest
    pictures = [item.path for item in client.list_artifacts(found["unet/train"].info.run_id, "images")]
    assert {path.split("+")[2] for path in pictures if path.endswith(".png")} == {"10", "20", "30"}
    (output,) = found["unet/evaluation"].outputs.model_outputs
    assert client.get_model_version("unet-page", "1").source == client.get_logged_model(output.model_id).artifact_location


def texts(folder: Path) -> dict[str, bytes]:
    """All that a server keeps, by where: every cell of its data base but those that say where its files lie, and every file."""
    kept = {str(path.relative_to(folder)): path.read_bytes() for path in (folder / "files").rglob("*") if path.is_file()}
    with sqlite3.connect(folder / "mlflow.db") as connection:
        tables = [row[0] for row in connection.execute("select name from sqlite_master where type='table'")]
        for table in tables:
            rows = connection.execute(f'select * from "{table}"')
            names = [column[0] for column in rows.description]
            for number, row in enumerate(rows):
                kept |= {f"{table}.{name}.{number}": str(value).encode() for name, value in zip(names, row, strict=True)}
    return kept


def test_nothing_that_identifies_reaches_the_server(server, run, cohort):
    words = {str(cohort), str(run.parents[1]), "Phantom_", "site-packages", os.path.expanduser("~") + "/", DIFF, f"/{getpass.getuser()}/"}
    words |= {name for name in [socket.gethostname()] if len(name) > 5}  # a shorter one may stand anywhere
    kept = texts(server[1])
    assert len([place for place in kept if place.startswith("files")]) > 15 and any("safetensors" in place for place in kept)
    for place, content in kept.items():
        found = [word for word in words if word.encode() in content or word in place]
        assert not found, f"{place} tells {found}"
        assert content != getpass.getuser().encode(), place


def test_with_identify_the_server_is_told(cohort, tmp_path_factory):
    root = tmp_path_factory.mktemp("identified")
    run = trained(cohort, root, {"identify": True})
    client = MlflowClient(f"sqlite:///{root / 'mlflow.db'}")  # the study's own
    ids = json.loads((run / "mlflow.json").read_text())
    tags = client.get_run(ids["run_id"]).data.tags
    assert tags["mlflow.user"] == getpass.getuser() and tags["host"] == socket.gethostname()
    names = {item.path for item in client.list_artifacts(ids["children"]["evaluation"], "evaluation")}
    assert {"evaluation/per_case.csv", "evaluation/report.html"} <= names


def test_sections_of_a_description_are_replaced_and_kept_apart():
    note = with_section(with_section("", "what it is"), "0.5", "test")
    assert note == "what it is\n\n## test\n\n0.5"
    assert with_section(with_section(note, "0.25", "val"), "0.75", "test") == "what it is\n\n## test\n\n0.75\n\n## val\n\n0.25"
    assert with_section(note, "resumed") == "resumed\n\n## test\n\n0.5"
    assert len(with_section(note, "x" * 9000, "long")) == MAX_CHARS


@pytest.mark.browser
def test_the_page_reads_well(server, run, found, tmp_path):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    experiment, ids = f"experiments/{found['unet'].info.experiment_id}", {name: one.info.run_id for name, one in found.items()}
    browser = chrome(tmp_path / "profile")
    browser.set_window_size(1800, 1200)
    screenshots = Path(os.environ.get("MSTKD_SCREENSHOTS", tmp_path))
    evaluation, (output,) = ids["unet/evaluation"], found["unet/evaluation"].outputs.model_outputs
    pages = {
        "runs": (f"{experiment}/runs", OPEN_TREE, ("unet/train", "unet/evaluation", "phantom (")),
        "run": (f"{experiment}/runs/{ids['unet']}", SHOW_MORE, ("monai_network", "2, ZeRO 1, bf16", "HD95 (mm)", "precision", "test/student/dice_WT")),
        "charts": (f"{experiment}/runs/{ids['unet/train']}/model-metrics", "", ("train/loss", "val/score")),
        "curves": (f"{experiment}/runs/{evaluation}/model-metrics", "", ("student/by_number_given", "student/dice/ET")),
        "table": (f"{experiment}/runs/{evaluation}/artifacts/tables/subsets_student.json", "", ("number given", "flair+t1", "hd95_mm")),
        "model": (f"{experiment}/models/{output.model_id}", "", ("student", "unet-page", "Ready", "monai_network")),
        "version": ("models/unet-page/versions/1", "", ("Inputs", "Outputs", "unet/evaluation")),
    }
    try:
        for name, (page, click, words) in pages.items():
            browser.get(f"{server[0]}/#/{page}")

            def shown(driver) -> bool:
                driver.execute_script(click)
                return all(word in driver.find_element(By.TAG_NAME, "body").text for word in words)

            try:
                WebDriverWait(browser, 240).until(shown, message=f"{page}: {words}")
            finally:
                browser.save_screenshot(str(screenshots / f"mlflow_{name}.png"))
            errors = [entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
            assert [error for error in errors if not any(known in error for known in MLFLOWS_OWN)] == [], page
    finally:
        browser.quit()

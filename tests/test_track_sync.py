"""`mstkd mlflow sync`: offline stores into a real tracking server on loopback."""

import json
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import LoggedModelStatus, Metric
from mlflow.models import Model
from tracked_runs import client, evaluate, merge, rows, runs, runs_dir, submitted, sweep, tracking_server, train, wait_for  # noqa: F401  (runs_dir is a fixture)
from typer.testing import CliRunner

from mstkd.config import load_config
from mstkd.errors import UserError
from mstkd.launch import mlflow_cli
from mstkd.track import open_evaluation
from mstkd.track.sync import sync

SYNC = "import sys; from mstkd.track.sync import sync; print(*sync(sys.argv[1], sys.argv[2:]), sep='\\n')"


STORES: dict[str, Path] = {}  # address of a server -> its own data base


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("server") / "store"
    with tracking_server(folder) as address:
        STORES[address] = folder / "mlflow.db"
        yield address


def synced(server: str, *paths: Path) -> dict[str, str]:
    return {copied.name: copied.outcome for copied in sync(server, paths)}


def there(server: str, experiment: str) -> dict:
    """The runs of an experiment on the server by name, whole."""
    mlflow = MlflowClient(server)
    found = mlflow.search_runs([mlflow.get_experiment_by_name(experiment).experiment_id])
    by_name = {run.info.run_name: mlflow.get_run(run.info.run_id) for run in found}
    assert len(by_name) == len(found)
    return by_name


def histories(mlflow: MlflowClient, run) -> dict[str, list[tuple]]:
    return {key: [(p.step, p.timestamp, p.value) for p in mlflow.get_metric_history(run.info.run_id, key)] for key in run.data.metrics}


def log_model(config, name: str) -> None:
    """What an evaluation with `tracking.log_model` and `register_as` leaves."""
    folder = config.run_dir / "model"
    folder.mkdir()
    Model().save(str(folder / "MLmodel"))
    (folder / "weights.bin").write_bytes(bytes(range(256)))
    with open_evaluation(config, config.run_dir, "evaluation") as tracker:
        tracker.log_model(folder, "student", name)


def same(server: str, experiment: str, store: Path) -> None:
    """Fails unless the server has of the experiment exactly what `store` has."""
    source, target, own, mlflow = runs(store), there(server, experiment), client(store), MlflowClient(server)
    assert target.keys() == source.keys()
    names = {run.info.run_id: name for name, run in source.items()}
    for name, run in source.items():
        copy = target[name]
        for fact in ("status", "start_time", "end_time"):
            assert getattr(copy.info, fact) == getattr(run.info, fact), (name, fact)
        assert copy.data.params == run.data.params and copy.data.metrics == run.data.metrics
        left = {"mlflow.parentRunId"}
        assert {k: t for k, t in run.data.tags.items() if k not in left}.items() <= copy.data.tags.items()
        above = run.data.tags.get("mlflow.parentRunId")
        assert copy.data.tags.get("mlflow.parentRunId") == (target[names[above]].info.run_id if above else None)
        assert histories(mlflow, copy) == histories(own, run)
        used, original = (sorted(d.to_dictionary()["dataset"].items() for d in one.inputs.dataset_inputs) for one in (copy, run))
        assert [*map(str, used)] == [*map(str, original)]


def test_everything_arrives_once_and_later_only_what_is_new(server, runs_dir, tmp_path):
    experiment = ["tracking.experiment=once"]
    config = submitted(runs_dir, "a", *experiment)
    train(config, {"teacher": [0.4, 0.6], "student": [0.3]})
    evaluate(config, 0.7)
    log_model(config, "phantom-model")
    assert synced(server, runs_dir) == {"a": "new"}
    same(server, "once", runs_dir / "a")
    mlflow, evaluation = MlflowClient(server), there(server, "once")["a/evaluation"]
    [file] = mlflow.list_artifacts(evaluation.info.run_id, "evaluation")
    assert json.loads(Path(mlflow.download_artifacts(evaluation.info.run_id, file.path, str(tmp_path))).read_text()) == {"dice": 0.7}
    [output] = evaluation.outputs.model_outputs
    model, version = mlflow.get_logged_model(output.model_id), mlflow.get_model_version("phantom-model", "1")
    assert model.status == LoggedModelStatus.READY and model.source_run_id == evaluation.info.run_id == version.run_id and version.source == model.artifact_location

    before = rows(STORES[server])
    assert synced(server, runs_dir) == synced(server, runs_dir / "a") == {"a": "unchanged"}
    assert rows(STORES[server]) == before

    train(config, {"teacher": [0.4, 0.6, 0.8]}, attempt=2)  # goes on
    evaluate(config, 0.8)  # another file of the same size
    assert synced(server, runs_dir) == {"a": "updated"} and synced(server, runs_dir) == {"a": "unchanged"}
    same(server, "once", runs_dir / "a")
    path = mlflow.download_artifacts(evaluation.info.run_id, "evaluation/summary.json", str(tmp_path))
    assert json.loads(Path(path).read_text()) == {"dice": 0.8}


def test_a_killed_sync_is_completed_by_the_next(server, runs_dir):
    config = submitted(runs_dir, "a", "tracking.experiment=killed")
    train(config, {"student": [0.5]})
    evaluate(config, 0.7)
    log_model(config, "killed-model")
    own, run = client(config.run_dir), runs(config.run_dir)["a/student"].info.run_id
    for metric in ("lr", "train/dice"):  # constant, and falling in value as the step grows
        for start in range(0, 6000, 1000):
            batch = [Metric(metric, 1.0 if metric == "lr" else -step, 1_700_000_000_000 + step, step) for step in range(start, start + 1000)]
            own.log_batch(run, metrics=batch)
    store = STORES[server]
    known = count(store)
    killed = subprocess.Popen([sys.executable, "-c", SYNC, server, str(runs_dir)])
    wait_for(lambda: killed.poll() is not None or count(store) > known + 2000, 300)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert count(store) < known + 12_000  # it was in the middle
    assert synced(server, runs_dir) == {"a": "updated"}
    assert synced(server, runs_dir) == {"a": "unchanged"}
    same(server, "killed", runs_dir / "a")
    mlflow, evaluation = MlflowClient(server), there(server, "killed")["a/evaluation"]
    assert len(evaluation.outputs.model_outputs) == len(mlflow.search_model_versions("name = 'killed-model'")) == 1
    assert len(mlflow.search_logged_models([evaluation.info.experiment_id])) == 1


def test_a_run_is_the_same_whether_it_comes_merged_or_from_its_own_folder(server, runs_dir):
    words = ["tracking.experiment=both"]
    plain = load_config("mst_kdnet_phantom", [f"runs_dir={runs_dir}", "name=plain", *words])
    plain.run_dir.mkdir()
    train(plain, {"student": [0.9]})
    other = load_config("mst_kdnet_phantom", [f"runs_dir={runs_dir}", "name=other", *words])
    other.run_dir.mkdir()
    train(other, {"student": [0.9]})
    sweep(runs_dir, {"S-4": [0.5], "S-7": [0.6]}, words=words)
    list(merge(runs_dir))
    assert synced(server, runs_dir / "plain") == {"plain": "new"}  # from the store that it shares
    assert synced(server, runs_dir) == {"plain": "unchanged", "other": "new", "S-4": "new", "S-7": "new", "S": "new"}
    train(submitted(runs_dir, "S-4", *words, "method.tau=4"), {"student": [0.8]}, attempt=2)  # not merged yet
    assert synced(server, runs_dir)["S-4"] == "updated"
    assert set(synced(server, runs_dir).values()) == {"unchanged"}
    found = there(server, "both")
    assert set(found) == {"plain", "plain/student", "other", "other/student", "S", "S-4", "S-4/student", "S-7", "S-7/student"}
    assert {found[name].data.tags["mlflow.parentRunId"] for name in ("S-4", "S-7")} == {found["S"].info.run_id}
    assert "| 1 | S-7 | 7 | 0.6000 | 10 |" in found["S"].data.tags["mlflow.note.content"]
    for name in ("S-4", "S-7"):  # as on a laptop that has the merged store alone
        (runs_dir / name / "mlflow.db").unlink()
    list_before = {name: run.info.run_id for name, run in found.items()}
    assert synced(server, runs_dir).keys() == {"plain", "other", "S"}
    assert {name: run.info.run_id for name, run in there(server, "both").items()} == list_before


def test_what_a_person_deletes_on_the_server_stays_so(server, runs_dir):
    config = submitted(runs_dir, "a", "tracking.experiment=deleted")
    train(config, {"student": [0.5]})
    synced(server, runs_dir)
    mlflow = MlflowClient(server)
    for run in there(server, "deleted").values():
        mlflow.delete_run(run.info.run_id)
    evaluate(config, 0.7)
    assert synced(server, runs_dir) == {"a": "deleted"} and there(server, "deleted") == {}


@pytest.mark.parametrize(("address", "message"), [
    ("http://name:secret@127.0.0.1:9", "http://127.0.0.1:9: no answer; point --to at its address"),
    ("sqlite:///there.db", "--to sqlite:///there.db: is no address of a tracking server"),
])  # fmt: skip
def test_a_server_that_is_not_there_is_one_line(runs_dir, monkeypatch, address, message):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    train(submitted(runs_dir, "a"), {"student": [0.5]})
    done = CliRunner().invoke(mlflow_cli.mlflow, ["sync", "--to", address, str(runs_dir)])
    assert isinstance(done.exception, UserError) and done.exception.exit_code == 2
    assert str(done.exception).startswith(message) and "\n" not in str(done.exception) and "secret" not in str(done.exception)


def test_a_folder_without_runs_is_refused(runs_dir):
    with pytest.raises(UserError, match=f"{runs_dir}: no mlflow.db in it, nor is it a run that"):
        list(sync("http://127.0.0.1:9", [runs_dir]))


def count(store: Path) -> int:
    with sqlite3.connect(f"{store.as_uri()}?mode=ro", uri=True, timeout=60) as connection:
        return connection.execute("select count(*) from metrics").fetchone()[0]

"""Data bases of submitted runs and their merge: real SQLite files and the real MLflow client."""

import getpass
import json
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Metric, ViewType
from typer.testing import CliRunner
from tracked_runs import DATASET, MERGE, client, evaluate, opened, outcomes, points, rows, runs, runs_dir, submitted, sweep, train, wait_for  # noqa: F401  (runs_dir is a fixture)

from mstkd.config import load_config
from mstkd.errors import UserError
from mstkd.launch import mlflow_cli
from mstkd.track import open_study
from mstkd.track.database import prepare_database
from mstkd.track.merge import merge
from mstkd.track.session import sweep_tags, tracking_uri


# a data base per submitted run


def test_a_submitted_run_keeps_everything_in_its_own_folder(runs_dir):
    config = submitted(runs_dir, "a")
    train(config, {"student": [0.5]})
    evaluate(config, 0.7)
    assert set(runs(config.run_dir)) == {"a", "a/student", "a/evaluation"}
    assert {path.name for path in (config.run_dir / "mlartifacts").rglob("*") if path.is_file()} == {"summary.json"}
    assert [path.name for path in runs_dir.iterdir()] == ["a"]


def test_a_tracking_uri_comes_before_the_runs_own_data_base(runs_dir):
    assert tracking_uri(submitted(runs_dir, "a", "tracking.uri=http://tracker:5000")) == "http://tracker:5000"
    assert tracking_uri(submitted(runs_dir, "a")) == f"sqlite:///{runs_dir}/a/mlflow.db"
    plain = load_config("mst_kdnet_phantom", [f"runs_dir={runs_dir}", "name=b"])
    assert tracking_uri(plain) == f"sqlite:///{runs_dir}/mlflow.db"


def test_a_prepared_data_base_is_mlflows_own_and_says_nothing(runs_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    prepare_database(runs_dir / "a")
    prepared = rows(runs_dir / "a" / "mlflow.db")
    MlflowClient(f"sqlite:///{tmp_path}/made_by_mlflow.db").search_experiments()
    assert prepared.keys() == rows(tmp_path / "made_by_mlflow.db").keys()
    text = json.dumps(prepared)
    assert str(tmp_path) not in text and socket.gethostname() not in text and getpass.getuser() not in text
    assert [path.name for path in (runs_dir / "a").iterdir()] == ["mlflow.db"]


def test_preparing_again_or_at_once_changes_nothing(runs_dir):
    code = "import sys, pathlib; from mstkd.track.database import prepare_database; prepare_database(pathlib.Path(sys.argv[1]))"
    at_once = [subprocess.Popen([sys.executable, "-c", code, str(runs_dir / "a")]) for _ in range(4)]
    assert [process.wait() for process in at_once] == [0] * 4
    before = (runs_dir / "a" / "mlflow.db").read_bytes()
    prepare_database(runs_dir / "a")
    assert (runs_dir / "a" / "mlflow.db").read_bytes() == before
    assert [path.name for path in (runs_dir / "a").iterdir()] == ["mlflow.db"]


def test_a_data_base_of_another_mlflow_is_refused_with_the_way_out(runs_dir):
    prepare_database(runs_dir / "a")
    path = runs_dir / "a" / "mlflow.db"
    with sqlite3.connect(path) as connection:
        connection.execute("update alembic_version set version_num = 'older'")
    with pytest.raises(UserError, match=f"{path}: its tables are of another MLflow .version older, here .*mlflow db upgrade sqlite:///{path}"):
        prepare_database(runs_dir / "a")


def test_a_member_knows_its_sweep(runs_dir, caplog):
    for name, content in {"S": '{"axes": {}, "runs": ["S-1", "S-2"]}', "broken": '{"axes"', "T": '{"axes": {}, "runs": ["T-1"]}'}.items():
        (runs_dir / name).mkdir()
        (runs_dir / name / "sweep.json").write_text(content)
    assert [sweep_tags(runs_dir / name).get("sweep") for name in ("S-1", "S-2", "T-1", "S")] == ["S", "S", "T", None]
    assert "broken/sweep.json" in caplog.text


# the merge


def test_a_merged_run_is_as_it_was(runs_dir):
    config = submitted(runs_dir, "a")
    train(config, {"teacher": [0.4, 0.6], "student": [0.3]})
    evaluate(config, 0.7)
    assert outcomes(runs_dir) == {"a": "new"}
    source, merged = runs(config.run_dir), runs(runs_dir)
    assert merged.keys() == source.keys() == {"a", "a/teacher", "a/student", "a/evaluation"}
    for name, run in source.items():
        there = merged[name]
        for fact in ("status", "start_time", "end_time"):
            assert getattr(there.info, fact) == getattr(run.info, fact)
        assert there.data.params == run.data.params and there.data.metrics == run.data.metrics
        assert there.data.tags["merged_from"] == run.info.run_id
        expected = {key: text for key, text in run.data.tags.items() if key != "mlflow.parentRunId"}
        assert expected.items() <= there.data.tags.items()
        for metric in run.data.metrics:
            assert points(runs_dir, name, metric) == points(config.run_dir, name, metric)
        if name != "a":
            assert there.data.tags["mlflow.parentRunId"] == merged["a"].info.run_id
    (used,), (original,) = merged["a"].inputs.dataset_inputs, source["a"].inputs.dataset_inputs
    assert (used.dataset.name, used.dataset.digest) == (original.dataset.name, original.dataset.digest) == ("phantom", DATASET["digest"][:36])
    copied = Path(merged["a/evaluation"].info.artifact_uri) / "evaluation" / "summary.json"
    assert copied.is_relative_to(runs_dir / "mlartifacts") and json.loads(copied.read_text()) == {"dice": 0.7}
    assert list((config.run_dir / "mlartifacts").rglob("summary.json"))


def test_merging_again_changes_nothing(runs_dir):
    for name in ("a", "b"):
        config = submitted(runs_dir, name)
        train(config, {"student": [0.5]})
        evaluate(config, 0.7)
    assert outcomes(runs_dir) == {"a": "new", "b": "new"}
    before = rows(runs_dir / "mlflow.db")
    assert outcomes(runs_dir) == {"a": "unchanged", "b": "unchanged"}
    assert rows(runs_dir / "mlflow.db") == before


def test_what_came_since_is_added_and_nothing_twice(runs_dir):
    config = submitted(runs_dir, "a")
    prepare_database(runs_dir / "queued")
    tracker = opened(config)
    stage = tracker.child("student", start_step=0)
    stage.log_metrics({"train/loss": 0.5}, 1, "student")
    wait_for(lambda: len(points(config.run_dir, "a/student", "train/loss")) == 1)
    assert outcomes(runs_dir) == {"a": "new", "queued": "empty"}
    first = runs(runs_dir)
    assert first["a"].info.status == "RUNNING" and first["a"].info.end_time is None

    for step in (2, 3):  # the same value again: only the step tells it from the one before
        stage.log_metrics({"train/loss": 0.5}, step, "student")
    tracker.finish("KILLED")
    assert outcomes(runs_dir)["a"] == "updated"
    assert {run.info.status for run in runs(runs_dir).values()} == {"KILLED"}

    with opened(config, attempt=2) as tracker:
        tracker.child("student", start_step=3).log_metrics({"train/loss": 0.25, "val/score": 0.5}, 4, "student")
        assert outcomes(runs_dir)["a"] == "updated"
        assert runs(runs_dir)["a"].info.status == "RUNNING"
    evaluate(config, 0.7)
    assert outcomes(runs_dir)["a"] == "updated"
    evaluate(config, 0.8)  # a summary of the same size
    assert outcomes(runs_dir)["a"] == "updated" and outcomes(runs_dir)["a"] == "unchanged"

    last = runs(runs_dir)
    assert {name: run.info.run_id for name, run in last.items() if name in first} == {name: run.info.run_id for name, run in first.items()}
    assert [step for step, _, _ in points(runs_dir, "a/student", "train/loss")] == [1, 2, 3, 4]
    assert last["a"].data.tags["attempt"] == "2" and last["a"].info.end_time == runs(config.run_dir)["a"].info.end_time
    assert json.loads((Path(last["a/evaluation"].info.artifact_uri) / "evaluation" / "summary.json").read_text()) == {"dice": 0.8}


def test_runs_that_were_not_submitted_stay_beside_the_merged_ones(runs_dir):
    plain = load_config("mst_kdnet_phantom", [f"runs_dir={runs_dir}", "name=plain"])
    plain.run_dir.mkdir()
    train(plain, {"student": [0.5]})
    train(submitted(runs_dir, "a"), {"student": [0.5]})
    assert outcomes(runs_dir) == {"a": "new"}
    assert set(runs(runs_dir)) == {"plain", "plain/student", "a", "a/student"}
    assert len({run.info.experiment_id for run in runs(runs_dir).values()}) == 1


def test_experiments_keep_apart(runs_dir):
    for name, experiment in {"a": "one", "b": "two"}.items():
        train(submitted(runs_dir, name, f"tracking.experiment={experiment}"), {"student": [0.5]})
    outcomes(runs_dir)
    ids = {name: client(runs_dir).get_experiment_by_name(name).experiment_id for name in ("one", "two")}
    assert {name: run.info.experiment_id for name, run in runs(runs_dir).items() if "/" not in name} == {"a": ids["one"], "b": ids["two"]}


def test_a_study_is_merged_with_all_its_levels(runs_dir):
    folder = runs_dir / "toys"
    final, tried = (load_config("mst_kdnet_phantom", [f"runs_dir={folder}/{kind}", f"name={name}"]) for kind, name in (("runs", "a-seed0"), ("tuning", "a-0")))
    with open_study(final, folder, ["runs", "tuning"], {"a-seed0": "a", "a-0": "a"}) as study:
        study.describe("What is asked.")
        for config in (tried, final):
            config.run_dir.mkdir(parents=True)
            train(config, {"student": [0.5]})
    with open_study(final, folder, ["runs", "tuning"], {"a-seed0": "a", "a-0": "a"}):  # again: the same runs
        pass
    assert outcomes(runs_dir) == {"toys": "new"} and outcomes(runs_dir) == {"toys": "unchanged"}
    found = runs(runs_dir)
    names = {run.info.run_id: name for name, run in found.items()}
    above = {name: names.get(run.data.tags.get("mlflow.parentRunId")) for name, run in found.items()}
    assert above == {"toys": None, "toys/tuning": "toys", "a-0": "toys/tuning", "a-0/student": "a-0", "a-seed0": "toys", "a-seed0/student": "a-seed0"}
    assert found["toys"].data.tags["mlflow.note.content"] == "What is asked." and found["a-0"].data.tags["arm"] == "a"
    assert {run.info.status for run in found.values()} == {"FINISHED"}


def test_long_histories_arrive_whole_also_after_a_merge_was_killed(runs_dir):
    config = submitted(runs_dir, "a")
    train(config, {"student": [0.5]})
    own, run = client(config.run_dir), runs(config.run_dir)["a/student"].info.run_id
    for metric in ("lr", "train/dice"):  # constant, and falling in value as the step grows
        for start in range(0, 6000, 1000):
            batch = [Metric(metric, 1.0 if metric == "lr" else -step, 1_700_000_000_000 + step, step) for step in range(start, start + 1000)]
            own.log_batch(run, metrics=batch)
    killed = subprocess.Popen([sys.executable, "-c", MERGE, str(runs_dir)])
    wait_for(lambda: killed.poll() is not None or _count(runs_dir / "mlflow.db", "metrics") > 2000)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    outcomes(runs_dir)
    assert outcomes(runs_dir) == {"a": "unchanged"}
    for metric in ("lr", "train/dice"):
        assert points(runs_dir, "a/student", metric) == points(config.run_dir, "a/student", metric)
    assert runs(runs_dir)["a/student"].data.metrics == runs(config.run_dir)["a/student"].data.metrics


def _count(database: Path, table: str) -> int:
    try:
        with sqlite3.connect(f"{database.as_uri()}?mode=ro", uri=True, timeout=20) as connection:
            return connection.execute(f"select count(*) from {table}").fetchone()[0]
    except sqlite3.OperationalError:
        return 0


def test_a_run_is_read_consistently_while_it_is_written(runs_dir):
    config = submitted(runs_dir, "a")
    tracker = opened(config)
    stage = tracker.child("student", start_step=0)
    stop = threading.Event()

    def write():
        step = 0
        while not stop.is_set():
            step += 1
            stage.log_metrics({"train/loss": 1.0 / step, "train/dice": step}, step, "student")
            stop.wait(0.005)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        seen = []
        while len(seen) < 2:
            merged = subprocess.run([sys.executable, "-c", MERGE, str(runs_dir)], capture_output=True, text=True)
            assert merged.returncode == 0 and "unreadable" not in merged.stdout, merged.stdout + merged.stderr
            if "a/student" not in runs(runs_dir):
                continue
            loss, dice = (points(runs_dir, "a/student", metric) for metric in ("train/loss", "train/dice"))
            # one batch is one transaction of the source: both metrics of a step come, or neither
            assert [step for step, _, _ in loss] == [step for step, _, _ in dice] == list(range(1, len(loss) + 1))
            seen.append(len(loss))
    finally:
        stop.set()
        writer.join()
        tracker.finish("FINISHED")
    assert seen == sorted(seen)
    outcomes(runs_dir)
    assert points(runs_dir, "a/student", "train/loss") == points(config.run_dir, "a/student", "train/loss")
    assert runs(runs_dir)["a"].info.status == "FINISHED"  # the writer was never locked out


def test_what_a_person_deletes_or_renames_in_the_merged_data_base_stays_so(runs_dir):
    configs = [submitted(runs_dir, name) for name in ("a", "b")]
    for config in configs:
        train(config, {"student": [0.5]})
    outcomes(runs_dir)
    merged = client(runs_dir)
    merged.delete_run(runs(runs_dir)["a"].info.run_id)
    merged.delete_run(runs(runs_dir)["a/student"].info.run_id)
    merged.update_run(runs(runs_dir)["b"].info.run_id, name="the good one")
    for config in configs:
        evaluate(config, 0.7)
    assert outcomes(runs_dir) == {"a": "deleted", "b": "updated"}
    assert set(runs(runs_dir)) == {"the good one", "b/student", "b/evaluation"}


def test_the_merged_data_base_holds_no_host_user_or_path(runs_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sweep(runs_dir, {"S-1": [0.5]})
    outcomes(runs_dir)
    with sqlite3.connect(runs_dir / "mlflow.db") as connection:
        assert connection.execute("select artifact_location from experiments where name = 'Default'").fetchone() == ("mlflow-artifacts:/0",)
        connection.execute("update experiments set artifact_location = ''")  # where files lie must be a path
        connection.execute("update runs set artifact_uri = ''")
    text = json.dumps(rows(runs_dir / "mlflow.db"))
    assert str(tmp_path) not in text and socket.gethostname() not in text and f"'{getpass.getuser()}'" not in text


# bad input


def mstkd_mlflow(*words: str):
    return CliRunner().invoke(mlflow_cli.mlflow, list(words))


def test_the_command_prints_a_line_per_run(runs_dir):
    train(submitted(runs_dir, "a"), {"student": [0.5]})
    prepare_database(runs_dir / "b")
    for outcome in ("new", "unchanged"):
        done = mstkd_mlflow("merge", str(runs_dir))
        assert (done.exit_code, done.stdout) == (0, f"a: {outcome}\nb: no run yet\n")


def test_one_unreadable_data_base_does_not_hold_up_the_others(runs_dir):
    for name in ("a", "b", "c", "d"):
        train(submitted(runs_dir, name), {"student": [0.5]})
    (runs_dir / "a" / "mlflow.db").write_bytes(b"not a data base" * 1000)
    content = bytearray((runs_dir / "b" / "mlflow.db").read_bytes())
    content[4096 * 20 : 4096 * 60] = bytes(4096 * 40)
    (runs_dir / "b" / "mlflow.db").write_bytes(content)
    with sqlite3.connect(runs_dir / "c" / "mlflow.db") as connection:
        connection.execute("update alembic_version set version_num = 'older'")
    done = mstkd_mlflow("merge", str(runs_dir))
    assert isinstance(done.exception, UserError)
    assert str(done.exception) == "3 of 4 could not be merged: a, b, c; the reasons are above, the others are up to date"
    lines = dict(line.split(": ", 1) for line in done.stdout.splitlines())
    for name, reason in {"a": "not a readable", "b": "not a readable", "c": "mlflow db upgrade"}.items():
        assert lines[name].startswith(str(runs_dir / name / "mlflow.db")) and reason in lines[name]
    assert lines["d"] == "new" and set(runs(runs_dir)) == {"d", "d/student"}


def test_a_folder_without_submitted_runs_is_refused_untouched(runs_dir):
    done = mstkd_mlflow("merge", str(runs_dir / "absent"))
    assert isinstance(done.exception, UserError) and "no such folder" in str(done.exception)
    prepare_database(runs_dir / "a")
    with pytest.raises(UserError, match=f"{runs_dir}/a: no run in it has an mlflow.db of its own"):
        list(merge(runs_dir / "a"))
    assert [path.name for path in (runs_dir / "a").iterdir()] == ["mlflow.db"]


def test_two_merges_at_once_are_refused(runs_dir):
    for name in ("a", "b"):
        prepare_database(runs_dir / name)
    first = merge(runs_dir)
    next(first)
    with pytest.raises(UserError, match="another mstkd mlflow merge is at work"):
        next(merge(runs_dir))
    assert len(list(first)) == 1


def test_a_data_base_merged_elsewhere_is_not_filled_with_files_of_nowhere(runs_dir, tmp_path):
    config = submitted(runs_dir, "a")
    train(config, {"student": [0.5]})
    outcomes(runs_dir)
    runs_dir.rename(tmp_path / "moved")
    with pytest.raises(UserError, match="move mlflow.db aside and merge anew"):
        list(merge(tmp_path / "moved"))
    (tmp_path / "moved" / "mlflow.db").unlink()
    merged = subprocess.run([sys.executable, "-c", MERGE, str(tmp_path / "moved")], capture_output=True, text=True, check=True)
    assert "outcome='new'" in merged.stdout


def test_a_deleted_experiment_is_named(runs_dir):
    train(submitted(runs_dir, "a"), {"student": [0.5]})
    outcomes(runs_dir)
    merged = client(runs_dir)
    (experiment,) = {run.info.experiment_id for run in runs(runs_dir).values()}
    merged.delete_experiment(experiment)
    with pytest.raises(UserError, match=f"experiment mstkd in .* is deleted.*restore -x {experiment}"):
        list(merge(runs_dir))
    assert len(merged.search_experiments(ViewType.DELETED_ONLY)) == 1


def test_the_page_says_to_merge_first(runs_dir):
    prepare_database(runs_dir / "a")
    done = mstkd_mlflow("ui", "--runs-dir", str(runs_dir))
    assert isinstance(done.exception, UserError) and f"mstkd mlflow merge {runs_dir}" in str(done.exception)
    shutil.rmtree(runs_dir / "a")
    assert "train first" in str(mstkd_mlflow("ui", "--runs-dir", str(runs_dir)).exception)

"""Submitted runs with a data base each, as training leaves them, and a page server to ask."""

import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from mlflow import MlflowClient

from mstkd.config import RunConfig, load_config
from mstkd.track import open_evaluation, open_trackers
from mstkd.track.database import prepare_database
from mstkd.track.merge import merge

DATASET = {"name": "phantom", "digest": "0123456789abcdef" * 4}
MERGE = "import sys, pathlib; from mstkd.track.merge import merge; print(*merge(pathlib.Path(sys.argv[1])), sep='\\n')"


@pytest.fixture
def runs_dir(tmp_path) -> Path:
    folder = tmp_path / "runs"
    folder.mkdir()
    return folder


def submitted(runs_dir: Path, name: str, *words: str) -> RunConfig:
    """The configuration of a run whose data base has been prepared, as the launcher does."""
    config = load_config("mst_kdnet_phantom", [f"runs_dir={runs_dir}", f"name={name}", *words])
    prepare_database(config.run_dir)
    return config


def opened(config: RunConfig, attempt: int = 1):
    return open_trackers(config, config.run_dir, attempt=attempt, tags={"ranks": 2}, dataset=DATASET)


def train(config: RunConfig, scores: dict[str, list[float]], attempt: int = 1) -> None:
    """Log what a training with these validation scores per stage, at steps 10, 20, ..., would log."""
    with opened(config, attempt) as tracker:
        for stage, values in scores.items():
            child = tracker.child(stage, start_step=0)
            for number, score in enumerate(values, start=1):
                child.log_metrics({"val/score": score, "train/loss": 1.0 / number}, 10 * number, stage)


def evaluate(config: RunConfig, dice: float) -> None:
    folder = config.run_dir / "evaluation"
    folder.mkdir(exist_ok=True)
    (folder / "summary.json").write_text(json.dumps({"dice": dice}))
    with open_evaluation(config, config.run_dir, "evaluation") as tracker:
        tracker.log_metrics({"student/dice/WT/mean": dice}, 0, "evaluation")
        tracker.log_artifact(folder / "summary.json", "evaluation")


def client(folder: Path) -> MlflowClient:
    return MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")


def runs(folder: Path) -> dict:
    """The runs of `folder`/mlflow.db by name."""
    mlflow = client(folder)
    found = mlflow.search_runs([experiment.experiment_id for experiment in mlflow.search_experiments()])
    by_name = {run.info.run_name: run for run in found}
    assert len(by_name) == len(found)
    return by_name


def points(folder: Path, run: str, metric: str) -> list[tuple]:
    history = client(folder).get_metric_history(runs(folder)[run].info.run_id, metric)
    return [(point.step, point.value, point.timestamp) for point in history]


def outcomes(runs_dir: Path) -> dict[str, str]:
    return {merged.name: merged.outcome for merged in merge(runs_dir)}


def rows(database: Path) -> dict[str, list]:
    """Every row of every table."""
    with sqlite3.connect(database) as connection:
        tables = [row[0] for row in connection.execute("select name from sqlite_master where type='table'")]
        return {table: sorted(map(repr, connection.execute(f'select * from "{table}"'))) for table in tables}


def sweep(runs_dir: Path, scores: dict[str, list[float]], planned: tuple[str, ...] = (), words: tuple[str, ...] = ()) -> None:
    """A sweep S over method.tau whose members have these validation scores of the student."""
    (runs_dir / "S").mkdir(exist_ok=True)
    taus = [int(name.removeprefix("S-")) for name in (*scores, *planned)]
    (runs_dir / "S" / "sweep.json").write_text(json.dumps({"axes": {"method.tau": taus}, "runs": [*scores, *planned]}))
    for name, values in scores.items():
        config = submitted(runs_dir, name, f"method.tau={name.removeprefix('S-')}", *words)
        train(config, {"student": values})


def ask(port: int, what: str, question: dict) -> dict:
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/api/2.0/mlflow/{what}", json.dumps(question).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.load(answer)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def answers(url: str, server: subprocess.Popen, log: Path) -> bool:
    """Whether `server`, which must not have ended, is up."""
    assert server.poll() is None, log.read_text()
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return answer.status == 200
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False


def wait_for(condition, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


@contextmanager
def tracking_server(folder: Path) -> Iterator[str]:
    """The address of a real `mlflow server` that keeps everything in `folder`."""
    folder.mkdir()
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{folder / 'mlflow.db'}", "--artifacts-destination", str(folder / "files")]
    with (folder / "server.log").open("w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True, cwd=folder)
    try:
        wait_for(lambda: answers(f"http://127.0.0.1:{port}/health", server, folder / "server.log"), seconds=300)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(60)

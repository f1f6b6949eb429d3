"""Runs on a real two-host SLURM cluster (slurm/devcluster): what is submitted, and what survives the queue."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_train import TINY, losses

from mstkd import attempts

pytestmark = pytest.mark.slurm
BIN = Path(sys.executable).parent
NAME = "mst_kdnet_phantom"


@pytest.fixture
def words(phantom_shards, tmp_path):
    """Overrides of a short run in tmp_path/runs, as `mstkd submit` gets them."""
    return [*TINY, f"data.shards={phantom_shards}", f"runs_dir={tmp_path / 'runs'}", "checkpoint.every_steps=1000"]


def submit(devcluster, tmp_path, words, *options, recipe=NAME, cluster="devcluster") -> list[str]:
    """The ids of the jobs that `mstkd submit` started."""
    command = [BIN / "mstkd", "submit", recipe, "--cluster", cluster, *options, *words]
    done = subprocess.run(command, cwd=tmp_path, env=devcluster.env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [line.split()[1].rstrip(":") for line in done.stdout.splitlines() if line.startswith("submitted")]


def logs_of(run: Path) -> str:
    return "\n".join(f"== {path.name}\n{path.read_text(errors='replace')}" for path in sorted((run / "jobs").rglob("*log*")))


def reach(run: Path, step: int, timeout_s: float = 180) -> None:
    """Wait until the run has logged `step`."""
    deadline = time.monotonic() + timeout_s
    metrics = run / "metrics.jsonl"
    while not (metrics.exists() and max(losses(metrics), default=0) >= step):
        assert time.monotonic() < deadline, logs_of(run)
        time.sleep(0.1)


def endings(run: Path) -> list[str]:
    return [attempt.ending.outcome if attempt.ending else "none" for attempt in attempts.read(run)]


def test_two_hosts_give_the_losses_of_one(devcluster, words, tmp_path, one_rank_curve):
    train, evaluate = submit(devcluster, tmp_path, [*words, "train.zero_stage=2"])
    run = tmp_path / "runs" / NAME
    assert devcluster.wait(train, "COMPLETED", timeout_s=300) == "COMPLETED", logs_of(run)
    hosts = {json.loads(path.read_text())["host"] for path in (run / "heartbeats").glob("rank-*.json")}
    assert hosts == {"n1", "n2"}
    expected = {step: values["train/loss_networks"] for step, values in one_rank_curve}
    assert losses(run / "metrics.jsonl") == pytest.approx(expected, rel=1e-5)
    assert devcluster.wait(evaluate, "COMPLETED", timeout_s=300) == "COMPLETED", logs_of(run)
    assert len(json.loads((run / "evaluation/summary.json").read_text())["subsets"]) == 15

"""Runs on a real two-host SLURM cluster (slurm/devcluster): what is submitted, and what survives the queue."""

import json
import os
import signal
from pathlib import Path

import pytest
from mlflow import MlflowClient
from short_runs import TINY, losses
from slurm_runs import beats, completed, endings, outlive_repeated_signals, reach, submit

from mstkd import attempts

pytestmark = pytest.mark.slurm
NAME = "mst_kdnet_phantom"
STEPS = 30  # long enough for a disturbance to arrive in the middle


@pytest.fixture
def words(phantom_shards, tmp_path):
    """Overrides of a short run in tmp_path/runs, as `mstkd submit` gets them."""
    return [*TINY, f"data.shards={phantom_shards}", f"runs_dir={tmp_path / 'runs'}", f"train.steps={STEPS}", "checkpoint.every_steps=1000"]


def test_two_hosts_give_the_losses_of_one(devcluster, words, tmp_path, one_rank_curve):
    train, evaluate = submit(devcluster, tmp_path, NAME, [*words, "train.zero_stage=2", "train.steps=10"])
    run = tmp_path / "runs" / NAME
    completed(devcluster, train, run)
    assert {beat["host"] for beat in beats(run)} == {"n1", "n2"}
    expected = {step: values["train/loss_networks"] for step, values in one_rank_curve}
    assert losses(run / "metrics.jsonl") == pytest.approx(expected, rel=1e-5)
    completed(devcluster, evaluate, run)
    assert len(json.loads((run / "evaluation/summary.json").read_text())["subsets"]) == 15


def pid_on(devcluster, node: str, run: Path) -> int:
    """The rank of a run on a node."""
    (pid,) = [beat["pid"] for beat in beats(run) if beat["host"] == node]
    return pid


def assert_whole(run: Path, one_rank_curve) -> None:
    """metrics.jsonl holds every step once; the first ten have the losses of an undisturbed run."""
    found = losses(run / "metrics.jsonl")
    assert list(found) == list(range(1, STEPS + 1))
    expected = {step: values["train/loss_networks"] for step, values in one_rank_curve}
    assert {step: found[step] for step in expected} == pytest.approx(expected, rel=1e-5)


def test_requeued_and_signalled_runs_lose_nothing(devcluster, words, tmp_path, one_rank_curve):
    job, _ = submit(devcluster, tmp_path, NAME, words)
    run = tmp_path / "runs" / NAME
    reach(run, 3)
    devcluster.run("scontrol", "requeue", job)  # by an administrator, or a preemption
    reach(run, 6)
    devcluster.run("scancel", "--signal=USR2", job)  # as before the time limit
    completed(devcluster, job, run)
    assert endings(run) == ["stopped", "interrupted", "finished"]
    steps = [attempt.ending.step for attempt in attempts.read(run)]
    assert 3 <= steps[0] < steps[1] < steps[2] == STEPS
    assert_whole(run, one_rank_curve)
    ids = json.loads((run / "mlflow.json").read_text())
    client = MlflowClient(f"sqlite:///{run}/mlflow.db")
    assert client.get_run(ids["run_id"]).info.status == "FINISHED"
    assert [metric.step for metric in client.get_metric_history(ids["children"]["distill"], "train/loss_networks")] == list(range(1, STEPS + 1))


def test_a_cancelled_run_stays_cancelled_and_goes_on_when_submitted_again(devcluster, words, tmp_path, one_rank_curve):
    job, evaluation = submit(devcluster, tmp_path, NAME, words)
    run = tmp_path / "runs" / NAME
    reach(run, 3)
    devcluster.run("scancel", job)
    assert devcluster.wait(job, "CANCELLED") == "CANCELLED"
    assert devcluster.wait(evaluation, "CANCELLED") == "CANCELLED"  # its dependency can never be met
    assert endings(run) == ["stopped"]
    again, _ = submit(devcluster, tmp_path, NAME, words)
    completed(devcluster, again, run)
    assert_whole(run, one_rank_curve)


def test_a_killed_rank_takes_the_job_down_and_it_starts_again(devcluster, words, tmp_path):
    changes = ["checkpoint.every_steps=2", "train.precision=bf16", "train.zero_stage=2"]
    job, _ = submit(devcluster, tmp_path, NAME, [*words, *changes])
    run = tmp_path / "runs" / NAME
    reach(run, 3)
    pid = pid_on(devcluster, "n2", run)
    os.kill(pid, signal.SIGKILL)
    completed(devcluster, job, run)
    first, second = attempts.read(run)
    assert first.ending.outcome in ("killed", "failed") and second.ending.outcome == "finished"
    assert list(losses(run / "metrics.jsonl")) == list(range(1, STEPS + 1))


def test_a_rank_that_hangs_is_named(devcluster, words, tmp_path, one_rank_curve):
    changes = ["checkpoint.every_steps=2", "watchdog={heartbeat_s: 1, hang_min: 0.5}"]
    job, _ = submit(devcluster, tmp_path, NAME, [*words, *changes])
    run = tmp_path / "runs" / NAME
    reach(run, 3)
    pid = pid_on(devcluster, "n2", run)
    os.kill(pid, signal.SIGSTOP)
    completed(devcluster, job, run)
    first, second = attempts.read(run)
    assert first.ending.outcome == "hung" and "no sign of life from rank 1 on n2 (step" in first.ending.reason
    assert second.ending.outcome == "finished"
    assert_whole(run, one_rank_curve)


@pytest.mark.slow
def test_a_cut_link_ends_the_attempt_and_the_run_goes_on_when_it_is_back(devcluster, words, tmp_path, one_rank_curve):
    changes = ["checkpoint.every_steps=2", "watchdog={heartbeat_s: 1, hang_min: 0.5}"]
    job, _ = submit(devcluster, tmp_path, NAME, [*words, *changes])
    run = tmp_path / "runs" / NAME
    reach(run, 3)
    devcluster.node("n2", "cut")
    try:
        devcluster.wait(job, "PENDING", timeout_s=500)
        outlive_repeated_signals(devcluster, job)
    finally:
        devcluster.node("n2", "join")
    completed(devcluster, job, run)
    assert endings(run)[-1] == "finished"
    assert_whole(run, one_rank_curve)


@pytest.mark.slow
def test_a_lost_node_daemon_costs_at_most_the_steps_since_the_last_save(devcluster, words, tmp_path, one_rank_curve):
    job, _ = submit(devcluster, tmp_path, NAME, [*words, "checkpoint.every_steps=2"])
    run = tmp_path / "runs" / NAME
    reach(run, 3)
    devcluster.node("n2", "stop")
    try:
        if devcluster.wait(job, "PENDING", "COMPLETED", timeout_s=500) == "PENDING":
            outlive_repeated_signals(devcluster, job)
    finally:
        devcluster.node("n2", "start")
    completed(devcluster, job, run)
    assert_whole(run, one_rank_curve)

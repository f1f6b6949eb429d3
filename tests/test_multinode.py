"""Runs on two hosts that a person starts by hand: the deepspeed command, torchrun, plain sbatch."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from devcluster import SCRIPTS, DevCluster, poll
from short_runs import TINY, losses
from slurm_runs import beats, endings

pytestmark = pytest.mark.slurm
BIN = Path(sys.executable).parent
SBATCH = SCRIPTS.parent / "train.sbatch"
NAME = "mst_kdnet_phantom"
STEPS = 3
TWO_HOSTS = ["--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1"]
LEFT_BY_OTHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture
def words(phantom_shards, tmp_path):
    """A recipe and its overrides for a run in tmp_path/runs."""
    return [NAME, *TINY, f"data.shards={phantom_shards}", f"runs_dir={tmp_path / 'runs'}", f"train.steps={STEPS}"]


@pytest.fixture
def hostfile(tmp_path):
    file = tmp_path / "hostfile"
    file.write_text("n1 slots=1\nn2 slots=1\n")
    return file


def environment(devcluster: DevCluster) -> dict[str, str]:
    """Of a person's shell with the virtual environment active."""
    clean = {name: value for name, value in devcluster.env.items() if name not in LEFT_BY_OTHERS and not name.startswith("SLURM_JOB")}
    return {**clean, "PATH": f"{BIN}:{clean['PATH']}", "OMP_NUM_THREADS": "1"}


def finish(commands: list[list], devcluster: DevCluster, folder: Path) -> str:
    """Run the commands at the same time, in `folder`; what they said. All must succeed."""
    options = {"cwd": folder, "env": environment(devcluster), "text": True, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    started = [subprocess.Popen(list(map(str, command)), **options) for command in commands]
    said = [process.communicate()[0] for process in started]
    assert [process.returncode for process in started] == [0] * len(started), "\n".join(said)
    return "\n".join(said)


def assert_trained_on_both(run: Path, one_rank_curve, steps: int = STEPS) -> None:
    assert {(beat["host"], beat["rank"]) for beat in beats(run)} == {("n1", 0), ("n2", 1)}
    assert json.loads((run / "record.json").read_text())["world_size"] == 2
    expected = {step: values["train/loss_networks"] for step, values in one_rank_curve if step <= steps}
    found = losses(run / "metrics.jsonl")
    assert list(found) == list(range(1, steps + 1))
    assert {step: found[step] for step in expected} == pytest.approx(expected, rel=1e-5)


def on_both(command: list) -> list[list]:
    """The command typed on both hosts, K standing for the number of the host."""
    return [[SCRIPTS / "on", f"n{k + 1}", *(str(k) if word == "K" else word for word in command)] for k in range(2)]


def test_deepspeed_launches_through_slurm_without_ssh(devcluster, words, hostfile, tmp_path, one_rank_curve):
    # this launcher of DeepSpeed's knows no --module and calls srun with the number of ranks alone
    deepspeed = ["deepspeed", "--hostfile", hostfile, "--launcher", "slurm", "--no_ssh_check", "--master_addr", "n1"]
    placed = [*deepspeed, f"--launcher_args={' '.join(TWO_HOSTS)}", BIN / "mstkd", "train", *words]
    finish([placed], devcluster, tmp_path)
    assert_trained_on_both(tmp_path / "runs" / NAME, one_rank_curve)


def test_deepspeed_launches_through_slurm_inside_an_allocation(devcluster, words, hostfile, tmp_path, one_rank_curve):
    deepspeed = ["deepspeed", "--hostfile", hostfile, "--launcher", "slurm", "--no_ssh_check", "--master_addr", "n1"]
    finish([["salloc", "--quiet", *TWO_HOSTS, *deepspeed, BIN / "mstkd", "train", *words]], devcluster, tmp_path)
    assert_trained_on_both(tmp_path / "runs" / NAME, one_rank_curve)


def test_deepspeed_started_on_each_host_by_hand(devcluster, words, hostfile, tmp_path, one_rank_curve):
    deepspeed = [BIN / "deepspeed", "--hostfile", hostfile, "--no_ssh", "--node_rank", "K", "--master_addr", "n1", "--master_port", "29721"]
    finish(on_both([*deepspeed, "--module", "mstkd.train", *words]), devcluster, tmp_path)
    assert_trained_on_both(tmp_path / "runs" / NAME, one_rank_curve)


def test_torchrun_started_on_each_host_by_hand(devcluster, words, tmp_path, one_rank_curve):
    torchrun = [BIN / "torchrun", "--nnodes", "2", "--node_rank", "K", "--nproc_per_node", "1"]
    finish(on_both([*torchrun, "--master_addr", "n1", "--master_port", "29722", "-m", "mstkd.train", *words]), devcluster, tmp_path)
    assert_trained_on_both(tmp_path / "runs" / NAME, one_rank_curve)


def test_torchrun_as_the_one_task_per_node_of_srun(devcluster, words, tmp_path, one_rank_curve):
    meeting = "--nnodes 2 --nproc_per_node 1 --master_addr n1 --master_port 29723"
    torchrun = f'exec torchrun {meeting} --node_rank "$SLURM_NODEID" -m mstkd.train "$@"'
    finish([["srun", *TWO_HOSTS, "bash", "-c", torchrun, "torchrun", *words]], devcluster, tmp_path)
    assert_trained_on_both(tmp_path / "runs" / NAME, one_rank_curve)


def test_variables_of_another_launcher_end_srun_with_a_line(devcluster, words, tmp_path):
    env = {**environment(devcluster), "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    done = subprocess.run(["srun", *TWO_HOSTS, BIN / "mstkd", "train", *words], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert re.search(r"error: srun started this as task [01] of 2, but RANK is 0 and WORLD_SIZE 1, left by another launcher", done.stderr)
    assert "Traceback" not in done.stderr and not (tmp_path / "runs").exists()


def sbatch(devcluster: DevCluster, folder: Path, words: list[str]) -> str:
    """The id of the job that slurm/train.sbatch makes on two hosts without GPUs."""
    command = ["sbatch", "--parsable", *TWO_HOSTS, "--gpus-per-node=0", "--time=30", SBATCH, *words]
    done = subprocess.run(command, cwd=folder, env=environment(devcluster), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def reach(devcluster: DevCluster, job: str, run: Path, step: int) -> None:
    """Wait until the job has logged `step`, or is over."""
    metrics = run / "metrics.jsonl"

    def there() -> bool:
        return metrics.exists() and max(losses(metrics), default=0) >= step

    poll(lambda: there() or not set(devcluster.states(job)) <= {"PENDING", "CONFIGURING", "RUNNING"}, 180)
    assert there(), said(run, job)


def said(run: Path, job: str) -> str:
    output = run.parents[1] / f"slurm-{job}.out"
    return output.read_text(errors="replace") if output.exists() else f"job {job} never started"


def test_plain_sbatch_survives_the_signal_before_the_time_limit(devcluster, words, tmp_path, one_rank_curve):
    steps = 12
    job = sbatch(devcluster, tmp_path, [*words, f"train.steps={steps}", "checkpoint.every_steps=1000"])
    run = tmp_path / "runs" / NAME
    reach(devcluster, job, run, 2)
    devcluster.run("scancel", "--signal=USR2", job)
    state = devcluster.wait(job, "COMPLETED", "FAILED", "CANCELLED", timeout_s=200)
    assert state == "COMPLETED", said(run, job)
    assert endings(run) == ["interrupted", "finished"]
    assert_trained_on_both(run, one_rank_curve, steps)


def test_plain_sbatch_stays_cancelled(devcluster, words, tmp_path):
    job = sbatch(devcluster, tmp_path, [*words, "train.steps=1000", "checkpoint.every_steps=1000"])
    run = tmp_path / "runs" / NAME
    reach(devcluster, job, run, 2)
    devcluster.run("scancel", job)
    assert devcluster.wait(job, "CANCELLED") == "CANCELLED"
    assert poll(lambda: endings(run) == ["stopped"], 60)
    saved = (run / "distill/checkpoints/latest").read_text()
    assert int(saved.split("-")[1]) == max(losses(run / "metrics.jsonl"))


def test_plain_sbatch_without_a_recipe_says_how_to_use_it(tmp_path):
    done = subprocess.run(["bash", SBATCH], cwd=tmp_path, env=os.environ, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("usage: sbatch")

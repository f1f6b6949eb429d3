"""Chains, sweeps and snapshots on the two-host cluster, and submissions that it refuses."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from slurm_runs import TESTS, beats, completed, endings, logs_of, refusal, submit
from small_uhf import SMALL

from mstkd.launch.jobs import read_jobs
from mstkd.shards.build import build
from mstkd.shards.phantom import write_phantom

pytestmark = pytest.mark.slurm
ROOT = TESTS.parent
CLUSTER = """partition: debug
nodes: 1
ranks_per_node: 1
cpus_per_task: 1
timeout_min: 60
signal_delay_s: 30
environment: {OMP_NUM_THREADS: "1"}
"""


@pytest.fixture
def cluster(tmp_path):
    """One rank per job on the devcluster; the nodes find the methods in this folder."""
    path = tmp_path / "one.yaml"
    path.write_text(CLUSTER + f"setup: ['export PYTHONPATH={TESTS}']\n")
    return str(path)


@pytest.fixture
def toy(phantom_shards, tmp_path, monkeypatch):
    """A recipe of the two-stage toy: steps of milliseconds."""
    monkeypatch.setenv("PYTHONPATH", str(TESTS))
    (tmp_path / "toy.yaml").write_text(f"""
name: toy
runs_dir: {tmp_path / 'runs'}
method: {{name: toys.two_stage}}
data: {{shards: {phantom_shards}, crop: [16, 16, 16], workers: 0}}
train: {{global_batch: 2, steps: 4, precision: fp32, log_every: 1}}
validate: {{subsets: [flair], max_cases: 1}}
evaluate: {{networks: [student]}}
""")
    return str(tmp_path / "toy.yaml")


def with_path(devcluster):
    devcluster.env["PYTHONPATH"] = str(TESTS)
    return devcluster


def test_stages_as_a_chain_find_what_they_need_and_an_evaluation_comes_last(devcluster, toy, cluster, tmp_path):
    teacher, student, evaluation = submit(with_path(devcluster), tmp_path, toy, [], "--stages", "teacher,student", cluster=cluster)
    run = tmp_path / "runs/toy"
    assert [(job.id, job.stages, job.after) for job in read_jobs(run)] == [
        (teacher, ["teacher"], None), (student, ["student"], teacher), (evaluation, [], student),
    ]  # fmt: skip
    completed(devcluster, evaluation, run)
    assert endings(run) == ["finished", "finished"]
    assert {path.parent.parent.name for path in run.glob("*/checkpoints/best")} == {"teacher", "student"}
    assert set(json.loads((run / "evaluation/summary.json").read_text())["mean"]) == {"WT", "TC", "ET"}


def test_a_translation_is_a_chain_of_a_teacher_a_student_and_an_evaluation(devcluster, phantom_shards, cluster, tmp_path):
    words = [
        f"data.shards={phantom_shards}", "data.slices={size: 16, min_brain: 0.1}", "method.network={width: 4, levels: 2}", "method.critic={width: 4, layers: 3}",
        "train.steps=2", "validate={every_steps: 2, max_cases: 1, subsets: [t1]}", f"runs_dir={tmp_path / 'runs'}",
    ]  # fmt: skip
    *stages, evaluation = submit(devcluster, tmp_path, "utad_net_phantom", words, "--stages", "all", cluster=cluster)
    run = tmp_path / "runs/utad_net_phantom"
    completed(devcluster, evaluation, run)
    assert len(stages) == 2 and endings(run) == ["finished", "finished"]
    summaries = {name: json.loads((run / "evaluation" / f"{name}.json").read_text()) for name in ("summary", "summary_teacher")}
    assert len(summaries["summary"]["patterns"]) == 12 and summaries["summary_teacher"]["oracle"] and not summaries["summary"].get("oracle")


def test_four_stages_of_two_hosts_each_need_the_one_before(devcluster, tmp_path):
    write_phantom(tmp_path / "nifti", subjects=4, size=32, seed=3, paired_7t=True)
    build("phantom_7t", tmp_path / "nifti", tmp_path / "shards")
    words = [*SMALL, f"data.shards={tmp_path / 'shards'}", f"runs_dir={tmp_path / 'runs'}", "train.global_batch=2"]
    *stages, evaluation = submit(devcluster, tmp_path, "uhf_phantom", words, "--stages", "all")
    run = tmp_path / "runs/uhf_phantom"
    assert [(job.stages, job.after) for job in read_jobs(run)[:4]] == [
        (["base"], None), (["teacher"], stages[0]), (["keeper"], stages[1]), (["fusion"], stages[2]),
    ]  # fmt: skip
    completed(devcluster, evaluation, run)
    assert endings(run) == ["finished"] * 4 and {beat["host"] for beat in beats(run)} == {"n1", "n2"}
    assert {path.name for path in (run / "evaluation").glob("summary*.json")} == {"summary.json", "summary_base.json"}


def test_a_failing_first_stage_ends_the_chain_with_its_reason(devcluster, toy, cluster, tmp_path):
    teacher, student, evaluation = submit(with_path(devcluster), tmp_path, toy, ["method.fail_at=2"], "--stages", "all", cluster=cluster)
    run = tmp_path / "runs/toy"
    assert devcluster.wait(teacher, "FAILED", timeout_s=600) == "FAILED", logs_of(run)
    for job in (student, evaluation):
        assert devcluster.wait(job, "CANCELLED") == "CANCELLED"
    assert endings(run) == ["failed", "failed"]  # the same step twice: no third time
    assert "FAILED: crashed twice at stage teacher, step 2: rank 0: RuntimeError: told to fail" in logs_of(run)


def test_a_sweep_of_four_is_an_array_of_runs_that_do_not_meet(devcluster, toy, tmp_path):
    """Two ranks each, all at once on the same hosts: ports and MLflow stores stay apart."""
    two = tmp_path / "two.yaml"
    two.write_text(CLUSTER.replace("nodes: 1", "nodes: 2") + f"array_parallelism: 4\nsetup: ['export PYTHONPATH={TESTS}']\n")
    words = ["--sweep", "method.weight=1,2", "seed=0,1"]
    jobs = submit(with_path(devcluster), tmp_path, toy, words, cluster=str(two))
    names = [f"toy-weight{weight}-seed{seed}" for weight in (1, 2) for seed in (0, 1)]
    assert len(jobs) == 8 and len({job.partition("_")[0] for job in jobs}) == 2
    for name, job in zip(names, jobs[4:], strict=True):
        completed(devcluster, job, tmp_path / "runs" / name)
    sweep = json.loads((tmp_path / "runs/toy/sweep.json").read_text())
    assert sweep.pop("id") and sweep == {"axes": {"method.weight": [1, 2], "seed": [0, 1]}, "runs": names}
    for name in names:
        run = tmp_path / "runs" / name
        assert endings(run) == ["finished"] and (run / "mlflow.db").is_file()
        assert (run / "evaluation/summary.json").is_file()
    mstkd = [Path(sys.executable).parent / "mstkd"]
    table = subprocess.run([*mstkd, "status", "toy", "--runs-dir", "runs"], cwd=tmp_path, env={**devcluster.env, "COLUMNS": "200"}, capture_output=True, text=True)
    assert table.returncode == 0 and all(name in table.stdout for name in names), table.stdout + table.stderr
    merged = subprocess.run([*mstkd, "mlflow", "merge", "runs"], cwd=tmp_path, env=devcluster.env, capture_output=True, text=True)
    assert merged.returncode == 0 and (tmp_path / "runs/mlflow.db").is_file(), merged.stderr


def test_edits_between_submission_and_start_change_nothing(devcluster, toy, tmp_path):
    source, python = own_checkout(tmp_path)
    held = tmp_path / "held.yaml"
    held.write_text(CLUSTER + f"additional: {{hold: true}}\nsetup: ['export PYTHONPATH={TESTS}']\n")
    # from the root of the checkout: there `python -m` would find the sources themselves
    job, _ = submit(with_path(devcluster), source, toy, [], cluster=str(held), mstkd=python.parent / "mstkd")
    for edited in ("mstkd/train.py", "launch/job.py", "shards/spec.py"):
        (source / edited).write_text("raise SystemExit('edited after the submission')\n")
    assert f"its job {job} is pending already" in refusal(devcluster, tmp_path, toy, [], cluster=str(held))
    devcluster.run("scontrol", "release", job)
    run = tmp_path / "runs/toy"
    completed(devcluster, job, run)
    devcluster.run("scancel", read_jobs(run)[1].id)
    assert endings(run) == ["finished"]


def own_checkout(folder: Path) -> tuple[Path, Path]:
    """(sources, python) of an editable installation of its own, which sees this environment's other packages."""
    source, venv = folder / "source", folder / "venv"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "mstkd", "launch", "shards", "slurm"):
        here = ROOT / name
        shutil.copytree(here, source / name) if here.is_dir() else shutil.copy(here, source)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    (site,) = venv.glob("lib/python*/site-packages")
    packages = [path for path in sys.path if path.endswith("site-packages")]
    (site / "packages.pth").write_text("\n".join(packages) + "\n")  # paths alone: the other editable installation is not among them
    pip = [venv / "bin/python", "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--editable", source]
    subprocess.run(pip, check=True)
    return source, venv / "bin/python"


def test_what_slurm_refuses_is_said_in_its_own_words(devcluster, toy, tmp_path):
    (tmp_path / "wrong.yaml").write_text(CLUSTER.replace("debug", "gpus"))
    line = refusal(with_path(devcluster), tmp_path, toy, [], cluster=str(tmp_path / "wrong.yaml"))
    assert line.startswith("error: cluster ") and "invalid partition specified: gpus" in line


def test_more_ranks_than_the_global_batch_are_refused(devcluster, toy, tmp_path):
    (tmp_path / "four.yaml").write_text(CLUSTER.replace("ranks_per_node: 1", "ranks_per_node: 4"))
    line = refusal(with_path(devcluster), tmp_path, toy, [], cluster=str(tmp_path / "four.yaml"))
    assert "train.global_batch 2 with micro_batch 1 runs on 1 or 2 ranks, not 4" in line
    assert not (tmp_path / "runs").exists()


def test_a_run_folder_that_a_node_does_not_see_is_named(devcluster, toy, tmp_path):
    private = tmp_path / "private"
    private.mkdir()
    inside = ["nsenter", "--mount", "--target", slurmd_pid(devcluster, "n2")]
    two = tmp_path / "two.yaml"
    two.write_text(CLUSTER.replace("nodes: 1", "nodes: 2") + f"setup: ['export PYTHONPATH={TESTS}']\n")
    subprocess.run([*inside, "mount", "-t", "tmpfs", "none", private], check=True)
    try:
        job, _ = submit(with_path(devcluster), tmp_path, toy, [f"runs_dir={private}"], cluster=str(two))
        assert devcluster.wait(job, "FAILED") == "FAILED"
    finally:
        subprocess.run([*inside, "umount", private], check=True)
    assert "n2 does not see" in logs_of(private / "toy") and "all nodes share" in logs_of(private / "toy")


def slurmd_pid(devcluster, node: str) -> str:
    return (devcluster.folder / "run" / f"slurmd-{node}.pid").read_text().strip()

"""What `mstkd submit` would tell SLURM, and how a job's end is judged; the real cluster is in test_slurm.py."""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from mstkd import attempts
from mstkd.attempts import Ending
from mstkd.errors import UserError
from mstkd.launch.batch import teardown_lines
from mstkd.launch.cluster import load_cluster
from mstkd.launch.doctor_slurm import options
from mstkd.launch.submit import dry_run, prepare, sweep_axes
from mstkd.launch.verdict import BAD_INPUT, STOPPED, WARNED, Task, judge_training

RECIPE = "mst_kdnet_brats2024"


def text_of(cluster="gpu", words=(), sweep=(), stages=None, **changes):
    return dry_run(prepare(RECIPE, cluster, load_cluster(cluster, changes), stages, list(words), list(sweep)))


def test_dry_run_for_the_gpu_preset_line_by_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train, evaluate = text_of(nodes=1).split("# job 2: evaluate\n")
    lines = train.splitlines()
    for line in (
        "#SBATCH --job-name=mst_kdnet_brats2024-distill", "#SBATCH --partition=gpu", "#SBATCH --nodes=1", "#SBATCH --ntasks-per-node=4",
        "#SBATCH --gpus-per-node=4", "#SBATCH --cpus-per-task=12", "#SBATCH --mem=0", "#SBATCH --time=1440", "#SBATCH --requeue",
        "#SBATCH --signal=USR2@180", "#SBATCH --open-mode=append", "export NCCL_SOCKET_IFNAME='^lo,docker0'", "export SUBMITIT_EXECUTOR=slurm",
    ):  # fmt: skip
        assert line in lines, line
    (command,) = [line for line in lines if line.startswith("srun --unbuffered")]
    assert "--cpus-per-task=12 --kill-on-bad-exit=1" in command and f"{sys.executable} -u -m submitit.core._submit" in command
    path = next(i for i, line in enumerate(lines) if line.startswith('export PYTHONPATH="$run/code'))
    assert path < lines.index(command) < lines.index("code=$?")
    assert path < lines.index("export PYTHONSAFEPATH=1  # else python -m looks first into the folder that the job was submitted from")
    for line in ("#SBATCH --nodes=1", "#SBATCH --gpus-per-node=1", "#SBATCH --dependency='afterok:<job 1>'", "#SBATCH --kill-on-invalid-dep=yes"):
        assert line in evaluate.splitlines(), line
    assert "dependency" not in train
    assert not list(tmp_path.iterdir())  # nothing was written
    syntax = subprocess.run(["bash", "-n"], input=train, text=True, capture_output=True)
    assert syntax.returncode == 0, syntax.stderr


def test_options_reach_sbatch_as_the_doctor_tries_them():
    given = {"gres_flags": "enforce-binding", "exclusive": False, "hold": True, "gres": "gpu:a100:4"}
    said = [line for line in text_of(nodes=1, mem_gb=1.5, additional=given).splitlines() if line.startswith("#SBATCH")]
    tried = options(load_cluster("gpu", {"nodes": 1, "mem_gb": 1.5, "additional": given}))
    assert tried[-4:] == ["--mem=1536M", "--gres-flags=enforce-binding", "--hold", "--gres=gpu:a100:4"]
    assert {f"#SBATCH {word}" for word in tried} <= set(said) and not any("exclusive" in line for line in said)


def test_a_sweep_is_an_array_whose_members_wait_for_their_own_predecessor():
    train, evaluate = text_of(sweep=["method.tau=4,7,10"], words=["seed=0,1", "train.global_batch=16"]).split("# job 2: evaluate\n")
    assert "#SBATCH --array=0-5%6" in train and "_%a_" in train
    assert "aftercorr:<job 1>" in evaluate


def test_sweep_words():
    axes, rest = sweep_axes(["method.tau=4,7.5"], ["seed=0,1", "data.crop=[32, 32, 32]", "train.steps=5"])
    assert axes == {"method.tau": [4, 7.5], "seed": [0, 1]} and rest == ["data.crop=[32, 32, 32]", "train.steps=5"]
    assert sweep_axes([], ["name=a,b"]) == ({}, ["name=a,b"])
    with pytest.raises(UserError, match="--sweep seed: write it as key=value,value"):
        sweep_axes(["seed"], [])


def test_members_of_a_sweep_have_their_own_names_and_values():
    runs = prepare(RECIPE, "gpu", load_cluster("gpu", {"nodes": 1}), None, [], ["method.tau=4,7", "train.zero_stage=1,2"]).runs
    assert [run.name for run in runs] == [f"{RECIPE}-tau{tau}-zero_stage{z}" for tau in (4, 7) for z in (1, 2)]
    assert [(run.method["tau"], run.train.zero_stage) for run in runs] == [(4, 1), (4, 2), (7, 1), (7, 2)]


@pytest.mark.parametrize(("yaml", "expected"), [
    ("ranks_per_node: 1\ngpus: 8\ncpus_per_task: 1\ntimeout_min: 1\n", "mine.yaml:2: unknown key gpus"),
    ("cpus_per_task: 4\ntimeout_min: 60\n", "give exactly one of gpus_per_node and ranks_per_node"),
    ("cpus_per_task: 4\ntimeout_min: soon\nranks_per_node: 1\n", "mine.yaml:2: timeout_min: Input should be a valid integer"),
    ("ranks_per_node: 1\ncpus_per_task: 4\ntimeout_min: 5\nadditional: {dependency: singleton}\n", "mstkd sets dependency itself; leave it out"),
    ("ranks_per_node: 1\ncpus_per_task: 4\ntimeout_min: 2\n", "signal_delay_s 120 does not fit into timeout_min 2"),
    ("ranks_per_node: 1\ncpus_per_task: 4\ntimeout_min: 5\nnodes: 40\n", "train.global_batch 8 with micro_batch 1 runs on 1, 2, 4 or 8 ranks, not 40"),
])  # fmt: skip
def test_a_wrong_cluster_file_is_one_line(tmp_path, yaml, expected):
    (tmp_path / "mine.yaml").write_text(yaml)
    with pytest.raises(UserError) as error:
        prepare(RECIPE, "mine", load_cluster(str(tmp_path / "mine.yaml")), None, [], [])
    assert expected in str(error.value) and "\n" not in str(error.value)


def test_the_users_own_clusters_come_first(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    own = tmp_path / "mstkd/clusters"
    own.mkdir(parents=True)
    (own / "gpu.yaml").write_text("partition: mine\ngpus_per_node: 1\ncpus_per_task: 1\ntimeout_min: 5\n")
    assert load_cluster("gpu").partition == "mine" and load_cluster("cpu").partition == "cpu"
    with pytest.raises(UserError, match="no such cluster; did you mean 'gpu'"):
        load_cluster("gpus")


def test_a_stage_that_the_method_lacks():
    with pytest.raises(UserError, match="--stages teacher: 'teacher' is no stage of mst_kdnet; its stages: distill, or all"):
        text_of(stages="teacher")


def test_without_sbatch_the_message_says_what_to_do(tmp_path):
    mstkd = Path(sys.executable).parent / "mstkd"
    env = {"PATH": str(tmp_path), "HOME": str(tmp_path)}
    done = subprocess.run([mstkd, "submit", RECIPE, "--cluster", "gpu"], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 2
    assert "sbatch is not on PATH" in done.stderr and "devcluster/up" in done.stderr and "deepspeed --num_gpus" in done.stderr
    assert not (tmp_path / "runs").exists()


class Run:
    """A run folder whose attempts end as told."""

    def __init__(self, folder):
        self.task = Task(str(folder), "train", requeues=3)

    def attempt(self, ending: Ending | None, code=1):
        before = attempts.latest(Path(self.task.run_dir))
        if ending is not None or code is None:
            number = attempts.begin(Path(self.task.run_dir), 2, "17")
            if ending is not None:
                attempts.end(Path(self.task.run_dir), number, ending)
        return judge_training(self.task, code or 137, before, "17")


def test_how_a_job_ends_decides_whether_it_starts_again(tmp_path):
    def verdict(name, *endings):
        run = Run(tmp_path / name)
        return [run.attempt(ending) for ending in endings][-1]

    for ending, requeue, code in (
        (Ending("finished", "all stages trained", "distill", 9), False, 0),
        (Ending("interrupted", "by SIGUSR2", "distill", 9), True, WARNED),
        (Ending("stopped", "by SIGTERM", "distill", 9), False, STOPPED),
        (Ending("bad_input", "no such file", "distill", 9), False, BAD_INPUT),
        (Ending("failed", "RuntimeError: out of memory", "distill", 9), True, 1),
        (Ending("hung", "rank 1 on n2", "distill", 9), True, 1),
    ):
        got = verdict(ending.outcome, ending)
        assert (got.requeue, got.code) == (requeue, code), ending
        assert ending.reason in got.why


def test_the_same_step_crashing_twice_ends_the_run(tmp_path):
    run = Run(tmp_path)
    assert run.attempt(Ending("failed", "boom", "distill", 9)).requeue
    assert run.attempt(Ending("killed", "gone", "distill", 11)).requeue
    last = run.attempt(Ending("failed", "boom", "distill", 11))
    assert not last.requeue and last.code == 1 and last.why == "FAILED: crashed twice at stage distill, step 11: boom"


def test_the_budget_counts_the_starts_asked_for(tmp_path):
    run = Run(tmp_path)
    verdicts = [run.attempt(Ending("interrupted", "by SIGUSR2", "distill", step)) for step in range(4)]
    assert [v.requeue for v in verdicts] == [True, True, True, False]
    assert "all 3 requeues are used" in verdicts[-1].why and verdicts[-1].code == WARNED


def test_a_job_that_dies_without_a_word_is_noted_and_starts_once_more(tmp_path):
    run = Run(tmp_path)
    first = run.attempt(None, code=None)  # it began, and vanished
    assert first.requeue and attempts.read(tmp_path)[-1].ending.outcome == "killed"
    never = Run(tmp_path / "never")
    assert never.attempt(None).requeue  # before training began
    assert never.attempt(None).why.startswith("FAILED: crashed twice at the start")


def test_a_run_that_was_trained_already_is_done(tmp_path):
    attempts.begin(tmp_path, 2, "16")
    got = judge_training(Task(str(tmp_path), "train", requeues=3), 0, 1, "17")
    assert (got.requeue, got.code) == (False, 0) and attempts.latest(tmp_path) == 1


def test_a_preemption_before_training_began_is_no_crash(tmp_path):
    run = Run(tmp_path)
    assert run.attempt(None, code=WARNED).requeue and run.attempt(None, code=WARNED).requeue


def test_an_old_batch_script_leaves_a_newer_start_alone(tmp_path):
    attempts.begin(tmp_path, 2, "17")
    newer = attempts.begin(tmp_path, 2, "17")
    got = judge_training(Task(str(tmp_path), "train", requeues=3), 137, 0, "17")
    assert not got.requeue and "taken over" in got.why
    assert attempts.end(tmp_path, newer, Ending("finished", "all stages trained"))


def test_a_crash_in_an_earlier_submission_does_not_count(tmp_path):
    number = attempts.begin(tmp_path, 2, "16")
    attempts.end(tmp_path, number, Ending("failed", "boom", "distill", 9))
    assert Run(tmp_path).attempt(Ending("failed", "boom", "distill", 9)).requeue


@pytest.mark.parametrize(("step", "requeue"), [(109, False), (131, True)])
def test_the_place_of_a_killed_rank_is_as_old_as_its_last_beat(tmp_path, step, requeue):
    run = Run(tmp_path)
    assert run.attempt(Ending("killed", "gone", "distill", 100)).requeue
    beats = tmp_path / "heartbeats"
    beats.mkdir()
    (beats / "rank-0.json").write_text(json.dumps({"attempt": 2, "stage": "distill", "step": step, "steps_per_s": 2.0}))
    assert run.attempt(None, code=None).requeue is requeue  # ten seconds of two steps each


def test_starts_at_once_have_numbers_of_their_own(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        numbers = list(pool.map(lambda _: attempts.begin(tmp_path, 1, None), range(40)))
    assert sorted(numbers) == list(range(1, 41))


@pytest.mark.parametrize(("verdict", "code", "expected"), [
    ("echo requeue", 0, 140),  # scontrol refuses, all ranks had left in peace
    ("echo requeue", 137, 137),
    ("exit 1", 0, 1),  # no verdict at all
    ("exit 1", 137, 137),
    ("echo 0", 0, 0),
    ("echo 143", 0, 143),
])  # fmt: skip
def test_a_batch_script_never_ends_well_for_an_unfinished_run(tmp_path, verdict, code, expected):
    """Jobs that wait for it would start on a half-trained model."""
    for name, line in (("python", verdict), ("scontrol", "exit 1")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / name).chmod(0o755)
    lines = teardown_lines(load_cluster("cpu", {"python": str(tmp_path / "python")}), tmp_path)
    script = "\n".join(["before=0", f"(exit {code})", *lines])
    done = subprocess.run(["bash", "-c", script], env={"PATH": f"{tmp_path}:/usr/bin:/bin"}, capture_output=True, text=True)
    assert done.returncode == expected, done.stderr


def test_the_first_word_on_an_ending_stays(tmp_path):
    number = attempts.begin(tmp_path, 1, None)
    assert attempts.end(tmp_path, number, Ending("hung", "rank 3"))
    assert not attempts.end(tmp_path, number, Ending("killed", "later"))
    assert attempts.read(tmp_path)[0].ending == Ending("hung", "rank 3")

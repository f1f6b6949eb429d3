"""`mstkd status`, `logs` and `cancel` with real jobs on the two-host cluster."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from status_runs import MSTKD, begin, make_run, make_sweep, mstkd, state_of, submitted

from mstkd.launch.jobs import note_jobs
from mstkd.launch.queue import NoAnswerError, sacct, squeue
from mstkd.launch.status import statuses

pytestmark = pytest.mark.slurm

ATTEMPT = """
import sys, time
from pathlib import Path
from mstkd import attempts
from mstkd.config import WatchdogConfig
from mstkd.engine.environment import resolve_environment, slurm_job
from mstkd.engine.heartbeat import Heartbeat

run_dir = Path(sys.argv[1])
number = attempts.begin(run_dir, 1, slurm_job())
with Heartbeat(run_dir, resolve_environment(), number, WatchdogConfig(heartbeat_s=0.2)) as heartbeat:
    heartbeat.at("step", stage="distill", step=10 * number, total_steps=100, steps_per_s=2.0)
    print("attempt", number, flush=True)
    while not (run_dir / f"go-{number}").is_file():
        time.sleep(0.05)
attempts.end(run_dir, number, attempts.Ending("finished", "all stages trained"))
"""


def sbatch(devcluster, run: Path, *options: str, command: str = "sleep 600", array: bool = False) -> str:
    log = f"{run}/jobs/%{'A_%a' if array else 'j'}_0_log"
    (run / "jobs").mkdir(exist_ok=True)
    words = ["sbatch", "--parsable", "--ntasks=1", "--requeue", "--open-mode=append", f"--output={log}.out", f"--error={log}.err"]
    return devcluster.run(*words, *options, f"--wrap=exec {command}").strip()


def submit_attempt(devcluster, run: Path) -> str:
    script = run / "attempt.py"
    script.write_text(ATTEMPT)
    id = sbatch(devcluster, run, "--export=ALL,OMP_NUM_THREADS=1", command=f"{sys.executable} {script} {run}")
    note_jobs(run, [submitted(id, run)])
    return id


def until(condition, what: str, timeout_s: float = 120):
    deadline = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < deadline, what
        time.sleep(0.1)
    return found


def until_state(run: Path, state: str):
    return until(lambda: next((found for found in statuses([run])[0] if found.state == state), None), f"{run.name} never was {state}")


@pytest.fixture
def runs(tmp_path):
    (tmp_path / "runs").mkdir()
    return tmp_path / "runs"


@pytest.fixture
def scancel_at_end(devcluster):
    ids: list[str] = []
    yield ids.append
    if ids:
        subprocess.run(["scancel", *ids], env=devcluster.env)


def test_a_waiting_job_is_pending_with_slurms_reason_and_can_be_cancelled(devcluster, runs):
    run = make_run(runs, "toy")
    id = sbatch(devcluster, run, "--hold")
    note_jobs(run, [submitted(id, run)])
    (found,), note = statuses([run])
    assert (found.state, found.reason, found.jobs, note) == ("pending", "JobHeldUser", (id,), None)
    done = mstkd("logs", id, runs=runs)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", f"job {id} is PENDING: JobHeldUser\n")
    done = mstkd("cancel", "toy", runs=runs)
    assert done.stdout.splitlines() == [f"toy: job {id} (train distill, PENDING)", "cancelled 1 job"], done.stderr
    devcluster.wait(id, "CANCELLED")
    assert state_of(run) == ("stopped", f"job {id} was cancelled before it began")
    done = mstkd("cancel", "toy", runs=runs)
    assert done.returncode == 0 and "nothing to cancel" in done.stdout


def test_an_attempt_under_slurm_from_its_start_over_a_requeue_to_its_end(devcluster, runs, scancel_at_end):
    run = make_run(runs, "toy")
    id = submit_attempt(devcluster, run)
    scancel_at_end(id)
    (run / "jobs" / "tasks.json").write_text(json.dumps([{"run_dir": str(run), "kind": "train", "requeues": 20}]))
    follow = subprocess.Popen([MSTKD, "logs", "toy", "--follow", "--runs-dir", str(runs)], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert follow.stdout.readline() == b"attempt 1\n"
    found = until(lambda: next((one for one in statuses([run])[0] if one.step == 10), None), "no progress")
    assert (found.state, found.reason, found.jobs) == ("running", "", (id,))
    assert (found.stage, found.total_steps, found.eta_s) == ("distill", 100, 45.0)
    assert found.nodes in ("n1", "n2") and found.requeues == "0/20" and found.attempts == 1
    devcluster.run("scontrol", "requeue", id)
    # SLURM gives no reason at first
    found = until(lambda: next((one for one in statuses([run])[0] if "BeginTime" in one.reason), None), "never waited for its time")
    assert (found.state, found.jobs, found.step, found.eta_s) == ("requeued", (id,), 10, None)
    assert follow.stdout.readline() == b"attempt 2\n"
    found = until(lambda: next((one for one in statuses([run])[0] if one.step == 20), None), "no progress")
    assert (found.state, found.requeues, found.attempts) == ("running", "1/20", 2)
    (run / "go-2").touch()
    out, said = follow.communicate(timeout=60)
    assert follow.returncode == 0 and out == b""
    assert said.decode().splitlines()[-1] == "toy: finished" and f"job {id} is PENDING: BeginTime" in said.decode()
    devcluster.wait(id, "COMPLETED")
    assert state_of(run) == ("finished", "")


def test_a_job_that_is_gone_without_a_word_leaves_a_dead_run(devcluster, runs, scancel_at_end):
    run = make_run(runs, "toy")
    id = submit_attempt(devcluster, run)
    scancel_at_end(id)
    until_state(run, "running")
    until(lambda: (run / "heartbeats" / "rank-0.json").is_file(), "no heartbeat")
    (found,), _ = statuses([run])
    assert found.state == "running" and "training has not begun" not in found.reason
    devcluster.run("scancel", "--signal=KILL", "--full", id)
    devcluster.wait(id, "FAILED", "CANCELLED", "NODE_FAIL")
    state, reason = state_of(run)
    cancelled = f"job {id} was cancelled and its ranks ended without a word; the last checkpoint holds"
    assert (state, reason) in {("dead", f"job {id} is FAILED"), ("stopped", cancelled)}


def test_silent_ranks_of_a_running_job_are_hung(devcluster, runs, scancel_at_end):
    run = make_run(runs, "toy")
    id = sbatch(devcluster, run)
    scancel_at_end(id)
    note_jobs(run, [submitted(id, run)])
    devcluster.wait(id, "RUNNING")
    assert state_of(run) == ("running", "the job is RUNNING; training has not begun")
    begin(run, job=id, world=2, silent=(1,))
    assert state_of(run) == ("hung", f"no sign of life from rank 1 on host1 for 60 min, and job {id} is RUNNING")


def test_cancel_takes_the_whole_chain_or_the_named_job_and_what_waits_for_it(devcluster, runs, scancel_at_end):
    run = make_run(runs, "toy")
    teacher = sbatch(devcluster, run)
    scancel_at_end(teacher)
    later = ["--kill-on-invalid-dep=yes"]
    student = sbatch(devcluster, run, *later, f"--dependency=afterok:{teacher}")
    last = sbatch(devcluster, run, *later, f"--dependency=afterok:{student}")
    chain = [
        submitted(teacher, run, stages=("teacher",)), submitted(student, run, after=teacher, stages=("student",)),
        submitted(last, run, "evaluate", after=student),
    ]  # fmt: skip
    note_jobs(run, chain)
    devcluster.wait(teacher, "RUNNING")
    (found,), _ = statuses([run])
    assert found.jobs == (teacher, student, last) and found.state == "running"
    done = mstkd("cancel", student, runs=runs)
    assert done.stdout.splitlines() == [
        f"toy: job {student} (train student, PENDING), job {last} (evaluate, PENDING)", "cancelled 2 jobs"
    ], done.stderr  # fmt: skip
    devcluster.wait(student, "CANCELLED")
    devcluster.wait(last, "CANCELLED")
    done = mstkd("cancel", "toy", runs=runs)
    assert done.stdout.startswith(f"toy: job {teacher} (train teacher, RUNNING)\ncancelled 1 job; what runs saves and ends")
    devcluster.wait(teacher, "CANCELLED")
    assert state_of(run)[0] == "stopped"


def test_a_failing_stage_is_the_state_of_its_chain(devcluster, runs):
    run = make_run(runs, "toy")
    teacher = sbatch(devcluster, run, command="false")
    student = sbatch(devcluster, run, f"--dependency=afterok:{teacher}", "--kill-on-invalid-dep=yes")
    note_jobs(run, [submitted(teacher, run), submitted(student, run, after=teacher)])
    devcluster.wait(student, "CANCELLED")
    assert state_of(run) == ("failed", f"job {teacher} is FAILED and has not begun training; see mstkd logs {teacher}")


def test_members_of_a_sweep_are_jobs_of_one_array(devcluster, runs, scancel_at_end):
    members = make_sweep(runs)
    array = sbatch(devcluster, members[0], "--hold", "--array=0-2", array=True)
    scancel_at_end(array)
    for member, run in enumerate(members):
        note_jobs(run, [submitted(f"{array}_{member}", run)])
    found, _ = statuses(members)
    assert [(one.state, one.jobs) for one in found] == [("pending", (f"{array}_{member}",)) for member in range(3)]
    assert mstkd("status", array, runs=runs).stdout.count("JobHeldUser") == 3
    assert mstkd("cancel", f"{array}_1", runs=runs).stdout.endswith("cancelled 1 job\n")
    until(lambda: f"{array}_1" not in squeue([array]), "the member was not cancelled")  # SLURM forgets it at once
    assert [one.state for one in statuses(members)[0]] == ["pending", "stopped", "pending"]
    done = mstkd("cancel", "S", runs=runs)
    assert done.stdout.endswith("cancelled 2 jobs\n") and f"S-tau10: job {array}_2" in done.stdout
    expected = [("stopped", f"job {array}_{member} was cancelled before it began") for member in range(3)]
    until(lambda: [(one.state, one.reason) for one in statuses(members)[0]] == expected, "neither queue nor accounting tells the end")


def test_queue_and_accounting_agree_on_jobs_that_are_over(devcluster, runs):
    run = make_run(runs, "toy")
    held = sbatch(devcluster, run, "--hold", "--array=0-1", array=True)
    done = sbatch(devcluster, run, command="true")
    ids = {done, f"{held}_0", f"{held}_1"}
    devcluster.run("scancel", held)
    devcluster.wait(done, "COMPLETED")
    devcluster.wait(held, "CANCELLED")

    def accounted():
        found = {id: job for id, job in sacct(ids).items() if id in ids and not job.live}
        return found if found.keys() == ids else None

    told, queued = until(accounted, "the accounting never told"), squeue(ids)
    assert {id: job.state for id, job in told.items()} == {id: queued[id].state for id in ids}
    assert told[done].nodes == queued[done].nodes != "" and told[f"{held}_0"].nodes == ""


def test_jobs_that_slurm_never_had_and_a_cluster_without_accounting(devcluster, runs, tmp_path, monkeypatch):
    run = make_run(runs, "toy")
    note_jobs(run, [submitted("4000000", run)])
    assert squeue(["4000000"]) == {} and squeue(["4000000", "4000001"]) == {}
    expected = ("unknown", "job 4000000 is not in the queue and has not begun training; see mstkd logs 4000000")
    assert state_of(run) == expected
    only = tmp_path / "bin"
    only.mkdir()
    (only / "squeue").symlink_to(shutil.which("squeue"))
    monkeypatch.setenv("PATH", str(only))
    with pytest.raises(NoAnswerError, match="sacct is not on PATH"):
        sacct(["1"])
    assert state_of(run) == expected


def test_what_a_user_has_set_for_squeue_hides_nothing(devcluster, runs, monkeypatch, scancel_at_end):
    run = make_run(runs, "toy")
    id = sbatch(devcluster, run, "--hold")
    scancel_at_end(id)
    habits = {"SQUEUE_PARTITION": "high", "SQUEUE_USERS": "nobody", "SQUEUE_FORMAT": "%u", "SLURM_TIME_FORMAT": "relative"}
    for name, value in habits.items():
        monkeypatch.setenv(name, value)
    assert squeue([id])[id].waiting

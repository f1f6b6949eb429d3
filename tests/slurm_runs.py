"""What the tests on the two-host cluster share: submitting, waiting for a step, reading what a job said."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from short_runs import losses

from mstkd import attempts

BIN = Path(sys.executable).parent
TESTS = Path(__file__).parent


def submit(devcluster, folder: Path, recipe: str, words, *options, cluster="devcluster", mstkd: Path = BIN / "mstkd") -> list[str]:
    """The ids of the jobs that `mstkd submit` started."""
    done = subprocess.run([mstkd, "submit", recipe, "--cluster", cluster, *options, *words], cwd=folder, env=devcluster.env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [line.split()[1].rstrip(":") for line in done.stdout.splitlines() if line.startswith("submitted")]


def refusal(devcluster, folder: Path, recipe: str, words, *options, cluster="devcluster") -> str:
    """The last line of a submission that is refused; sbatch may have said its own before."""
    done = subprocess.run([BIN / "mstkd", "submit", recipe, "--cluster", cluster, *options, *words], cwd=folder, env=devcluster.env, capture_output=True, text=True)
    assert done.returncode == 2, done.stdout + done.stderr
    return done.stderr.splitlines()[-1]


def reach(run: Path, step: int, timeout_s: float = 600) -> None:
    """Wait until the run has logged `step`, or until its job gave up."""
    deadline = time.monotonic() + timeout_s
    metrics = run / "metrics.jsonl"
    while not (metrics.exists() and max(losses(metrics), default=0) >= step):
        logs = logs_of(run)
        assert time.monotonic() < deadline and "\nFAILED: " not in logs, logs
        time.sleep(0.1)


def completed(devcluster, job: str, run: Path, timeout_s: float = 600) -> None:
    state = devcluster.wait(job, "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", timeout_s=timeout_s)
    if state != "COMPLETED":
        pytest.fail(f"job {job} is {state}\n{logs_of(run)}")


def outlive_repeated_signals(devcluster, job: str) -> None:
    """Holds a requeued job back until the controller has repeated, after 60 s, the signals that a lost node did not answer.

    Elsewhere that is so by itself: a requeued job waits for AuthInfo's cred_expire, 120 s unless it is set, as it is here.
    """
    devcluster.run("scontrol", "update", f"JobId={job}", "StartTime=now+90")


def logs_of(run: Path) -> str:
    return "\n".join(f"== {path.name}\n{path.read_text(errors='replace')}" for path in sorted((run / "jobs").rglob("*log*")))


def endings(run: Path) -> list[str]:
    return [attempt.ending.outcome if attempt.ending else "none" for attempt in attempts.read(run)]


def beats(run: Path) -> list[dict]:
    return [json.loads(path.read_text()) for path in (run / "heartbeats").glob("rank-*.json")]

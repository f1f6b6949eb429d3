"""The two-host SLURM cluster of slurm/devcluster as a fixture: started once, or the running one reused."""

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[1] / "slurm" / "devcluster"
POLL_S = 0.2


class DevCluster:
    """A cluster that is up. `started_here` is false for one that a person had started before the tests."""

    def __init__(self, started_here: bool):
        self.started_here = started_here
        self.folder = Path(os.environ.get("MSTKD_DEVCLUSTER") or "/var/tmp/mstkd-devcluster")
        self.env = {**os.environ, "SLURM_CONF": str(self.folder / "slurm.conf")}

    def run(self, *words: str, **options) -> str:
        """The standard output of a command that sees the cluster, e.g. `run("sbatch", "--parsable", "job.sh")`."""
        done = subprocess.run(words, env=self.env, capture_output=True, text=True, **options)
        assert done.returncode == 0, f"{' '.join(words)} ended with {done.returncode}:\n{done.stdout}{done.stderr}"
        return done.stdout

    def script(self, name: str, *words: str) -> subprocess.CompletedProcess[str]:
        """One of up, down, status, node, on; whatever its exit code."""
        return subprocess.run([SCRIPTS / name, *words], env=self.env, capture_output=True, text=True)

    def on(self, node: str, words: Sequence[str], **options) -> str:
        """The standard output of a command with the network and the host name of `node`."""
        return self.run(str(SCRIPTS / "on"), node, *words, **options)

    def node(self, node: str, action: str) -> None:
        """`action`: cut or join its link, stop or start its slurmd, kill it with all that runs there."""
        self.run(str(SCRIPTS / "node"), node, action)

    def node_state(self, node: str) -> str:
        """As sinfo has it in long form, without marks: idle, allocated, down, ..."""
        return self.run("sinfo", "-h", "-N", "-p", "debug", "-n", node, "-o", "%T").strip().rstrip("*~#!%$@^+-")

    def states(self, job_id: str | int) -> list[str]:
        """One per task of an array; from the controller, and from accounting once the controller forgot the job."""
        queue = subprocess.run(
            ["squeue", "-h", "-r", "-t", "all", "-j", str(job_id), "-o", "%T"], env=self.env, capture_output=True, text=True
        )
        lines = queue.stdout.split() if queue.returncode == 0 else []
        return lines or [line.split()[0] for line in self.run("sacct", "-nXP", "-j", str(job_id), "-o", "state").splitlines() if line]

    def wait(self, job_id: str | int, *states: str, timeout_s: float = 300) -> str:
        """Polls until the job (every task of an array) is in one of `states`; the state of the last task."""
        seen: list[list[str]] = []

        def there() -> bool:
            now = self.states(job_id)
            if not seen or seen[-1] != now:
                seen.append(now)
            return bool(now) and set(now) <= set(states)

        if not poll(there, timeout_s):
            pytest.fail(f"job {job_id} was not {' or '.join(states)} within {timeout_s} s; it went through {seen}")
        return seen[-1][-1]

    def wait_for_node(self, node: str, *states: str, timeout_s: float = 300) -> str:
        """Polls until sinfo has the node in one of `states`, e.g. "down"."""
        if not poll(lambda: self.node_state(node) in states, timeout_s):
            pytest.fail(f"{node} was not {' or '.join(states)} within {timeout_s} s; it is {self.node_state(node)}")
        return self.node_state(node)


def poll(condition: Callable[[], bool], timeout_s: float) -> bool:
    """Whether the condition came true in time."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_S)
    return True


def _reason_against() -> str:
    if os.geteuid() != 0:
        return "the two-host SLURM cluster needs root"
    if not (shutil.which("slurmd") or shutil.which("apt-get")):
        return "no SLURM here, and no apt-get to install it"
    if subprocess.run(["unshare", "--net", "true"], capture_output=True).returncode != 0:
        return "network namespaces are not allowed here"
    return ""


@pytest.fixture(scope="session")
def devcluster() -> Iterator[DevCluster]:
    """Ends the cluster after the tests only if it started it. Without the right to start one it skips, with CI=true it fails."""
    if reason := _reason_against():
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(reason)
    before = subprocess.run([SCRIPTS / "status"], capture_output=True, text=True)
    cluster = DevCluster(started_here="running, process" not in before.stdout)
    up = cluster.script("up")
    assert up.returncode == 0, up.stdout + up.stderr
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", cluster.env["SLURM_CONF"])
        yield cluster
    if cluster.started_here:
        down = cluster.script("down")
        assert down.returncode == 0, down.stdout + down.stderr

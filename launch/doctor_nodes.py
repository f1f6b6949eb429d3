"""`mstkd doctor --nodes N`: one task on each of N nodes looks at the folder of the runs, at mstkd, at the first node and the clock."""

import json
import os
import random
import re
import secrets
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from mstkd.files import existing_folder
from mstkd.launch import doctor_node
from mstkd.launch.cluster import Cluster
from mstkd.launch.doctor_finding import Finding, fail, listed, ok, warn
from mstkd.launch.doctor_slurm import options

WAIT_S = 60  # for free nodes
RUN_S = 120  # for the check itself
APPEAR_S = 60  # NFS may show a new file late
CLOCK_S = 5.0  # what the clocks of two hosts may differ


@dataclass
class Reports:
    facts: list[dict] = field(default_factory=list)
    messages: list[tuple[int | None, str]] = field(default_factory=list)  # what else was said, by rank; None: by srun

    def said_by(self, rank: int, node: str) -> str:
        """The line that says why a node has not answered: its own last one, or srun's about it."""
        own = [text for by, text in self.messages if by == rank]
        return (own or [text for _, text in self.messages if node in text] or ["nothing was said"])[-1]


def findings(cluster: Cluster, nodes: int, runs_dir: Path) -> Iterator[Finding]:
    """One line for each node with a problem, one for all others."""
    place = existing_folder(runs_dir)
    try:
        scratch = tempfile.TemporaryDirectory(prefix=".mstkd-doctor.", dir=place, ignore_cleanup_errors=True)
    except OSError as error:
        yield fail("nodes", f"cannot write to {place} here: {error.strerror}", "choose another folder with --runs-dir")
        return
    with scratch as name:
        folder, token = Path(name), secrets.token_hex(16)
        (folder / "token").write_text(token)
        reports = run(cluster, nodes, folder)
        if not reports.facts:
            why = telling([text for _, text in reports.messages])
            yield fail("nodes", f"no node answered: {why}", "try with fewer nodes, or later; see setup: and python: in the cluster file")
            return
        deadline = time.monotonic() + APPEAR_S
        troubles = {facts["node"]: problems(facts, folder, token, deadline) for facts in reports.facts}
    for rank, node in enumerate(reports.facts[0]["nodes"]):
        if node not in troubles:
            yield fail(f"node {node}", f"did not answer: {reports.said_by(rank, node)}", "see setup: and python: in the cluster file")
    yield from node_findings(troubles, place)


def node_findings(troubles: dict[str, list[Finding]], place: Path) -> Iterator[Finding]:
    from mstkd import __version__

    for node, found in sorted(troubles.items()):
        if found:
            state = "FAIL" if any(trouble.state == "FAIL" for trouble in found) else "WARN"
            yield Finding(state, f"node {node}", "; ".join(t.what for t in found), "; ".join(dict.fromkeys(t.fix for t in found)))
    if good := sorted(node for node, found in troubles.items() if not found):
        yield ok("nodes", f"{listed(good)}: {place} is shared, mstkd {__version__}, the first node is reached, clocks agree")


def run(cluster: Cluster, nodes: int, folder: Path) -> Reports:
    """One task per node under srun; returns what they said, with `arrived` (seconds since 1970, here) added to their facts."""
    from mstkd.engine.environment import PORTS

    modules = [f"module load {module}" for module in cluster.modules]
    script = "\n".join([*modules, *cluster.setup, f'exec {cluster.python_command} -c "$0" "$@"'])
    words = [f"--immediate={WAIT_S}", "--job-name=mstkd-doctor", "--label", "--kill-on-bad-exit=0", f"--ntasks={nodes}"]
    words += [word for word in options(cluster, nodes, 1) if not word.startswith("--time=")]
    words += [f"--time={1 + RUN_S // 60}", *cluster.container_options]
    command = ["srun", *words, "bash", "-c", script, Path(doctor_node.__file__).read_text(), str(folder), str(random.choice(PORTS))]
    environment = {**os.environ, **cluster.environment}
    reports = Reports()
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, text=True, env=environment
    )
    limit = threading.Timer(WAIT_S + RUN_S, process.terminate)  # srun then ends its job
    limit.start()
    try:
        for line in process.stdout:
            rank, text = _unlabelled(line.strip())
            if text.startswith(doctor_node.MARK):
                reports.facts.append(json.loads(text.removeprefix(doctor_node.MARK)) | {"arrived": time.time()})
            elif text:
                reports.messages.append((rank, text))
        process.wait()
    finally:
        limit.cancel()
        process.terminate()
    return reports


def problems(facts: dict, folder: Path, token: str, deadline: float) -> list[Finding]:
    """What is wrong with one node, by its facts and by what it wrote into `folder`."""
    found = (_shared(facts, folder, token, deadline), _same_code(facts), _met(facts), _named(facts), _clock(facts))
    return [trouble for trouble in found if trouble]


def _shared(facts: dict, folder: Path, token: str, deadline: float) -> Finding | None:
    place, advice = folder.parent, "put the runs on a file system that all nodes mount, with --runs-dir and runs_dir=..."
    if facts["token"] is None:
        return fail("", f"{place} there does not hold what was written here ({facts['share_error']})", advice)
    if facts["share_error"]:
        return fail("", f"{place} is not writable there ({facts['share_error']})", advice)
    while time.monotonic() < deadline:
        try:
            if facts["token"] == token == (folder / facts["node"]).read_text():
                return None
        except OSError:
            pass
        time.sleep(0.2)
    return fail("", f"what was written there to {place} is not seen here", advice)


def _same_code(facts: dict) -> Finding | None:
    from mstkd import __version__

    advice = "install this mstkd there, or set python: or setup: in the cluster file"
    if facts["version"] is None:
        return fail("", f"mstkd does not import there ({facts['import_error']})", advice)
    if facts["version"] != __version__:
        return fail("", f"mstkd is {facts['version']} there and {__version__} here", advice)
    return None


def _met(facts: dict) -> Finding | None:
    if not facts.get("meet_error"):
        return None
    return fail("", f"does not reach the first node {facts['first']}: {facts['meet_error']}", "ask about names and firewalls between nodes")


def _named(facts: dict) -> Finding | None:
    own = facts["own_address"]
    if len(facts["nodes"]) == 1 or (own and not own.startswith("127.")):
        return None
    what = f"its own name resolves to {own}" if own else "its own name does not resolve there"
    return warn("", f"{what}, where ranks listen for each other's votes", "set GLOO_SOCKET_IFNAME in environment: of the cluster file")


def _clock(facts: dict) -> Finding | None:
    ahead_s = facts["time"] - facts["arrived"]
    if abs(ahead_s) <= CLOCK_S:
        return None
    side = "ahead of" if ahead_s > 0 else "behind"
    return warn("", f"its clock is {abs(ahead_s):.0f} s {side} this host's", "ask for NTP or chrony there: times in logs will not fit")


def _unlabelled(line: str) -> tuple[int | None, str]:
    """(rank, text) of a line that srun labelled; its own lines have no label."""
    match = re.fullmatch(r"(\d+): ?(.*)", line)
    return (int(match[1]), match[2].strip()) if match else (None, line)


def telling(messages: list[str]) -> str:
    """The line that says why: not srun's closing words about a task's exit code."""
    closing = ("Exited with exit code", "Force Terminated", "Job step aborted", "Terminated")
    lines = [line for line in messages if not any(words in line for words in closing)] or messages
    return lines[-1].removeprefix("srun: ").removeprefix("error: ") if lines else "srun said nothing"

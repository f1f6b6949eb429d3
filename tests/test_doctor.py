"""mstkd doctor: what it reads from machine, SLURM, runs and MLflow, and what it says about it."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import yaml
from mlflow import MlflowClient

from mstkd import __version__, attempts
from mstkd.config import RunConfig, load_config, resolved
from mstkd.errors import UserError
from mstkd.launch import doctor, doctor_files, doctor_nodes, doctor_runs, doctor_slurm
from mstkd.launch.cluster import Cluster
from mstkd.launch.doctor_finding import Answer, Finding, ask, fail, ok, warn
from mstkd.launch.doctor_runs import Measured
from mstkd.launch.queue import Queue, SlurmJob
from mstkd.track.jsonl import JsonlTracker

# `scontrol show config` and `scontrol show partition --oneliner` of SLURM 22.05.8, less most lines
CONFIG = """\
Configuration data as of 2026-11-21T10:46:11
AccountingStorageType   = accounting_storage/slurmdbd
AuthInfo                = socket=/run/munge/munge.socket,cred_expire=15
ClusterName             = mstkd
JobRequeue              = 1
KillOnBadExit           = 0
KillWait                = 15 sec
MaxArraySize            = 1001
PowerPlugin             = 
PreemptMode             = REQUEUE
PreemptType             = preempt/partition_prio
PreemptExemptTime       = 00:00:00
SlurmctldHost[0]        = head(10.0.0.1)
SlurmctldParameters     = preempt_send_user_signal
SLURM_VERSION           = 22.05.8

Slurmctld(primary) at head is UP
"""  # noqa: W291
PARTITIONS = """\
PartitionName=debug AllowGroups=ALL AllowAccounts=ALL AllowQos=ALL AllocNodes=ALL Default=YES QoS=N/A DefaultTime=NONE DisableRootJobs=NO \
ExclusiveUser=NO GraceTime=30 Hidden=NO MaxNodes=UNLIMITED MaxTime=1-00:00:00 MinNodes=0 LLN=NO MaxCPUsPerNode=UNLIMITED Nodes=n[1-2] \
PreemptMode=REQUEUE State=UP TotalCPUs=4 TotalNodes=2 JobDefaults=(null) TRES=cpu=4,mem=48210M,node=2,billing=4
PartitionName=high AllowGroups=ALL Default=NO DefaultTime=01:00:00 GraceTime=0 MaxTime=UNLIMITED Nodes=n[1-2] PreemptMode=OFF State=UP \
TotalCPUs=4 TotalNodes=2 TRES=cpu=4,mem=48210M,node=2,billing=4
"""


@pytest.fixture
def config(tmp_path) -> RunConfig:
    config = load_config("mst_kdnet_phantom", [f"runs_dir={tmp_path / 'runs'}", "watchdog.heartbeat_s=2"])
    config.run_dir.mkdir(parents=True)
    (config.run_dir / "config.yaml").write_text(yaml.safe_dump(resolved(config)))
    return config


def cluster(**changes) -> Cluster:
    return Cluster(**{"partition": "debug", "ranks_per_node": 1, "cpus_per_task": 1, "timeout_min": 60, "nodes": 2, **changes})


def states(findings) -> list[str]:
    return [finding.state for finding in findings]


# the machine


def test_a_line_says_state_thing_finding_and_fix():
    assert str(warn("disk", "almost full", "make room")) == "WARN disk            almost full; make room"
    assert str(ok("git", "/usr/bin/git")) == "OK   git             /usr/bin/git"


def test_everything_is_looked_at_in_one_go(tmp_path):
    found = list(doctor.findings(tmp_path))
    things = {finding.thing for finding in found}
    assert {"python", "torch", "accelerator", "backend", "bf16", "g++", "git", "disk", "torch cache", "own address", "ports", "mlflow"} <= things
    assert all(finding.fix for finding in found if finding.state != "OK")
    assert all("\n" not in str(finding) for finding in found)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("words", "parts"), [({"cluster": "nope"}, ("nope",)), ({"nodes": 2}, ("--nodes", "--cluster"))])
def test_bad_input_is_said_before_anything_is_looked_at(words, parts):
    with pytest.raises(UserError) as error:
        next(doctor.findings(**words))
    assert all(part in str(error.value) for part in parts)


def test_a_program_that_is_absent_fails_or_hangs_is_an_answer_too():
    assert ask("no-such-program").message == "no-such-program: No such file or directory"
    assert ask("sh", "-c", "echo one; echo two >&2; exit 3").message == "two"
    assert ask("sleep", "60", limit_s=0.1) == Answer(None, "", "sleep gives no answer within 0.1 s")


@pytest.mark.parametrize(("interface", "state"), [("lo", "OK"), ("no-such-interface", "FAIL")])
def test_the_interface_chosen_for_gloo_must_exist(interface, state, monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", interface)
    finding = next(doctor.network())
    assert finding.state == state and interface in finding.what


def test_the_host_name_is_judged_by_what_it_resolves_to(monkeypatch):
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    finding = next(doctor.network())
    try:
        loopback = socket.gethostbyname(socket.gethostname()).startswith("127.")
    except OSError:
        loopback = True
    assert finding.state == ("WARN" if loopback else "OK")
    assert ("GLOO_SOCKET_IFNAME=" in finding.fix and "/etc/hosts" in finding.fix) == loopback


# files


def mounts(folder: Path) -> Path:
    path = folder / "mounts"
    shared = f"{folder}/a shared folder".replace(" ", "\\040")
    path.write_text(f"/dev/sda1 / ext4 rw,relatime 0 0\nserver:/x {shared} nfs4 rw,vers=4.2 0 0\ntmpfs {shared}/fast tmpfs rw 0 0\n")
    (folder / "a shared folder" / "fast").mkdir(parents=True)
    return path


def test_the_innermost_mount_says_what_file_system_it_is(tmp_path):
    table, shared = mounts(tmp_path), tmp_path / "a shared folder"
    kinds = [doctor_files.file_system(path, table) for path in (tmp_path, shared, shared / "x" / "y", shared / "fast")]
    assert kinds == ["ext4", "nfs4", "nfs4", "tmpfs"]
    assert doctor_files.file_system(Path("/proc")) == "proc"


def test_a_code_cache_on_a_network_file_system_is_a_warning(tmp_path, monkeypatch):
    table, shared = mounts(tmp_path), tmp_path / "a shared folder"
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(shared / "cache"))
    finding = doctor_files.cache("torch cache", "TORCH_EXTENSIONS_DIR", table)
    assert finding.state == "WARN" and "nfs4" in finding.what and "unset TORCH_EXTENSIONS_DIR" in finding.fix
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(shared / "fast"))
    assert doctor_files.cache("torch cache", "TORCH_EXTENSIONS_DIR", table).state == "OK"
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR")
    monkeypatch.setattr("tempfile.tempdir", str(shared))
    assert "TMPDIR" in doctor_files.cache("torch cache", "TORCH_EXTENSIONS_DIR", table).fix


@pytest.mark.parametrize(("gib", "state"), [(0.001, "OK"), (5 * 1024, "FAIL")])
def test_the_disk_must_hold_another_checkpoint_like_the_newest(config, gib, state):
    folder = config.run_dir / "student" / "checkpoints" / "step-00000100"
    folder.mkdir(parents=True)
    (folder / "state.json").write_text("{}")
    with (folder / "weights").open("wb") as file:
        file.truncate(round(gib * 1024**3))  # takes no room
    finding = doctor_files.disk(Path(config.runs_dir))
    assert finding.state == state and config.name in finding.what and f"{config.checkpoint.keep + 2} checkpoints" in finding.what


def test_a_folder_that_is_yet_to_be_made_is_judged_by_the_one_above(tmp_path):
    finding = doctor_files.disk(tmp_path / "not" / "yet")
    assert str(tmp_path) in finding.what and not (tmp_path / "not").exists()


# SLURM, on what it printed


def test_the_configuration_is_read_by_key():
    config = doctor_slurm.parse_config(CONFIG)
    assert config["KillWait"] == "15 sec" and config["AuthInfo"].endswith("cred_expire=15") and config["SLURM_VERSION"] == "22.05.8"
    partitions = doctor_slurm.parse_partitions(PARTITIONS)
    assert set(partitions) == {"debug", "high"} and partitions["debug"]["TRES"] == "cpu=4,mem=48210M,node=2,billing=4"


@pytest.mark.parametrize(
    ("text", "minutes"), [("1-00:00:00", 1440), ("7-12:30:00", 10830), ("01:00:30", 60.5), ("UNLIMITED", None), ("NONE", None)]
)
def test_times_are_read_as_slurm_writes_them(text, minutes):
    assert doctor_slurm.minutes(text) == minutes


@pytest.mark.parametrize(("names", "chosen"), [(None, "debug"), ("high", "high"), ("high,debug", "high"), ("nope", None)])
def test_a_job_goes_to_the_named_partition_or_the_default(names, chosen):
    found = doctor_slurm.chosen(doctor_slurm.parse_partitions(PARTITIONS), names)
    assert (found or {}).get("PartitionName") == chosen


@pytest.mark.parametrize(
    ("changes", "partition", "state", "part"),
    [
        ({}, {"PreemptMode": "REQUEUE", "GraceTime": "30"}, "OK", "USR2 comes 30 s"),
        ({}, {"PreemptMode": "REQUEUE", "GraceTime": "0"}, "WARN", "SIGTERM"),
        ({}, {"PreemptMode": "OFF"}, "OK", "not preempted"),
        ({"PreemptType": "preempt/none"}, None, "OK", "not preempted"),
        ({"SlurmctldParameters": "(null)"}, {"PreemptMode": "REQUEUE", "GraceTime": "30"}, "WARN", "then SLURM requeues"),
        ({"SlurmctldParameters": "(null)"}, {"PreemptMode": "CANCEL", "GraceTime": "0"}, "WARN", "for good"),
        ({"PreemptMode": "GANG,SUSPEND"}, None, "WARN", "suspended"),
    ],
)
def test_what_preemption_does_to_a_job(changes, partition, state, part):
    finding = doctor_slurm.preemption(doctor_slurm.parse_config(CONFIG) | changes, partition)
    assert finding.state == state and part in finding.what
    assert ("preempt_send_user_signal" in finding.fix) == (state == "WARN" and "suspended" not in finding.what)


def test_a_site_without_accounting_or_arrays_is_told_what_that_means():
    assert "squeue and heartbeats" in doctor_slurm.accounting({"AccountingStorageType": "accounting_storage/none"}).fix
    assert doctor_slurm.arrays({"MaxArraySize": "1001"}) == ok("arrays", "a sweep may have up to 1001 runs")
    assert doctor_slurm.arrays({"MaxArraySize": "0"}).state == "WARN"


def test_the_resources_become_options_of_sbatch_and_srun():
    wanted = cluster(account="lab", mem_gb=1.5, additional={"exclusive": True, "hold": False, "gres": "gpu:a100:4"})
    assert doctor_slurm.options(wanted) == [
        "--partition=debug", "--account=lab", "--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1", "--time=60", "--mem=1536M",
        "--exclusive", "--gres=gpu:a100:4",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("known", "allowed_s", "state", "part"),
    [
        (None, 30, "OK", "no run here yet"),
        (Measured("a", 1.0, 4.0), 30, "OK", "twice both 10 s"),
        (Measured("a", 10.0, 14.0), 30, "WARN", "twice both 48 s: too long"),
        (Measured("a", 1.0, None), 30, "OK", "saves were not timed"),
        (Measured("a", 20.0, None), 30, "WARN", "is short"),
    ],
)
def test_a_step_and_a_save_must_fit_between_signal_and_end(known, allowed_s, state, part):
    finding = doctor_slurm.fits("KillWait", f"KillWait {allowed_s} s", allowed_s, known, "do something")
    assert finding.state == state and part in finding.what and bool(finding.fix) == (state == "WARN")


def test_the_times_are_the_slowest_of_the_newest_run(config):
    assert doctor_runs.measured(Path(config.runs_dir)) is None
    tracker = JsonlTracker(config.run_dir / "metrics.jsonl", attempt=1)
    for step, (rate, save) in enumerate([(0.01, 99.0), *[(2.0, 3.0)] * 19, (0.5, 1.0)], start=1):
        tracker.log_metrics({"time/steps_per_s": rate, "time/save_s": save}, step, "student")
        tracker.log_metrics({"val/score": 0.5}, step, "student")
    assert doctor_runs.measured(Path(config.runs_dir)) == Measured(config.name, 2.0, 3.0)


# the nodes' reports

FACTS = {
    "node": "n2", "rank": 1, "nodes": ["n1", "n2"], "own_address": "10.0.0.2", "token": "t", "share_error": None, "version": __version__,
    "import_error": None, "first": "n1", "first_address": "10.0.0.1", "meet_error": None, "time": 100.0, "arrived": 100.2,
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "state", "part"),
    [
        ({}, None, ""),
        ({"token": None, "share_error": "No such file or directory"}, "FAIL", "does not hold what was written here"),
        ({"share_error": "Read-only file system"}, "FAIL", "not writable there"),
        ({"token": "other"}, "FAIL", "not seen here"),
        ({"version": None, "import_error": "ModuleNotFoundError: No module named 'mstkd'"}, "FAIL", "No module named"),
        ({"version": "0.0.1"}, "FAIL", f"0.0.1 there and {__version__} here"),
        ({"meet_error": "its name does not resolve"}, "FAIL", "does not reach the first node n1"),
        ({"own_address": "127.0.1.1"}, "WARN", "127.0.1.1"),
        ({"own_address": None}, "WARN", "does not resolve"),
        ({"time": 190.0}, "WARN", "90 s ahead of"),
        ({"time": 10.0}, "WARN", "90 s behind"),
    ],
)
def test_what_a_node_reports_becomes_a_finding(changes, state, part, tmp_path):
    (tmp_path / "n2").write_text("t")
    deadline = time.monotonic() + (0.5 if "token" in changes else 60)
    found = doctor_nodes.problems(FACTS | changes, tmp_path, "t", deadline)
    assert states(found) == ([state] if state else [])
    assert all(part in finding.what and finding.fix for finding in found)


def test_a_node_has_one_line_whatever_its_problems():
    troubles = {"n1": [], "n2": [warn("", "late", "fix a"), fail("", "gone", "fix b"), fail("", "away", "fix b")], "n3": []}
    bad, good = doctor_nodes.node_findings(troubles, Path("runs"))
    assert bad == Finding("FAIL", "node n2", "late; gone; away", "fix a; fix b")
    assert good.state == "OK" and good.what.startswith("n1, n3: ")


# MLflow

KILLED_RUN = """
import os, signal, sys, torch
from pathlib import Path
from mstkd import attempts
from mstkd.engine.environment import Ranks
from mstkd.engine.heartbeat import Heartbeat
from mstkd.run_folder import read_run_config
from mstkd.track import open_trackers

config = read_run_config(Path(sys.argv[1]))
number = attempts.begin(config.run_dir, 1, sys.argv[2] if len(sys.argv) > 2 else None)
tracker = open_trackers(config, config.run_dir, attempt=number, tags={}, dataset={"name": "phantom", "digest": "0" * 64})
with tracker, Heartbeat(config.run_dir, Ranks(0, 1, 0, torch.device("cpu")), number, config.watchdog):
    tracker.child("student", start_step=0)
    tracker.child("evaluation")
    (config.run_dir / "student" / "checkpoints").mkdir(parents=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def kill_a_run(config: RunConfig, *job: str) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED_RUN, str(config.run_dir), *job], capture_output=True, text=True, timeout=300)
    assert done.returncode == -signal.SIGKILL, done.stderr


def grow_old(config: RunConfig, seconds: float) -> float:
    """Set the last sign of life back; returns when it is now."""
    then = time.time() - seconds
    for path in [*(config.run_dir / "attempts").iterdir(), *(config.run_dir / "heartbeats").iterdir()]:
        os.utime(path, (then, then))
    return then


def mlflow_runs(config: RunConfig) -> dict:
    client = MlflowClient(f"sqlite:///{config.runs_dir}/mlflow.db")
    ids = json.loads((config.run_dir / "mlflow.json").read_text())
    return {part: client.get_run(run_id).info for part, run_id in {"": ids["run_id"], **ids["children"]}.items()}


def mlflow_status(config: RunConfig) -> dict[str, str]:
    return {part: info.status for part, info in mlflow_runs(config).items()}


def run_findings(config: RunConfig, fix: bool = False) -> list[Finding]:
    return [finding for finding in doctor_runs.findings(Path(config.runs_dir), fix) if finding.thing == "mlflow run"]


def test_a_run_that_was_killed_is_named_and_closed(config):
    kill_a_run(config)
    assert run_findings(config) == []  # it may be alive: its last heartbeat is fresh
    then = grow_old(config, 600)
    (finding,) = run_findings(config)
    assert finding.state == "WARN" and "no sign of life for 10 min" in finding.what and "(the run itself, student)" in finding.what
    assert finding.fix == "mstkd doctor --fix sets it to KILLED"
    assert set(mlflow_status(config).values()) == {"RUNNING"}
    (finding,) = run_findings(config, fix=True)
    assert finding.state == "OK" and finding.what.endswith("now KILLED")
    # somebody may be evaluating: that part gives no sign of life
    assert mlflow_status(config) == {"": "KILLED", "student": "KILLED", "evaluation": "RUNNING"}
    ended = mlflow_runs(config)["student"]
    assert ended.end_time >= max(ended.start_time, round(1000 * then) - 1)
    assert run_findings(config) == []


@pytest.mark.parametrize(("outcome", "status"), [("failed", "FAILED"), ("hung", "FAILED"), ("interrupted", "KILLED"), ("finished", "FINISHED")])
def test_an_attempt_that_said_how_it_ended_is_closed_so(config, outcome, status):
    attempts.begin(config.run_dir, 1, None)
    attempts.end(config.run_dir, 1, attempts.Ending(outcome, "a reason"))
    end = doctor_runs.ending(config.run_dir, config, Queue(), time.time())
    assert end.status == status and outcome in end.why


@pytest.mark.parametrize(
    ("queue", "dead"),
    [
        (Queue({"7_1": SlurmJob("7_1", "PENDING")}, answered=True), False),
        (Queue({"7_1": SlurmJob("7_1", "FAILED")}, answered=True), True),
        (Queue({}, answered=True), True),
        (Queue(note="no answer"), False),
    ],
)
def test_a_run_with_a_job_is_dead_only_if_slurm_says_so(config, queue, dead):
    attempts.begin(config.run_dir, 1, "7_1")
    end = doctor_runs.ending(config.run_dir, config, queue, time.time() + 3600)
    assert (end is not None) == dead


def test_an_evaluation_counts_as_dead_after_a_day(config):
    from mstkd.track.reconcile import OpenRun

    now = time.time()
    assert not doctor_runs._gone(config.run_dir, OpenRun("1", "evaluation", now - 3600), now)
    assert doctor_runs._gone(config.run_dir, OpenRun("1", "evaluation", now - 25 * 3600), now)


def test_a_run_whose_data_base_is_gone_makes_no_new_one(config):
    attempts.begin(config.run_dir, 1, None)
    attempts.end(config.run_dir, 1, attempts.Ending("failed", "a reason"))
    (config.run_dir / "mlflow.json").write_text('{"run_id": "abc", "children": {}}')
    assert run_findings(config, fix=True) == []
    assert not (Path(config.runs_dir) / "mlflow.db").exists()


class Health(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/health" else 401)
        self.end_headers()

    def log_message(self, *_words):
        pass


def test_a_tracking_server_is_asked_whether_it_lives():
    with HTTPServer(("127.0.0.1", 0), Health) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        uri = f"http://127.0.0.1:{server.server_port}"
        there, refused = doctor_runs._given_store(f"{uri}/"), doctor_runs._given_store(f"{uri}/prefix")
        server.shutdown()
        thread.join()
    assert there == ok("mlflow", f"{uri}/ answers")
    assert refused.state == "WARN" and "401" in refused.what
    gone = doctor_runs._given_store(uri)
    assert gone.state == "WARN" and "refused" in gone.what and "metrics.jsonl" in gone.fix


def test_a_data_base_that_cannot_be_read_is_a_failure(tmp_path):
    (tmp_path / "mlflow.db").write_text("this is no data base, whatever its name says" * 100)
    first = next(doctor_runs.findings(tmp_path, fix=False))
    assert first.state == "FAIL" and "mlflow.db" in first.what


# a real cluster


@pytest.mark.slurm
def test_a_cluster_that_works_is_found_to_work(devcluster, tmp_path):
    found = {finding.thing: finding for finding in doctor_slurm.findings(cluster(signal_delay_s=30), tmp_path)}
    assert {thing for thing, finding in found.items() if finding.state != "OK"} == set()
    assert set(found) == {
        "slurmctld", "slurm", "requeue", "preemption", "accounting", "arrays", "time limit", "partition", "node names", "request",
        "signal delay", "KillWait",
    }  # fmt: skip


@pytest.mark.slurm
@pytest.mark.parametrize(
    ("changes", "thing", "part"),
    [({"partition": "nope"}, "partition", "debug, high"), ({"constraint": "nope"}, "request", "Invalid feature specification")],
)
def test_what_slurm_does_not_have_is_named(devcluster, tmp_path, changes, thing, part):
    bad = next(f for f in doctor_slurm.findings(cluster(**changes), tmp_path) if f.state == "FAIL")
    assert bad.thing == thing and part in str(bad)


@pytest.mark.slurm
def test_a_controller_that_does_not_answer_ends_the_questions(devcluster, tmp_path, monkeypatch):
    silent = tmp_path / "slurm.conf"
    lines = Path(devcluster.env["SLURM_CONF"]).read_text().splitlines()
    silent.write_text("\n".join("SlurmctldPort=1" if line.startswith("SlurmctldPort=") else line for line in lines) + "\n")
    monkeypatch.setenv("SLURM_CONF", str(silent))
    (wanted,) = doctor_slurm.findings(cluster(), tmp_path)
    (unasked,) = doctor_slurm.findings(None, tmp_path)
    assert (wanted.state, unasked.state) == ("FAIL", "WARN") and wanted.thing == "slurmctld" and "SLURM_CONF" in wanted.fix


@pytest.mark.slurm
def test_every_node_is_asked(devcluster, tmp_path):
    (good,) = doctor_nodes.findings(cluster(), 2, tmp_path / "runs")
    assert good.state == "OK" and good.what.startswith(f"n1, n2: {tmp_path} is shared, mstkd {__version__}")
    assert not list(tmp_path.iterdir())


@pytest.mark.slurm
@pytest.mark.parametrize(
    ("only_on_n2", "part"),
    [
        ('exec unshare --mount bash -c "mount -t tmpfs none {runs}; exec {python} -c \\"\\$0\\" \\"\\$@\\"" "$0" "$@"', "does not hold what was"),
        ('exec {python} -I -S -c "$0" "$@"', "No module named"),
        ("echo the licence server is away; exit 3", "the licence server is away"),
    ],
    ids=["folder not shared", "without mstkd", "set-up fails"],
)
def test_a_node_with_a_problem_has_its_line(devcluster, tmp_path, only_on_n2, part):
    line = only_on_n2.format(runs=tmp_path, python=sys.executable)
    bad, good = doctor_nodes.findings(cluster(setup=[f"if [ $SLURMD_NODENAME = n2 ]; then {line}; fi"]), 2, tmp_path)
    assert bad.state == "FAIL" and bad.thing == "node n2" and part in bad.what
    assert good.state == "OK" and good.what.startswith("n1: ")


@pytest.mark.slurm
def test_without_a_node_srun_says_why(devcluster, tmp_path):
    (none,) = doctor_nodes.findings(cluster(constraint="nope"), 2, tmp_path)
    assert none.state == "FAIL" and "Invalid feature specification" in none.what

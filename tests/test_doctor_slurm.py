"""mstkd doctor on a cluster: what it reads from SLURM and from the nodes, and what it says about it."""

import sys
import time
from pathlib import Path

import pytest

from mstkd import __version__
from mstkd.launch import doctor_nodes, doctor_slurm
from mstkd.launch.cluster import Cluster
from mstkd.launch.doctor_finding import Finding, fail, ok, warn
from mstkd.launch.doctor_runs import Measured

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


def cluster(**changes) -> Cluster:
    return Cluster(**{"partition": "debug", "ranks_per_node": 1, "cpus_per_task": 1, "timeout_min": 60, "nodes": 2, **changes})


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
    assert [finding.state for finding in found] == ([state] if state else [])
    assert all(part in finding.what and finding.fix for finding in found)


def test_a_node_has_one_line_whatever_its_problems():
    troubles = {"n1": [], "n2": [warn("", "late", "fix a"), fail("", "gone", "fix b"), fail("", "away", "fix b")], "n3": []}
    bad, good = doctor_nodes.node_findings(troubles, Path("runs"))
    assert bad == Finding("FAIL", "node n2", "late; gone; away", "fix a; fix b")
    assert good.state == "OK" and good.what.startswith("n1, n3: ")


# a real cluster

ARGUMENTS = '"$0" "$@"'
ON_NODE = f"{{python}} -c {ARGUMENTS}"  # what follows the set-up lines


@pytest.mark.slurm
def test_a_cluster_that_works_is_found_to_work(devcluster, tmp_path):
    found = {finding.thing: finding for finding in doctor_slurm.findings(cluster(signal_delay_s=30), tmp_path)}
    assert {thing for thing, finding in found.items() if finding.state != "OK"} == set()
    assert found["request"].what == "a job would get 2 processors on nodes n[1-2] in partition debug"
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
        (f"exec unshare --mount bash -c 'mount -t tmpfs none {{runs}}; exec {ON_NODE}' {ARGUMENTS}", "not hold what was written"),
        (f"exec {ON_NODE.replace('-c', '-I -S -c')}", "No module named"),
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

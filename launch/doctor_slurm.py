"""The doctor's look at SLURM: what its controller answers about requeueing, preemption, accounting, limits and partitions.

scontrol's text is parsed, not its JSON, which not every site builds.
"""

import re
import shutil
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mstkd.launch.cluster import Cluster
from mstkd.launch.doctor_finding import Finding, ask, fail, listed, ok, warn
from mstkd.launch.doctor_runs import Measured, measured

MARGIN = 2  # a measured time is not the worst: a shared file system is slower when every node saves at once
MOST_NAMES = 16  # node names looked up, spread over the partition
USABLE = ("idle", "mix", "alloc", "comp", "plan", "resv", "reserved")


def findings(cluster: Cluster | None, runs_dir: Path) -> Iterator[Finding]:
    """All about SLURM; a single line where it is absent or silent, which is a FAIL only if `cluster` was asked for."""
    bad = fail if cluster else warn
    if shutil.which("sbatch") is None:
        advice = "mstkd train and deepspeed work; to submit, log in to the cluster, or start one with slurm/devcluster/up"
        yield bad("sbatch", "no SLURM on this machine", advice)
        return
    ping = ask("scontrol", "ping")
    if "is UP" not in ping.out:
        advice = "check SLURM_CONF and /etc/slurm/slurm.conf, or ask whether the controller is down"
        yield bad("slurmctld", f"no answer: {ping.message}", advice)
        return
    yield ok("slurmctld", ping.out.strip().splitlines()[0])
    config = parse_config(ask("scontrol", "show", "config").out)
    partitions = parse_partitions(ask("scontrol", "show", "partition", "--oneliner").out)
    partition = chosen(partitions, cluster.partition if cluster else None)
    yield ok("slurm", f"{config.get('SLURM_VERSION', 'unknown version')}, cluster {config.get('ClusterName')}")
    yield requeue(config)
    yield preemption(config, partition)
    yield accounting(config)
    yield arrays(config)
    yield from partition_findings(partitions, partition, cluster)
    if cluster is not None:
        yield request(cluster)
    yield from time_findings(config, cluster, measured(runs_dir))


def parse_config(text: str) -> dict[str, str]:
    """`scontrol show config` by key."""
    pairs = (line.split(" = ", 1) for line in text.splitlines() if " = " in line)
    return {key.strip(): value.strip() for key, value in pairs}


def parse_partitions(text: str) -> dict[str, dict[str, str]]:
    """`scontrol show partition --oneliner` by partition and key."""
    found = (dict(word.split("=", 1) for word in line.split() if "=" in word) for line in text.splitlines() if line.strip())
    return {partition["PartitionName"]: partition for partition in found if "PartitionName" in partition}


def minutes(text: str) -> float | None:
    """SLURM's [days-]hours:minutes:seconds in minutes; None where nothing limits."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+):(\d+):(\d+)", text)
    if match is None:
        return None
    days, hours, mins, seconds = (int(part or 0) for part in match.groups())
    return 1440 * days + 60 * hours + mins + seconds / 60


def seconds(text: str) -> int:
    """The number in "30 sec"."""
    return int(text.split()[0])


def chosen(partitions: dict[str, dict[str, str]], names: str | None) -> dict[str, str] | None:
    """The partition that a job would go to: of a list the first, without one the default."""
    if names is not None:
        return next((partitions[name] for name in names.split(",") if name in partitions), None)
    return next((partition for partition in partitions.values() if partition.get("Default") == "YES"), None)


def requeue(config: dict[str, str]) -> Finding:
    if config.get("JobRequeue") == "1":
        return ok("requeue", "JobRequeue=1: jobs may be requeued")
    return ok("requeue", "JobRequeue=0: only jobs that ask for it, as those of mstkd submit and slurm/train.sbatch do (--requeue)")


def preemption(config: dict[str, str], partition: dict[str, str] | None) -> Finding:
    """What happens to a job that has to make room, and whether it is told before."""
    mode = (partition or {}).get("PreemptMode") or config.get("PreemptMode", "OFF")
    if config.get("PreemptType", "preempt/none") == "preempt/none" or mode == "OFF":
        return ok("preemption", "jobs are not preempted here")
    grace, told = int((partition or {}).get("GraceTime", 0)), "preempt_send_user_signal" in config.get("SlurmctldParameters", "")
    if "SUSPEND" in mode:
        advice = "set watchdog.hang_min above the longest pause, or a run ends as hung"
        return warn("preemption", f"PreemptMode={mode}: jobs are suspended", advice)
    if told and grace:
        return ok("preemption", f"PreemptMode={mode}: USR2 comes {grace} s before the end, and the run saves")
    signal = "SIGTERM" if told or not grace else f"SIGTERM, {grace} s before the end,"
    advice = "ask for SlurmctldParameters=preempt_send_user_signal and a GraceTime of the partition; lower checkpoint.every_min"
    if "CANCEL" in mode:
        return warn("preemption", f"PreemptMode={mode}: {signal} ends a job for good; submit it again by hand", advice)
    # SLURM requeues by itself, and the run saves on SIGTERM if that fits into KillWait
    return warn("preemption", f"PreemptMode={mode}: jobs get {signal} and not USR2, then SLURM requeues them", advice)


def accounting(config: dict[str, str]) -> Finding:
    without = "mstkd status then reads squeue and heartbeats, and knows less of jobs that have ended"
    if config.get("AccountingStorageType", "accounting_storage/none").endswith("/none"):
        return warn("accounting", "SLURM keeps none", without)
    # the limit on the period keeps this cheap on a busy site
    answer = ask("sacct", "--noheader", "--allocations", "--parsable2", "--format=jobid", "--starttime=now-1hour")
    if not answer.ok:
        return warn("accounting", f"sacct fails: {answer.message}", f"ask whether slurmdbd is down; {without}")
    return ok("accounting", "sacct answers")


def arrays(config: dict[str, str]) -> Finding:
    most = int(config.get("MaxArraySize", "0"))
    if most < 2:
        return warn("arrays", f"MaxArraySize={most}: no job arrays here", "mstkd submit --sweep needs them: submit the runs one by one")
    return ok("arrays", f"a sweep may have up to {most} runs")


def partition_findings(
    partitions: dict[str, dict[str, str]], partition: dict[str, str] | None, cluster: Cluster | None
) -> Iterator[Finding]:
    """Whether the partition exists, is open, has the nodes and the time; whether their names resolve here."""
    wanted = cluster.partition.split(",") if cluster and cluster.partition else []
    if unknown := [name for name in wanted if name not in partitions]:
        advice = f"set partition: in the cluster file to one of {listed(sorted(partitions))}"
        yield fail("partition", f"no partition {unknown[0]} here", advice)
        return
    if partition is None:
        bad = fail if cluster else warn
        yield bad("partition", "this SLURM has no default partition", f"name one of {listed(sorted(partitions))} in the cluster file")
        return
    name = partition["PartitionName"]
    if partition.get("State") != "UP":
        yield warn("partition", f"{name} is {partition.get('State')}: jobs wait in the queue", "ask when it opens, or choose another")
    most, usual = partition.get("MaxTime", "UNLIMITED"), partition.get("DefaultTime", "NONE")
    limit = minutes(most)
    if cluster and limit is not None and cluster.timeout_min > limit:
        told = f"timeout_min {cluster.timeout_min} is over {name}'s MaxTime {most}"
        yield fail("time limit", told, f"set timeout_min: to {limit:.0f} or less")
    else:
        asked = f"; timeout_min {cluster.timeout_min} fits" if cluster else ""
        yield ok("time limit", f"{name}: at most {most}, without a request {most if usual == 'NONE' else usual}{asked}")
    yield from nodes_of(name, cluster)


def nodes_of(partition: str, cluster: Cluster | None) -> Iterator[Finding]:
    answer = ask("sinfo", "--noheader", "--Node", f"--partition={partition}", "--format=%N|%t")
    states = dict(line.split("|") for line in answer.out.split())
    usable = [node for node, state in states.items() if state.startswith(USABLE) and not state.endswith("*")]
    told = f"{partition}: {len(usable)} of {len(states)} nodes are usable"
    if cluster and cluster.nodes > len(usable):
        told = f"{told}, and the cluster file asks for {cluster.nodes}"
        yield warn("partition", told, "lower nodes:, or see sinfo -R for why nodes are out")
    else:
        yield ok("partition", told)
    some = sorted(states)[:: -(-len(states) // MOST_NAMES) or 1]
    with ThreadPoolExecutor(MOST_NAMES) as pool:
        unknown = [node for node, known in zip(some, pool.map(_resolves, some), strict=True) if not known]
    if unknown:
        advice = "ranks meet by these names: put the nodes into DNS or /etc/hosts; mstkd doctor --nodes asks the nodes themselves"
        yield warn("node names", f"not resolved from here: {listed(unknown)}", advice)
    elif some:
        yield ok("node names", f"{listed(some)} resolve")


def _resolves(name: str) -> bool:
    try:
        return bool(socket.getaddrinfo(name, None))
    except OSError:
        return False


def request(cluster: Cluster) -> Finding:
    """SLURM's own word on the job that the cluster file asks for; nothing is queued."""
    answer = ask("sbatch", "--test-only", *options(cluster), "--wrap", "true", limit_s=30)
    said = re.sub(r"^(sbatch|allocation failure): (error: )?", "", answer.message)
    if answer.ok:
        return ok("request", re.sub(r"^Job \d+ to start at \S+ using", "a job would get", said))
    told = f"SLURM refuses what the cluster file asks for: {said}"
    return fail("request", told, "compare with sinfo, and sacctmgr show assoc user=$USER")


def options(cluster: Cluster, nodes: int | None = None, tasks_per_node: int | None = None) -> list[str]:
    """The resources as words of sbatch and srun."""
    words = {
        "partition": cluster.partition, "account": cluster.account, "qos": cluster.qos, "constraint": cluster.constraint,
        "nodes": nodes or cluster.nodes, "ntasks-per-node": tasks_per_node or cluster.tasks_per_node,
        "gpus-per-node": cluster.gpus_per_node, "cpus-per-task": cluster.cpus_per_task, "time": cluster.timeout_min,
        "mem": cluster.memory, **cluster.additional,
    }  # fmt: skip
    given = {name: value for name, value in words.items() if value is not None}
    return [f"--{name}" if value is True else f"--{name}={value}" for name, value in given.items()]


def time_findings(config: dict[str, str], cluster: Cluster | None, known: Measured | None) -> Iterator[Finding]:
    """Whether a step and a save fit between a signal and the end."""
    kill_wait = seconds(config.get("KillWait", "30 sec"))
    if cluster is not None:
        yield fits("signal delay", f"signal_delay_s {cluster.signal_delay_s}", cluster.signal_delay_s, known, "raise signal_delay_s")
    advice = "scancel --signal=USR2 leaves more time; lower checkpoint.every_min to lose less"
    yield fits("KillWait", f"KillWait {kill_wait} s", kill_wait, known, advice)


def fits(thing: str, limit: str, allowed_s: float, known: Measured | None, advice: str) -> Finding:
    """One step and one save, as the newest run measured them, against the time between signal and end."""
    if known is None:
        return ok(thing, f"{limit}; no run here yet to say whether a step and a save fit")
    step = f"{known.run}: a step takes {known.step_s:.2g} s"
    if known.save_s is None:
        if MARGIN * known.step_s > allowed_s:
            return warn(thing, f"{limit} is short; {step}, and a save comes on top", advice)
        return ok(thing, f"{limit}; {step}, its saves were not timed")
    needed = MARGIN * (known.step_s + known.save_s)
    told = f"{limit}; {step}, a save {known.save_s:.2g} s, twice both {needed:.2g} s"
    return ok(thing, told) if needed <= allowed_s else warn(thing, f"{told}: too long", advice)

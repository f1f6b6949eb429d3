"""What `mstkd doctor` checks: whether this machine and its cluster can train, and what to do where they cannot."""

import importlib.metadata
import os
import platform
import shutil
import socket
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
from packaging.requirements import Requirement

from mstkd.errors import UserError
from mstkd.launch import doctor_files, doctor_nodes, doctor_runs, doctor_slurm
from mstkd.launch.doctor_finding import Finding, fail, listed, ok, warn


def findings(runs_dir: Path = Path("runs"), cluster: str | None = None, nodes: int | None = None, fix: bool = False) -> Iterator[Finding]:
    """All findings, in a fixed order, each as soon as it is known.

    `cluster`: name or file of the cluster that jobs will go to; `nodes`: also run a check on so many of its nodes;
    `fix`: close the MLflow runs that a hard kill left RUNNING. Raises UserError.
    """
    resources = None
    if cluster is not None:
        from mstkd.launch.cluster import load_cluster

        resources = load_cluster(cluster)
    elif nodes is not None:
        raise UserError("mstkd doctor --nodes: say which cluster with --cluster NAME|FILE")
    yield ok("python", platform.python_version())
    yield from packages()
    yield from programs()
    yield from accelerator()
    yield from doctor_files.findings(runs_dir)
    yield from network()
    slurm_works = False
    for finding in doctor_slurm.findings(resources, runs_dir):
        slurm_works |= (finding.state, finding.thing) == ("OK", "slurmctld")
        yield finding
    if nodes is not None and slurm_works:
        yield from doctor_nodes.findings(resources, nodes, runs_dir)
    yield from doctor_runs.findings(runs_dir, fix)


def packages() -> list[Finding]:
    """One per declared dependency: installed, and in the declared range."""
    declared = (Requirement(line) for line in importlib.metadata.requires("mstkd") or ())
    return [_package(requirement) for requirement in declared if requirement.marker is None or requirement.marker.evaluate()]


def _package(requirement: Requirement) -> Finding:
    advice = f'pip install "{requirement}"'
    try:
        version = importlib.metadata.version(requirement.name)
    except importlib.metadata.PackageNotFoundError:
        return fail(requirement.name, "not installed", advice)
    if not requirement.specifier.contains(version, prereleases=True):
        return fail(requirement.name, f"{version} is outside {requirement.specifier}", advice)
    return ok(requirement.name, version)


def programs() -> list[Finding]:
    """Programs that training or submitting calls."""
    compiles = "DeepSpeed compiles its collectives for CPU ranks, and its Adam for train.offload, on first use"
    return [
        _program("g++", fail, f"install a C++ compiler: {compiles}"),
        _program("ninja", fail, f"pip install ninja: {compiles}"),
        _program("git", warn, "install git, and each run records the commit it ran"),
    ]


def _program(name: str, otherwise: Callable[[str, str, str], Finding], advice: str) -> Finding:
    # training finds the programs of its environment also where that is not activated
    path = shutil.which(name) or shutil.which(name, path=sysconfig.get_path("scripts"))
    return ok(name, path) if path else otherwise(name, "not found", advice)


def accelerator() -> Iterator[Finding]:
    """The GPUs that torch sees, how ranks will talk, and whether bf16 is fast."""
    try:
        import torch
    except ImportError as error:
        yield fail("accelerator", f"torch does not load: {error}", "reinstall torch")
        return
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(device) for device in range(torch.cuda.device_count())]
        yield ok("accelerator", f"{len(names)} GPU: {', '.join(sorted(set(names)))}")
    else:
        advice = "training runs on the CPU; for a GPU install its driver and a CUDA build of torch"
        yield warn("accelerator", "no GPU", advice)
    yield _backend(torch)
    yield _bf16(torch)


def _backend(torch) -> Finding:
    distributed = torch.distributed
    if not distributed.is_available():
        return fail("backend", "this torch has no torch.distributed", "install an official build of torch")
    name = "nccl" if torch.cuda.is_available() else "gloo"
    if not getattr(distributed, f"is_{name}_available")():
        return fail("backend", f"this torch has no {name}", "install an official build of torch")
    return ok("backend", name)


def _bf16(torch) -> Finding:
    if torch.cuda.is_available():
        from mstkd.precision import WITHOUT_BF16, gpu_computes_bf16

        return ok("bf16", "the GPU computes in it") if gpu_computes_bf16() else warn("bf16", *WITHOUT_BF16)
    if torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return ok("bf16", "the CPU computes in it")
    return warn("bf16", "this CPU has no instructions for it", "it works, and train.precision=fp32 may be as fast")


def network() -> Iterator[Finding]:
    """What ranks on several hosts need of this one."""
    yield _own_address()
    yield _ports()


def _own_address() -> Finding:
    """gloo binds to the address of the host's own name: Debian writes 127.0.1.1 there, and ranks elsewhere wait for ever."""
    name, chosen = socket.gethostname(), os.environ.get("GLOO_SOCKET_IFNAME")
    interfaces = {interface: _ipv4(addresses) for interface, addresses in psutil.net_if_addrs().items()}
    outside = {interface: address for interface, address in interfaces.items() if address and not address.startswith("127.")}
    if chosen:
        if chosen in interfaces:
            return ok("own address", f"GLOO_SOCKET_IFNAME={chosen} ({interfaces[chosen] or 'no IPv4 address'})")
        known = f"unset it, or name one of {listed(sorted(outside))}" if outside else "unset it"
        return fail("own address", f"GLOO_SOCKET_IFNAME={chosen} is no interface of this host", known)
    advice = f"export GLOO_SOCKET_IFNAME={next(iter(outside), 'INTERFACE')}, or give {name} its own address in /etc/hosts"
    try:
        addresses = sorted({found[4][0] for found in socket.getaddrinfo(name, None, socket.AF_INET)})
    except OSError:
        return warn("own address", f"{name} does not resolve: ranks on several hosts would not find each other", advice)
    if loopback := [address for address in addresses if address.startswith("127.")]:
        return warn("own address", f"{name} resolves to {loopback[0]}: ranks on several hosts would wait for ever", advice)
    return ok("own address", f"{name} is {addresses[0]}")


def _ipv4(addresses: list) -> str | None:
    return next((entry.address for entry in addresses if entry.family == socket.AF_INET), None)


def _ports() -> Finding:
    """Ranks meet on a port of ours, derived from the job; the kernel must not give it to somebody's outgoing connection."""
    from mstkd.engine.environment import PORTS

    span = f"{PORTS.start}-{PORTS.stop - 1}"
    ephemeral = Path("/proc/sys/net/ipv4/ip_local_port_range")
    if ephemeral.is_file():
        low, high = map(int, ephemeral.read_text().split())
        if low < PORTS.stop and high >= PORTS.start:
            advice = "sysctl net.ipv4.ip_local_port_range='32768 60999', or set MASTER_PORT yourself"
            return warn("ports", f"outgoing connections take ports {low}-{high}, where ranks meet ({span})", advice)
    for port in PORTS[::997]:
        try:
            with socket.socket() as probe:
                probe.bind(("", port))
            return ok("ports", f"{span}, e.g. {port} is free")
        except OSError:
            continue
    advice = "ranks meet there: ask why this host forbids it, or set MASTER_PORT"
    return fail("ports", f"none of those tried in {span} can be bound", advice)

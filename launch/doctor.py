"""What `mstkd doctor` checks: whether this machine can train, and what to do where it cannot."""

import importlib.metadata
import platform
import shutil
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement


@dataclass(frozen=True)
class Finding:
    """`missing` stops training; `note` is worth knowing."""

    state: Literal["ok", "note", "missing"]
    thing: str
    what: str
    fix: str = ""

    def __str__(self) -> str:
        return f"{self.state:8}{self.thing:16}{self.what}" + (f"; {self.fix}" if self.fix else "")


def findings() -> list[Finding]:
    """All findings, in a fixed order."""
    python = Finding("ok", "python", platform.python_version())
    return [python, *packages(), *programs(), accelerator()]


def packages() -> list[Finding]:
    """One per declared dependency: installed, and in the declared range."""
    declared = (Requirement(line) for line in importlib.metadata.requires("mstkd") or ())
    return [_package(requirement) for requirement in declared if requirement.marker is None or requirement.marker.evaluate()]


def _package(requirement: Requirement) -> Finding:
    fix = f'pip install "{requirement}"'
    try:
        version = importlib.metadata.version(requirement.name)
    except importlib.metadata.PackageNotFoundError:
        return Finding("missing", requirement.name, "not installed", fix)
    if not requirement.specifier.contains(version, prereleases=True):
        return Finding("missing", requirement.name, f"{version} is outside {requirement.specifier}", fix)
    return Finding("ok", requirement.name, version)


def programs() -> list[Finding]:
    """Programs that training or submitting calls."""
    return [
        _program("g++", "missing", "install a C++ compiler: DeepSpeed compiles its collectives on first use"),
        _headers(),
        _program("ninja", "missing", "pip install ninja: DeepSpeed compiles its collectives on first use"),
        _program("git", "note", "install git, and each run records the commit it ran"),
        _program("sbatch", "note", "no SLURM here: mstkd train and deepspeed work, submitting does not"),
    ]


def _headers() -> Finding:
    header = Path(sysconfig.get_path("include"), "Python.h")
    if header.is_file():
        return Finding("ok", "Python.h", str(header))
    return Finding("missing", "Python.h", "not found", "install python3-dev: DeepSpeed compiles its collectives on first use")


def _program(name: str, otherwise: Literal["note", "missing"], fix: str) -> Finding:
    path = shutil.which(name)
    return Finding("ok", name, path) if path else Finding(otherwise, name, "not found", fix)


def accelerator() -> Finding:
    """The GPUs that torch sees."""
    try:
        import torch
    except ImportError as error:
        return Finding("missing", "accelerator", f"torch does not load: {error}", "reinstall torch")
    if not torch.cuda.is_available():
        return Finding("note", "accelerator", "no GPU", "training runs on the CPU; for a GPU install its driver and a CUDA build of torch")
    names = [torch.cuda.get_device_name(device) for device in range(torch.cuda.device_count())]
    return Finding("ok", "accelerator", f"{len(names)} GPU: {', '.join(sorted(set(names)))}")

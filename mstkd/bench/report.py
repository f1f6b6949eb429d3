"""What a benchmark says: figures, targets, machine and versions, as JSON and as a table. No host name, no path."""

import json
import os
import platform
import statistics
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path

import psutil
from rich.table import Table

PACKAGES = ("mstkd", "torch", "numpy", "webdataset", "nibabel")


@dataclass(frozen=True)
class Figure:
    """One measured quantity: median and spread over the rounds."""

    name: str
    unit: str
    median: float | None  # None: absent
    low: float | None = None
    high: float | None = None
    note: str = ""
    versus: dict[str, float] = field(default_factory=dict)  # name of another figure -> this one divided by it


def figure(name: str, unit: str, values: list[float], note: str = "") -> Figure:
    """The figure of the rounds' values; without values the thing was absent, and `note` says so."""
    if not values:
        return Figure(name, unit, None, note=note)
    return Figure(name, unit, statistics.median(values), min(values), max(values), note)


@dataclass(frozen=True)
class Target:
    """What was to be reached. `reached` is None where one side of the ratio is absent."""

    name: str
    at_least: float | None = None
    at_most: float | None = None
    reached: float | None = None

    @property
    def verdict(self) -> str:
        """pass, miss or not measured."""
        if self.reached is None:
            return "not measured"
        within = (self.at_least is None or self.reached >= self.at_least) and (self.at_most is None or self.reached <= self.at_most)
        return "pass" if within else "miss"


@dataclass(frozen=True)
class Report:
    """A whole benchmark."""

    benchmark: str
    settings: dict
    machine: dict
    versions: dict[str, str]
    figures: list[Figure]
    targets: list[Target]

    def to_json(self) -> str:
        """Indented, with each target's verdict."""
        values = asdict(self)
        for entry, target in zip(values["targets"], self.targets, strict=True):
            entry["verdict"] = target.verdict
        return json.dumps(values, indent=1) + "\n"

    def tables(self) -> list[Table]:
        """The figures, captioned with machine and versions, and the targets if there are any."""
        return [self._figures(), *([self._targets()] if self.targets else [])]

    def _figures(self) -> Table:
        others = list(dict.fromkeys(name for figure in self.figures for name in figure.versus))
        table = Table("what", "median", "lowest to highest", "unit", *[f"x {name}" for name in others], "note", title=self._title(), caption=self._caption())
        for entry in self.figures:
            ratios = [f"{entry.versus[name]:.2f}" if name in entry.versus else "" for name in others]
            spread = "" if entry.low is None else f"{entry.low:.3g} to {entry.high:.3g}"
            table.add_row(entry.name, "absent" if entry.median is None else f"{entry.median:.3g}", spread, entry.unit, *ratios, entry.note)
        return table

    def _targets(self) -> Table:
        table = Table("target", "wanted", "reached", "verdict")
        for target in self.targets:
            wanted = f">= {target.at_least:g}" if target.at_least is not None else f"<= {target.at_most:g}"
            table.add_row(target.name, wanted, "" if target.reached is None else f"{target.reached:.3g}", target.verdict)
        return table

    def _title(self) -> str:
        return f"mstkd bench {self.benchmark}: " + ", ".join(f"{name} {value}" for name, value in self.settings.items())

    def _caption(self) -> str:
        facts = {**self.machine, **self.versions}
        return "; ".join(f"{name} {value}" for name, value in facts.items())


def ratio(top: Figure | None, bottom: Figure | None) -> float | None:
    """The quotient of two medians; None where either is absent."""
    if top is None or bottom is None or top.median is None or not bottom.median:
        return None
    return top.median / bottom.median


def machine(folder: Path | None = None) -> dict:
    """What kind of machine this is, and what kind of file system `folder` lies on; nothing that names either."""
    filesystem = {} if folder is None else {"filesystem": _filesystem(folder)}
    return {
        "cpu": _cpu_model(),
        "cores": f"{len(os.sched_getaffinity(0))} of {os.cpu_count()}",
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "kernel": platform.release(),
        **filesystem,
        "load_before": round(os.getloadavg()[0], 1),
    }


def versions(*more: str) -> dict[str, str]:
    """Of Python and of the packages that every contender shares; and of some `more`."""
    return {"python": platform.python_version(), **{name: version(name) for name in (*PACKAGES, *more)}}


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _filesystem(folder: Path) -> str:
    place = folder.resolve()
    mounts = {Path(mount.mountpoint): mount.fstype for mount in psutil.disk_partitions(all=True)}
    return next((mounts[parent] for parent in (place, *place.parents) if parent in mounts), "unknown")

"""`mstkd bench data`: how fast volumes become tensors, beside the usual ways, on one machine in one run."""

import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from mstkd.bench import building, cold, loader_memory
from mstkd.bench.contenders import (
    Contender, NiftiFolder, OurPatches, Ours, PlainWebDataset, Rates, RawRead, TarAndNumpy, in_turn,
)  # fmt: skip
from mstkd.bench.peers import NAMES, Peer
from mstkd.bench.report import Figure, Report, Target, figure, machine, ratio, versions
from mstkd.bench.volumes import VOXEL_BYTES, Shape, Truth, write_nifti, write_shards
from mstkd.errors import UserError

COPIES = 4  # of the data on disk at most: shard set, MDS, litdata, and the cache of the slow source or a build
MIN_NIFTI = 3  # one each to train, validate and test on, which a build wants


@dataclass(frozen=True)
class Settings:
    """What a run of the benchmark is asked for; sizes in voxels (X, Y, Z)."""

    volumes: int = 32
    shape: Shape = (128, 160, 128)
    seconds: float = 10.0  # per contender, over all rounds
    rounds: int = 5
    patch: int = 96
    nifti_volumes: int = 4
    slow_mb_per_s: float = 100.0
    workers: int = 4  # of the loader whose memory is measured

    @property
    def volume_bytes(self) -> int:
        """Of one subject: float16 images, uint8 brain and label."""
        return self.shape[0] * self.shape[1] * self.shape[2] * VOXEL_BYTES

    @property
    def needed_bytes(self) -> int:
        """Of disk while it runs."""
        return (COPIES * self.volumes + 2 * self.nifti_volumes) * (self.volume_bytes + 8192)

    @property
    def patch_size(self) -> Shape:
        """The patch, no larger than a volume."""
        return tuple(min(self.patch, n) for n in self.shape)

    def facts(self) -> dict:
        """For the report's title."""
        x, y, z = self.shape
        return {
            "volumes": self.volumes, "shape": f"4x{x}x{y}x{z} float16", "seconds_per_contender": self.seconds,
            "rounds": self.rounds, "processes": 1, "page_cache": "warm",
        }  # fmt: skip


def bench_data(settings: Settings, folder: Path | None, peer_python: Path | None, say: Callable[[str], None]) -> Report:
    """Runs every contender on generated volumes in a temporary folder under `folder`, which is removed afterwards.

    `peer_python` is an interpreter that has the peers; by default this one. `say` gets a line per stage.
    Raises UserError: sizes that make no sense, no such folder, too little room, an interpreter that does not start.
    """
    _check(settings)
    place = folder or Path(tempfile.gettempdir())
    _check_room(place, settings, say)
    with tempfile.TemporaryDirectory(prefix="mstkd-bench-", dir=place) as scratch:
        return _run(settings, Path(scratch), peer_python or Path(sys.executable), say)


def _run(settings: Settings, scratch: Path, python: Path, say: Callable[[str], None]) -> Report:
    facts = machine(scratch)
    say(f"writing {settings.volumes} volumes")
    truths = write_shards(scratch / "set", settings.volumes, settings.shape)
    write_nifti(scratch / "nifti", settings.nifti_volumes, settings.shape)
    with ExitStack() as peers:
        contenders = _contenders(settings, scratch, python, peers)
        figures = _compare(contenders, truths, settings, say)
        used = {name: value for contender in contenders for name, value in contender.versions().items()}
    for kind in NAMES:
        shutil.rmtree(scratch / kind, ignore_errors=True)
    say(f"first epoch from a source of {settings.slow_mb_per_s:g} MB/s")
    figures += cold.cold_figures(scratch / "set", scratch, settings.slow_mb_per_s, rounds=3)
    say("building from NIfTI")
    figures += building.build_figures(scratch / "nifti", scratch, rounds=3)
    say(f"memory of a loader with {settings.workers} workers")
    figures += loader_memory.memory_figures(scratch / "set", settings.workers)
    return Report("data", settings.facts(), facts, {**versions(), **used}, figures, targets(figures))


def _contenders(settings: Settings, scratch: Path, python: Path, peers: ExitStack) -> list[Contender]:
    shards = scratch / "set"
    local = [kind(shards) for kind in (RawRead, TarAndNumpy, PlainWebDataset, Ours)]
    local += [OurPatches(shards, settings.patch_size), NiftiFolder(scratch / "nifti")]
    others = []
    for kind in NAMES:
        peer = peers.enter_context(Peer(kind, python))
        peer.write(shards, scratch / kind)
        others.append(peer)
    return [*local, *others]


def _compare(contenders: list[Contender], truths: list[Truth], settings: Settings, say: Callable[[str], None]) -> list[Figure]:
    for contender in contenders:
        say(f"{contender.name}: {contender.absent or 'reads everything once, and it is what was written'}")
        contender.check(truths)
    say(f"{settings.rounds} rounds")
    measured = in_turn(contenders, settings.rounds, settings.seconds)
    figures = [_rate_figure(rates) for rates in measured]
    bases = {"WebDataset": _named(figures, PlainWebDataset.name), "MDS": _named(figures, NAMES["mds"])}
    return [_with_ratios(entry, bases) for entry in figures]


def _rate_figure(rates: Rates) -> Figure:
    contender = rates.contender
    unit = "patches/s" if isinstance(contender, OurPatches) else "volumes/s"
    return figure(contender.name, unit, rates.per_second, contender.absent or f"-> {contender.dtype} tensor")


def _with_ratios(entry: Figure, bases: dict[str, Figure | None]) -> Figure:
    ratios = {name: ratio(entry, base) for name, base in bases.items()}
    return replace(entry, versus={name: value for name, value in ratios.items() if value is not None})


def targets(figures: list[Figure]) -> list[Target]:
    """What the readers are meant to reach, beside what these figures say."""
    ours, patches = _named(figures, Ours.name), next((entry for entry in figures if entry.unit == "patches/s"), None)
    return [
        Target("full volumes / plain WebDataset", at_least=3, reached=ratio(ours, _named(figures, PlainWebDataset.name))),
        Target("full volumes / MDS", at_least=1, reached=ratio(ours, _named(figures, NAMES["mds"]))),
        Target("random patches / full volumes", at_least=1.5, reached=ratio(patches, ours)),
        Target("full volumes / NIfTI", at_least=50, reached=ratio(ours, _named(figures, NiftiFolder.name))),
        Target("cold first epoch, time / plain WebDataset", at_most=1, reached=ratio(_named(figures, cold.OURS), _named(figures, cold.PLAIN))),
        Target("build, time / load and write", at_most=1.3, reached=ratio(_named(figures, building.OURS), _named(figures, building.LOAD_AND_WRITE))),
        Target("loader memory / batches in flight", at_most=2, reached=ratio(_named(figures, loader_memory.NAME), _named(figures, loader_memory.IN_FLIGHT))),
    ]


def _named(figures: list[Figure], name: str) -> Figure | None:
    return next((entry for entry in figures if entry.name == name), None)


def _check(settings: Settings) -> None:
    if min(settings.shape) < 16:
        raise UserError(f"--shape {','.join(map(str, settings.shape))}: give at least 16 voxels per axis")
    if settings.nifti_volumes < MIN_NIFTI or settings.nifti_volumes > settings.volumes:
        raise UserError(f"--volumes {settings.volumes}: give at least {max(MIN_NIFTI, settings.nifti_volumes)}")
    if not 0 < settings.seconds < 1e6:
        raise UserError(f"--seconds {settings.seconds:g}: give a positive number")


def _check_room(place: Path, settings: Settings, say: Callable[[str], None]) -> None:
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise UserError(f"--dir {place}: no such folder, or not yours to write; give one on the disk to be measured")
    free, needed = shutil.disk_usage(place).free, settings.needed_bytes
    say(f"needs {needed / 1e9:.2f} GB in a temporary folder, removed afterwards; free: {free / 1e9:.1f} GB")
    if free < needed:
        raise UserError(f"--dir {place}: {free / 1e9:.2f} GB free, {needed / 1e9:.2f} GB needed; choose another disk or fewer --volumes")

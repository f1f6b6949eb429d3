"""`mstkd bench predict`: inference of whole cases, beside MONAI's sliding window used straight away, in one process."""

import ctypes
import gc
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from monai.inferers import SlidingWindowInferer
from torch import Tensor

from mstkd.bench.evaluation import Bench, Settings, bench_cases
from mstkd.bench.report import Figure, Report, Target, figure, machine, ratio, versions
from mstkd.engine.figures import resident_bytes
from mstkd.errors import UserError
from mstkd.evaluate.inference import Volume, evaluation_mode
from mstkd.precision import autocast

OURS, BOX, WHOLE = "mstkd", "MONAI, brain box", "MONAI, whole file"
TOLERANCE = 1e-5  # of logits, relative where above 1
CLEAR_PEAK = Path("/proc/self/clear_refs")  # 5: the peak of resident memory begins anew (proc(5))


@dataclass
class Meter:
    """Seconds and peak bytes of what is done in a block."""

    device: torch.device
    seconds: dict[str, list[float]] = field(default_factory=dict)
    cpu_seconds: dict[str, list[float]] = field(default_factory=dict)  # of all threads
    gib: dict[str, list[float]] = field(default_factory=dict)

    @contextmanager
    def of(self, name: str) -> Iterator[None]:
        before = self._begin()
        began, cpu_began = time.perf_counter(), time.process_time()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.cpu_seconds.setdefault(name, []).append(time.process_time() - cpu_began)
        self.seconds.setdefault(name, []).append(time.perf_counter() - began)
        peak = torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else resident_bytes("VmHWM")
        self.gib.setdefault(name, []).append((peak - before) / 2**30)

    def _begin(self) -> int:
        """Bytes in use, after all that can be given back is."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
            torch.cuda.synchronize(self.device)
            return torch.cuda.memory_allocated(self.device)
        ctypes.CDLL(None).malloc_trim(0)  # or a contender would fill what the one before it left
        CLEAR_PEAK.write_text("5")
        return resident_bytes("VmRSS")


def bench_predict(settings: Settings, say: Callable[[str], None]) -> Report:
    """The contenders take turns, case by case. `say` gets a line per case.

    Raises UserError: no such run, no case in it, cases that were resampled, logits that differ.
    """
    with tempfile.TemporaryDirectory(prefix="mstkd-bench-") as scratch:
        given = bench_cases(settings, Path(scratch), say)
        facts, meter, turns = machine(), Meter(given.predictor.device), []
        with evaluation_mode(*given.predictor.methods), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # MONAI's, about its own indexing
            _turn(given, given.subjects[0], Meter(given.predictor.device))  # kernels are chosen, pages touched
            for number, key in enumerate(given.subjects):
                say(f"case {number + 1} of {len(given.subjects)}")
                turns.append(_turn(given, key, meter, number % 3))
    predictor = given.predictor
    title = {**settings.facts(), "window": "x".join(map(str, predictor.window)), "overlap": predictor.inference.overlap}
    device = {"device": predictor.device.type, "threads": torch.get_num_threads()}
    figures = prediction_figures(meter, turns)
    return Report("predict", title, {**facts, **device}, versions("monai"), figures, targets(figures))


@dataclass(frozen=True)
class Turn:
    """What was seen of one case."""

    difference: float  # largest of a logit, to MONAI's in the same box, relative where above 1
    other_labels: float  # share of the brain's voxels whose label differs from MONAI's on the whole file
    box_share: float  # of the file's voxels


def _turn(given: Bench, key: str, meter: Meter, first: int = 0) -> Turn:
    """One case, from contender `first` on."""
    predictor, sample = given.predictor, given.source.subject(key)
    subset, monai = (True,) * len(predictor.sequences), _monai(given)
    volume = predictor.volume(sample.image, sample.brain, sample.meta)
    whole, place = _on_file(volume, predictor.intensity.apply)

    def ours() -> tuple[Tensor, Tensor]:
        scores = predictor.scores(given.network, volume, subset)
        return scores, torch.from_numpy(predictor.decide(scores, volume, subset))

    def straightforward(image: Tensor) -> tuple[Tensor, Tensor]:
        logits = monai(image)
        return logits[0], predictor.method.to_labels(logits)[0].cpu()

    contenders = {OURS: ours, BOX: lambda: straightforward(volume.image), WHOLE: lambda: straightforward(whole)}
    found, names = {}, list(contenders)
    for name in names[first:] + names[:first]:
        with meter.of(name):
            found[name] = contenders[name]()
    (scores, labels), (logits, _), (_, elsewhere) = (found[name] for name in names)
    difference = _difference(scores, logits[(..., *volume.inner)])
    other = (elsewhere[place] != labels).numpy()[sample.brain > 0]
    return Turn(difference, float(other.mean()), labels.numel() / elsewhere.numel())


def _on_file(volume: Volume, apply: Callable) -> tuple[Tensor, tuple[slice, ...]]:
    """The normalised image on the file's whole RAS+ grid, background outside the box, and where the box lies in it."""
    place = tuple(slice(start, stop) for start, stop in volume.meta.crop_box)
    shape, sequences = volume.meta.ras_shape, volume.meta.sequences
    nothing = np.zeros((len(sequences), 1, 1, 1), np.float32)
    background = torch.from_numpy(apply(nothing, np.zeros((1, 1, 1)), volume.meta, sequences)).to(volume.image)
    whole = background.expand(-1, *shape)[None].clone()
    whole[(..., *place)] = volume.image[(..., *volume.inner)]
    return whole, place


def _monai(given: Bench) -> Callable[[Tensor], Tensor]:
    """Logits of an image, as MONAI's tutorials go about it."""
    predictor, inference = given.predictor, given.predictor.inference
    inferer = SlidingWindowInferer(predictor.window, inference.batch, overlap=inference.overlap, mode="gaussian")
    available = torch.ones(1, len(predictor.sequences), dtype=torch.bool, device=predictor.device)

    def network(patch: Tensor) -> Tensor:
        with autocast(patch.device, inference.precision):
            return predictor.method.predict(patch, available.expand(len(patch), -1), given.network).float()

    return lambda image: inferer(image, network)


def _difference(ours: Tensor, theirs: Tensor) -> float:
    found = ((ours - theirs).abs() / theirs.abs().clamp_min(1)).max().item()
    if found > TOLERANCE:
        raise UserError(f"bench predict: logits differ from MONAI's by {found:.3g}; report this, the times mean nothing")
    return found


def prediction_figures(meter: Meter, turns: Sequence[Turn]) -> list[Figure]:
    """Seconds and peak memory of a case, ours beside both of MONAI's."""
    seconds = {name: figure(f"{name}: inference", "s/case", meter.seconds[name]) for name in (OURS, BOX, WHOLE)}
    memory = {name: figure(f"{name}: peak memory", "GiB", meter.gib[name], "above what was there before") for name in (OURS, BOX, WHOLE)}
    cpu = {name: figure(f"{name}: processor time", "s/case", meter.cpu_seconds[name], "of all threads; other programs do not lengthen it") for name in (OURS, BOX, WHOLE)}
    for figures in (seconds, cpu, memory):
        figures[OURS] = replace(figures[OURS], versus={name: found for name in (BOX, WHOLE) if (found := ratio(figures[OURS], figures[name])) is not None})
    return [
        *seconds.values(), *cpu.values(), *memory.values(),
        Figure("largest difference of a logit", "relative", max(turn.difference for turn in turns), note="to MONAI in the same box"),
        figure("brain box / file", "", [turn.box_share for turn in turns], "of the voxels"),
        figure("labels that differ", "share", [turn.other_labels for turn in turns], "of the brain, to MONAI on the whole file, whose windows lie elsewhere"),
    ]  # fmt: skip


def targets(figures: Sequence[Figure]) -> list[Target]:
    """What is meant to be reached, beside what these figures say. In the same box mstkd runs MONAI's own function, so times are equal but for noise."""
    named = {entry.name: entry for entry in figures}
    faster = ratio(named[f"{WHOLE}: inference"], named[f"{OURS}: inference"])
    return [
        Target("logits, largest difference in the same box", at_most=TOLERANCE, reached=named["largest difference of a logit"].median),
        Target("throughput, mstkd / MONAI on the whole file", at_least=1, reached=faster),
        Target("peak memory, mstkd / MONAI on the whole file", at_most=1, reached=ratio(named[f"{OURS}: peak memory"], named[f"{WHOLE}: peak memory"])),
    ]

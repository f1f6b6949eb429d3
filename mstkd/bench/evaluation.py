"""`mstkd bench evaluate`: scoring every subset of sequences, beside the straightforward loop, on one machine in one run."""

import io
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from mstkd.bench.fitted import Fitted
from mstkd.bench.report import Figure, Report, Target, figure, machine, ratio, versions
from mstkd.bench.straightforward import Figures, Stages, hd95_in_double_mm, score_straightforwardly
from mstkd.bench.volumes import write_splits
from mstkd.config import EvaluateConfig, InferenceConfig, load_config
from mstkd.data.sample import Sample
from mstkd.data.store import ShardStore
from mstkd.errors import UserError
from mstkd.evaluate.cases import Row, diagonal_mm, references, score_labels, score_subjects
from mstkd.evaluate.inference import Predictor
from mstkd.evaluate.metrics import Mask, region_masks
from mstkd.evaluate.source import CaseSource
from mstkd.methods import DataFacts
from mstkd.shards.build import build
from mstkd.shards.geometry import restore
from mstkd.shards.phantom import write_phantom
from mstkd.subsets import Subset, all_subsets, possible_subsets, subset_name
from mstkd.trained_run import open_run

FULL_SIZE = 176  # voxels per axis, of 1 mm
RECIPE = "mst_kdnet_phantom"  # whose network is run
SAME = EvaluateConfig(lesion_wise=False)  # what the straightforward loop measures, too
PLAIN, OURS = "straightforward loop", "mstkd"
TOLERANCE = 1e-6  # relative; of HD95 under 1 mm absolute


@dataclass(frozen=True)
class Settings:
    """What a run of the benchmark is asked for; `size`: voxels per axis of generated cases."""

    cases: int = 2
    size: int = 96
    run: Path | None = None  # a trained run, on the first cases of its test split, instead
    overrides: tuple[str, ...] = ()  # of the recipe whose network is run on generated cases

    def facts(self) -> dict:
        """For the report's title."""
        return {"cases": self.cases, **({"data": "a run's test split"} if self.run else {"shape": f"{self.size}x{self.size}x{self.size}"})}


@dataclass(frozen=True)
class Bench:
    """What both contenders are given."""

    predictor: Predictor
    network: str
    source: CaseSource
    subjects: Sequence[str]
    subsets: Sequence[Subset]


def bench_evaluate(settings: Settings, say: Callable[[str], None]) -> Report:
    """Both contenders take turns, case by case; their figures must be equal. `say` gets a line per turn.

    Raises UserError: no such run, no case in it, cases that were resampled, figures that differ.
    """
    with tempfile.TemporaryDirectory(prefix="mstkd-bench-") as scratch:
        given = bench_cases(settings, Path(scratch), say)
        facts, turns = machine(), []
        for number, key in enumerate(given.subjects):
            say(f"case {number + 1} of {len(given.subjects)}, {len(given.subsets)} subsets")
            turns.append(_turn(given, key))
    device = {"device": given.predictor.device.type, "threads": torch.get_num_threads()}
    title = {**settings.facts(), "subsets": len(given.subsets), "window": "x".join(map(str, given.predictor.window))}
    figures = evaluation_figures(turns)
    return Report("evaluate", title, {**facts, **device}, versions("monai", "scipy"), figures, targets(figures))


def bench_cases(settings: Settings, scratch: Path, say: Callable[[str], None]) -> Bench:
    """Cases of a run's test split, or generated ones. Raises UserError as `bench_evaluate`."""
    return _trained(settings) if settings.run else _generated(settings, scratch, say)


def _generated(settings: Settings, scratch: Path, say: Callable[[str], None]) -> Bench:
    say(f"generating {settings.cases} cases of {settings.size} voxels per axis")
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        subjects = write_phantom(scratch / "nifti", max(settings.cases, 3), settings.size)
        build("phantom", scratch / "nifti", scratch / "set", splits=write_splits(scratch / "splits.json", subjects))
    source, config = CaseSource([ShardStore(scratch / "set")]), load_config(RECIPE, list(settings.overrides))
    method = Fitted(config.method, DataFacts(source.sequences, source.label_scheme, config.data.crop))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for network in method.networks.values():
        network.to(device)
    predictor = Predictor(method, source.sequences, config.data.crop, InferenceConfig(), device, source.label_scheme)
    method.fit(predictor, source, subjects)
    return Bench(predictor, "student", source, subjects[: settings.cases], all_subsets(source.sequences))


def _trained(settings: Settings) -> Bench:
    run = open_run(settings.run)
    subjects = run.source.subjects("test", run.config.data.fold)[: settings.cases]
    if not subjects:
        raise UserError(f"{settings.run}: its test split is empty; choose another --run")
    if resampled := [key for key in subjects if run.source.subject(key).meta.grid_shape is not None]:
        raise UserError(f"{settings.run}: case {resampled[0]} was resampled, which this benchmark leaves out; choose another --run")
    subsets = possible_subsets(run.facts.sequences, run.method.subsets)
    return Bench(run.predictor(), run.networks[0], run.source, subjects, subsets)


@dataclass(frozen=True)
class Turn:
    """Seconds that one case took, all subsets together, and by how much the contenders' figures differ."""

    plain: dict[str, float]  # by stage
    ours: float
    ours_inference: float
    ours_metrics: float  # alone, on the same label maps
    difference: float
    dice: float  # mean


def _turn(given: Bench, key: str) -> Turn:
    predictor, stages, labels = given.predictor, Stages(), {}
    plain = score_straightforwardly(predictor, given.network, given.source, key, given.subsets, stages, labels)
    predictor.seconds.clear()
    began = time.perf_counter()
    rows = score_subjects(predictor, [given.network], given.source, [key], given.subsets, given.source.label_scheme, SAME)
    ours, inference = time.perf_counter() - began, sum(predictor.seconds[given.network])
    sample, scheme = given.source.subject(key), given.source.label_scheme
    metrics = _metrics_alone(sample, labels, given.source)

    def in_double(subset: Subset, region: str) -> float:
        pair = (region_masks(restore(found, sample.meta), scheme)[region] for found in (labels[subset], sample.label))
        return hd95_in_double_mm(*pair, sample.meta)

    difference = largest_difference(plain, rows, given.source.sequences, in_double)
    return Turn(stages.seconds, ours, inference, metrics, difference, float(np.mean([row.score.dice for row in rows])))


def _metrics_alone(sample: Sample, labels: dict[Subset, Mask], source: CaseSource) -> float:
    """Seconds that our scores of a case's label maps take, the truth's surfaces and distance maps included."""
    began = time.perf_counter()
    truth = references(sample.label, source.label_scheme, sample.meta.spacing_mm, diagonal_mm(sample.meta))
    for found in labels.values():
        score_labels(truth, found, source.label_scheme, SAME)
    return time.perf_counter() - began


def largest_difference(plain: Figures, rows: Sequence[Row], sequences: Sequence[str], in_double: Callable[[Subset, str], float]) -> float:
    """Of Dice and HD95, relative where above 1. Raises UserError where it is over TOLERANCE.

    An HD95 that is gets a second hearing: `in_double` gives it from the other side's distances, but with a percentile in double precision.
    """
    found, largest = {(row.subset, row.region): row.score for row in rows}, 0.0
    for (subset, region), (dice, hd95_mm) in plain.items():
        name = subset_name(sequences, subset)
        score = found[name, region]
        if _difference(score.hd95_mm, hd95_mm) > TOLERANCE:
            hd95_mm = in_double(subset, region)
        for what, ours, theirs in (("Dice", score.dice, dice), ("HD95", score.hd95_mm, hd95_mm)):
            if _difference(ours, theirs) > TOLERANCE:
                raise UserError(f"bench evaluate: {what} of {region} given {name} is {ours:.9g} here and {theirs:.9g} by MONAI; report this, the times mean nothing")
            largest = max(largest, _difference(ours, theirs))
    return largest


def _difference(ours: float, theirs: float) -> float:
    return abs(ours - theirs) / max(1.0, abs(theirs))


def evaluation_figures(turns: Sequence[Turn]) -> list[Figure]:
    """Where the time of a case goes, in both; seconds over all subsets."""
    seconds = {
        f"{PLAIN}, whole": [sum(turn.plain.values()) for turn in turns],
        f"{OURS}, whole": [turn.ours for turn in turns],
        f"{PLAIN}, metrics": [turn.plain["metrics"] for turn in turns],
        f"{OURS}, metrics": [turn.ours_metrics for turn in turns],
        f"{PLAIN}, all but inference": [turn.plain["loading"] + turn.plain["metrics"] for turn in turns],
        f"{OURS}, all but inference": [turn.ours - turn.ours_inference for turn in turns],
        f"{PLAIN}, inference": [turn.plain["inference"] for turn in turns],
        f"{OURS}, inference": [turn.ours_inference for turn in turns],
    }
    notes = {f"{OURS}, metrics": "alone, on the same label maps", f"{OURS}, all but inference": "on a GPU metrics run beside the next inference"}
    figures = [figure(name, "s/case", values, notes.get(name, "")) for name, values in seconds.items()]
    beside = [replace(ours, versus={"loop": ratio(ours, plain)}) for plain, ours in zip(figures[::2], figures[1::2])]
    pairs = [entry for pair in zip(figures[::2], beside) for entry in pair]
    return [
        *pairs,
        Figure("largest difference", "relative", max(turn.difference for turn in turns), note="of any Dice or HD95, percentiles in double precision"),
        figure("mean Dice", "", [turn.dice for turn in turns], "of what is scored: over subsets and regions"),
    ]


def targets(figures: Sequence[Figure]) -> list[Target]:
    """What is meant to be reached, beside what these figures say."""
    named = {entry.name: entry for entry in figures}

    def faster(part: str) -> float | None:
        return ratio(named[f"{PLAIN}, {part}"], named[f"{OURS}, {part}"])

    return [
        Target("figures, largest difference", at_most=TOLERANCE, reached=named["largest difference"].median),
        Target("whole, straightforward / mstkd", at_least=5, reached=faster("whole")),
        Target("metrics, straightforward / mstkd", at_least=5, reached=faster("metrics")),
    ]

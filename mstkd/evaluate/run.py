"""`mstkd evaluate RUN`: a run on a split of shard sets."""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from rich.console import Console

from mstkd.console import log_to_console
from mstkd.data.store import ShardStore
from mstkd.engine import backend
from mstkd.engine.distributed import agreed, on_main
from mstkd.engine.environment import Ranks, resolve_environment
from mstkd.engine.figures import peak_memory_gib
from mstkd.errors import UserError
from mstkd.evaluate import features, fused, painting, synthesis
from mstkd.evaluate.cases import Row, score_subjects, whole_brain_baseline
from mstkd.evaluate.classification import CONVENTIONS, decide, print_accuracies, summarise_decisions, write_decisions
from mstkd.evaluate.completed_inputs import CompletingPredictor, front_takes, open_front
from mstkd.evaluate.completion import Completer
from mstkd.evaluate.completion_figures import completion_pictures, draw_completions
from mstkd.evaluate.inference import Predictor
from mstkd.evaluate.kept import KeptScores
from mstkd.evaluate.notes import overlap_note, untrained_note
from mstkd.evaluate.painting import score_paintings
from mstkd.evaluate.report import best_median_worst, case_pictures, draw_class_figures, draw_figures, write_report
from mstkd.evaluate.scoring import conventions, decided
from mstkd.evaluate.source import CaseSource
from mstkd.evaluate.summary import percent, print_table, summarise, write_json, write_rows
from mstkd.evaluate.synthesis import (
    COPY, Completion, decibels, four_digits, print_likeness, score_completions, summarise_completions, write_completions,
)  # fmt: skip
from mstkd.evaluate.tracked import track
from mstkd.evaluate.weights import TrainedRun, open_run
from mstkd.export.tracked import check_model
from mstkd.run_folder import best_steps, evaluation_folder, recorded
from mstkd.subsets import Subset, possible_subsets, proper, subset_name

SCORED = "scored"  # folder of what was scored until all is

ORACLE = {"oracle": "this network was given the labels of these cases, which a user does not have: an upper bound, not ranked"}


def evaluate_on_ranks(
    run_dir: Path, data: Path | None = None, split: str = "test", allow_overlap: bool = False, postprocess: str | None = None,
    complete: Path | None = None, overrides: Sequence[str] = (),
) -> None:  # fmt: skip
    """`evaluate_run`, cases shared out over the ranks that a launcher started."""
    ranks = resolve_environment()
    log_to_console(ranks.rank)
    if ranks.world > 1:
        backend.start(ranks)
    try:
        with agreed(ranks):
            evaluate_run(run_dir, data, split, allow_overlap, ranks.rank, ranks.world, postprocess, complete, overrides)
    finally:
        backend.shutdown()


def evaluate_run(
    run_dir: Path, data: Path | None = None, split: str = "test", allow_overlap: bool = False, rank: int = 0, world: int = 1,
    postprocess: str | None = None, complete: Path | None = None, overrides: Sequence[str] = (),
) -> dict[str, Any]:  # fmt: skip
    """Score a run's best weights for every subset of sequences or views and write `<run>/evaluation/`; returns summary.json.

    `data` is another shard set than the run's own, `postprocess` another rule than its `inference.postprocess`, `complete` a synthesis run
    instead of its `evaluate.complete`; `overrides` change other keys of its recipe that say how it predicts. Raises
    UserError: no run, no such split, other sequences, regions or classes, cases that training saw (unless `allow_overlap`
    or the recipe's `data.allow_overlap`). Collective with several ranks; rank 0 writes.
    """
    changes = [*overrides, *([f"evaluate.complete={complete}"] if complete else [])]
    run = open_run(run_dir, tasks=tuple(TASKS), painters=True, overrides=changes).postprocessed(postprocess)
    front = _front(run, run.config.evaluate.complete) if run.config.evaluate.complete else None
    source = CaseSource([ShardStore(data)]) if data else run.source
    subjects = source.subjects(split, run.config.data.fold)
    _check_data(run, source, split, subjects)
    check_model(run)
    notes = overlap_note(run, source, split, allow_overlap) | (overlap_note(front, source, split, allow_overlap) if front else {})
    subsets = _subsets(run, front)
    notes |= untrained_note(run, subsets) if subsets and not front else {}
    named = [*([postprocess] if postprocess else []), *([complete.name] if complete else []), *overrides]
    job = Evaluation(run, front, source, split, subjects, subsets, _networks(run), notes, _folder(run, source, split, named), rank, world)
    summaries = (_evaluate_paintings if job.networks[0] in run.method.painters else TASKS[run.method.task])(job)
    return summaries[job.networks[0]]


def _front(run: TrainedRun, path: str) -> TrainedRun:
    if run.method.task != "segmentation":
        raise UserError(f"evaluate.complete: is for segmentations, and {run.config.method['name']} is for {run.method.task}; remove it")
    return open_front(path)


def _subsets(run: TrainedRun, front: TrainedRun | None) -> Sequence[Subset] | None:
    """What is given to the networks in turn; None: each case once, given all that it has."""
    sequences, method = run.facts.sequences, run.method
    if run.config.evaluate.given == "present":
        if method.task != "segmentation" or method.subsets is not None:
            raise UserError(f"evaluate.given present: is for segmentations that take any subset, not for {run.config.method['name']}; set it to subsets")
        return None
    subsets = possible_subsets(sequences, front_takes(front) if front else method.subsets)
    return proper(subsets) if method.task == "synthesis" else subsets


@dataclass(frozen=True)
class Evaluation:
    """What is scored, by which networks, and where the results go."""

    run: TrainedRun
    front: TrainedRun | None  # a synthesis run that completes what the networks see
    source: CaseSource
    split: str
    subjects: Sequence[str]
    subsets: Sequence[Subset] | None  # None: each case once, given all that it has
    networks: Sequence[str]  # the first is what the run is for
    notes: dict[str, str]  # of the run itself: they go below the conventions
    folder: Path
    rank: int
    world: int

    @property
    def facts(self) -> dict[str, str]:
        """What the report says at its top."""
        return {
            "method": self.run.config.method["name"],
            "data": f"{self.source.dataset}, {self.split} split, {len(self.subjects)} cases",
            "trained on": f"{self.run.dataset}, fold {self.run.config.data.fold}",
        }

    @property
    def heading(self) -> tuple[str, str, int]:
        """Method, split and fold, as summaries name them."""
        return self.run.config.method["name"], self.split, self.run.config.data.fold

    def kept(self, kind: type, *clocks: dict[str, list]) -> KeptScores:
        """The scores that an interrupted evaluation of the same weights, cases and conventions left behind, to go on from. Collective."""
        kept = KeptScores(self.folder / SCORED, kind, clocks)
        on_main(lambda: kept.begin(self._identity()), Ranks(self.rank, self.world, self.rank, torch.device("cpu")))
        return kept

    def _identity(self) -> dict[str, Any]:
        return {
            "run": self.run.identity(), "front": self.front and self.front.identity(), "networks": self.networks, "subsets": self.subsets,
            "evaluate": self.run.config.evaluate.model_dump(), "data": self.source.digest,
        }  # fmt: skip

    def begin(self) -> None:
        """Make the folder and note whose weights are scored; summary.json is written last: where it lies, all of the evaluation does."""
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "summary.json").unlink(missing_ok=True)
        write_json(self.folder / "weights.json", best_steps(self.run.folder))
        if self.folder.parent != self.run.folder:  # not the run's own, which its recipe describes
            (self.folder / "config.yaml").write_text(yaml.safe_dump(recorded(self.run.config), sort_keys=False))

    def finish(
        self, summaries: dict[str, dict], facts: dict[str, str], drawn: dict[str, Path], template: str, print_summary: Callable[[dict, str], None]
    ) -> None:
        """Report, summaries, MLflow and the tables in the terminal."""
        name, report = self.run.config.name, self.folder / "report.html"
        write_report(report, f"Evaluation of {name}", facts, summaries, drawn, template)
        _write_summaries(self.folder, summaries)
        shutil.rmtree(self.folder / SCORED, ignore_errors=True)
        track(self.run, self.folder, summaries, self.source, len(self.subjects))
        for network, summary in summaries.items():
            oracle = " (oracle)" if summary.get("oracle") else ""
            print_summary(summary, f"{name}, {network}{oracle}, {self.split} split of {self.source.dataset}, {len(self.subjects)} cases")
        Console().print(f"report: {report}", highlight=False, soft_wrap=True)


def _evaluate_volumes(job: Evaluation) -> dict[str, dict]:
    run, source, folder = job.run, job.source, job.folder
    options = decided(run.config.evaluate, run.facts.label_scheme)
    notes = conventions(options) | job.notes
    if run.config.inference.postprocess != "none":
        notes["postprocess"] = f"label maps cleared up by {run.config.inference.postprocess} before scoring"
    inference = run.config.inference
    if inference.mirror:
        notes["mirror"] = f"probabilities averaged over windows mirrored along {inference.mirror}"
    if inference.largest_component or inference.min_volume_ml:
        smallest = ", ".join(f"{region} under {volume:g} ml" for region, volume in inference.min_volume_ml.items())
        largest = ", ".join(f"{region} but the largest" for region in inference.largest_component)
        notes["components"] = f"components cleared before scoring: {'; '.join(text for text in (smallest, largest) if text)}"
    if job.front:
        notes["completed"] = f"every subset was completed by {job.front.config.method['name']} ({job.front.config.name}); the networks saw all sequences"
    predictor, scheme = CompletingPredictor(run, job.front) if job.front else run.predictor(), run.facts.label_scheme
    kept = job.kept(Row, *predictor.clocks)
    rows = score_subjects(predictor, job.networks, source, job.subjects, job.subsets, scheme, options, job.rank, job.world, kept=kept)
    summaries = {n: summarise([row for row in rows if row.network == n], source.sequences, *job.heading, notes) for n in job.networks}
    if job.rank == 0:
        job.begin()
        write_rows(folder / "per_case.csv", rows)
        write_json(folder / "cost.json", _cost(predictor))
        facts = job.facts | _volume_facts(run, _write_baseline(folder, source, job.subjects))
        complete = set(source.complete(job.subjects))
        chosen = best_median_worst([row for row in rows if row.network == job.networks[0] and row.subject in complete])
        pictures = case_pictures(predictor, job.networks[0], source, chosen, scheme)
        drawn = draw_figures(folder, summaries, pictures) | _draw_features(folder, run, source, sorted(complete), predictor)
        job.finish(summaries, facts | _pictured(chosen), drawn, "report.html.j2", print_table)
    return summaries


def _evaluate_classes(job: Evaluation) -> dict[str, dict]:
    run, source, folder, classes = job.run, job.source, job.folder, job.source.classification.classes
    _refuse_postprocess(run)
    decisions = decide(
        run.method, job.networks, source, job.subjects, job.subsets, run.config.inference, run.placed(), job.rank, job.world
    )
    summaries = {
        n: summarise_decisions([d for d in decisions if d.network == n], source.sequences, classes, *job.heading, CONVENTIONS | job.notes)
        for n in job.networks
    }
    if job.rank == 0:
        job.begin()
        write_decisions(folder / "per_case.csv", decisions, classes)
        drawn = draw_class_figures(folder, summaries, decisions, classes)
        job.finish(summaries, job.facts, drawn, "classification.html.j2", print_accuracies)
    return summaries


def _evaluate_completions(job: Evaluation) -> dict[str, dict]:
    run, source, folder, oracles = job.run, job.source, job.folder, job.run.method.oracles
    _refuse_postprocess(run)
    if {*oracles} & {*job.networks} and source.label_scheme != run.facts.label_scheme:
        raise UserError(f"data set {source.dataset} has another label scheme than {oracles[0]}, which is given labels, learned from; set evaluate.networks")
    completer = run.completer()
    kept = job.kept(Completion, *completer.clocks)
    scored = score_completions(completer, [*job.networks, COPY], source, job.subjects, job.subsets, rank=job.rank, world=job.world, kept=kept)
    rows, copies = ([row for row in scored if (row.network == COPY) == floor] for floor in (False, True))
    errors = fused.measure(completer, job.networks, source, job.subjects, job.rank, job.world)
    notes = synthesis.conventions(run.config.data.slices, run.method.intensity, any(row.score.lpips is not None for row in rows)) | job.notes
    summaries = {}
    for network in job.networks:
        own, texts = [row for row in rows if row.network == network], notes | (ORACLE if network in oracles else {})
        summaries[network] = summarise_completions(own, source.sequences, *job.heading, network in oracles, texts)
    if job.rank == 0:
        job.begin()
        write_completions(folder / "per_case.csv", rows)
        write_json(folder / "cost.json", _cost(completer))
        complete = set(source.complete(job.subjects))
        chosen = best_median_worst([row for row in rows if row.network == job.networks[0] and row.subject in complete], "psnr")
        drawn = draw_completions(folder, summaries, completion_pictures(completer, job.networks[0], source, chosen), source.sequences)
        facts = job.facts | _write_floor(folder, copies, source, job.heading) | _pictured(chosen)
        if errors:
            facts |= errors.write(folder)
            drawn[fused.CAPTION] = folder / fused.PICTURE
        job.finish(summaries, facts, drawn, "synthesis.html.j2", print_likeness)
    return summaries


def _write_floor(folder: Path, copies: Sequence[Completion], source: CaseSource, heading: tuple[str, str, int]) -> dict[str, str]:
    """copy_per_case.csv and baseline.json: how like the missing sequence a given one is already."""
    mean = summarise_completions(copies, source.sequences, *heading, False, {})["mean"]
    write_completions(folder / "copy_per_case.csv", copies)
    write_json(folder / "baseline.json", {COPY: mean})
    text = f"PSNR {decibels(mean['psnr'])} dB, SSIM {four_digits(mean['ssim'])} if the first given sequence were taken for the missing one"
    Console().print(f"baseline: {text}", highlight=False)
    return {"floor": text}


def _evaluate_paintings(job: Evaluation) -> dict[str, dict]:
    """Of a segmentation's networks that paint images, before there is a segmenter."""
    run, source, folder = job.run, job.source, job.folder
    _refuse_postprocess(run)
    predictor = run.predictor()
    rows = score_paintings(predictor, job.networks, source, job.subjects, job.rank, job.world, kept=job.kept(Completion, *predictor.clocks))
    summaries = {
        n: summarise_completions([row for row in rows if row.network == n], source.sequences, *job.heading, False, painting.CONVENTIONS | job.notes)
        for n in job.networks
    }
    if job.rank == 0:
        job.begin()
        write_completions(folder / "per_case.csv", rows)
        write_json(folder / "cost.json", _cost(predictor))
        job.finish(summaries, job.facts, {}, "synthesis.html.j2", print_likeness)
    return summaries


TASKS = {"segmentation": _evaluate_volumes, "classification": _evaluate_classes, "synthesis": _evaluate_completions}


def _refuse_postprocess(run: TrainedRun) -> None:
    if run.config.inference.postprocess != "none":
        raise UserError(f"inference.postprocess {run.config.inference.postprocess}: is for label maps of tumours (WT, TC, ET); set it to none")
    for key in ("mirror", "largest_component", "min_volume_ml"):
        if getattr(run.config.inference, key):
            raise UserError(f"inference.{key}: is for label maps; leave it out")


def _pictured(chosen: dict[str, str]) -> dict[str, str]:
    return {"pictured": ", ".join(f"{rank} {subject}" for rank, subject in chosen.items())}


def _check_data(run: TrainedRun, source: CaseSource, split: str, subjects: Sequence[str]) -> None:
    if not subjects:
        raise UserError(f"split {split} of data set {source.dataset} is empty; choose another --split")
    if source.sequences != run.facts.sequences:
        theirs, ours = ", ".join(source.sequences), ", ".join(run.facts.sequences)
        raise UserError(f"data set {source.dataset} has sequences {theirs}; the run was trained on {ours}, in that order")
    if source.classification != run.facts.classification:
        raise UserError(f"data set {source.dataset} has other classes, or views of another shape, than the run was trained on; build it the same way")


def _networks(run: TrainedRun) -> list[str]:
    wanted = run.config.evaluate.networks
    unknown = sorted(set(wanted or ()) - set(run.networks))
    if unknown:
        raise UserError(f"evaluate.networks: {unknown[0]!r} is not trained or not scored; choose from {', '.join(run.networks)}")
    return [name for name in run.networks if wanted is None or name in wanted]


def _folder(run: TrainedRun, source: CaseSource, split: str, named: Sequence[str]) -> Path:
    """evaluation/ for the run's own test split as its recipe says, evaluation/<data>-<split>[-<what is `named`>]/ for anything else."""
    own, here = ([store.place for store in stores] for stores in (run.source.stores, source.stores))
    if own == here and split == "test" and not named:
        return run.folder / "evaluation"
    return evaluation_folder(run.folder, here, split, named)


def _write_summaries(folder: Path, summaries: dict[str, dict[str, Any]]) -> None:
    for number, (network, summary) in enumerate(summaries.items()):
        write_json(folder / (f"summary_{network}.json" if number else "summary.json"), summary)


def _cost(predictor: Predictor | Completer) -> dict[str, Any]:
    """By network: how long one case took from one subset, completion included, and where slices are completed one slice; on this rank.

    The peak is the whole evaluation's: of the GPU's memory, without one what the process holds at its end.
    """
    front = predictor.completion_seconds if isinstance(predictor, CompletingPredictor) else None
    cost = {}
    for network, seconds in predictor.seconds.items():
        cost[network] = {"seconds_per_case": float(np.mean(seconds)) + (front or 0), "predictions": len(seconds), "device": predictor.device.type}
        cost[network]["peak_memory_gib"] = peak_memory_gib(predictor.device)
        if front is not None:
            cost[network]["completion_seconds_per_case"] = front
        if isinstance(predictor, Completer):
            cost[network]["seconds_per_slice"] = sum(seconds) / sum(predictor.slices_done[network])
    return cost


def _write_baseline(folder: Path, source: CaseSource, subjects: Sequence[str]) -> dict[str, Any] | None:
    """Where there are tumours: baseline.json, the Dice of calling the whole brain tumour."""
    if "WT" not in source.label_scheme.regions:
        return None
    baseline = whole_brain_baseline(source, subjects)
    write_json(folder / "baseline.json", {"whole_brain": {"WT": baseline}})
    return baseline


def _draw_features(folder: Path, run: TrainedRun, source: CaseSource, subjects: Sequence[str], predictor: Predictor) -> dict[str, Path]:
    """features.png and features.json, where the method has features of single sequences; caption -> path."""
    sets = features.collect(predictor, source, subjects)
    if not sets:
        return {}
    found = features.draw(sets, source.sequences, folder / "features.png")
    write_json(folder / "features.json", found)
    for kind, score in found.items():
        text = f"{kind} features: their sequence is named in {percent(score['accuracy'])} % of {score['n']}, chance {percent(score['chance'])} %"
        Console().print(text, highlight=False)
    return {"Features of single sequences; how often a classifier that saw other subjects names the sequence": folder / "features.png"}


def _volume_facts(run: TrainedRun, baseline: dict[str, Any] | None) -> dict[str, str]:
    facts = {
        "window": f"{' x '.join(map(str, run.config.inference.window or run.config.data.crop))} voxels, overlap {run.config.inference.overlap:g}",
    }
    if baseline:
        text = f"WT Dice {percent(baseline['dice_nonempty'])} % (non-empty) if the whole brain were called tumour"
        Console().print(f"baseline: {text}", highlight=False)
        facts["floor"] = text
    return facts

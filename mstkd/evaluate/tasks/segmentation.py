"""The evaluation of a segmentation run: label maps of whole volumes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from mstkd.evaluate import features
from mstkd.evaluate.cases import Row, score_subjects, whole_brain_baseline
from mstkd.evaluate.completed_inputs import CompletingPredictor
from mstkd.evaluate.evaluation import Evaluation, cost_of, pictured
from mstkd.evaluate.inference import Predictor
from mstkd.evaluate.report import best_median_worst, case_pictures, draw_figures
from mstkd.evaluate.scoring import conventions, decided
from mstkd.evaluate.source import CaseSource
from mstkd.evaluate.summary import print_table, summarise, write_rows
from mstkd.files import write_json
from mstkd.measures import ACCURACY, DICE
from mstkd.trained_run import TrainedRun


def evaluate_volumes(job: Evaluation) -> dict[str, dict]:
    """Score label maps; summaries by network."""
    run, source, folder = job.run, job.source, job.folder
    options = decided(run.config.evaluate, run.facts.label_scheme)
    notes = conventions(options) | job.notes | _notes(job)
    predictor, scheme = CompletingPredictor(run, job.front) if job.front else run.predictor(), run.facts.label_scheme
    kept = job.kept(Row, *predictor.clocks)
    rows = score_subjects(predictor, job.networks, source, job.subjects, job.subsets, scheme, options, job.rank, job.world, kept=kept)
    summaries = {n: summarise([row for row in rows if row.network == n], source.sequences, *job.heading, notes) for n in job.networks}
    if job.rank == 0:
        job.begin()
        write_rows(folder / "per_case.csv", rows)
        write_json(folder / "cost.json", cost_of(predictor))
        facts = job.facts | _volume_facts(run, _write_baseline(folder, source, job.subjects))
        complete = set(source.complete(job.subjects))
        chosen = best_median_worst([row for row in rows if row.network == job.networks[0] and row.subject in complete])
        pictures = case_pictures(predictor, job.networks[0], source, chosen, scheme)
        drawn = draw_figures(folder, summaries, pictures) | _draw_features(folder, run, source, sorted(complete), predictor)
        job.finish(summaries, facts | pictured(chosen), drawn, "report.html.j2", print_table)
    return summaries


def _notes(job: Evaluation) -> dict[str, str]:
    """What the recipe does to label maps and inputs."""
    inference, notes = job.run.config.inference, {}
    if inference.postprocess != "none":
        notes["postprocess"] = f"label maps cleared up by {inference.postprocess} before scoring"
    if inference.mirror:
        notes["mirror"] = f"probabilities averaged over windows mirrored along {inference.mirror}"
    if inference.largest_component or inference.min_volume_ml:
        smallest = ", ".join(f"{region} under {volume:g} ml" for region, volume in inference.min_volume_ml.items())
        largest = ", ".join(f"{region} but the largest" for region in inference.largest_component)
        notes["components"] = f"components cleared before scoring: {'; '.join(text for text in (smallest, largest) if text)}"
    if job.front:
        notes["completed"] = f"every subset was completed by {job.front.config.method['name']} ({job.front.config.name}); the networks saw all sequences"
    return notes


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
        text = f"{kind} features: their sequence is named in {ACCURACY.dashed(score['accuracy'])} % of {score['n']}, chance {ACCURACY.dashed(score['chance'])} %"
        Console().print(text, highlight=False)
    return {"Features of single sequences; how often a classifier that saw other subjects names the sequence": folder / "features.png"}


def _volume_facts(run: TrainedRun, baseline: dict[str, Any] | None) -> dict[str, str]:
    facts = {
        "window": f"{' x '.join(map(str, run.config.inference.window or run.config.data.crop))} voxels, overlap {run.config.inference.overlap:g}",
    }
    if baseline:
        text = f"WT Dice {DICE.dashed(baseline['dice_nonempty'])} % (non-empty) if the whole brain were called tumour"
        Console().print(f"baseline: {text}", highlight=False)
        facts["floor"] = text
    return facts

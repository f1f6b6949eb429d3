"""`mstkd evaluate`: a run on a split of shard sets, or label maps against label maps."""

import json
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from mstkd.config import EvaluateConfig
from mstkd.console import log_to_console
from mstkd.data.availability import Availability
from mstkd.data.store import ShardStore
from mstkd.engine import backend
from mstkd.engine.distributed import agreed
from mstkd.engine.environment import resolve_environment
from mstkd.errors import UserError
from mstkd.evaluate import features
from mstkd.evaluate.cases import Row, references, score_labels, score_subjects, whole_brain_baseline
from mstkd.evaluate.classification import CONVENTIONS, decide, print_accuracies, summarise_decisions, write_decisions
from mstkd.evaluate.inference import Predictor
from mstkd.evaluate.metrics import bounding_box
from mstkd.evaluate.overlap import refuse, training_overlap
from mstkd.evaluate.report import best_median_worst, case_pictures, draw_class_figures, draw_figures, write_report
from mstkd.evaluate.scoring import conventions
from mstkd.evaluate.source import CaseSource, split_subjects
from mstkd.evaluate.summary import percent, print_table, summarise, write_json, write_rows
from mstkd.evaluate.weights import TrainedRun, open_run
from mstkd.shards.dataset import DatasetSpec, Volume, load_spec
from mstkd.shards.labels import read_labels
from mstkd.shards.nifti import AFFINE_TOLERANCE_MM, read_volume
from mstkd.shards.spec import LabelScheme
from mstkd.subsets import possible_subsets, subset_name
from mstkd.track import open_evaluation

log = logging.getLogger(__name__)


def evaluate_on_ranks(
    run_dir: Path, data: Path | None = None, split: str = "test", allow_overlap: bool = False, postprocess: str | None = None
) -> None:
    """`evaluate_run`, cases shared out over the ranks that a launcher started."""
    ranks = resolve_environment()
    log_to_console(ranks.rank)
    if ranks.world > 1:
        backend.start(ranks)
    try:
        with agreed(ranks):
            evaluate_run(run_dir, data, split, allow_overlap, ranks.rank, ranks.world, postprocess)
    finally:
        backend.shutdown()


def evaluate_run(
    run_dir: Path, data: Path | None = None, split: str = "test", allow_overlap: bool = False, rank: int = 0, world: int = 1,
    postprocess: str | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Score a run's best weights for every subset of sequences or views and write `<run>/evaluation/`; returns summary.json.

    `data` is another shard set than the run's own, `postprocess` another rule than its `inference.postprocess`. Raises
    UserError: no run, no such split, other sequences, regions or classes, cases that training saw (unless `allow_overlap`
    or the recipe's `data.allow_overlap`). Collective with several ranks; rank 0 writes.
    """
    run = open_run(run_dir, tasks=("segmentation", "classification")).postprocessed(postprocess)
    source = CaseSource([ShardStore(data)]) if data else run.source
    subjects = source.subjects(split, run.config.data.fold)
    _check_data(run, source, split, subjects)
    notes = _overlap_note(run, source, split, allow_overlap) | _untrained_note(run)
    folder = _folder(run, source, split, postprocess)
    evaluate_subjects = _evaluate_classes if run.method.task == "classification" else _evaluate_volumes
    return evaluate_subjects(run, source, split, subjects, folder, notes, rank, world)


def _evaluate_volumes(
    run: TrainedRun, source: CaseSource, split: str, subjects: Sequence[str], folder: Path, notes: dict[str, str], rank: int, world: int
) -> dict[str, Any]:
    notes = conventions(run.config.evaluate) | notes
    if run.config.inference.postprocess != "none":
        notes["postprocess"] = f"label maps cleared up by {run.config.inference.postprocess} before scoring"
    predictor, scheme = run.predictor(), run.facts.label_scheme
    networks = _networks(run)
    subsets = possible_subsets(source.sequences, run.method.subsets)
    rows = score_subjects(predictor, networks, source, subjects, subsets, scheme, run.config.evaluate, rank, world)
    name, fold = run.config.method["name"], run.config.data.fold
    summaries = {n: summarise([row for row in rows if row.network == n], source.sequences, name, split, fold, notes) for n in networks}
    if rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "summary.json").unlink(missing_ok=True)  # it is written last: where it lies, all of the evaluation does
        write_rows(folder / "per_case.csv", rows)
        write_json(folder / "cost.json", _cost(predictor))
        facts = _facts(run, source, split, subjects) | _volume_facts(run, _write_baseline(folder, source, subjects))
        complete = set(source.complete(subjects))
        chosen = best_median_worst([row for row in rows if row.network == networks[0] and row.subject in complete])
        pictures = case_pictures(predictor, networks[0], source, chosen, scheme)
        drawn = draw_figures(folder, summaries, pictures) | _draw_features(folder, run, source, sorted(complete), predictor)
        facts["pictured"] = ", ".join(f"{rank} {subject}" for rank, subject in chosen.items())
        write_report(folder / "report.html", f"Evaluation of {run.config.name}", facts, summaries, drawn)
        _write_summaries(folder, summaries)
        _track(run, folder, summaries)
        for network, summary in summaries.items():
            print_table(summary, f"{run.config.name}, {network}, {split} split of {source.dataset}, {len(subjects)} cases")
        Console().print(f"report: {folder / 'report.html'}", highlight=False, soft_wrap=True)
    return summaries[networks[0]]


def _evaluate_classes(
    run: TrainedRun, source: CaseSource, split: str, subjects: Sequence[str], folder: Path, notes: dict[str, str], rank: int, world: int
) -> dict[str, Any]:
    if run.config.inference.postprocess != "none":
        raise UserError(f"inference.postprocess {run.config.inference.postprocess}: is for label maps of tumours (WT, TC, ET); set it to none")
    notes = CONVENTIONS | notes
    networks, classes = _networks(run), source.classification.classes
    subsets = possible_subsets(source.sequences, run.method.subsets)
    decisions = decide(run.method, networks, source, subjects, subsets, run.config.inference, run.placed(), rank, world)
    name, fold = run.config.method["name"], run.config.data.fold
    summaries = {
        n: summarise_decisions([d for d in decisions if d.network == n], source.sequences, classes, name, split, fold, notes) for n in networks
    }
    if rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "summary.json").unlink(missing_ok=True)
        write_decisions(folder / "per_case.csv", decisions, classes)
        drawn = draw_class_figures(folder, summaries, decisions, classes)
        title = f"Evaluation of {run.config.name}"
        write_report(folder / "report.html", title, _facts(run, source, split, subjects), summaries, drawn, "classification.html.j2")
        _write_summaries(folder, summaries)
        _track(run, folder, summaries)
        for network, summary in summaries.items():
            print_accuracies(summary, f"{run.config.name}, {network}, {split} split of {source.dataset}, {len(subjects)} cases")
        Console().print(f"report: {folder / 'report.html'}", highlight=False, soft_wrap=True)
    return summaries[networks[0]]


def evaluate_predictions(
    pred_dir: Path, ref_dir: Path, spec_name: str, out: Path, options: EvaluateConfig | None = None
) -> dict[str, Any]:
    """Score label maps <subject>.nii.gz in `pred_dir` against the truth in `ref_dir`, on the files' own grid.

    The truth is a data set in the spec's layout, or label maps <subject>.nii.gz. What `mstkd predict` noted in
    predictions.json names the subset; without it the subset is "given". Writes per_case.csv and summary.json to
    `out` and returns the summary. Raises UserError: nothing to score, no truth for a prediction, another grid,
    label values outside the spec's scheme.
    """
    options, spec = options or EvaluateConfig(), load_spec(spec_name, Path(ref_dir))
    if spec.scheme is None:
        raise UserError(f"spec {spec_name}: declares no label scheme; there is nothing to score")
    predictions = _label_maps(Path(pred_dir))
    if not predictions:
        raise UserError(f"{pred_dir}: no predictions; expected <subject>.nii.gz")
    noted = Path(pred_dir) / "predictions.json"
    subsets = json.loads(noted.read_text()) if noted.is_file() else {}
    truths = _truths(Path(ref_dir), spec, predictions)
    rows = []
    for subject, path in predictions.items():
        if subject not in truths:
            raise UserError(f"{path}: no truth for subject {subject} in {ref_dir}")
        for region, score in _score_files(path, truths[subject], spec, options).items():
            rows.append(Row("predictions", subject, subsets.get(subject, "given"), region, score))
    notes = conventions(options) | {"cases": f"{len(predictions)} predictions scored; {len(truths)} subjects have a truth"}
    summary = summarise(rows, list(spec.sequences), None, "given", None, notes)
    Path(out).mkdir(parents=True, exist_ok=True)
    write_rows(Path(out) / "per_case.csv", rows)
    write_json(Path(out) / "summary.json", summary)
    print_table(summary, f"{pred_dir} against {ref_dir}")
    return summary


def _track(run: TrainedRun, folder: Path, summaries: dict[str, dict]) -> None:
    """The means, the figures and the tables as a child of the run in MLflow."""
    with open_evaluation(run.config, run.folder, folder.relative_to(run.folder).as_posix().replace("/", "-")) as tracker:
        for network, summary in summaries.items():
            for subset, regions in (*summary["subsets"].items(), ("mean", summary["mean"])):
                for region, figures in regions.items():
                    values = {f"{network}/{key}/{region}/{subset}": value for key, value in figures.items() if value is not None}
                    tracker.log_metrics(values, 0, "evaluation")
        for path in sorted(folder.iterdir()):
            if path.is_file():
                tracker.log_artifact(path, "evaluation")


def _label_maps(folder: Path) -> dict[str, Path]:
    return {path.name.removesuffix(".nii.gz"): path for path in sorted(folder.glob("*.nii.gz"))}


def _truths(ref_dir: Path, spec: DatasetSpec, subjects: Iterable[str]) -> dict[str, Path | Volume]:
    """Subject -> its true label map: <subject>.nii.gz in the scheme's values if such files are there, else as the spec says."""
    maps = _label_maps(ref_dir)
    if any(subject in maps for subject in subjects):
        return maps
    return {case.subject: case.label for case in spec.find_cases(ref_dir, require_complete=False) if case.label}


def _score_files(prediction: Path, truth: Path | Volume, spec: DatasetSpec, options: EvaluateConfig) -> dict[str, Any]:
    scheme = spec.scheme
    predicted, own_affine = _read_labels(prediction, scheme)
    true, affine = read_labels(truth, spec) if isinstance(truth, Volume) else _read_labels(truth, scheme)
    if predicted.shape != true.shape or not np.allclose(own_affine, affine, rtol=0, atol=AFFINE_TOLERANCE_MM):
        raise UserError(f"{prediction}: its grid (shape or affine) differs from that of {truth}; predict on the original grid")
    spacing_mm = tuple(nib.affines.voxel_sizes(affine).tolist())
    diagonal_mm = float(np.linalg.norm(np.multiply(true.shape, spacing_mm)))
    either = (predicted > 0) | (true > 0)
    box = bounding_box(either) if either.any() else (slice(1),) * 3  # outside it both are background
    return score_labels(references(true[box], scheme, spacing_mm, diagonal_mm), predicted[box], scheme, options)


def _read_labels(path: Path, scheme: LabelScheme) -> tuple[NDArray[np.uint8], NDArray[np.float64]]:
    labels, affine = read_volume(path)
    strange = [f"{value:g}" for value in np.unique(labels) if value not in scheme.values]
    if strange:
        raise UserError(f"{path}: label values {', '.join(strange[:5])} are outside scheme {scheme.name}; check --spec")
    return labels.astype(np.uint8), affine


def _check_data(run: TrainedRun, source: CaseSource, split: str, subjects: Sequence[str]) -> None:
    if not subjects:
        raise UserError(f"split {split} of data set {source.dataset} is empty; choose another --split")
    if source.sequences != run.facts.sequences:
        theirs, ours = ", ".join(source.sequences), ", ".join(run.facts.sequences)
        raise UserError(f"data set {source.dataset} has sequences {theirs}; the run was trained on {ours}, in that order")
    if source.classification != run.facts.classification:
        raise UserError(f"data set {source.dataset} has other classes, or views of another shape, than the run was trained on; build it the same way")


def _overlap_note(run: TrainedRun, source: CaseSource, split: str, allowed: bool) -> dict[str, str]:
    found = training_overlap(run.source.stores, run.config.data.fold, source.stores, split)
    if not (allowed or run.config.data.allow_overlap):
        refuse(found.unstated, split, "--allow-overlap")
    if not found.pairs:
        return {}
    seen = {other for _, other, _ in found.pairs}
    return {"overlap": f"ALLOWED OVERLAP: {len(seen)} of these cases were seen in training; the figures are optimistic"}


def _untrained_note(run: TrainedRun) -> dict[str, str]:
    """Subsets that are scored though training never showed them to the network."""
    method, sequences = run.method, run.facts.sequences
    entries = [store.subjects[key] for store in run.source.stores for key in split_subjects(store, "train", run.config.data.fold)]
    patterns = {tuple(name in entry.sequences for name in sequences) for entry in entries}
    if method.complete_only:
        patterns = {(True,) * len(sequences)}
    configs = [method.availability(stage) or run.config.data.availability for stage in run.config.stages or method.stages]
    seen = {subset for config in configs for subset in Availability(config, sequences).possible(patterns)}
    never = [subset_name(sequences, subset) for subset in possible_subsets(sequences, method.subsets) if subset not in seen]
    if not never:
        return {}
    log.warning("%s was never trained on %s", run.config.name, ", ".join(never))
    return {"never trained": f"{', '.join(never)}: training never gave these; the figures show what happens then, not what training could reach"}


def _networks(run: TrainedRun) -> list[str]:
    wanted = run.config.evaluate.networks
    unknown = sorted(set(wanted or ()) - set(run.networks))
    if unknown:
        raise UserError(f"evaluate.networks: {unknown[0]!r} is not trained or not scored; choose from {', '.join(run.networks)}")
    return [name for name in run.networks if wanted is None or name in wanted]


def _folder(run: TrainedRun, source: CaseSource, split: str, postprocess: str | None) -> Path:
    """evaluation/ for the run's own test split as its recipe says, evaluation/<data>-<split>[-<postprocess>]/ for anything else."""
    own, here = ([store.place for store in stores] for stores in (run.source.stores, source.stores))
    folder = run.folder / "evaluation"
    name = "+".join(place.rpartition("/")[2] for place in here)
    if postprocess:
        return folder / f"{name}-{split}-{postprocess}"
    return folder if own == here and split == "test" else folder / f"{name}-{split}"


def _write_summaries(folder: Path, summaries: dict[str, dict[str, Any]]) -> None:
    for number, (network, summary) in enumerate(summaries.items()):
        write_json(folder / (f"summary_{network}.json" if number else "summary.json"), summary)


def _cost(predictor: Predictor) -> dict[str, Any]:
    """By network: how long one case took from one subset, on this rank."""
    return {
        network: {"seconds_per_case": float(np.mean(seconds)), "predictions": len(seconds), "device": predictor.device.type}
        for network, seconds in predictor.seconds.items()
    }


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


def _facts(run: TrainedRun, source: CaseSource, split: str, subjects: Sequence[str]) -> dict[str, str]:
    return {
        "method": run.config.method["name"],
        "data": f"{source.dataset}, {split} split, {len(subjects)} cases",
        "trained on": f"{run.dataset}, fold {run.config.data.fold}",
    }


def _volume_facts(run: TrainedRun, baseline: dict[str, Any] | None) -> dict[str, str]:
    facts = {
        "window": f"{' x '.join(map(str, run.config.inference.window or run.config.data.crop))} voxels, overlap {run.config.inference.overlap:g}",
    }
    if baseline:
        text = f"WT Dice {percent(baseline['dice_nonempty'])} % (non-empty) if the whole brain were called tumour"
        Console().print(f"baseline: {text}", highlight=False)
        facts["floor"] = text
    return facts

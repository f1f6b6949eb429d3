"""Scoring cases: every subset in one pass over the data, cases shared out over ranks."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from math import prod

import numpy as np
from nibabel.affines import voxel_sizes
from numpy.typing import NDArray
from torch import Tensor

from mstkd.config import EvaluateConfig
from mstkd.errors import UserError
from mstkd.evaluate.calibration import calibration_error
from mstkd.evaluate.inference import Predictor, evaluation_mode
from mstkd.evaluate.kept import KeptScores
from mstkd.evaluate.metrics import Mask, dice, region_masks
from mstkd.evaluate.scoring import Region, Score, score
from mstkd.evaluate.sharing import score_each
from mstkd.evaluate.source import CaseSource
from mstkd.shards.spec import LabelScheme, SubjectMeta
from mstkd.subsets import Subset, part_of, subset_name

PRESENT = "present"  # in place of a subset's name: everything that the case has


@dataclass(frozen=True)
class Row:
    """One score: a network on a case, given a subset, in a region."""

    network: str
    subject: str
    subset: str
    region: str
    score: Score


def diagonal_mm(meta: SubjectMeta) -> float:
    """Length of the image's diagonal on its original grid."""
    return float(np.linalg.norm(np.asarray(meta.original_shape) * voxel_sizes(np.asarray(meta.original_affine))))


def references(
    label: NDArray[np.uint8], scheme: LabelScheme, spacing_mm: tuple[float, ...], diagonal_mm: float, image_voxels: int | None = None
) -> dict[str, Region]:
    """The truth of every region of a label map (X, Y, Z), which may be a box of an image of that diagonal and so many voxels."""
    return {region: Region(mask, spacing_mm, diagonal_mm, image_voxels) for region, mask in region_masks(label, scheme).items()}


def score_labels(
    truth: dict[str, Region], labels: NDArray[np.uint8], scheme: LabelScheme, options: EvaluateConfig | None
) -> dict[str, Score]:
    """Scores per region of a predicted label map (X, Y, Z) in `scheme`."""
    masks = region_masks(labels, scheme)
    return {region: score(reference, masks[region], options) for region, reference in truth.items()}


def with_calibration(scores: dict[str, Score], probabilities: dict[str, NDArray[np.float32]], truth: dict[str, Mask]) -> dict[str, Score]:
    """The scores with the calibration error of each region's probability (X, Y, Z) in the brain box."""
    return {region: replace(found, ece=calibration_error(probabilities[region], truth[region])) for region, found in scores.items()}


def score_subjects(
    predictor: Predictor,
    networks: Sequence[str],
    source: CaseSource,
    subjects: Sequence[str],
    subsets: Sequence[Subset] | None,
    scheme: LabelScheme,
    options: EvaluateConfig | None = None,
    rank: int = 0,
    world: int = 1,
    stopping: Callable[[], bool] | None = None,
    kept: KeptScores[Row] | None = None,
) -> list[Row]:
    """Rows of every subject x network x subset x region, the same on every rank and for any number of ranks.

    `scheme` is the one the method predicts in; the truth is read in the source's own. A subset is left out for a
    case that lacks one of its sequences; None: each case once, given all that it has. Without `options` Dice alone. Collective with several ranks.
    `stopping` (collective) is asked before each round of `world` cases; raises Stopped when it says so. `kept` as in `score_each`.
    """
    _check_regions(scheme, source)
    with evaluation_mode(*predictor.methods):
        return score_each(
            subjects, lambda key: _score_case(predictor, networks, source, key, subsets, scheme, options), rank, world, stopping, kept
        )


def whole_brain_baseline(source: CaseSource, subjects: Sequence[str]) -> dict[str, float | int | None]:
    """Dice of WT, over cases that have a tumour, when the whole brain is called tumour: the floor to beat."""
    scores = []
    for key in subjects:
        sample = source.subject(key)
        truth = region_masks(sample.label, source.label_scheme)["WT"]
        if truth.any():
            scores.append(dice(sample.brain > 0, truth))
    return {"dice_nonempty": float(np.mean(scores)) if scores else None, "n_nonempty": len(scores)}


def labelled(source: CaseSource, key: str) -> NDArray[np.uint8]:
    """The truth (X, Y, Z) of a case; UserError if it has none."""
    label = source.subject(key).label
    if label is None:
        raise UserError(f"subject {key} of data set {source.dataset} has no label; it cannot be scored")
    return label


def _check_regions(scheme: LabelScheme, source: CaseSource) -> None:
    if source.label_scheme is None:
        raise UserError(f"data set {source.dataset} has no labels; there is nothing to score against")
    if set(scheme.regions) != set(source.label_scheme.regions):
        raise UserError(f"label scheme {source.label_scheme.name} of data set {source.dataset} has other regions than {scheme.name} of the run")


def _score_case(predictor, networks, source, key, subsets, scheme, options) -> list[Row]:
    sample = source.subject(key)
    meta, label, spacing_mm = sample.meta, labelled(source, key), sample.meta.spacing_mm
    resampled = meta.grid_shape is not None and options is not None  # Dice alone, to choose a model by: the stored grid will do
    if resampled:
        label, spacing_mm = _file_label(source, key), tuple(voxel_sizes(np.asarray(meta.original_affine)))
    truth = references(label, source.label_scheme, spacing_mm, diagonal_mm(meta), prod(meta.original_shape))
    stored = region_masks(sample.label, source.label_scheme) if options and options.calibration else {}

    def scored(labels: NDArray[np.uint8], probabilities: dict[str, NDArray]) -> dict[str, Score]:
        scores = score_labels(truth, labels, scheme, options)
        return with_calibration(scores, probabilities, stored) if stored else scores

    case, found = predictor.case(sample), {}
    with ThreadPoolExecutor(max_workers=1) as scorer:  # one prediction is scored while the GPU makes the next one
        for name, subset in _given(subsets, case.present, predictor.sequences).items():
            volume, visible = case.given(subset)
            for network in networks:
                scores = predictor.scores(network, volume, visible)
                probabilities = _probabilities(predictor, scores, visible, scheme) if stored else {}
                labels = predictor.decide(scores, volume, visible, on_file=resampled)
                wait(found.values())  # so that no more than one lies in memory
                found[name, network] = scorer.submit(scored, labels, probabilities)
                if predictor.device.type == "cpu":  # scoring would take cores from the next prediction, which is timed
                    wait(found.values())
        rows = [Row(network, key, name, region, scores.result()[region]) for (name, network), scores in found.items() for region in scheme.regions]
    return sorted(rows, key=lambda row: networks.index(row.network))


def _probabilities(predictor: Predictor, scores: Tensor, subset: Subset, scheme: LabelScheme) -> dict[str, NDArray[np.float32]]:
    """Of every region, (X, Y, Z) on the stored grid."""
    found = predictor.probabilities(scores, subset)
    if found.keys() != scheme.regions.keys():
        raise UserError(f"evaluate.calibration: {type(predictor.method).__name__} tells no probabilities of {', '.join(scheme.regions)}; set it to false")
    return found


def _given(subsets: Sequence[Subset] | None, present: Subset, sequences: Sequence[str]) -> dict[str, Subset]:
    """What a case is scored on, by name."""
    if subsets is None:
        return {PRESENT: present}
    return {subset_name(sequences, subset): subset for subset in subsets if part_of(subset, present)}


def _file_label(source: CaseSource, key: str) -> NDArray[np.uint8]:
    label = source.file_label(key)
    if label is None:
        raise UserError(f"subject {key} was resampled and its set lacks the label on the file's own grid; score files with `mstkd evaluate --pred`")
    return label

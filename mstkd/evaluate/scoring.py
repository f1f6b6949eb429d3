"""What is measured of one region of one case under a recipe's `evaluate:` section, and what the figures mean in words."""

from dataclasses import dataclass

from mstkd.config import EvaluateConfig
from mstkd.evaluate.lesions import lesion_wise
from mstkd.evaluate.metrics import Mask, Reference, dice


@dataclass(frozen=True)
class Score:
    """How well one prediction matches one region of one case; None where it was not asked for."""

    dice: float
    truth_voxels: int
    predicted_voxels: int
    hd95_mm: float | None = None
    assd_mm: float | None = None
    lesion_dice: float | None = None
    lesion_hd95_mm: float | None = None


def score(reference: Reference, prediction: Mask, options: EvaluateConfig | None = None) -> Score:
    """Dice, and under `options` the distances; without options Dice alone (cheap, for validation)."""
    overlap, predicted = dice(prediction, reference.truth), int(prediction.sum())
    if options is None:
        return Score(overlap, reference.voxels, predicted)
    distances, one_empty_mm = reference.distances(prediction), 0.0 if options.empty == "reference" else None
    hd95_mm = distances.hd95_mm(options.hd95 == "pooled", one_empty_mm)
    assd_mm = distances.assd_mm(one_empty_mm) if options.assd else None
    lesions = lesion_wise(prediction, reference.truth, reference.spacing_mm) if options.lesion_wise else ()
    return Score(overlap, reference.voxels, predicted, hd95_mm, assd_mm, *lesions)


def conventions(options: EvaluateConfig) -> dict[str, str]:
    """What the figures mean, in words; printed under every table."""
    texts = {
        "dice": "2|P&T| / (|P|+|T|) on the original grid, whole volume; both empty 1, one empty 0; mean over cases",
        "dice_nonempty": "over cases whose truth is non-empty; a missed region counts 0",
        "hd95_mm": {
            "directed_max": "larger of the two directed 95th percentiles between 6-connected surface voxels, in mm",
            "pooled": "95th percentile of both directions' surface distances pooled, in mm",
        }[options.hd95],
        "hd95_empty": {
            "penalty": "both empty 0; one empty the image diagonal in mm (373.13 on 240x240x155 at 1 mm)",
            "reference": "both empty 0; one empty also 0, as in the reference code: this rewards missed lesions",
        }[options.empty],
        "hd95_nonempty_mm": "over the hd95_n cases where truth and prediction are both non-empty",
        "missed": "truth non-empty, prediction empty (cases); false_positive_cases: the reverse",
        "threshold": "labels as the method decides them (to_labels); scores are computed on that label map",
        "mean": "unweighted mean over subsets of the means over cases; counts are summed",
    }
    if options.assd:
        texts["assd_mm"] = "mean distance over the surface voxels of truth and prediction together, in mm; empty as for hd95_mm"
    if options.lesion_wise:
        texts["lesion_wise"] = (
            "BraTS 2023: truth dilated 3 times (18-connected), lesions 26-connected; truth lesions of 50 mm^3 or less left out; "
            "a false or missed lesion counts Dice 0 and HD95 374 mm"
        )
    return texts

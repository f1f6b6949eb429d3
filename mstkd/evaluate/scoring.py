"""What is measured of one region of one case under a recipe's `evaluate:` section, and what the figures mean in words."""

from dataclasses import dataclass
from functools import cached_property

from mstkd.config import EvaluateConfig
from mstkd.evaluate.calibration import BINS
from mstkd.evaluate.lesions import Lesions
from mstkd.evaluate.metrics import Mask, Reference
from mstkd.shards.spec import LabelScheme

ADDED = ("sensitivity", "specificity", "volumes", "assd_mm", "lesion_wise", "ece")  # conventions of figures that stand beside Dice and HD95


@dataclass(frozen=True)
class Score:
    """How well one prediction matches one region of one case; None where it was not asked for, or cannot be told."""

    dice: float
    truth_voxels: int
    predicted_voxels: int
    hd95_mm: float | None = None
    assd_mm: float | None = None
    lesion_dice: float | None = None
    lesion_hd95_mm: float | None = None
    sensitivity: float | None = None
    specificity: float | None = None
    truth_ml: float | None = None
    predicted_ml: float | None = None
    ece: float | None = None


class Region(Reference):
    """One region of one case's truth, and its lesions."""

    @cached_property
    def lesions(self) -> Lesions:
        return Lesions(self.truth, self.spacing_mm)


def score(reference: Region, prediction: Mask, options: EvaluateConfig | None = None) -> Score:
    """All but the calibration, which no label map tells; without options Dice alone (cheap, for validation)."""
    overlap = reference.overlap(prediction)
    if options is None:
        return Score(overlap.dice, overlap.truth, overlap.predicted)
    distances, one_empty_mm = reference.distances(prediction), 0.0 if options.empty == "reference" else None
    lesions = reference.lesions.score(prediction, distances) if options.lesion_wise else (None, None)
    return Score(
        dice=overlap.dice,
        truth_voxels=overlap.truth,
        predicted_voxels=overlap.predicted,
        hd95_mm=distances.hd95_mm(options.hd95 == "pooled", one_empty_mm),
        assd_mm=distances.assd_mm(one_empty_mm) if options.assd else None,
        lesion_dice=lesions[0],
        lesion_hd95_mm=lesions[1],
        sensitivity=overlap.sensitivity,
        specificity=overlap.specificity,
        truth_ml=overlap.truth * reference.voxel_ml,
        predicted_ml=overlap.predicted * reference.voxel_ml,
    )


def decided(options: EvaluateConfig, scheme: LabelScheme) -> EvaluateConfig:
    """`options` with `lesion_wise` said: by default where the scheme has tumours."""
    lesion_wise = {"WT", "TC", "ET"} <= scheme.regions.keys() if options.lesion_wise is None else options.lesion_wise
    return options.model_copy(update={"lesion_wise": lesion_wise})


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
        "sensitivity": "|P&T| / |T|, over cases whose truth is non-empty",
        "specificity": "|not P & not T| / |not T| over the whole volume on the original grid: most of that is air, so that it is always near 1",
        "volumes": "in ml: truth_ml, predicted_ml, volume_error_ml (predicted - truth: the bias), absolute_volume_error_ml; means over cases",
        "mean": "unweighted mean over subsets of the means over cases; counts are summed",
    }
    if options.assd:
        texts["assd_mm"] = "mean distance over the surface voxels of truth and prediction together, in mm; empty as for hd95_mm"
    if options.lesion_wise:
        texts["lesion_wise"] = (
            "BraTS 2023: truth dilated 3 times (18-connected), lesions 26-connected; truth lesions of 50 mm^3 or less left out; "
            "a false or missed lesion counts Dice 0 and HD95 374 mm; mean over a case's lesions, then over cases"
        )
    if options.calibration:
        texts["ece"] = (
            f"expected calibration error of a region's own probability, {BINS} bins of equal width: mean of |mean probability - share of true voxels| "
            "weighted by voxels, over all voxels of the stored box round the brain, before any post-processing; mean over cases. "
            "Most voxels are surely outside: it is small where the region is"
        )
    return texts

"""How an evaluation over subsets is written straight away: one pass per subset, MONAI's metrics on whole volumes."""

import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from monai.metrics import compute_dice, compute_hausdorff_distance
from monai.metrics.utils import get_edge_surface_distance
from nibabel.affines import voxel_sizes

from mstkd.evaluate.cases import diagonal_mm
from mstkd.evaluate.inference import Predictor, evaluation_mode
from mstkd.evaluate.metrics import Mask, region_masks
from mstkd.evaluate.source import CaseSource
from mstkd.shards.geometry import restore
from mstkd.shards.spec import SubjectMeta
from mstkd.subsets import Subset

Figures = dict[tuple[Subset, str], tuple[float, float]]  # by subset and region: Dice, HD95 in mm


class Stages:
    """Seconds by stage."""

    def __init__(self) -> None:
        self.seconds = {"loading": 0.0, "inference": 0.0, "metrics": 0.0}

    @contextmanager
    def of(self, stage: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.seconds[stage] += time.perf_counter() - began


def score_straightforwardly(
    predictor: Predictor, network: str, source: CaseSource, key: str, subsets: Sequence[Subset], stages: Stages, labels: dict[Subset, Mask]
) -> Figures:
    """One case from every subset, all of it anew each time; its label maps go to `labels`.

    The networks are applied as `mstkd evaluate` applies them, so that the figures must be equal. The case must not have been resampled.
    """
    figures: Figures = {}
    for subset in subsets:
        with stages.of("loading"):
            sample = source.subject(key)
            volume = predictor.volume(sample.image, sample.brain, sample.meta)
        with stages.of("inference"), evaluation_mode(predictor.method):
            labels[subset] = predictor.labels(network, volume, subset)
        with stages.of("metrics"):
            predicted, true = (region_masks(restore(found, sample.meta), source.label_scheme) for found in (labels[subset], sample.label))
            figures |= {(subset, region): _figures(predicted[region], true[region], sample.meta) for region in true}
    return figures


def _figures(prediction: Mask, truth: Mask, meta: SubjectMeta) -> tuple[float, float]:
    """Dice and HD95 in mm of whole volumes."""
    y_pred, y = (torch.from_numpy(mask)[None, None] for mask in (prediction, truth))
    dice = compute_dice(y_pred, y, ignore_empty=False).item()
    if not (prediction.any() and truth.any()):
        return dice, diagonal_mm(meta) if prediction.any() or truth.any() else 0.0
    with _quiet():
        return dice, compute_hausdorff_distance(y_pred, y, include_background=True, percentile=95, spacing=_spacing_mm(meta)).item()


def hd95_in_double_mm(prediction: Mask, truth: Mask, meta: SubjectMeta) -> float:
    """HD95 of whole volumes from MONAI's distances; its own percentile is interpolated in single precision, a few 1e-5 mm off on large surfaces."""
    with _quiet():
        pair = (torch.from_numpy(mask) for mask in (prediction, truth))
        _, distances, _ = get_edge_surface_distance(*pair, spacing=_spacing_mm(meta), symmetric=True)
    return max(float(np.percentile(found.double().numpy(), 95)) for found in distances)


def _spacing_mm(meta: SubjectMeta) -> list[float]:
    return voxel_sizes(np.asarray(meta.original_affine)).tolist()


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # MONAI's, about an argument of its own
        yield

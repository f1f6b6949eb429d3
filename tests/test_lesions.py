"""Lesions, volumes, sensitivity and specificity: against their definitions worked out the long way, MONAI and values by hand."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.metrics import compute_confusion_matrix_metric, get_confusion_matrix
from scipy.ndimage import binary_dilation, generate_binary_structure, label

from mstkd.config import EvaluateConfig
from mstkd.evaluate.lesions import DILATIONS, PENALTY_MM, SMALLEST_MM3, Lesions
from mstkd.evaluate.metrics import Overlap, Reference, dice
from mstkd.evaluate.scoring import Region, conventions, decided, score
from mstkd.shards.spec import LABEL_SCHEMES

SHAPE, SPACING = (26, 22, 18), (0.9, 1.3, 2.5)


def scattered(seed: int, boxes: int, shape=SHAPE) -> np.ndarray:
    """A mask of solid boxes, which may be near or apart, some at the border, and a few single voxels."""
    rng = np.random.default_rng(seed)
    mask = rng.random(shape) < 0.0005
    for _ in range(boxes):
        low = rng.integers(0, np.array(shape) - 2)
        mask[tuple(slice(a, a + n) for a, n in zip(low, rng.integers(1, 6, 3)))] = True
    return mask


def step_by_step(prediction, truth, spacing_mm):
    """The definition, nothing shared: whole volumes, a dilation and a Reference per lesion. Padded: lesions may meet beyond the volume."""
    prediction, truth = np.pad(prediction, DILATIONS), np.pad(truth, DILATIONS)
    near, everywhere = generate_binary_structure(3, 2), np.ones((3, 3, 3))
    grown, count = label(binary_dilation(truth, near, DILATIONS), everywhere)
    predicted, predicted_count = label(prediction, everywhere)
    matched, scores = set(), []
    for number in range(1, count + 1):
        lesion = truth & (grown == number)
        touching = set(np.unique(predicted[binary_dilation(lesion, near, DILATIONS)])) - {0}
        matched |= touching
        if np.count_nonzero(lesion) * np.prod(spacing_mm) > SMALLEST_MM3:
            found = np.isin(predicted, sorted(touching)) & prediction
            scores.append((dice(found, lesion), Reference(lesion, spacing_mm, PENALTY_MM).hd95_mm(found)))
    scores += [(0.0, PENALTY_MM)] * (predicted_count - len(matched))
    return tuple(np.mean(scores, axis=0)) if scores else (1.0, 0.0)


@settings(max_examples=60)
@given(st.integers(0, 10**6), st.integers(0, 4), st.integers(0, 5))
def test_lesion_wise_is_its_definition(seed, lesions, found):
    truth, prediction = scattered(seed, lesions), scattered(seed + 1, found)
    region = Region(truth, SPACING, 100.0)
    for other in (prediction, truth, prediction | truth, truth & ~prediction):  # one truth, scored again and again
        assert region.lesions.score(other, region.distances(other)) == pytest.approx(step_by_step(other, truth, SPACING), abs=1e-9)


def test_a_component_between_two_lesions_belongs_to_both():
    truth, prediction = np.zeros((2, 40, 12, 12), bool)
    truth[3:9, 3:9, 3:9] = truth[24:30, 3:9, 3:9] = True
    prediction[5:28, 5:7, 5:7] = True
    region = Region(truth, (1, 1, 1), 100.0)
    expected = step_by_step(prediction, truth, (1, 1, 1))
    assert 0 < expected[0] < 0.3 and region.lesions.score(prediction, region.distances(prediction)) == pytest.approx(expected)


@settings(max_examples=40)
@given(st.integers(0, 10**6))
def test_a_map_that_served_another_prediction_serves_this_one(seed):
    truth, used = scattered(seed, 2), None
    truth[10:13, 10:13, 8:11] = True
    used = Reference(truth, SPACING, 100.0)
    small = np.zeros_like(truth)
    small[11:14, 11:13, 8:10] = True
    for prediction in (small, scattered(seed + 1, 3), truth, small):
        fresh = Reference(truth, SPACING, 100.0).distances(prediction)
        again = used.distances(prediction)
        np.testing.assert_allclose(again.from_prediction, fresh.from_prediction, rtol=1e-12)
        assert again.hd95_mm() == pytest.approx(fresh.hd95_mm(), rel=1e-12)


@pytest.mark.parametrize("seed", range(8))
def test_sensitivity_and_specificity_are_monais(seed):
    truth, prediction = scattered(seed, 3), scattered(100 + seed, 3)
    matrix = get_confusion_matrix(*(torch.from_numpy(mask)[None, None].float() for mask in (prediction, truth)))
    found = score(Region(truth, SPACING, 100.0), prediction, EvaluateConfig())
    for name in ("sensitivity", "specificity"):
        assert getattr(found, name) == pytest.approx(compute_confusion_matrix_metric(name, matrix).item(), abs=1e-6)


def test_specificity_counts_the_whole_image_and_not_the_box():
    truth, prediction = np.zeros((2, 4, 5, 5), bool)
    truth[0, 0, :2], prediction[0, 0, 1:4] = True, True  # 1 of 2 found, 2 falsely
    assert score(Region(truth, (1, 1, 1), 9.0, image_voxels=1002), prediction, EvaluateConfig()).specificity == pytest.approx(1 - 2 / 1000)
    assert score(Region(truth, (1, 1, 1), 9.0), prediction, EvaluateConfig()).specificity == pytest.approx(1 - 2 / 98)


def test_nothing_to_find_has_no_sensitivity_and_a_full_image_no_specificity():
    nothing, everything = np.zeros((3, 3, 3), bool), np.ones((3, 3, 3), bool)
    assert Overlap.of(everything, nothing, 27).sensitivity is None and Overlap.of(everything, nothing, 27).specificity == 0
    assert Overlap.of(nothing, everything, 27).specificity is None and Overlap.of(nothing, everything, 27).sensitivity == 0


def test_volumes_are_in_millilitres():
    truth, prediction = np.zeros((2, 10, 10, 10), bool)
    truth[:5], prediction[:4] = True, True
    found = score(Region(truth, (2, 1, 0.5), 9.0), prediction, EvaluateConfig())
    assert (found.truth_ml, found.predicted_ml) == (0.5, 0.4)
    assert score(Region(truth, (2, 1, 0.5), 9.0), prediction).truth_ml is None  # Dice alone


def test_lesions_are_looked_for_where_there_are_tumours():
    assert decided(EvaluateConfig(), LABEL_SCHEMES["brats2018"]).lesion_wise and not decided(EvaluateConfig(), LABEL_SCHEMES["tissue3"]).lesion_wise
    assert not decided(EvaluateConfig(lesion_wise=False), LABEL_SCHEMES["brats2018"]).lesion_wise
    truth = scattered(3, 2)
    for wanted in (True, False):
        options = EvaluateConfig(lesion_wise=wanted)
        assert (score(Region(truth, SPACING, 100.0), truth, options).lesion_dice == 1.0) == wanted
        assert ("lesion_wise" in conventions(options)) == wanted


def test_a_lesion_is_scored_alike_wherever_the_volume_ends():
    truth = scattered(11, 3)
    prediction = scattered(12, 3)
    distances = Region(truth, SPACING, 100.0).distances(prediction)
    wide = Region(np.pad(truth, 7), SPACING, 100.0)
    assert Lesions(truth, SPACING).score(prediction, distances) == pytest.approx(wide.lesions.score(np.pad(prediction, 7), wide.distances(np.pad(prediction, 7))))

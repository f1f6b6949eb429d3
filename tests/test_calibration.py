"""Calibration: its error in closed form, and regions' probabilities that agree with the label maps."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mstkd.errors import UserError
from mstkd.evaluate.calibration import BINS, calibration_error
from mstkd.evaluate.metrics import region_masks
from mstkd.shards.spec import LABEL_SCHEMES
from mstkd.targets import ExclusiveClasses, SidelessClasses, TumourChannels

SHAPE = (7, 6, 5)


def test_a_coin_that_says_so_is_calibrated():
    truth = np.zeros((10, 10, 10), bool)
    truth[:3] = True
    assert calibration_error(np.full(truth.shape, 0.3, np.float32), truth) == pytest.approx(0, abs=1e-7)
    assert calibration_error(np.full(truth.shape, 0.8, np.float32), truth) == pytest.approx(0.5)
    assert calibration_error(truth.astype(np.float32), truth) == 0 and calibration_error(1 - truth.astype(np.float32), truth) == 1


def test_errors_of_bins_do_not_cancel():
    truth = np.array([False] * 50 + [True] * 50).reshape(10, 10, 1)
    probability = np.array([0.2] * 50 + [0.8] * 50, np.float32).reshape(10, 10, 1)
    assert calibration_error(probability, truth) == pytest.approx(0.2)  # 0.2 too high below, 0.2 too low above


@settings(max_examples=50)
@given(st.integers(0, 10**6))
def test_the_error_is_that_of_its_definition(seed):
    rng = np.random.default_rng(seed)
    truth, probability = rng.random(SHAPE) < rng.random(), rng.random(SHAPE).astype(np.float32) ** rng.integers(1, 5)
    expected = 0.0
    for k in range(BINS):
        inside = (probability * BINS >= k) & (probability * BINS < k + 1) | ((k == BINS - 1) & (probability == 1))
        if inside.any():
            expected += inside.mean() * abs(probability[inside].mean(dtype=np.float64) - truth[inside].mean())
    assert calibration_error(probability, truth) == pytest.approx(expected, abs=1e-6)


def test_what_is_no_number_is_refused():
    with pytest.raises(UserError, match="evaluate.calibration: the network's probabilities hold NaN"):
        calibration_error(np.full(SHAPE, np.nan, np.float32), np.zeros(SHAPE, bool))


@pytest.mark.parametrize("targets", ["region", "disjoint"])
def test_a_region_is_painted_where_it_or_what_lies_in_it_is_probable(targets):
    channels = TumourChannels(LABEL_SCHEMES["brats2018"], targets, rc_channel=False)
    logits = torch.randn(2, channels.count, *SHAPE, generator=torch.Generator().manual_seed(0))
    probable = {region: (p > 0.5).numpy() for region, p in channels.probabilities(logits).items()}
    painted = region_masks(channels.decode(logits).numpy(), LABEL_SCHEMES["brats2018"])
    union = {"WT": probable["WT"] | probable["TC"] | probable["ET"], "TC": probable["TC"] | probable["ET"], "ET": probable["ET"]}
    for region in ("WT", "TC", "ET"):
        np.testing.assert_array_equal(painted[region], union[region])
        if targets == "disjoint":
            np.testing.assert_array_equal(painted[region], probable[region])


def test_probabilities_of_classes_add_up():
    scheme = LABEL_SCHEMES["tissue3"]
    classes = ExclusiveClasses(scheme)
    logits = torch.randn(1, classes.count, *SHAPE, generator=torch.Generator().manual_seed(0))
    found = classes.probabilities(logits)
    assert list(found) == ["CSF", "GM", "WM"]
    torch.testing.assert_close(sum(found.values()), 1 - logits.softmax(1)[:, 0])
    tumour = ExclusiveClasses(LABEL_SCHEMES["brats2018"])
    found = tumour.probabilities(logits)
    torch.testing.assert_close(found["WT"], 1 - logits.softmax(1)[:, 0])
    assert (found["ET"] <= found["TC"]).all() and (found["TC"] <= found["WT"]).all()


def test_who_cannot_tell_sides_gives_both_the_same():
    classes = SidelessClasses(LABEL_SCHEMES["malc27"])
    logits = torch.randn(1, classes.count, *SHAPE, generator=torch.Generator().manual_seed(0))
    found = classes.probabilities(logits)
    torch.testing.assert_close(found["left_thalamus"], found["right_thalamus"])
    assert set(found) == set(LABEL_SCHEMES["malc27"].regions)

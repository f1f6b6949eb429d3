"""Dice, HD95, lesion-wise scores, subsets: against MONAI, brute force and values worked out by hand."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.metrics import compute_average_surface_distance, compute_hausdorff_distance
from scipy.spatial.distance import cdist

from mstkd.config import EvaluateConfig
from mstkd.errors import UserError
from mstkd.evaluate.cases import diagonal_mm, references, score_labels
from mstkd.evaluate.lesions import Lesions
from mstkd.evaluate.metrics import dice, region_masks, surface_voxels
from mstkd.evaluate.scoring import Region, conventions, score
from mstkd.shards.spec import LABEL_SCHEMES, SequenceStats, SubjectMeta
from mstkd.subsets import all_subsets, parse_subset, subset_name

SEQUENCES = ("flair", "t1", "t1ce", "t2")
SCHEME = LABEL_SCHEMES["brats2018"]
ANISOTROPIC = (0.9, 1.3, 2.5)


def blobs(seed: int, shape=(17, 14, 11)) -> np.ndarray:
    """A random mask of solid boxes, some at the border of the volume."""
    rng = np.random.default_rng(seed)
    mask = np.zeros(shape, bool)
    for _ in range(3):
        low = rng.integers(0, np.array(shape) - 2)
        high = low + rng.integers(1, 7, 3)
        mask[tuple(slice(a, b) for a, b in zip(low, high))] = True
    return mask ^ (rng.random(shape) < 0.01)


def reference(mask, spacing=(1.0, 1.0, 1.0)):
    return Region(mask, spacing, 100.0)


@pytest.mark.parametrize("seed", range(25))
def test_hd95_is_monais(seed):
    truth, prediction = blobs(seed), blobs(1000 + seed)
    expected = compute_hausdorff_distance(
        torch.from_numpy(prediction)[None, None], torch.from_numpy(truth)[None, None],
        include_background=True, percentile=95, spacing=list(ANISOTROPIC),
    ).item()  # fmt: skip
    assert reference(truth, ANISOTROPIC).hd95_mm(prediction) == pytest.approx(expected, rel=1e-5)
    assert reference(prediction, ANISOTROPIC).hd95_mm(truth) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("seed", range(5))
def test_pooled_hd95_is_the_percentile_of_all_surface_distances(seed):
    truth, prediction = blobs(seed), blobs(2000 + seed)
    apart = cdist(surface_voxels(prediction) * ANISOTROPIC, surface_voxels(truth) * ANISOTROPIC)
    expected = np.percentile(np.concatenate([apart.min(0), apart.min(1)]), 95)
    assert reference(truth, ANISOTROPIC).hd95_mm(prediction, pooled=True) == pytest.approx(expected)


@pytest.mark.parametrize("seed", range(25))
def test_assd_is_monais(seed):
    truth, prediction = blobs(seed), blobs(1000 + seed)
    expected = compute_average_surface_distance(
        torch.from_numpy(prediction)[None, None], torch.from_numpy(truth)[None, None],
        include_background=True, symmetric=True, spacing=list(ANISOTROPIC),
    ).item()  # fmt: skip
    assert score(reference(truth, ANISOTROPIC), prediction, EvaluateConfig(assd=True)).assd_mm == pytest.approx(expected, rel=1e-5)


def test_assd_of_empty_masks_is_that_of_hd95():
    some, none = blobs(1), np.zeros_like(blobs(1))
    for truth, prediction, expected in ((none, none, 0.0), (some, none, 100.0), (none, some, 100.0), (some, some, 0.0)):
        assert score(reference(truth), prediction, EvaluateConfig(assd=True)).assd_mm == expected
    assert score(reference(some), none, EvaluateConfig(assd=True, empty="reference")).assd_mm == 0.0
    assert score(reference(some), some, EvaluateConfig()).assd_mm is None


def test_surface_is_six_connected_and_the_border_counts_as_outside():
    cube = np.zeros((9, 9, 9), bool)
    cube[2:7, 2:7, 2:7] = True
    assert len(surface_voxels(cube)) == 5**3 - 3**3
    at_border = np.ones((4, 4, 4), bool)
    assert len(surface_voxels(at_border)) == 4**3 - 2**3
    notch = cube.copy()
    notch[2, 2, 2] = False  # its diagonal neighbour keeps six neighbours
    assert (3, 3, 3) not in set(map(tuple, surface_voxels(notch)))
    assert surface_voxels(np.zeros((3, 3, 3), bool)).shape == (0, 3)


def test_hd95_of_two_voxels_and_of_equal_masks():
    one, other = np.zeros((2, 8, 8, 8), bool)
    one[1, 2, 2] = other[4, 2, 2] = True
    assert reference(one).hd95_mm(other) == 3.0
    assert reference(one, (2.0, 1.0, 1.0)).hd95_mm(other) == 6.0
    assert reference(blobs(1)).hd95_mm(blobs(1)) == 0.0


def test_empty_rules():
    empty, full = np.zeros((6, 6, 6), bool), blobs(3, (6, 6, 6))
    ours, theirs = EvaluateConfig(), EvaluateConfig(empty="reference")
    both = score(reference(empty), empty, ours)
    assert (both.dice, both.hd95_mm) == (1.0, 0.0)
    for truth, prediction in ((empty, full), (full, empty)):
        assert (score(reference(truth), prediction, ours).dice, score(reference(truth), prediction, ours).hd95_mm) == (0.0, 100.0)
        assert score(reference(truth), prediction, theirs).hd95_mm == 0.0
    assert score(reference(full), full).hd95_mm is None  # Dice alone
    assert "373.13" in conventions(ours)["hd95_empty"] and "rewards missed" in conventions(theirs)["hd95_empty"]


def test_dice_by_hand():
    truth, prediction = np.zeros((2, 10), bool)
    truth[:6], prediction[4:8] = True, True
    assert dice(prediction, truth) == pytest.approx(2 * 2 / (6 + 4))


def meta(shape, affine, orientation):
    stats = SequenceStats(mean=0, std=1, min=0, max=1, p0_1=0, p0_5=0, p99_5=1, p99_9=1)
    return SubjectMeta(
        subject="a", patient="a", sequences=("flair",), stats={"flair": stats}, spacing_mm=(1, 1, 1), original_shape=shape,
        original_affine=affine, orientation=orientation, crop_box=((0, 1),) * 3,
    )  # fmt: skip


def test_penalty_is_the_diagonal_of_the_original_grid():
    brats = ((-1, 0, 0, 0), (0, -1, 0, 239), (0, 0, 1, 0), (0, 0, 0, 1))
    assert diagonal_mm(meta((240, 240, 155), brats, "LPS")) == pytest.approx(373.13, abs=5e-3)
    turned = ((0, 0, 2, 0), (-3, 0, 0, 0), (0, -1, 0, 0), (0, 0, 0, 1))  # file axes 3, 1 and 2 mm
    assert diagonal_mm(meta((10, 20, 30), turned, "PIR")) == pytest.approx(np.sqrt(30**2 + 20**2 + 60**2))


@settings(max_examples=25)
@given(st.integers(0, 10**6), st.tuples(*[st.tuples(st.integers(0, 5), st.integers(0, 5))] * 3), st.booleans())
def test_scoring_in_the_brain_box_equals_scoring_on_the_original_grid(seed, margins, pooled):
    rng = np.random.default_rng(seed)
    values = np.array(SCHEME.values, np.uint8)
    truth, prediction = (np.where(blobs(seed + k), rng.choice(values, (17, 14, 11)), 0).astype(np.uint8) for k in (0, 7))
    options = EvaluateConfig(lesion_wise=True, hd95="pooled" if pooled else "directed_max")
    padded = np.pad(truth, margins)
    inside = score_labels(references(truth, SCHEME, ANISOTROPIC, 50.0, padded.size), prediction, SCHEME, options)
    whole = score_labels(references(padded, SCHEME, ANISOTROPIC, 50.0), np.pad(prediction, margins), SCHEME, options)
    for region in SCHEME.regions:
        assert vars(inside[region]) == pytest.approx(vars(whole[region]))


def lesion(*boxes, shape=(40, 40, 40)):
    mask = np.zeros(shape, bool)
    for corner, size in boxes:
        mask[tuple(slice(c, c + size) for c in corner)] = True
    return mask


def lesion_wise(prediction, truth, spacing_mm):
    return Lesions(truth, spacing_mm).score(prediction, Region(truth, spacing_mm, 100.0).distances(prediction))


def test_lesion_wise_counts_each_lesion_once():
    first, second, elsewhere = ((2, 2, 2), 5), ((25, 25, 25), 5), ((2, 30, 2), 4)
    truth = lesion(first, second)
    assert lesion_wise(truth, truth, (1, 1, 1)) == (1.0, 0.0)
    assert lesion_wise(lesion(first), truth, (1, 1, 1)) == (0.5, 187.0)  # one missed: Dice 0, 374 mm
    assert lesion_wise(lesion(first, second, elsewhere), truth, (1, 1, 1)) == pytest.approx((2 / 3, 374 / 3))  # one false
    assert lesion_wise(lesion(), lesion(), (1, 1, 1)) == (1.0, 0.0)
    assert lesion_wise(lesion(first), lesion(), (1, 1, 1)) == (0.0, 374.0)


def test_lesion_wise_leaves_small_lesions_out_and_joins_near_ones():
    big, small = ((2, 2, 2), 5), ((25, 25, 25), 3)  # 125 and 27 voxels
    assert lesion_wise(lesion(big), lesion(big, small), (1, 1, 1)) == (1.0, 0.0)
    assert lesion_wise(lesion(big), lesion(big, small), (2, 1, 1))[0] == 0.5  # 54 mm^3 is above the limit
    # a found small lesion is no false one
    assert lesion_wise(lesion(big, small), lesion(big, small), (1, 1, 1)) == (1.0, 0.0)
    near, far = ((12, 2, 2), 5), ((14, 2, 2), 5)  # 5 and 7 voxels off: the dilations meet, or do not
    assert lesion_wise(lesion(big), lesion(big, near), (1, 1, 1))[0] == pytest.approx(2 / 3)  # one lesion, half found
    assert lesion_wise(lesion(big), lesion(big, far), (1, 1, 1))[0] == 0.5


def test_regions_follow_the_scheme():
    labels = np.array([0, 1, 2, 3, 4], np.uint8).reshape(5, 1, 1)
    brats2024 = region_masks(labels, LABEL_SCHEMES["brats2024"])
    assert brats2024["WT"].ravel().tolist() == [False, True, True, True, False]  # the resection cavity is in no region
    assert region_masks(labels, SCHEME)["ET"].ravel().tolist() == [False, False, False, False, True]


def test_subsets():
    subsets = all_subsets(SEQUENCES)
    names = [subset_name(SEQUENCES, subset) for subset in subsets]
    assert len(set(subsets)) == 15 and names[:5] == ["flair", "t1", "t1ce", "t2", "flair+t1"] and names[-1] == "flair+t1+t1ce+t2"
    assert [parse_subset(name, SEQUENCES) for name in names] == subsets
    for wrong in ("flair+pd", "flair+flair", ""):
        with pytest.raises(UserError, match="join different ones of flair, t1"):
            parse_subset(wrong, SEQUENCES)

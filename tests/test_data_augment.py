"""The crop and the augmentation: image, brain and label stay together, and nothing depends on anything but the draws."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mstkd.config import AugmentConfig
from mstkd.data.augment import augment_geometry, augment_intensity
from mstkd.data.crop import crop
from mstkd.data.sample import Sample, rng
from mstkd.shards.spec import SubjectMeta

OFF = AugmentConfig(flip_prob=0)


def sample_of(image, brain=None, label=None, spacing_mm=(1.0, 1.0, 1.0)):
    shape = image.shape[1:]
    meta = SubjectMeta(
        subject="s", patient="s", sequences=(), stats={}, spacing_mm=spacing_mm, original_shape=shape,
        original_affine=tuple(map(tuple, np.eye(4))), orientation="RAS", crop_box=tuple((0, n) for n in shape),
    )  # fmt: skip
    return Sample(image, np.ones(shape, np.uint8) if brain is None else brain, label, meta)


def numbered(shape):
    """A volume whose voxels carry their own number (exact in float32), as image (1, X, Y, Z) and as label."""
    number = np.arange(np.prod(shape)).reshape(shape)
    return number[None].astype(np.float32), number


sizes = st.tuples(*[st.integers(1, 9)] * 3)


@given(sizes, sizes, st.integers(0, 10**6), st.sampled_from([0.0, 1.0]))
def test_a_crop_is_a_piece_of_the_volume_padded_evenly(shape, size, seed, share):
    image, number = numbered(shape)
    label = (number % 3 == 0).astype(np.uint8)
    cut = crop(sample_of(image + 1, label=label), size, share, rng(seed))
    assert cut.image.shape == (1, *size) and cut.brain.shape == cut.label.shape == size
    assert cut.image.dtype == np.float32 and cut.brain.dtype == cut.label.dtype == np.uint8
    kept = tuple(slice((c - min(n, c)) // 2, (c - min(n, c)) // 2 + min(n, c)) for n, c in zip(shape, size))
    outside = np.ones(size, bool)
    outside[kept] = False
    for volume in (cut.image[0], cut.brain, cut.label):
        assert (volume[outside] == 0).all()
    assert (cut.brain[kept] == 1).all()
    values = cut.image[0][kept] - 1
    start = np.unravel_index(int(values.flat[0]), shape)
    box = tuple(slice(s, s + min(n, c)) for s, n, c in zip(start, shape, size))
    assert (values == number[box]).all() and (cut.label[kept] == label[box]).all()


def test_uniform_crops_reach_every_place_equally_often():
    image, number = numbered((6, 1, 1))
    starts = [int(crop(sample_of(image), (4, 1, 1), 0, rng(i)).image[0, 0, 0, 0]) for i in range(3000)]
    counts = np.bincount(starts, minlength=3)
    assert len(counts) == 3 and (abs(counts - 1000) < 5 * np.sqrt(1000 * 2 / 3)).all()


def test_foreground_crops_hold_the_labelled_voxel_in_their_middle_half():
    label = np.zeros((40, 40, 40), np.uint8)
    label[30, 9, 20] = 1
    sample = sample_of(np.zeros((1, 40, 40, 40), np.float32), label=label)
    places = set()
    for i in range(200):
        place = np.argwhere(crop(sample, (16, 16, 16), 1.0, rng(i)).label)
        assert len(place) == 1 and (place >= 4).all() and (place <= 12).all()
        places.add(tuple(place[0]))
    assert len(places) > 50
    share = np.mean([crop(sample, (8, 8, 8), 0.5, rng(i)).label.any() for i in range(1000)])
    assert 0.4 < share < 0.6


def test_a_foreground_crop_of_a_subject_without_label_voxels_is_uniform():
    sample = sample_of(np.zeros((1, 9, 9, 9), np.float32), label=np.zeros((9, 9, 9), np.uint8))
    assert crop(sample, (4, 4, 4), 1.0, rng(0)).image.shape == (1, 4, 4, 4)


def test_augmentation_that_is_off_returns_the_very_arrays():
    sample = sample_of(numbered((4, 5, 6))[0])
    assert augment_geometry(sample, OFF, rng(0)) is sample
    assert augment_intensity(sample.image, sample.brain, np.array([True]), OFF, rng(0)) is sample.image


def test_flips_move_image_brain_and_label_together_and_hit_every_axis():
    image, number = numbered((4, 5, 6))
    label = (number % 251).astype(np.uint8)
    brain = (number % 2).astype(np.uint8)
    seen = set()
    for i in range(60):
        flipped = augment_geometry(sample_of(image, brain, label), AugmentConfig(flip_prob=0.5), rng(i))
        where = flipped.image[0].astype(int)
        assert sorted(where.flat) == list(range(number.size))
        assert (flipped.label == label.flat[where]).all() and (flipped.brain == brain.flat[where]).all()
        corner = np.unravel_index(where[0, 0, 0], number.shape)
        seen.add(tuple(c > 0 for c in corner))
    assert len(seen) == 8


@pytest.mark.parametrize(("axes", "axial", "ways"), [("x", False, {(0,), ()}), ("xz", True, {(0,), ()}), ("yz", False, {(), (1,), (2,), (1, 2)}), ("", False, {()})])
def test_flips_stay_on_the_axes_that_are_named(axes, axial, ways):
    image, _ = numbered((4, 5, 6))
    seen = set()
    for i in range(40):
        flipped = augment_geometry(sample_of(image), AugmentConfig(flip_axes=axes), rng(i), axial).image[0]
        seen |= {way for way in ways if np.array_equal(flipped, np.flip(image[0], way))} or {"another"}
    assert seen == ways


def test_rotation_of_180_degrees_is_two_flips():
    image, number = numbered((6, 8, 4))
    config = AugmentConfig(flip_prob=0, rotate_deg=180)

    class HalfTurnAboutZ:  # the draws: no flip, (0, 0, 180) degrees
        random = staticmethod(lambda n: np.full(n, 0.99))
        uniform = staticmethod(lambda low, high, n=None: 0.0 if n is None else np.array([0.0, 0.0, 180.0]))

    turned = augment_geometry(sample_of(image, label=(number % 200).astype(np.uint8)), config, HalfTurnAboutZ)
    np.testing.assert_allclose(turned.image, image[:, ::-1, ::-1], atol=1e-3)
    assert (turned.label == (number % 200)[::-1, ::-1]).all()


@pytest.mark.parametrize("axis, from_axis", [(0, 1), (1, 0)])
def test_rotation_is_rigid_in_millimetres(axis, from_axis):
    """A quarter turn about z of a bar 20 mm long, with 1 x 2 mm voxels in a field of 40 x 60 mm: still 20 mm long."""
    spacing_mm, shape = (1.0, 2.0, 1.0), (40, 30, 1)
    grid_mm = [(np.arange(n) - (n - 1) / 2) * s for n, s in zip(shape, spacing_mm)]
    bar = [(-10, 10) if a == from_axis else (-3, 3) for a in range(2)]
    brain = np.logical_and.outer(*[(low <= g) & (g <= high) for g, (low, high) in zip(grid_mm, bar)])[..., None].astype(np.uint8)

    class QuarterTurnAboutZ:
        random = staticmethod(lambda n: np.full(n, 0.99))
        uniform = staticmethod(lambda low, high, n=None: 0.0 if n is None else np.array([0.0, 0.0, 90.0]))

    sample = sample_of(brain[None].astype(np.float32), brain, spacing_mm=spacing_mm)
    turned = augment_geometry(sample, AugmentConfig(flip_prob=0, rotate_deg=180), QuarterTurnAboutZ)
    length_mm = np.ptp(np.argwhere(turned.brain)[:, axis]) * spacing_mm[axis]
    width_mm = np.ptp(np.argwhere(turned.brain)[:, from_axis]) * spacing_mm[from_axis]
    assert abs(length_mm - 20) <= 3 and abs(width_mm - 6) <= 3


@settings(max_examples=15)
@given(st.integers(0, 10**6))
def test_image_brain_and_label_agree_after_rotation_and_zoom(seed):
    x, y, z = np.mgrid[-1:1:24j, -1:1:28j, -1:1:20j]
    ball = ((x - 0.2) ** 2 + (y + 0.1) ** 2 + z**2 < 0.25).astype(np.uint8)
    config = AugmentConfig(flip_prob=0.5, rotate_deg=30, zoom=0.2)
    moved = augment_geometry(sample_of(ball[None].astype(np.float32), ball, ball), config, rng(seed))
    assert (moved.brain == moved.label).all() and moved.brain.any()
    assert set(np.unique(moved.label)) <= {0, 1}
    half = moved.image[0] > 0.5  # trilinear at half height against nearest
    dice = 2 * (half & (moved.brain > 0)).sum() / (half.sum() + moved.brain.sum())
    assert dice > 0.9
    again = augment_geometry(sample_of(ball[None].astype(np.float32), ball, ball), config, rng(seed))
    assert (again.image == moved.image).all()


def test_zoom_scales_about_the_centre():
    brain = np.zeros((41, 41, 41), np.uint8)
    brain[15:26, 15:26, 15:26] = 1

    class Twice:  # a zoom of 1 + 0.5
        random = staticmethod(lambda n: np.full(n, 0.99))
        uniform = staticmethod(lambda low, high, n=None: 0.5 if n is None else np.zeros(n))

    moved = augment_geometry(sample_of(brain[None].astype(np.float32), brain), AugmentConfig(flip_prob=0, zoom=0.5), Twice)
    places = np.argwhere(moved.brain)
    assert (places.mean(0) == 20).all() and abs(np.ptp(places[:, 0]) - 15.5) < 1.6


def test_intensity_changes_brain_voxels_of_present_sequences_alone():
    image = np.full((3, 6, 6, 6), 0.5, np.float32)
    brain = rng(1).integers(0, 2, (6, 6, 6)).astype(np.uint8)
    present = np.array([True, False, True])
    for config in (
        AugmentConfig(intensity_scale=0.3),
        AugmentConfig(intensity_shift=0.3),
        AugmentConfig(noise_std=0.1),
        AugmentConfig(intensity_scale=0.3, intensity_shift=0.3, noise_std=0.1),
    ):
        changed = augment_intensity(image, brain, present, config, rng(0))
        assert changed.dtype == np.float32
        assert (changed[1] == 0.5).all() and (changed[:, brain == 0] == 0.5).all()
        assert (changed[0][brain > 0] != 0.5).all() and (changed[2][brain > 0] != 0.5).all()
        assert changed[0][brain > 0][0] != changed[2][brain > 0][0]  # drawn per sequence


def test_intensity_amounts_are_those_asked_for():
    image, brain, present = np.ones((1, 40, 40, 40), np.float32), np.ones((40, 40, 40)), np.array([True])
    noise = augment_intensity(image, brain, present, AugmentConfig(noise_std=0.2), rng(0)) - 1
    assert abs(noise.std() - 0.2) < 0.005 and abs(noise.mean()) < 0.005
    one = lambda config, i: (augment_intensity(image[:, :1, :1, :1], brain[:1, :1, :1], present, config, rng(i)).item()) - 1  # noqa: E731
    for config in (AugmentConfig(intensity_scale=0.1), AugmentConfig(intensity_shift=0.1)):
        shifts = [one(config, i) for i in range(500)]
        assert -0.1001 < min(shifts) < -0.09 and 0.09 < max(shifts) < 0.1001


# exact turns, and what a zoom may not do to labels

TURNS = AugmentConfig(flip_prob=0, quarter_turn_prob=1)


@pytest.mark.parametrize("shape", [(6, 6, 3), (8, 5, 3), (5, 8, 2)])
def test_quarter_turns_are_exact_and_keep_the_shape(shape):
    image, number = numbered(shape)
    turned = [augment_geometry(sample_of(image + 1, label=(number % 3).astype(np.uint8)), TURNS, rng(seed)) for seed in range(12)]
    kept = min(shape[:2]) ** 2 * shape[2]
    for sample in turned:
        assert sample.image.shape == (1, *shape) and sample.brain.shape == sample.label.shape == shape
        values = sample.image[0][sample.brain > 0].astype(int) - 1  # nothing was interpolated
        assert len(values) == len(set(values)) >= kept and (sample.label[sample.brain > 0] == values % 3).all()
        assert not sample.image[0][sample.brain == 0].any()
    half = [np.array_equal(sample.image[0], (image[0] + 1)[::-1, ::-1]) for sample in turned]
    assert any(half) and not all(half)
    if shape[0] == shape[1]:
        found = {tuple(sample.image.ravel()) for sample in turned}
        assert found == {tuple(np.rot90(image[0] + 1, k).ravel()) for k in (1, 2, 3)}


def test_flips_keep_to_the_axes_asked_for():
    image, _ = numbered((4, 3, 2))
    flipped = augment_geometry(sample_of(image), AugmentConfig(flip_prob=1, flip_axes="x"), rng(1))
    assert np.array_equal(flipped.image[0], image[0][::-1])


def test_a_zoom_happens_as_often_as_asked_for():
    image, _ = numbered((6, 6, 6))
    config = AugmentConfig(flip_prob=0, zoom=0.2, zoom_prob=0.5)
    still = [np.array_equal(augment_geometry(sample_of(image), config, rng(seed)).image, image) for seed in range(60)]
    assert 15 < sum(still) < 45


def test_augmented_labels_are_labels():
    config = AugmentConfig(flip_prob=0.5, flip_axes="x", quarter_turn_prob=0.5, zoom=0.2, zoom_prob=0.5)
    label = rng(0).choice(np.array([0, 1, 2, 4], np.uint8), (9, 7, 5))
    for seed in range(30):
        moved = augment_geometry(sample_of(np.ones((1, 9, 7, 5), np.float32), label=label), config, rng(seed)).label
        assert moved.dtype == np.uint8 and set(np.unique(moved)) <= {0, 1, 2, 4}

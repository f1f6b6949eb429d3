"""Axial slices in the square that 2D networks see: there and back, left and right, labels, every size and orientation."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nifti_trees import write_nifti
from volume_cases import ORIENTATIONS, case_of, data_set, oriented

from mstkd.data.planes import Plane
from mstkd.shards.preprocess import preprocess


@st.composite
def planes(draws, smallest=16, largest=60):
    """A stored plane anywhere in the file's, which may be longer in X or in Y, and a square of any size."""
    shape = [draws(st.integers(smallest, largest)) for _ in range(2)]
    box = [sorted(draws(st.tuples(st.integers(0, n - 12), st.integers(12, n)).filter(lambda ends: ends[1] - ends[0] >= 12))) for n in shape]
    side = max(shape)
    start = tuple((side - n) // 2 + low for n, (low, _) in zip(shape, box))
    return Plane(start, tuple(high - low for low, high in box), side, draws(st.integers(16, 90)))


def smooth(shape):
    """(2, X, Y): a slow wave and a ramp, different along X and Y."""
    x, y = np.meshgrid(*[np.linspace(-1, 1, n) for n in shape], indexing="ij")
    return torch.tensor(np.stack([np.cos(1.3 * x + 0.4) * np.cos(0.8 * y), 0.5 * x - 0.3 * y]), dtype=torch.float32)


@settings(max_examples=60)
@given(planes())
def test_a_smooth_image_comes_back_as_it_was(plane):
    image = smooth((plane.side, plane.side))
    box = [slice(start, start + n) for start, n in zip(plane.start, plane.shape)]
    stored = image[:, *box]
    whole = Plane((0, 0), (plane.side, plane.side), plane.side, plane.size)
    back = whole.back(whole.bring(image, 0.0))
    coarser = max(1.0, plane.side / plane.size) / plane.side  # of the image, in the unit of its wave
    assert back.shape == image.shape and (back - image)[:, 2:-2, 2:-2].abs().max() < 0.5 * coarser + 1e-3
    # a stored part of it lies where it lay in the whole, in both directions
    brought, inside = plane.bring(stored, 0.0), plane.bring(torch.ones_like(stored), 0.0) == 1
    assert brought.shape == (2, plane.size, plane.size)
    torch.testing.assert_close(brought[inside], whole.bring(image, 0.0)[inside], atol=1e-5, rtol=0)
    torch.testing.assert_close(plane.back(whole.bring(image, 0.0)), back[:, *box], atol=0, rtol=0)


@pytest.mark.parametrize("size", [24, 40])
def test_a_square_of_the_files_own_size_changes_nothing(size):
    plane = Plane((3, 1), (15, 20), size, size)
    image = torch.randn(2, 15, 20)
    brought = plane.bring(image, -1.0)
    assert torch.equal(plane.back(brought), image) and torch.equal(brought[:, 3:18, 1:21], image)
    brought[:, 3:18, 1:21] = -1
    assert (brought == -1).all()


def test_around_the_plane_stands_the_background():
    plane = Plane((8, 0), (16, 32), 32, 64)
    brought = plane.bring(torch.full((1, 16, 32), 3.0), -1.0)[0]
    assert (brought[:15] == -1).all() and (brought[-15:] == -1).all() and (brought[17:-17] == 3).all()


@given(planes(), st.integers(0, 2**20))
def test_every_pixel_of_a_label_map_is_that_of_the_nearest_voxel(plane, seed):
    label = torch.tensor(np.random.default_rng(seed).integers(1, 5, (3, *plane.shape)), dtype=torch.uint8)
    brought = plane.bring_labels(label)
    assert brought.dtype == torch.uint8 and brought.shape == (3, plane.size, plane.size)
    x0, y0 = plane.start
    for i in range(0, plane.size, 5):
        for j in range(0, plane.size, 7):
            # exact: pixel i's centre lies at (2 i + 1) side / 2 size voxels from the edge
            x, y = ((2 * n + 1) * plane.side // (2 * plane.size) for n in (i, j))
            stored = 0 <= x - x0 < plane.shape[0] and 0 <= y - y0 < plane.shape[1]
            assert brought[:, i, j].tolist() == (label[:, x - x0, y - y0].tolist() if stored else [0, 0, 0])
    assert torch.equal(plane.bring_labels(label == 2), brought == 2)  # a mask is brought as its map is


@given(planes(), st.data())
def test_image_and_mask_stay_where_they_are_in_the_plane(plane, data):
    """The middle of a square patch, measured from the edge in shares of the side."""
    corner = [data.draw(st.integers(0, n - 8)) for n in plane.shape]
    mask = torch.zeros(plane.shape)
    mask[corner[0] : corner[0] + 8, corner[1] : corner[1] + 8] = 1
    expected = [(start + place + 4) / plane.side for start, place in zip(plane.start, corner)]
    for brought in (plane.bring(mask, 0.0), plane.bring_labels(mask)):
        middle = (torch.nonzero(brought) + 0.5).T @ brought[brought != 0] / brought.sum() / plane.size
        np.testing.assert_allclose(middle, expected, atol=1 / plane.size)  # a pixel


@pytest.mark.parametrize("shape", [(30, 26, 5), (22, 34, 5)])
@pytest.mark.parametrize("finer", [1, 2])
@pytest.mark.parametrize("codes", ORIENTATIONS)
def test_left_is_left_whatever_the_files_orientation(tmp_path, codes, finer, shape):
    """A bright corner at the right and the front of a hand-made RAS+ volume is at the high end of both axes of the square, also of a resampled one."""
    image = np.zeros(shape, np.int16)
    image[4:20, 6:22, :] = 100 + np.arange(5)
    image[15:20, 17:22, :] = 900
    data, affine = oriented(image, (1.0, 1.0, 1.0), codes)
    resampled = {"spacing_mm": (0.5, 0.5, 1.0)} if finer == 2 else None
    subject = preprocess(case_of({"t1": write_nifti(tmp_path / "t1.nii.gz", data, affine)}), data_set("t1", labels=False, preprocessing=resampled))
    plane, side = Plane.of(subject.meta, 64), max(shape[:2])
    assert subject.meta.ras_shape == (finer * shape[0], finer * shape[1], 5) and plane.side == finer * side
    bright = plane.bring(torch.from_numpy(subject.image[0, ..., 1].astype(np.float32)), -9.0)
    x, y = (torch.nonzero(bright > bright.max() / 2) + 0.5).mean(0).tolist()
    low = [(side - n) // 2 for n in shape[:2]]
    assert x / 64 == pytest.approx((low[0] + 17.5) / side, abs=0.02) and y / 64 == pytest.approx((low[1] + 19.5) / side, abs=0.02)
    back = plane.back(bright).numpy()
    assert back.shape == subject.brain.shape[:2] and min(np.unravel_index(back.argmax(), back.shape)) >= 11 * finer - 1

"""Resampling: values stay where they are in the patient, slices are not mixed, and every grid leads back to the file's."""

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nifti_trees import head, write_nifti
from scipy.ndimage import binary_fill_holes
from volume_cases import ORIENTATIONS, case_of, data_set, oriented

from mstkd.errors import UserError
from mstkd.shards.geometry import bounding_box, ras_spacing_mm, resample_image, resampled_shape, restore, restore_scores
from mstkd.shards.preprocess import preprocess
from mstkd.shards.raw_case import check_headers

SPACINGS_MM = (0.7, 1.0, 3.0)


def places_mm(shape, affine) -> np.ndarray:
    """(3, X, Y, Z) where each voxel lies in the patient."""
    return np.moveaxis(nib.affines.apply_affine(affine, np.moveaxis(np.indices(shape), 0, -1)), -1, 0)


def stored_affine(meta) -> np.ndarray:
    """voxel of what is stored -> mm, from the documented rule alone: centred on the file's grid, box cut out."""
    affine = np.array(meta.original_affine)
    middle = nib.affines.apply_affine(affine, (np.array(meta.original_shape) - 1) / 2)
    turned = nib.affines.apply_affine
    to_ras = nib.orientations.inv_ornt_aff(nib.io_orientation(affine), meta.original_shape)
    axes = (affine @ to_ras)[:3, :3]
    axes = axes / np.linalg.norm(axes, axis=0) * meta.spacing_mm
    grid = np.array(meta.grid_shape)
    start = np.array([start for start, _ in meta.crop_box])
    result = nib.affines.from_matvec(axes, middle - axes @ ((grid - 1) / 2))
    result[:3, 3] = turned(result, start)
    return result


def blob(shape, spacing_mm, seed) -> np.ndarray:
    """A label map (X, Y, Z): a lopsided ball with a core, centred off the middle."""
    rng = np.random.default_rng(seed)
    mm = places_mm(shape, np.diag([*spacing_mm, 1.0]))
    extent = np.multiply(shape, spacing_mm)
    centre = extent * rng.uniform(0.3, 0.7, 3)
    distance = sum(((mm[axis] - centre[axis]) / (0.3 * extent[axis])) ** 2 for axis in range(3))
    return ((distance < 1) * 2 + (distance < 0.3) * 2).astype(np.uint8)


@settings(max_examples=80)
@given(
    codes=st.sampled_from(ORIENTATIONS),
    shape=st.tuples(*[st.integers(3, 17)] * 3),
    own=st.tuples(*[st.sampled_from(SPACINGS_MM)] * 3),
    target=st.tuples(*[st.sampled_from(SPACINGS_MM)] * 3),
    seed=st.integers(0, 2**16),
)
def test_a_map_returns_to_the_files_grid_from_any_other(tmp_path_factory, codes, shape, own, target, seed):
    rng, folder = np.random.default_rng(seed), tmp_path_factory.mktemp("grid")
    label = blob(shape, own, seed)
    image = np.where(rng.random(shape) < 0.8, rng.integers(1, 900, shape), 0).astype(np.int16)
    image[0, 0, 0], image[-1, -1, -1], image[label > 0] = 5, 7, 300
    data, affine = oriented(image, own, codes)
    file_label, _ = oriented(label, own, codes)
    case = case_of({"t1": write_nifti(folder / "t1.nii", data, affine)}, write_nifti(folder / "seg.nii", file_label, affine))
    try:
        subject = preprocess(case, data_set("t1", preprocessing={"spacing_mm": target}))
    except UserError as error:  # so coarse that what varies is gone
        assert "brain" in str(error)
        return
    back = restore(subject.label, subject.meta)
    assert back.shape == file_label.shape and subject.label.shape == subject.brain.shape == subject.image.shape[1:]
    finer = all(new <= old for new, old in zip(target, own))
    if finer:
        np.testing.assert_array_equal(back, file_label)
        np.testing.assert_array_equal(restore(subject.brain, subject.meta), binary_fill_holes(data != 0))
    else:  # coarser: a voxel may change where a neighbour within half a coarse voxel has that label
        ras_back = nib.apply_orientation(back, nib.io_orientation(affine))
        reach = [int(np.ceil(new / old / 2 + 0.51)) for new, old in zip(target, own)]
        for place in np.argwhere(ras_back != label):
            near = label[tuple(slice(max(at - by, 0), at + by + 1) for at, by in zip(place, reach))]
            assert ras_back[tuple(place)] in near
    kept = own if np.allclose(own, target) else target
    assert subject.meta.spacing_mm == pytest.approx(kept, rel=1e-5)
    assert (subject.meta.grid_shape is None) == np.allclose(own, target)


@pytest.mark.parametrize(("own", "target"), [((1.0, 1, 1), (0.7, 0.7, 0.7)), ((0.7, 1, 1), (1.0, 1, 1.5)), ((3.0, 3, 3), (1.0, 1, 1)), ((1.0, 1, 1), (2.0, 2, 2))])
def test_resampled_intensities_lie_where_they_lay_in_the_patient(tmp_path, own, target):
    """A ramp in mm: half a voxel of shift would show; oblique and left-handed axes."""
    tilt = nib.eulerangles.euler2mat(0.1, 0.05, 0.02) @ np.diag([-own[0], own[1], own[2]])
    affine = nib.affines.from_matvec(tilt, [10.0, -20, 30])
    ramp = np.tensordot([1.0, 2.0, 4.0], places_mm((23, 20, 17), affine), 1) + 500
    mask = write_nifti(tmp_path / "brain.nii", np.ones(ramp.shape, np.uint8), affine)
    case = case_of({"t1": write_nifti(tmp_path / "t1.nii", ramp.astype(np.float32), affine)}, brain=mask)
    subject = preprocess(case, data_set("t1", labels=False, preprocessing={"spacing_mm": target}))
    stats = subject.meta.stats["t1"]
    raw = subject.image[0].astype(float) * stats.std + stats.mean
    expected = np.tensordot([1.0, 2.0, 4.0], places_mm(raw.shape, stored_affine(subject.meta)), 1) + 500
    inner = tuple(slice(int(np.ceil(4 * a / b)), -int(np.ceil(4 * a / b))) for a, b in zip(own, target))
    assert raw[inner].size > 50
    np.testing.assert_allclose(raw[inner], expected[inner], atol=0.1 * min(own))  # a shift of half a voxel: 0.5 or more per axis


@settings(max_examples=40)
@given(codes=st.sampled_from(ORIENTATIONS), own=st.sampled_from(SPACINGS_MM), target=st.sampled_from(SPACINGS_MM), seed=st.integers(0, 99))
def test_scores_are_decided_on_the_files_grid(tmp_path_factory, codes, own, target, seed):
    """Two linear scores meet on a plane: after interpolation each voxel of the file is on its right side of it."""
    folder, rng = tmp_path_factory.mktemp("scores"), np.random.default_rng(seed)
    data, affine = oriented(np.arange(15 * 13 * 11, dtype=np.float32).reshape(15, 13, 11) + 1, (own,) * 3, codes)
    meta = preprocess(case_of({"t1": write_nifti(folder / "t1.nii", data, affine)}), data_set("t1", labels=False, preprocessing={"spacing_mm": (target,) * 3})).meta
    if meta.grid_shape is None:
        return
    normal, middle = rng.normal(size=3), nib.affines.apply_affine(affine, (np.array(data.shape) - 1) / 2)
    box = tuple(stop - start for start, stop in meta.crop_box)
    height = np.tensordot(normal, places_mm(box, stored_affine(meta)) - middle[:, None, None, None], 1)
    labels = restore_scores(np.stack([-height, height]), meta, lambda scores: (scores[1] > scores[0]).astype(np.uint8))
    truth = np.tensordot(normal, places_mm(data.shape, affine) - middle[:, None, None, None], 1)
    # at the rim the last grid voxel stands for what is beyond it: linear there is not asked for
    edge = int(np.ceil(target / own)) if target > own else 1
    inner = (slice(edge, -edge),) * 3
    clear = np.abs(truth[inner]) > 1e-3
    np.testing.assert_array_equal(labels[inner][clear], (truth[inner] > 0)[clear])


def test_thick_slices_are_not_mixed(tmp_path):
    """Spacing 1 x 1 x 5: at 2 mm along Z each stored slice is one of the file's; in a milder ratio they are interpolated."""
    rng = np.random.default_rng(0)
    image = rng.integers(100, 900, (12, 11, 7)).astype(np.float32)
    thick = resample_image(image, (1.0, 1.0, 5.0), (1.0, 1.0, 2.0), resampled_shape(image.shape, (1.0, 1, 5), (1.0, 1, 2)))
    assert thick.shape == (12, 11, 18)
    nearest = [np.abs(image - thick[..., k : k + 1]).max(axis=(0, 1)).min() for k in range(18)]
    np.testing.assert_allclose(nearest, 0, atol=1e-2)
    mild = resample_image(image, (1.0, 1.0, 3.0), (1.0, 1.0, 2.0), resampled_shape(image.shape, (1.0, 1, 3), (1.0, 1, 2)))
    assert max(np.abs(image - mild[..., k : k + 1]).max(axis=(0, 1)).min() for k in range(mild.shape[2])) > 50
    assert image.min() <= mild.min() and mild.max() <= image.max()  # splines overshoot; this does not
    # into thick slices: those that are kept are the file's own
    coarse = resample_image(image, (1.0, 1.0, 1.0), (1.0, 1.0, 4.0), resampled_shape(image.shape, (1.0, 1, 1), (1.0, 1, 4)))
    assert np.abs(image - coarse[..., :1]).max(axis=(0, 1)).min() < 1e-2


@settings(max_examples=30)
@given(own=st.tuples(*[st.sampled_from(SPACINGS_MM)] * 3), target=st.tuples(*[st.sampled_from(SPACINGS_MM)] * 3), seed=st.integers(0, 999))
def test_a_box_is_resampled_as_the_whole_is(own, target, seed):
    rng = np.random.default_rng(seed)
    image = rng.normal(0, 100, (40, 17, 30)).astype(np.float32)
    shape = resampled_shape(image.shape, own, target) or image.shape
    box = tuple(sorted(rng.choice(length + 1, 2, replace=False).tolist()) for length in shape)
    whole = resample_image(image, own, target, shape)
    part = resample_image(image, own, target, shape, tuple(map(tuple, box)))
    np.testing.assert_allclose(part, whole[tuple(slice(*bounds) for bounds in box)], atol=1e-3)


def test_the_background_does_not_bleed_into_the_rim(tmp_path):
    """A uniform brain with a little noise in a dark volume stays what it is up to its rim."""
    image = np.zeros((20, 20, 20), np.float32)
    image[5:15, 5:15, 5:15] = 1000 + np.random.default_rng(0).normal(0, 1, (10, 10, 10))
    case = case_of({"t1": write_nifti(tmp_path / "t1.nii", image, np.eye(4))})
    stats = preprocess(case, data_set("t1", labels=False, preprocessing={"spacing_mm": (0.7, 0.7, 0.7)})).meta.stats["t1"]
    assert 990 < stats.min and stats.max < 1010


def test_a_common_grid_is_reached_by_the_headers(tmp_path):
    """T2 with other voxels, axes and field of view; label and mask on its grid follow too."""
    t1_affine = nib.affines.from_matvec(np.diag([-1.0, 1, 1]), [12.0, -10, -9])
    t2_affine = nib.affines.from_matvec(nib.eulerangles.euler2mat(0.15, 0.0, 0.05) @ np.diag([0.8, 0.8, 2.0]), [-15.0, -14, -13])
    ramp = lambda mm: np.tensordot([1.0, 2.0, 4.0], mm, 1) + 500  # noqa: E731
    t1, t2 = (ramp(places_mm(shape, affine)).astype(np.float32) for shape, affine in (((25, 21, 19), t1_affine), ((40, 36, 14), t2_affine)))
    ball = lambda shape, affine: (np.linalg.norm(places_mm(shape, affine), axis=0) < 6).astype(np.uint8)  # noqa: E731
    files = {"t1": write_nifti(tmp_path / "t1.nii", t1, t1_affine), "t2": write_nifti(tmp_path / "t2.nii", t2, t2_affine)}
    label, mask = (write_nifti(tmp_path / f"{name}.nii", ball(t2.shape, t2_affine), t2_affine) for name in ("seg", "brain"))
    case, spec = case_of(files, label, mask), data_set("t1", "t2", preprocessing={"common_grid": "t1"})
    check_headers(case, spec)
    subject = preprocess(case, spec)
    inside = subject.brain.astype(bool)
    raws = [subject.image[k].astype(float) * subject.meta.stats[name].std + subject.meta.stats[name].mean for k, name in enumerate(files)]
    np.testing.assert_allclose(raws[1][inside], raws[0][inside], atol=0.3)
    truth = ball(t1.shape, t1_affine)
    for stored in (subject.label, subject.brain):
        back = restore(stored, subject.meta)
        assert back.shape == t1.shape and 2 * (back & truth).sum() / (back.sum() + truth.sum()) > 0.85
    assert subject.facts.grid_from == "t1"
    with pytest.raises(UserError, match=r"t2\.nii: shape .* differs from .*t1\.nii; resample them to one grid"):
        preprocess(case, data_set("t1", "t2"))
    # without the sequence that gives the grid the first one that is there does, and that is recorded
    del case.files["t1"]
    alone = preprocess(case, spec)
    assert alone.facts.grid_from == "t2" and alone.meta.original_shape == t2.shape


def test_background_beyond_a_field_of_view_is_not_brain(tmp_path):
    """T2 covers half of T1's volume: what it does not show is background in it, and the union of both is the brain."""
    image = head(3)
    affine = np.diag([1.0, 1, 1, 1])
    files = {"t1": write_nifti(tmp_path / "t1.nii", image, affine), "t2": write_nifti(tmp_path / "t2.nii", image[:, :, :10], affine)}
    subject = preprocess(case_of(files), data_set("t1", "t2", labels=False, preprocessing={"common_grid": "t1"}))
    alone = preprocess(case_of({"t1": files["t1"]}), data_set("t1", labels=False))
    np.testing.assert_array_equal(subject.brain, alone.brain)


@pytest.mark.parametrize("codes", ORIENTATIONS)
def test_spacing_is_told_in_ras_order(codes):
    _, affine = oriented(np.zeros((3, 4, 5)), (1.0, 2.0, 3.0), codes)
    assert ras_spacing_mm(affine) == pytest.approx((1, 2, 3))


@settings(max_examples=50)
@given(shape=st.tuples(*[st.integers(1, 8)] * 3), margin=st.integers(0, 9), seed=st.integers(0, 999))
def test_the_box_is_the_smallest_with_its_margin(shape, margin, seed):
    mask = np.random.default_rng(seed).random(shape) < 0.05
    box = bounding_box(mask, margin)
    hits = np.argwhere(mask)
    expected = [(0, n) if not len(hits) else (max(hits[:, i].min() - margin, 0), min(hits[:, i].max() + 1 + margin, n)) for i, n in enumerate(shape)]
    assert list(box) == expected

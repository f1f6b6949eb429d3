"""Preprocessing: left stays left there and back, statistics undo the z-score, bad files are named."""

import gzip

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nifti_trees import BRATS_AFFINE, head, tumour, write_nifti

from mstkd.errors import UserError
from mstkd.shards.dataset import Case
from mstkd.shards.preprocess import brain_mask, preprocess, restore
from mstkd.shards.spec import LABEL_SCHEMES

SCHEME = LABEL_SCHEMES["brats2018"]
ORIENTATIONS = [a + b + c for a in "LR" for b in "AP" for c in "SI"] + ["PIR", "SRA", "ASL", "IPL"]


def oriented(ras: np.ndarray, spacing_mm, codes: str) -> tuple[np.ndarray, np.ndarray]:
    """The same volume as a file with those axis codes would hold it, and the file's affine."""
    to_file = nib.orientations.ornt_transform(nib.orientations.axcodes2ornt("RAS"), nib.orientations.axcodes2ornt(codes))
    affine = np.diag([*spacing_mm, 1.0]) @ nib.orientations.inv_ornt_aff(to_file, ras.shape)
    return nib.apply_orientation(ras, to_file), affine


def asymmetric() -> tuple[np.ndarray, np.ndarray]:
    """(X, Y, Z) RAS+ by hand: a brain block with one bright voxel at its right, front and top, and an L-shaped label."""
    image = np.zeros((9, 8, 7), np.int16)
    image[2:7, 1:7, 1:5] = 100
    image[6, 6, 4] = 900
    label = np.zeros(image.shape, np.uint8)
    label[5:7, 5, 3] = 4
    label[6, 2:6, 3] = 1
    return image, label


@pytest.mark.parametrize("codes", ORIENTATIONS)
def test_left_and_right_there_and_back(tmp_path, codes):
    image, label = asymmetric()
    spacing_mm = (1.0, 2.0, 3.0)
    data, affine = oriented(image, spacing_mm, codes)
    file_label, _ = oriented(label, spacing_mm, codes)
    case = Case("s", "p", {"t1": write_nifti(tmp_path / "t1.nii.gz", data, affine)}, write_nifti(tmp_path / "seg.nii.gz", file_label, affine))
    subject = preprocess(case, ("t1",), SCHEME)
    # the file itself is right: its affine puts the bright voxel where the hand-made volume has it
    (bright,) = np.argwhere(data == 900)
    np.testing.assert_allclose(affine @ [*bright, 1], [6 * 1.0, 6 * 2.0, 4 * 3.0, 1])
    # the stored volume is the hand-made one, cropped: brightest voxel at the right, anterior, superior corner
    assert subject.meta.orientation == codes
    assert subject.meta.crop_box == ((2, 7), (1, 7), (1, 5))
    assert subject.meta.spacing_mm == pytest.approx(spacing_mm)
    assert np.unravel_index(subject.image[0].argmax(), subject.image[0].shape) == (4, 5, 3)
    np.testing.assert_array_equal(subject.label, label[2:7, 1:7, 1:5])
    np.testing.assert_array_equal(restore(subject.label, subject.meta), file_label)


@settings(max_examples=25, deadline=None)
@given(
    codes=st.sampled_from(ORIENTATIONS),
    shape=st.tuples(*[st.integers(3, 9)] * 3),
    spacing=st.tuples(*[st.floats(0.3, 4.0)] * 3),
    seed=st.integers(0, 2**16),
)
def test_restore_undoes_any_orientation(tmp_path_factory, codes, shape, spacing, seed):
    rng = np.random.default_rng(seed)
    image = (rng.integers(-50, 900, shape) * (rng.random(shape) < 0.5)).astype(np.int16)
    image[0, 0, 0], image[1, 1, 1] = 5, 6  # never constant
    label = rng.choice(np.array(SCHEME.values, np.uint8), shape)
    folder = tmp_path_factory.mktemp("any")
    data, affine = oriented(image, spacing, codes)
    file_label, _ = oriented(label, spacing, codes)
    case = Case("s", "p", {"t1": write_nifti(folder / "t1.nii", data, affine)}, write_nifti(folder / "seg.nii", file_label, affine))
    subject = preprocess(case, ("t1",), SCHEME)
    np.testing.assert_array_equal(restore(subject.label, subject.meta), file_label)
    assert subject.meta.spacing_mm == pytest.approx(spacing, rel=1e-5)


def test_statistics_undo_the_zscore(tmp_path):
    files = {name: write_nifti(tmp_path / f"{name}.nii.gz", head(seed)) for seed, name in enumerate(("flair", "t1"))}
    subject = preprocess(Case("s", "p", files), ("flair", "t1"), None)
    inside = tuple(slice(*bounds) for bounds in subject.meta.crop_box)
    brain = subject.brain.astype(bool)
    assert subject.image.dtype == np.float16 and subject.brain.dtype == np.uint8 and subject.label is None
    assert not subject.image[:, ~brain].any()
    for channel, name in enumerate(files):
        raw = nib.as_closest_canonical(nib.load(files[name])).get_fdata()[inside]
        stats, z = subject.meta.stats[name], subject.image[channel].astype(np.float64)
        np.testing.assert_allclose(z[brain] * stats.std + stats.mean, raw[brain], atol=stats.std * 4e-3)  # float16
        assert (stats.mean, stats.std, stats.min, stats.max) == pytest.approx((raw[brain].mean(), raw[brain].std(), raw[brain].min(), raw[brain].max()))
        quantiles = [np.quantile(raw[brain], q) for q in (0.001, 0.005, 0.995, 0.999)]
        assert [stats.p0_1, stats.p0_5, stats.p99_5, stats.p99_9] == pytest.approx(quantiles)


def test_absent_sequences_are_zero_and_said(tmp_path):
    case = Case("s", "p", {"t2": write_nifti(tmp_path / "t2.nii.gz", head(1))})
    subject = preprocess(case, ("flair", "t1", "t1ce", "t2"), None)
    assert subject.meta.sequences == ("t2",) and set(subject.meta.stats) == {"t2"}
    assert not subject.image[:3].any() and subject.image[3].any()


def test_brain_is_a_union_with_holes_filled_and_keeps_negative_voxels():
    first, second = np.zeros((2, 7, 7, 7))
    first[1:6, 1:6, 1:6] = -3
    first[3, 3, 3] = 0  # enclosed
    second[6, 3, 3] = 2  # only here
    expected = np.zeros((7, 7, 7), bool)
    expected[1:6, 1:6, 1:6] = expected[6, 3, 3] = True
    np.testing.assert_array_equal(brain_mask([first, second]), expected)


def test_no_labelled_voxel_is_cropped_away(tmp_path):
    image, label = asymmetric()
    label[0, 0, 6] = 2  # outside the brain
    case = Case("s", "p", {"t1": write_nifti(tmp_path / "t1.nii", image, np.eye(4))}, write_nifti(tmp_path / "seg.nii", label, np.eye(4)))
    subject = preprocess(case, ("t1",), SCHEME)
    np.testing.assert_array_equal(restore(subject.label, subject.meta), label)
    assert subject.brain.sum() == (image != 0).sum()


def a_case(folder, change=None) -> Case:
    files = {name: write_nifti(folder / f"a_{name}.nii.gz", head(seed)) for seed, name in enumerate(("t1", "t2"))}
    case = Case("a", "a", files, write_nifti(folder / "a_seg.nii.gz", tumour(1, (2, 1, 4))))
    if change:
        change(folder)
    return case


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def with_value(data, value, dtype=np.float32):
    data = data.astype(dtype)
    data[12, 11, 10] = value
    return data


BAD = {
    "cut": (lambda f: truncate(f / "a_t2.nii.gz"), r"a_t2\.nii\.gz: truncated or not a NIfTI"),
    "cut raw": (lambda f: (f / "a_t2.nii.gz").write_bytes(gzip.compress(gzip.decompress((f / "a_t2.nii.gz").read_bytes())[:5000])), "a_t2.*truncated or not"),
    "text": (lambda f: (f / "a_t2.nii.gz").write_text("hello"), r"a_t2\.nii\.gz: truncated or not a NIfTI"),
    "empty": (lambda f: (f / "a_t2.nii.gz").write_bytes(b""), r"a_t2\.nii\.gz: truncated or not a NIfTI"),
    "gone": (lambda f: (f / "a_t2.nii.gz").unlink(), r"a_t2\.nii\.gz: no such file"),
    "nan": (lambda f: write_nifti(f / "a_t2.nii.gz", with_value(head(1), np.nan)), r"a_t2\.nii\.gz: holds NaN or infinite"),
    "inf": (lambda f: write_nifti(f / "a_t2.nii.gz", with_value(head(1), np.inf)), r"a_t2\.nii\.gz: holds NaN or infinite"),
    "zero": (lambda f: write_nifti(f / "a_t2.nii.gz", head(1) * 0), r"a_t2\.nii\.gz: every brain voxel has the same value"),
    "constant": (lambda f: write_nifti(f / "a_t2.nii.gz", np.full_like(head(1), 5)), r"a_t2\.nii\.gz: every brain voxel has the same value"),
    "shape": (lambda f: write_nifti(f / "a_t2.nii.gz", head(1)[:-1]), r"a_t2\.nii\.gz: shape \(23, 22, 20\) differs from \(24, 22, 20\) of .*a_t1\.nii\.gz"),
    "affine": (lambda f: write_nifti(f / "a_t2.nii.gz", head(1), BRATS_AFFINE + np.eye(4, k=3) * 0.01), r"a_t2\.nii\.gz: its affine differs from that of .*a_t1"),
    "4d": (lambda f: write_nifti(f / "a_t2.nii.gz", head(1)[..., None]), r"a_t2\.nii\.gz: expected a volume with 3 axes"),
    "complex": (lambda f: write_nifti(f / "a_t2.nii.gz", head(1).astype(np.complex64)), r"a_t2\.nii\.gz: expected one real number per voxel"),
    "scheme": (lambda f: write_nifti(f / "a_seg.nii.gz", with_value(tumour(1, (2, 1)), 3)), r"a_seg\.nii\.gz: label values 3 are outside scheme brats2018 \(0, 1, 2, 4\)"),
    "fraction": (lambda f: write_nifti(f / "a_seg.nii.gz", with_value(tumour(1, (2, 1)), 1.5)), r"a_seg\.nii\.gz: label values 1\.5 are outside"),
    "negative": (lambda f: write_nifti(f / "a_seg.nii.gz", with_value(tumour(1, (2, 1)), -1, np.int16)), r"a_seg\.nii\.gz: label values -1 are outside"),
    "label shape": (lambda f: write_nifti(f / "a_seg.nii.gz", tumour(1, (2, 1))[:, 1:]), r"a_seg\.nii\.gz: shape .* differs from .*a_t1"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_file_is_named_in_one_line(tmp_path, name):
    change, message = BAD[name]
    case = a_case(tmp_path, change)
    with pytest.raises(UserError, match=message) as error:
        preprocess(case, ("t1", "t2"), SCHEME)
    assert "\n" not in str(error.value)


def test_the_case_behind_the_bad_files_is_good(tmp_path):
    assert preprocess(a_case(tmp_path), ("t1", "t2"), SCHEME).meta.sequences == ("t1", "t2")


def test_affine_rounding_is_tolerated(tmp_path):
    case = a_case(tmp_path, lambda f: write_nifti(f / "a_t2.nii.gz", head(1), BRATS_AFFINE + np.eye(4, k=3) * 5e-4))
    preprocess(case, ("t1", "t2"), SCHEME)

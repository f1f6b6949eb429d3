"""Preprocessing: left stays left there and back, statistics undo the z-score, bad files are named."""

import gzip

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nifti_trees import BRATS_AFFINE, SHAPE, head, tumour, write_nifti
from scipy.ndimage import binary_fill_holes
from volume_cases import ORIENTATIONS, case_of, data_set, oriented

from mstkd.errors import UserError
from mstkd.shards.brain import brain_mask, fill_holes
from mstkd.shards.dataset import Case, Volume
from mstkd.shards.geometry import restore
from mstkd.shards.preprocess import preprocess, stored_zscore
from mstkd.shards.raw_case import check_headers
from mstkd.shards.spec import LABEL_SCHEMES

SCHEME = LABEL_SCHEMES["brats2018"]


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
    case = case_of({"t1": write_nifti(tmp_path / "t1.nii.gz", data, affine)}, write_nifti(tmp_path / "seg.nii.gz", file_label, affine))
    subject = preprocess(case, data_set("t1"))
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


@settings(max_examples=25)
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
    case = case_of({"t1": write_nifti(folder / "t1.nii", data, affine)}, write_nifti(folder / "seg.nii", file_label, affine))
    subject = preprocess(case, data_set("t1"))
    np.testing.assert_array_equal(restore(subject.label, subject.meta), file_label)
    assert subject.meta.spacing_mm == pytest.approx(spacing, rel=1e-5)


def test_statistics_undo_the_zscore(tmp_path):
    files = {name: write_nifti(tmp_path / f"{name}.nii.gz", head(seed)) for seed, name in enumerate(("flair", "t1"))}
    subject = preprocess(case_of(files), data_set("flair", "t1", labels=False))
    inside = tuple(slice(*bounds) for bounds in subject.meta.crop_box)
    brain = subject.brain.astype(bool)
    assert subject.image.dtype == np.float16 and subject.brain.dtype == np.uint8 and subject.label is None
    assert not subject.image[:, ~brain].any()
    for channel, name in enumerate(files):
        raw = nib.as_closest_canonical(nib.load(files[name])).get_fdata()[inside]
        stats, z = subject.meta.stats[name], subject.image[channel].astype(np.float64)
        float16_step = np.maximum(np.abs(z[brain]) * 2.0**-11, 2.0**-25)  # half a unit in the last place
        assert (np.abs(z[brain] * stats.std + stats.mean - raw[brain]) <= float16_step * stats.std * 1.001).all()
        assert (stats.mean, stats.std, stats.min, stats.max) == pytest.approx((raw[brain].mean(), raw[brain].std(), raw[brain].min(), raw[brain].max()))
        quantiles = [np.quantile(raw[brain], q) for q in (0.001, 0.005, 0.995, 0.999)]
        assert [stats.p0_1, stats.p0_5, stats.p99_5, stats.p99_9] == pytest.approx(quantiles)


def test_absent_sequences_are_zero_and_said(tmp_path):
    case = case_of({"t2": write_nifti(tmp_path / "t2.nii.gz", head(1))})
    subject = preprocess(case, data_set("flair", "t1", "t1ce", "t2", labels=False))
    assert subject.meta.sequences == ("t2",) and set(subject.meta.stats) == {"t2"}
    assert not subject.image[:3].any() and subject.image[3].any()


def test_brain_is_a_union_with_holes_filled_and_keeps_negative_voxels():
    first, second = np.zeros((2, 7, 7, 7))
    first[1:6, 1:6, 1:6] = -3
    first[3, 3, 3] = 0  # enclosed
    second[6, 3, 3] = 2  # only here
    expected = np.zeros((7, 7, 7), bool)
    expected[1:6, 1:6, 1:6] = expected[6, 3, 3] = True
    np.testing.assert_array_equal(brain_mask([first != 0, second != 0]), expected)


def test_no_labelled_voxel_is_cropped_away(tmp_path):
    image, label = asymmetric()
    label[0, 0, 6] = 2  # outside the brain
    case = case_of({"t1": write_nifti(tmp_path / "t1.nii", image, np.eye(4))}, write_nifti(tmp_path / "seg.nii", label, np.eye(4)))
    subject = preprocess(case, data_set("t1"))
    np.testing.assert_array_equal(restore(subject.label, subject.meta), label)
    assert subject.brain.sum() == (image != 0).sum()


def a_case(folder, change=None) -> Case:
    files = {name: write_nifti(folder / f"a_{name}.nii.gz", head(seed)) for seed, name in enumerate(("t1", "t2"))}
    case = case_of(files, write_nifti(folder / "a_seg.nii.gz", tumour(1, (2, 1, 4))))
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
    "checksum": (lambda f: (f / "a_t2.nii.gz").write_bytes((f / "a_t2.nii.gz").read_bytes()[:-8] + bytes(8)), r"a_t2\.nii\.gz: truncated or not a NIfTI"),
    "text": (lambda f: (f / "a_t2.nii.gz").write_text("hello"), r"a_t2\.nii\.gz: truncated or not a NIfTI"),
    "empty": (lambda f: (f / "a_t2.nii.gz").write_bytes(b""), r"a_t2\.nii\.gz: truncated or not a NIfTI"),
    "gone": (lambda f: (f / "a_t2.nii.gz").unlink(), r"a_t2\.nii\.gz: no such file"),
    "nan": (lambda f: write_nifti(f / "a_t2.nii.gz", with_value(head(1), np.nan)), r"a_t2\.nii\.gz: holds NaN or infinite"),
    "inf": (lambda f: write_nifti(f / "a_t2.nii.gz", with_value(head(1), np.inf)), r"a_t2\.nii\.gz: holds NaN or infinite"),
    "zero": (lambda f: write_nifti(f / "a_t2.nii.gz", head(1) * 0), r"a_t2\.nii\.gz: every brain voxel has the same value"),
    "constant": (lambda f: write_nifti(f / "a_t2.nii.gz", np.full_like(head(1), 5)), r"a_t2\.nii\.gz: every brain voxel has the same value"),
    "shape": (lambda f: write_nifti(f / "a_t2.nii.gz", head(1)[:-1]), r"a_t2\.nii\.gz: shape \(23, 22, 20\) differs from \(24, 22, 20\) of .*a_t1\.nii\.gz"),
    "affine": (lambda f: write_nifti(f / "a_t2.nii.gz", head(1), BRATS_AFFINE + np.eye(4, k=3) * 0.01), r"a_t2\.nii\.gz: its affine differs from that of .*a_t1"),
    "4d": (lambda f: write_nifti(f / "a_t2.nii.gz", np.stack([head(1)] * 2, -1)), r"a_t2\.nii\.gz: expected a volume with 3 axes, found .* name one channel"),
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
        preprocess(case, data_set("t1", "t2"))
    assert "\n" not in str(error.value)


def test_the_case_behind_the_bad_files_is_good(tmp_path):
    assert preprocess(a_case(tmp_path), data_set("t1", "t2")).meta.sequences == ("t1", "t2")


def test_a_file_in_several_gzip_members_or_of_the_other_byte_order_is_the_same(tmp_path):
    expected = preprocess(a_case(tmp_path), data_set("t1", "t2"))

    def change(folder):
        raw = gzip.decompress((folder / "a_t1.nii.gz").read_bytes())
        (folder / "a_t1.nii.gz").write_bytes(gzip.compress(raw[:3000]) + gzip.compress(raw[3000:]))
        image = nib.load(folder / "a_t2.nii.gz")
        nib.save(nib.Nifti1Image(np.asanyarray(image.dataobj), image.affine, nib.Nifti1Header(endianness=">")), folder / "a_t2.nii.gz")
        assert nib.load(folder / "a_t2.nii.gz").header.endianness == ">"

    found = preprocess(a_case(tmp_path, change), data_set("t1", "t2"))
    np.testing.assert_array_equal(found.image, expected.image)
    assert found.meta == expected.meta and found.facts == expected.facts


@pytest.mark.parametrize("preprocessing", [{}, {"spacing_mm": (1.5, 1.5, 1.5)}, {"common_grid": "t1"}])
def test_whole_numbers_and_the_same_as_floats_give_the_same(tmp_path, preprocessing):
    """Integers are kept as they are until the brain is taken; interpolated they must not be rounded."""
    made = []
    for dtype in (np.int16, np.float32):
        affines = BRATS_AFFINE, BRATS_AFFINE + (np.eye(4, k=3) * 0.4 if "common_grid" in preprocessing else 0)
        files = {
            name: write_nifti(tmp_path / f"{np.dtype(dtype)}_{name}.nii.gz", head(seed).astype(dtype), affine)
            for seed, (name, affine) in enumerate(zip(("t1", "t2"), affines))
        }
        made.append(preprocess(case_of(files), data_set("t1", "t2", labels=False, preprocessing=preprocessing)))
    np.testing.assert_array_equal(made[0].image, made[1].image)
    assert made[0].meta == made[1].meta and made[0].image.any()


def test_affine_rounding_is_tolerated(tmp_path):
    case = a_case(tmp_path, lambda f: write_nifti(f / "a_t2.nii.gz", head(1), BRATS_AFFINE + np.eye(4, k=3) * 5e-4))
    preprocess(case, data_set("t1", "t2"))


def test_any_file_carries_the_same_voxels(tmp_path):
    """4D channels, a trailing axis, NIfTI pairs, Analyze and MGH give what single files give."""
    stack = np.stack([head(seed) for seed in range(3)], -1)
    whole = write_nifti(tmp_path / "all.nii.gz", stack)
    plain = preprocess(case_of({f"t{k}": write_nifti(tmp_path / f"{k}.nii", stack[..., k]) for k in range(3)}), data_set("t0", "t1", "t2", labels=False))
    channels = preprocess(case_of({f"t{k}": Volume(whole, k) for k in range(3)}), data_set("t0", "t1", "t2", labels=False))
    np.testing.assert_array_equal(channels.image, plain.image)
    assert channels.meta.original_shape == SHAPE and channels.meta == plain.meta
    trailing = write_nifti(tmp_path / "trailing.nii.gz", stack[..., :1, None])
    nib.save(nib.Nifti1Pair(stack[..., 0], BRATS_AFFINE), tmp_path / "pair.img")
    nib.save(nib.MGHImage(stack[..., 0], BRATS_AFFINE), tmp_path / "fs.mgz")
    for file in (trailing, tmp_path / "pair.img", tmp_path / "fs.mgz"):
        one = preprocess(case_of({"t0": file}), data_set("t0", labels=False))
        reference = preprocess(case_of({"t0": tmp_path / "0.nii"}), data_set("t0", labels=False))
        np.testing.assert_array_equal(one.image, reference.image)
        assert one.meta.original_shape == SHAPE and not one.facts.by_convention


def test_where_left_is_by_convention_is_recorded(tmp_path):
    image, _ = asymmetric()
    nib.save(nib.AnalyzeImage(image, None), tmp_path / "analyze.img")
    silent = nib.Nifti1Image(image, None)
    nib.save(silent, tmp_path / "silent.nii.gz")
    for file in ("analyze.img", "silent.nii.gz"):
        subject = preprocess(case_of({"t1": tmp_path / file}), data_set("t1", labels=False))
        assert subject.facts.by_convention
        assert subject.meta.orientation == "".join(nib.aff2axcodes(nib.load(tmp_path / file).affine))
    assert subject.meta.original_shape == image.shape


CHANNEL_ERRORS = {
    "beyond": ((2,), 2, r"x\.nii\.gz, channel 2: the file has 2 channels"),
    "3D": ((), 0, r"x\.nii\.gz, channel 0: expected a file with 4 axes, found shape \(24, 22, 20\)"),
    "5D": ((1, 2), None, r"x\.nii\.gz: expected a volume with 3 axes, found shape .*; store one volume per file"),
}


@pytest.mark.parametrize("name", CHANNEL_ERRORS)
def test_a_wrong_channel_is_refused(tmp_path, name):
    more, channel, message = CHANNEL_ERRORS[name]
    file = write_nifti(tmp_path / "x.nii.gz", np.broadcast_to(head(1).reshape(*SHAPE, *[1] * len(more)), (*SHAPE, *more)).copy())
    with pytest.raises(UserError, match=message):
        preprocess(case_of({"t1": Volume(file, channel)}), data_set("t1", labels=False))


@settings(max_examples=60)
@given(shape=st.tuples(*[st.integers(1, 9)] * 3), density=st.floats(0.2, 0.9), seed=st.integers(0, 2**16))
def test_holes_are_filled_as_scipy_fills_them(shape, density, seed):
    mask = np.random.default_rng(seed).random(shape) < density
    np.testing.assert_array_equal(fill_holes(mask), binary_fill_holes(mask))


def test_border_value_is_background_and_zero_is_then_brain(tmp_path):
    image = np.full(SHAPE, -1024, np.int16)
    image[4:20, 3:18, 5:15] = np.random.default_rng(0).integers(-40, 41, (16, 15, 10))
    case = case_of({"ct": write_nifti(tmp_path / "ct.nii.gz", image, np.eye(4))})
    subject = preprocess(case, data_set("ct", labels=False, preprocessing={"background": "border"}))
    assert subject.meta.crop_box == ((4, 20), (3, 18), (5, 15)) and subject.brain.all()
    assert subject.meta.stats["ct"].min == -40 and subject.facts.brain_share == pytest.approx(2400 / np.prod(SHAPE))
    noise = write_nifti(tmp_path / "noise.nii.gz", np.random.default_rng(0).integers(0, 99, SHAPE).astype(np.int16))
    with pytest.raises(UserError, match=r"noise\.nii\.gz: no one value fills its border \(.* fills \d+ %\)"):
        preprocess(case_of({"ct": noise}), data_set("ct", labels=False, preprocessing={"background": "border"}))


def with_mask(folder, mask, label=None, affine=BRATS_AFFINE):
    image = head(1)
    image[image == 0] = 40  # not skull-stripped: no background at all
    label = None if label is None else write_nifti(folder / "seg.nii.gz", label)
    return case_of({"t1": write_nifti(folder / "t1.nii.gz", image)}, label, write_nifti(folder / "brain.nii.gz", mask, affine))


@pytest.mark.parametrize("value", [1, 255])
def test_a_given_mask_is_the_brain(tmp_path, value):
    mask = np.zeros(SHAPE, np.uint8)
    mask[6:15, 5:16, 4:14] = value
    mask[9, 9, 9] = 0  # a hole in a given mask stays
    subject = preprocess(with_mask(tmp_path, mask), data_set("t1", labels=False))
    np.testing.assert_array_equal(restore(subject.brain, subject.meta), mask > 0)
    assert subject.meta.brain_from == "mask" and set(np.unique(subject.brain)) == {0, 1}
    assert not subject.image[0][subject.brain == 0].any()


BAD_MASKS = {
    "empty": (lambda m: m * 0, BRATS_AFFINE, r"brain\.nii\.gz: the brain mask is empty"),
    "soft": (lambda m: m * np.linspace(0, 1, m.shape[0])[:, None, None], BRATS_AFFINE, r"brain\.nii\.gz: a brain mask holds 0 and one positive value, this one 0"),
    "labels": (lambda m: m + (np.arange(m.shape[0]) > 9)[:, None, None] * m, BRATS_AFFINE, r"brain\.nii\.gz: a brain mask holds 0 and one positive value, this one 0, 1, 2;"),
    "negative": (lambda m: -m.astype(np.int16), BRATS_AFFINE, r"brain\.nii\.gz: a brain mask holds"),
    "no zero": (lambda m: m + 1, BRATS_AFFINE, r"brain\.nii\.gz: a brain mask holds"),
    "shape": (lambda m: m[:-1], BRATS_AFFINE, r"brain\.nii\.gz: shape \(23, 22, 20\) differs from .*t1\.nii\.gz"),
    "elsewhere": (lambda m: m, BRATS_AFFINE + np.eye(4, k=3), r"brain\.nii\.gz: its affine differs from that of .*t1\.nii\.gz"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_MASKS)
def test_a_mask_that_is_none_is_refused(tmp_path, name):
    change, affine, message = BAD_MASKS[name]
    mask = np.zeros(SHAPE, np.uint8)
    mask[6:15, 5:16, 4:14] = 1
    with pytest.raises(UserError, match=message) as error:
        preprocess(with_mask(tmp_path, change(mask), affine=affine), data_set("t1", labels=False))
    assert "\n" not in str(error.value)
    case = with_mask(tmp_path, change(mask), affine=affine)
    if name in ("shape", "elsewhere"):
        with pytest.raises(UserError, match=message):
            check_headers(case, data_set("t1", labels=False))


def test_a_tumour_outside_the_given_mask_is_kept_counted_and_does_not_widen_the_brain(tmp_path):
    mask, label = np.zeros(SHAPE, np.uint8), np.zeros(SHAPE, np.uint8)
    mask[6:15, 5:16, 4:14] = 1
    label[13:18, 8:10, 8:10] = 2  # 2 of 5 slices inside
    subject = preprocess(with_mask(tmp_path, mask, label), data_set("t1"))
    np.testing.assert_array_equal(restore(subject.label, subject.meta), label)
    np.testing.assert_array_equal(restore(subject.brain, subject.meta), mask)
    assert (subject.facts.labelled_voxels, subject.facts.labelled_in_brain) == (20, 8)


@settings(max_examples=20)
@given(margin=st.integers(0, 12))
def test_margin_is_kept_around_the_brain_and_clipped_to_the_volume(tmp_path_factory, margin):
    image, label = asymmetric()
    folder = tmp_path_factory.mktemp("margin")
    case = case_of({"t1": write_nifti(folder / "t1.nii", image, np.eye(4))}, write_nifti(folder / "seg.nii", label, np.eye(4)))
    subject = preprocess(case, data_set("t1", preprocessing={"margin_voxels": margin}))
    tight = ((2, 7), (1, 7), (1, 5))
    assert subject.meta.crop_box == tuple((max(a - margin, 0), min(b + margin, n)) for (a, b), n in zip(tight, image.shape))
    np.testing.assert_array_equal(restore(subject.label, subject.meta), label)
    np.testing.assert_array_equal(restore(subject.brain, subject.meta), image != 0)
    assert not subject.image[0][subject.brain == 0].any()


def binary(seed):
    """A scan that varies in the file and not in the brain."""
    return (head(seed) != 0) * 9


@pytest.mark.parametrize("flat", [lambda: head(1) * 0, lambda: np.full(SHAPE, 5, np.int16), lambda: binary(1)])
def test_a_constant_scan_counts_as_missing_where_scans_may_be(tmp_path, flat):
    files = {"t1": write_nifti(tmp_path / "t1.nii.gz", flat().astype(np.int16)), "t2": write_nifti(tmp_path / "t2.nii.gz", head(1))}
    with pytest.raises(UserError, match=r"t1\.nii\.gz: every brain voxel has the same value.*allow_missing"):
        preprocess(case_of(files), data_set("t1", "t2", labels=False))
    subject = preprocess(case_of(files), data_set("t1", "t2", labels=False, allow_missing=True))
    assert subject.meta.sequences == ("t2",) and subject.meta.constant == ("t1",) and subject.facts.constant == ("t1",)
    assert not subject.image[0].any()
    alone = preprocess(case_of({"t2": files["t2"]}), data_set("t2", labels=False))
    np.testing.assert_array_equal(subject.image[1], alone.image[0])  # a constant scan does not widen the brain
    with pytest.raises(UserError, match="subject s: .*leave this subject out"):
        preprocess(case_of({"t1": files["t1"]}), data_set("t1", "t2", labels=False, allow_missing=True))


def test_labels_are_translated_and_strangers_stop_the_build(tmp_path):
    data = np.zeros(SHAPE, np.int16)
    data[8, 8, 8:12] = 10, 3, 600, 2
    case = case_of({"t1": write_nifti(tmp_path / "t1.nii.gz", head(1))}, write_nifti(tmp_path / "seg.nii.gz", data))
    subject = preprocess(case, data_set("t1", label_map={10: 1, 3: 4, 600: 2}))
    assert restore(subject.label, subject.meta)[8, 8, 8:12].tolist() == [1, 4, 2, 2]
    with pytest.raises(UserError, match=r"seg\.nii\.gz: label values 600 are outside scheme brats2018 \(0, 1, 2, 4\) and not in its label_map"):
        preprocess(case, data_set("t1", label_map={10: 1, 3: 4}))
    subject = preprocess(case, data_set("t1", label_map={10: 1, 3: 4}, label_rest=0))
    assert restore(subject.label, subject.meta)[8, 8, 8:12].tolist() == [1, 4, 0, 0]
    subject = preprocess(case, data_set("t1", label_map={10: 1, 3: 4}, label_rest=2))
    back = restore(subject.label, subject.meta)
    assert back[8, 8, 8:12].tolist() == [1, 4, 2, 2] and np.count_nonzero(back) == 4  # background stays background


def test_site_and_field_strength_reach_the_meta_data_and_texts_of_the_header_do_not(tmp_path):
    image = nib.Nifti1Image(head(1), BRATS_AFFINE)
    image.header["descrip"] = image.header["aux_file"] = b"Jane Doe"
    image.header["db_name"] = image.header["intent_name"] = b"Jane Doe"
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"Jane Doe"))
    nib.save(image, tmp_path / "t1.nii.gz")
    assert b"Jane Doe" in gzip.decompress((tmp_path / "t1.nii.gz").read_bytes())
    subject = preprocess(case_of({"t1": tmp_path / "t1.nii.gz"}, site="Guys", field_strength_t=1.5), data_set("t1", labels=False))
    assert (subject.meta.site, subject.meta.field_strength_t) == ("Guys", 1.5) == (subject.facts.site, subject.facts.field_strength_t)
    written = subject.image.tobytes() + subject.brain.tobytes() + (subject.meta.model_dump_json() + subject.facts.model_dump_json()).encode()
    assert b"Jane" not in written and str(tmp_path).encode() not in written


def test_a_zscore_beyond_float16_is_refused(tmp_path):
    stats = preprocess(case_of({"t1": write_nifti(tmp_path / "t1.nii.gz", head(1))}), data_set("t1", labels=False)).meta.stats["t1"]
    far = np.array([stats.mean + 65504 * stats.std, stats.mean - 65504 * stats.std])
    assert np.isfinite(stored_zscore(far, stats, Volume(tmp_path / "t1.nii.gz"))).all()
    with pytest.raises(UserError, match=r"t1\.nii\.gz: a voxel lies 7e\+04 standard deviations from the mean, beyond float16"):
        stored_zscore(np.array([stats.mean - 70000 * stats.std]), stats, Volume(tmp_path / "t1.nii.gz"))
    with pytest.raises(UserError, match="beyond float32"):
        preprocess(case_of({"t1": write_nifti(tmp_path / "t1.nii", with_value(head(1), 1e300, np.float64))}), data_set("t1", labels=False))

"""Clearing up label maps: the rules by hand, their place in evaluation and prediction, and how windows are averaged."""

import json
import shutil

import nibabel as nib
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from trained_run import CROP, make_run, predictor_and_source

from mstkd.config import InferenceConfig
from mstkd.errors import UserError
from mstkd.evaluate.inference import Predictor, evaluation_mode, predict_logits
from mstkd.evaluate.postprocess import clear_components, postprocess
from mstkd.evaluate.label_files import evaluate_predictions
from mstkd.evaluate.run import evaluate_run
from mstkd.predict import predict_folder
from mstkd.shards.spec import LABEL_SCHEMES, read_splits

SCHEME = LABEL_SCHEMES["brats2018"]  # core 1, oedema 2, enhancing 4
MM = (1.0, 1.0, 1.0)


def tumour(shape=(60, 60, 80)) -> np.ndarray:
    """An oedema of 10,000 voxels, 31 to 55 mm above the lowest slice."""
    labels = np.zeros(shape, np.uint8)
    labels[10:30, 10:30, 31:56] = 2
    return labels


def clear(labels, **words):
    return postprocess(labels, words.pop("scheme", SCHEME), words.pop("spacing_mm", MM), **words)


def test_an_island_is_removed_and_what_is_large_enough_stays():
    labels = tumour()
    labels[40:50, 40:45, 60] = 2  # 50 voxels
    labels[40:50, 40:50, 40:50] = 2  # 1000: a tenth of the largest
    result = clear(labels)
    assert not result[:, :, 60].any() and (result[40:50, 40:50, 40:50] == 2).all()
    assert np.count_nonzero(result) == 11_000
    labels[40, 40, 49] = 0  # 999
    assert np.array_equal(clear(labels), tumour())


def test_components_touch_by_edges_and_not_by_corners():
    labels = tumour()
    labels[30, 30, 40] = labels[31, 31, 41] = 2  # an edge away from the tumour; a corner away from that voxel
    result = clear(labels)
    assert result[30, 30, 40] == 2 and result[31, 31, 41] == 0


@pytest.mark.parametrize(("top", "stays"), [(25, False), (26, True)])
def test_what_lies_at_the_bottom_of_the_image_is_removed(top, stays):
    labels = np.zeros((60, 60, 80), np.uint8)
    labels[10:40, 10:40, 5 : top + 1] = 2
    assert clear(labels).any() == stays
    # the same tumour in a box that begins at slice 5, and in slices of half the thickness
    assert clear(labels[..., 5:], bottom_mm=5.0).any() == stays
    assert clear(np.repeat(labels, 2, axis=2)[..., 1:], spacing_mm=(1, 1, 0.5), bottom_mm=0.0).any() == stays


@pytest.mark.parametrize(("voxels", "left"), [(499, 0), (500, 500)])
@pytest.mark.parametrize("scheme", ["brats2018", "brats2023", "msd_task01"])
def test_little_enhancing_tumour_becomes_core(voxels, left, scheme):
    paint = LABEL_SCHEMES[scheme].paint
    labels = np.where(tumour() > 0, np.uint8(paint["WT"]), np.uint8(0))
    labels.reshape(-1)[np.flatnonzero(labels)[:voxels]] = paint["ET"]
    result = clear(labels, scheme=LABEL_SCHEMES[scheme])
    assert np.count_nonzero(result == paint["ET"]) == left and np.count_nonzero(result == paint["TC"]) == voxels - left
    assert np.count_nonzero(result) == 10_000


def test_thresholds_are_volumes_and_arguments():
    labels = tumour()
    labels.reshape(-1)[np.flatnonzero(labels)[:100]] = 4
    assert not (clear(labels) == 4).any() and not (clear(labels, spacing_mm=(1.7, 1.7, 1.7)) == 4).any()  # 491 mm^3
    assert (clear(labels, spacing_mm=(1.8, 1.8, 1.8)) == 4).sum() == 100  # 583 mm^3
    assert (clear(labels, enhancing_mm3=100) == 4).sum() == 100
    assert not clear(labels, lowest_mm=55).any()
    labels[50:55, 50:55, 40:45] = 2  # 125
    assert clear(labels)[52, 52, 42] == 0 and clear(labels, component_mm3=125)[52, 52, 42] == 2 == clear(labels, component_share=0.01)[52, 52, 42]


@settings(max_examples=30)
@given(seed=st.integers(0, 2**31))
def test_a_second_time_changes_nothing_and_neither_does_the_input_change(seed):
    rng = np.random.default_rng(seed)
    labels = rng.choice(np.array([0, 0, 0, 0, 1, 2, 4], np.uint8), (24, 24, 40))
    labels = labels * (np.kron(rng.random((6, 6, 10)), np.ones((4, 4, 4))) > 0.6)
    labels = labels.astype(np.uint8)
    before = labels.copy()
    once = clear(labels)
    assert np.array_equal(labels, before) and np.array_equal(clear(once), once)
    assert not (once > 0)[labels == 0].any()


def test_nothing_stays_nothing_and_a_cavity_is_no_tumour():
    assert not clear(np.zeros((4, 4, 4), np.uint8)).any()
    labels = tumour()
    labels[50:52, 50:52, 40] = 4  # resection cavity of brats2024: outside every region, whatever its size
    assert np.array_equal(clear(labels, scheme=LABEL_SCHEMES["brats2024"]), labels)


def test_the_second_brightest_oedema_becomes_core_only_where_t1ce_is_given():
    labels, t1ce = tumour(), np.zeros((60, 60, 80))
    t1ce[10:30, 10:30, 31:40], t1ce[10:30, 10:30, 40:50], t1ce[10:30, 10:30, 50:56] = 3.0, 5.0, 9.0
    assert np.array_equal(clear(labels), labels)
    result = clear(labels, t1ce=t1ce)
    assert np.array_equal(result == 1, t1ce == 5.0) and np.array_equal(result > 0, labels > 0)
    assert np.array_equal(clear(labels, t1ce=7 - 0 * t1ce), labels)  # no three clusters
    labels[10:30, 10:30, 31:37] = 4  # a quarter of the tumour enhances: nothing is missing
    assert np.array_equal(clear(labels, t1ce=t1ce), labels)


def parts() -> np.ndarray:
    """Two tumours, of 1000 and 27 voxels, each with core (64, 8) and an enhancing voxel or two, which touch by a corner."""
    labels = np.zeros((30, 30, 30), np.uint8)
    labels[2:12, 2:12, 2:12], labels[4:8, 4:8, 4:8], labels[5, 5, 5], labels[6, 6, 6] = 2, 1, 4, 4
    labels[20:23, 20:23, 20:23], labels[20:22, 20:22, 20:22], labels[21, 21, 21] = 2, 1, 4
    return labels


@pytest.mark.parametrize(
    ("least", "largest", "change"),
    [
        ({"WT": 0.028}, (), {(20, 22): 0}),  # with all that is in it
        ({"WT": 0.027}, (), {}),
        ({"TC": 0.009}, (), {(20, 22): 2}),
        ({"ET": 0.002}, (), {"last": 1}),
        ({"ET": 0.003}, (), {"last": 1, "first": 1}),  # two voxels by a corner are one component
        ({}, ("ET",), {"last": 1}),
        ({}, ("TC",), {(20, 22): 2}),
        ({}, ("WT",), {(20, 22): 0}),
        ({"WT": 2.0}, (), {(2, 12): 0, (20, 22): 0}),
    ],
)
def test_a_small_component_becomes_what_it_lies_in(least, largest, change):
    labels = parts()
    expected = labels.copy()
    for where, value in change.items():
        if where == "last":
            expected[21, 21, 21] = value
        elif where == "first":
            expected[5, 5, 5] = expected[6, 6, 6] = value
        elif value == 0:
            expected[where[0] : where[1] + 1, where[0] : where[1] + 1, where[0] : where[1] + 1] = 0
        else:
            expected[where[0] : where[1], where[0] : where[1], where[0] : where[1]] = value
    found = clear_components(labels, SCHEME, MM, least, largest)
    assert np.array_equal(found, expected) and np.array_equal(labels, parts())
    assert np.array_equal(clear_components(found, SCHEME, MM, least, largest), found)


def test_volumes_are_in_ml_and_a_tissue_becomes_background():
    labels = parts()
    assert np.array_equal(clear_components(labels, SCHEME, (2.0, 2.0, 2.0), {"WT": 0.216}), labels)  # 27 x 8 mm^3
    assert not clear_components(labels, SCHEME, (2.0, 2.0, 2.0), {"WT": 0.217})[20:].any()
    tissue = np.zeros((8, 8, 8), np.uint8)
    tissue[:4], tissue[6, 6, 6] = 3, 2
    cleared = clear_components(tissue, LABEL_SCHEMES["tissue3"], MM, {"GM": 0.01, "WM": 0.01})
    assert cleared[6, 6, 6] == 0 and (cleared[:4] == 3).all()


# in evaluation and prediction


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("postprocess"))


def test_evaluation_with_it_equals_prediction_with_it_in_any_orientation(run, tmp_path):
    nifti = run.parents[1] / "nifti"
    subject = read_splits(run.parents[1] / "shards").test[0]
    plain, cleared = evaluate_run(run), evaluate_run(run, postprocess="cc+et")
    assert plain["subsets"] != cleared["subsets"] and "cc+et" in cleared["conventions"]["postprocess"] and "postprocess" not in plain["conventions"]
    folder = run / "evaluation" / "shards-test-cc+et"
    assert json.loads((folder / "summary.json").read_text())["mean"] == cleared["mean"]
    assert json.loads((run / "evaluation" / "summary.json").read_text())["mean"] == plain["mean"]  # the other one stays
    for subject in read_splits(run.parents[1] / "shards").test:
        shutil.copytree(nifti / subject, tmp_path / "input" / subject)
        for path in (tmp_path / "input" / subject).iterdir():
            turn = nib.orientations.ornt_transform(nib.io_orientation(nib.load(path).affine), nib.orientations.axcodes2ornt("SPL"))
            nib.save(nib.load(path).as_reoriented(turn), path)
    predict_folder(run, tmp_path / "input", tmp_path / "out", postprocess="cc+et")
    scored = evaluate_predictions(tmp_path / "out", tmp_path / "input", "phantom", tmp_path / "scores")
    for region, cell in scored["mean"].items():
        assert cell["dice"] == pytest.approx(cleared["subsets"]["flair+t1+t1ce+t2"][region]["dice"], abs=1e-12)


def test_hidden_t1ce_is_not_clustered(run):
    shards = run.parents[1] / "shards"
    plain, source = predictor_and_source(shards)
    inference = InferenceConfig(postprocess="cc+cluster+et")
    predictor = Predictor(plain.method, source.sequences, CROP, inference, torch.device("cpu"), source.label_scheme)
    sample = source.subject(source.subjects("all")[0])
    volume = predictor.volume(sample.image, sample.brain, sample.meta)
    with evaluation_mode(predictor.method):
        seen, hidden = (predictor.scores("student", volume, subset) for subset in ((True,) * 4, (True, True, False, True)))
        assert torch.equal(seen[-1], volume.image[0, 2][volume.inner]) and len(seen) == len(hidden) + 1
        before = predictor.labels("student", volume, (True, True, False, True))
        volume.image[0, 2] = torch.rand_like(volume.image[0, 2])
        assert np.array_equal(before, predictor.labels("student", volume, (True, True, False, True)))


@pytest.mark.parametrize(
    ("rule", "sequences", "scheme", "message"),
    [
        ("cc+et", ("flair", "t1"), "tissue3", "inference.postprocess cc.et: is for label maps of tumours"),
        ("cc+cluster+et", ("flair", "t1"), "brats2018", "needs a sequence t1ce; the data has flair, t1; use cc.et"),
    ],
)
def test_what_it_cannot_do_is_one_line(run, rule, sequences, scheme, message):
    method = predictor_and_source(run.parents[1] / "shards")[0].method
    with pytest.raises(UserError, match=message):
        Predictor(method, sequences, CROP, InferenceConfig(postprocess=rule), torch.device("cpu"), LABEL_SCHEMES[scheme])


# averaging windows


class Constant:
    """A method whose logits are the window's mean of the first sequence."""

    painters = ()

    def predict(self, image, available, network):
        return image[:, :1].mean((2, 3, 4), keepdim=True).expand(-1, 3, *image.shape[2:]).clone()


@pytest.mark.parametrize("average", ["logits", "probabilities"])
@pytest.mark.parametrize("blend", ["gaussian", "uniform"])
def test_a_constant_stays_constant_over_a_whole_volume(blend, average):
    image = torch.full((1, 1, 240, 240, 155), 0.4)
    inference = InferenceConfig(overlap=0.33, blend=blend, average=average, batch=4)
    logits = predict_logits(Constant(), "student", image, torch.ones(1, 1, dtype=torch.bool), (160, 160, 80), inference)
    torch.testing.assert_close(logits, torch.full((1, 3, 240, 240, 155), 0.4), atol=1e-4, rtol=0)


def test_probabilities_are_averaged_with_equal_weights_where_asked():
    image = torch.full((1, 1, 12, 8, 8), -2.0)
    image[:, :, 8:] = 10.0
    windows = torch.tensor([-2.0, 4.0])  # logits of the two, which overlap by half
    for average, expected in (("logits", windows.mean()), ("probabilities", windows.sigmoid().mean().logit())):
        inference = InferenceConfig(overlap=0.5, blend="uniform", average=average)
        logits = predict_logits(Constant(), "student", image, torch.ones(1, 1, dtype=torch.bool), (8, 8, 8), inference)
        assert logits[0, 0, :, 0, 0].tolist() == pytest.approx([-2.0] * 4 + [float(expected)] * 4 + [4.0] * 4, abs=1e-4)

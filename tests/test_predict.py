"""From NIfTI to label maps on the same grid, and the student for use elsewhere."""

import json
import shutil

import nibabel as nib
import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from toys.linear import Linear
from trained_run import make_run, write_run

from mstkd.data.store import ShardStore
from mstkd.errors import CasesFailedError, UserError
from mstkd.evaluate.label_files import evaluate_predictions
from mstkd.evaluate.run import evaluate_run
from mstkd.evaluate.summary import COUNTS
from mstkd.predict import predict_folder
from mstkd.predict.images import save_like
from mstkd.shards.build import build
from mstkd.shards.dataset import SPEC_FOLDER, Volume
from mstkd.shards.phantom import write_phantom
from mstkd.shards.spec import read_splits
from mstkd.shards.verify import verify

SUBJECT = "Phantom_0001"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("predict"))


@pytest.fixture
def case(run, tmp_path):
    """A copy of one subject's folder, alone in `input`."""
    return shutil.copytree(run.parents[1] / "nifti" / SUBJECT, tmp_path / "input" / SUBJECT)


def scan(case, name):
    return case / f"{SUBJECT}_{name}.nii.gz"


def voxels(path):
    return np.asanyarray(nib.load(path).dataobj)


def test_evaluate_run_equals_predict_then_evaluate_pred(run, tmp_path):
    """For all sequences, and for two of them where the brain they show is the same."""
    nifti = run.parents[1] / "nifti"
    summary = evaluate_run(run)["subsets"]
    for subset in ("flair+t1+t1ce+t2", "t1ce+t2"):
        source = tmp_path / subset
        for subject in read_splits(run.parents[1] / "shards").test:
            folder = source / subject
            folder.mkdir(parents=True)
            for name in subset.split("+"):
                shutil.copy(nifti / subject / f"{subject}_{name}.nii.gz", folder)
        predict_folder(run, source, tmp_path / f"{subset}-out")
        scored = evaluate_predictions(tmp_path / f"{subset}-out", nifti, "phantom", tmp_path / f"{subset}-scores")
        assert list(scored["subsets"]) == [subset]
        for region, expected in summary[subset].items():
            got = scored["subsets"][subset][region]
            assert {k: got[k] for k in (*COUNTS, "dice", "dice_nonempty")} == {k: expected[k] for k in (*COUNTS, "dice", "dice_nonempty")}
            assert got["hd95_mm"] == pytest.approx(expected["hd95_mm"], rel=1e-6)
        assert summary[subset]["WT"]["dice"] > 0.1  # there is something to agree on


def test_label_maps_keep_the_grid_and_drop_the_texts(run, case, tmp_path):
    source = nib.load(scan(case, "flair"))
    tilted = nib.affines.from_matvec(nib.eulerangles.euler2mat(0.1, 0.05, 0) @ np.diag([-2.0, -2.0, 3.0]), [10.0, 20, -30])
    for name in ("flair", "t1", "t1ce", "t2"):
        image = nib.Nifti1Image(voxels(scan(case, name)), tilted)
        image.set_sform(tilted, 2)
        image.set_qform(tilted, 1)
        image.header["descrip"], image.header["aux_file"] = b"Jane Doe", b"/home/jane"
        image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"Jane Doe"))
        nib.save(image, scan(case, name))
    (written,) = predict_folder(run, case.parent, tmp_path / "out")
    result, source = nib.load(written), nib.load(scan(case, "flair"))
    assert result.shape == source.shape and result.get_data_dtype() == np.uint8
    np.testing.assert_array_equal(result.affine, source.affine)
    for form in ("get_qform", "get_sform"):
        (matrix, code), (expected, expected_code) = getattr(result, form)(coded=True), getattr(source, form)(coded=True)
        assert code == expected_code
        np.testing.assert_allclose(matrix, expected, atol=1e-5)
    assert result.header["descrip"] == b"" and result.header["aux_file"] == b"" and not result.header.extensions
    assert set(np.unique(voxels(written))) <= {0, 1, 2, 4} and voxels(written).any()


@pytest.mark.parametrize("codes", ["RAS", "LPS", "PIR", "SAL"])
def test_left_stays_left_in_every_orientation(run, case, tmp_path, codes):
    """The prediction of a reoriented case is the reoriented prediction."""
    (plain,) = predict_folder(run, case.parent, tmp_path / "plain")
    turn = None
    for name in ("flair", "t1", "t1ce", "t2"):
        image = nib.load(scan(case, name))
        turn = nib.orientations.ornt_transform(nib.io_orientation(image.affine), nib.orientations.axcodes2ornt(codes))
        nib.save(image.as_reoriented(turn), scan(case, name))
    (turned,) = predict_folder(run, case.parent, tmp_path / "turned")
    expected = nib.load(plain).as_reoriented(turn)
    assert nib.aff2axcodes(nib.load(turned).affine) == tuple(codes)
    np.testing.assert_array_equal(voxels(turned), np.asanyarray(expected.dataobj))
    # lopsided, so that a flip would show
    assert not np.array_equal(voxels(plain), voxels(plain)[::-1])


@pytest.fixture(scope="module")
def pointwise_run(run):
    """The run with networks that look at one voxel at a time, so that what they find does not depend on the spacing."""
    (weights,) = run.rglob("both.safetensors")
    copy = shutil.copytree(run, run.with_name("pointwise")) / weights.relative_to(run)
    values = load_file(copy)
    for name in [name for name in values if name.endswith("weight")]:
        centre = torch.zeros_like(values[name])
        centre[..., 1, 1, 1] = values[name].sum(dim=(2, 3, 4))
        values[name] = centre
    save_file(values, copy)
    return run.with_name("pointwise")


def phantom_spec(path, **changes):
    """The phantom's spec with changes, as a file."""
    spec = yaml.safe_load((SPEC_FOLDER / "phantom.yaml").read_text())
    path.write_text(yaml.safe_dump({**spec, "name": "mine", **changes}))
    return str(path)


@pytest.mark.parametrize("codes", ["RAS", "LPS", "PIR"])
def test_a_resampled_case_comes_back_on_its_own_grid(pointwise_run, case, tmp_path, codes):
    """Predicted at another spacing than the file's, whatever its orientation; the same tumour as without resampling."""
    for name in ("flair", "t1", "t1ce", "t2"):
        image = nib.load(scan(case, name))
        turn = nib.orientations.ornt_transform(nib.io_orientation(image.affine), nib.orientations.axcodes2ornt(codes))
        nib.save(image.as_reoriented(turn), scan(case, name))
    (plain,) = predict_folder(pointwise_run, case.parent, tmp_path / "plain")
    own = [float(zoom) for zoom in nib.load(plain).header.get_zooms()]
    spec = phantom_spec(tmp_path / "mine.yaml", preprocessing={"spacing_mm": [0.6 * min(own), 0.6 * min(own), 0.8 * min(own)]})
    (written,) = predict_folder(pointwise_run, case.parent, tmp_path / "finer", spec=spec)
    result, expected = nib.load(written), nib.load(plain)
    assert result.shape == expected.shape
    np.testing.assert_array_equal(result.affine, expected.affine)
    one, other = voxels(written) > 0, voxels(plain) > 0
    assert other.sum() > 20 and 2 * (one & other).sum() / (one.sum() + other.sum()) > 0.85
    assert 2 * (one[::-1] & other).sum() / (one.sum() + other.sum()) < 0.7  # a flip would show
    assert 2 * (one[1:] & other[:-1]).sum() < 2 * (one & other).sum() > 2 * (one[:-1] & other[1:]).sum()  # and so would a shift


def test_a_resampled_set_is_scored_on_the_grid_of_its_files(tmp_path):
    """As predict and evaluate --pred score it; its shards keep the label of the files beside the resampled one."""
    write_phantom(tmp_path / "nifti", subjects=10, size=32, seed=5)
    spec = phantom_spec(tmp_path / "mine.yaml", preprocessing={"spacing_mm": [4.0, 4.0, 7.0]})
    build(spec, tmp_path / "nifti", tmp_path / "shards")
    verify(tmp_path / "shards")
    run = write_run(tmp_path, "toy", {"name": "toys.linear"})
    summary = evaluate_run(run)["subsets"]["flair+t1+t1ce+t2"]
    for subject in read_splits(tmp_path / "shards").test:
        shutil.copytree(tmp_path / "nifti" / subject, tmp_path / "input" / subject)
        label = ShardStore(tmp_path / "shards").file_label(subject)
        np.testing.assert_array_equal(label, voxels(tmp_path / "nifti" / subject / f"{subject}_seg.nii.gz"))
    predict_folder(run, tmp_path / "input", tmp_path / "out", spec=spec)
    scored = evaluate_predictions(tmp_path / "out", tmp_path / "nifti", spec, tmp_path / "scores")["subsets"]["flair+t1+t1ce+t2"]
    for region, expected in summary.items():
        for name in (*COUNTS, "dice", "dice_nonempty", "hd95_mm"):
            assert scored[region][name] == pytest.approx(expected[name], rel=1e-6), (region, name)
    assert summary["WT"]["dice"] > 0.1


def test_channels_of_one_file_and_other_formats_predict_the_same(run, case, tmp_path):
    names = ("flair", "t1", "t1ce", "t2")
    (plain,) = predict_folder(run, case.parent, tmp_path / "plain")
    stack = np.stack([voxels(scan(case, name)) for name in names], -1)
    affine = nib.load(scan(case, "flair")).affine
    whole = nib.Nifti1Image(stack, affine)
    whole.header["descrip"] = b"Jane Doe"
    (tmp_path / "stacked").mkdir()
    nib.save(whole, tmp_path / "stacked" / f"{SUBJECT}.nii.gz")
    spec = phantom_spec(tmp_path / "stacked.yaml", layout="flat", sequences={name: f"{{subject}}.nii.gz#{k}" for k, name in enumerate(names)}, labels="none", label=None, label_scheme=None)
    (written,) = predict_folder(run, tmp_path / "stacked", tmp_path / "from-stack", spec=spec)
    np.testing.assert_array_equal(voxels(written), voxels(plain))
    assert nib.load(written).shape == stack.shape[:3] and nib.load(written).header["descrip"] == b""
    np.testing.assert_array_equal(nib.load(written).affine, affine)


@pytest.mark.parametrize("kind", [nib.AnalyzeImage, nib.Nifti1Pair, nib.Nifti2Image, nib.MGHImage])
def test_a_label_map_is_nifti_whatever_it_lies_on(tmp_path, kind):
    labels = np.arange(60, dtype=np.uint8).reshape(3, 4, 5) % 5
    suffix = {nib.Nifti2Image: ".nii", nib.MGHImage: ".mgz"}.get(kind, ".img")
    nib.save(kind(np.zeros((3, 4, 5), np.float32), np.diag([-1.0, 2, 3, 1])), tmp_path / f"scan{suffix}")
    save_like(labels, Volume(tmp_path / f"scan{suffix}"), tmp_path / "labels.nii.gz")
    written = nib.load(tmp_path / "labels.nii.gz")
    assert written.get_data_dtype() == np.uint8 and isinstance(written, nib.Nifti2Image if kind is nib.Nifti2Image else nib.Nifti1Image)
    np.testing.assert_array_equal(np.asanyarray(written.dataobj), labels)
    np.testing.assert_allclose(written.affine, nib.load(tmp_path / f"scan{suffix}").affine, atol=1e-5)


def test_any_subset_will_do_and_is_said(run, case, tmp_path, capsys):
    scan(case, "seg").write_bytes(b"labels must not be looked at")
    scan(case, "t1").unlink()
    predict_folder(run, case.parent, tmp_path / "three")
    assert f"{SUBJECT}: flair+t1ce+t2" in capsys.readouterr().out
    scan(case, "flair").unlink()
    scan(case, "t2").unlink()
    predict_folder(run, case.parent, tmp_path / "one")
    assert used(tmp_path / "one") == {SUBJECT: "t1ce"}
    assert not np.array_equal(voxels(tmp_path / "one" / f"{SUBJECT}.nii.gz"), voxels(tmp_path / "three" / f"{SUBJECT}.nii.gz"))


def test_a_method_of_few_subsets_is_given_the_largest_one_that_the_case_has(run, case, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Linear, "subsets", ("t1", "t1+t2"))
    predict_folder(run, case.parent, tmp_path / "whole")
    assert used(tmp_path / "whole") == {SUBJECT: "t1+t2"}
    scan(case, "t1").unlink()
    with pytest.raises(CasesFailedError, match=f"1 of 1 cases failed: {SUBJECT}"):
        predict_folder(run, case.parent, tmp_path / "none")
    assert f"{SUBJECT}: has flair+t1ce+t2, and this run's network needs t1, t1+t2; add what is missing" in capsys.readouterr().err.replace("\n", " ")
    assert not (tmp_path / "none" / f"{SUBJECT}.nii.gz").exists()


def used(folder):
    """Subject -> the sequences that were used."""
    return {subject: noted["subset"] for subject, noted in json.loads((folder / "predictions.json").read_text())["cases"].items()}


def test_bad_input_is_one_line_and_leaves_nothing_behind(run, case, tmp_path):
    def fails(match, **named):
        with pytest.raises(UserError, match=match) as caught:
            predict_folder(run, case.parent, named.pop("output", tmp_path / "out"), **named)
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))

    fails("exists already, and not from mstkd predict; choose another --output", output=case)
    fails("spec phantom_7t: the run knows no sequence t1_3t", spec="phantom_7t")
    for name in ("flair", "t1", "t1ce", "t2"):
        scan(case, name).unlink()
    fails(f"no case can be predicted: subject {SUBJECT}: no flair")


def test_predictions_that_cannot_be_scored_are_refused(run, case, tmp_path):
    def fails(match, pred, ref=case.parent, spec="phantom"):
        with pytest.raises(UserError, match=match) as caught:
            evaluate_predictions(pred, ref, spec, tmp_path / "scores")
        assert "\n" not in str(caught.value) and not (tmp_path / "scores").exists()

    pred = tmp_path / "pred"
    pred.mkdir()
    fails("no predictions; expected <subject>.nii.gz", pred)
    labels = nib.load(scan(case, "seg"))
    stranger = pred / "Stranger.nii.gz"
    nib.save(labels, stranger)
    fails("no truth for subject Stranger", pred)
    stranger.rename(pred / f"{SUBJECT}.nii.gz")
    moved = labels.affine.copy()
    moved[0, 3] += 1
    nib.save(nib.Nifti1Image(voxels(scan(case, "seg")), moved), pred / f"{SUBJECT}.nii.gz")
    fails("its grid .* differs", pred)
    nib.save(nib.Nifti1Image(np.full(labels.shape, 3, np.uint8), labels.affine), pred / f"{SUBJECT}.nii.gz")
    fails("label values 3 are outside scheme brats2018", pred)


def test_truth_may_be_a_flat_folder_of_label_maps(case, tmp_path):
    for folder in ("pred", "ref"):
        (tmp_path / folder).mkdir()
        shutil.copy(scan(case, "seg"), tmp_path / folder / f"{SUBJECT}.nii.gz")
    summary = evaluate_predictions(tmp_path / "pred", tmp_path / "ref", "phantom", tmp_path / "scores")
    assert summary["subsets"]["given"]["WT"]["dice"] == 1.0 and summary["split"] == "given"
    assert json.loads((tmp_path / "scores" / "summary.json").read_text()) == summary

"""Several runs as one, mirrored windows, and what is written beside label maps."""

import json
import shutil

import nibabel as nib
import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from toys.linear import Linear
from trained_run import CROP, make_run, method_and_source, predictor_and_source

from mstkd.config import InferenceConfig
from mstkd.data.sample import Sample
from mstkd.errors import UserError
from mstkd.evaluate.inference import Predictor, evaluation_mode, predict_logits
from mstkd.evaluate.label_files import evaluate_predictions
from mstkd.evaluate.run import evaluate_run
from mstkd.predict import Beside, predict_folder
from mstkd.predict.case import entropy_bits
from mstkd.shards.dataset import SPEC_FOLDER, load_spec
from mstkd.shards.preprocess import preprocess
from mstkd.shards.spec import LABEL_SCHEMES, read_splits
from mstkd.trained_run import open_run

SUBJECT = "Phantom_0001"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs whose networks differ, and see differences along every axis."""
    first = make_run(tmp_path_factory.mktemp("ensemble"))
    second = shutil.copytree(first, first.with_name("fold1"))
    for seed, run in enumerate((first, second)):
        (path,) = run.rglob("both.safetensors")
        generator = torch.Generator().manual_seed(seed)
        save_file({key: value + 0.15 * torch.randn(value.shape, generator=generator) for key, value in load_file(path).items()}, path)
    return first, second


@pytest.fixture
def case(runs, tmp_path):
    return shutil.copytree(runs[0].parents[1] / "nifti" / SUBJECT, tmp_path / "input" / SUBJECT)


def voxels(path):
    return np.asanyarray(nib.load(path).dataobj)


def stored(case):
    dataset = load_spec("phantom")
    (found,) = dataset.find_cases(case.parent, require_complete=False)
    made = preprocess(found, dataset)
    return Sample(made.image, made.brain, None, made.meta)


def test_an_ensembles_labels_and_maps_follow_from_the_mean_probability(runs, case, tmp_path):
    """By hand, from the two runs' own maps."""
    beside = Beside(probabilities=True, uncertainty=True)
    for name, members in (("one", runs[:1]), ("other", runs[1:]), ("both", runs), ("turned", runs[::-1])):
        predict_folder(members, case.parent, tmp_path / name, beside=beside)
    maps = {
        name: {region: voxels(tmp_path / name / "probabilities" / f"{SUBJECT}_{region}.nii.gz") for region in ("WT", "TC", "ET")}
        for name in ("one", "other", "both", "turned")
    }
    labels, bits = voxels(tmp_path / "both" / f"{SUBJECT}.nii.gz"), voxels(tmp_path / "both" / "uncertainty" / f"{SUBJECT}.nii.gz")
    expected, whole = np.zeros_like(labels), np.zeros(labels.shape)
    for region, value in LABEL_SCHEMES["brats2018"].paint.items():
        mean = (maps["one"][region].astype(float) + maps["other"][region]) / 2
        np.testing.assert_allclose(maps["both"][region], mean, atol=1e-5)
        expected[mean > 0.5] = value
        p = mean.clip(1e-9, 1 - 1e-9)
        whole = np.maximum(whole, -p * np.log2(p) - (1 - p) * np.log2(1 - p))
    sure = np.all([np.abs(maps["both"][region] - 0.5) > 1e-4 for region in maps["both"]], axis=0)
    np.testing.assert_array_equal(labels[sure], expected[sure])
    np.testing.assert_allclose(bits, whole, atol=1e-4)
    assert bits.max() <= 1 and bits.dtype == np.float32 and labels.any()
    np.testing.assert_allclose(maps["turned"]["WT"], maps["both"]["WT"], atol=1e-6)
    assert not np.array_equal(labels, voxels(tmp_path / "one" / f"{SUBJECT}.nii.gz"))
    noted = json.loads((tmp_path / "both" / "predictions.json").read_text())
    assert [run["name"] for run in noted["runs"]] == ["toy", "toy"] and noted["runs"][0]["weights_sha256"] != noted["runs"][1]["weights_sha256"]
    evaluate_predictions(tmp_path / "both", case.parent, "phantom", tmp_path / "scores")  # the maps beside are no label maps


class Exclusive(Linear):
    """Background and two classes of which a voxel has one."""

    exclusive = True

    def predict(self, image, available, network="student"):
        return 4 * super().predict(image, available, network)

    def to_labels(self, logits):
        return logits.argmax(1).to(torch.uint8)


def test_classes_that_exclude_each_other_are_averaged_by_softmax(runs, case):
    sample, shards = stored(case), runs[0].parents[1] / "shards"
    _, source = method_and_source(shards)
    scheme, methods = LABEL_SCHEMES["brats2018"], []
    for run in runs:
        method = Exclusive(None, open_run(run).facts)
        (path,) = run.rglob("both.safetensors")
        method.networks["student"].load_state_dict({key.removeprefix("student."): value for key, value in load_file(path).items() if key.startswith("student.")})
        methods.append(method)

    def predictor(*members):
        return Predictor(members[0], source.sequences, CROP, InferenceConfig(), torch.device("cpu"), scheme, members[1:])

    both = predictor(*methods)
    with evaluation_mode(*both.methods):
        volume = both.volume(sample.image, sample.brain, sample.meta)
        single = [predictor(method).scores("student", volume, (True,) * 4).softmax(0) for method in methods]
        found = both.scores("student", volume, (True,) * 4)
    torch.testing.assert_close(found.softmax(0), sum(single) / 2, atol=1e-5, rtol=0)
    assert torch.equal(both.method.to_labels(found[None])[0].long(), (sum(single) / 2).argmax(0))


@pytest.mark.parametrize("average", ["logits", "probabilities"])
def test_mirrored_windows_are_averaged_by_hand(runs, average):
    method = open_run(runs[0]).method
    image, available = torch.randn(1, 4, 24, 24, 24, generator=torch.Generator().manual_seed(1)), torch.ones(1, 4, dtype=torch.bool)

    def logits(mirror):
        return predict_logits(method, "student", image, available, CROP, InferenceConfig(mirror=mirror, average=average))

    with evaluation_mode(method):
        plain, seen, expected = logits(False), logits("xz"), 0
        for flips in ((), (2,), (4,), (2, 4)):
            expected = expected + method.predict(image.flip(flips), available).flip(flips).sigmoid() / 4
    torch.testing.assert_close(seen.sigmoid(), expected, atol=1e-5, rtol=0)
    assert (seen - plain).abs().max() > 0.01


def test_an_evaluation_with_mirroring_and_minimum_volumes_equals_predictions_with_them(runs, tmp_path):
    run, words = runs[0], ["inference.mirror=true", "inference.min_volume_ml={WT: 40, ET: 5}", "inference.largest_component=[TC]"]
    once = ["evaluate.given=present", "evaluate.networks=[student]"]
    plain, summary = evaluate_run(run, overrides=once), evaluate_run(run, overrides=[*once, *words])
    assert plain["subsets"] != summary["subsets"]
    assert "mirrored along xyz" in summary["conventions"]["mirror"] and "WT under 40 ml, ET under 5 ml; TC but the largest" in summary["conventions"]["components"]
    for subject in read_splits(run.parents[1] / "shards").test:
        shutil.copytree(run.parents[1] / "nifti" / subject, tmp_path / "input" / subject)
    predict_folder(run, tmp_path / "input", tmp_path / "out", overrides=words)
    scored = evaluate_predictions(tmp_path / "out", tmp_path / "input", "phantom", tmp_path / "scores")
    for region, cell in scored["mean"].items():
        assert cell["dice"] == pytest.approx(summary["subsets"]["present"][region]["dice"], abs=1e-12)
    settings = json.loads((tmp_path / "out" / "predictions.json").read_text())["settings"]
    assert settings["inference"]["mirror"] == "xyz" and settings["inference"]["min_volume_ml"] == {"WT": 40, "ET": 5}


def test_probabilities_of_a_resampled_case_lie_on_its_own_grid_and_fit_its_labels(runs, case, tmp_path):
    spec = yaml.safe_load((SPEC_FOLDER / "phantom.yaml").read_text())
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({**spec, "name": "mine", "preprocessing": {"spacing_mm": [4.0, 4.0, 7.0]}}))
    (written,) = predict_folder(runs, case.parent, tmp_path / "out", spec=str(tmp_path / "mine.yaml"), beside=Beside(probabilities=True))
    labels, affine = voxels(written), nib.load(case / f"{SUBJECT}_flair.nii.gz").affine
    for region, values in LABEL_SCHEMES["brats2018"].regions.items():
        image = nib.load(tmp_path / "out" / "probabilities" / f"{SUBJECT}_{region}.nii.gz")
        p = np.asanyarray(image.dataobj)
        np.testing.assert_array_equal(image.affine, affine)
        assert p.shape == labels.shape and p.dtype == np.float32 and 0 <= p.min() and p.max() <= 1
        if region == "ET":  # nothing is painted over it
            np.testing.assert_array_equal(p > 0.5, np.isin(labels, values))


def test_entropy_is_in_bits_and_the_largest_region_counts():
    p = {"WT": np.array([0.5, 1.0, 0.25], np.float32), "ET": np.array([0.0, 0.0, 0.5], np.float32)}
    np.testing.assert_allclose(entropy_bits(p), [1, 0, 1], atol=1e-6)
    np.testing.assert_allclose(entropy_bits({"WT": np.array([0.25], np.float32)}), [0.811278], atol=1e-5)


# what is refused


def test_runs_that_differ_in_more_than_fold_and_seed_are_no_ensemble(runs, case, tmp_path):
    def fails(match, *members, **words):
        with pytest.raises(UserError, match=match) as caught:
            predict_folder(members, case.parent, tmp_path / "out", **words)
        assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()

    def changed(name, change):
        other = shutil.copytree(runs[1], tmp_path / name)
        config, record = yaml.safe_load((other / "config.yaml").read_text()), json.loads((other / "record.json").read_text())
        change(config, record["data"])
        (other / "config.yaml").write_text(yaml.safe_dump(config))
        (other / "record.json").write_text(json.dumps(record))
        return other

    fails("toy: is named twice", runs[0], runs[0])
    fails("window is .32, 32, 32., that of .* .24, 24, 24.", runs[0], changed("crop", lambda config, data: config["data"].update(crop=[32, 32, 32])))
    fails("order of sequences is t2, t1ce, t1, flair, that of", runs[0], changed("turned", lambda config, data: data["sequences"].reverse()))
    fails("label scheme is brats2023, that of .* brats2018", runs[0], changed("scheme", lambda config, data: data.update(label_scheme="brats2023")))
    fails("inference is .*overlap=0.25", runs[0], changed("overlap", lambda config, data: config["inference"].update(overlap=0.25)))
    fails("inference.overlap=2: |inference.overlap", runs[0], overrides=["inference.overlap=2"])
    fails("train.steps=9: toy was trained with 1; only inference", runs[0], overrides=["train.steps=9"])
    fails("inference.min_volume_ml: no region Tumour; there are WT, TC, ET", runs[0], overrides=["inference.min_volume_ml={Tumour: 1}"])
    fails("inference.largest_component: no region WM", runs[0], overrides=["inference.largest_component=[WM]"])
    (weights,) = (other := shutil.copytree(runs[1], tmp_path / "other")).rglob("both.safetensors")
    save_file({"critic.weight": torch.zeros(1)}, weights)
    fails("both.safetensors: network critic is none of the method's", other)
    save_file({key: value[:1] for key, value in load_file(next(runs[0].rglob("both.safetensors"))).items()}, weights)
    fails("both.safetensors: does not fit network", other)
    weights.write_bytes(b"cut short")
    fails("both.safetensors: not a sound safetensors file", other)


def test_mirroring_is_refused_where_training_did_not_mirror_or_sides_matter(runs, case, tmp_path):
    unmirrored = shutil.copytree(runs[0], tmp_path / "unmirrored")
    config = yaml.safe_load((unmirrored / "config.yaml").read_text())
    for augment, asked, message in (
        ({"flip_prob": 0.0}, "true", "training mirrored nothing"),
        ({"flip_axes": "x"}, "xy", "training mirrored x alone"),
    ):
        (unmirrored / "config.yaml").write_text(yaml.safe_dump({**config, "data": {**config["data"], "augment": augment}}))
        with pytest.raises(UserError, match=f"inference.mirror: {message}"):
            predict_folder(unmirrored, case.parent, tmp_path / "out", overrides=[f"inference.mirror={asked}"])
    assert open_run(unmirrored, overrides=["inference.mirror=true"]).config.inference.mirror == "x"
    method, source = method_and_source(runs[0].parents[1] / "shards")
    for mirror, refused in (("xy", True), ("y", False)):
        arguments = (method, source.sequences, CROP, InferenceConfig(mirror=mirror), torch.device("cpu"), LABEL_SCHEMES["malc27"])
        if refused:
            with pytest.raises(UserError, match="malc27 tells left from right, which x would mix; leave x out"):
                Predictor(*arguments)
        else:
            Predictor(*arguments)


def test_one_network_alone_predicts_bit_for_bit_as_ever(runs, case):
    """No average, no detour through probabilities; complete input is not copied."""
    run, sample = open_run(runs[0]), stored(case)
    predictor = run.predictor()
    plain, _ = predictor_and_source(runs[0].parents[1] / "shards")
    with evaluation_mode(run.method):
        volume = predictor.volume(sample.image, sample.brain, sample.meta)
        found = predictor.scores("student", volume, (True,) * 4)
        expected = predict_logits(run.method, "student", volume.image, torch.ones(1, 4, dtype=torch.bool), CROP, predictor.inference)
    assert torch.equal(found, expected[0][(..., *volume.inner)]) and plain.members == (plain.method,)

"""UHF-guided segmentation: its stages, what is frozen, what is refused, and two runs from pairs to a guided segmenter."""

import json
import shutil

import nibabel as nib
import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from small_uhf import CROP, PAIR, SMALL, STAGES, START, facts, make, make_batch

from mstkd.config import load_config
from mstkd.errors import UserError
from mstkd.export import export
from mstkd.methods import build, read_config, stage_names
from mstkd.methods.uhf_guided import UHFGuided, UHFGuidedConfig
from mstkd.models.recompute import recompute
from mstkd.predict import predict_folder
from mstkd.shards.build import build as build_set
from mstkd.shards.dataset import SPEC_FOLDER
from mstkd.shards.phantom import write_phantom
from mstkd.teacher_source import stages_left_out

# stages


@pytest.mark.parametrize("stage", STAGES)
def test_recomputation_changes_no_gradient(stage):
    gradients = []
    for again in (False, True):
        method = make()
        role = list(method.roles(stage).values())[-1]
        assert not again or all(recompute(method.networks[name], method.blocks) > 0 for name in role.networks)
        torch.manual_seed(1)
        role.step.train()(make_batch(), {}, START).loss.backward()
        gradients.append([p.grad for p in role.step.parameters()])
    assert all((a is None and b is None) or torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_one_update_of_the_critic_to_one_of_the_keeper_on_the_same_batch():
    method = make()
    roles = method.roles("keeper")
    assert list(roles) == ["critic", "keeper"] and all(role.every == 1 for role in roles.values())
    batch = make_batch()
    critic = roles["critic"].step(batch, {}, START)
    critic.loss.backward()
    assert all(p.grad is None for name in ("keeper", "teacher") for p in method.networks[name].parameters())
    method.networks["teacher"].requires_grad_(False)
    output = roles["keeper"].step(batch, {}, START)
    output.loss.backward()
    assert all(p.grad is not None for p in method.networks["keeper"].parameters() if p.ndim > 1)
    assert all(p.grad is None for p in method.networks["teacher"].parameters())
    terms = output.scalars
    assert set(terms) == {"feature", "moment", "image", "adversarial"}
    assert float(output.loss.detach()) == pytest.approx(float(terms["feature"] + terms["moment"] + 100 * terms["image"] + terms["adversarial"]), rel=1e-5)


def test_fusion_begins_with_the_base_and_keeps_it():
    method = make()
    torch.nn.init.ones_(method.networks["base"].encoder[0][0].weight)
    method.begin("fusion")
    base, student = method.networks["base"].state_dict(), method.networks["student"].segmenter.state_dict()
    assert all(torch.equal(value, student[key]) for key, value in base.items())
    method.roles("fusion")["student"].step.train()(make_batch(), {}, START).loss.backward()
    assert all(p.grad is None for name in ("keeper", "base") for p in method.networks[name].parameters())


def test_only_the_low_field_image_is_asked_for():
    method, image = make(), torch.rand(1, 2, *CROP)
    available = torch.tensor([[True, False]])
    for network in ("student", "base", "keeper"):
        with torch.no_grad():
            logits = method.predict(image, available, network)
            image[:, 1] = float("nan")
            assert torch.equal(method.predict(image, available, network), logits)
    assert method.subsets == ("t1_3t",) and method.availability("fusion").subsets == ["t1_3t"] and method.availability("keeper").kind == "natural"
    labels = method.to_labels(method.predict(image, available))
    assert labels.dtype == torch.uint8 and set(labels.unique().tolist()) <= {0, 1, 2, 3}


def test_the_sequences_may_be_named():
    method = make(("t1_7t", "t2", "t1_3t"), low_field="t1_3t", high_field="t1_7t")
    assert (method.low, method.high, method.subsets) == (2, 0, ("t1_3t",))
    alone = make(("t1",), high_field="t1_7t")  # a labelled set has no 7T
    assert (alone.low, alone.subsets) == (0, ("t1",))


# controls


def test_a_keeper_that_learnt_nothing_is_the_same_in_every_run_and_changes_no_other_weight():
    trained, drawn = make(), make(keeper="random")
    torch.manual_seed(5)
    again = build({"name": "uhf_guided", **drawn.config.model_dump()}, facts())
    first, second, other = (method.networks["keeper"].state_dict() for method in (drawn, again, trained))
    assert all(torch.equal(first[key], second[key]) for key in first) and not all(torch.equal(first[key], other[key]) for key in first)
    assert all(torch.equal(a, b) for a, b in zip(drawn.networks["student"].parameters(), trained.networks["student"].parameters(), strict=True))
    assert drawn.needs("fusion") == {"base": "base"} and trained.needs("fusion") == {"keeper": "keeper", "base": "base"}
    drawn.roles("fusion")["student"].step.train()(make_batch(), {}, START).loss.backward()
    assert all(p.grad is None for p in drawn.networks["keeper"].parameters())


def test_a_keeper_that_says_nothing_has_features_of_0_in_the_keepers_shapes():
    image, silent = torch.rand(2, 1, 37, 32, 33), make(keeper="zeros")
    maps = silent.networks["keeper"](image)
    assert [x.shape for x in maps] == [x.shape for x in make().networks["keeper"](image)] and not any(x.any() for x in maps)
    logits = silent.predict(torch.rand(1, 2, *CROP), torch.tensor([[True, False]]))
    assert logits.shape == (1, 4, *CROP)


def test_a_teacher_of_the_low_field_image_must_be_asked_for():
    control = make(high_field="t1_3t")
    assert control.high == control.low == 0 and control.painted("teacher") == control.painted("keeper") == ("t1_3t", "t1_3t")
    for stage in STAGES:
        control.check_stage(stage)


# what is refused


@pytest.mark.parametrize("stage", ["teacher", "keeper"])
def test_a_stage_that_a_control_has_no_use_for_is_one_line(stage):
    with pytest.raises(UserError, match=f"stages: with method.keeper=random nobody needs {stage}; give stages=.base,fusion."):
        make(keeper="random").check_stage(stage)


def test_stages_by_their_letters():
    assert load_config("uhf_phantom", ["stages=all"]).stages is None and load_config("uhf_phantom", ["stages=F"]).stages == ["F"]
    assert stage_names({"name": "uhf_guided"}, ["T", "keeper"]) == ["teacher", "keeper"] and stage_names({"name": "uhf_guided"}, None) is None
    with pytest.raises(UserError, match=r"stages: 'X' is no stage of uhf_guided; its stages: base, teacher, keeper, fusion \(or B, T, K, F\)"):
        stage_names({"name": "uhf_guided"}, ["X"])


def test_what_is_given_need_not_be_trained():
    method = make()
    assert stages_left_out(method, set()) == [] and set(stages_left_out(method, {"keeper"})) == {"teacher", "keeper"}  # nobody else needs the teacher
    assert stages_left_out(method, {"teacher"}) == ["teacher"] and stages_left_out(method, {"base"}) == ["base"]


@pytest.mark.parametrize(("sequences", "scheme", "stage", "expected"), [
    (("t1",), "tissue3", "teacher", "stages: teacher learns from pairs of low-field and 7T images, and the set has t1 alone; train it on a set of pairs"),
    (("t1",), "tissue3", "keeper", "then give this one teacher.path=RUN"),
    (PAIR, None, "base", "stages: base learns labels, and the set has none; give stages=[teacher,keeper] here"),
    (PAIR, None, "fusion", "and train fusion on a labelled set"),
])  # fmt: skip
def test_a_set_that_a_stage_cannot_use_is_one_line(sequences, scheme, stage, expected):
    method = make(sequences, scheme)
    for other in STAGES:
        if (other in ("base", "fusion")) != (stage in ("base", "fusion")):
            method.check_stage(other)
    with pytest.raises(UserError) as caught:
        method.check_stage(stage)
    assert expected in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(("change", "expected"), [
    ({"low_field": "t2"}, "method.low_field: the set has no sequence t2; choose from t1_3t, t1_7t"),
    ({"base": {"arguments": {"width": 4}}}, "method.base: an encoder's map has 4 channels, and adaptive fusion needs 5 at least; make the network wider"),
    ({"base": {"architecture": "SegResNet", "arguments": {"depth": 2}}}, "method.base: SegResNet: got an unexpected keyword argument 'depth'; see"),
    ({"base": {"architecture": "VNet"}}, "method.base.architecture"),
    ({"intensity": {"kind": "zscore"}}, "method.intensity.kind"),
    ({"noise": {"levels": [6]}}, "method.noise.levels"),
])  # fmt: skip
def test_bad_settings_are_one_line(change, expected):
    with pytest.raises(UserError) as caught:
        build({"name": "uhf_guided", **change}, facts())
    assert expected in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(("base", "crop", "expected"), [
    ({}, (32, 31, 64), "data.crop [32, 31, 64]: the critic needs 32 voxels along each axis; use [32, 32, 64]"),
    ({"architecture": "SegResNet"}, (44, 48, 48), "data.crop [44, 48, 48]: SegResNet of method.base needs multiples of 8; use [48, 48, 48]"),
])  # fmt: skip
def test_a_crop_that_does_not_fit_is_one_line(base, crop, expected):
    with pytest.raises(UserError) as caught:
        UHFGuided.check_crop(read_config({"name": "uhf_guided", "base": base}), crop)
    assert str(caught.value) == expected
    UHFGuided.check_crop(UHFGuidedConfig(), (65, 50, 37))  # odd sizes work


# two runs: pairs, then labelled scans


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Sets `pairs` and `scans`, of 3T alone, from one cohort; who trains, is validated and tested on in one is not in the other's training."""
    folder = tmp_path_factory.mktemp("uhf")
    names = write_phantom(folder / "nifti", subjects=8, size=32, seed=3, paired_7t=True)
    spec = yaml.safe_load((SPEC_FOLDER / "phantom_7t.yaml").read_text()) | {"name": "scans", "sequences": {"t1": "{subject}_t1_3t.nii.gz"}}
    (folder / "scans.yaml").write_text(yaml.safe_dump(spec))
    for name, of, people in (("pairs", "phantom_7t", names[3:6]), ("scans", folder / "scans.yaml", names[:3])):
        (folder / f"{name}.json").write_text(json.dumps({"folds": [{"train": people[:2], "val": people[2:]}], "test": names[6:]}))
        build_set(of, folder / "nifti", folder / name, splits=folder / f"{name}.json")
    return folder


@pytest.fixture(scope="module")
def trained(shards, one_rank, tmp_path_factory):
    """Runs `pairs` and `scans`, and the metrics of both."""
    runs = tmp_path_factory.mktemp("runs")
    found = {}
    for name, own in (("pairs", "stages=[T,K]"), ("scans", f"teacher.path={runs / 'pairs'}")):
        words = [*SMALL, f"data.shards={shards / name}", f"runs_dir={runs}", f"name={name}", own]
        found[name] = one_rank.run("teacher_ranks.py", "run", recipe="uhf_phantom", overrides=words)[0]
    return runs, found


def test_pairs_give_a_keeper_and_labelled_scans_a_guided_segmenter(trained):
    from mstkd.evaluate.run import evaluate_run

    runs, rows = trained
    assert list(rows["pairs"]) == ["teacher", "keeper"] and list(rows["scans"]) == ["base", "fusion"]
    assert all(rows["pairs"][stage][2]["val/score"] == rows["pairs"][stage][2]["val/psnr"] > 0 for stage in rows["pairs"])
    assert all(0 <= rows["scans"][stage][2]["val/dice_GM"] <= 1 and "val/dice_t1" in rows["scans"][stage][2] for stage in rows["scans"])
    summary = evaluate_run(runs / "scans")
    assert list(summary["subsets"]) == ["t1"] and list(summary["mean"]) == ["CSF", "GM", "WM"]
    assert (runs / "scans/evaluation/summary_base.json").is_file()  # always beside it
    assert "assd_mm" in summary["mean"]["GM"]


def test_what_teacher_and_keeper_paint_is_measured(trained, shards):
    from mstkd.evaluate.run import evaluate_run
    from mstkd.trained_run import open_run

    runs, rows = trained
    summary = evaluate_run(runs / "pairs")
    assert list(summary["patterns"]) == ["t1_3t->t1_7t"] and summary["mean"]["n"] == 2
    teacher = json.loads((runs / "pairs/evaluation/summary_teacher.json").read_text())
    assert list(teacher["patterns"]) == ["t1_7t->t1_7t"] and 0 < teacher["mean"]["psnr"] < 100
    assert evaluate_run(runs / "pairs", split="val")["mean"]["psnr"] == pytest.approx(rows["pairs"]["keeper"][2]["val/psnr"])
    with pytest.raises(UserError, match="none of student, base is trained yet"):
        open_run(runs / "pairs")  # there is nothing to segment with


def test_what_is_exported_and_predicted_needs_the_low_field_image_alone(trained, shards, tmp_path):
    runs, _ = trained
    export(runs / "scans", tmp_path / "out", spec=str(shards / "scans.yaml"))
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"student.safetensors", "keeper.safetensors", "mstkd.json"}
    assert json.loads((tmp_path / "out/mstkd.json").read_text())["companions"] == ["keeper"]
    case = tmp_path / "new/Phantom7T_0006"
    case.mkdir(parents=True)
    shutil.copy(shards / "nifti/Phantom7T_0006/Phantom7T_0006_t1_3t.nii.gz", case)
    predict_folder(runs / "scans", tmp_path / "new", tmp_path / "predicted", spec=str(shards / "scans.yaml"))
    [path] = (tmp_path / "predicted").glob("**/*.nii.gz")
    image = nib.load(path)
    assert image.shape == (32, 32, 32) and set(np.unique(image.dataobj)) <= {0, 1, 2, 3}


def best(run, stage, role):
    checkpoints = run / stage / "checkpoints"
    return load_file(checkpoints / (checkpoints / "best").read_text().strip() / f"{role}.safetensors")


def test_a_keeper_from_a_file_gives_the_same_run(trained, shards, one_rank, tmp_path):
    runs, rows = trained
    weights = best(runs / "pairs", "keeper", "keeper")
    torch.save({key.removeprefix("keeper."): value for key, value in weights.items()}, tmp_path / "keeper.pth")
    words = [*SMALL, f"data.shards={shards / 'scans'}", f"runs_dir={tmp_path}", "name=file", f"teacher.path={tmp_path / 'keeper.pth'}", "teacher.network=keeper"]
    found = one_rank.run("teacher_ranks.py", "run", recipe="uhf_phantom", overrides=words)[0]
    assert {step: row["train/ce"] for step, row in found["fusion"].items()} == {step: row["train/ce"] for step, row in rows["scans"]["fusion"].items()}


def test_the_base_may_come_as_encoder_and_decoder_from_files_and_the_keeper_from_a_run(trained, shards, one_rank, tmp_path):
    from mstkd.trained_run import open_run

    runs, rows = trained
    base = {key.removeprefix("base."): value for key, value in best(runs / "scans", "base", "base").items()}
    save_file({key.removeprefix("encoder."): value for key, value in base.items() if key.startswith("encoder.")}, tmp_path / "encoder.safetensors")
    torch.save({key: value for key, value in base.items() if key.startswith("decoder.")}, tmp_path / "decoder.pth")
    given = f"teacher.path={{keeper: {runs / 'pairs'}, base: {{encoder: {tmp_path / 'encoder.safetensors'}, decoder: {tmp_path / 'decoder.pth'}}}}}"
    words = [*SMALL, f"data.shards={shards / 'scans'}", f"runs_dir={tmp_path}", "name=parts", given]
    found = one_rank.run("teacher_ranks.py", "run", recipe="uhf_phantom", overrides=words)[0]
    assert list(found) == ["fusion"]
    assert {step: row["train/ce"] for step, row in found["fusion"].items()} == {step: row["train/ce"] for step, row in rows["scans"]["fusion"].items()}
    run = open_run(tmp_path / "parts")
    assert run.networks == ("student", "base") and torch.equal(run.method.networks["base"].state_dict()["encoder.0.0.weight"], base["encoder.0.0.weight"])
    (tmp_path / "decoder.pth").unlink()
    assert open_run(tmp_path / "parts").networks == ("student",)  # half a base is none


@pytest.mark.parametrize(("words", "expected"), [
    (["teacher.path={critic: PAIRS}"], "teacher.path.critic: uhf_guided freezes base, keeper, teacher; name one of them"),
    (["teacher.path={base: {encodr: PAIRS}}"], "teacher.path.base.encodr: the network has no such part; it has encoder, decoder"),
    (["teacher.path={base: {encoder: PAIRS}}"], "teacher.path.base: no file gives decoder.0.merge.0.weight; the network consists of encoder, decoder"),
    (["teacher.path={keeper: PAIRS}", "teacher.network=keeper"], "teacher.network: teacher.path gives networks by their names; remove the key"),
    (["stages=F"], "stage keeper has no best checkpoint, and keeper is what this stage begins with: `mstkd train"),
    (["stages=K"], "config.yaml stages=[teacher]` trains it, or teacher.path=RUN takes it from another run"),
    (["data.shards=SCANS"], "stages: teacher learns from pairs of low-field and 7T images, and the set has t1 alone"),
    (["teacher.path=PAIRS", "data.shards=OTHER"], "training subject Phantom7T_0003 and test subject Phantom7T_0003: same patient"),
])  # fmt: skip
def test_bad_input_is_one_line(words, expected, trained, shards, one_rank, tmp_path):
    other = shutil.copytree(shards / "scans", tmp_path / "other")
    pairs, scans = (json.loads((shards / name / "splits.json").read_text()) for name in ("pairs", "scans"))
    (other / "splits.json").write_text(json.dumps(scans | {"test": pairs["folds"][0]["train"]}))  # those with pairs are tested on
    places = {"PAIRS": trained[0] / "pairs", "SCANS": shards / "scans", "OTHER": other}
    given = words
    for name, place in places.items():
        given = [word.replace(name, str(place)) for word in given]
    words = [*SMALL, f"data.shards={shards / 'pairs'}", f"runs_dir={tmp_path}", *given]
    with pytest.raises(AssertionError) as caught:
        one_rank.run("teacher_ranks.py", "run", recipe="uhf_phantom", overrides=words)
    last = str(caught.value).strip().splitlines()[-1]
    assert last.startswith("mstkd.errors.UserError") and expected in last


def test_a_pair_on_two_grids_is_one_line(shards, tmp_path):
    nifti = shutil.copytree(shards / "nifti", tmp_path / "nifti")
    path = nifti / "Phantom7T_0002/Phantom7T_0002_t1_7t.nii.gz"
    image = nib.load(path)
    nib.save(nib.Nifti1Image(np.asarray(image.dataobj)[:-1], image.affine), path)
    with pytest.raises(UserError) as caught:
        build_set("phantom_7t", nifti, tmp_path / "out")
    line = str(caught.value)
    assert path.name in line and "(31, 32, 32)" in line and "(32, 32, 32)" in line and "\n" not in line

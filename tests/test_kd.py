"""kd and mean_teacher: their losses against hand-made ones, their networks by name, and both through the composition root."""

import math

import pytest
import torch
import yaml
from safetensors.torch import load_file
from small_mst_kdnet import facts
from torch import nn

from mstkd.batch import Batch, Progress
from mstkd.config import load_config
from mstkd.errors import UserError
from mstkd.losses.distillation import standardised_kl
from mstkd.losses.logits import bernoulli_kl
from mstkd.methods import build
from mstkd.methods.mean_teacher import MeanTeacherConfig
from mstkd.models.segmenter import Projections, Segmenter, stride
from mstkd.trained_run import open_run

UNET = {"architecture": "UNet", "arguments": {"channels": [4, 8], "strides": [2], "num_res_units": 1}}
WIDE = {"architecture": "UNet", "arguments": {"channels": [8, 12], "strides": [2], "num_res_units": 1}}
CROP = (16, 16, 8)
ARCHITECTURES = {
    "mst_kdnet": {"width": 8, "decoder_width": 2, "embed_dim": 24, "layers": 4, "heads": 3, "mlp_dim": 32},
    "SegResNet": {"init_filters": 8, "blocks_down": [1, 1], "blocks_up": [1]},
    "UNet": {"channels": [4, 8, 16], "strides": [2, [2, 2, 1]]},
    "DynUNet": {"kernel_size": [3, 3, 3], "strides": [1, 2, [2, 2, 1]], "upsample_kernel_size": [2, [2, 2, 1]], "filters": [4, 8, 16]},
    "SwinUNETR": {"feature_size": 12, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 1, 1], "window_size": 2},
}


def make(name="kd", crop=CROP, **section):
    torch.manual_seed(0)
    networks = {"kd": {"teacher": WIDE, "student": UNET}, "mean_teacher": {"network": UNET}}[name]
    return build({"name": name, **networks, **section}, facts(crop=crop))


def make_batch(crop=CROP) -> Batch:
    torch.manual_seed(1)
    label = torch.randint(0, 5, (1, *crop)).clamp(max=4).to(torch.uint8)
    label[label == 3] = 0
    whole = torch.ones(1, 4, dtype=torch.bool)
    available = torch.tensor([[True, False, False, True]])
    return Batch(torch.randn(1, 4, *crop), torch.ones(1, *crop, dtype=torch.bool), whole, available, ["s"], label)


def progress(epoch=0) -> Progress:
    return Progress(step=0, epoch=epoch, total_steps=10, total_epochs=100)


# networks by name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_gives_logits_and_maps_of_the_channels_it_says(architecture):
    crop = (64, 64, 64) if architecture in ("mst_kdnet", "SwinUNETR") else (32, 32, 16)
    network = Segmenter(architecture, 4, 3, crop, ARCHITECTURES[architecture]).eval()
    with torch.no_grad():
        output = network(torch.randn(1, 4, *crop))
    assert output.logits.shape == (1, 3, *crop) and len(output.features) == 2
    assert tuple(feature.shape[1] for feature in output.features) == network.channels
    deep, fine = output.features
    assert deep.shape[2] < fine.shape[2] and all(feature.isfinite().all() for feature in output.features)
    assert not any(module._forward_hooks for module in network.modules())  # nothing listens after the call
    assert all(size % step == 0 for size, step in zip(crop, stride(architecture, ARCHITECTURES[architecture]), strict=True))


def test_strides_and_named_features():
    assert stride("DynUNet", ARCHITECTURES["DynUNet"]) == (4, 4, 2) == stride("UNet", ARCHITECTURES["UNet"])
    assert stride("SegResNet", {}) == (8, 8, 8) and stride("SwinUNETR", {}) == stride("mst_kdnet", {}) == (32, 32, 32)
    network = Segmenter("SegResNet", 4, 3, (16, 16, 16), ARCHITECTURES["SegResNet"], ["convInit", "down_layers.1"])
    convolution = network.net.convInit(image := torch.randn(1, 4, 16, 16, 16))
    assert torch.equal(network.eval()(image).features[0], convolution)


@pytest.mark.parametrize(("change", "expected"), [
    ({"student": {"architecture": "UNet"}}, "method.student: UNet: missing 2 required positional arguments: 'channels' and 'strides'"),
    ({"student": {**UNET, "arguments": {**UNET["arguments"], "chanels": 1}}}, "method.student: UNet: got an unexpected keyword argument 'chanels'"),
    ({"student": {**UNET, "features": ["modle"]}}, "method.student: features: UNet has no submodule 'modle'; its first ones: model, "),
    ({"student": {**UNET, "features": ["model"]}}, "method.student.features: 1 of the student and 2 of the teacher cannot be matched"),
    ({"teacher": {"architecture": "DynUNet", "arguments": {**ARCHITECTURES["DynUNet"], "deep_supervision": True}}}, "method.teacher: deep_supervision"),
    ({"crop": (18, 16, 7)}, "data.crop [18, 16, 7]: UNet of method.teacher needs multiples of [2, 2, 2]; use [18, 16, 8]"),
    ({"crop": (2, 2, 2)}, "cannot take a crop of [2, 2, 2]"),
    ({"teacher": {"architecture": "VNet"}}, "method.teacher.architecture: Input should be 'mst_kdnet', 'SegResNet'"),
])  # fmt: skip
def test_networks_that_cannot_be_built_are_one_line(change, expected):
    with pytest.raises(UserError) as caught:
        make(**change)
    assert expected in str(caught.value) and "\n" not in str(caught.value)


# losses


def test_bernoulli_kl_by_hand():
    full, missing, tau = torch.tensor([1.0, -2.0]), torch.tensor([0.5, 3.0]), 2.0
    p, q = ([1 / (1 + math.exp(-x / tau)) for x in logits.tolist()] for logits in (full, missing))
    expected = sum(a * math.log(a / b) + (1 - a) * math.log((1 - a) / (1 - b)) for a, b in zip(p, q, strict=True)) / 2 * tau**2
    assert float(bernoulli_kl(full, missing, tau)) == pytest.approx(expected, rel=1e-5)
    assert float(bernoulli_kl(full, full, tau)) == pytest.approx(0, abs=1e-6)


def test_the_student_step_is_the_weighted_sum_of_its_terms():
    method, batch = make(weights={"dice": 2.0, "bce": 3.0, "kl": 5.0, "feature": 7.0}), make_batch()
    step = method.roles("student")["student"].step
    output = step(batch, {}, progress())
    with torch.no_grad():
        full, missing = method.networks["teacher"](batch.image), method.networks["student"](batch.visible())
        projected = method.networks["projection"](missing.features)
        target = method.channels.encode(batch.label)
        probability = missing.logits.sigmoid()
        dice = 1 - 2 * (probability * target).sum((0, 2, 3, 4)) / (probability.square().sum((0, 2, 3, 4)) + target.square().sum((0, 2, 3, 4)))
        expected = {
            "dice": dice.mean(), "bce": nn.BCEWithLogitsLoss()(missing.logits, target), "kl": bernoulli_kl(full.logits, missing.logits, 4.0),
            "feature": sum((f - m).square().mean() / f.square().mean() for f, m in zip(full.features, projected, strict=True)),
        }  # fmt: skip
    assert {name: float(value) for name, value in output.scalars.items()} == pytest.approx({k: float(v) for k, v in expected.items()}, rel=1e-4)
    total = sum(weight * expected[name] for name, weight in (("dice", 2), ("bce", 3), ("kl", 5), ("feature", 7)))
    assert float(output.loss.detach()) == pytest.approx(float(total), rel=1e-5)


def test_gradients_reach_student_and_projection_and_never_the_teacher():
    method = make()
    step = method.roles("student")["student"].step
    step(make_batch(), {}, progress()).loss.backward()
    assert all(p.grad is not None for name in ("student", "projection") for p in method.networks[name].parameters())
    assert all(p.grad is None for p in method.networks["teacher"].parameters())
    assert {id(p) for p in step.parameters()} == {id(p) for name in ("student", "projection") for p in method.networks[name].parameters()}


def test_what_the_student_may_not_see_changes_its_output_not_at_all():
    method, batch = make(weights={"kl": 0.0, "feature": 0.0}), make_batch()
    step = method.roles("student")["student"].step
    before = step(batch, {}, progress()).loss
    batch.image[:, 1:3] = float("nan")
    after = step(batch, {}, progress()).scalars
    assert float(after["dice"] + after["bce"]) == float(before)


def test_projections_only_where_channels_differ_and_maps_of_another_size_are_resampled():
    projections = Projections((4, 8), (4, 12))
    assert isinstance(projections[0], nn.Identity) and projections[1].weight.shape == (12, 8, 1, 1, 1)
    coarse = {"architecture": "UNet", "arguments": {"channels": [4, 8, 12], "strides": [2, 2]}}
    output = make(student=coarse).roles("student")["student"].step(make_batch(), {}, progress())
    assert output.scalars["feature"] > 0
    assert "projection" not in make(weights={"feature": 0.0}).networks


@torch.no_grad()
def test_the_divergence_can_be_that_of_standardised_logits():
    method, batch = make(divergence="standardised"), make_batch()
    full, missing = method.networks["teacher"](batch.image), method.networks["student"](batch.visible())
    output = method.roles("student")["student"].step(batch, {}, progress())
    assert float(output.scalars["kl"]) == pytest.approx(float(standardised_kl(full.logits, missing.logits, 4.0)), rel=1e-5)


def test_the_mean_teachers_share_grows():
    step = make("mean_teacher", ramp_epochs=10).roles("distill")["student"].step
    shares = [step.transfer_share(progress(epoch)) for epoch in (0, 5, 10, 50)]
    assert shares == pytest.approx([math.exp(-5), math.exp(-1.25), 1, 1])
    output = step(make_batch(), {}, progress(0))
    assert float(output.loss.detach()) == pytest.approx(float(output.scalars["dice"] + output.scalars["bce"] + math.exp(-5) * output.scalars["kl"]), rel=1e-6)


# through the composition root


def recipe(tmp_path, shards, method) -> str:
    values = {
        "name": "small", "runs_dir": str(tmp_path), "method": method,
        "data": {"shards": str(shards), "crop": [16, 16, 16], "workers": 0, "foreground_share": 1.0},
        "train": {"global_batch": 2, "steps": 12, "log_every": 1, "precision": "fp32", "zero_stage": 1,
                  "roles": {"student": {"optimizer": {"lr": 0.01}, "schedule": {"name": "constant"}}}},
        "inference": {"overlap": 0}, "validate": {"every_steps": 100, "max_cases": 1, "subsets": ["flair"]},
    }  # fmt: skip
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(values))
    return str(tmp_path / "small.yaml")


def test_a_weight_of_the_mean_teacher_changes_no_other():
    assert MeanTeacherConfig.model_validate({"weights": {"kl": 2}}).weights.feature == 0


def test_kd_trains_teacher_and_then_student(two_ranks, phantom_shards, tmp_path):
    small = recipe(tmp_path, phantom_shards, {"name": "kd", "teacher": WIDE, "student": UNET})
    rows = two_ranks.run("teacher_ranks.py", "run", recipe=small, overrides=["teacher.placement=zero3"])[0]
    assert {"train/dice", "train/bce", "train/kl", "train/feature", "train/loss_student"} <= rows["student"][12].keys()
    assert "train/kl" not in rows["teacher"][12]
    assert rows["student"][12]["train/bce"] < rows["student"][1]["train/bce"]
    assert open_run(tmp_path / "small").networks == ("student", "teacher")


@pytest.mark.parametrize("zero", [1, 3])
def test_mean_teacher_trains_and_both_networks_can_be_scored(zero, two_ranks, phantom_shards, tmp_path):
    small = recipe(tmp_path, phantom_shards, {"name": "mean_teacher", "network": UNET, "decay": 0.5})
    rows = two_ranks.run("teacher_ranks.py", "run", recipe=small, overrides=[f"train.zero_stage={zero}"])[0]["distill"]
    assert rows[12]["train/bce"] < rows[1]["train/bce"] and 0 <= rows[12]["val/score"] <= 1
    checkpoints = tmp_path / "small/distill/checkpoints"
    weights = load_file(checkpoints / (checkpoints / "best").read_text().strip() / "student.safetensors")
    assert {key.split(".")[0] for key in weights} == {"student", "teacher"}
    pairs = [(weights[key], weights[key.replace("teacher.", "student.", 1)]) for key in weights if key.startswith("teacher.")]
    assert pairs and any(not torch.equal(average, followed) for average, followed in pairs)
    assert max(float((average - followed).abs().max()) for average, followed in pairs) < 0.1  # it follows


def test_the_recipe_of_the_phantom_builds():
    config = load_config("kd_phantom")
    method = build(config.method, facts(crop=config.data.crop))
    assert set(method.networks) == {"teacher", "student", "projection"} and set(config.train.roles) == {"teacher", "student"}

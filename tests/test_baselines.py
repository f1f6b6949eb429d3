"""What every segmentation method promises, and the baselines: one network alone, and one for each subset."""

import json

import pytest
import torch
from baseline_ranks import SEQUENCES, START, crop_of, make_batch, small
from safetensors.torch import load_file
from small_mst_kdnet import facts, parameters

from mstkd.config import InferenceConfig, load_config
from mstkd.dry_step import empty_batch, fake_tensors, kept_for_backward
from mstkd.errors import UserError
from mstkd.evaluate.inference import Predictor, Volume, evaluation_mode
from mstkd.launch.cluster import Cluster
from mstkd.launch.submit import prepare
from mstkd.method_list import entries
from mstkd.methods import available_methods, build, load
from mstkd.models.recompute import recompute
from mstkd.subsets import all_subsets, possible_subsets, subset_name

SEGMENTATION = [name for name in available_methods() if load(name).task == "segmentation"]
UNET = {"architecture": "UNet", "arguments": {"channels": [4, 8], "strides": [2], "num_res_units": 1}}
DYNUNET = {
    "architecture": "DynUNet", "arguments": {"kernel_size": [3] * 3, "strides": [1, 2, 2], "upsample_kernel_size": [2, 2], "filters": [4, 4, 8]},
}  # fmt: skip
SEGRESNET = {"architecture": "SegResNet", "arguments": {"init_filters": 8, "blocks_down": [1, 1], "blocks_up": [1]}}
TRUNK = {"architecture": "mst_kdnet", "arguments": {"width": 8, "decoder_width": 2, "embed_dim": 24, "layers": 4, "heads": 3, "mlp_dim": 32}}
SWIN = {"architecture": "SwinUNETR", "arguments": {"feature_size": 12, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 1, 1], "window_size": 2}}
NETWORKS = (UNET, DYNUNET, SEGRESNET, TRUNK)


def prediction(method, network, image, subset):
    """Logits of a whole volume as evaluation and `mstkd predict` make them."""
    size = tuple(image.shape[2:])
    predictor = Predictor(method, SEQUENCES, size, InferenceConfig(overlap=0, precision="fp32"), torch.device("cpu"))
    with evaluation_mode(method):
        return predictor.scores(network, Volume(image, (True,) * 4, (slice(None),) * 3, None), subset)


# every segmentation method


@pytest.mark.parametrize("name", SEGMENTATION)
def test_hidden_voxels_never_change_a_prediction(name):
    method, image = small(name), torch.rand(1, 4, *crop_of(name))
    for network in (network for network in method.scored if network in method.networks):
        outputs = {}
        for subset in possible_subsets(SEQUENCES, method.subsets):
            hidden = ~torch.tensor(subset)[None, :, None, None, None]
            outputs[subset], other = (prediction(method, network, image.masked_fill(hidden, content), subset) for content in (7.0, float("nan")))
            assert other.isfinite().all() and torch.equal(outputs[subset], other), subset_name(SEQUENCES, subset)
        whole = outputs.pop((True,) * 4, None)  # and what is given does change it
        assert whole is None or not any(torch.equal(whole, other) for other in outputs.values())


@pytest.mark.parametrize("name", SEGMENTATION)
def test_hidden_voxels_never_change_what_the_student_says_in_training(name):
    method = small(name)
    stages = [stage for stage in method.stages if any("student" in role.results for role in method.roles(stage).values())]
    assert stages or "student" not in method.scored
    for stage in stages:
        heard = []
        hook = method.networks["student"].register_forward_hook(lambda module, inputs, output: heard.append(getattr(output, "logits", output).detach()))
        for content in (0.25, 0.75):  # a teacher may see it, so it is an image
            batch = make_batch(method, stage, crop_of(name))
            batch.image = torch.where(batch.available[:, :, None, None, None], batch.image, content)
            torch.manual_seed(3)
            next(role for role in method.roles(stage).values() if "student" in role.networks).step.train()(batch, {}, START)
        hook.remove()
        first, second = heard[: len(heard) // 2], heard[len(heard) // 2 :]
        assert first and all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("name", [name for name in SEGMENTATION if load(name).any_order])
def test_the_listing_order_of_sequences_does_not_matter(name):
    order = (2, 0, 3, 1)
    method, other = small(name), small(name, tuple(SEQUENCES[index] for index in order))
    for network, module in method.networks.items():
        assert all(torch.equal(a, b) for a, b in zip(module.state_dict().values(), other.networks[network].state_dict().values(), strict=True))
    image = torch.rand(1, 4, *crop_of(name))
    for subset in all_subsets(SEQUENCES):
        available = torch.tensor([subset])
        with evaluation_mode(method), evaluation_mode(other), torch.no_grad():
            assert torch.equal(method.predict(image, available), other.predict(image[:, list(order)], available[:, list(order)]))


@pytest.mark.parametrize("name", SEGMENTATION)
def test_two_ranks_with_disjoint_subsets_take_the_same_steps_under_zero_1_and_3(name, two_ranks):
    first, second = two_ranks.run("baseline_ranks.py", "steps", name=name)
    assert first.keys() == second.keys() and len(first) >= 2 * len(load(name).stages)
    for key, figures in first.items():
        assert figures["after"] == second[key]["after"] != figures["before"], key  # one network, which learned
        if key.startswith("1/"):
            cut = [ranks["3" + key[1:]] for ranks in (first, second)]
            # gathered weights lie elsewhere, where a convolution may round differently; norms of few values blow that up (test_train.py)
            assert [c["losses"] for c in cut] == [pytest.approx(f["losses"], rel=1e-3) for f in (figures, second[key])]
            assert cut[0]["after"] == pytest.approx(figures["after"], rel=1e-3)


@pytest.mark.parametrize("name", SEGMENTATION)
def test_a_bad_crop_or_a_set_without_labels_is_one_line(name):
    method = small(name)
    with pytest.raises(UserError) as caught:
        method.check_crop(method.config, (33, 31, 17))
    assert "data.crop [33, 31, 17]" in str(caught.value) and "\n" not in str(caught.value)
    batch = make_batch(method, method.stages[0], crop_of(name))
    batch.label = None
    with pytest.raises(UserError, match="subject-0: no label"):
        next(iter(method.roles(method.stages[0]).values())).step(batch, {}, START)


@pytest.mark.parametrize("name", SEGMENTATION)
def test_a_step_asks_no_tensor_for_its_value(name):
    with fake_tensors():  # then a GPU need not be waited for, and `mstkd plan` can count activations
        method = small(name)
        for stage in method.stages:
            kept = kept_for_backward(method, method.roles(stage), empty_batch(1, 4, crop_of(name), True), "bf16")
            assert kept.keys() == method.roles(stage).keys() and all(size > 0 for size in kept.values())


def test_every_method_is_listed_with_its_source_and_its_size():
    found = {entry.name: entry for entry in entries()}
    assert list(found) == available_methods()
    assert all(entry.paper and entry.reproduces and entry.stages for entry in found.values())
    assert not {entry.name: entry.problem for entry in found.values() if entry.problem}
    assert {entry.name for entry in found.values() if entry.task == "synthesis" and entry.crop is None} >= {"utad_net", "stargan", "resvit"}
    assert found["utad_net"].student == 106_779_778 and found["utad_net"].parameters == 2 * 106_779_778 + 2 * 44_751_808
    assert found["student_only"].parameters == found["teacher_full"].student == found["mst_kdnet"].student == 154_334_148
    assert found["mst_kdnet"].parameters > 2 * found["mst_kdnet"].student


def test_a_method_that_cannot_be_built_does_not_end_the_list(monkeypatch):
    def broken(self, config, facts):
        raise RuntimeError("no such thing\nat all")

    monkeypatch.setattr(load("kd"), "__init__", broken)
    found = {entry.name: entry for entry in entries()}
    assert (found["kd"].parameters, found["kd"].problem) == (None, "no such thing") and found["mean_teacher"].parameters


# student_only and teacher_full


@pytest.mark.parametrize(("name", "network"), [("student_only", "student"), ("teacher_full", "teacher")])
def test_their_recipes_differ_from_mst_kdnets_in_the_method_alone(name, network):
    ours, theirs = load_config(f"{name}_phantom"), load_config("mst_kdnet_phantom")
    assert ours.method | {"name": "mst_kdnet"} == theirs.method
    changed = {key for key, value in ours if value != getattr(theirs, key)}
    assert changed == {"name", "method"}
    role, reference = (small(n).roles(small(n).stages[0])["networks"] for n in (name, "mst_kdnet"))
    assert (role.optimizer, role.schedule, role.networks) == (reference.optimizer, reference.schedule, (network,))


def test_the_student_begins_with_the_weights_it_has_in_mst_kdnet():
    alone, together = (small(name).networks["student"].state_dict() for name in ("student_only", "mst_kdnet"))
    assert alone.keys() == together.keys() and all(torch.equal(alone[key], together[key]) for key in alone)


@pytest.mark.parametrize(("name", "network", "share"), [("student_only", "student", 0.6), ("teacher_full", "teacher", 0.4)])
def test_their_loss_is_that_networks_part_of_mst_kdnets(name, network, share):
    method, reference = small(name, weights={"bce": 0.5}), small("mst_kdnet", weights={"bce": 0.5})
    method.networks[network].load_state_dict(reference.networks[network].state_dict())
    batch = make_batch(reference, "distill", crop_of(name))
    batch.available |= name == "teacher_full"  # nothing is hidden from it
    with torch.no_grad():
        output = method.roles("train")["networks"].step.eval()(batch, {}, START)
        terms = reference.roles("distill")["networks"].step.eval()(batch, {}, START).scalars
        logits = reference.networks[network](batch.visible()).logits
    target = method.channels.encode(batch.label)
    cross_entropy = share * torch.nn.BCEWithLogitsLoss()(logits, target)
    assert float(output.scalars[f"dice_{network}"]) == pytest.approx(float(terms[f"dice_{network}"]), rel=1e-5)
    assert float(output.loss) == pytest.approx(float(share * terms[f"dice_{network}"] + 0.5 * cross_entropy), rel=1e-5)


def test_the_full_teacher_is_shown_everything():
    method = small("teacher_full")
    assert method.availability("train").kind == "natural" and method.sees_all == ("teacher",) == method.scored
    assert small("student_only").availability("train") is None


def test_hidden_sequences_may_hold_noise():
    method = small("student_only", missing_fill="noise")
    image, available = torch.rand(1, 4, *crop_of("student_only")), torch.tensor([[True, False, False, True]])
    noisy, plain = method.predict(image, available), small("student_only").predict(image, available)
    assert torch.equal(noisy, method.predict(image, available)) and not torch.allclose(noisy, plain)


# networks by name, with modality dropout or for one subset


@pytest.mark.parametrize("network", [*NETWORKS, SWIN], ids=lambda network: network["architecture"])
@pytest.mark.parametrize("name", ["monai_network", "dedicated"])
def test_any_network_takes_a_step(name, network):
    subset = {"subset": "t1+t2"} if name == "dedicated" else {}
    crop = (64, 32, 32) if network is SWIN else (32, 32, 32)  # its deepest map is 1/32 and needs two voxels
    method = build({"name": name, "network": network, **subset}, facts(crop=crop))
    step = method.roles("train")["student"].step.train()
    output = step(make_batch(method, "train", crop, 1), {}, START)
    output.loss.backward()
    assert set(output.scalars) == {"dice", "bce"} and output.loss.isfinite()
    assert float(output.loss.detach()) == pytest.approx(float(output.scalars["dice"] + output.scalars["bce"]))
    assert any(p.grad.abs().max() > 0 for p in step.parameters() if p.grad is not None)


@pytest.mark.parametrize("network", NETWORKS, ids=lambda network: network["architecture"])
def test_recomputation_changes_no_gradient(network):
    gradients = []
    for again in (False, True):
        torch.manual_seed(0)
        method = build({"name": "monai_network", "network": network}, facts(crop=(32, 32, 32)))
        step = method.roles("train")["student"].step.train()
        assert not again or recompute(method.networks["student"], method.blocks) > 0
        torch.manual_seed(1)
        step(make_batch(method, "train", (32, 32, 32)), {}, START).loss.backward()
        gradients.append([p.grad for p in step.parameters()])
    assert all((a is None and b is None) or torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_the_loss_of_a_network_alone_by_hand():
    method = build({"name": "monai_network", "network": UNET, "weights": {"dice": 2.0, "bce": 3.0}}, facts(crop=(16, 16, 8)))
    batch = make_batch(method, "train", (16, 16, 8))
    output = method.roles("train")["student"].step(batch, {}, START)
    with torch.no_grad():
        logits = method.networks["student"](batch.visible()).logits
    target, p = method.channels.encode(batch.label), logits.sigmoid()
    dice = 1 - 2 * (p * target).sum((0, 2, 3, 4)) / (p.square().sum((0, 2, 3, 4)) + target.square().sum((0, 2, 3, 4)) + 1e-7)
    bce = -(target * p.log() + (1 - target) * (1 - p).log()).mean()
    assert float(output.loss.detach()) == pytest.approx(float(2 * dice.mean() + 3 * bce), rel=1e-5)


def test_a_dedicated_network_has_the_channels_of_its_subset_and_sees_no_others():
    method = build({"name": "dedicated", "network": UNET, "subset": "t2+flair"}, facts(crop=(16, 16, 8)))
    same = build({"name": "dedicated", "network": UNET, "subset": "flair+t2"}, facts(crop=(16, 16, 8)))
    whole = build({"name": "dedicated", "network": UNET}, facts(crop=(16, 16, 8)))
    assert method.subsets == same.subsets == ("flair+t2",) and whole.subsets == ("flair+t1+t1ce+t2",)
    assert method.availability("train").subsets == ["flair+t2"]
    first = next(p for p in method.networks["student"].parameters() if p.ndim == 5)
    assert first.shape[1] == 2 and parameters(method.networks["student"]) < parameters(whole.networks["student"])
    image = torch.rand(1, 4, 16, 16, 8)
    logits = method.networks["student"](image[:, [0, 3]]).logits
    image[:, 1:3] = float("nan")
    assert torch.equal(method.predict(image, torch.tensor([[True, False, False, True]])), logits)


@pytest.mark.parametrize(("name", "change", "expected"), [
    ("dedicated", {"subset": "t1+pd"}, "method.subset 't1+pd': join different ones of flair, t1, t1ce, t2 by '+'"),
    ("dedicated", {"subset": "t1+t1"}, "method.subset 't1+t1': join different ones"),
    ("monai_network", {"network": {**UNET, "features": ["model"]}}, "unknown key method.network.features"),
    ("monai_network", {"network": {"architecture": "UNet"}}, "method.network: UNet: missing 2 required positional arguments"),
    ("monai_network", {"network": {"architecture": "VNet"}}, "method.network.architecture: Input should be 'mst_kdnet', 'SegResNet'"),
    ("monai_network", {"weights": {"kl": 1}}, "unknown key method.weights.kl"),
    ("student_only", {"weights": {"dice": 1}}, "unknown key method.weights.dice;"),
    ("student_only", {"tau": 3}, "unknown key method.tau"),
])  # fmt: skip
def test_bad_settings_are_one_line(name, change, expected):
    with pytest.raises(UserError) as caught:
        build({"name": name, **change}, facts(crop=(16, 16, 8)))
    assert expected in str(caught.value) and "\n" not in str(caught.value)


# through the composition root


def test_a_dedicated_run_is_trained_validated_and_scored_on_its_subset_alone(one_rank, phantom_shards, tmp_path):
    from mstkd.evaluate.run import evaluate_run

    words = [
        f"data.shards={phantom_shards}", f"runs_dir={tmp_path}", "name=t1ce", "data.crop=[32,32,32]", f"method.network={json.dumps(UNET)}",
        "train.steps=4", "train.log_every=1", "train.zero_stage=0", "train.recompute=true", "validate.max_cases=1", "validate.every_steps=4",
        "inference.overlap=0",
    ]  # fmt: skip
    rows = one_rank.run("teacher_ranks.py", "run", recipe="dedicated_phantom", overrides=words)[0]["train"]
    assert "val/dice_t1ce" in rows[4] and "val/dice_flair" not in rows[4]
    summary = evaluate_run(tmp_path / "t1ce")
    assert list(summary["subsets"]) == ["t1ce"] and "never trained" not in summary["conventions"]
    folder = tmp_path / "t1ce/train/checkpoints"
    weights = load_file(folder / (folder / "best").read_text().strip() / "student.safetensors")
    assert next(value for key, value in weights.items() if value.ndim == 5).shape[1] == 1


def test_a_full_teacher_is_scored_on_every_subset_with_a_warning(one_rank, phantom_shards, tmp_path):
    from mstkd.evaluate.run import evaluate_run
    from short_runs import TINY

    words = [*TINY, f"data.shards={phantom_shards}", f"runs_dir={tmp_path}", "name=full", "train.steps=2", "train.zero_stage=0"]
    rows = one_rank.run("teacher_ranks.py", "run", recipe="teacher_full_phantom", overrides=words)[0]["train"]
    assert "val/dice_flair+t1+t1ce+t2" in rows[2] and "val/dice_flair" not in rows[2]  # the best one is chosen on what it is made for
    summary = evaluate_run(tmp_path / "full")
    never = summary["conventions"]["never trained"]
    assert len(summary["subsets"]) == 15 and never.startswith("flair, t1, t1ce, t2, flair+t1,") and "flair+t1+t1ce+t2" not in never


def test_a_sweep_trains_one_dedicated_network_per_subset_and_one_network_per_method():
    names = [subset_name(SEQUENCES, subset) for subset in all_subsets(SEQUENCES)]
    runs = swept("dedicated_phantom", "method.subset=" + ",".join(names))
    assert [run.method["subset"] for run in runs] == names and len({run.name for run in runs}) == 15
    methods = ["mst_kdnet", "student_only", "teacher_full"]
    assert [run.method["name"] for run in swept("mst_kdnet_phantom", "method.name=" + ",".join(methods))] == methods


def swept(recipe, axis):
    return prepare(recipe, "cpu", Cluster(ranks_per_node=2, cpus_per_task=1, timeout_min=60), None, [], [axis]).runs

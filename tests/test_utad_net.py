"""UTAD-Net and its baselines: what the two roles compute, stages, prediction, ablations and settings."""

import inspect

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from small_utad import SEQUENCES, SIZES, facts, make, make_batch, passes
from torch.nn import functional as F

from mstkd.batch import Progress
from mstkd.config import load_config
from mstkd.dry_step import empty_batch, fake_tensors, kept_for_backward
from mstkd.engine.schedule import lr_factor
from mstkd.engine.teacher import load_weights
from mstkd.errors import UserError
from mstkd.losses.translation import tumour_image
from mstkd.methods import build, load
from mstkd.methods._translation import Task, critic_terms, draw_targets, observed, transfer
from mstkd.teacher_source import stages_left_out

NAMES = tuple(SIZES)
EACH_STAGE = [(name, stage) for name in NAMES for stage in load(name).stages]
ARCHES = ("full", "global", "no_local_encoder", "no_local_decoder")


# the step


@pytest.mark.parametrize(("name", "stage"), EACH_STAGE)
def test_losses_are_the_weighted_sums_and_every_weight_gets_a_gradient(name, stage):
    method = make(name)
    found = passes(method, stage, make_batch(size=SIZES[name]))
    weights, terms = method.config.weights, {role: {k: float(v) for k, v in output.scalars.items()} for role, (output, _) in found.items()}
    critics = {critic: {term.removesuffix(f"_{critic}"): value for term, value in terms["critics"].items() if term.endswith(critic)} for critic in ("whole", "tumour")}
    assert bool(critics["tumour"]) == (name == "utad_net") and set(critics["whole"]) == {"critic", "classification", "gradient_penalty"}
    expected = sum(c["critic"] + c["classification"] + 10 * c["gradient_penalty"] for c in critics.values() if c)
    assert float(found["critics"][0].loss.detach()) == pytest.approx(expected, rel=1e-5)
    assert set(terms["generator"]) == {"adversarial", "classification", "reconstruction"} | (
        {"local"} if name == "utad_net" else set()) | ({"feature", "image"} if stage == "student" else set())  # fmt: skip
    expected = sum(getattr(weights, term) * value for term, value in terms["generator"].items())
    assert float(found["generator"][0].loss.detach()) == pytest.approx(expected, rel=1e-5)
    for role, (output, _) in found.items():
        step = method.roles(stage)[role].step
        step.zero_grad()
        output.loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in step.parameters())
        assert not any(value.requires_grad for value in (*output.scalars.values(), *output.carry.values()))


def test_the_generators_terms_by_hand():
    method, batch = make(), make_batch()
    output, carry = passes(method, "student", batch)["generator"]
    image, source = observed(batch.image, batch.available)
    mask, student, teacher, critics = (batch.label > 0)[:, None], *(method.networks[name] for name in ("student", "teacher", "critics"))
    target = carry["target"]
    with torch.no_grad():
        code, back = F.one_hot(target, 4).float(), F.one_hot(source, 4).float()
        y, u, f = student(image, code, image)
        x_r, u_r, _ = student(y, back, y)
        full = teacher(image, code, tumour_image(image, mask))
        crop = lambda x: 2 * (mask * (x + 1) / 2) - 1  # noqa: E731
        whole, tumour = critics["whole"](y), critics["tumour"](u)
        expected = {
            "adversarial": -whole.realness.mean() - tumour.realness.mean(),
            "classification": F.cross_entropy(whole.sequence, target) + F.cross_entropy(tumour.sequence, target),
            "reconstruction": (image - x_r).abs().mean(), "local": (u - crop(y)).abs().mean() + (crop(image) - u_r).abs().mean(),
            "feature": (full.fused - f).abs().mean(), "image": (full.image - y).abs().mean(),
        }  # fmt: skip
    assert {name: float(value) for name, value in output.scalars.items()} == pytest.approx({k: float(v) for k, v in expected.items()}, rel=1e-4)


def test_the_teacher_is_guided_by_the_mask_also_on_the_way_back():
    method, batch, seen = make(), make_batch(), []
    method.networks["teacher"].register_forward_pre_hook(lambda module, inputs: seen.append(inputs))
    passes(method, "teacher", batch)
    mask, made = (batch.label > 0)[:, None], []
    for whole, _, local in seen:
        assert torch.equal(local, tumour_image(whole, mask))
        made.append(whole)
    image, _ = observed(batch.image, batch.available)
    assert len(seen) == 3 and torch.equal(made[0], image) and torch.equal(made[1], image) and not torch.equal(made[2], image)


def test_distillation_is_0_between_equal_networks_and_20_c_for_a_constant_offset():
    method, batch = make(), make_batch()
    image, source = observed(batch.image, batch.available)
    teacher = method.networks["teacher"]
    with torch.no_grad():
        made = Task(4).translate(teacher, image, source, None)
    assert all(float(value) == 0 for value in transfer(made, made).values())
    off = transfer(made, made._replace(image=made.image - 0.25, fused=made.fused - 0.25, tumour=None))
    weights = method.config.weights
    assert float(weights.feature * off["feature"] + weights.image * off["image"]) == pytest.approx(20 * 0.25, rel=1e-5)


def test_both_roles_work_on_the_same_targets_and_masks():
    method = make(mask="random")
    found = passes(method, "teacher", make_batch(samples=8))
    carried, given = found["critics"][0].carry, found["generator"][1]
    assert carried.keys() == {"target", "mask"} and all(carried[key] is given[key] for key in carried)
    assert 0.3 < carried["mask"].float().mean() < 0.7


def test_targets_are_drawn():
    torch.manual_seed(0)
    source = torch.arange(4).repeat(500)
    target = draw_targets(source, 4, "others")
    assert (target != source).all()
    counts = torch.stack([torch.bincount(target[source == s], minlength=4) for s in range(4)])
    assert (counts[~torch.eye(4, dtype=torch.bool)] > 120).all()  # of 167
    permuted = draw_targets(source, 4, "permute")
    assert torch.equal(permuted.sort().values, source.sort().values) and 400 < int((permuted == source).sum()) < 600
    with pytest.raises(UserError, match=r"method\.target_sampling: permute needs train\.micro_batch of 2 or more"):
        draw_targets(source[:1], 4, "permute")


@pytest.mark.parametrize(("name", "stage"), EACH_STAGE)
def test_what_nobody_may_see_changes_no_loss(name, stage):
    method, batch = make(name), make_batch(size=SIZES[name])
    losses = []
    for content in (float("nan"), 0.3):  # make_batch hides NaN
        batch.image = torch.where(batch.available[:, :, None, None], batch.image, content)
        losses.append([float(output.loss.detach()) for output, _ in passes(method, stage, batch).values()])
    assert losses[0] == losses[1] and all(np.isfinite(losses[0]))


def test_bf16_losses_stay_close_and_differentiate_twice():
    method, batch = make(), make_batch()
    exact = {role: output.loss.item() for role, (output, _) in passes(method, "student", batch).items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = {role: output for role, (output, _) in passes(method, "student", batch).items()}
    rough["critics"].loss.backward()
    assert all(p.grad.isfinite().all() and p.grad.dtype == torch.float32 for p in method.networks["critics"].parameters())
    for role, loss in exact.items():
        assert rough[role].loss.dtype == torch.float32 and rough[role].loss.item() == pytest.approx(loss, rel=0.15), role


def test_the_penalty_is_computed_in_float32_whatever_the_precision():
    critic, (real, fake) = make().networks["critics"]["whole"], torch.rand(2, 3, 1, 16, 16)
    terms = []
    for enabled in (False, True):
        torch.manual_seed(0)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            terms.append(critic_terms(critic, real, fake, torch.tensor([0, 1, 2]), "sum"))
    assert torch.equal(terms[0]["gradient_penalty"], terms[1]["gradient_penalty"]) and not torch.equal(terms[0]["critic"], terms[1]["critic"])


def test_the_critics_leave_a_generators_running_statistics_alone():
    method, batch = make(network={"fusion_norm": "batch"}), make_batch()
    buffers = {key: value.clone() for key, value in method.networks["teacher"].named_buffers()}
    roles = method.roles("teacher")
    carry = roles["critics"].step(batch, {}, Progress(0, 0, 1, 1)).carry
    assert buffers and all(torch.equal(value, buffers[key]) for key, value in method.networks["teacher"].named_buffers())
    roles["generator"].step.train()(batch, carry, Progress(0, 0, 1, 1))
    assert method.networks["teacher"].fusion.layers[1].num_batches_tracked == 2  # there and back


@pytest.mark.parametrize(("name", "stage"), EACH_STAGE)
def test_a_step_asks_no_tensor_for_its_value(name, stage):
    with fake_tensors():
        method = make(name)
        kept = kept_for_backward(method, method.roles(stage), empty_batch(2, 4, (SIZES[name],) * 2, True), "bf16")
    assert kept.keys() == {"critics", "generator"} and all(size > 0 for size in kept.values())


# stages


def test_stages_roles_and_the_published_optimiser():
    method = make()
    assert method.stages == ("teacher", "student") and not method.complete_only and method.dimensions == 2 and method.task == "synthesis"
    assert method.needs("teacher") == {} and method.needs("student") == {"teacher": "teacher"} and method.oracles == ("teacher",)
    assert method.subsets == ("flair", "t2", "t1ce", "t1") and all(method.availability(stage).kind == "single" for stage in method.stages)
    assert (method.intensity.kind, method.intensity.percentile, method.intensity.interval, method.intensity.hidden_value) == ("percentile", "0.1", (-1, 1), -1)
    for stage in method.stages:
        roles = method.roles(stage)
        assert list(roles) == ["critics", "generator"]  # in update order
        assert roles["critics"].double_backward and roles["critics"].every == 1 and roles["critics"].borrows == (stage,)
        assert not roles["generator"].double_backward and roles["generator"].every == 5 and roles["generator"].networks == (stage,)
        assert all((role.optimizer.name, role.optimizer.lr, role.optimizer.betas) == ("adam", 1e-4, (0.9, 0.999)) for role in roles.values())


def test_the_learning_rate_is_constant_for_half_of_the_epochs_and_1e_6_in_the_last():
    role = make().roles("student")["generator"]

    def rate(epoch: int, of: int = 100) -> float:
        """During the epoch, counted from 1; the first and the last of ten steps are alike."""
        steps = (Progress(step=10 * (epoch - 1) + n, epoch=epoch - 1, total_steps=10 * of, total_epochs=of) for n in (0, 9))
        first, last = (role.optimizer.lr * lr_factor(role.schedule, progress) for progress in steps)
        assert first == last
        return first

    assert [rate(epoch) for epoch in (1, 50, 75, 100)] == pytest.approx([1e-4, 1e-4, 5.05e-5, 1e-6], rel=1e-9)
    assert rate(51) == pytest.approx(1e-4 - 9.9e-5 / 50) and rate(1, of=1) == pytest.approx(1e-6)


def test_the_student_begins_as_the_teacher_but_for_its_local_encoder():
    fresh, method = make().networks["student"].state_dict(), make()
    for p in method.networks["teacher"].parameters():
        p.data += 1
    method.begin("student")
    teacher = method.networks["teacher"].state_dict()
    for key, value in method.networks["student"].state_dict().items():
        assert torch.equal(value, fresh[key] if key.startswith("local_encoder.") else teacher[key]), key
    for method, stage in ((make(student_init="random"), "student"), (make(), "teacher")):
        method.begin(stage)
        assert all(torch.equal(value, fresh[key]) for key, value in method.networks["student"].state_dict().items())


@pytest.mark.parametrize("arch", ARCHES)
def test_other_structures_take_the_parts_that_they_have_and_train_a_step(arch):
    method = make(student_arch=arch)
    method.begin("student")
    student, teacher = (method.networks[name] for name in ("student", "teacher"))
    assert torch.equal(student.global_decoder.out.weight, teacher.global_decoder.out.weight)
    found = passes(method, "student", make_batch())
    assert set(found["generator"][0].scalars) == {"adversarial", "classification", "reconstruction", "local", "feature", "image"}
    found["generator"][0].loss.backward()
    assert all(p.grad.abs().max() >= 0 for p in student.parameters())
    assert method.predict(make_batch().image, make_batch().available).isfinite().all()


@pytest.mark.parametrize(("kind", "share"), [("region", None), ("zeros", 0.0), ("random", 0.5)])
def test_mask_ablations(kind, share):
    method, batch = make(mask=kind, region="ET"), make_batch(samples=4)
    mask = passes(method, "teacher", batch)["critics"][0].carry["mask"]
    if share is None:
        assert torch.equal(mask[:, 0], batch.label == 4)
    else:
        assert float(mask.float().mean()) == pytest.approx(share, abs=0.1)
    pictures = [method.predict_oracle(batch.image, batch.available, batch.label, "teacher") for _ in range(2)]
    assert torch.equal(*pictures)
    other = method.predict_oracle(batch.image, batch.available, torch.zeros_like(batch.label), "teacher")
    assert torch.equal(pictures[0], other) == (kind != "region")
    assert method.oracles == (("teacher",) if kind == "region" else ())
    if kind != "region":  # it is told nothing, so it needs no label
        assert torch.equal(method.predict(batch.image, batch.available, "teacher"), pictures[0])


def test_a_teacher_of_another_architecture_is_one_line(tmp_path):
    save_file({f"teacher.{key}": value for key, value in make(network={"width": 8}).networks["teacher"].state_dict().items()}, tmp_path / "t.safetensors")
    with pytest.raises(UserError) as caught:
        load_weights(make().networks["teacher"], "teacher", [tmp_path / "t.safetensors"], None)
    assert "does not fit the network teacher" in str(caught.value) and "\n" not in str(caught.value)


def test_a_given_teacher_leaves_out_its_stage_and_the_critics_with_it():
    assert stages_left_out(make(), {"teacher"}) == ["teacher"] and stages_left_out(make(), set()) == []
    assert stages_left_out(make("stargan"), set()) == []


# prediction


@pytest.mark.parametrize("name", NAMES)
def test_the_three_other_sequences_are_made_and_the_given_one_stays_bit_for_bit(name):
    method, batch = make(name), make_batch(samples=4, size=SIZES[name])
    completed = method.predict(batch.image, batch.available)  # what is hidden is NaN
    assert torch.equal(completed[batch.available], batch.image[batch.available]) and not completed.requires_grad
    assert completed.isfinite().all() and completed.abs().max() <= 1
    image, source = observed(batch.image, batch.available)
    with torch.no_grad():
        for target in range(4):
            direct = method.networks["student"](image, F.one_hot(torch.full((4,), target), 4).float()).image
            others = source != target
            torch.testing.assert_close(completed[others, target], direct[others, 0])
    made = completed.masked_select(~batch.available[:, :, None, None]).reshape(4, 3, -1)
    assert not any(torch.allclose(made[:, a], made[:, b]) for a, b in ((0, 1), (0, 2), (1, 2)))


def test_the_student_takes_no_mask_and_the_label_cannot_change_its_output():
    assert list(inspect.signature(make().predict).parameters) == ["image", "available", "network"]
    method, batch = make(), make_batch()
    other = torch.full_like(batch.label, 4)
    for network, changes in (("student", False), ("teacher", True)):
        pictures = [method.predict_oracle(batch.image, batch.available, label, network) for label in (batch.label, other)]
        features = [method.fused(batch.image, batch.available, label, network) for label in (batch.label, other)]
        assert features[0].shape == (2, 3, 16, 4, 4) and torch.equal(*pictures) == torch.equal(*features) == (not changes)
    assert torch.equal(method.predict(batch.image, batch.available), method.predict_oracle(batch.image, batch.available, other, "student"))
    with pytest.raises(UserError, match="network teacher: it needs the tumour mask"):
        method.predict(batch.image, batch.available, "teacher")


def test_features_of_equal_networks_on_equal_input_have_no_error():
    method, batch = make(student_init="teacher"), make_batch()
    method.networks["student"].load_state_dict(method.networks["teacher"].state_dict())
    everything = torch.ones_like(batch.label)  # then the tumour image is the slice
    error = method.fused(batch.image, batch.available, everything, "student") - method.fused(batch.image, batch.available, everything, "teacher")
    assert float(error.abs().mean()) == 0


@pytest.mark.parametrize("name", NAMES)
def test_more_than_one_sequence_is_one_line(name):
    method, batch = make(name), make_batch(size=SIZES[name])
    batch.available[0] = True
    for call in (lambda: method.predict(batch.image, batch.available), lambda: method.check_available(batch.available)):
        with pytest.raises(UserError, match=r"data\.availability: a slice is translated from exactly one sequence, and samples here have \[1, 4\]"):
            call()


# settings


def test_presets_differ_in_the_penalty_alone_and_a_given_key_wins():
    code, paper = make().config, make(preset="paper").config
    assert (code.weights.gradient_penalty, paper.weights.gradient_penalty) == (10, 1)
    assert paper.model_copy(update={"preset": "code", "weights": code.weights}) == code
    assert make(preset="paper", weights={"gradient_penalty": 3, "local": 2}).config.weights.gradient_penalty == 3
    assert make(preset="paper", weights={"local": 2}).config.weights.gradient_penalty == 1


@pytest.mark.parametrize(("change", "message"), [
    ({"scheme": "tissue3"}, r"method\.region: WT is no region of tissue3"),
    ({"scheme": None}, r"method\.region: WT is no region of a set without labels"),
    ({"size": 18}, r"data\.slices\.size 18: method\.network\.levels 2 needs a multiple of 4, 8 at least"),
    ({"size": 16, "network": {"levels": 4}}, r"data\.slices\.size 16: method\.network\.levels 4 needs a multiple of 16, 32 at least"),
    ({"critic": {"layers": 5}}, r"method\.critic\.layers 5: data\.slices\.size 16 cannot be halved so often"),
    ({"name": "resvit", "size": 24}, r"data\.slices\.size 24: resvit needs a multiple of 16, 32 at least"),
    ({"name": "resvit", "network": {"attending": [2]}}, r"method\.network: attending \[2\]: there are 2 blocks"),
    ({"intensity": {"interval": [0, 1]}}, r"method\.intensity\.interval: the networks end in tanh: give \[-1, 1\]"),
    ({"name": "stargan", "region": "WT"}, r"unknown key method\.region"),
    ({"preset": "best"}, r"method\.preset: Input should be 'code' or 'paper'"),
])  # fmt: skip
def test_bad_settings_are_one_line(change, message):
    with pytest.raises(UserError, match=message) as caught:
        make(**change)
    assert "\n" not in str(caught.value)


def test_masks_need_labels_and_baselines_need_none():
    for name in NAMES:
        batch = make_batch(size=SIZES[name])
        batch.label = None
        if name != "utad_net":
            assert passes(make(name, scheme=None), "train", batch).keys() == {"critics", "generator"}
            continue
        for stage in ("teacher", "student"):
            with pytest.raises(UserError, match="subject-0: no label in the shard set; utad_net's losses need tumour masks"):
                passes(make(), stage, batch)


@pytest.mark.parametrize(("recipe", "region"), [
    ("utad_net_phantom", "WT"), ("utad_net_brats2020_wt", "WT"), ("utad_net_brats2020_tc", "TC"), ("utad_net_brats2020_et", "ET"),
    ("stargan_phantom", None), ("resvit_phantom", None),
])  # fmt: skip
def test_recipes_build(recipe, region):
    config = load_config(recipe)
    with torch.device("meta"):
        method = build(config.method, facts(config.data.slices.size), config.origin)
    assert getattr(method.config, "region", None) == region and config.data.slices.region in (region, "WT")
    assert set(config.train.roles) <= {"critics", "generator"}
    if "brats" in recipe:
        assert (config.train.global_batch, config.train.epochs, config.data.slices.size) == (8, 100, 128)
        assert sum(p.numel() for p in method.networks["student"].parameters()) == 106_779_778

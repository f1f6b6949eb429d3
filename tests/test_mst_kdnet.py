"""MST-KDNet: roles, losses, label channels, prediction."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_mst_kdnet import CROP, NETWORK, START, TERMS, facts, make, make_batch, parameters

from mstkd.batch import Batch, Progress
from mstkd.config import load_config
from mstkd.engine.schedule import lr_factor
from mstkd.errors import UserError
from mstkd.methods import build
from mstkd.methods.mst_kdnet import MSTKDNetConfig
from mstkd.shards.spec import LABEL_SCHEMES
from mstkd.targets import TumourChannels


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


# Loss terms of the networks' role


def test_equal_networks_and_inputs_have_no_distance():
    method = make(network=NETWORK)
    method.networks["student"].load_state_dict(method.networks["teacher"].state_dict())
    batch = make_batch()
    batch.available = torch.ones(1, 4, dtype=torch.bool)
    scalars = method.roles("distill")["networks"].step.eval()(batch, {}, START).scalars
    assert scalars.keys() == TERMS
    assert [scalars[name].item() for name in ("consistency", "content", "mst", "evd", "kl", "gsm")] == [0.0] * 6
    assert scalars["dice_teacher"] == scalars["dice_student"] > 0


def test_loss_is_the_weighted_sum_with_the_ramp():
    method = make(weights={"bce": 0.5})
    step, batch, weights = method.roles("distill")["networks"].step, make_batch(), method.config.weights.model_dump()
    for epoch, ramp in ((0, math.exp(-5)), (20, 1.0), (50, 1.0)):
        output = step(batch, {}, Progress(0, epoch, 100, 100))
        assert output.scalars.keys() == TERMS | {"bce"} and not any(s.requires_grad or s.dim() for s in output.scalars.values())
        expected = sum(weights[k] * v.item() * (ramp if k == "consistency" else 1) for k, v in output.scalars.items())
        assert output.loss.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("switch", "gone"),
    [("no_mstkd", {"mst", "evd"}), ("no_gsme", {"gsm", "adversarial"}), ("no_slkd", {"consistency", "kl"})],
)
def test_ablations_remove_their_terms(switch, gone):
    method = make(**{switch: True})
    roles = method.roles("distill")
    assert roles["networks"].step(make_batch(), {}, START).scalars.keys() == TERMS - gone
    assert ("critic" in method.networks) == ("critic" in roles) == (switch != "no_gsme")


def test_missing_path_dice_reaches_the_students_background_and_not_the_teacher():
    silent = dict.fromkeys(MSTKDNetConfig().weights.model_dump(), 0.0)
    method = make(weights={**silent, "dice_student": 0.6})
    method.roles("distill")["networks"].step(make_batch(), {}, START).loss.backward()
    assert (method.networks["student"].head.weight.grad.flatten(1).abs().sum(1) > 0).all()  # background is channel 3
    assert method.networks["teacher"].head.weight.grad.abs().max() == 0


@pytest.mark.parametrize("detach", [False, True])
def test_transfer_terms_train_the_teacher_unless_detached(detach):
    method = make(detach_teacher=detach, weights={"dice_teacher": 0.0, "bce": 0.0})
    method.roles("distill")["networks"].step(make_batch(), {}, START).loss.backward()
    gradient = max(p.grad.abs().max().item() for p in method.networks["teacher"].parameters())
    assert (gradient == 0) == detach


def test_attention_term_does_not_depend_on_the_crop_but_in_the_reference_form():
    batch = make_batch()
    ours, reference = make(), make(reference_evd=True)
    for name in ("teacher", "student"):
        reference.networks[name].load_state_dict(ours.networks[name].state_dict())
    value, other = (m.roles("distill")["networks"].step(batch, {}, START).scalars["evd"].item() for m in (ours, reference))
    assert value > 0 and other / value == pytest.approx((120 / 2) ** 4, rel=1e-4)  # 2 tokens


def test_bf16_terms_stay_close_to_fp64():
    method, batch = make(), make_batch()
    step = method.roles("distill")["networks"].step
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = step(batch, {}, START)
    method.networks["critic"].double()
    batch.image = batch.image.double()
    exact = step.double()(batch, {}, START)
    assert rough.loss.dtype == torch.float32
    for name, value in exact.scalars.items():
        assert rough.scalars[name].item() == pytest.approx(value.item(), rel=0.1, abs=1e-3), name  # bf16 keeps 8 bits per operation


def test_constant_volume_stays_finite():
    method, batch = make(), make_batch()
    step = method.roles("distill")["networks"].step
    for value in (0.0, 1.0):
        batch.image.fill_(value)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = step(batch, {}, START)
        output.loss.backward()
        assert all(s.isfinite() for s in output.scalars.values())
        assert all(p.grad.isfinite().all() for p in step.parameters())


# What the student may see


@pytest.mark.parametrize("fill", ["zeros", "noise"])
def test_hidden_voxels_never_reach_the_student(fill):
    method, batch = make(missing_fill=fill), make_batch(2)
    step = method.roles("distill")["networks"].step.train()
    hidden = ~batch.available[:, :, None, None, None]
    images = [batch.image, *(batch.image.masked_fill(hidden, content) for content in (7.0, math.nan, math.inf))]
    trained = []
    for image in images:
        torch.manual_seed(1)
        trained.append(step(Batch(**{**vars(batch), "image": image}), {}, START).carry["style_missing"])
    predicted = [method.predict(image, batch.available) for image in images]
    for clean, *disturbed in (trained, predicted):
        assert clean.isfinite().all() and all(torch.equal(clean, other) for other in disturbed)


def test_noise_fill_differs_from_zeros():
    zeros, noise = make(), make(missing_fill="noise")
    noise.networks["student"].load_state_dict(zeros.networks["student"].state_dict())
    batch = make_batch()
    assert not torch.allclose(zeros.predict(batch.image, batch.available), noise.predict(batch.image, batch.available))


# Roles


def test_roles_as_published():
    roles = make().roles("distill")
    assert list(roles) == ["networks", "critic"]
    networks, critic = roles["networks"], roles["critic"]
    assert networks.networks == ("teacher", "student") and networks.borrows == ("critic",) and critic.networks == ("critic",)
    assert not any("critic" in name for name, _ in networks.step.named_parameters())
    assert (networks.optimizer.lr, networks.optimizer.weight_decay) == (1e-4, 1e-5)
    assert (critic.optimizer.lr, critic.optimizer.betas, critic.optimizer.weight_decay) == (1e-4, (0.9, 0.99), 0.0)


def test_learning_rate():
    roles = make().roles("distill")
    networks, critic = roles["networks"], roles["critic"]
    for epoch, lr in ((0, 1.0e-4), (50, 5.3589e-5), (99, 1.5849e-6)):
        progress = Progress(step=10 * epoch + 3, epoch=epoch, total_steps=1000, total_epochs=100)
        assert networks.optimizer.lr * lr_factor(networks.schedule, progress) == pytest.approx(lr, rel=1e-4)
        assert lr_factor(critic.schedule, progress) == 1.0


def test_each_role_moves_its_own_networks_only():
    method, batch = make(), make_batch()
    roles = method.roles("distill")
    optimizers = {n: torch.optim.Adam(r.step.parameters(), lr=r.optimizer.lr, betas=r.optimizer.betas) for n, r in roles.items()}
    for _ in range(2):
        method.networks["critic"].requires_grad_(False)  # what the engine does for a borrowed network
        output = roles["networks"].step(batch, {}, START)
        output.loss.backward()
        method.networks["critic"].requires_grad_(True)
        assert all(p.grad is None for p in method.networks["critic"].parameters())
        optimizers["networks"].step()
        gradients = [p.grad.clone() for p in roles["networks"].step.parameters()]
        assert not any(t.requires_grad for t in output.carry.values())
        roles["critic"].step(batch, output.carry, START).loss.backward()
        assert all(torch.equal(p.grad, g) for p, g in zip(roles["networks"].step.parameters(), gradients, strict=True))
        assert any(p.grad.abs().max() > 0 for p in method.networks["critic"].parameters())
        optimizers["critic"].step()
        for optimizer in optimizers.values():
            optimizer.zero_grad()
    counts = {s["step"].item() for s in optimizers["critic"].state.values()}
    assert counts == {2}


def test_adversarial_term_reaches_the_student_through_the_frozen_critic():
    silent = dict.fromkeys(MSTKDNetConfig().weights.model_dump(), 0.0)
    method = make(weights={**silent, "adversarial": 1.0})
    method.networks["critic"].requires_grad_(False)
    method.roles("distill")["networks"].step(make_batch(), {}, START).loss.backward()
    assert method.networks["student"].style.weight.grad.abs().max() > 0
    assert method.networks["teacher"].style.weight.grad.abs().max() == 0


def test_undecided_critic():
    method, batch = make(), make_batch()
    for parameter in method.networks["critic"].layers[-1].parameters():
        torch.nn.init.zeros_(parameter)
    roles = method.roles("distill")
    output = roles["networks"].step(batch, {}, START)
    critic = roles["critic"].step(batch, output.carry, START)
    assert critic.loss.item() == pytest.approx(2 * math.log(2), abs=1e-6) and critic.scalars["critic"] == critic.loss
    assert output.scalars["adversarial"].item() == pytest.approx(math.log(2), abs=1e-6)


def test_a_few_steps_bring_the_loss_down():
    crop = (32, 32, 32)
    method, batch = make(network=NETWORK, crop=crop), make_batch(crop=crop)
    batch.label = (batch.image[:, 0] > 0.5).to(torch.uint8)
    step = method.roles("distill")["networks"].step.train()
    optimizer = torch.optim.Adam(step.parameters(), lr=1e-3)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = step(batch, {}, START)
        output.loss.backward()
        optimizer.step()
        losses.append(output.scalars["dice_student"].item())
    assert losses[-1] < losses[0] - 0.1


# Prediction


@pytest.mark.parametrize("bn_eval", ["running", "batch"])
def test_prediction_is_repeatable_and_changes_nothing(bn_eval):
    method, batch = make(network={**NETWORK, "bn_eval": bn_eval}), make_batch(2)
    for network in ("student", "teacher"):
        module = method.networks[network].train()
        before = {k: v.clone() for k, v in module.state_dict().items()}
        first, second = (method.predict(batch.image, batch.available, network) for _ in range(2))
        assert first.shape == (2, 4, *CROP) and not first.requires_grad and torch.equal(first, second)
        assert module.training and all(torch.equal(before[k], v) for k, v in module.state_dict().items())
        module(batch.image)  # whereas training does move the statistics
        assert any(not torch.equal(before[k], v) for k, v in module.state_dict().items())


@pytest.mark.parametrize("scheme", ["brats2018", "brats2023", "brats2024", "msd_task01"])
@pytest.mark.parametrize("targets", ["region", "disjoint"])
@settings(max_examples=20)
@given(seed=st.integers(0, 2**31))
def test_labels_survive_encode_and_decode(scheme, targets, seed):
    declared = LABEL_SCHEMES[scheme]
    values = torch.tensor(declared.values, dtype=torch.uint8)
    label = values[torch.randint(len(values), (2, 3, 4, 5), generator=torch.Generator().manual_seed(seed))]
    has_cavity = scheme == "brats2024"
    channels = TumourChannels(declared, targets, rc_channel=has_cavity)
    encoded = channels.encode(label)
    assert encoded.shape == (2, channels.count, 3, 4, 5)
    assert torch.equal(channels.decode(encoded - 0.5), label)
    if has_cavity:
        plain = TumourChannels(declared, targets, rc_channel=False)
        assert torch.equal(plain.decode(plain.encode(label) - 0.5), label.masked_fill(label == 4, 0))


def test_cavity_is_background_or_a_channel():
    label = torch.tensor([0, 1, 2, 3, 4], dtype=torch.uint8).view(1, 5, 1, 1)
    plain, own = (TumourChannels(LABEL_SCHEMES["brats2024"], "region", rc).encode(label)[0, :, :, 0, 0].int().tolist() for rc in (False, True))
    assert plain == [[0, 1, 1, 1, 0], [0, 1, 0, 1, 0], [0, 0, 0, 1, 0], [1, 0, 0, 0, 1]]
    assert own == [*plain[:3], [1, 0, 0, 0, 0], [0, 0, 0, 0, 1]]


def test_overlapping_channels_are_painted_in_order():
    logits = -torch.ones(1, 4, 4, 1, 1)
    logits[0, 0, 1:] = logits[0, 1, 2:] = logits[0, 2, 3:] = 1
    decode = {t: TumourChannels(LABEL_SCHEMES["brats2018"], t, False).decode(logits).flatten().tolist() for t in ("region", "disjoint")}
    assert decode == {"region": [0, 2, 1, 4], "disjoint": [0, 1, 1, 4]}


def test_five_channels_train_and_predict():
    method, batch = make("brats2024", rc_channel=True), make_batch(scheme="brats2024")
    assert method.roles("distill")["networks"].step(batch, {}, START).loss.isfinite()
    logits = method.predict(batch.image, batch.available)
    labels = method.to_labels(logits)
    assert logits.shape[1] == 5 and labels.dtype == torch.uint8 and labels.shape == (1, *CROP)


# Bad input, recipes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"crop": (60, 64, 64)}, r"data.crop \[60, 64, 64\]: each axis must be divisible by 32; use \[64, 64, 64\]"),
        ({"reference_head": True}, r"method.reference_head: fits crops like \[160, 192, 128\], not \[64, 32, 32\]"),
        ({"rc_channel": True}, "method.rc_channel: label scheme brats2018 has no resection cavity"),
        ({"scheme": "tissue3"}, "declares tissue3; it needs one with the regions WT, TC and ET"),
        ({"scheme": None}, "declares no label scheme"),
        ({"network": {**NETWORK, "heads": 5}}, "embed_dim 24 is not a multiple of heads 5"),
        ({"network": {**NETWORK, "layers": 6}}, "method.network.layers"),
        ({"taw": 3}, "unknown key method.taw; did you mean 'tau'"),
    ],
)
def test_bad_settings_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        make(**change)


def test_training_without_labels_is_refused():
    batch = make_batch()
    batch.label = None
    with pytest.raises(UserError, match="subject-0: no label"):
        make().roles("distill")["networks"].step(batch, {}, START)


def test_a_window_that_does_not_fit_is_refused():
    with pytest.raises(UserError, match=r"inference.window \[48, 32, 32\]"):
        make().predict(torch.rand(1, 4, 48, 32, 32), torch.ones(1, 4, dtype=torch.bool))


@pytest.mark.parametrize("variant", ["phantom", "brats2024", "fets2024", "brats2024_reference", "fets2024_reference"])
def test_recipes_build(variant):
    config = load_config(f"mst_kdnet_{variant}")
    scheme = "brats2024" if "brats2024" in variant else "brats2018"
    with torch.device("meta"):
        method = build(config.method, facts(scheme, config.data.crop))
    published = variant != "phantom"
    assert (parameters(method.networks["student"]) == 154_334_148) == published
    assert ("reference" in variant) == (config.train.global_batch == 1) == (method.config.targets == "disjoint")
    assert set(config.train.roles) <= set(method.roles("distill"))

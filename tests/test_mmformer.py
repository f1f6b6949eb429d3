"""mmFormer: its network, its regularisers, and what it makes of missing sequences."""

import pytest
import torch
from baseline_ranks import SEQUENCES, START, make_batch, small
from small_mst_kdnet import facts, parameters

from mstkd.errors import UserError
from mstkd.losses.dice import soft_dice
from mstkd.methods import build
from mstkd.models.mmformer import LEVELS, MMFormer
from mstkd.models.recompute import recompute

CROP = (32, 32, 16)
NETWORK = {"width": 4, "embed_dim": 24, "heads": 3, "mlp_dim": 32}
STILL = {**NETWORK, "dropout": 0.0}
SUBSETS = torch.tensor([[True, False, True, False], [False, True, False, False]])


def make(crop=CROP, network=STILL, **section):
    torch.manual_seed(0)
    return build({"name": "mmformer", "network": network, **section}, facts(crop=crop))


def network_of(method):
    return method.networks["student"]


def terms_of(method, batch, training=True):
    return method.roles("train")["student"].step.train(training)(batch, {}, START)


def test_the_published_size():
    with torch.device("meta"):
        network = network_of(make(network={}, crop=(80, 80, 80)))
    assert parameters(network) == 35_862_864
    used = parameters(network) - parameters(network.separate_decoder) - parameters(network.deep_heads)
    assert used == 35_268_532  # the regularisers' parts serve training alone


def test_shapes_in_training_and_in_evaluation():
    network, image = network_of(make()), torch.rand(2, 4, *CROP)
    output = network.train()(image, SUBSETS)
    assert output.logits.shape == (2, 4, *CROP) and len(output.separate) == 4 and len(output.deep) == LEVELS - 1
    assert all(logits.shape == output.logits.shape for logits in (*output.separate, *output.deep))
    lean = network.eval()(image, SUBSETS)
    assert lean.separate == lean.deep == () and torch.allclose(lean.logits, output.logits, atol=1e-4)  # no statistics, no dropout here


@pytest.mark.parametrize("sequences", [("t1",), ("a", "b"), ("flair", "t1", "t1ce", "t2", "adc")])
def test_any_number_of_sequences(sequences):
    network = MMFormer(sequences, 3, CROP, **NETWORK)
    output = network(torch.rand(1, len(sequences), *CROP), torch.ones(1, len(sequences), dtype=torch.bool))
    assert output.logits.shape == (1, 3, *CROP) and len(output.separate) == len(sequences)


def test_another_size_resamples_the_position_embeddings():
    network = network_of(make()).eval()
    torch.nn.init.normal_(network.across.position)
    with torch.no_grad():
        assert network(torch.rand(1, 4, 48, 32, 32), SUBSETS[:1]).logits.shape == (1, 4, 48, 32, 32)


@pytest.mark.parametrize("training", [True, False])
def test_each_sample_has_its_own_subset(training):
    network, image = network_of(make()).train(training), torch.rand(2, 4, *CROP)
    both = network(image, SUBSETS).logits
    for sample in range(2):
        alone = network(image[sample : sample + 1], SUBSETS[sample : sample + 1]).logits
        torch.testing.assert_close(both[sample : sample + 1], alone, atol=1e-4, rtol=1e-3)  # norms over four voxels magnify what is rounded


def test_what_is_hidden_cannot_be_seen_even_where_it_is_not_a_number():
    method, image = make(), torch.rand(2, 4, *CROP)
    network_of(method).eval()
    clean = method.predict(image, SUBSETS)
    spoilt = image.masked_fill(~SUBSETS[:, :, None, None, None], float("nan"))
    assert torch.equal(clean, method.predict(spoilt, SUBSETS)) and clean.isfinite().all()
    assert not torch.equal(clean, method.predict(image, torch.ones(2, 4, dtype=torch.bool)))


def test_in_evaluation_only_what_is_available_is_encoded_and_in_training_everything():
    network, calls = network_of(make()), []
    for name, encoder in network.encoders.items():
        encoder.register_forward_hook(lambda module, inputs, output, name=name: calls.append(name))
    network.eval()(torch.rand(1, 4, *CROP), SUBSETS[:1])
    assert calls == ["flair", "t1ce"]
    calls.clear()
    network.train()(torch.rand(1, 4, *CROP), SUBSETS[1:])
    assert sorted(calls) == sorted(SEQUENCES)


def test_a_sequence_that_the_subject_lacks_leaves_no_trace_and_every_encoder_has_a_gradient():
    method, found = make(), []
    for content in (0.0, 9.0, float("nan")):
        batch = make_batch(method, "train", CROP)
        batch.present[:, 1] = batch.available[:, 1] = False  # no sample has t1
        batch.available[:, 0] = True
        batch.image[:, 1] = content
        network_of(method).zero_grad()
        output = terms_of(method, batch)
        output.loss.backward()
        gradients = {name: p.grad for name, p in network_of(method).named_parameters()}
        assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients.values())
        assert all(gradients[name].abs().max() == 0 for name in gradients if name.startswith("encoders.t1."))
        assert any(gradients[name].abs().max() > 0 for name in gradients if name.startswith("encoders.t2."))
        found.append([output.loss.detach(), *gradients.values()])
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_a_hidden_sequence_still_trains_its_encoder_through_the_separate_decoder_alone():
    batch = make_batch(make(), "train", CROP)
    batch.available = torch.tensor([[True, False, True, True]] * 2)
    for weight, trained in ((1.0, True), (0.0, False)):
        method = make(weights={"separate": weight})
        terms_of(method, batch).loss.backward()
        largest = max(float(p.grad.abs().max()) for p in network_of(method).encoders["t1"].levels.parameters() if p.grad is not None)
        assert (largest > 0) == trained


def test_the_loss_by_hand():
    weights = {"dice": 2.0, "bce": 3.0, "separate": 0.5, "deep": 0.25}
    method = make(weights=weights)
    batch = make_batch(method, "train", CROP)
    batch.present = torch.tensor([[True, True, True, True], [True, True, False, True]])
    output = terms_of(method, batch)
    with torch.no_grad():
        network = network_of(method)(batch.image, batch.available, batch.present)
    target = method.channels.encode(batch.label)

    def fit(logits, target):
        p = logits.sigmoid()
        bce = -(target * p.log() + (1 - target) * (1 - p).log()).mean()
        return soft_dice(p, target).mean(), bce, 2 * soft_dice(p, target).mean() + 3 * bce

    dice, bce, fused = fit(network.logits, target)
    separate = sum(fit(logits[batch.present[:, m]], target[batch.present[:, m]])[2] for m, logits in enumerate(network.separate))
    deep = sum(fit(logits, target)[2] for logits in network.deep)
    expected = {"dice": dice, "bce": bce, "separate": separate, "deep": deep}
    assert {k: float(v) for k, v in output.scalars.items()} == pytest.approx({k: float(v) for k, v in expected.items()}, rel=1e-4)
    assert float(output.loss.detach()) == pytest.approx(float(fused + 0.5 * separate + 0.25 * deep), rel=1e-4)


def test_bf16_terms_stay_close_to_fp32_and_finite_on_constant_volumes():
    method = make()
    batch = make_batch(method, "train", CROP)
    exact = terms_of(method, batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = terms_of(method, batch)
    assert rough.loss.dtype == torch.float32
    assert {k: float(v) for k, v in rough.scalars.items()} == pytest.approx({k: float(v) for k, v in exact.scalars.items()}, rel=0.05)
    batch.image.fill_(1.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = terms_of(method, batch)
    output.loss.backward()
    assert output.loss.isfinite() and all(p.grad.isfinite().all() for p in network_of(method).parameters())


def test_recomputation_changes_nothing():
    gradients = []
    for again in (False, True):
        method = make(network=NETWORK)  # with dropout
        assert not again or recompute(network_of(method), method.blocks) > 0
        torch.manual_seed(1)
        terms_of(method, make_batch(method, "train", CROP)).loss.backward()
        gradients.append([p.grad for p in network_of(method).parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_a_few_steps_bring_the_loss_down():
    method = make(network=NETWORK, crop=(32, 16, 16))
    batch = make_batch(method, "train", (32, 16, 16))
    batch.label = (batch.image[:, 0] > 0.5).to(torch.uint8)
    batch.available[:, 0] = True
    optimizer = torch.optim.Adam(network_of(method).parameters(), lr=1e-2)
    losses = []
    for _ in range(25):
        optimizer.zero_grad()
        output = terms_of(method, batch)
        output.loss.backward()
        optimizer.step()
        losses.append(float(output.scalars["dice"]))
    assert losses[-1] < losses[0] - 0.05


@pytest.mark.parametrize(("change", "expected"), [
    ({"crop": (40, 32, 16)}, "data.crop [40, 32, 16]: mmformer needs multiples of 16, one of them at least 32; use [48, 32, 32]"),
    ({"crop": (16, 16, 16)}, "data.crop [16, 16, 16]: mmformer needs multiples of 16, one of them at least 32; use [32, 32, 32]"),
    ({"network": {**NETWORK, "heads": 5}}, "embed_dim 24 is not a multiple of heads 5"),
    ({"network": {**NETWORK, "depth": 2}}, "unknown key method.network.depth"),
    ({"weights": {"seperate": 1}}, "unknown key method.weights.seperate; did you mean 'separate'?"),
])  # fmt: skip
def test_bad_settings_are_one_line(change, expected):
    with pytest.raises(UserError) as caught:
        make(**change)
    assert expected in str(caught.value) and "\n" not in str(caught.value)


def test_optimiser_as_published():
    role = small("mmformer").roles("train")["student"]
    assert (role.optimizer.name, role.optimizer.lr, role.optimizer.weight_decay, role.schedule.name) == ("adam", 2e-4, 1e-4, "poly")

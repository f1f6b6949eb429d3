"""Networks of the unpaired translation and its losses, against the figures of the specification and closed forms."""

import math

import pytest
import torch
from small_mst_kdnet import parameters
from small_utad import make
from torch.nn import functional as F

from mstkd.losses.adversarial import critic_loss, deception_loss, gradient_penalty
from mstkd.losses.translation import local_consistency, tumour_image
from mstkd.models.critics import Critic, initialise
from mstkd.models.recompute import recompute
from mstkd.models.resvit import ResViTGenerator
from mstkd.models.utad_net import Fusion, Generator


def generator(**arguments) -> Generator:
    torch.manual_seed(0)
    return Generator(4, **{"width": 4, "levels": 2, **arguments})


# networks


def test_parameters_and_shapes_are_the_published_ones():
    with torch.device("meta"):
        published, critic = Generator(4, fusion_norm="batch"), Critic(4, 128)
        slices = torch.empty(2, 1, 128, 128)
        made, verdict = published(slices, torch.empty(2, 4), slices), critic(slices)
    assert [parameters(part) for part in (published.global_encoder, published.local_encoder)] == [18_844_352] * 2
    assert [parameters(part) for part in (published.global_decoder, published.local_decoder)] == [15_670_145] * 2
    assert parameters(published.fusion) == 37_754_880 and parameters(published) == 106_783_874
    assert parameters(critic) == 44_751_808
    assert made.image.shape == made.tumour.shape == slices.shape and made.fused.shape == (2, 1024, 8, 8)
    assert verdict.realness.shape == (2, 1, 2, 2) and verdict.sequence.shape == (2, 4)


def test_the_default_has_instance_norms_in_the_fusion():
    with torch.device("meta"):
        method = make(size=128, network={"width": 64, "levels": 4}, critic={"width": 64, "layers": 6})
    assert {name: parameters(network) for name, network in method.networks.items()} == {
        "student": 106_779_778, "teacher": 106_779_778, "critics": 2 * 44_751_808,
    }  # fmt: skip


def test_outputs_lie_in_the_range_of_tanh_and_the_target_changes_them():
    slices, one, other = torch.randn(2, 1, 16, 16), *torch.eye(4)[:2, None].expand(-1, 2, -1)
    made = generator()(slices, one)
    assert made.image.abs().max() <= 1 and made.tumour.abs().max() <= 1 and made.fused.shape == (2, 16, 4, 4)
    assert not torch.allclose(made.image, generator()(slices, other).image)


def test_the_two_branches_share_nothing_and_each_decoder_has_its_own_encoders_skips():
    network, slices, code = generator(), torch.randn(1, 1, 16, 16), torch.eye(4)[:1]
    assert torch.equal(network(slices, code).image, network(slices, code, slices).image)
    changed = slices.clone()
    changed[..., 8:] = -1
    assert not torch.allclose(network(slices, code).image, network(slices, code, changed).image)  # through the fusion
    network.fusion.register_forward_hook(lambda module, inputs, output: torch.zeros_like(output))
    one, other = network(slices, code), network(slices, code, changed)
    assert torch.equal(one.image, other.image) and not torch.allclose(one.tumour, other.tumour)


@pytest.mark.parametrize(("branches", "parts"), [
    ("full", {"global_encoder", "local_encoder", "fusion", "global_decoder", "local_decoder"}),
    ("no_local_encoder", {"global_encoder", "fusion", "global_decoder", "local_decoder"}),
    ("no_local_decoder", {"global_encoder", "local_encoder", "fusion", "global_decoder"}),
    ("global", {"global_encoder", "global_decoder"}),
])  # fmt: skip
def test_structures_have_the_parts_that_they_name_and_the_same_feature(branches, parts):
    network = generator(branches=branches)
    made = network(torch.randn(2, 1, 16, 16), torch.eye(4)[:2])
    assert {name.partition(".")[0] for name, _ in network.named_parameters()} == parts
    assert made.image.shape == (2, 1, 16, 16) and made.fused.shape == (2, 16, 4, 4) and (made.tumour is None) == ("local_decoder" not in parts)
    (made.image.mean() + (0 if made.tumour is None else made.tumour.mean())).backward()
    assert all(p.grad is not None for p in network.parameters())


def test_fusion_sees_sum_product_and_maximum():
    fusion = Fusion(2, "instance")
    seen = []
    fusion.layers[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    g, l = torch.randn(1, 2, 4, 4), torch.randn(1, 2, 4, 4)
    fusion(g, l)
    assert torch.equal(seen[0], torch.cat([g + l, g * l, torch.max(g, l)], 1))


def test_initial_weights():
    network = Fusion(64, "batch")
    initialise(network)
    convolution, norm = network.layers[0], network.layers[1]
    assert float(convolution.weight.detach().std()) == pytest.approx(math.sqrt(2 / (9 * 192)), rel=0.02) and not convolution.bias.any()
    assert float(norm.weight.detach().mean()) == pytest.approx(1, abs=0.02) and 0.01 < float(norm.weight.detach().std()) < 0.03 and not norm.bias.any()


def test_recomputation_changes_no_gradient():
    for name in ("utad_net", "stargan", "resvit"):
        gradients = []
        for again in (False, True):
            method = make(name)
            network = method.networks["student"]
            assert not again or recompute(network, method.blocks) >= 2
            network(torch.linspace(-1, 1, 32 * 32).reshape(1, 1, 32, 32), torch.eye(4)[:1]).image.square().mean().backward()
            gradients.append([p.grad for p in network.parameters()])
        assert all((a is None and b is None) or torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_the_attending_blocks_share_one_transformer_and_see_the_whole_slice():
    with torch.device("meta"):
        published = ResViTGenerator(4, 128)
    assert sum(name.startswith("transformer.layers.") and name.endswith("query.weight") for name, _ in published.named_parameters()) == 12
    assert [hasattr(block, "shrink") for block in published.blocks] == [True, False, False, False, False, True, False, False, False]
    network, slices = make("resvit").networks["student"], torch.randn(1, 1, 32, 32)
    used = []
    network.transformer.register_forward_hook(lambda module, inputs, output: used.append(output.shape))
    assert network(slices, torch.eye(4)[:1]).image.shape == slices.shape and used == [(1, 8, 2, 2)]


# the tumour image


def test_the_tumour_image_is_the_slice_inside_and_minus_one_outside():
    image, mask = torch.rand(2, 1, 8, 8) * 2 - 1, torch.rand(2, 1, 8, 8) < 0.5
    assert torch.equal(tumour_image(image, torch.ones_like(mask)), image)
    assert (tumour_image(image, torch.zeros_like(mask)) == -1).all()
    assert float(tumour_image(torch.tensor(0.5), torch.tensor(True))) == 0.5
    torch.testing.assert_close(tumour_image(image, mask), 2 * (mask * (image + 1) / 2) - 1)


def test_local_consistency():
    image, mask = torch.rand(1, 1, 8, 8, requires_grad=True), torch.rand(1, 1, 8, 8) < 0.5
    cropped, real = tumour_image(image, mask), torch.rand(1, 1, 8, 8)
    assert float(local_consistency(cropped, cropped, real, real).detach()) == 0
    assert float(local_consistency(cropped + 0.25, cropped, real, real - 0.5).detach()) == pytest.approx(0.75)
    local_consistency(torch.zeros_like(real), cropped, real, real).backward()
    assert (image.grad[~mask] == 0).all() and (image.grad[mask] != 0).all()


# the critics' losses


def linear(weight: float, patches: int = 1):
    """A critic <w, x> of slices of 128 x 128 with all weights equal, as so many identical patch scores."""
    w = torch.full((128 * 128,), weight, dtype=torch.float64, requires_grad=True)
    return w, lambda x: (x.flatten(1) @ w)[:, None].expand(-1, patches)


def penalty(scores, patch="sum", size=128):
    torch.manual_seed(0)
    real, fake = torch.randn(2, 3, 1, size, size, dtype=torch.float64)
    return gradient_penalty(scores, real, fake, patch)


@pytest.mark.parametrize(("weight", "expected"), [(1 / 128, 0), (0.0, 1), (1.0, 127**2)])
def test_the_penalty_of_a_linear_critic(weight, expected):
    w, scores = linear(weight)
    value = penalty(scores)
    value.backward()
    assert float(value.detach()) == pytest.approx(expected, abs=1e-5) and w.grad.isfinite().all()
    assert expected != 127**2 or w.grad.abs().max() > 0  # a second derivative reaches the weights


@pytest.mark.parametrize(("patch", "expected"), [("sum", 9), ("mean", 0)])
def test_the_penalty_of_four_patch_scores(patch, expected):
    assert float(penalty(linear(1 / 128, patches=4)[1], patch).detach()) == pytest.approx(expected, abs=1e-8)


def test_the_penalty_is_taken_on_the_way_from_real_to_fake_one_share_per_sample():
    real, fake, seen = torch.zeros(50, 1, 4, 4), torch.ones(50, 1, 4, 4), []

    def scores(x):
        seen.append(x.detach())
        return x.square().flatten(1).sum(1, keepdim=True)

    torch.manual_seed(0)
    value = gradient_penalty(scores, real, fake)
    share = seen[0].flatten(1)
    assert (share == share[:, :1]).all() and 0 <= share.min() < 0.1 and 0.9 < share.max() <= 1 and len(share[:, 0].unique()) == 50
    assert float(value) == pytest.approx(float(((2 * share.square().sum(1).sqrt() - 1) ** 2).mean()), rel=1e-5)


def test_second_derivatives_are_those_of_finite_differences():
    torch.manual_seed(1)
    critic = Critic(4, 16, width=2, layers=3).double()
    weight = critic.body[0].weight
    penalty(lambda x: critic(x).realness, size=16).backward()
    step, place = 1e-6, (0, 0, 1, 2)
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            weight[place] += sign * step
        values.append(float(penalty(lambda x: critic(x).realness, size=16).detach()))
        with torch.no_grad():
            weight[place] -= sign * step
    assert float(weight.grad[place]) == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-4)


def test_wasserstein_terms_and_undecided_classification():
    real, fake = torch.tensor([[1.0, 3.0]]), torch.tensor([[0.5, 0.5]])
    assert float(critic_loss(real, fake)) == -1.5 and float(deception_loss(fake)) == -0.5
    assert float(F.cross_entropy(torch.zeros(3, 4), torch.tensor([0, 1, 3]))) == pytest.approx(1.386294, abs=1e-6)

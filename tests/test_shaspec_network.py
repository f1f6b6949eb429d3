"""ShaSpec's network alone: sizes, standardised convolutions, what it does and does not see, what it generates."""

import math

import pytest
import torch
from small_shaspec import CROP, SUBSETS, network
from torch import nn

from mstkd.models.shaspec import Encoder, Pyramid, ShaSpecNetwork, StandardisedConv3d, filled

ALL, FEW = (True,) * 4, (True, False, False, True)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def parameters(module) -> int:
    return sum(p.numel() for p in module.parameters())


def mask(*subsets) -> torch.Tensor:
    return torch.tensor(subsets, dtype=torch.bool)


def calls_of(net: ShaSpecNetwork) -> list[tuple]:
    """Fills with the input shapes of every call of an encoder, each in a call (number of the specific one, or "shared")."""
    calls = []
    for name, encoder in (("shared", net.shared), *enumerate(net.specific)):
        encoder.register_forward_pre_hook(lambda module, inputs, name=name: calls.append((name, tuple(inputs[0].shape))))
    return calls


# the published network, computed without memory


def test_published_parameters():
    with torch.device("meta"):
        net = ShaSpecNetwork(4, 3)
    assert parameters(net) == 187_708_132
    assert [parameters(encoder) for encoder in (net.shared, *net.specific)] == [35_127_872] * 5
    assert parameters(net.shared.reduce) == 328_192 and parameters(net.shared.pyramid) == 5_770_240
    assert parameters(net.decoder) == 8_528_800 and parameters(net.project) == 3_538_944 and parameters(net.domain) == 1_028


@pytest.mark.parametrize(("crop", "bottleneck"), [((160, 160, 80), (5, 5, 5)), ((128, 128, 64), (4, 4, 4)), ((192, 128, 160), (6, 4, 10))])
def test_published_shapes(crop, bottleneck):
    """The specification's sizes are (Z, X, Y), ours (X, Y, Z)."""
    with torch.device("meta"):
        net, image = ShaSpecNetwork(4, 3), torch.empty(1, 4, *crop)
    output = net(image, mask(ALL))
    assert output.logits.shape == (1, 3, *crop) and output.domains.shape == (4, 4)
    assert output.shared.shape == output.specific.shape == (4, 256, *bottleneck)
    skips = net.shared(image[:, :1]).skips
    x, y, z = crop
    expected = [(64, x // 2, y // 2, z), (256, x // 4, y // 4, z // 2), (512, x // 8, y // 8, z // 4), (1024, x // 16, y // 16, z // 8)]
    assert [tuple(skip.shape[1:]) for skip in skips] == expected


@pytest.mark.slow
def test_the_published_network_computes():
    net = ShaSpecNetwork(4, 3).eval()
    with torch.inference_mode():
        output = net(torch.randn(1, 4, 64, 64, 32), mask(FEW))
    assert output.logits.isfinite().all() and output.logits.std() > 0


@pytest.mark.parametrize("sequences", [1, 2, 5])
def test_any_number_of_sequences(sequences):
    net = network(sequences=sequences).eval()
    output = net(torch.randn(1, sequences, *CROP), torch.ones(1, sequences, dtype=torch.bool))
    assert output.logits.shape == (1, 3, *CROP) and output.domains.shape == (sequences, sequences) and len(net.specific) == sequences


# convolutions and the pyramid


def test_filters_are_standardised():
    conv = StandardisedConv3d(6, 5, 3)
    filters = conv.standardised.flatten(1)
    assert filters.mean(1).abs().max() < 1e-6
    torch.testing.assert_close(filters.std(1), torch.ones(5), atol=1e-4, rtol=0)


def test_scale_and_offset_of_a_filter_do_not_matter_and_equal_weights_are_zero():
    conv, x = StandardisedConv3d(6, 5, 3), torch.randn(2, 6, 4, 5, 6)
    with torch.no_grad():
        before = conv(x)
        conv.weight.mul_(torch.rand(5, 1, 1, 1, 1) + 0.5).add_(torch.randn(5, 1, 1, 1, 1))
        torch.testing.assert_close(conv(x), before, atol=1e-3, rtol=1e-4)
        for value in (0.0, 0.25):
            conv.weight.fill_(value)
            assert conv(x).abs().max() == 0


def test_standardised_in_float32_under_autocast():
    conv = StandardisedConv3d(6, 5, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert conv.standardised.dtype == torch.float32
        rough = conv(x := torch.randn(1, 6, 4, 4, 4))
    torch.testing.assert_close(rough.float(), conv(x), atol=0.02 * conv(x).abs().max().item(), rtol=0)


@pytest.mark.parametrize("reference", [False, True])
def test_the_global_context_counts_but_in_the_reference_form(reference):
    """There an instance norm of one voxel gave 0: only the offset was left."""
    pyramid, x = Pyramid(32, reference), torch.randn(1, 32, 4, 4, 4)
    nn.init.normal_(pyramid.context_norm.bias)
    heard = []
    pyramid.join.register_forward_pre_hook(lambda module, inputs: heard.append(inputs[0][:, -32:]))
    shifted = x.clone()
    shifted[:, 3] += 1  # another mean of one channel
    pyramid(x), pyramid(shifted)
    assert all(torch.equal(context, context[:, :, :1, :1, :1].expand_as(context)) for context in heard)
    assert torch.equal(*heard) == reference
    before = pyramid(x)
    nn.init.normal_(pyramid.context.weight)  # and it reaches the result: behind an instance norm nothing constant would
    changed = (pyramid(x) - before).abs().max() / before.abs().max()
    assert changed < 1e-5 if reference else changed > 1e-2
    if reference:
        torch.testing.assert_close(heard[0][0, :, 0, 0, 0], nn.functional.leaky_relu(pyramid.context_norm.bias, 0.01))


# what is encoded


def test_only_available_sequences_are_encoded_twice_each_at_inference():
    net = network().eval()
    calls = calls_of(net)
    with torch.no_grad():
        net(torch.randn(2, 4, *CROP), mask(FEW, (False, False, False, True)))
    assert calls == [("shared", (3, 1, *CROP)), (0, (1, 1, *CROP)), (3, (2, 1, *CROP))]


def test_training_calls_every_encoder_once_whatever_is_missing():
    net = network().train()
    calls = calls_of(net)
    for subset in SUBSETS:
        calls.clear()
        net(torch.randn(1, 4, *CROP), mask(subset))
        assert [name for name, _ in calls] == ["shared", 0, 1, 2, 3]
        assert sum(shape[0] for _, shape in calls) == sum(subset) + 4


def test_an_encoder_without_input_gets_a_gradient_of_zero():
    net = network().train()
    output = net(torch.randn(1, 4, *CROP), mask(FEW))
    (output.logits.square().sum() + output.domains.sum()).backward()
    assert all(p.grad is not None for p in net.parameters())
    assert [max(p.grad.abs().max().item() for p in encoder.parameters()) > 0 for encoder in net.specific] == list(FEW)


@torch.no_grad()
def test_training_and_evaluation_agree():
    net, image, available = network(), torch.randn(2, 4, *CROP), mask(FEW, (False, True, True, True))
    trained, evaluated = (net.train(mode)(image, available) for mode in (True, False))
    for name in ("logits", "fused", "domains"):
        assert torch.equal(getattr(trained, name), getattr(evaluated, name))


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"generated": "first", "skip_fill": "reference", "encode_missing": True}])
def test_voxels_of_a_missing_sequence_never_change_the_output(options):
    net = network(**options)
    image = torch.randn(1, 4, *CROP)
    for subset in SUBSETS[:-1]:
        hidden = ~mask(subset)[:, :, None, None, None]
        for training in (True, False):
            clean = net.train(training)(image, mask(subset))
            for content in (5.0, math.nan):
                other = net(image.masked_fill(hidden, content), mask(subset))
                assert all(torch.equal(a, b) for a, b in zip(clean[:5], other[:5], strict=True)) and clean.logits.isfinite().all()


@torch.no_grad()
def test_a_batch_of_two_subsets_equals_two_runs():
    net, image, subsets = network().eval(), torch.randn(2, 4, *CROP), mask(FEW, (False, True, False, False))
    both = net(image, subsets).logits
    for n in range(2):
        torch.testing.assert_close(both[n : n + 1], net(image[n : n + 1], subsets[n : n + 1]).logits, atol=1e-4, rtol=1e-4)


# what is fused and generated


@torch.no_grad()
def test_generated_features_are_the_mean_of_the_available_shared_ones():
    net, image = network().eval(), torch.randn(1, 4, *CROP)
    for subset in SUBSETS[:-1]:
        output = net(image, mask(subset))
        generated = output.fused[0][~mask(subset)[0]]
        expected = output.shared.mean(0).expand_as(generated)
        torch.testing.assert_close(generated, expected, atol=1e-6, rtol=1e-6)
        assert all(torch.equal(generated[0], other) for other in generated)
        first = network(generated="first").eval()(image, mask(subset))
        assert torch.equal(first.fused[0][~mask(subset)[0]], first.shared[:1].expand_as(generated))


@torch.no_grad()
def test_the_mean_does_not_depend_on_the_order_of_the_sequences():
    """The same encoders in another order of the list; the reference's first one does depend on it."""
    order = [3, 1, 0, 2]
    image, subset = torch.randn(1, 4, *CROP), (True, False, True, True)
    for rule, invariant in (("mean", True), ("first", False)):
        net, turned = network(generated=rule).eval(), network(generated=rule).eval()
        for m, source in enumerate(order):
            turned.specific[m].load_state_dict(net.specific[source].state_dict())
        here, there = net(image, mask(subset)), turned(image[:, order], mask([subset[m] for m in order]))
        equal = torch.allclose(here.fused[:, order], there.fused, atol=1e-4)
        assert equal == invariant


@torch.no_grad()
def test_an_available_feature_is_the_shared_one_plus_a_projection_of_both():
    net, image = network().eval(), torch.randn(1, 4, *CROP)
    output = net(image, mask(FEW))
    expected = output.shared + net.project(torch.cat([output.shared, output.specific], 1))
    assert torch.equal(output.fused[0, [0, 3]], expected) and output.pairs == [(0, 0), (0, 3)]
    net.project.weight.zero_()  # a projection of equal weights is none
    assert torch.equal(net(image, mask(FEW)).fused[0, [0, 3]], output.shared)


@torch.no_grad()
def test_skips_of_missing_sequences():
    """Ours: the mean of the others'. The reference's: what the shared encoder makes of zeros, which is not zero."""
    image = torch.randn(1, 4, *CROP)
    for rule in ("mean", "reference"):
        net, heard = network(skip_fill=rule).eval(), []
        for module in net.shared.modules():
            if isinstance(module, nn.InstanceNorm3d):
                nn.init.normal_(module.bias)
        net.decoder.register_forward_pre_hook(lambda module, inputs, heard=heard: heard.extend(inputs[1]))
        net(image, mask(FEW))
        zeros = net.shared(torch.zeros(1, 1, *CROP)).skips
        own = net.shared(image[0, [0, 3], None]).skips
        for skip, empty, there in zip(heard, zeros, own, strict=True):
            for m in (1, 2):
                expected = there.mean(0) if rule == "mean" else empty[0]
                torch.testing.assert_close(skip.unflatten(1, (4, -1))[0, m], expected, atol=1e-4, rtol=1e-4)
                assert expected.abs().max() > 0


def test_gaps_are_filled_sample_by_sample():
    values, sources = torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([[10.0], [30.0], [50.0]])
    rows = [[None, 0, 1], [2, None, None]]
    assert filled(values, rows, sources).squeeze(-1).tolist() == [[20, 1, 2], [3, 50, 50]]
    assert filled(values, rows, sources, "first").squeeze(-1).tolist() == [[10, 1, 2], [3, 50, 50]]


def test_pooled_features_come_before_the_pyramid():
    encoder = Encoder(4, (1, 1, 1, 1))
    encoder(torch.randn(1, 1, *CROP)).pooled.sum().backward()
    assert all(p.grad is None for p in encoder.pyramid.parameters())
    assert all(p.grad is not None for name, p in encoder.named_parameters() if not name.startswith("pyramid"))

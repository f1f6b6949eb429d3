"""MST-KDNet: the network alone."""

import pytest
import torch
import torch.nn.functional as F
from small_mst_kdnet import NETWORK, START, make, make_batch, on_meta, parameters, shapes

from mstkd.models.convolution import Conv3d, _statistics
from mstkd.models.mst_kdnet import MSTKDNetwork, ResidualBlock
from mstkd.models.style_critic import StyleCritic
from mstkd.models.transformer_unet import Attention, BatchNorm3d, on_grid


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


# Network


def test_published_size():
    network = on_meta(crop=(160, 192, 128))
    assert parameters(network) == 154_334_148
    assert parameters(network.transformer.decoder) == 77_003_744
    assert parameters(network.transformer.layers[0]) == 5_513_984
    assert parameters(network.bottleneck) == 3_542_016
    assert network.transformer.taps == (2, 5, 8, 11)  # layers 3, 6, 9, 12 counted from 1
    assert parameters(StyleCritic(128, reference_head=True)) == 3_149_249


def test_published_shapes():
    with torch.device("meta"):
        features = on_meta(crop=(160, 192, 128))(torch.empty(1, 4, 160, 192, 128))
        logit = StyleCritic(128, reference_head=True)(features.style)
    assert features.logits.shape == (1, 4, 160, 192, 128)
    assert shapes(features.decoded) == [(1, 64, 20, 24, 16), (1, 128, 40, 48, 32), (1, 256, 20, 24, 16), (1, 512, 10, 12, 8)]
    assert shapes(features.attention) == [(1, 12, 120, 120)] * 4
    assert shapes(features[1:4]) == [(1, 128, 20, 24, 16)] * 3
    assert logit.shape == (1,)


@pytest.mark.parametrize(("crop", "tokens"), [((128, 128, 128), 64), ((96, 96, 96), 27), ((64, 96, 96), 18)])
@pytest.mark.parametrize("trained_on", ["this crop", "the published crop"])
def test_other_crops(crop, tokens, trained_on):
    network = on_meta(crop=crop if trained_on == "this crop" else (160, 192, 128))
    with torch.device("meta"):
        features = network(torch.empty(1, 4, *crop))
    assert features.logits.shape == (1, 4, *crop)
    assert shapes(features.attention) == [(1, 12, tokens, tokens)] * 4


@pytest.mark.parametrize(("crop", "tokens"), [((64, 64, 64), 64), ((48, 48, 48), 27), ((64, 32, 16), 8)])
def test_one_down_sampling_fewer_has_eight_times_the_tokens(crop, tokens):
    network = on_meta(crop=crop, last_stride=1)
    with torch.device("meta"):
        features = network(torch.empty(1, 4, *crop))
    assert features.logits.shape == (1, 4, *crop) and network.tokens == tokens
    assert shapes(features.attention) == [(1, 12, tokens, tokens)] * 4
    assert shapes(features[1:4]) == [(1, 128, *(size // 4 for size in crop))] * 3
    assert parameters(network) - network.transformer.position.numel() == 154_334_148 - 92_160


@pytest.mark.parametrize("normalised", [True, False])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("channels", [16, 64])
def test_a_small_map_alone_is_convolved_by_onednn_and_rightly(channels, stride, normalised):
    """What PyTorch leaves to a slower form at one sample equals the double-precision layers, forward and backward."""
    conv, norm = Conv3d(channels, 24, stride), torch.nn.GroupNorm(8, channels) if normalised else None
    x, plain = torch.randn(1, channels, 8, 6, 10), torch.nn.Conv3d(channels, 24, 3, stride=stride, padding=1).double()
    plain.load_state_dict(conv.state_dict())
    ours, exact = x.clone().requires_grad_(), x.double().requires_grad_()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        out = conv(ours, norm)
        out.square().sum().backward()
    expected = plain(F.relu(F.group_norm(exact, 8)) if normalised else exact)
    expected.square().sum().backward()
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-4)
    for got, right in ((ours.grad, exact.grad), (conv.weight.grad, plain.weight.grad), (conv.bias.grad, plain.bias.grad)):
        torch.testing.assert_close(got.double(), right, rtol=1e-4, atol=1e-4 * right.abs().max().item())
    names = {event.key for event in profile.key_averages()}
    assert "aten::mkldnn_convolution" in names and not any("slow_conv" in name for name in names)


def test_published_width_computes():
    network = MSTKDNetwork(4, 4, crop=(64, 64, 64)).eval()
    with torch.inference_mode():
        features = network(torch.rand(1, 4, 64, 64, 64))
    assert features.logits.isfinite().all() and features.logits.std() > 0
    for attention in features.attention:
        torch.testing.assert_close(attention.sum(-1), torch.ones(1, 12, 8))


def test_position_embedding_is_resampled_on_the_token_grid():
    network = MSTKDNetwork(4, 4, crop=(64, 32, 32), **NETWORK).transformer
    with torch.no_grad():
        network.position.copy_(torch.tensor([0.0, 1.0])[None, :, None].expand(1, 2, 24))
    assert on_grid(network.position, network.grid, (2, 1, 1)) is network.position
    resampled = on_grid(network.position, network.grid, (4, 1, 2)).detach().unflatten(1, (4, 1, 2))[0, :, 0, :, 0]
    torch.testing.assert_close(resampled, torch.tensor([0.0, 0.25, 0.75, 1.0])[:, None].expand(4, 2))  # along X, the same for every Z


@pytest.mark.parametrize("size", [(2, 2, 2), (2, 4, 4), (4, 4, 2), (8, 8, 8)])
@pytest.mark.parametrize("stride", [1, 2])
def test_bf16_convolution_and_its_gradients_are_right_on_small_maps(size, stride):
    layer, x = Conv3d(64, 64, stride), torch.randn(1, 64, *size).bfloat16().float().requires_grad_()
    with torch.no_grad():
        layer.weight.copy_(layer.weight.bfloat16())
    plain = torch.nn.functional.conv3d(x, layer.weight, layer.bias, stride=stride, padding=1)
    signal = torch.randn(plain.shape).bfloat16().float()
    expected = [plain, *torch.autograd.grad(plain, (x, layer.weight), signal)]
    del plain
    for _ in range(8):
        poison = [torch.full((n,), 1e30) for n in (1000, 100_000, 400_000)]  # what freed memory may hold
        del poison
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = layer(x)
        assert output.is_contiguous()
        for got, want in zip([output, *torch.autograd.grad(output, (x, layer.weight), signal.to(output.dtype))], expected, strict=True):
            torch.testing.assert_close(got.float(), want, atol=0.02 * want.abs().max().item(), rtol=0)


def test_tapped_and_fused_attention_agree():
    attention = Attention(24, 3, dropout=0.1).eval()
    hidden = torch.randn(2, 7, 24)
    (tapped, weights), (fused, none) = attention(hidden, tapped=True), attention(hidden, tapped=False)
    torch.testing.assert_close(tapped, fused)
    assert weights.shape == (2, 3, 7, 7) and none is None


def test_tapped_attention_is_taken_before_dropout():
    attention = Attention(24, 3, dropout=0.5).train()
    _, weights = attention(torch.randn(2, 7, 24), tapped=True)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 3, 7))


def test_batch_statistics_in_evaluation_are_those_of_training_at_batch_1():
    x = torch.randn(1, 5, 4, 4, 4) * 3 + 1
    layer = BatchNorm3d(5, "batch")
    trained = layer(x)
    before = [b.clone() for b in layer.buffers()]
    torch.testing.assert_close(layer.eval()(x), trained)
    pair = layer(torch.cat([x, 10 * x]))
    torch.testing.assert_close(pair[:1], trained)  # the neighbour does not matter
    assert all(torch.equal(a, b) for a, b in zip(before, layer.buffers(), strict=True))
    assert not torch.allclose(BatchNorm3d(5, "running").eval()(x), trained)


@pytest.mark.parametrize("norm", ["batch", "instance"])
def test_the_smallest_crop_trains(norm):
    crop = (32, 32, 32)  # one token
    roles = make(crop=crop, network={**NETWORK, "norm": norm}).roles("distill")
    for samples in (1, 2):
        batch = make_batch(samples, crop=crop)
        output = roles["networks"].step.train()(batch, {}, START)
        output.loss.backward()
        critic = roles["critic"].step.train()(batch, output.carry, START).loss
        assert output.loss.isfinite() and critic.isfinite()
        assert all(p.grad.isfinite().all() for p in roles["networks"].step.parameters())


@pytest.mark.parametrize(("channels", "size"), [(8, (6, 4, 10)), (16, (16, 8, 8)), (64, (6, 4, 4))])
def test_a_block_and_its_gradients_are_those_of_the_plain_layers(channels, size):
    """On a CPU a convolution does its normalisation and ReLU itself, in a layout of its own; here against PyTorch's layers in float64."""
    torch.manual_seed(0)
    block, image = ResidualBlock(channels).double(), torch.randn(2, channels, *size, dtype=torch.float64) + 3
    weights = torch.randn_like(image)

    def plain(x):
        norm1, _, conv1, norm2, _, conv2 = block.body
        hidden = torch.nn.functional.conv3d(norm1(x).relu(), conv1.weight, conv1.bias, padding=1)
        return x + torch.nn.functional.conv3d(norm2(hidden).relu(), conv2.weight, conv2.bias, padding=1)

    found = []
    for forward in (block, plain):
        x = image.clone().requires_grad_()
        output = forward(x)
        found.append([output.detach(), *torch.autograd.grad((output * weights).sum(), [x, *block.parameters()])])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_a_normalisation_over_a_million_voxels_keeps_its_digits():
    """Where PyTorch's kernel for this layout is off by 2e-4 (torch 2.13): sums of float32 grow too long."""
    torch.manual_seed(0)
    x = torch.randn(1, 8, 128, 128, 64) * 2 + 3
    mean, scale = _statistics(x.contiguous(memory_format=torch.channels_last_3d), 8, 1e-5)
    exact = x.double()
    torch.testing.assert_close(mean.double().flatten(), exact.mean((0, 2, 3, 4)), rtol=1e-6, atol=0)
    torch.testing.assert_close(scale.double().flatten(), 1 / exact.var((0, 2, 3, 4), unbiased=False).add(1e-5).sqrt(), rtol=1e-6, atol=0)

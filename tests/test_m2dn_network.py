"""M2DN's network: the published shapes and parameters, where its mask enters, and recomputation."""

import pytest
import torch
from small_m2dn import SIZE, START, awake, make, make_batch
from torch import nn

from mstkd.models.m2dn import M2DNNetwork, norm
from mstkd.models.recompute import recompute


def traced(network: nn.Module, size: int, sequences: int) -> dict[str, tuple[int, ...]]:
    """Shape of each part's output, without the batch; and what goes into the masked block."""
    shapes = {}
    for name, module in network.named_modules():
        if name.count(".") <= 1:
            module.register_forward_hook(lambda module, inputs, output, name=name: shapes.__setitem__(name, tuple(output.shape[1:])))
    network.masked.register_forward_pre_hook(lambda module, inputs: shapes.__setitem__("into masked", tuple(inputs[0].shape[1:])))
    with torch.device("meta"):
        network(torch.zeros(1, sequences, size, size), torch.ones(1), torch.ones(1, sequences))
    return shapes


def test_the_published_network_at_256_pixels():
    with torch.device("meta"):
        network = M2DNNetwork(3, 256)
    shapes = traced(network, 256, 3)
    expected = {
        "encoders.0": (32, 128, 128), "encoders.2": (32, 128, 128), "merge": (64, 128, 128), "time": (512,), "down.0": (64, 128, 128),
        "down.1": (128, 64, 64), "down.2": (128, 32, 32), "middle": (128, 16, 16), "into masked": (131, 16, 16), "masked": (128, 16, 16),
        "up.0": (128, 32, 32), "up.1": (128, 64, 64), "up.2": (64, 128, 128), "decoders.0": (1, 256, 256), "": (3, 256, 256),
    }  # fmt: skip
    assert {name: shapes[name] for name in expected} == expected
    assert (network.encoders[0][0].stride, network.time.layers[0].in_features, network.decoders[0].body[0].in_channels) == ((2, 2), 128, 64)
    assert sum(p.numel() for p in network.parameters()) == 3_204_473


@pytest.mark.parametrize(("size", "levels"), [(64, 1), (128, 2), (256, 3), (512, 4)])
def test_the_bottleneck_has_16_pixels_whatever_the_size(size, levels):
    with torch.device("meta"):
        network = M2DNNetwork(4, size)
    shapes = traced(network, size, 4)
    assert len(network.down) == len(network.up) == levels and shapes["into masked"] == (132, 16, 16) and shapes[""] == (4, size, size)


@pytest.mark.parametrize("sequences", [2, 3, 4, 5])
def test_a_fresh_network_returns_0_in_the_shape_of_its_input(sequences):
    network = M2DNNetwork(sequences, SIZE, 4, 4)
    image = torch.randn(3, sequences, SIZE, SIZE)
    made = network(image, torch.tensor([1, 5, 20]), torch.tensor([[1.0] + [0.0] * (sequences - 1)] * 3))
    assert made.shape == image.shape and made.dtype == torch.float32 and (made == 0).all()


def test_groups_divide_the_channels():
    assert [norm(channels).num_groups for channels in (32, 64, 128, 130, 131, 132, 133)] == [8, 8, 8, 5, 1, 6, 7]


@pytest.mark.parametrize("options", [{}, {"mask": False}, {"mask": False, "network": {"mask_at_input": True}}], ids=str)
def test_the_mask_enters_as_constant_maps_at_the_bottleneck_alone(options):
    method, seen = awake(make(**options)), []
    network = method.networks["student"]
    network.masked.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    image, t = torch.randn(1, 4, SIZE, SIZE), torch.tensor([7])
    made = [network(image, t, torch.tensor([v])) for v in ([1.0, 0, 0, 1], [0.0, 1, 0, 0])]
    told = bool(options.get("network")) or "mask" not in options
    assert torch.equal(made[0], made[1]) != told
    if not options:
        assert torch.equal(seen[0][:, :16], seen[1][:, :16]) and torch.equal(seen[0][0, 16:], torch.tensor([1.0, 0, 0, 1])[:, None, None].expand(4, 4, 4))
    assert not torch.equal(made[0], network(image, torch.tensor([8]), torch.tensor([[1.0, 0, 0, 1]])))  # and the time


def test_recomputation_changes_no_gradient():
    gradients = []
    for again in (False, True):
        method = awake(make(), "network")
        assert not again or recompute(method.networks["network"], method.blocks) == 4 + 4 + 2 * 1 + 2
        step = method.roles("train")["network"].step
        torch.manual_seed(2)
        step(make_batch(), {}, START).loss.backward()
        gradients.append([p.grad for p in step.parameters()])
    assert all(torch.equal(a, b) and a.isfinite().all() for a, b in zip(*gradients, strict=True))

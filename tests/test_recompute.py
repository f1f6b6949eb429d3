"""Activation checkpointing of blocks: everything stays as it was, but for the activations that are kept."""

import copy

import pytest
import torch
from small_mst_kdnet import NETWORK, START, make, make_batch
from torch import nn

from mstkd.models.mst_kdnet import MSTKDNetwork, ResidualBlock, Up
from mstkd.models.recompute import recompute
from mstkd.models.transformer_unet import Decoder, Layer

CROP = (32, 32, 32)
PRECISIONS = [torch.float32, torch.bfloat16]


class Block(nn.Module):
    """A block with everything that could go wrong the second time."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv3d(4, 4, 3, padding=1), nn.BatchNorm3d(4), nn.ReLU(), nn.Dropout(0.5), nn.Conv3d(4, 4, 1))
        self.calls = 0

    def forward(self, x, scale=1.0):
        self.calls += 1
        return x + scale * self.body(x)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def pair(kind=NETWORK):
    """A method, and the same with networks that recompute."""
    plain, again = make(crop=CROP, network=kind), make(crop=CROP, network=kind)
    for name, network in again.networks.items():
        network.load_state_dict(plain.networks[name].state_dict())
        recompute(network, again.blocks)
    return plain, again


def trained(method, dtype=torch.float32):
    """A step with dropout in training mode: terms, gradients and state afterwards."""
    step = method.roles("distill")["networks"].step.train()
    torch.manual_seed(1)
    batch = make_batch(2, crop=CROP)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        output = step(batch, {}, START)
    output.loss.backward()
    return output.scalars, {n: p.grad for n, p in step.named_parameters()}, step.state_dict()


def kept_bytes(call):
    """Bytes of the distinct tensors that autograd keeps for the backward pass of `call()`."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = call()
    return sum(kept.values()), output  # the output holds the graph, so that no address is used twice


@pytest.mark.parametrize("dtype", PRECISIONS)
def test_terms_gradients_and_statistics_are_equal(dtype):
    plain, again = (trained(method, dtype) for method in pair())
    for left, right in zip(plain, again, strict=True):
        assert left.keys() == right.keys()
        for name in left:
            assert torch.equal(left[name], right[name]), name
    counters = [value for name, value in again[2].items() if name.endswith("num_batches_tracked")]
    assert counters and all(count == 1 for count in counters)


def test_state_is_untouched_and_copies_recompute_too():
    network = MSTKDNetwork(4, 4, crop=CROP, **NETWORK)
    before = list(network.state_dict()), [name for name, _ in network.named_modules()]
    assert recompute(network, (ResidualBlock, Up, Layer, Decoder)) == 13 + 3 + 4 + 1 - 4  # that Up holds are inside
    assert (list(network.state_dict()), [name for name, _ in network.named_modules()]) == before
    network.load_state_dict(network.state_dict())
    twin = copy.deepcopy(network)
    twin.stem[1].body[2].weight.data.zero_()  # its forward uses its own weights, not the original's
    assert not torch.equal(twin(torch.ones(1, 4, *CROP)).logits, network(torch.ones(1, 4, *CROP)).logits)


def test_blocks_that_are_not_asked_for_stay():
    assert recompute(nn.Sequential(Block(), nn.ReLU()), ()) == 0
    assert recompute(Block(), (Block,)) == 1


def test_without_gradients_nothing_runs_twice():
    block = Block()
    recompute(block, (Block,))
    with torch.no_grad():
        block.eval()(torch.rand(2, 4, 3, 3, 3))
    assert block.calls == 1
    block.train()(torch.rand(2, 4, 3, 3, 3, requires_grad=True), scale=2.0).sum().backward()
    assert block.calls == 3


@pytest.mark.parametrize("training", [True, False])
def test_a_block_draws_the_same_dropout_and_updates_its_statistics_once(training):
    plain = Block().train(training)
    again = copy.deepcopy(plain)
    recompute(again, (Block,))
    found = []
    for block in (plain, again):
        torch.manual_seed(5)
        x = torch.rand(2, 4, 5, 5, 5, requires_grad=True)
        y = block(x)
        torch.rand(7)  # the generator has moved on by the time of the backward pass
        y.square().sum().backward()
        found.append([y, x.grad, *(p.grad for p in block.parameters()), *block.buffers(), torch.rand(1)])
    for left, right in zip(*found, strict=True):
        assert torch.equal(left, right)
    assert again.body[1].num_batches_tracked == int(training)


@pytest.mark.parametrize("dtype", PRECISIONS)
def test_fewer_bytes_are_kept(dtype):
    kept = []
    for method in pair():
        step, batch = method.roles("distill")["networks"].step.train(), make_batch(1, crop=CROP)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            size, _ = kept_bytes(lambda step=step, batch=batch: step(batch, {}, START))
        kept.append(size)
    assert kept[1] < 0.8 * kept[0]


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_it_runs_under_every_zero_stage(two_ranks, zero):
    found = two_ranks.run("recompute_ranks.py", "compare", zero=zero)
    for curves in found:
        assert curves["recomputed"] == pytest.approx(curves["plain"], rel=1e-4)
        assert curves["counters"] == [2]

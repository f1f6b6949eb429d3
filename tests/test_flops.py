"""Counting operations: as torch counts them, and without a trace in what is computed."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from mstkd.engine.flops import FlopCount


class Several(nn.Module):
    """Operators that are counted, and others that torch's own counter computes in another way."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.last = nn.Conv2d(2, 16, 3, stride=2, padding=1), nn.ConvTranspose2d(16, 8, 2, stride=2), nn.Linear(8, 8)
        self.norm, self.act = nn.GroupNorm(4, 16), nn.SiLU()

    def forward(self, x):
        x = self.second(self.act(self.norm(self.first(x)))).flatten(2).transpose(1, 2)
        x = F.scaled_dot_product_attention(x, x, self.act(self.last(x)))
        return F.gelu(torch.softmax(x, -1) @ self.last.weight).square().mean()


def gradients(context, checkpointed=False):
    network = Several()
    x = torch.randn(2, 2, 16, 16, generator=torch.Generator().manual_seed(1))
    with context:
        loss = checkpoint(network, x, use_reentrant=False) if checkpointed else network(x)
        loss.backward()
    return [loss.detach(), *(p.grad for p in network.parameters())]


@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_counted_step_is_the_uncounted_one_bit_for_bit(checkpointed):
    plain, count = gradients(nullcontext(), checkpointed), FlopCount()
    assert all(torch.equal(a, b) for a, b in zip(plain, gradients(count, checkpointed), strict=True)) and count.total > 0


@pytest.mark.parametrize("checkpointed", [False, True])
def test_as_many_as_torch_counts(checkpointed):
    ours, theirs = FlopCount(), FlopCounterMode(display=False)
    gradients(ours, checkpointed), gradients(theirs, checkpointed)
    assert ours.total == theirs.get_total_flops() > 0


def test_a_product_by_hand():
    with FlopCount() as count:
        torch.ones(3, 4) @ torch.ones(4, 5)
    assert count.total == 2 * 3 * 4 * 5

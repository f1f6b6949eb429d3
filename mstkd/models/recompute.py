"""Activation checkpointing: chosen blocks keep their inputs only and run their forward once more in the backward pass."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils.checkpoint import checkpoint


def recompute(network: nn.Module, blocks: tuple[type[nn.Module], ...]) -> int:
    """Make every outermost module of `network` that is one of `blocks` recompute; returns how many there are.

    Values, gradients, dropout, parameter names and running statistics stay as they are; without gradients nothing is
    done twice. Blocks must not hold parameters of their own beside their submodules' (ZeRO-3 gathers by submodule).
    """
    if isinstance(network, blocks):
        network.forward = partial(_recomputed, network, network.forward)
        return 1
    return sum(recompute(child, blocks) for child in network.children())


def _recomputed(block: nn.Module, forward: Callable, *inputs: Any, **named: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*inputs, **named)

    def contexts() -> tuple[AbstractContextManager, AbstractContextManager]:
        return nullcontext(), statistics_kept(block)

    return checkpoint(forward, *inputs, use_reentrant=False, context_fn=contexts, **named)


@contextmanager
def statistics_kept(block: nn.Module) -> Iterator[None]:
    """Copies take the updates of running statistics and counters: another forward has made them already, or shall make them."""
    kept = [(module, dict(module._buffers)) for module in block.modules() if isinstance(module, _NormBase)]
    for module, buffers in kept:
        module._buffers.update({name: None if buffer is None else buffer.clone() for name, buffer in buffers.items()})
    try:
        yield
    finally:
        for module, buffers in kept:
            module._buffers.update(buffers)

"""Bytes that the ranks of one role send to each other, as DeepSpeed 0.19.8 does it; tests/traffic.py counts them.

An all-reduce is two passes over a tensor, an all-gather or a reduce-scatter one; a rank sends (N-1)/N of each.
"""

from dataclasses import dataclass

from torch import nn

# Whose own weights autocast lets travel in 16 bits: these classes exactly, no subclass, no transposed convolution.
HALF = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
PERSISTENT = 100_000  # elements; ZeRO-3 keeps smaller tensors whole on every rank (stage3_param_persistence_threshold)
REUSED = 1_000_000_000  # elements; up to so many stay gathered between forward and backward (stage3_max_reuse_distance)


@dataclass(frozen=True)
class Elements:
    """How many trained elements a role has, and how many of them are special."""

    all: int
    half: int  # sent in 16 bits
    kept: int  # whole on every rank under ZeRO-3
    kept_half: int  # both
    largest: int  # of one tensor


def count_elements(step: nn.Module, autocast: bool, persistent: int = PERSISTENT) -> Elements:
    """Of a role's step. `autocast`: it computes in bf16 or fp16."""
    half = {id(p) for module in step.modules() if type(module) in HALF for p in module.parameters(recurse=False)} if autocast else set()
    sizes = [(p.numel(), id(p) in half) for p in step.parameters() if p.requires_grad]
    return Elements(
        all=sum(n for n, _ in sizes),
        half=sum(n for n, is_half in sizes if is_half),
        kept=sum(n for n, _ in sizes if n <= persistent),
        kept_half=sum(n for n, is_half in sizes if is_half and n <= persistent),
        largest=max((n for n, _ in sizes), default=0),
    )


def bytes_per_step(zero_stage: int, accumulation: int, world: int, elements: Elements, gloo: bool = False) -> float:
    """Bytes that one of `world` ranks sends per optimiser step. `gloo`: it all-reduces where nccl reduce-scatters."""
    share = (world - 1) / world
    reduced = 4 * elements.all - 2 * elements.half  # bytes of the gradients as they travel
    whole = 4 * elements.all
    if zero_stage == 0:
        return share * 2 * whole
    if zero_stage < 3:  # ZeRO-1 reduces once per step, ZeRO-2 in every micro-step; both all-reduce whole buckets
        return share * (2 * reduced * (accumulation if zero_stage == 2 else 1) + whole)
    spread = reduced - (4 * elements.kept - 2 * elements.kept_half)
    gathers = 1 if elements.all <= REUSED else 2  # one serves forward and backward
    return share * (accumulation * ((2 if gloo else 1) * reduced + gathers * spread) + 4 * elements.kept)

"""The 3^3 convolution of MST-KDNet, alone or after GroupNorm and ReLU, with what a CPU needs."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn


FEW = 32  # channels up to which channels-last is faster than PyTorch's own layout on a CPU


class Conv3d(nn.Conv3d):
    """nn.Conv3d with kernel 3 and padding 1; its input may pass a normalisation and a ReLU first."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1):
        super().__init__(inputs, outputs, 3, stride=stride, padding=1)

    def forward(self, x: Tensor, norm: nn.GroupNorm | None = None) -> Tensor:
        """The convolution of `x` (B, C, X, Y, Z), or of relu(norm(x))."""
        if x.device.type != "cpu":
            return super().forward(x if norm is None else F.relu(norm(x)))
        if norm is not None:
            return _OnCpu.apply(x, self.weight, self.bias, self.stride, norm.weight, norm.bias, norm.num_groups, norm.eps)
        if self.in_channels <= FEW:
            return _OnCpu.apply(x, self.weight, self.bias, self.stride)
        with cpu_arithmetic(x) as x:
            return super().forward(x)


def in_block_layout(x: Tensor) -> Tensor:
    """`x` (B, C, X, Y, Z) in the memory layout in which its 3^3 convolutions run."""
    few = x.device.type == "cpu" and x.shape[1] <= FEW
    return _Laid.apply(x, torch.channels_last_3d if few else torch.contiguous_format)


def in_plain_layout(x: Tensor) -> Tensor:
    """`x` (B, C, X, Y, Z) contiguous: 1^3 convolutions are slow in channels-last."""
    return _Laid.apply(x, torch.contiguous_format)


class _Laid(torch.autograd.Function):
    """`x` in another memory layout, and its gradient in that of `x`: sums of two layouts are slow."""

    @staticmethod
    def forward(ctx, x, layout):
        ctx.layout = torch.contiguous_format if x.is_contiguous() else torch.channels_last_3d
        return x.contiguous(memory_format=layout)

    @staticmethod
    def backward(ctx, gradient):
        return gradient.contiguous(memory_format=ctx.layout), None


@contextmanager
def cpu_arithmetic(x: Tensor) -> Iterator[Tensor]:
    """`x`, on a CPU in float32 and without autocast where bf16 would be slower or wrong."""
    if x.device.type != "cpu" or _computed_in(_stored_in(x), x) == _stored_in(x):
        yield x
    else:
        with torch.autocast("cpu", enabled=False):
            yield x.float()


def _stored_in(x: Tensor) -> torch.dtype:
    """The type of activations: autocast's, else that of `x`."""
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype


def _computed_in(stored: torch.dtype, x: Tensor) -> torch.dtype:
    """float32 for bf16 in a CPU without units for it, which is four times faster than to imitate them.

    Also where the first axis has 2 voxels: there oneDNN's bf16 weight gradient is uninitialised memory.
    """
    units = torch.cpu.get_capabilities()
    return torch.float32 if stored == torch.bfloat16 and (x.shape[2] == 2 or not (units.get("avx512_bf16") or units.get("amx_bf16"))) else stored


class _OnCpu(torch.autograd.Function):
    """The same, faster in few channels, and with the input as the only activation kept.

    Channels-last is what oneDNN is fast in with 16 channels at full resolution. relu(norm(x)) is made again in the backward
    pass: a pass over memory costs less than fresh pages for a tensor that waits there. Under bf16 autocast activations are bf16.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, stride, gamma=None, beta=None, groups=0, eps=0.0):
        x = x.contiguous(memory_format=torch.channels_last_3d if x.shape[1] <= FEW else torch.contiguous_format)
        ctx.stored = _stored_in(x)
        ctx.computed = _computed_in(ctx.stored, x)
        ctx.stride, ctx.groups, ctx.eps = stride, groups, eps
        ctx.save_for_backward(x, weight, gamma, beta)
        with torch.autocast("cpu", enabled=False):
            activated, *_ = _activated(x, gamma, beta, groups, eps)
            weight, bias = weight.to(ctx.computed), bias.to(ctx.computed)
            return F.conv3d(activated.to(ctx.computed), weight, bias, stride, padding=1).to(ctx.stored)

    @staticmethod
    def backward(ctx, gradient):
        x, weight, gamma, beta = ctx.saved_tensors
        with torch.autocast("cpu", enabled=False):
            activated, *statistics = _activated(x, gamma, beta, ctx.groups, ctx.eps)
            activated = activated.to(ctx.computed)
            wanted = [ctx.needs_input_grad[0] or gamma is not None, ctx.needs_input_grad[1], ctx.needs_input_grad[2]]
            to_input, to_weight, to_bias = torch.ops.aten.convolution_backward(
                gradient.to(ctx.computed), activated, weight.to(ctx.computed), [len(weight)],
                ctx.stride, [1, 1, 1], [1, 1, 1], False, [0, 0, 0], 1, wanted,
            )  # fmt: skip
            to_norm = (None, None)
            if gamma is not None:
                torch.ops.aten.threshold_backward.grad_input(to_input, activated, 0, grad_input=to_input)
                to_input, *to_norm = _normalisation_backward(to_input, x, gamma, ctx.groups, statistics)
        to_input = to_input.to(x.dtype) if ctx.needs_input_grad[0] else None
        return to_input, _like(weight, to_weight), _like(weight, to_bias), None, *to_norm, None, None


def _activated(x: Tensor, gamma: Tensor | None, beta: Tensor | None, groups: int, eps: float) -> tuple[Tensor, ...]:
    """relu(norm(x)), mean and 1/std of the groups; `x` alone without a normalisation."""
    if gamma is None:
        return (x,)
    normalised, *statistics = torch.native_group_norm(x, gamma, beta, len(x), x.shape[1], x[0, 0].numel(), groups, eps)
    return normalised.relu_(), *statistics


def _normalisation_backward(gradient: Tensor, x: Tensor, gamma: Tensor, groups: int, statistics: list[Tensor]) -> tuple[Tensor, ...]:
    """Gradients of input, weight and bias; in the weight's type, because the kernel for bf16 is slow in channels-last."""
    mean, scale = (value.to(gamma.dtype) for value in statistics)
    sizes = len(x), x.shape[1], x[0, 0].numel(), groups
    return torch.ops.aten.native_group_norm_backward(gradient.to(gamma.dtype), x.to(gamma.dtype), mean, scale, gamma, *sizes, [True] * 3)


def _like(parameter: Tensor, gradient: Tensor | None) -> Tensor | None:
    return None if gradient is None else gradient.to(parameter.dtype)

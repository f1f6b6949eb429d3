"""The 3^3 convolution of MST-KDNet, alone or after GroupNorm and ReLU, with what a CPU needs."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from mstkd.models.symmetric import symmetric

IM2COL_SIZE = 20480  # B x C x X x Y, up to which at::native takes it for too small (ConvParams::use_mkldnn)
PART = 4096  # voxels that are summed in float32
FEW = 32  # channels up to which channels-last is faster than PyTorch's own layout on a CPU


class Conv3d(nn.Conv3d):
    """nn.Conv3d with kernel 3 and padding 1; its input may pass a normalisation and a ReLU first."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1):
        super().__init__(inputs, outputs, 3, stride=stride, padding=1)

    def forward(self, x: Tensor, norm: nn.GroupNorm | None = None) -> Tensor:
        """The convolution of `x` (B, C, X, Y, Z), or of relu(norm(x))."""
        if x.device.type != "cpu" or symmetric():  # a graph runs anywhere
            return super().forward(x if norm is None else F.relu(norm(x)))
        if norm is not None:
            return _OnCpu.apply(x, self.weight, self.bias, self.stride, norm.weight, norm.bias, norm.num_groups, norm.eps)
        if self.in_channels <= FEW or _left_to_im2col(x):
            return _OnCpu.apply(x, self.weight, self.bias, self.stride)
        with cpu_arithmetic(x) as x:
            return super().forward(x)


def in_block_layout(x: Tensor) -> Tensor:
    """`x` (B, C, X, Y, Z) in the memory layout in which its 3^3 convolutions run."""
    return x if symmetric() else _Laid.apply(x, _layout(x.shape[1]) if x.device.type == "cpu" else torch.contiguous_format)


def in_plain_layout(x: Tensor) -> Tensor:
    """`x` (B, C, X, Y, Z) contiguous: 1^3 convolutions are slow in channels-last."""
    return x if symmetric() else _Laid.apply(x, torch.contiguous_format)


def _layout(channels: int) -> torch.memory_format:
    """Of maps with so many channels on a CPU."""
    return torch.channels_last_3d if channels <= FEW else torch.contiguous_format


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
    if x.device.type != "cpu" or symmetric() or _computed_in(_stored_in(x), x) == _stored_in(x):
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
    units = getattr(torch.cpu, "get_capabilities", dict)()
    return torch.float32 if stored == torch.bfloat16 and (x.shape[2] == 2 or not (units.get("avx512_bf16") or units.get("amx_bf16"))) else stored


class _OnCpu(torch.autograd.Function):
    """The same, faster in few channels, and with the input as the only activation kept.

    Channels-last is what oneDNN is fast in with 16 channels at full resolution. relu(norm(x)) is made again in the backward
    pass: a pass over memory costs less than fresh pages for a tensor that waits there. Under bf16 autocast activations are bf16.
    The normalisation is written out, because PyTorch's kernel for channels-last sums millions of voxels in one float32: at
    160x192x128 its standard deviation is wrong by 1e-3.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, stride, gamma=None, beta=None, groups=0, eps=0.0):
        x = x.contiguous(memory_format=_layout(x.shape[1]))
        ctx.stored = _stored_in(x)
        ctx.computed = _computed_in(ctx.stored, x)
        ctx.stride, ctx.groups = stride, groups
        with torch.autocast("cpu", enabled=False):
            mean, scale = (None, None) if gamma is None else _statistics(x.to(gamma.dtype), groups, eps)
            ctx.save_for_backward(x, weight, gamma, beta, mean, scale)
            activated = _activated(x, gamma, beta, mean, scale).to(ctx.computed)
            return _convolved(activated, weight.to(ctx.computed), bias.to(ctx.computed), stride).to(ctx.stored)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        x, weight, gamma, beta, mean, scale = ctx.saved_tensors
        with torch.autocast("cpu", enabled=False):
            activated = _activated(x, gamma, beta, mean, scale).to(ctx.computed)
            wanted = [ctx.needs_input_grad[0] or gamma is not None, ctx.needs_input_grad[1], ctx.needs_input_grad[2]]
            to_input, to_weight, to_bias = _convolution_backward(gradient.to(ctx.computed), activated, weight.to(ctx.computed), ctx.stride, wanted)
            to_norm = (None, None)
            if gamma is not None:
                through = torch.ops.aten.threshold_backward(to_input.contiguous(memory_format=_layout(x.shape[1])), activated, 0)
                to_input, *to_norm = _normalisation_backward(through.to(gamma.dtype), x.to(gamma.dtype), gamma, ctx.groups, mean, scale)
        to_input = to_input.to(x.dtype) if ctx.needs_input_grad[0] else None
        return to_input, _like(weight, to_weight), _like(weight, to_bias), None, *to_norm, None, None


def _convolved(x: Tensor, weight: Tensor, bias: Tensor, stride: tuple[int, int, int]) -> Tensor:
    if _left_to_im2col(x):
        return torch.ops.aten.mkldnn_convolution(x, weight, bias, (1, 1, 1), stride, (1, 1, 1), 1)
    return F.conv3d(x, weight, bias, stride, padding=1)


def _convolution_backward(
    gradient: Tensor, x: Tensor, weight: Tensor, stride: tuple[int, int, int], wanted: list[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of input, weight and bias, as far as they are `wanted`."""
    alone = _left_to_im2col(x)
    if alone:  # a second sample of zeros, which adds nothing to any gradient, brings oneDNN in
        gradient, x = (torch.cat([t, torch.zeros_like(t)]) for t in (gradient, x))
    to_input, to_weight, to_bias = torch.ops.aten.convolution_backward(
        gradient, x, weight, [len(weight)], stride, [1, 1, 1], [1, 1, 1], False, [0, 0, 0], 1, wanted
    )
    return to_input[:1] if alone and to_input is not None else to_input, to_weight, to_bias


def _left_to_im2col(x: Tensor) -> bool:
    """Whether PyTorch would convolve this (B, C, X, Y, Z) without oneDNN, at a tenth of its speed: float32, one sample, a small map."""
    if type(x) is not Tensor or torch.compiler.is_compiling():
        return False  # traced without numbers: the operator called by name has no such form
    return x.dtype == torch.float32 and len(x) == 1 and math.prod(x.shape[:4]) <= IM2COL_SIZE and torch.backends.mkldnn.is_available()


def _statistics(x: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor]:
    """Mean and 1/std (B, C, 1, 1, 1) of each channel's group."""
    mean, square = (_group_means(sums, groups, x[0, 0].numel()) for sums in (_sums(x), _sums(x, x)))
    scale = (square - mean.square() + eps).rsqrt()
    return mean.to(x.dtype), scale.to(x.dtype)


def _activated(x: Tensor, gamma: Tensor | None, beta: Tensor | None, mean: Tensor | None, scale: Tensor | None) -> Tensor:
    """relu(norm(x)) in the type of `gamma`; `x` itself without a normalisation."""
    if gamma is None:
        return x
    factor = _of_channels(gamma) * scale
    x = x.to(gamma.dtype)
    return torch.addcmul(_of_channels(beta) - mean * factor, x, factor, out=torch.empty_like(x)).relu_()


def _normalisation_backward(gradient: Tensor, x: Tensor, gamma: Tensor, groups: int, mean: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the input, the weight (C,) and the bias (C,) of a group normalisation (Wu & He, ECCV 2018)."""
    to_bias, with_x = _of_samples(_sums(gradient)), _of_samples(_sums(gradient, x))
    to_weight = (with_x - mean * to_bias) * scale  # per sample: the sum of gradient times normalised x
    average, along = (_group_means((_of_channels(gamma) * sums).flatten(1), groups, x[0, 0].numel()) for sums in (to_bias, to_weight))
    slope = -along * scale.square()
    to_input = torch.addcmul((-average * scale - slope * mean).to(x.dtype), x, slope.to(x.dtype), out=torch.empty_like(x))
    to_input.addcmul_(gradient, _of_channels(gamma) * scale)
    return to_input, to_weight.sum((0, 2, 3, 4)).to(gamma.dtype), to_bias.sum((0, 2, 3, 4)).to(gamma.dtype)


def _sums(a: Tensor, b: Tensor | None = None) -> Tensor:
    """(B, C) sums of `a`, or of `a` times `b`, over the voxels, in float64 over parts: one long float32 sum would lose half of its digits."""
    if _layout(a.shape[1]) == torch.contiguous_format:
        return (a if b is None else a * b).flatten(2).sum(2, dtype=torch.float64)
    size = math.gcd(a[0, 0].numel(), PART)
    parts = [t.permute(0, 2, 3, 4, 1).reshape(-1, size, t.shape[1]) for t in (a, b) if t is not None]  # in channels-last a view
    sums = parts[0].sum(1) if b is None else torch.bmm(parts[0].transpose(1, 2), parts[1]).diagonal(dim1=1, dim2=2)
    return sums.double().reshape(len(a), -1, a.shape[1]).sum(1)


def _group_means(sums: Tensor, groups: int, voxels: int) -> Tensor:
    """Of sums (B, C) over so many voxels: each group's mean, for each of its channels, (B, C, 1, 1, 1)."""
    size = sums.shape[1] // groups
    return _of_samples((sums.unflatten(1, (groups, size)).sum(2) / (size * voxels)).repeat_interleave(size, 1))


def _of_samples(values: Tensor) -> Tensor:
    return values[..., None, None, None]


def _of_channels(values: Tensor) -> Tensor:
    return values[None, :, None, None, None]


def _like(parameter: Tensor, gradient: Tensor | None) -> Tensor | None:
    return None if gradient is None else gradient.to(parameter.dtype)

"""The segmentation network of ShaSpec: one encoder shared by all sequences, one of their own for each, residual fusion, one decoder.

Source: Wang et al., CVPR 2023, arXiv:2307.14126. Letters: B samples, M sequences, K channels of the logits, X Y Z voxels,
N encoded volumes (pairs of sample and sequence), w = width, C = 4 w channels of a feature, (x, y, z) = (X, Y, 2 Z) / 32.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mstkd.models.convolution import cpu_arithmetic
from mstkd.models.symmetric import symmetric

STRIDE = (32, 32, 16)  # image voxels per voxel of a feature: what X, Y, Z must be divisible by
SMALLEST = (64, 32, 16)  # an input of two feature voxels: an instance of one voxel has no variance
SLOPE = 0.01  # of LeakyReLU
GROUP = 16  # channels that the context branch normalises together
PLANES, EXPANSION = (1, 2, 4, 5), 4  # of the encoder's four layers, in widths; a layer's output has 4 times as many

Pairs = list[tuple[int, int]]  # (sample, sequence)
Rows = list[list[int | None]]  # per sample and sequence: the row of a stack of N that belongs to it, None if there is none


class Encoded(NamedTuple):
    skips: tuple[Tensor, ...]  # (N, w, X/2, Y/2, Z), then 4, 8 and 16 w channels at 1/4, 1/8 and 1/16 of (X, Y, 2 Z)
    pooled: Tensor  # (N, C) mean over the voxels before the pyramid
    feature: Tensor  # (N, C, x, y, z)


class ShaSpecOutput(NamedTuple):
    logits: Tensor  # (B, K, X, Y, Z)
    shared: Tensor  # (N, C, x, y, z), sample by sample
    specific: Tensor  # (N, C, x, y, z)
    domains: Tensor  # (N, M) logits: which sequence a specific feature came from
    fused: Tensor  # (B, M, C, x, y, z)
    pairs: Pairs  # what the N are


class ShaSpecNetwork(nn.Module):
    """Published setting: the defaults with 4 sequences and 3 channels: 187,708,132 parameters.

    Only available sequences are encoded, by two encoders each; the voxels of the others are never read. In training mode an encoder
    without input runs on a dummy of two feature voxels whose output counts 0: every rank calls every module equally often.
    `generated`: what stands for a missing sequence's fused feature, the mean of the sample's shared ones or the first of them.
    `skip_fill`: what stands for its skips, their mean or (reference) the encoding of zeros. `encode_missing`: training encodes zeros, too.
    """

    def __init__(
        self, sequences: int, out_channels: int, width: int = 64, blocks: Sequence[int] = (3, 4, 6, 3),
        generated: Literal["mean", "first"] = "mean", skip_fill: Literal["mean", "reference"] = "mean",
        encode_missing: bool = False, reference_global: bool = False,
    ):  # fmt: skip
        super().__init__()
        channels = EXPANSION * width
        self.generated, self.skip_fill, self.encode_missing = generated, skip_fill, encode_missing
        self.shared = Encoder(width, blocks, reference_global)
        self.specific = nn.ModuleList(Encoder(width, blocks, reference_global) for _ in range(sequences))
        self.project = StandardisedConv3d(2 * channels, channels, 3)
        self.domain = nn.Linear(channels, sequences)
        self.decoder = Decoder(sequences, width, out_channels)
        _initialise(self)

    def forward(self, image: Tensor, available: Tensor) -> ShaSpecOutput:
        """Of `image` (B, M, X, Y, Z) with axes divisible by STRIDE, and `available` (B, M) bool, another subset in each sample if need be."""
        if symmetric():
            return self._whole(image, available)
        given = available.tolist()
        everything = self.encode_missing and self.training
        zeros = everything or self.skip_fill == "reference"
        pairs = [(sample, m) for sample, row in enumerate(given) for m, here in enumerate(row) if here or zeros]
        volumes = torch.stack([image[s, m] if given[s][m] else torch.zeros_like(image[s, m]) for s, m in pairs])[:, None]
        shared = self.shared(volumes)
        specific, pooled = self._encode_specific(volumes, pairs)
        residual = shared.feature + self.project(torch.cat([shared.feature, specific], 1))
        number = {pair: row for row, pair in enumerate(pairs)}
        rows = [[number[s, m] if here else None for m, here in enumerate(row)] for s, row in enumerate(given)]
        fused = filled(residual, rows, shared.feature, self.generated)
        skip_rows = rows if self.skip_fill == "mean" else [[number[s, m] for m in range(len(row))] for s, row in enumerate(rows)]
        skips = [filled(skip, skip_rows, skip).flatten(1, 2) for skip in shared.skips]
        logits = self.decoder(fused.flatten(1, 2), skips)
        told = [row for row, (s, m) in enumerate(pairs) if given[s][m] or everything]  # what was encoded for its skips alone tells nothing
        return ShaSpecOutput(logits, shared.feature[told], specific[told], self.domain(pooled[told]), fused, [pairs[row] for row in told])

    def _whole(self, image: Tensor, available: Tensor) -> ShaSpecOutput:
        """The same logits in evaluation, with every sequence encoded, hidden ones as zeros; the N are all pairs of sample and sequence."""
        volumes = torch.where(available[:, :, None, None, None], image, 0.0).flatten(0, 1)[:, None]
        shared = self.shared(volumes)
        own = [encoder(volumes.unflatten(0, available.shape)[:, m]) for m, encoder in enumerate(self.specific)]
        specific, pooled = (torch.stack([getattr(one, name) for one in own], 1).flatten(0, 1) for name in ("feature", "pooled"))
        residual = shared.feature + self.project(torch.cat([shared.feature, specific], 1))
        fused = filled_by_mask(residual, available, shared.feature, self.generated)
        kept = available | ~available if self.skip_fill == "reference" else available
        logits = self.decoder(fused.flatten(1, 2), [filled_by_mask(skip, kept, skip).flatten(1, 2) for skip in shared.skips])
        return ShaSpecOutput(logits, shared.feature, specific, self.domain(pooled), fused, [])

    def _encode_specific(self, volumes: Tensor, pairs: Pairs) -> tuple[Tensor, Tensor]:
        """(N, C, x, y, z) and pooled (N, C): every volume through its own sequence's encoder."""
        features, pooled, idle = [None] * len(pairs), [None] * len(pairs), 0.0
        for m, encoder in enumerate(self.specific):
            if mine := [row for row, (_, sequence) in enumerate(pairs) if sequence == m]:
                encoded = encoder(volumes[mine])
                for row, feature, mean in zip(mine, encoded.feature.unbind(), encoded.pooled.unbind(), strict=True):
                    features[row], pooled[row] = feature, mean
            elif self.training:
                encoded = encoder(volumes.new_zeros(1, 1, *SMALLEST))
                idle = idle + 0 * (encoded.feature.mean() + encoded.pooled.mean())
        return torch.stack(features) + idle, torch.stack(pooled) + idle


class Encoder(nn.Module):
    """Bottleneck residual network of one volume, 4 w output channels, and an atrous spatial pyramid on top."""

    def __init__(self, width: int, blocks: Sequence[int], reference_global: bool = False):
        super().__init__()
        self.stem = ConvNorm(1, width, 7, stride=(2, 2, 1))
        inputs, layers = width, []
        for number, (planes, count) in enumerate(zip(PLANES, blocks, strict=True)):
            layer = []
            for block in range(count):
                layer.append(Bottleneck(inputs, planes * width, stride=2 if number and not block else 1))
                inputs = EXPANSION * planes * width
            layers.append(nn.Sequential(*layer))
        self.layers = nn.ModuleList(layers)
        self.reduce = ConvNorm(inputs, EXPANSION * width, 1)
        self.pyramid = Pyramid(EXPANSION * width, reference_global)

    def forward(self, volumes: Tensor) -> Encoded:
        """Of volumes (N, 1, X, Y, Z)."""
        skips = [self.stem(volumes)]
        x = F.max_pool3d(skips[0], 3, stride=2, padding=1)
        for layer in self.layers:
            x = layer(x)
            skips.append(x)
        reduced = self.reduce(x)
        return Encoded(tuple(skips[:-1]), reduced.mean((2, 3, 4)), self.pyramid(reduced))


class Bottleneck(nn.Module):
    """1^3, 3^3 and 1^3 convolutions plus the input, which is convolved where channels or size change."""

    def __init__(self, inputs: int, planes: int, stride: int):
        super().__init__()
        outputs = EXPANSION * planes
        self.body = nn.Sequential(
            ConvNorm(inputs, planes, 1), ConvNorm(planes, planes, 3, stride), ConvNorm(planes, outputs, 1, active=False)
        )  # fmt: skip
        self.shortcut = ConvNorm(inputs, outputs, 1, stride, active=False) if stride > 1 or inputs != outputs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return F.leaky_relu(self.body(x) + self.shortcut(x), SLOPE, inplace=True)


class Pyramid(nn.Module):
    """Atrous spatial pyramid pooling (DeepLab): dilations 1 (1^3), 2, 4, 8 and the global context, side by side.

    The released code puts an instance norm on the context's single voxel, whose result is always 0; and the instance norm behind the join
    would take away whatever is constant over the map, as the context is. Here both are group norms, with equally many parameters, so that
    the context counts; `reference_global`: as there, the activated offset of the first norm alone, and an instance norm behind the join.
    """

    def __init__(self, channels: int, reference_global: bool):
        super().__init__()
        self.branches = nn.ModuleList([ConvNorm(channels, channels, 1), *(ConvNorm(channels, channels, 3, dilation=d) for d in (2, 4, 8))])
        self.context = StandardisedConv3d(channels, channels, 1)
        self.context_norm = nn.GroupNorm(channels // GROUP, channels)
        self.share = 0.0 if reference_global else 1.0
        self.join = ConvNorm(5 * channels, channels, 1)
        if not reference_global:
            self.join.norm = nn.GroupNorm(channels // GROUP, channels)

    def forward(self, x: Tensor) -> Tensor:
        context = self.context(x.mean((2, 3, 4), keepdim=True)) * self.share
        context = F.leaky_relu(self.context_norm(context), SLOPE).expand_as(x)
        branches = [branch(x) for branch in self.branches]
        return self.join(torch.cat([*branches, context.to(branches[0].dtype)], 1))


class Decoder(nn.Module):
    """From the fused features of all sequences to logits; the shared encoder's skips are added on the way up."""

    def __init__(self, sequences: int, width: int, out_channels: int):
        super().__init__()
        outputs = (4 * width, 2 * width, width, width // 2)
        inputs = (sequences * EXPANSION * width, *outputs[:-1])
        skips = [sequences * EXPANSION * planes * width for planes in (4, 2, 1)] + [sequences * width]
        self.ups = nn.ModuleList(Up(*channels) for channels in zip(inputs, skips, outputs, strict=True))
        self.head = nn.Conv3d(outputs[-1], out_channels, 1, bias=False)

    def forward(self, fused: Tensor, skips: Sequence[Tensor]) -> Tensor:
        """Logits (B, K, X, Y, Z) of fused (B, M C, x, y, z) and the four skips, finest first, with the sequences' channels side by side."""
        x = fused
        for up, skip in zip(self.ups, reversed(skips), strict=True):
            x = up(x, skip)
        return F.interpolate(self.head(x), scale_factor=(2, 2, 1), mode="trilinear", align_corners=False)


class Up(nn.Module):
    """Double the size, add the skip, refine by two 3^3 convolutions."""

    def __init__(self, inputs: int, skips: int, outputs: int):
        super().__init__()
        self.up = nn.ConvTranspose3d(inputs, outputs, 2, stride=2, bias=False)
        self.shortcut = ConvNorm(skips, outputs, 1)
        self.body = nn.Sequential(ConvNorm(outputs, outputs, 3), ConvNorm(outputs, outputs, 3, active=False))

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        x = self.up(x) + self.shortcut(skip)
        return F.leaky_relu(self.body(x) + x, SLOPE, inplace=True)


class ConvNorm(nn.Module):
    """Weight-standardised convolution, instance norm and, if `active`, LeakyReLU; the size divided by `stride`."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int | tuple[int, ...] = 1, dilation: int = 1, active: bool = True):
        super().__init__()
        self.conv = StandardisedConv3d(inputs, outputs, kernel, stride, dilation)
        self.norm = nn.InstanceNorm3d(outputs, affine=True)
        self.active = active

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x))
        return F.leaky_relu(x, SLOPE, inplace=True) if self.active else x


class StandardisedConv3d(nn.Conv3d):
    """Convolution without bias whose filters have mean 0 and standard deviation 1 each (arXiv:1903.10520), padded to keep the size.

    A filter's scale and offset do not change the output. A filter of equal weights is 0. Standardised in float32, whatever the convolution
    is computed in.
    """

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int | tuple[int, ...] = 1, dilation: int = 1):
        super().__init__(inputs, outputs, kernel, stride, dilation * (kernel // 2), dilation, bias=False)

    @property
    def standardised(self) -> Tensor:
        """The weight that convolves, of `weight`'s shape, in float32 at least."""
        weight = self.weight.to(torch.promote_types(self.weight.dtype, torch.float32))
        variance, mean = torch.var_mean(weight, (1, 2, 3, 4), keepdim=True)
        return (weight - mean) * (variance + 1e-12).rsqrt()

    def forward(self, x: Tensor) -> Tensor:
        with cpu_arithmetic(x) as x:
            return F.conv3d(x, self.standardised.to(x.dtype), None, self.stride, self.padding, self.dilation)


def filled(values: Tensor, rows: Rows, sources: Tensor, rule: Literal["mean", "first"] = "mean") -> Tensor:
    """(B, M, ...) of values (N, ...): each sample's own `rows`, and in a gap the mean (or first) of its rows in `sources` (N, ...).

    Every sample has at least one row.
    """
    parts, whence = values.unbind(), sources.unbind()
    result = []
    for row in rows:
        own = [whence[number] for number in row if number is not None]
        stand_in = None
        if len(own) < len(row):
            stand_in = own[0] if rule == "first" else torch.stack(own).mean(0)
        result += [stand_in if number is None else parts[number] for number in row]
    return torch.stack(result).unflatten(0, (len(rows), -1))


def filled_by_mask(values: Tensor, available: Tensor, sources: Tensor, rule: Literal["mean", "first"] = "mean") -> Tensor:
    """As `filled`, where every pair has a row: (B, M, ...) of values and sources (B M, ...), and available (B, M) bool."""
    values, sources = (stack.unflatten(0, available.shape) for stack in (values, sources))
    given = available.reshape(*available.shape, *[1] * (values.ndim - 2))
    counted = given if rule == "mean" else given & (given.cumsum(1) == 1)
    stand_in = torch.where(counted, sources, 0.0).sum(1, keepdim=True) / counted.sum(1, keepdim=True)
    return torch.where(given, values, stand_in)


def _initialise(network: nn.Module) -> None:
    """Kaiming's normal distribution by fan-out (ICCV 2015) in all convolutions; norms start as identities already."""
    for module in network.modules():
        if isinstance(module, nn.Conv3d | nn.ConvTranspose3d):
            nn.init.kaiming_normal_(module.weight, SLOPE, mode="fan_out")

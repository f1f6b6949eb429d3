"""The knowledge keeper: from a low-field image to the features that the teacher has of the 7T one.

Source: Oh et al., arXiv:2402.08409, and its released code. Letters: B samples, C_l the teacher's channels of level l = 1..5, w_l the
keeper's own width there, s_l the level's size; N voxels of a map, A spatial axes.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mstkd.losses.precision import full_precision
from mstkd.models.symmetric import symmetric
from mstkd.models.uhf_layers import LEVELS, Block, Halving, channels_of, convolution, initialise, resize

KERNEL = 7
EPSILON = 1e-5


class Dense(nn.Module):
    """Three blocks, each of which sees the input and all that came before it: i channels become i + 3 w."""

    def __init__(self, dimensions: int, inputs: int, width: int):
        super().__init__()
        self.blocks = nn.ModuleList(Block(dimensions, inputs + n * width, width, KERNEL) for n in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = torch.cat([x, block(x)], 1)
        return x


class PixelRelation(nn.Module):
    """A gate per voxel, by how much it resembles the mean voxel and the strongest one (the largest sum of channels).

    The second resemblance fades with the distance to the strongest voxel. 5 + A scalars; at first every voxel is multiplied by
    sigmoid(1) = 0.731. The released code finds the strongest voxel right on the first axis alone; here on all.
    """

    def __init__(self, dimensions: int):
        super().__init__()
        self.one, self.zero, self.scale, self.weight, self.bias = (nn.Parameter(torch.tensor([value])) for value in (1.0, 0.0, 1.0, 0.0, 1.0))
        self.theta = nn.Parameter(torch.rand(dimensions))

    def forward(self, x: Tensor) -> Tensor:
        """`x` (B, C, ...) with its gate applied."""
        with full_precision(x):  # inner products over the channels outgrow half precision
            gate = self._gate(x.float())
        return x * gate.to(x.dtype)

    def _gate(self, x: Tensor) -> Tensor:
        """(B, 1, ...) in (0, 1)."""
        flat = x.flatten(2)
        strongest = flat.sum(1).argmax(1)  # (B,)
        peak = flat.gather(2, strongest[:, None, None].expand(-1, flat.shape[1], 1))
        to_mean, to_peak = ((flat * one).sum(1) for one in (flat.mean(2, keepdim=True), peak))
        score = self.one * to_mean + self.zero * to_peak * self._nearness(strongest, x.shape[2:])
        score = (score - score.mean(1, keepdim=True)) / (score.var(1, correction=0, keepdim=True) + EPSILON).sqrt()
        return torch.sigmoid(self.weight * score + self.bias).reshape(x.shape[0], 1, *x.shape[2:])

    def _nearness(self, place: Tensor, size: Sequence[int]) -> Tensor:
        """(B, N): for voxels `place` (B,), numbered as in a flattened map, the mean over the axes of N(0, scale)'s density of theta |distance|."""
        spread, total = self.scale.abs() + EPSILON, 0.0
        for axis, length in enumerate(size):
            position = torch.arange(length).type_as(place) if symmetric() else torch.arange(length, device=place.device)
            stride = math.prod(size[axis + 1 :])
            distance = self.theta[axis] * (position - (place // stride % length)[:, None]).abs()
            density = torch.exp(-0.5 * (distance / spread).square()) / (spread * math.sqrt(2 * math.pi))
            shape = [place.shape[0], *(length if other == axis else 1 for other in range(len(size)))]
            total = total + density.reshape(shape)
        return (total / len(size)).expand(place.shape[0], *size).flatten(1)


class Guide(nn.Module):
    """The features of one level: those of the level below and the level's own, each weighted voxel by voxel, then the gate."""

    def __init__(self, dimensions: int, deeper: int, own: int, channels: int):
        super().__init__()
        self.reduce = convolution(dimensions, deeper, channels)
        self.skip = Block(dimensions, own, channels, KERNEL)
        self.weights = convolution(dimensions, 2 * channels, 2)
        self.relation = PixelRelation(dimensions)

    def forward(self, below: Tensor, own: Tensor) -> Tensor:
        up, skip = self.reduce(resize(below, own.shape[2:])), self.skip(own)
        first, second = self.weights(torch.cat([up, skip], 1)).sigmoid().split(1, 1)
        return self.relation(first * up + second * skip)


class Keeper(nn.Module):
    """Volumes with the published widths: 34,960,348 parameters."""

    def __init__(self, dimensions: int = 3, width: int = 16, keeper_width: int = 4):
        """`width`: of the teacher, at full resolution; `keeper_width`: the keeper's own."""
        super().__init__()
        channels, own = channels_of(width, dimensions), channels_of(keeper_width, dimensions)
        inputs = (1, *own[:-1])
        dense = [i + 3 * w for i, w in zip(inputs, own, strict=True)]
        self.dense = nn.ModuleList(Dense(dimensions, *pair) for pair in zip(inputs, own, strict=True))
        self.halvings = nn.ModuleList(Halving(dimensions, dense[level], own[level]) for level in range(LEVELS - 1))
        self.deepest = Block(dimensions, dense[-1], channels[-1], KERNEL)
        self.relation = PixelRelation(dimensions)
        self.guides = nn.ModuleList(Guide(dimensions, channels[level + 1], dense[level], channels[level]) for level in (3, 2, 1, 0))
        initialise(self)

    def forward(self, image: Tensor) -> list[Tensor]:
        """Of an image (B, 1, ...): maps (B, C_l, s_l), as the teacher's encoder gives them."""
        maps: list[Tensor] = []
        for level, dense in enumerate(self.dense):
            maps.append(dense(self.halvings[level - 1](maps[-1]) if maps else image))
        guides = [self.relation(self.deepest(maps[-1]))]
        for guide, own in zip(self.guides, reversed(maps[:-1]), strict=True):
            guides.append(guide(guides[-1], own))
        return guides[::-1]


class Silent(nn.Module):
    """In place of a keeper: features of 0, as a control of what fusion does without any."""

    def __init__(self, dimensions: int = 3, width: int = 16):
        super().__init__()
        self.channels = channels_of(width, dimensions)

    def forward(self, image: Tensor) -> list[Tensor]:
        """As a keeper's, all 0."""
        sizes = ([size // 2**level for size in image.shape[2:]] for level in range(LEVELS))
        return [image.new_zeros(len(image), channels, *size) for channels, size in zip(self.channels, sizes, strict=True)]

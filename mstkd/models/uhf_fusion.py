"""Adaptive fusion: the keeper's features joined to every map that a segmenter's encoder hands to its decoder.

Source: Oh et al., arXiv:2402.08409, and its released code. Letters: B samples, o channels of the encoder's map, C_l the keeper's.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mstkd.models.uhf_backbones import Backbone
from mstkd.models.uhf_layers import INSTANCE_NORMS, convolution, initialise, resize


class Recalibration(nn.Module):
    """A gate per channel from the channel's mean, never negative: the last activation is a ReLU, as released."""

    def __init__(self, channels: int):
        super().__init__()
        self.squeeze, self.excite = nn.Linear(channels, channels // 2), nn.Linear(channels // 2, channels)

    def forward(self, z: Tensor) -> Tensor:
        """`z` (B, o, ...), of one sign, times its gates."""
        gate = self.excite(self.squeeze(z.flatten(2).mean(2)).relu()).relu()
        return gate.reshape(*gate.shape, *[1] * (z.dim() - 2)).to(z.dtype) * z


class Fusion(nn.Module):
    """One level's module: all five of the keeper's maps are summed up, combined with the encoder's and added to it, channel by channel.

    Volumes, keeper of width 16, o = 16, 32, 64, 128, 256: 9,625,808 parameters together.
    """

    def __init__(self, dimensions: int, guide: Sequence[int], channels: int):
        """`guide`: C_1 to C_5. Raises ValueError if there are fewer than five `channels` o."""
        super().__init__()
        share = channels // len(guide)
        if share < 1:
            raise ValueError(f"an encoder's map has {channels} channels, and adaptive fusion needs {len(guide)} at least; make the network wider")
        self.reduce = nn.ModuleList(convolution(dimensions, c, share) for c in guide)
        self.aggregate = nn.Sequential(
            convolution(dimensions, share * len(guide), channels, 3), INSTANCE_NORMS[dimensions](channels), nn.ReLU(),
            convolution(dimensions, channels, channels, 3),
        )  # fmt: skip
        self.combine = nn.Sequential(convolution(dimensions, 2 * channels, channels, 3), INSTANCE_NORMS[dimensions](channels))
        self.positive, self.negative = Recalibration(channels), Recalibration(channels)
        initialise(self)

    def forward(self, encoded: Tensor, guide: Sequence[Tensor]) -> Tensor:
        """The encoder's map (B, o, ...) refined, of its shape; `guide`: maps (B, C_l, ...) of any size."""
        size = encoded.shape[2:]
        own = self.aggregate(torch.cat([resize(reduce(g), size) for reduce, g in zip(self.reduce, guide, strict=True)], 1))
        z = self.combine(torch.cat([own, encoded], 1))
        return encoded + self.positive(z.clamp_min(0)) + self.negative(z.clamp_max(0))


class GuidedSegmenter(nn.Module):
    """A segmenter with adaptive fusion between its encoder and its decoder."""

    def __init__(self, segmenter: Backbone, guide: Sequence[int], dimensions: int = 3):
        super().__init__()
        self.segmenter = segmenter
        self.fusions = nn.ModuleList(Fusion(dimensions, guide, channels) for channels in segmenter.channels)

    def forward(self, image: Tensor, guide: Sequence[Tensor]) -> Tensor:
        """Logits (B, K, ...) of an image (B, 1, ...), with the keeper's features of it."""
        encoded = self.segmenter.encode(image)
        return self.segmenter.decode([fusion(x, guide) for fusion, x in zip(self.fusions, encoded, strict=True)])

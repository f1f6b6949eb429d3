"""The teacher of UHF-guided segmentation: an auto-encoder of 7T images whose encoder says what "7T features" are.

Source: Oh et al., arXiv:2402.08409, and its released code. Letters: B samples, C_l channels of level l = 1..5, s_l its size,
halved downwards from level to level.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from mstkd.models.uhf_layers import POOLS, Block, channels_of, convolution, initialise, resize


class Reconstruction(NamedTuple):
    image: Tensor  # (B, 1, ...), unbounded
    features: list[Tensor]  # maps 1 to 5, without noise
    predicted: list[Tensor]  # maps 1 to 4, as the head has them from the coarser ones


class Encoder(nn.Module):
    """An image (B, 1, ...) to maps (B, C_l, s_l) of the five levels. Volumes, width 16: 1,175,472 parameters."""

    def __init__(self, dimensions: int, channels: Sequence[int]):
        super().__init__()
        self.levels = nn.ModuleList(Block(dimensions, *pair) for pair in zip((1, *channels[:-1]), channels, strict=True))
        self.pool = POOLS[dimensions](2)

    def forward(self, image: Tensor) -> list[Tensor]:
        maps: list[Tensor] = []
        for level in self.levels:
            maps.append(level(self.pool(maps[-1]) if maps else image))
        return maps


class UpMerge(nn.Module):
    """The deeper map brought to the skip's size and channels, joined with it."""

    def __init__(self, dimensions: int, deeper: int, channels: int):
        super().__init__()
        self.reduce = convolution(dimensions, deeper, channels)
        self.merge = Block(dimensions, 2 * channels, channels)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        return self.merge(torch.cat([self.reduce(resize(x, skip.shape[2:])), skip], 1))


class Decoder(nn.Module):
    """Maps of the five levels to an image (B, 1, ...), unbounded. Volumes, width 16: 2,988,048 parameters."""

    def __init__(self, dimensions: int, channels: Sequence[int]):
        super().__init__()
        self.deepest = Block(dimensions, channels[-1], channels[-1])
        self.ups = nn.ModuleList(UpMerge(dimensions, channels[level + 1], channels[level]) for level in (3, 2, 1, 0))
        self.out = convolution(dimensions, channels[0], 1)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        *skips, deepest = maps
        x = self.deepest(deepest)
        for up, skip in zip(self.ups, reversed(skips), strict=True):
            x = up(x, skip)
        return self.out(x)


class Head(nn.Module):
    """What the maps of levels 1 to 4 should be, each from the one below it. Volumes, width 16: 631,040 parameters."""

    def __init__(self, dimensions: int, channels: Sequence[int]):
        super().__init__()
        self.reduce = nn.ModuleList(convolution(dimensions, channels[level + 1], channels[level]) for level in range(4))
        self.refine = nn.ModuleList(Block(dimensions, channels[level], channels[level]) for level in range(4))

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Predictions of maps 1 to 4, of their shapes."""
        return [
            refine(reduce(resize(deeper, finer.shape[2:])))
            for reduce, refine, finer, deeper in zip(self.reduce, self.refine, maps[:-1], maps[1:], strict=True)
        ]


class Teacher(nn.Module):
    """Encoder, decoder and, for training alone, the head; in training noise is added to what the decoder is given.

    `noise`: Gaussian of mean 0 and standard deviation `noise_std`, or uniform in [0, noise_std), the released code's, whose mean the
    decoder would learn to expect; on the maps of `noise_levels`, counted from 1.
    """

    def __init__(
        self, dimensions: int = 3, width: int = 16, noise: Literal["gaussian", "uniform"] = "gaussian", noise_std: float = 1.0,
        noise_levels: Sequence[int] = (1, 2, 3, 4, 5),
    ):  # fmt: skip
        super().__init__()
        channels = channels_of(width, dimensions)
        self.encoder, self.decoder, self.head = (part(dimensions, channels) for part in (Encoder, Decoder, Head))
        self.noise, self.noise_std, self.noise_levels = noise, noise_std, tuple(noise_levels)
        initialise(self)

    def forward(self, image: Tensor) -> Reconstruction:
        """Of an image (B, 1, ...)."""
        features = self.encoder(image)
        return Reconstruction(self.decoder(self.disturbed(features)), features, self.head(features))

    def disturbed(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """The maps with noise, drawn by torch's generator; in evaluation mode as they are."""
        if not self.training:
            return list(maps)
        draw = torch.randn_like if self.noise == "gaussian" else torch.rand_like
        return [x + self.noise_std * draw(x) if level in self.noise_levels else x for level, x in enumerate(maps, 1)]

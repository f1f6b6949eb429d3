"""The generator of UTAD-Net: two encoder-decoder pairs, of the whole slice and of its tumour, joined at their deepest maps.

Source: Huang et al., arXiv:2403.20168, and its released code. Letters: B samples, M sequences, S pixels per axis of a slice,
w = width, L = levels, s = S / 2^L pixels per axis of the deepest map.
"""

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mstkd.models.critics import initialise

Branches = Literal["full", "global", "no_local_encoder", "no_local_decoder"]

SLOPE, FUSION_SLOPE = 0.01, 0.1  # of LeakyReLU


class Translation(NamedTuple):
    """What a generator makes of a slice: the same slice as another sequence shows it."""

    image: Tensor  # (B, 1, S, S) float32 in [-1, 1]
    tumour: Tensor | None  # the same, of the tumour alone; None: this generator has no local decoder
    fused: Tensor  # (B, 2^L w, s, s): the deepest map, from which all decoders start


class Generator(nn.Module):
    """Published setting: the defaults with 4 sequences and `fusion_norm="batch"`: 106,783,874 parameters.

    `branches`: which parts there are. Without the local encoder the global one stands in for it, also in the skips; without the
    local decoder there is no tumour image; `global` has neither, nor a fusion: its deepest map goes straight to its decoder.
    """

    def __init__(
        self, sequences: int, width: int = 64, levels: int = 4, fusion_norm: Literal["instance", "batch"] = "instance", branches: Branches = "full",
    ):  # fmt: skip
        super().__init__()
        local_encoder, local_decoder = branches in ("full", "no_local_decoder"), branches in ("full", "no_local_encoder")
        deepest = width * 2**levels
        self.global_encoder = Encoder(1 + sequences, width, levels)
        self.local_encoder = Encoder(1 + sequences, width, levels) if local_encoder else None
        self.fusion = None if branches == "global" else Fusion(deepest, fusion_norm)
        self.global_decoder = Decoder(width, levels)
        self.local_decoder = Decoder(width, levels) if local_decoder else None
        initialise(self)

    def forward(self, whole: Tensor, target: Tensor, local: Tensor | None = None) -> Translation:
        """Of slices `whole` (B, 1, S, S) in [-1, 1] towards the sequences `target` (B, M), one-hot.

        `local`: what the local encoder sees, (B, 1, S, S): the tumour image, or the whole slice where none is given.
        """
        fused, skips = self.global_encoder(with_target(whole, target))
        local_skips = skips
        if self.local_encoder is not None:
            deepest, local_skips = self.local_encoder(with_target(whole if local is None else local, target))
            fused = self.fusion(fused, deepest)
        elif self.fusion is not None:
            fused = self.fusion(fused, fused)
        tumour = self.local_decoder(fused, local_skips) if self.local_decoder is not None else None
        return Translation(self.global_decoder(fused, skips), tumour, fused)


def with_target(image: Tensor, target: Tensor) -> Tensor:
    """(B, 1 + M, S, S): the slice and, as constant maps, the one-hot code (B, M) of the sequence that it shall become."""
    return torch.cat([image, target[:, :, None, None].expand(-1, -1, *image.shape[2:]).to(image.dtype)], 1)


class Encoder(nn.Module):
    """Levels of two convolutions and a pooling, then a centre of two convolutions."""

    def __init__(self, inputs: int, width: int, levels: int):
        super().__init__()
        channels = [inputs, *(width * 2**level for level in range(levels + 1))]
        self.levels = nn.ModuleList(Double(*pair) for pair in zip(channels[:-1], channels[1:], strict=True))

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The deepest map (B, 2^L w, s, s) and the skips, shallow to deep: (B, w, S, S), (B, 2w, S/2, S/2), ..."""
        *levels, centre = self.levels
        skips = []
        for level in levels:
            skips.append(level(x))
            x = F.max_pool2d(skips[-1], 2)
        return centre(x), skips


class Decoder(nn.Module):
    """From the deepest map back to slices through an encoder's skips."""

    def __init__(self, width: int, levels: int, outputs: int = 1):
        super().__init__()
        self.levels = nn.ModuleList(Up(width * 2**level) for level in reversed(range(levels)))
        self.out = nn.Conv2d(width, outputs, 1)

    def forward(self, x: Tensor, skips: list[Tensor]) -> Tensor:
        """(B, outputs, S, S) float32 in [-1, 1]."""
        for level, skip in zip(self.levels, reversed(skips), strict=True):
            x = level(x, skip)
        return torch.tanh(self.out(x).float())


class ConvUnit(nn.Sequential):
    """3x3 convolution, instance normalisation, LeakyReLU."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__(nn.Conv2d(inputs, outputs, 3, padding=1), nn.InstanceNorm2d(outputs), nn.LeakyReLU(SLOPE))


class Double(nn.Sequential):
    """Two convolution units."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__(ConvUnit(inputs, outputs), ConvUnit(outputs, outputs))


class Up(nn.Module):
    """Twice as many pixels per axis and half as many channels, joined with a skip of as many."""

    def __init__(self, width: int):
        super().__init__()
        self.widen = nn.Sequential(nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True), ConvUnit(2 * width, width))
        self.join = Double(2 * width, width)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        return self.join(torch.cat([skip, self.widen(x)], 1))


class Fusion(nn.Module):
    """Two maps of equal shape to one: their sum, product and maximum through two convolutions (Hi-Net's block).

    `norm="batch"` is the released code's. Running statistics then mix slices that were given and slices that were made, and a
    frozen teacher, which uses them, differs from a student of the same weights; with `instance` the two agree.
    """

    def __init__(self, channels: int, norm: Literal["instance", "batch"]):
        super().__init__()
        normalise = nn.BatchNorm2d if norm == "batch" else nn.InstanceNorm2d
        layers = []
        for inputs in (3 * channels, channels):
            layers += [nn.Conv2d(inputs, channels, 3, padding=1), normalise(channels), nn.LeakyReLU(FUSION_SLOPE)]
        self.layers = nn.Sequential(*layers)

    def forward(self, one: Tensor, other: Tensor) -> Tensor:
        return self.layers(torch.cat([one + other, one * other, torch.maximum(one, other)], 1))

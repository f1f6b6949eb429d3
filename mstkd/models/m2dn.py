"""The network of M2DN: an encoder and a decoder for every sequence, and between them a U-Net that joins them and knows what is missing.

Source: Meng et al., IEEE TMI 2024 (document 10444695). From it: separate encoders of strided 3x3 convolution, GroupNorm and ReLU; concatenation;
residual blocks with squeeze-and-excitation, bilinear steps down and up; the mask as constant maps beside the 16 x 16 bottleneck; an output per
sequence. The rest is the smallest network that has these. Letters: B samples, M sequences, S pixels per axis, w = width, c channels.
The mask is v (B, M) float: 1 = the sequence is missing, 0 = it is observed.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

REDUCTION = 8  # of the squeeze-and-excitation
LONGEST_PERIOD = 10_000  # of the time embedding, steps


class M2DNNetwork(nn.Module):
    """f(M_t, t, v): every clean sequence of a stack. Defaults with S = 256: three levels down to 16 pixels per axis."""

    def __init__(self, sequences: int, size: int, width: int = 32, bottleneck: int = 16, mask: bool = True, mask_at_input: bool = False):
        """`size` S is 2^n times 2 x `bottleneck`, n >= 1. Without `mask` the network is not told what is missing."""
        super().__init__()
        levels = round(math.log2(size // 2 // bottleneck))
        channels = [2 * width, *[4 * width] * (levels - 1)]
        deep, times = 4 * width, 16 * width
        self.mask, self.mask_at_input = mask, mask_at_input
        self.encoders = nn.ModuleList(ModalityEncoder(1 + (sequences if mask_at_input else 0), width) for _ in range(sequences))
        self.merge = nn.Conv2d(sequences * width, 2 * width, 1)
        self.time = TimeEmbedding(4 * width, times)
        self.down = nn.ModuleList(Residual(i, o, times) for i, o in zip([2 * width, *channels[:-1]], channels, strict=True))
        self.middle = Residual(channels[-1], deep, times)
        self.masked = Residual(deep + (sequences if mask else 0), deep, times)
        below = [*channels[1:], deep]
        self.up = nn.ModuleList(Residual(i + o, o, times) for i, o in zip(reversed(below), reversed(channels), strict=True))
        self.decoders = nn.ModuleList(ModalityDecoder(2 * width, width) for _ in range(sequences))

    def forward(self, x: Tensor, t: Tensor, missing: Tensor) -> Tensor:
        """(B, M, S, S) float32 in [-1, 1] from x (B, M, S, S), t (B,) from 1 and v (B, M)."""
        maps = missing[:, :, None, None].to(x.dtype)
        told = maps.expand(-1, -1, *x.shape[2:])
        encoded = [
            encode(torch.cat([plane, told], 1) if self.mask_at_input else plane) for encode, plane in zip(self.encoders, x.split(1, 1), strict=True)
        ]
        x, time, skips = self.merge(torch.cat(encoded, 1)), self.time(t), []
        for block in self.down:
            skips.append(block(x, time))
            x = F.interpolate(skips[-1], scale_factor=0.5, mode="bilinear", align_corners=False)
        x = self.middle(x, time)
        x = self.masked(torch.cat([x, maps.to(x.dtype).expand(-1, -1, *x.shape[2:])], 1) if self.mask else x, time)
        for block, skip in zip(self.up, reversed(skips), strict=True):
            x = block(torch.cat([doubled(x), skip], 1), time)
        x = doubled(x)
        return torch.cat([decode(x) for decode in self.decoders], 1)


class ModalityEncoder(nn.Sequential):
    """Of one sequence: half as many pixels per axis."""

    def __init__(self, inputs: int, width: int):
        super().__init__(nn.Conv2d(inputs, width, 3, stride=2, padding=1), norm(width), nn.ReLU())


class ModalityDecoder(nn.Module):
    """Of one sequence, at full resolution; fresh, it returns 0."""

    def __init__(self, inputs: int, width: int):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(inputs, width, 3, padding=1), norm(width), nn.ReLU(), nn.Conv2d(width, 1, 3, padding=1))
        nn.init.zeros_(self.body[-1].weight)
        nn.init.zeros_(self.body[-1].bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 1, S, S) float32 in [-1, 1]."""
        return torch.tanh(self.body(x).float())


class TimeEmbedding(nn.Module):
    """Sines and cosines of t (Vaswani et al., NeurIPS 2017) through two linear layers."""

    def __init__(self, waves: int, channels: int):
        super().__init__()
        self.waves = waves
        self.layers = nn.Sequential(nn.Linear(waves, channels), nn.SiLU(), nn.Linear(channels, channels))

    def forward(self, t: Tensor) -> Tensor:
        """(B, channels) of t (B,)."""
        half = self.waves // 2
        rates = torch.exp(-math.log(LONGEST_PERIOD) / half * torch.arange(half, device=t.device))
        angles = t.float()[:, None] * rates
        return self.layers(torch.cat([angles.sin(), angles.cos()], 1))


class Residual(nn.Module):
    """Two normalised convolutions, told the time between them and gated channel by channel, beside a skip."""

    def __init__(self, inputs: int, outputs: int, times: int):
        super().__init__()
        self.first = nn.Sequential(norm(inputs), nn.ReLU(), nn.Conv2d(inputs, outputs, 3, padding=1))
        self.time = nn.Linear(times, outputs)
        self.second = nn.Sequential(norm(outputs), nn.ReLU(), nn.Conv2d(outputs, outputs, 3, padding=1))
        self.gate = SqueezeExcitation(outputs)
        self.skip = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """(B, outputs, s, s) from x (B, inputs, s, s) and the time's embedding (B, times)."""
        inner = self.first(x) + self.time(time)[:, :, None, None]
        return self.skip(x) + self.gate(self.second(inner))


class SqueezeExcitation(nn.Module):
    """Each channel times a share in (0, 1) that the means of all channels decide (Hu et al., CVPR 2018)."""

    def __init__(self, channels: int):
        super().__init__()
        narrow = max(channels // REDUCTION, 1)
        self.layers = nn.Sequential(nn.Linear(channels, narrow), nn.ReLU(), nn.Linear(narrow, channels), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        return x * self.layers(x.mean((2, 3)))[:, :, None, None]


def doubled(x: Tensor) -> Tensor:
    """Twice as many pixels per axis."""
    return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)


def norm(channels: int) -> nn.GroupNorm:
    """Of as many groups as divide the channels, 8 at most."""
    return nn.GroupNorm(next(groups for groups in range(8, 0, -1) if channels % groups == 0), channels)

"""The segmentation network of MST-KDNet; teacher and student are two of these.

Source: MST-KDNet (MICCAI 2025, arXiv:2507.22626). Letters: B samples, M sequences, K channels, w = width.
"""

import math
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mstkd.models.convolution import Conv3d, cpu_arithmetic, in_block_layout, in_plain_layout
from mstkd.models.transformer_unet import PATCH, TransformerUNet, norm_factory

STRIDE = 8 * PATCH  # image voxels per token and axis of the published network: what a crop must be divisible by


def stride(last_stride: int = 2) -> int:
    """Image voxels per token and axis where the last of the three down-samplings has this stride."""
    return STRIDE * last_stride // 2


class Features(NamedTuple):
    """Everything that one network exposes to the losses; (x, y, z) = (X, Y, Z) / 8, or / 4 with last_stride 1."""

    logits: Tensor  # (B, K, X, Y, Z)
    encoded: Tensor  # (B, 8w, x, y, z)
    style: Tensor  # (B, 8w, x, y, z)
    content: Tensor  # (B, 8w, x, y, z)
    decoded: tuple[Tensor, ...]  # z3, z6, z9, z12 of the transformer's decoder
    attention: tuple[Tensor, ...]  # 4 x (B, heads, N, N)


class MSTKDNetwork(nn.Module):
    """Residual encoder, transformer U-module, style and content maps, residual decoder.

    `crop` (X, Y, Z) sizes the position embedding; other inputs divisible by 32 resample it. `last_stride` 1 leaves the last
    down-sampling out, so that a small crop has eight times as many tokens.
    Published setting: the defaults, 4 inputs, 4 outputs, crop 160 x 192 x 128: 154,334,148 parameters.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        crop: tuple[int, int, int],
        width: int = 16,
        decoder_width: int = 16,
        embed_dim: int = 768,
        layers: int = 12,
        heads: int = 12,
        mlp_dim: int = 2048,
        dropout: float = 0.1,
        fuse_dropout: float = 0.2,
        norm: Literal["batch", "instance"] = "batch",
        bn_eval: Literal["running", "batch"] = "running",
        last_stride: Literal[1, 2] = 2,
    ):
        super().__init__()
        w, w2, w4, w8 = (width * k for k in (1, 2, 4, 8))
        self.last_stride = last_stride
        grid = tuple(size // stride(last_stride) for size in crop)
        self.stem = nn.Sequential(Conv3d(in_channels, w), ResidualBlock(w))
        self.down1 = nn.Sequential(Conv3d(w, w2, stride=2), ResidualBlock(w2), ResidualBlock(w2))
        self.down2 = Conv3d(w2, w4, stride=2)
        self.blocks2 = nn.Sequential(ResidualBlock(w4), ResidualBlock(w4))
        self.down3 = Conv3d(w4, w8, stride=last_stride)
        self.transformer = TransformerUNet(
            width, decoder_width, grid, embed_dim, layers, heads, mlp_dim, dropout, norm_factory(norm, bn_eval)
        )
        self.bottleneck = nn.Sequential(*(ResidualBlock(w8) for _ in range(4)))
        self.style = nn.Conv3d(w4 + w8 + w8, w8, 1)
        self.fuse = nn.Sequential(nn.Conv3d(w8 + w8, w8, 1), nn.Dropout(fuse_dropout))
        self.up2, self.up1, self.up0 = Up(w4, last_stride), Up(w2), Up(w)
        self.head = nn.Conv3d(w, out_channels, 1)

    @property
    def tokens(self) -> int:
        """N of the crop that it was made for."""
        return math.prod(self.transformer.grid)

    def forward(self, image: Tensor) -> Features:
        """Features of `image` (B, M, X, Y, Z), each axis divisible by `stride(last_stride)`."""
        c1 = self.stem(image)
        c2 = self.down1(c1)
        d2 = self.down2(c2)
        c3 = self.blocks2(d2)
        encoded = self.down3(c3)
        with cpu_arithmetic(encoded) as unet_input:
            unet = self.transformer(unet_input)
        transformed = unet.output + encoded
        content = self.bottleneck(transformed)
        style = self.style(torch.cat([F.max_pool3d(d2, self.last_stride), encoded, transformed], 1))
        x = self.fuse(torch.cat([style, content], 1))
        x = self.up0(self.up1(self.up2(x, c3), c2), c1)
        return Features(self.head(in_plain_layout(x)), encoded, style, content, unet.decoded, unet.attention)


class ResidualBlock(nn.Module):
    """Pre-activation residual block: two times GroupNorm(8), ReLU, 3^3 convolution, plus the input."""

    def __init__(self, channels: int):
        super().__init__()
        layers = [layer for _ in range(2) for layer in (nn.GroupNorm(8, channels), nn.ReLU(), Conv3d(channels, channels))]
        self.body = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        norm1, _, conv1, norm2, _, conv2 = self.body  # each convolution does its normalisation and ReLU, too
        return conv2(conv1(x, norm1), norm2).add_(x)


class Up(nn.Module):
    """Halve the channels, multiply the size by `scale` (nearest), add the skip, refine."""

    def __init__(self, channels: int, scale: int = 2):
        super().__init__()
        self.scale = scale
        self.reduce = nn.Conv3d(2 * channels, channels, 1)
        self.block = ResidualBlock(channels)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        reduced = in_block_layout(self.reduce(in_plain_layout(x)))  # the skip's layout already while there are few voxels
        return self.block(F.interpolate(reduced, scale_factor=self.scale, mode="nearest").add_(skip))

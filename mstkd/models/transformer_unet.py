"""The transformer U-module of MST-KDNet: a UNETR-like encoder-decoder on the deepest convolutional map.

Source: MST-KDNet (MICCAI 2025, arXiv:2507.22626), with UNETR (WACV 2022) as its model.
Letters: B samples, N tokens, E embedding width, H heads; "grid" is a token grid, 1/32 of the image per axis.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mstkd.models.convolution import Conv3d

PATCH = 4  # voxels of the input map per token and axis

Norm = Callable[[int], nn.Module]


class UNetFeatures(NamedTuple):
    """What the U-module returns for an input map (B, 8w, x, y, z); w is the trunk's width."""

    output: Tensor  # (B, 8w, x, y, z)
    decoded: tuple[Tensor, Tensor, Tensor, Tensor]  # shallow to deep: 4d at x, 8d at 2x, 16d at x, 32d at x/2; d is the decoder's width
    attention: tuple[Tensor, ...]  # of the tapped layers, each (B, H, N, N), rows sum to 1


class TransformerUNet(nn.Module):
    """Tokens of 4^3 voxels, a transformer with four evenly spaced taps, and a convolutional decoder of the taps."""

    def __init__(
        self,
        width: int,
        decoder_width: int,
        grid: tuple[int, int, int],
        embed_dim: int,
        layers: int,
        heads: int,
        mlp_dim: int,
        dropout: float,
        norm: Norm,
    ):
        super().__init__()
        self.grid = grid  # that the position embedding was made for
        self.taps = tuple(layers * k // 4 - 1 for k in (1, 2, 3, 4))
        self.patch_embedding = nn.Conv3d(8 * width, embed_dim, PATCH, stride=PATCH)
        self.position = nn.Parameter(torch.zeros(1, grid[0] * grid[1] * grid[2], embed_dim))
        self.dropout = nn.Dropout(dropout)
        self.layers = nn.ModuleList(Layer(embed_dim, heads, mlp_dim, dropout) for _ in range(layers))
        self.decoder = Decoder(decoder_width, embed_dim, 8 * width, norm)

    def forward(self, x: Tensor) -> UNetFeatures:
        tokens = self.patch_embedding(x)
        grid = tokens.shape[2:]
        hidden = self.dropout(tokens.flatten(2).transpose(1, 2) + on_grid(self.position, self.grid, tuple(grid)))
        states, maps = [], []
        for index, layer in enumerate(self.layers):
            hidden, attention = layer(hidden, tapped=index in self.taps)
            if attention is not None:
                states.append(hidden.transpose(1, 2).unflatten(2, grid))
                maps.append(attention)
        output, decoded = self.decoder(x, states)
        return UNetFeatures(output, decoded, tuple(maps))


def on_grid(position: Tensor, trained: tuple[int, int, int], grid: tuple[int, int, int]) -> Tensor:
    """Position embeddings (B, N, E) of the grid `trained`, resampled where `grid` is another one."""
    if grid == trained:
        return position
    volume = position.transpose(1, 2).unflatten(2, trained)
    return F.interpolate(volume, size=grid, mode="trilinear", align_corners=False).flatten(2).transpose(1, 2)


class Layer(nn.Module):
    """Pre-norm transformer layer: self-attention, then a ReLU MLP."""

    def __init__(self, embed_dim: int, heads: int, mlp_dim: int, dropout: float):
        super().__init__()
        self.attention_norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.attention = Attention(embed_dim, heads, dropout)
        self.mlp_norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(embed_dim, mlp_dim), nn.ReLU(), nn.Dropout(dropout), nn.Linear(mlp_dim, embed_dim))

    def forward(self, hidden: Tensor, tapped: bool) -> tuple[Tensor, Tensor | None]:
        """The next hidden state (B, N, E) and, if `tapped`, the attention map (B, H, N, N)."""
        mixed, attention = self.attention(self.attention_norm(hidden), tapped)
        hidden = hidden + mixed
        return hidden + self.mlp(self.mlp_norm(hidden)), attention


class Attention(nn.Module):
    """Multi-head self-attention; the map is materialised only where it is distilled, before dropout."""

    def __init__(self, embed_dim: int, heads: int, dropout: float):
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(embed_dim, embed_dim) for _ in range(4))
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden: Tensor, tapped: bool) -> tuple[Tensor, Tensor | None]:
        query, key, value = (
            projection(hidden).unflatten(2, (self.heads, -1)).transpose(1, 2) for projection in (self.query, self.key, self.value)
        )
        attention = None
        if tapped:
            attention = (query @ key.transpose(2, 3) * query.shape[-1] ** -0.5).softmax(-1)
            mixed = self.dropout(attention).to(value.dtype) @ value
        else:
            mixed = F.scaled_dot_product_attention(query, key, value, dropout_p=self.dropout.p if self.training else 0.0)
        return self.dropout(self.out(mixed.transpose(1, 2).flatten(2))), attention


class Decoder(nn.Module):
    """Joins the four taps, deepest first, and the input map; z3 is deliberately brought back to the input's size."""

    def __init__(self, width: int, embed_dim: int, trunk_channels: int, norm: Norm):
        super().__init__()
        w2, w4, w8, w16, w32 = (width * k for k in (2, 4, 8, 16, 32))
        self.up12 = _upsample(embed_dim, w32)
        self.tap9 = _up_conv(embed_dim, w32, norm)
        self.join9 = nn.Sequential(_conv(2 * w32, w32, norm), _conv(w32, w32, norm), _conv(w32, w32, norm), _upsample(w32, w16))
        self.tap6 = nn.Sequential(_up_conv(embed_dim, w32, norm), _up_conv(w32, w16, norm))
        self.join6 = nn.Sequential(_conv(2 * w16, w16, norm), _conv(w16, w16, norm), _upsample(w16, w8))
        self.tap3 = nn.Sequential(_up_conv(embed_dim, w32, norm), _up_conv(w32, w16, norm), _up_conv(w16, w8, norm))
        self.join3 = nn.Sequential(_conv(2 * w8, w8, norm, stride=2), _conv(w8, w8, norm, stride=2), _upsample(w8, w4))
        self.tap0 = nn.Sequential(_conv(trunk_channels, w2, norm), _conv(w2, w4, norm))
        self.join0 = nn.Sequential(_conv(2 * w4, w4, norm), _conv(w4, w4, norm), nn.Conv3d(w4, trunk_channels, 1))

    def forward(self, x: Tensor, states: list[Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor, Tensor]]:
        """The output map and (z3, z6, z9, z12) from the input map and the tapped states (B, E, *grid), shallow to deep."""
        z12 = self.up12(states[3])
        z9 = self.join9(torch.cat([self.tap9(states[2]), z12], 1))
        z6 = self.join6(torch.cat([self.tap6(states[1]), z9], 1))
        z3 = self.join3(torch.cat([self.tap3(states[0]), z6], 1))
        return self.join0(torch.cat([self.tap0(x), z3], 1)), (z3, z6, z9, z12)


class BatchNorm3d(nn.BatchNorm3d):
    """Batch normalisation that can keep to batch statistics in evaluation.

    With `eval_statistics="batch"` each sample is normalised by its own statistics, which is what batch
    statistics are at batch 1 (the published evaluation); no sample sees another and no buffer changes.
    """

    def __init__(self, channels: int, eval_statistics: Literal["running", "batch"]):
        super().__init__(channels)
        self.eval_statistics = eval_statistics

    def forward(self, x: Tensor) -> Tensor:
        if self.training or self.eval_statistics == "running":
            return super().forward(x)
        return F.instance_norm(x, weight=self.weight, bias=self.bias, eps=self.eps)


def norm_factory(norm: Literal["batch", "instance"], bn_eval: Literal["running", "batch"]) -> Norm:
    """channels -> normalisation layer of the decoder."""
    if norm == "instance":
        return lambda channels: nn.InstanceNorm3d(channels, affine=True)
    return lambda channels: BatchNorm3d(channels, bn_eval)


def _upsample(inputs: int, outputs: int) -> nn.Module:
    return nn.ConvTranspose3d(inputs, outputs, 2, stride=2)


def _conv(inputs: int, outputs: int, norm: Norm, stride: int = 1) -> nn.Module:
    return nn.Sequential(Conv3d(inputs, outputs, stride), norm(outputs), nn.ReLU())


def _up_conv(inputs: int, outputs: int, norm: Norm) -> nn.Module:
    return nn.Sequential(_upsample(inputs, outputs), _conv(outputs, outputs, norm))

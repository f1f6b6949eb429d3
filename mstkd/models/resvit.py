"""A generator with residual transformer blocks at its deepest map, after ResViT (Dalmaz et al., IEEE TMI 2022, arXiv:2106.16031).

Letters: B samples, M sequences, S pixels per axis of a slice, w = width, s = S / 4 pixels per axis of the deepest map,
N = (S / 16)^2 tokens, E embedding width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mstkd.models.critics import initialise
from mstkd.models.transformer_unet import Layer
from mstkd.models.utad_net import Translation, with_target

STRIDE = 16  # pixels per token and axis


class ResViTGenerator(nn.Module):
    """Convolutional encoder, `blocks` residual blocks, decoder; those at the positions `attending` also see the slice as tokens.

    As published the attending blocks share one transformer. Its layers are those of MST-KDNet (ReLU), it begins with random weights, and
    its tokens' positions are shared, too; tokens and map are joined by a plain convolution. Other norms and paddings than published.
    """

    def __init__(
        self, sequences: int, size: int, width: int = 64, blocks: int = 9, attending: Sequence[int] = (0, 5),
        embed_dim: int = 768, layers: int = 12, heads: int = 12, mlp_dim: int = 3072, dropout: float = 0.1,
    ):  # fmt: skip
        super().__init__()
        deepest = 4 * width
        self.encoder = nn.Sequential(_conv(1 + sequences, width, 7), _conv(width, 2 * width, 3, stride=2), _conv(2 * width, deepest, 3, stride=2))
        self.transformer = Transformer(embed_dim, layers, heads, mlp_dim, dropout, (size // STRIDE) ** 2) if attending else None
        self.blocks = nn.ModuleList(Attending(deepest, embed_dim) if position in attending else Residual(deepest) for position in range(blocks))
        self.decoder = nn.Sequential(_up(deepest, 2 * width), _up(2 * width, width), nn.Conv2d(width, 1, 7, padding=3))
        initialise(self)

    def forward(self, whole: Tensor, target: Tensor) -> Translation:
        """Of slices (B, 1, S, S) in [-1, 1] towards the sequences `target` (B, M), one-hot; `fused` is the deepest map (B, 4w, s, s)."""
        x = self.encoder(with_target(whole, target))
        for block in self.blocks:
            x = block(x, self.transformer) if isinstance(block, Attending) else block(x)
        return Translation(torch.tanh(self.decoder(x).float()), None, x)


class Residual(nn.Module):
    """Two 3x3 convolutions around which the map passes."""

    def __init__(self, channels: int):
        super().__init__()
        self.layers = nn.Sequential(_conv(channels, channels, 3), nn.Conv2d(channels, channels, 3, padding=1), nn.InstanceNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


class Attending(nn.Module):
    """Aggregated residual transformer block: the map and its tokens' context, joined by a 1x1 convolution, then a residual block."""

    def __init__(self, channels: int, embed_dim: int):
        super().__init__()
        middle, small = _conv(channels, 2 * channels, 3, stride=2), _conv(2 * channels, 4 * channels, 3, stride=2)
        self.shrink = nn.Sequential(middle, small, nn.Conv2d(4 * channels, embed_dim, 1))
        self.grow = nn.Sequential(_up(embed_dim, 2 * channels), _up(2 * channels, channels))
        self.join = nn.Sequential(nn.Conv2d(2 * channels, channels, 1), nn.InstanceNorm2d(channels), nn.ReLU())
        self.residual = Residual(channels)

    def forward(self, x: Tensor, transformer: nn.Module) -> Tensor:
        """(B, C, s, s); `transformer` is the generator's."""
        return self.residual(self.join(torch.cat([x, self.grow(transformer(self.shrink(x)))], 1)))


class Transformer(nn.Module):
    """Pre-norm layers over the pixels of a map (B, E, s / 4, s / 4), N of them."""

    def __init__(self, embed_dim: int, layers: int, heads: int, mlp_dim: int, dropout: float, tokens: int):
        super().__init__()
        self.position = nn.Parameter(torch.zeros(1, tokens, embed_dim))
        self.layers = nn.ModuleList(Layer(embed_dim, heads, mlp_dim, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        hidden = x.flatten(2).transpose(1, 2) + self.position
        for layer in self.layers:
            hidden, _ = layer(hidden, tapped=False)
        return self.norm(hidden).transpose(1, 2).unflatten(2, x.shape[2:])


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Module:
    return nn.Sequential(nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2), nn.InstanceNorm2d(outputs), nn.ReLU())


def _up(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(nn.ConvTranspose2d(inputs, outputs, 3, stride=2, padding=1, output_padding=1), nn.InstanceNorm2d(outputs), nn.ReLU())

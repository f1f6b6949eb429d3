"""mmFormer: an encoder for each sequence, a transformer across sequences, and a decoder of masked features.

Source: mmFormer (Zhang et al., MICCAI 2022, arXiv:2206.02425), written from the paper's description.
Letters: B samples, M sequences, K channels, w width, N tokens of one sequence (one per 16^3 voxels), E embedding width.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mstkd.models.convolution import Conv3d
from mstkd.models.symmetric import symmetric
from mstkd.models.transformer_unet import Layer, on_grid

LEVELS = 5
STRIDE = 2 ** (LEVELS - 1)  # image voxels per token and axis

Axes = tuple[int, int, int]


class Output(NamedTuple):
    """Logits (B, K, X, Y, Z); the last two are for training and empty in evaluation."""

    logits: Tensor
    separate: tuple[Tensor, ...]  # of the decoder that sees one sequence alone, for each one in the data's order
    deep: tuple[Tensor, ...]  # of the fused decoder's coarser levels, deepest first, resampled to the image


class MMFormer(nn.Module):
    """Features of hidden sequences are replaced by zeros before sequences meet.

    Sequences are known by their names: listed in another order, the same weights give the same output. `crop` (X, Y, Z)
    sizes the position embeddings; other inputs divisible by 16 resample them.
    """

    def __init__(
        self,
        sequences: Sequence[str],
        out_channels: int,
        crop: Axes,
        width: int = 8,
        embed_dim: int = 512,
        layers: int = 1,
        heads: int = 8,
        mlp_dim: int = 4096,
        dropout: float = 0.1,
    ):
        super().__init__()
        self.sequences = tuple(sequences)
        self.joined = sorted(self.sequences)  # the order in which their features are put side by side
        count, channels = len(self.sequences), [width * 2**level for level in range(LEVELS)]
        grid = tuple(size // STRIDE for size in crop)
        shape = {"grid": grid, "embed_dim": embed_dim, "layers": layers, "heads": heads, "mlp_dim": mlp_dim, "dropout": dropout}
        self.encoders = nn.ModuleDict({name: SequenceEncoder(width, **shape) for name in self.joined})
        self.across = TokenTransformer(count, **shape)
        self.from_tokens = nn.Conv3d(count * embed_dim, count * channels[-1], 1)
        self.fusions = nn.ModuleList(Fusion(count * c, c) for c in channels)
        self.decoder = Decoder(width, out_channels)
        self.deep_heads = nn.ModuleList(nn.Conv3d(c, out_channels, 1) for c in reversed(channels[1:]))
        self.separate_decoder = Decoder(width, out_channels)

    def forward(self, image: Tensor, available: Tensor, present: Tensor | None = None) -> Output:
        """Output for `image` (B, M, X, Y, Z) of which the fused decoder sees what is `available` (B, M) bool.

        In training each sequence that is `present` (B, M) bool is also decoded alone, and every encoder runs, whatever
        there is: ranks stay in step. In evaluation only the available ones are encoded, but in a graph (`symmetric`).
        """
        shown = available if present is None else present
        image = torch.where(shown[:, :, None, None, None], image, 0.0)
        encoded = self._encode(image, shown)
        *skips, deep = self._fused(encoded, available)
        logits, states = self.decoder(deep, skips)
        if not self.training:
            return Output(logits, (), ())
        separate = tuple(self.separate_decoder(one.maps[-1], one.maps[:-1])[0] for one in encoded.values())
        coarse = [head(state) for head, state in zip(self.deep_heads, states, strict=True)]
        return Output(logits, separate, tuple(F.interpolate(c, image.shape[2:], mode="trilinear") for c in coarse))

    def _encode(self, image: Tensor, shown: Tensor) -> dict[str, "Encoded"]:
        """In the data's order."""
        found: dict[str, Encoded | None] = {}
        for index, name in enumerate(self.sequences):
            needed = self.training or symmetric() or bool(shown[:, index].any())
            found[name] = self.encoders[name](image[:, index : index + 1]) if needed else None
        like = next(one for one in found.values() if one is not None)
        nothing = Encoded(tuple(torch.zeros_like(m) for m in like.maps), torch.zeros_like(like.tokens))
        return {name: one or nothing for name, one in found.items()}

    def _fused(self, encoded: dict[str, "Encoded"], available: Tensor) -> list[Tensor]:
        """One map per level, full resolution first, of the available sequences."""
        index = {name: self.sequences.index(name) for name in self.joined}

        def joined(features: dict[str, Tensor]) -> Tensor:
            # where, not multiplication: what a hidden sequence holds must not pass as NaN
            visible = (available[:, index[name]].view(-1, *[1] * (features[name].ndim - 1)) for name in self.joined)
            return torch.cat([torch.where(v, features[n], 0.0) for n, v in zip(self.joined, visible, strict=True)], 1)

        maps = [joined({name: one.maps[level] for name, one in encoded.items()}) for level in range(LEVELS - 1)]
        grid = tuple(next(iter(encoded.values())).maps[-1].shape[2:])
        tokens = self.across(joined({name: one.tokens for name, one in encoded.items()}), grid)
        side_by_side = tokens.unflatten(1, (len(self.joined), -1)).transpose(2, 3).flatten(1, 2).unflatten(2, grid)
        return [fuse(x) for fuse, x in zip(self.fusions, [*maps, self.from_tokens(side_by_side)], strict=True)]


class Encoded(NamedTuple):
    maps: tuple[Tensor, ...]  # LEVELS of them, (B, w 2^l, (X, Y, Z) / 2^l)
    tokens: Tensor  # (B, N, E)


class SequenceEncoder(nn.Module):
    """Convolutions for what is near, a transformer over the deepest map for what is far, within one sequence."""

    def __init__(self, width: int, grid: Axes, embed_dim: int, **transformer):
        super().__init__()
        channels = [width * 2**level for level in range(LEVELS)]
        self.levels = nn.ModuleList([Level(1, width, stride=1, first=True)])
        self.levels += [Level(c // 2, c, stride=2) for c in channels[1:]]
        self.to_tokens = nn.Conv3d(channels[-1], embed_dim, 1)
        self.within = TokenTransformer(1, grid, embed_dim, **transformer)

    def forward(self, image: Tensor) -> Encoded:
        maps = [image]
        for level in self.levels:
            maps.append(level(maps[-1]))
        tokens = self.to_tokens(maps[-1])
        return Encoded(tuple(maps[1:]), self.within(tokens.flatten(2).transpose(1, 2), tuple(tokens.shape[2:])))


class TokenTransformer(nn.Module):
    """Layers of self-attention over `count` token grids, one after the other, each with its position embedding."""

    def __init__(self, count: int, grid: Axes, embed_dim: int, layers: int, heads: int, mlp_dim: int, dropout: float):
        super().__init__()
        self.grid = grid  # that the position embedding was made for
        self.position = nn.Parameter(torch.zeros(count, grid[0] * grid[1] * grid[2], embed_dim))
        self.layers = nn.ModuleList(Layer(embed_dim, heads, mlp_dim, dropout) for _ in range(layers))

    def forward(self, tokens: Tensor, grid: Axes) -> Tensor:
        """(B, count N, E) of the same; `grid` (x, y, z) has N tokens."""
        hidden = tokens + on_grid(self.position, self.grid, grid).flatten(0, 1)
        for layer in self.layers:
            hidden, _ = layer(hidden, tapped=False)
        return hidden


class Level(nn.Module):
    """A convolution that may halve the size, and a residual pair of them."""

    def __init__(self, inputs: int, outputs: int, stride: int, first: bool = False):
        super().__init__()
        self.enter = Conv3d(inputs, outputs) if first else _conv(inputs, outputs, stride)  # the image is not normalised again
        self.body = nn.Sequential(_conv(outputs, outputs), _conv(outputs, outputs))

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        return x + self.body(x)


class Fusion(nn.Module):
    """Features of all sequences, side by side, to those of one."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.body = nn.Sequential(_point(inputs, outputs), _conv(outputs, outputs), _point(outputs, outputs))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class Join(nn.Module):
    """Double the size, halve the channels, take in the skip."""

    def __init__(self, channels: int):
        super().__init__()
        self.reduce = _conv(2 * channels, channels)
        self.body = nn.Sequential(_conv(2 * channels, channels), _point(channels, channels))

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        x = self.reduce(F.interpolate(x, skip.shape[2:], mode="trilinear"))
        return self.body(torch.cat([skip, x], 1))


class Decoder(nn.Module):
    """From the deepest map up through the skips to logits."""

    def __init__(self, width: int, out_channels: int):
        super().__init__()
        self.joins = nn.ModuleList(Join(width * 2**level) for level in reversed(range(LEVELS - 1)))
        self.head = nn.Conv3d(width, out_channels, 1)

    def forward(self, deep: Tensor, skips: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Logits at the size of the first skip, and the maps before the last one, deepest first."""
        states = [deep]
        for join, skip in zip(self.joins, reversed(skips), strict=True):
            states.append(join(states[-1], skip))
        return self.head(states[-1]), states[:-1]


def _conv(inputs: int, outputs: int, stride: int = 1) -> nn.Module:
    return nn.Sequential(nn.InstanceNorm3d(inputs), nn.LeakyReLU(0.2), Conv3d(inputs, outputs, stride))


def _point(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(nn.InstanceNorm3d(inputs), nn.LeakyReLU(0.2), nn.Conv3d(inputs, outputs, 1))

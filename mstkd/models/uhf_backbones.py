"""Segmenters that adaptive fusion can be attached to: an encoder that hands maps to a decoder, and nothing else.

Letters: B samples, K channels of the logits, "..." the spatial axes.
"""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from monai.networks.nets import SegResNet, SwinUNETR
from torch import Tensor, nn

from mstkd.models.uhf_layers import BATCH_NORMS, LEVELS, POOLS, TRANSPOSED, channels_of, convolution, initialise


class Backbone(nn.Module):
    """`channels` of the encoder's maps, in their order."""

    channels: tuple[int, ...]

    @abstractmethod
    def encode(self, image: Tensor) -> list[Tensor]:
        """All that the decoder is given of an image (B, 1, ...)."""

    @abstractmethod
    def decode(self, maps: Sequence[Tensor]) -> Tensor:
        """Logits (B, K, ...)."""

    def forward(self, image: Tensor) -> Tensor:
        return self.decode(self.encode(image))


class Double(nn.Sequential):
    """Twice: convolution, batch norm, ReLU."""

    def __init__(self, dimensions: int, inputs: int, outputs: int):
        layers: list[nn.Module] = []
        for channels in (inputs, outputs):
            layers += [convolution(dimensions, channels, outputs, 3), BATCH_NORMS[dimensions](outputs), nn.ReLU()]
        super().__init__(*layers)


class Up(nn.Module):
    """A transposed convolution, padded or cropped to the skip, joined with it."""

    def __init__(self, dimensions: int, deeper: int, channels: int):
        super().__init__()
        double = TRANSPOSED[dimensions](deeper, channels, 4, stride=2, padding=1, bias=False)
        self.up = nn.Sequential(double, BATCH_NORMS[dimensions](channels), nn.ReLU())
        self.merge = Double(dimensions, 2 * channels, channels)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        x = self.up(x)
        missing = [wanted - there for wanted, there in zip(skip.shape[2:], x.shape[2:], strict=True)]
        x = F.pad(x, [side for short in reversed(missing) for side in (0, short)])  # an odd size lacks one voxel at its end
        return self.merge(torch.cat([x, skip], 1))


class UNet(Backbone):
    """The released base network. Volumes, width 16, K = 4: encoder 7,074,416 parameters, decoder 4,549,344."""

    def __init__(self, outputs: int, dimensions: int = 3, width: int = 16):
        super().__init__()
        self.channels = channels_of(width, dimensions)
        self.encoder = nn.ModuleList(Double(dimensions, *pair) for pair in zip((1, *self.channels[:-1]), self.channels, strict=True))
        if dimensions == 3:
            self.encoder.append(Double(dimensions, self.channels[-1], self.channels[-1]))  # the bottleneck
        self.pool = POOLS[dimensions](2)
        ups = [Up(dimensions, self.channels[level + 1], self.channels[level]) for level in range(LEVELS - 2, -1, -1)]
        self.decoder = nn.ModuleList([*ups, convolution(dimensions, self.channels[0], outputs)])
        initialise(self)

    def encode(self, image: Tensor) -> list[Tensor]:
        maps: list[Tensor] = []
        for level in self.encoder[:LEVELS]:
            maps.append(level(self.pool(maps[-1]) if maps else image))
        for bottleneck in self.encoder[LEVELS:]:
            maps[-1] = bottleneck(maps[-1])
        return maps

    def decode(self, maps: Sequence[Tensor]) -> Tensor:
        *skips, x = maps
        *ups, out = self.decoder
        for up, skip in zip(ups, reversed(skips), strict=True):
            x = up(x, skip)
        return out(x)


class MonaiSegResNet(Backbone):
    def __init__(self, outputs: int, dimensions: int = 3, **arguments: Any):
        super().__init__()
        self.net = SegResNet(spatial_dims=dimensions, in_channels=1, out_channels=outputs, **arguments)
        self.channels = tuple(self.net.init_filters * 2**level for level in range(len(self.net.down_layers)))

    def encode(self, image: Tensor) -> list[Tensor]:
        return self.net.encode(image)[1]

    def decode(self, maps: Sequence[Tensor]) -> Tensor:
        return self.net.decode(maps[-1], list(reversed(maps)))


class MonaiSwinUNETR(Backbone):
    """The maps are those that the decoder joins: five of the encoder's blocks, and the transformer's fourth as it is."""

    def __init__(self, outputs: int, dimensions: int = 3, feature_size: int = 24, **arguments: Any):
        super().__init__()
        self.net = SwinUNETR(in_channels=1, out_channels=outputs, feature_size=feature_size, spatial_dims=dimensions, **arguments)
        self.channels = tuple(factor * feature_size for factor in (1, 1, 2, 4, 8, 16))

    def encode(self, image: Tensor) -> list[Tensor]:
        net = self.net
        first, second, third, fourth, fifth = net.swinViT(image, net.normalize)
        return [net.encoder1(image), net.encoder2(first), net.encoder3(second), net.encoder4(third), fourth, net.encoder10(fifth)]

    def decode(self, maps: Sequence[Tensor]) -> Tensor:
        net = self.net
        finest, second, third, fourth, fifth, x = maps
        for up, skip in ((net.decoder5, fifth), (net.decoder4, fourth), (net.decoder3, third), (net.decoder2, second), (net.decoder1, finest)):
            x = up(x, skip)
        return net.out(x)


BACKBONES: dict[str, type[Backbone]] = {"UNet": UNet, "SegResNet": MonaiSegResNet, "SwinUNETR": MonaiSwinUNETR}


def build_backbone(architecture: str, outputs: int, dimensions: int = 3, arguments: dict[str, Any] | None = None) -> Backbone:
    """One of BACKBONES with one input channel. Raises ValueError where the `arguments` do not fit its class."""
    try:
        return BACKBONES[architecture](outputs, dimensions, **(arguments or {}))
    except Exception as error:  # whatever MONAI raises about its arguments
        raise ValueError(f"{architecture}: {(str(error).strip().splitlines() or [type(error).__name__])[0].rpartition('__init__() ')[2]}") from None


def multiple_of(architecture: str, arguments: dict[str, Any]) -> int:
    """What each axis of this network's input must be divisible by; 1: any size will do."""
    if architecture == "SegResNet":
        return 2 ** (len(arguments.get("blocks_down", (1, 2, 2, 4))) - 1)
    return arguments.get("patch_size", 2) ** 5 if architecture == "SwinUNETR" else 1

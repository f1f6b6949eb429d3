"""The critics of a translation: is this slice real, and which sequence does it show?

Source: Huang et al., arXiv:2403.20168, and its released code; there the first LeakyReLU's slope of 0.001 is a slip, here all have 0.01.
"""

from itertools import pairwise
from typing import NamedTuple

from torch import Tensor, nn

SLOPE = 0.01  # of LeakyReLU


class Verdict(NamedTuple):
    realness: Tensor  # (B, 1, s, s) scores of patches, unbounded; s = S / 2^layers
    sequence: Tensor  # (B, M) logits: which sequence the slice shows


class Critic(nn.Module):
    """Strided convolutions without normalisation, and two heads. Defaults with 4 sequences of 128 pixels: 44,751,808 parameters."""

    def __init__(self, sequences: int, size: int, width: int = 64, layers: int = 6):
        """`size` S, pixels per axis, is a multiple of 2^layers."""
        super().__init__()
        channels = [1, *(width * 2**layer for layer in range(layers))]
        self.body = strided(channels)
        self.realness = nn.Conv2d(channels[-1], 1, 3, padding=1, bias=False)
        self.sequence = nn.Conv2d(channels[-1], sequences, size // 2**layers, bias=False)
        initialise(self)

    def forward(self, image: Tensor) -> Verdict:
        """Of slices (B, 1, S, S)."""
        features = self.body(image)
        return Verdict(self.realness(features), self.sequence(features).flatten(1))


class PatchCritic(nn.Module):
    """The same without the second head, and of any number of channels: whether patches of a pair are real (Isola et al., CVPR 2017)."""

    def __init__(self, inputs: int, width: int = 64, layers: int = 4):
        super().__init__()
        channels = [inputs, *(width * 2**layer for layer in range(layers))]
        self.body = strided(channels)
        self.realness = nn.Conv2d(channels[-1], 1, 3, padding=1)
        initialise(self)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, 1, s, s) of patches of images (B, inputs, S, S); s = S / 2^layers."""
        return self.realness(self.body(images))


def strided(channels: list[int]) -> nn.Sequential:
    """Convolutions from each number of channels to the next, each halving the pixels per axis."""
    body = nn.Sequential()
    for inputs, outputs in pairwise(channels):
        body.extend([nn.Conv2d(inputs, outputs, 4, stride=2, padding=1), nn.LeakyReLU(SLOPE)])
    return body


def initialise(network: nn.Module) -> None:
    """Kaiming-normal weights of convolutions (fan-in, slope 0) and N(1, 0.02) of batch normalisations, biases 0: as released."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            nn.init.kaiming_normal_(module.weight, a=0)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 1.0, 0.02)
        else:
            continue
        if module.bias is not None:
            nn.init.zeros_(module.bias)

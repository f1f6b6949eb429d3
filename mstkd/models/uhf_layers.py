"""The parts that the networks of UHF-guided segmentation share, for volumes and for slices.

Source: Oh et al., arXiv:2402.08409, and its released code. Letters: B samples, C channels, "..." the spatial axes: X Y Z, or X Y.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

LEVELS = 5
SLOPE = 0.01  # of LeakyReLU
CONVOLUTIONS = {2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
INSTANCE_NORMS = {2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}
BATCH_NORMS = {2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
POOLS = {2: nn.MaxPool2d, 3: nn.MaxPool3d}


def channels_of(width: int, dimensions: int) -> tuple[int, ...]:
    """Channels of the five levels: volumes double them from level to level, slices keep them."""
    return tuple(width * 2**level if dimensions == 3 else width for level in range(LEVELS))


def convolution(dimensions: int, inputs: int, outputs: int, kernel: int = 1) -> nn.Module:
    """Stride 1, same size, no bias."""
    return CONVOLUTIONS[dimensions](inputs, outputs, kernel, padding=kernel // 2, bias=False)


class Block(nn.Sequential):
    """Convolution, instance norm without weights, LeakyReLU; slices pass them twice."""

    def __init__(self, dimensions: int, inputs: int, outputs: int, kernel: int = 3):
        layers: list[nn.Module] = []
        for channels in (inputs,) if dimensions == 3 else (inputs, outputs):
            layers += [convolution(dimensions, channels, outputs, kernel), INSTANCE_NORMS[dimensions](outputs), nn.LeakyReLU(SLOPE)]
        super().__init__(*layers)


class Halving(nn.Sequential):
    """Convolution of kernel 4 and stride 2, instance norm without weights, LeakyReLU; odd sizes are halved downwards."""

    def __init__(self, dimensions: int, inputs: int, outputs: int):
        halve = CONVOLUTIONS[dimensions](inputs, outputs, 4, stride=2, padding=1, bias=False)
        super().__init__(halve, INSTANCE_NORMS[dimensions](outputs), nn.LeakyReLU(SLOPE))


class PatchCritic(nn.Module):
    """Is this image real, patch by patch? For images (B, 1, ...), 32 voxels per axis at least; a volume of 64^3 has 3^3 scores.

    Volumes with the published width: 697,344 parameters.
    """

    def __init__(self, dimensions: int, width: int = 16):
        super().__init__()
        channels = (1, *(width * 2**layer for layer in range(4)))
        self.body = nn.Sequential(*(Halving(dimensions, *pair) for pair in zip(channels[:-1], channels[1:], strict=True)))
        self.score = CONVOLUTIONS[dimensions](channels[-1], 1, 4, padding=1, bias=False)
        initialise(self)

    def forward(self, image: Tensor) -> Tensor:
        """Scores (B, 1, ...), unbounded: 1 is real."""
        return self.score(self.body(image))


def resize(x: Tensor, size: Sequence[int]) -> Tensor:
    """`x` (B, C, ...) brought to `size`, linearly along each axis."""
    if tuple(x.shape[2:]) == tuple(size):
        return x
    return F.interpolate(x, tuple(size), mode="trilinear" if x.dim() == 5 else "bilinear", align_corners=False)


def initialise(network: nn.Module) -> None:
    """Kaiming-normal weights of convolutions and linear layers (fan-in), N(1, 0.02) of batch norms, biases 0: as released."""
    for module in network.modules():
        if isinstance(module, (*CONVOLUTIONS.values(), *TRANSPOSED.values(), nn.Linear)):
            nn.init.kaiming_normal_(module.weight, a=SLOPE)
        elif isinstance(module, tuple(BATCH_NORMS.values())):
            nn.init.normal_(module.weight, 1.0, 0.02)
        else:
            continue
        if module.bias is not None:
            nn.init.zeros_(module.bias)

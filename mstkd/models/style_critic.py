"""The discriminator of MST-KDNet: tells a style map of the full input (0) from one of an incomplete input (1)."""

import torch.nn.functional as F
from torch import Tensor, nn

REFERENCE_KERNEL = (2, 3, 2)  # what the style map of a 160 x 192 x 128 crop has shrunk to before the last layer
SMALLEST = 8  # voxels per axis that three halvings need


class StyleCritic(nn.Module):
    """Three strided convolutions, then one logit per sample.

    The published last layer fits one crop only (`reference_head`); ours averages over voxels first, so any map works.
    Source: MST-KDNet (MICCAI 2025, arXiv:2507.22626); published width 128: 3,149,249 parameters with the reference head.
    """

    def __init__(self, channels: int = 128, reference_head: bool = False):
        super().__init__()
        layers, inputs = [], channels
        for outputs in (channels // 2, channels, 2 * channels):
            layers += [nn.Conv3d(inputs, outputs, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
            inputs = outputs
        pool = [] if reference_head else [nn.AdaptiveAvgPool3d(1)]
        head = nn.Conv3d(inputs, 1, REFERENCE_KERNEL if reference_head else 1)
        self.layers = nn.Sequential(*layers, *pool, head)

    def forward(self, style: Tensor) -> Tensor:
        """Logits (B,) for style maps (B, channels, x, y, z)."""
        missing = [max(0, SMALLEST - size) for size in style.shape[2:]]
        padding = [n for size in reversed(missing) for n in (size // 2, size - size // 2)]
        return self.layers(F.pad(style, padding)).flatten()

"""Global style matching of MST-KDNet (MICCAI 2025, arXiv:2507.22626): cross-Gram matrices of feature maps.

B samples, C channels, x y z voxels of the feature map.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def cross_gram(a: Tensor, b: Tensor) -> Tensor:
    """(B, C, C): `a b^T / n` of feature maps (B, C, x, y, z) with n voxels, sample by sample."""
    a, b = a.flatten(2), b.flatten(2)
    return a @ b.transpose(1, 2) / a.shape[2]


def style_matching(full: Sequence[Tensor], missing: Sequence[Tensor]) -> Tensor:
    """Mean squared difference of the three cross-Gram matrices of (encoder, style, content) maps, each (B, C, x, y, z)."""
    return (_matrices(full) - _matrices(missing)).square().mean()


def reference_style_matching(full: Sequence[Tensor], missing: Sequence[Tensor]) -> Tensor:
    """The released constants: matrices over (C n), squared norms over 4 C^2 (x y)^2, times 1e-4; z is left out.

    About 1e-14 of `style_matching`, hence without measurable effect; for parity runs.
    """
    channels, x, y = full[0].shape[1:4]
    difference = (_matrices(full) - _matrices(missing)) / channels
    return 1e-4 * difference.square().sum((0, 2, 3)).mean() / (4 * channels**2 * (x * y) ** 2)


def _matrices(features: Sequence[Tensor]) -> Tensor:
    """(3, B, C, C)."""
    encoded, style, content = features
    return torch.stack([cross_gram(encoded, content), cross_gram(style, encoded), cross_gram(content, style)])

"""Networks for slices, applied to volumes: one for each plane.

Letters: B samples, C channels, X Y Z voxels (RAS+), h w pixels of a slice.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from mstkd.models.symmetric import symmetric

AXES = {"axial": 4, "coronal": 3, "sagittal": 2}  # of a volume (B, C, X, Y, Z): what the plane's slices are counted along
TOGETHER = 16  # slices of a volume that a network is given at once


class Planes(nn.Module):
    """A network of its own for each plane, by the plane's name."""

    def __init__(self, networks: Mapping[str, nn.Module]):
        super().__init__()
        self.planes = nn.ModuleDict(networks)

    def forward(self, plane: str, *inputs):
        return self.planes[plane](*inputs)


def draw_slices(brain: Tensor, plane: str, count: int) -> Tensor:
    """(B, count) positions of slices that show brain (B, X, Y, Z), drawn with torch's generator, with replacement; any, where none does."""
    axis = AXES[plane] - 1
    shown = brain.movedim(axis, 1).flatten(2).any(2)
    return torch.multinomial(shown.float() + 1e-6, count, replacement=True)


def cut(volume: Tensor, plane: str, places: Tensor) -> Tensor:
    """The slices at `places` (B, n) of a volume (B, C, X, Y, Z), as (B n, C, h, w)."""
    return torch.cat([sample.index_select(AXES[plane] - 1, at).movedim(AXES[plane] - 1, 0) for sample, at in zip(volume, places, strict=True)])


def slice_by_slice(network: Callable[[Tensor], Tensor], volume: Tensor, plane: str) -> Tensor:
    """What `network`, (n, C, h, w) to (n, K, h, w), makes of every slice of a volume (B, C, X, Y, Z), as (B, K, X, Y, Z)."""
    axis = AXES[plane]
    slices = volume.movedim(axis, 1)  # (B, n, C, h, w)
    flat = slices.flatten(0, 1)
    made = network(flat) if symmetric() else torch.cat([network(part) for part in flat.split(TOGETHER)])  # a graph has no number of parts
    return made.unflatten(0, slices.shape[:2]).movedim(1, axis)

"""Overlap and surface distance of one region of one case.

Dice = 2 |P & T| / (|P| + |T|); both empty 1, one empty 0.
HD95 is the larger of the two directed 95th percentiles of Euclidean distance, in mm, between 6-connected surface
voxels (MONAI's `compute_hausdorff_distance`); both empty 0, one empty the image diagonal.
"""

from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import binary_erosion, distance_transform_edt, find_objects
from scipy.spatial import cKDTree

from mstkd.shards.spec import LabelScheme

Mask = NDArray[np.bool_]


def region_masks(labels: NDArray[np.uint8], scheme: LabelScheme) -> dict[str, Mask]:
    """Boolean masks (X, Y, Z) of the scheme's regions in a label map (X, Y, Z)."""
    masks = {}
    for region, values in scheme.regions.items():
        table = np.zeros(256, dtype=bool)
        table[list(values)] = True
        masks[region] = table[labels]
    return masks


def bounding_box(mask: Mask) -> tuple[slice, ...]:
    """The smallest box around the True voxels; `mask` must have one."""
    return find_objects(mask.view(np.uint8), max_label=1)[0]


def surface_voxels(mask: Mask) -> NDArray[np.intp]:
    """Indices (N, 3) of the voxels of `mask` with a 6-neighbour outside it; beyond the volume is outside."""
    if not mask.any():
        return np.empty((0, mask.ndim), dtype=np.intp)
    box = bounding_box(mask)
    inside = mask[box]
    surface = inside & ~binary_erosion(inside)
    return np.argwhere(surface) + [axis.start for axis in box]


def dice(prediction: Mask, truth: Mask) -> float:
    """Dice of two masks of one shape."""
    total = np.count_nonzero(prediction) + np.count_nonzero(truth)
    return float(2 * np.count_nonzero(prediction & truth) / total) if total else 1.0


class Reference:
    """One region of one case's truth, with the work that no prediction changes done once.

    truth (X, Y, Z) bool; spacing_mm per axis; diagonal_mm of the image on its original grid, the penalty when
    exactly one of truth and prediction is empty.
    """

    def __init__(self, truth: Mask, spacing_mm: tuple[float, ...], diagonal_mm: float):
        self.truth, self.spacing_mm, self.diagonal_mm = truth, spacing_mm, diagonal_mm
        self.voxels = int(np.count_nonzero(truth))

    @cached_property
    def _surface(self) -> NDArray[np.intp]:
        return surface_voxels(self.truth)

    @cached_property
    def _distance_mm(self) -> NDArray[np.float64]:
        """From every voxel to the nearest surface voxel of the truth."""
        elsewhere = np.ones(self.truth.shape, dtype=bool)
        elsewhere[tuple(self._surface.T)] = False
        return distance_transform_edt(elsewhere, sampling=self.spacing_mm)

    def hd95_mm(self, prediction: Mask, pooled: bool = False, one_empty_mm: float | None = None) -> float:
        """HD95 in mm; `pooled` takes one percentile over both directions together."""
        surface = surface_voxels(prediction)
        if not self.voxels and not len(surface):
            return 0.0
        if not self.voxels or not len(surface):
            return self.diagonal_mm if one_empty_mm is None else one_empty_mm
        to_truth = self._distance_mm[tuple(surface.T)]
        from_truth, _ = cKDTree(surface * np.asarray(self.spacing_mm)).query(self._surface * np.asarray(self.spacing_mm))
        if pooled:
            return float(np.percentile(np.concatenate([to_truth, from_truth]), 95))
        return float(max(np.percentile(to_truth, 95), np.percentile(from_truth, 95)))

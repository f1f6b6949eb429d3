"""Overlap and surface distance of one region of one case.

Dice = 2 |P & T| / (|P| + |T|); both empty 1, one empty 0.
HD95 is the larger of the two directed 95th percentiles of Euclidean distance, in mm, between 6-connected surface
voxels (MONAI's `compute_hausdorff_distance`); both empty 0, one empty the image diagonal.
ASSD is the mean of the same distances over the voxels of both surfaces together (MONAI's `compute_average_surface_distance`,
symmetric); empty as for HD95.
"""

from dataclasses import dataclass
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

    def distances(self, prediction: Mask) -> "SurfaceDistances":
        """From every surface voxel of either mask to the nearest one of the other."""
        surface = surface_voxels(prediction)
        if not self.voxels or not len(surface):
            return SurfaceDistances(np.empty(0), np.empty(0), self.diagonal_mm if self.voxels or len(surface) else 0.0)
        from_truth, _ = cKDTree(surface * np.asarray(self.spacing_mm)).query(self._surface * np.asarray(self.spacing_mm))
        return SurfaceDistances(self._distance_mm[tuple(surface.T)], from_truth, self.diagonal_mm)

    def hd95_mm(self, prediction: Mask, pooled: bool = False, one_empty_mm: float | None = None) -> float:
        """As `SurfaceDistances.hd95_mm`."""
        return self.distances(prediction).hd95_mm(pooled, one_empty_mm)


@dataclass(frozen=True)
class SurfaceDistances:
    """Distances in mm between two surfaces; none where one or both are empty."""

    from_prediction: NDArray[np.float64]  # per surface voxel of the prediction
    from_truth: NDArray[np.float64]
    empty_mm: float  # what stands for a distance where there is none: 0 if both are empty, else the image diagonal

    def hd95_mm(self, pooled: bool = False, one_empty_mm: float | None = None) -> float:
        """`pooled` takes one percentile over both directions together."""
        if not len(self.from_truth):
            return self._without(one_empty_mm)
        if pooled:
            return float(np.percentile(np.concatenate([self.from_prediction, self.from_truth]), 95))
        return float(max(np.percentile(self.from_prediction, 95), np.percentile(self.from_truth, 95)))

    def assd_mm(self, one_empty_mm: float | None = None) -> float:
        """Average symmetric surface distance."""
        if not len(self.from_truth):
            return self._without(one_empty_mm)
        return float(np.concatenate([self.from_prediction, self.from_truth]).mean())

    def _without(self, one_empty_mm: float | None) -> float:
        return one_empty_mm if self.empty_mm and one_empty_mm is not None else self.empty_mm

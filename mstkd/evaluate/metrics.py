"""Overlap and surface distance of one region of one case.

Dice = 2 |P & T| / (|P| + |T|); both empty 1, one empty 0.
HD95 is the larger of the two directed 95th percentiles of Euclidean distance, in mm, between 6-connected surface
voxels (MONAI's `compute_hausdorff_distance`); both empty 0, one empty the image diagonal.
ASSD is the mean of the same distances over the voxels of both surfaces together (MONAI's `compute_average_surface_distance`,
symmetric); empty as for HD95.
Sensitivity = |P & T| / |T|, specificity = |not P & not T| / |not T|, over all voxels of the image on its original grid.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import distance_transform_edt
from scipy.spatial import cKDTree

from mstkd.shards import geometry
from mstkd.shards.spec import LabelScheme

Mask = NDArray[np.bool_]
Box = tuple[slice, ...]
Voxels = NDArray[np.intp]  # (N, 3)


def region_masks(labels: NDArray[np.uint8], scheme: LabelScheme) -> dict[str, Mask]:
    """Boolean masks (X, Y, Z) of the scheme's regions in a label map (X, Y, Z)."""
    return {region: np.logical_or.reduce([labels == value for value in values]) for region, values in scheme.regions.items()}


def bounding_box(mask: Mask) -> Box:
    """The smallest box around the True voxels; the whole array if there are none."""
    return tuple(slice(start, stop) for start, stop in geometry.bounding_box(mask))


def surface_voxels(mask: Mask) -> Voxels:
    """Indices (N, 3) of the voxels of `mask` with a 6-neighbour outside it; beyond the volume is outside."""
    box = bounding_box(mask)
    inside = np.ascontiguousarray(mask[box])
    inner = inside.copy()  # moved by a voxel each way: several times faster than a general erosion
    for axis in range(mask.ndim):
        ahead, behind, edges = (_along(axis, part) for part in (slice(1, None), slice(None, -1), [0, -1]))
        inner[ahead] &= inside[behind]
        inner[behind] &= inside[ahead]
        inner[edges] = False
    surface = np.unravel_index(np.flatnonzero(inside & ~inner), inside.shape)
    return np.stack(surface, axis=1) + [axis.start for axis in box]


def _along(axis: int, part: slice | list[int]) -> tuple:
    return (slice(None),) * axis + (part,)


def dice(prediction: Mask, truth: Mask) -> float:
    """Dice of two masks of one shape."""
    return Overlap.of(prediction, truth, truth.size).dice


@dataclass(frozen=True)
class Overlap:
    """Voxels of two masks, and of the whole image that they lie in."""

    truth: int
    predicted: int
    both: int
    image: int

    @classmethod
    def of(cls, prediction: Mask, truth: Mask, image_voxels: int) -> "Overlap":
        """Of masks of one shape, outside which the image holds neither."""
        return cls(*(int(np.count_nonzero(mask)) for mask in (truth, prediction, prediction & truth)), image_voxels)

    @property
    def dice(self) -> float:
        total = self.truth + self.predicted
        return 2 * self.both / total if total else 1.0

    @property
    def sensitivity(self) -> float | None:
        """None where there is no truth."""
        return self.both / self.truth if self.truth else None

    @property
    def specificity(self) -> float | None:
        """None where the truth fills the image."""
        outside = self.image - self.truth
        return 1 - (self.predicted - self.both) / outside if outside else None


class Reference:
    """One region of one case's truth, with the work that no prediction changes done once.

    truth (X, Y, Z) bool; spacing_mm per axis; diagonal_mm of the image on its original grid, the penalty when
    exactly one of truth and prediction is empty; image_voxels of that grid, by default as many as `truth` has.
    """

    def __init__(self, truth: Mask, spacing_mm: tuple[float, ...], diagonal_mm: float, image_voxels: int | None = None):
        self.truth, self.spacing_mm, self.diagonal_mm = truth, spacing_mm, diagonal_mm
        self.image_voxels = image_voxels or truth.size
        self.voxels = int(np.count_nonzero(truth))
        self._known: tuple[Box, NDArray[np.int32]] | None = None

    @property
    def voxel_ml(self) -> float:
        return float(np.prod(self.spacing_mm)) / 1000

    @cached_property
    def surface(self) -> Voxels:
        return surface_voxels(self.truth)

    def overlap(self, prediction: Mask) -> Overlap:
        return Overlap.of(prediction, self.truth, self.image_voxels)

    def distances(self, prediction: Mask) -> "SurfaceDistances":
        """From every surface voxel of either mask to the nearest one of the other."""
        surface = surface_voxels(prediction)
        if not self.voxels or not len(surface):
            return SurfaceDistances.absent(self.surface, surface, self.diagonal_mm if self.voxels or len(surface) else 0.0)
        nearest, spacing = self._nearest(surface), np.asarray(self.spacing_mm)
        from_truth, index = search_tree(surface, self.spacing_mm).query(self.surface * spacing)
        from_prediction = np.linalg.norm((nearest - surface) * spacing, axis=1)
        return SurfaceDistances(surface, self.surface, from_prediction, from_truth, nearest, index, self.diagonal_mm)

    def hd95_mm(self, prediction: Mask, pooled: bool = False, one_empty_mm: float | None = None) -> float:
        """As `SurfaceDistances.hd95_mm`."""
        return self.distances(prediction).hd95_mm(pooled, one_empty_mm)

    def _nearest(self, points: Voxels) -> Voxels:
        """Of the truth's surface voxels the one nearest to each of `points` (N, 3)."""
        low, high = (bound([bound(self.surface, axis=0), bound(points, axis=0)], axis=0) for bound in (np.min, np.max))
        joint = tuple(slice(start, stop + 1) for start, stop in zip(low, high))
        if self._known is None or not _within(joint, self._known[0]):
            # the joint box first, the whole grid if a later prediction leaves it: a map costs as much as it has voxels
            box = joint if self._known is None else tuple(slice(0, length) for length in self.truth.shape)
            self._known = box, self._map(box)
        box, nearest = self._known
        start = np.array([axis.start for axis in box])
        return nearest[(slice(None), *(points - start).T)].T + start

    def _map(self, box: Box) -> NDArray[np.int32]:
        """(3, X', Y', Z'): for every voxel of `box` the nearest surface voxel of the truth, counted from the box's corner."""
        elsewhere = np.ones([axis.stop - axis.start for axis in box], dtype=bool)
        elsewhere[tuple((self.surface - [axis.start for axis in box]).T)] = False
        return distance_transform_edt(elsewhere, sampling=self.spacing_mm, return_distances=False, return_indices=True)


def search_tree(points: Voxels, spacing_mm: tuple[float, ...]) -> cKDTree:
    """Of `points` (N, 3), at their places in mm."""
    return cKDTree(points * np.asarray(spacing_mm), leafsize=32, compact_nodes=False, balanced_tree=False)  # built and asked faster on a lattice


def _within(box: Box, other: Box) -> bool:
    return all(there.start <= here.start and here.stop <= there.stop for here, there in zip(box, other))


@dataclass(frozen=True)
class SurfaceDistances:
    """Two surfaces, and distances in mm between them; none where one or both are empty."""

    prediction: Voxels  # (N, 3)
    truth: Voxels  # (M, 3)
    from_prediction: NDArray[np.float64]  # (N,)
    from_truth: NDArray[np.float64]  # (M,)
    nearest_truth: Voxels  # (N, 3): the voxel of the truth's surface that is nearest to each of the prediction's
    nearest_prediction: NDArray[np.intp]  # (M,): the other way, by its place in `prediction`
    empty_mm: float  # what stands for a distance where there is none: 0 if both are empty, else the image diagonal

    @classmethod
    def absent(cls, truth: Voxels, prediction: Voxels, empty_mm: float) -> "SurfaceDistances":
        """Where one or both are empty."""
        return cls(prediction, truth, np.empty(0), np.empty(0), np.empty((0, 3), np.intp), np.empty(0, np.intp), empty_mm)

    def hd95_mm(self, pooled: bool = False, one_empty_mm: float | None = None) -> float:
        """`pooled` takes one percentile over both directions together."""
        if not len(self.from_truth):
            return self._without(one_empty_mm)
        return percentile95(self.from_prediction, self.from_truth, pooled)

    def assd_mm(self, one_empty_mm: float | None = None) -> float:
        """Average symmetric surface distance."""
        if not len(self.from_truth):
            return self._without(one_empty_mm)
        return float(np.concatenate([self.from_prediction, self.from_truth]).mean())

    def _without(self, one_empty_mm: float | None) -> float:
        return one_empty_mm if self.empty_mm and one_empty_mm is not None else self.empty_mm


def percentile95(one_way: NDArray[np.float64], other_way: NDArray[np.float64], pooled: bool = False) -> float:
    """HD95 of the distances of two surfaces that are both there."""
    if pooled:
        return float(np.percentile(np.concatenate([one_way, other_way]), 95))
    return float(max(np.percentile(one_way, 95), np.percentile(other_way, 95)))

"""Lesion-wise scores of BraTS 2023 (Saluja et al., "BraTS 2023 Lesion-Wise Performance Metrics").

Truth components that meet after three 18-connected dilations are one lesion. Every 26-connected predicted component
that touches a lesion's dilation belongs to it; one that touches none is a false lesion.
"""

from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import binary_dilation, generate_binary_structure, label

from mstkd.evaluate.metrics import Box, Mask, Overlap, SurfaceDistances, Voxels, bounding_box, percentile95, search_tree

DILATIONS = 3
SMALLEST_MM3 = 50.0  # truth lesions up to this size are not scored
PENALTY_MM = 374.0
NEAR, EVERYWHERE = generate_binary_structure(3, 2), np.ones((3, 3, 3))
Numbers = NDArray[np.int32]  # of lesions or components, from 1; 0 is none


class Lesions:
    """The lesions of one region of one case's truth, with the work that no prediction changes done once."""

    def __init__(self, truth: Mask, spacing_mm: tuple[float, ...]):
        """truth (X, Y, Z) bool."""
        self.truth, self.spacing_mm = truth, spacing_mm

    @cached_property
    def _window(self) -> Box:
        """The truth's box as far as dilations reach, inside the volume."""
        box = bounding_box(self.truth)
        return tuple(slice(max(axis.start - DILATIONS, 0), min(axis.stop + DILATIONS, n)) for axis, n in zip(box, self.truth.shape))

    @cached_property
    def _grown(self) -> Numbers:
        """The dilations of the lesions, numbered, in the window. A lesion's own dilation is all of its number: what meets is one lesion."""
        box, window = bounding_box(self.truth), self._window
        numbers, _ = label(binary_dilation(np.pad(self.truth[box], DILATIONS), NEAR, DILATIONS), EVERYWHERE)  # lesions may meet beyond the volume
        return numbers[tuple(slice(w.start - b.start + DILATIONS, w.stop - b.start + DILATIONS) for w, b in zip(window, box))]

    @cached_property
    def _voxels(self) -> NDArray[np.intp]:
        """Of the lesions, by number."""
        return np.bincount(self._grown[self.truth[self._window]])

    def score(self, prediction: Mask, apart: SurfaceDistances) -> tuple[float, float]:
        """(mean Dice, mean HD95 in mm) over scored truth lesions and false lesions; without any (1, 0).

        prediction (X, Y, Z) bool; `apart`: how far its surface and that of the whole truth are apart.
        """
        found = Components(prediction, self._window) if prediction.any() else None
        if not self.truth.any():
            return (0.0, PENALTY_MM) if found else (1.0, 0.0)
        pairs = found.touching(self._grown) if found else np.empty((0, 2), np.int32)
        scores = []
        for number, voxels in enumerate(self._voxels):
            if number and voxels * np.prod(self.spacing_mm) > SMALLEST_MM3:
                scores.append(self._score(number, pairs[pairs[:, 0] == number, 1], found, apart))
        false = found.count - len(np.unique(pairs[:, 1])) if found else 0
        scores += [(0.0, PENALTY_MM)] * false
        means = np.mean(scores, axis=0) if scores else (1.0, 0.0)
        return float(means[0]), float(means[1])

    def _score(self, number: int, touching: Numbers, found: "Components", apart: SurfaceDistances) -> tuple[float, float]:
        """Of one lesion and the predicted components that touch its dilation."""
        if not len(touching):
            return 0.0, PENALTY_MM
        lesion = self.truth[self._window] & (self._grown == number)
        both = np.count_nonzero(lesion & np.isin(found.near, touching))
        overlap = Overlap(int(self._voxels[number]), int(found.voxels[touching].sum()), both, self.truth.size)
        return overlap.dice, self._hd95_mm(number, touching, found, apart)

    def _hd95_mm(self, number: int, touching: Numbers, found: "Components", apart: SurfaceDistances) -> float:
        """As of two whole regions: the surface of a part is that part of the surface, since parts never touch by a face."""
        theirs, ours = np.isin(found.numbers_at(apart.prediction), touching), self._numbers_at(apart.truth) == number
        nearest_theirs = theirs[apart.nearest_prediction[ours]]  # is the nearest of all among these?
        nearest_ours = self._numbers_at(apart.nearest_truth[theirs]) == number
        return percentile95(
            self._known(apart.from_prediction[theirs], nearest_ours, apart.prediction[theirs], apart.truth[ours]),
            self._known(apart.from_truth[ours], nearest_theirs, apart.truth[ours], apart.prediction[theirs]),
        )

    def _known(self, distance: NDArray[np.float64], right: Mask, points: Voxels, others: Voxels) -> NDArray[np.float64]:
        """Distances of `points` to the nearest of `others`: as they are where that is known to be `right`, else asked anew."""
        if right.all():
            return distance
        distance = distance.copy()
        distance[~right], _ = search_tree(others, self.spacing_mm).query(points[~right] * np.asarray(self.spacing_mm))
        return distance

    def _numbers_at(self, points: Voxels) -> Numbers:
        """The lesions of points (N, 3) of the truth."""
        return self._grown[tuple((points - [axis.start for axis in self._window]).T)]


class Components:
    """The 26-connected components of a predicted mask, numbered from 1."""

    def __init__(self, prediction: Mask, window: Box):
        self._box, self._window = bounding_box(prediction), window
        self._numbers, self.count = label(prediction[self._box], EVERYWHERE)
        self.voxels = np.bincount(self._numbers.ravel())  # by number; those outside all are number 0

    @cached_property
    def near(self) -> Numbers:
        """The numbers inside the window."""
        numbers = np.zeros([axis.stop - axis.start for axis in self._window], np.int32)
        common = [slice(max(b.start, w.start), max(min(b.stop, w.stop), max(b.start, w.start))) for b, w in zip(self._box, self._window)]
        inside, own = (tuple(slice(c.start - f.start, c.stop - f.start) for c, f in zip(common, frame)) for frame in (self._window, self._box))
        numbers[inside] = self._numbers[own]
        return numbers

    def touching(self, grown: Numbers) -> Numbers:
        """(N, 2): the pairs of a dilated lesion (of the window) and a component that share a voxel."""
        shared = (grown > 0) & (self.near > 0)
        return np.unique(np.stack([grown[shared], self.near[shared]], axis=1), axis=0)

    def numbers_at(self, points: Voxels) -> Numbers:
        """The components of points (N, 3) of the prediction."""
        return self._numbers[tuple((points - [axis.start for axis in self._box]).T)]

"""A folded brain in continuous coordinates (mm, RAS+, origin at the centre of the field of view), drawn on any grid.

Surfaces are level sets of approximate signed distances, so one subject can be drawn at any voxel size, and the
share of a voxel on one side of a surface (its partial volume) follows from the distance and the voxel size.
"""

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

FIELD_OF_VIEW_MM = 176.0
_LATTICE_SD = (151 / 315) ** 1.5  # of a cubic B-spline surface in 3D with independent unit normal coefficients

# Lateral ventricle, right side mirrored: (|x|, y, z, radius) along frontal horn, body, atrium, occipital horn; temporal horn
_VENTRICLE = [(8, 34, 2, 4.0), (10, 18, 13, 5.0), (11, -10, 20, 4.5), (21, -36, 12, 6.0), (19, -56, 6, 2.0)]
_TEMPORAL_HORN = [(21, -36, 12, 5.0), (31, -22, -10, 2.5), (32, 0, -18, 1.5)]
HORN_TIPS = [(8, 34, 2), (19, -56, 6)]
ATRIUM = (21, -36, 12)
_CEREBRUM = (0, -1, 6), (64, 80, 56)
_TEMPORAL = (42, 8, -22), (23, 40, 21)
_DEEP_GM = [((11, -16, 5), (8, 14, 9)), ((16, 17, 6), (5, 10, 8)), ((27, 3, 1), (6, 17, 9))]  # thalamus, caudate, putamen


class Grid:
    """`size`^3 voxels over the field of view; `axis_mm` (size,) are the voxel centres along each axis."""

    def __init__(self, size: int):
        self.size = size
        self.spacing_mm = FIELD_OF_VIEW_MM / size
        self.axis_mm = ((np.arange(size) - (size - 1) / 2) * self.spacing_mm).astype(np.float32)

    def smooth_field(self, rng: np.random.Generator, knot_mm: float) -> np.ndarray:
        """(X, Y, Z) float32, a smooth random field of unit variance: cubic B-splines on knots `knot_mm` apart."""
        count = int(np.ceil(FIELD_OF_VIEW_MM / knot_mm)) + 4
        return self.spline(rng.standard_normal((count,) * 3, dtype=np.float32), knot_mm) / np.float32(_LATTICE_SD)

    def spline(self, coefficients: np.ndarray, knot_mm: float) -> np.ndarray:
        """(X, Y, Z) cubic B-spline surface of a cube of coefficients centred on the field of view."""
        count = len(coefficients)
        distance = np.abs(self.axis_mm[:, None] / knot_mm - (np.arange(count) - (count - 1) / 2)[None])
        near = 2 / 3 - distance**2 + distance**3 / 2
        basis = np.where(distance < 1, near, np.clip(2 - distance, 0, None) ** 3 / 6).astype(np.float32)
        for _ in range(3):  # each turn draws the leading axis and moves it to the end
            coefficients = np.tensordot(coefficients, basis, (0, 1))
        return coefficients

    def share_inside(self, level_mm: np.ndarray) -> np.ndarray:
        """Share of a voxel on the positive side of a surface at signed distance `level_mm`."""
        return np.clip(0.5 + level_mm / np.float32(self.spacing_mm), 0, 1)


@dataclass
class Anatomy:
    """Where a subject's tissues are; all arrays (X, Y, Z). Distances in mm, positive inside what they name."""

    grid: Grid
    points_mm: np.ndarray  # (3, X, Y, Z): the voxel centres in the undeformed brain
    brain: np.ndarray  # bool
    csf: np.ndarray  # share of the voxel, as gm and wm; the three add up to 1 in the brain
    gm: np.ndarray
    wm: np.ndarray
    depth_mm: np.ndarray  # below the pial hull
    ventricle_mm: np.ndarray
    sulcus_mm: np.ndarray  # distance to the middle of the nearest sulcus
    white_mm: np.ndarray  # inside the grey-white border

    def tissue(self) -> np.ndarray:
        """(X, Y, Z) uint8: 1 CSF, 2 GM, 3 WM where it fills most of a brain voxel, else 0."""
        return ((np.argmax([self.csf, self.gm, self.wm], axis=0) + 1) * self.brain).astype(np.uint8)


def draw_brain(rng: np.random.Generator, size: int) -> Anatomy:
    """One subject's brain on a grid of `size`^3 voxels; the anatomy depends on `rng` alone, not on the size."""
    grid = Grid(size)
    points = _deformed_points(rng, grid)
    depth, part = _hull(points)
    brain = depth > -2.0  # a thin layer of CSF stays on a skull-stripped brain
    ventricle = _ventricles(points, rng.uniform(0.7, 1.5))
    sulcus = _sulci(rng, grid, points, depth, part)
    half_width = np.float32(rng.uniform(0.6, 1.1))  # of a sulcus: atrophy differs
    pial = np.minimum(depth, sulcus - half_width)
    white = pial - (3.5 + 0.3 * grid.smooth_field(rng, 30.0))
    deep_gm = np.max([ellipsoid(points, centre, axes, mirrored=True) for centre, axes in _DEEP_GM], axis=0)

    csf = np.maximum(np.minimum(grid.share_inside(-pial), _sheet_limit(grid, depth, half_width)), grid.share_inside(ventricle))
    wm = np.minimum(grid.share_inside(np.minimum(white, -deep_gm)), 1 - csf)
    wm, csf = wm * brain, csf * brain
    return Anatomy(grid, points, brain, csf, brain - csf - wm, wm, depth, ventricle, sulcus, white)


def ellipsoid(points: np.ndarray, centre: tuple, axes: tuple, mirrored: bool = False) -> np.ndarray:
    """Approximate signed distance (X, Y, Z) in mm, positive inside; `mirrored` draws it on both sides of x = 0."""
    x, y, z = points
    offset = [(np.abs(x) if mirrored else x) - centre[0], y - centre[1], z - centre[2]]
    scaled = [o / np.float32(a) for o, a in zip(offset, axes, strict=True)]
    norm = np.sqrt(sum(s * s for s in scaled))
    slope = np.sqrt(sum((s / np.float32(a)) ** 2 for s, a in zip(scaled, axes, strict=True)))
    return norm * (1 - norm) / (slope + np.float32(1e-6))


def surface_distance(field: np.ndarray, spacing_mm: float) -> np.ndarray:
    """First-order distance in mm to the zero level of a smooth field (X, Y, Z)."""
    slope = sum(g * g for g in np.gradient(field, np.float32(spacing_mm)))
    return np.abs(field) / np.sqrt(slope + np.float32(1e-6))


def _deformed_points(rng: np.random.Generator, grid: Grid) -> np.ndarray:
    """(3, X, Y, Z): size and proportions, then a smooth bending with a standard deviation of 2.5 mm."""
    scale = rng.normal(1, 0.03) * rng.normal(1, 0.025, 3)
    mesh = np.meshgrid(*(grid.axis_mm,) * 3, indexing="ij")
    return np.stack([mesh[i] / np.float32(scale[i]) + 2.5 * grid.smooth_field(rng, 45.0) for i in range(3)])


def _hull(points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Signed distance (positive inside) of the whole brain without its sulci, and which part lies deepest:
    0 cerebrum, 1 cerebellum, 2 brain stem."""
    x, y, z = points
    tentorium = z + 17 + np.float32(0.15) * y
    tentorium += 9 * np.exp(-((x / 24) ** 2) - ((y - 8) / 26) ** 2)  # the diencephalon reaches lower
    cerebrum = np.minimum(ellipsoid(points, *_CEREBRUM), tentorium)
    temporal = np.minimum(ellipsoid(points, *_TEMPORAL, mirrored=True), y + 38)
    cerebellum = np.minimum(ellipsoid(points, (19, -46, -32), (33, 29, 27), mirrored=True), -tentorium - 3)
    stem = _capsule(points, (0, -10, -12, 13), (0, -24, -64, 10))
    parts = np.stack([np.maximum(cerebrum, temporal), cerebellum, stem])
    return parts.max(axis=0), parts.argmax(axis=0)


def _sulci(rng: np.random.Generator, grid: Grid, points: np.ndarray, depth: np.ndarray, part: np.ndarray) -> np.ndarray:
    """Distance (X, Y, Z) in mm to the middle of the nearest sulcus or fissure.

    Sulci are the zero level of band-passed noise, stretched along the radius so that they run inwards, down to
    some 17 mm below the hull; in the cerebellum they are horizontal folia.
    """
    x, y, z = points
    folds = surface_distance(_fold_field(rng, grid, points), grid.spacing_mm)
    reach = 17 + 3 * grid.smooth_field(rng, 35.0)
    outer = np.maximum(ellipsoid(points, *_CEREBRUM), ellipsoid(points, *_TEMPORAL, mirrored=True))  # the base is smooth
    folds = np.hypot(folds, np.maximum(outer - reach, 0))
    folia = np.abs((z + np.float32(0.25) * np.abs(y + 48)) % np.float32(11) - np.float32(5.5))
    folia = np.hypot(folia, np.maximum(depth - 9, 0))
    callosum = ellipsoid(np.stack([np.zeros_like(x), y, z]), (0, -4, 6), (1, 42, 22))
    falx = np.hypot(x, np.maximum(callosum, 0))
    sylvian = (z + 4 - np.float32(0.3) * y - np.float32(0.5) * (np.abs(x) - 45)) / np.float32(1.16)
    sylvian = np.hypot(sylvian, np.maximum(35 - np.abs(x), 0))
    sylvian = np.hypot(sylvian, np.maximum(np.abs(y - 4) - 26, 0)) - np.float32(0.6)
    cerebral = np.minimum(np.minimum(folds, falx), sylvian)
    return np.where(part == 0, cerebral, np.where(part == 1, folia, np.float32(99)))


def _fold_field(rng: np.random.Generator, grid: Grid, points: np.ndarray) -> np.ndarray:
    """(X, Y, Z) band-passed noise, nearly constant along the radius."""
    knot_mm, count = 5.0, 44
    per_mm = np.fft.fftfreq(count, knot_mm)
    frequency = np.sqrt(sum(f**2 for f in np.meshgrid(per_mm, per_mm, per_mm, indexing="ij")))
    band = np.exp(-(((frequency - 1 / 23) / 0.006) ** 2))  # waves of some 23 mm: a sulcus every 12 mm
    noise = np.fft.ifftn(np.fft.fftn(rng.standard_normal((count,) * 3)) * band).real.astype(np.float32)
    fine = Grid(64).spline(noise / noise.std(), knot_mm)
    radius = np.sqrt(sum(p * p for p in points)) + 1
    index = points * (np.float32(62) / radius) ** np.float32(0.65) / np.float32(FIELD_OF_VIEW_MM / 64) + np.float32(31.5)
    return ndimage.map_coordinates(fine, index, order=1, mode="nearest")


def _sheet_limit(grid: Grid, depth: np.ndarray, half_width: float) -> np.ndarray:
    """The largest share of a voxel that a sulcus, thinner than a voxel, can fill; outside the hull all of it."""
    return np.where(depth > 0, np.float32(min(1, 2 * half_width / grid.spacing_mm + 0.15)), 1)


def _ventricles(points: np.ndarray, scale: float) -> np.ndarray:
    """Signed distance (X, Y, Z) in mm, positive inside."""
    sides = np.stack([np.abs(points[0]), points[1], points[2]])
    parts = [
        _capsule(sides, (*a[:3], a[3] * scale), (*b[:3], b[3] * scale))
        for curve in (_VENTRICLE, _TEMPORAL_HORN)
        for a, b in zip(curve, curve[1:], strict=False)
    ]
    third = ellipsoid(points, (0, -8, 0), (2.2 * scale, 13, 10))
    fourth = ellipsoid(points, (0, -33, -38), (7, 5, 9))
    return np.max([*parts, third, fourth], axis=0)


def _capsule(points: np.ndarray, start: tuple, stop: tuple) -> np.ndarray:
    """Signed distance to a tapering rod between two (x, y, z, radius), positive inside."""
    origin, axis = np.float32(start[:3]), np.float32(stop[:3]) - np.float32(start[:3])
    offset = [p - o for p, o in zip(points, origin, strict=True)]
    along = np.clip(sum(o * a for o, a in zip(offset, axis, strict=True)) / np.float32(axis @ axis), 0, 1)
    distance = np.sqrt(sum((o - along * a) ** 2 for o, a in zip(offset, axis, strict=True)))
    return np.float32(start[3]) + along * np.float32(stop[3] - start[3]) - distance

"""Tumours, and what only looks like one: lesions drawn into an anatomy as shares of each voxel.

A tumour is a set of nested irregular level sets in mm, positive inside: core, necrosis within its enhancing rim,
a non-enhancing part beside it, and oedema that follows the white matter.
"""

from dataclasses import dataclass
from functools import partial

import numpy as np

from mstkd.shards.anatomy import ATRIUM, HORN_TIPS, Anatomy, surface_distance

NECROTIC, OEDEMA, ENHANCING = 1, 2, 4  # BraTS 2018; 1 is also the non-enhancing core
KINDS = {"none": 0.06, "nonenhancing": 0.14, "enhancing": 0.80}  # shares of the cohort
NONENHANCING_PART_SHARE = 0.40  # of the enhancing tumours


@dataclass
class Tumour:
    """Signed distances (X, Y, Z) in mm, positive inside; -inf where a subject lacks the part."""

    oedema_mm: np.ndarray
    nonenhancing_mm: np.ndarray
    enhancing_mm: np.ndarray  # the rim with all that it encloses
    necrosis_mm: np.ndarray  # what the rim encloses

    def shares(self, anatomy: Anatomy) -> dict[str, np.ndarray]:
        """Share of each voxel that a part fills, (X, Y, Z); together at most 1."""
        inside = anatomy.grid.share_inside
        ring = inside(self.enhancing_mm)
        necrosis = np.minimum(inside(self.necrosis_mm), ring)
        nonenhancing = np.minimum(inside(self.nonenhancing_mm), 1 - ring)
        oedema = np.minimum(inside(self.oedema_mm), 1 - ring - nonenhancing)
        return {"oedema": oedema, "nonenhancing": nonenhancing, "necrosis": necrosis, "enhancing": ring - necrosis}

    def label(self, rng: np.random.Generator, anatomy: Anatomy) -> np.ndarray:
        """(X, Y, Z) uint8 in the brats2018 scheme: the contours, off by up to half a voxel as drawn ones are."""
        grid = anatomy.grid
        painted = np.zeros(anatomy.brain.shape, np.uint8)
        order = (self.oedema_mm, OEDEMA), (self.nonenhancing_mm, NECROTIC), (self.enhancing_mm, ENHANCING), (self.necrosis_mm, NECROTIC)
        for level, value in order:
            jitter = 0.5 * grid.spacing_mm * np.clip(grid.smooth_field(rng, 2.5 * grid.spacing_mm), -1, 1)
            painted[level + jitter > 0] = value
        return painted * anatomy.brain


def draw_tumour(rng: np.random.Generator, anatomy: Anatomy) -> Tumour | None:
    """A subject's tumour in the cerebral white matter, or None: 6 % have none, 14 % one that does not enhance."""
    kind = rng.choice(list(KINDS), p=list(KINDS.values()))
    if kind == "none":
        return None
    field = partial(anatomy.grid.smooth_field, rng)
    radius = rng.uniform(12, 23)
    reach = radius + rng.uniform(9, 17)
    turn = np.linalg.qr(rng.standard_normal((3, 3)))[0]
    offset = anatomy.points_mm - _centre(rng, anatomy)[:, None, None, None]
    distance = _norm(np.tensordot(np.float32(turn / np.exp(rng.normal(0, 0.15, 3))), offset, (1, 0)))

    within = np.minimum(anatomy.depth_mm - 1, -anatomy.ventricle_mm - 0.5)
    shape = field(13.0)
    core = np.minimum(radius * (1 + 0.22 * shape) - distance, within)
    spread = reach * (1 + 0.15 * shape + 0.18 * field(16.0)) - distance
    oedema = np.min([spread, anatomy.white_mm + 3.5, within], axis=0)  # white matter and the swollen cortex above it
    nowhere = np.full_like(core, -np.inf)
    if kind == "nonenhancing":
        return Tumour(oedema, core, nowhere, nowhere)
    thickness = rng.uniform(5.5, 10.0) * (1 + 0.4 * field(9.0))
    necrosis = core - np.maximum(thickness, 0)  # patchy: no rim where the thickness falls to 0
    if rng.random() >= NONENHANCING_PART_SHARE:
        return Tumour(oedema, nowhere, core, necrosis)
    aside = offset - np.float32(radius * turn[0])[:, None, None, None]
    part = radius * (rng.uniform(0.6, 0.9) + 0.2 * field(12.0)) - _norm(aside)
    return Tumour(oedema, np.minimum(part, within), core, necrosis)


def draw_distractors(rng: np.random.Generator, anatomy: Anatomy) -> dict[str, np.ndarray]:
    """Shares (X, Y, Z) of what a classifier may take for tumour, all labelled 0.

    hyperintensity: spots in the white matter and periventricular caps; choroid: the plexus in the atria;
    vessel: veins along the sulci and the sagittal sinus.
    """
    inside = anatomy.grid.share_inside
    hyperintensity = np.maximum(_spots(rng, anatomy), _caps(rng, anatomy)) * anatomy.wm
    choroid = inside(rng.uniform(3, 5.5) - _distance(anatomy, ATRIUM, mirrored=True)) * inside(anatomy.ventricle_mm - 0.5)
    choroid = 0.9 * choroid * anatomy.csf
    vessel = np.minimum(_vessels(rng, anatomy), 1 - hyperintensity - choroid)
    return {"hyperintensity": hyperintensity, "choroid": choroid, "vessel": vessel}


def _centre(rng: np.random.Generator, anatomy: Anatomy) -> np.ndarray:
    """A point in mm deep in the cerebrum, clear of the midline and the ventricles."""
    eligible = (anatomy.white_mm > 1) & (anatomy.depth_mm > 13) & (anatomy.ventricle_mm < -7)
    eligible &= (np.abs(anatomy.points_mm[0]) > 14) & (anatomy.points_mm[2] > -12)
    places = np.flatnonzero(eligible)
    return anatomy.points_mm.reshape(3, -1)[:, places[int(rng.random() * len(places))]]


def _spots(rng: np.random.Generator, anatomy: Anatomy) -> np.ndarray:
    deep = np.flatnonzero((anatomy.white_mm > 2) & (anatomy.points_mm[2] > 5))
    spots = np.zeros_like(anatomy.wm)
    for _ in range(rng.integers(1, 9)):
        centre = anatomy.points_mm.reshape(3, -1)[:, deep[int(rng.random() * len(deep))]]
        spots = np.maximum(spots, anatomy.grid.share_inside(rng.uniform(1.5, 4.0) - _distance(anatomy, centre)))
    return spots


def _caps(rng: np.random.Generator, anatomy: Anatomy) -> np.ndarray:
    lining = anatomy.grid.share_inside(rng.uniform(1.0, 4.0) + anatomy.ventricle_mm)
    near_tip = np.max([rng.uniform(8, 14) - _distance(anatomy, tip, mirrored=True) for tip in HORN_TIPS], axis=0)
    return lining * anatomy.grid.share_inside(near_tip)


def _vessels(rng: np.random.Generator, anatomy: Anatomy) -> np.ndarray:
    """Veins: the curves where sulci meet the zero level of another smooth field; the sinus: a tube on the midline."""
    grid, (x, y, z) = anatomy.grid, anatomy.points_mm
    across = surface_distance(grid.smooth_field(rng, 13.0), grid.spacing_mm)
    veins = rng.uniform(0.6, 1.3) - np.hypot(anatomy.sulcus_mm, across)
    veins = np.where(anatomy.depth_mm < 14, veins, -np.float32(9))
    sinus = np.where((z > -8) & (y < 60), 2.5 - np.hypot(x, anatomy.depth_mm), -np.float32(9))
    return grid.share_inside(np.maximum(veins, sinus)) * anatomy.brain


def _distance(anatomy: Anatomy, centre: np.ndarray | tuple, mirrored: bool = False) -> np.ndarray:
    x, y, z = anatomy.points_mm
    return np.sqrt(((np.abs(x) if mirrored else x) - centre[0]) ** 2 + (y - centre[1]) ** 2 + (z - centre[2]) ** 2)


def _norm(vectors: np.ndarray) -> np.ndarray:
    return np.sqrt(np.einsum("i...,i...->...", vectors, vectors))

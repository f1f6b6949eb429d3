"""Where the brain is: a given mask, or the union of what is not background."""

from functools import reduce
from typing import Literal

import numpy as np
from scipy.ndimage import label as connected

from mstkd.errors import UserError
from mstkd.shards.dataset import Volume
from mstkd.shards.geometry import bounding_box, in_stored_order

BORDER_SHARE = 0.5  # of the voxels on the six faces that one value must fill to be the background


def background_value(data: np.ndarray, background: Literal["zero", "border"], volume: Volume) -> float:
    """The value of what is not brain in `data` (3 axes).

    `zero`: exactly 0, as in skull-stripped data. `border`: the value that fills the volume's six faces. Never
    "below 0": brain voxels may be negative. Raises UserError where no value fills half of the faces.
    """
    if background == "zero":
        return 0.0
    faces = [np.take(data, [0, -1], axis=axis).ravel() for axis in range(3)]
    values, counts = np.unique(np.concatenate(faces), return_counts=True)
    if counts.max() < BORDER_SHARE * counts.sum():
        share = f"{values[counts.argmax()]:g} fills {100 * counts.max() / counts.sum():.0f} %"
        raise UserError(f"{volume}: no one value fills its border ({share}); skull-strip it, or give brain_mask in the spec")
    return float(values[counts.argmax()])


def brain_mask(foregrounds: list[np.ndarray]) -> np.ndarray:
    """(X, Y, Z) bool: the union of the foregrounds (X, Y, Z), holes filled."""
    return fill_holes(in_stored_order(reduce(np.logical_or, foregrounds)))


def fill_holes(mask: np.ndarray) -> np.ndarray:
    """`mask` (X, Y, Z) with every 6-connected hole that does not reach a face filled.

    The same as SciPy's binary_fill_holes, by components, and only where holes can be: a fraction of its time.
    """
    enclosed = ~mask & _between(mask, 0) & _between(mask, 1)
    if not enclosed.any():
        return mask.copy()
    box = tuple(slice(start, stop) for start, stop in bounding_box(enclosed, margin_voxels=1))
    parts, count = connected(~mask[box])
    # what reaches a face of the box gets out: beyond it a straight line leads to a face of the volume
    outside = np.zeros(count + 1, bool)
    for axis in range(3):
        outside[np.take(parts, [0, -1], axis=axis)] = True
    filled = mask.copy()
    filled[box] |= ~outside[parts]
    return filled


def _between(mask: np.ndarray, axis: int) -> np.ndarray:
    """Which voxels have one of `mask` on both sides along `axis`, or are such themselves."""
    after, before = mask.copy(), mask.copy()
    forwards, backwards = np.moveaxis(after, axis, 0), np.moveaxis(before, axis, 0)
    for k in range(1, mask.shape[axis]):
        forwards[k] |= forwards[k - 1]
        backwards[-k - 1] |= backwards[-k]
    return after & before


def checked_mask(data: np.ndarray, volume: Volume) -> np.ndarray:
    """A given brain mask (X, Y, Z) as bool. Raises UserError: more than 0 and one positive value, or empty."""
    highest = data.max()
    if highest > 0 and ((data == 0) | (data == highest)).all():
        return data != 0
    values = np.unique(data)
    if len(values) == 1 and values[0] <= 0:
        raise UserError(f"{volume}: the brain mask is empty; make it again, or leave this subject out")
    shown = ", ".join(f"{value:g}" for value in values[:4]) + (", ..." if len(values) > 4 else "")
    raise UserError(f"{volume}: a brain mask holds 0 and one positive value, this one {shown}; threshold it, or correct brain_mask in the spec")

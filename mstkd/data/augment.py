"""Augmentation, a function of the item: geometry before the normalisation, intensity after it."""

import numpy as np
import torch
from scipy.spatial.transform import Rotation
from torch.nn import functional

from mstkd.config import AugmentConfig
from mstkd.data.sample import Sample


def augment_geometry(sample: Sample, config: AugmentConfig, draws: np.random.Generator, axial: bool = False) -> Sample:
    """Flips, quarter turns, rotation and zoom about the crop's centre, alike for image (trilinear), brain and label (nearest).

    `sample` is a z-scored float32 crop, so that the 0 drawn in from outside is the brain's mean. `axial`: it is one
    slice, (M, X, Y, 1), which stays in its plane: it is turned about Z alone.
    """
    flips = (draws.random(3) < config.flip_prob) & [axis in config.flip_axes for axis in "xyz"]
    angles_deg = draws.uniform(-config.rotate_deg, config.rotate_deg, 3)
    zoom = 1 + draws.uniform(-config.zoom, config.zoom)
    zoomed, turned = draws.random(2) < (config.zoom_prob, config.quarter_turn_prob)
    zoom, turns = zoom if zoomed else 1.0, int(draws.integers(1, 4)) if turned else 0
    if axial:
        flips, angles_deg = flips & (True, True, False), angles_deg * (0, 0, 1)
    axes = tuple(int(axis) - 3 for axis in np.flatnonzero(flips))
    if axes:
        sample = _each(sample, lambda volume, mode: np.ascontiguousarray(np.flip(volume, axes)))
    if turns:
        sample = _each(sample, lambda volume, mode: _turned(volume, turns))
    if config.rotate_deg or zoom != 1:
        grid = _grid(angles_deg, zoom, sample.brain.shape, sample.meta.spacing_mm)
        sample = _each(sample, lambda volume, mode: _resample(volume, grid, mode))
    return sample


def augment_intensity(
    image: np.ndarray, brain: np.ndarray, present: np.ndarray, config: AugmentConfig, draws: np.random.Generator
) -> np.ndarray:
    """Scale, shift and noise on the brain voxels of the present sequences of a normalised image (M, X, Y, Z) float32.

    `brain` (X, Y, Z), non-zero inside; `present` (M,) bool. Scale and shift are drawn per sequence. Slices: without Z.
    """
    if not (config.intensity_scale or config.intensity_shift or config.noise_std):
        return image
    per_sequence = (len(image), *[1] * brain.ndim)
    scale = 1 + draws.uniform(-config.intensity_scale, config.intensity_scale, per_sequence)
    shift = draws.uniform(-config.intensity_shift, config.intensity_shift, per_sequence)
    changed = image * scale.astype(np.float32) + shift.astype(np.float32)
    if config.noise_std:
        changed += np.float32(config.noise_std) * draws.standard_normal(image.shape, dtype=np.float32)
    inside = np.asarray(brain, dtype=bool) & present.reshape(per_sequence)
    return np.where(inside, changed, image)


def _each(sample: Sample, change) -> Sample:
    return Sample(
        image=change(sample.image, "bilinear"),
        brain=change(sample.brain, "nearest"),
        label=None if sample.label is None else change(sample.label, "nearest"),
        meta=sample.meta,
    )


def _turned(volume: np.ndarray, turns: int) -> np.ndarray:
    """(..., X, Y, Z) turned in the first two of these axes, of the same shape: what sticks out is cut off, what is missing is 0."""
    turned = np.rot90(volume, turns, (-3, -2))
    for axis in (-3, -2):
        short = volume.shape[axis] - turned.shape[axis]
        if short > 0:
            pads = [(0, 0)] * volume.ndim
            pads[axis] = (short // 2, short - short // 2)
            turned = np.pad(turned, pads)
        elif short < 0:
            turned = turned.take(range(-short // 2, -short // 2 + volume.shape[axis]), axis)
    return np.ascontiguousarray(turned)


def _grid(angles_deg: np.ndarray, zoom: float, shape: tuple[int, ...], spacing_mm: tuple[float, ...]) -> torch.Tensor:
    """(1, X, Y, Z, 3): per output voxel its place in the input, in torch's normalised coordinates (last axis first)."""
    extent_mm = np.multiply(shape, spacing_mm)
    rotation = Rotation.from_euler("xyz", angles_deg, degrees=True).as_matrix()
    matrix = rotation * extent_mm[None, :] / extent_mm[:, None] / zoom  # a rotation in mm, not in voxels
    theta = np.pad(matrix[::-1, ::-1], ((0, 0), (0, 1)))
    return functional.affine_grid(torch.from_numpy(theta).float()[None], [1, 1, *shape], align_corners=False)


def _resample(volume: np.ndarray, grid: torch.Tensor, mode: str) -> np.ndarray:
    channels = torch.from_numpy(volume.astype(np.float32, copy=False)).reshape(1, -1, *volume.shape[-3:])
    moved = functional.grid_sample(channels, grid, mode=mode, padding_mode="zeros", align_corners=False)
    return moved.reshape(volume.shape).numpy().astype(volume.dtype, copy=False)

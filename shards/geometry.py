"""Grids: orientation, spacing, boxes, and the way back to the file's own grid.

A resampled grid has exactly the spacing that was asked for, and the centre of the one it came from; its shape is
rounded, so its field of view may differ by up to half a voxel.
"""

from collections.abc import Callable

import nibabel as nib
import numpy as np
from nibabel.processing import resample_from_to
from scipy.ndimage import affine_transform

from mstkd.shards.nifti import Grid
from mstkd.shards.spec import SubjectMeta

ANISOTROPIC = 3.0  # largest over smallest spacing beyond which slices are not interpolated across
SPLINE_REACH = 12  # voxels: beyond them a cubic spline feels less than 1e-6 of a change
SPACING_TOLERANCE = 1e-3  # relative: spacings closer than this are one

Box = tuple[tuple[int, int], ...]
Spacing = tuple[float, float, float]


def to_ras(data: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """Voxels of a file (3 axes) as (X, Y, Z), RAS+."""
    return nib.apply_orientation(data, nib.io_orientation(affine))


def in_stored_order(data: np.ndarray) -> np.ndarray:
    """`data` (X, Y, Z) with Z fastest in memory, as it is stored; files have X fastest.

    Plane by plane: NumPy's copy of the whole jumps through memory, up to eight times slower.
    """
    if data.flags.c_contiguous:
        return data
    turned = np.empty(data.shape, data.dtype)
    for k in range(data.shape[1]):
        turned[:, k] = data[:, k].copy(order="K")
    return turned


def ras_spacing_mm(affine: np.ndarray) -> Spacing:
    """Voxel size along X, Y, Z after reorientation to RAS+."""
    spacing = np.empty(3)
    spacing[nib.io_orientation(affine)[:, 0].astype(int)] = nib.affines.voxel_sizes(affine)
    return tuple(spacing.tolist())


def ras_shape(shape: tuple[int, ...], affine: np.ndarray) -> tuple[int, int, int]:
    """Shape of a file's volume after reorientation to RAS+."""
    turned = np.empty(3, int)
    turned[nib.io_orientation(affine)[:, 0].astype(int)] = shape
    return tuple(turned.tolist())


def bounding_box(mask: np.ndarray, margin_voxels: int = 0) -> Box:
    """(start, stop) per axis of the True voxels and a margin, clipped to the array; the whole array if there are none."""
    if not mask.any():
        return tuple((0, length) for length in mask.shape)
    box = []
    for axis, length in enumerate(mask.shape):
        hit = np.flatnonzero(mask.any(axis=tuple(other for other in range(mask.ndim) if other != axis)))
        box.append((max(int(hit[0]) - margin_voxels, 0), min(int(hit[-1]) + 1 + margin_voxels, length)))
    return tuple(box)


def strongly_anisotropic(spacing_mm: Spacing) -> bool:
    """Whether the largest spacing is more than 3 times the smallest."""
    return max(spacing_mm) > ANISOTROPIC * min(spacing_mm)


def resampled_shape(shape: tuple[int, ...], spacing_mm: Spacing, target_mm: Spacing) -> tuple[int, int, int] | None:
    """Shape after resampling a grid (X, Y, Z) to another spacing; None where the spacing is that one already."""
    if np.allclose(spacing_mm, target_mm, rtol=SPACING_TOLERANCE, atol=0):
        return None
    return tuple(max(1, round(length * own / target)) for length, own, target in zip(shape, spacing_mm, target_mm))


def resample_image(data: np.ndarray, spacing_mm: Spacing, target_mm: Spacing, shape: tuple[int, int, int], box: Box | None = None) -> np.ndarray:
    """`data` (X, Y, Z) on the centred grid of `shape` and `target_mm`, or on a `box` of it: cubic splines (order 3).

    Values are clipped to the data's range. Where the grid that is left or the one that is entered is strongly
    anisotropic (ratio over 3), the one axis of the largest spacing takes the nearest slice (order 0) and only the other
    two are interpolated: splines across thick slices ring. That is what nnU-Net does.
    """
    box = box or tuple((0, length) for length in shape)
    low, high, across = data.min(), data.max(), _slice_axis(spacing_mm, target_mm)
    scale, offset = _scale_and_offset(data.shape, spacing_mm, target_mm, shape)
    nearest = _nearest(data.shape, spacing_mm, target_mm, shape)
    for axis, (start, stop) in enumerate(box):
        if axis == across:
            data = np.take(data, nearest[axis][start:stop], axis=axis)
            scale[axis], offset[axis] = 1.0, 0.0
            continue
        first = max(int(np.floor(scale[axis] * start + offset[axis])) - SPLINE_REACH, 0)
        last = int(np.ceil(scale[axis] * (stop - 1) + offset[axis])) + SPLINE_REACH
        data = data[(slice(None),) * axis + (slice(first, last + 1),)]
        offset[axis] += scale[axis] * start - first
    lengths = tuple(stop - start for start, stop in box)
    resampled = affine_transform(data.astype(np.float32), scale, offset, lengths, np.float32, order=3, mode="nearest")
    return resampled.clip(low, high)


def _slice_axis(spacing_mm: Spacing, target_mm: Spacing) -> int | None:
    """The axis across thick slices; None where there is none, or more than one."""
    coarse = next((spacing for spacing in (spacing_mm, target_mm) if strongly_anisotropic(spacing)), None)
    return None if coarse is None or np.isclose(coarse, max(coarse)).sum() > 1 else int(np.argmax(coarse))


def resample_nearest(data: np.ndarray, spacing_mm: Spacing, target_mm: Spacing, shape: tuple[int, int, int]) -> np.ndarray:
    """`data` (X, Y, Z) on the centred grid of `shape` and `target_mm`, each voxel from the nearest one: masks and labels."""
    return data[np.ix_(*_nearest(data.shape, spacing_mm, target_mm, shape))]


def resample_by_header(data: np.ndarray, affine: np.ndarray, grid: Grid, order: int, outside: float = 0) -> np.ndarray:
    """`data` (3 axes, as in its file) on another file's `grid`, by their affines; `outside` beyond its field of view.

    Interpolated values are float32 and clipped to the data's range, those of `order` 0 keep their type. `order` 3 becomes
    1 where the data's own spacing is strongly anisotropic.
    """
    if order > 1 and strongly_anisotropic(tuple(nib.affines.voxel_sizes(affine))):
        order = 1
    if order > 0:
        data = data.astype(np.float32)
    low, high = min(data.min(), outside), max(data.max(), outside)
    voxels = data.astype(np.uint8) if data.dtype == bool else data  # images hold no bool
    moved = resample_from_to(nib.Nifti1Image(voxels, affine), grid, order=order, mode="constant", cval=outside)
    return np.asanyarray(moved.dataobj).clip(low, high).astype(data.dtype)


def restore(labels: np.ndarray, meta: SubjectMeta) -> np.ndarray:
    """A map over the crop box (X, Y, Z) on the grid and in the orientation of the original file; 0 outside the box.

    On a resampled grid each voxel of the file takes the nearest voxel of the map.
    """
    places, window = _file_voxels_of_box(meta)
    nearest = [_half_up(at).clip(0, length - 1) for at, length in zip(places, labels.shape)]
    return _on_file_grid(labels[np.ix_(*nearest)], window, meta)


def restore_image(image: np.ndarray, meta: SubjectMeta) -> np.ndarray:
    """As `restore`, for intensities: on a resampled grid they are interpolated linearly."""
    return restore(image, meta) if meta.grid_shape is None else restore_scores(image[None], meta, lambda finer: finer[0])


def on_file_axes(labels: np.ndarray, meta: SubjectMeta) -> np.ndarray:
    """A map over the file's whole RAS+ grid, not resampled, in the orientation of the file."""
    return _on_file_grid(labels, tuple(slice(length) for length in labels.shape), meta)


def restore_scores(scores: np.ndarray, meta: SubjectMeta, decide: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """As `restore`, from scores (K, X, Y, Z) over the crop box: logits, say.

    They are interpolated linearly on the file's voxels and only there turned by `decide`, (K, x, y, z) -> (x, y, z),
    into labels: finer than moving labels, and as nnU-Net does.
    """
    places, window = _file_voxels_of_box(meta)
    shape = tuple(len(at) for at in places)
    if 0 in shape:  # a box thinner than the file's voxels
        return _on_file_grid(np.zeros(shape, np.uint8), window, meta)
    step = np.array([at[1] - at[0] if len(at) > 1 else 1.0 for at in places])
    start = np.array([at[0] for at in places])
    finer = [affine_transform(channel, step, start, shape, np.float32, order=1, mode="nearest") for channel in scores]
    return _on_file_grid(decide(np.stack(finer)), window, meta)


def _file_voxels_of_box(meta: SubjectMeta) -> tuple[list[np.ndarray], tuple[slice, ...]]:
    """Per axis of the file's RAS+ grid: where its voxels lie in the crop box (in the box's voxels), and which ones those are."""
    affine = np.array(meta.original_affine)
    shape = ras_shape(meta.original_shape, affine)
    if meta.grid_shape is None:
        window = tuple(slice(start, stop) for start, stop in meta.crop_box)
        return [np.arange(stop - start, dtype=float) for start, stop in meta.crop_box], window
    scale, offset = _scale_and_offset(meta.grid_shape, meta.spacing_mm, ras_spacing_mm(affine), shape)
    places, window = [], []
    for axis, (start, stop) in enumerate(meta.crop_box):
        at = np.arange(shape[axis]) * scale[axis] + offset[axis]
        # a voxel belongs to the grid voxel that it is nearest to; those beyond the grid's edge to the last one
        nearest = _half_up(at).clip(0, meta.grid_shape[axis] - 1)
        inside = np.flatnonzero((nearest >= start) & (nearest < stop))
        first, last = (int(inside[0]), int(inside[-1]) + 1) if len(inside) else (0, 0)
        places.append(at[first:last] - start)
        window.append(slice(first, last))
    return places, tuple(window)


def _on_file_grid(labels: np.ndarray, window: tuple[slice, ...], meta: SubjectMeta) -> np.ndarray:
    to_file = nib.orientations.ornt_transform(nib.orientations.axcodes2ornt("RAS"), nib.orientations.axcodes2ornt(meta.orientation))
    whole = np.zeros(ras_shape(meta.original_shape, np.array(meta.original_affine)), labels.dtype)
    whole[window] = labels
    return np.ascontiguousarray(nib.apply_orientation(whole, to_file))


def _scale_and_offset(shape: tuple[int, ...], spacing_mm: Spacing, target_mm: Spacing, target_shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """(3,) each: voxel i of the target grid lies at scale * i + offset of the source grid; their centres coincide."""
    scale = np.divide(target_mm, spacing_mm)
    return scale, (np.array(shape) - 1) / 2 - scale * (np.array(target_shape) - 1) / 2


def _nearest(shape: tuple[int, ...], spacing_mm: Spacing, target_mm: Spacing, target_shape: tuple[int, ...]) -> list[np.ndarray]:
    """Per axis the source voxel nearest to each target voxel."""
    scale, offset = _scale_and_offset(shape, spacing_mm, target_mm, target_shape)
    return [
        _half_up(np.arange(length) * scale[axis] + offset[axis]).clip(0, shape[axis] - 1)
        for axis, length in enumerate(target_shape)
    ]


def _half_up(places: np.ndarray) -> np.ndarray:
    """Nearest integers; a half goes up everywhere, where rint would go to either side in turn."""
    return np.floor(places + 0.5).astype(int)

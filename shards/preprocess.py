"""From NIfTI files to what a shard set stores, and back to the file's own grid.

Volumes are reoriented to RAS+, cropped to the brain box and z-scored over the brain per sequence.
"""

import zlib
from dataclasses import dataclass

import nibabel as nib
import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError
from scipy.ndimage import binary_fill_holes

from mstkd.errors import UserError
from mstkd.shards.dataset import Case, DatasetSpec, Volume
from mstkd.shards.spec import LabelScheme, SequenceStats, SubjectMeta

AFFINE_TOLERANCE_MM = 1e-3
STATS_PERCENTILES = (0.1, 0.5, 99.5, 99.9)
UNREADABLE = (ImageFileError, HeaderDataError, OSError, EOFError, ValueError, zlib.error)

Box = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class RawCase:
    """The volumes of one case on their common RAS+ grid, and the geometry of the files."""

    volumes: dict[str, np.ndarray]  # per present sequence (X, Y, Z) float32, raw intensities
    label: np.ndarray | None  # (X, Y, Z) uint8
    shape: tuple[int, int, int]  # of the files, before reorientation
    affine: np.ndarray  # (4, 4) of the files, voxel -> mm


@dataclass(frozen=True)
class Preprocessed:
    """One subject as stored: cropped to the brain box, X Y Z voxels RAS+."""

    image: np.ndarray  # (M, X, Y, Z) float16, z-scored over the brain, 0 outside it; absent sequences are 0
    brain: np.ndarray  # (X, Y, Z) uint8
    label: np.ndarray | None  # (X, Y, Z) uint8 in the label scheme
    meta: SubjectMeta


def preprocess(case: Case, dataset: DatasetSpec, sequences: tuple[str, ...] = ()) -> Preprocessed:
    """Read and normalise one case; channels follow `sequences` (by default the data set's), a label is read if the case has one.

    Raises UserError, naming the file: unreadable, not finite, constant, on another grid than its siblings, or
    label values outside the scheme.
    """
    sequences = sequences or tuple(dataset.sequences)
    raw = load_case(case, dataset.scheme)
    brain = brain_mask(list(raw.volumes.values()))
    box = bounding_box(brain if raw.label is None else brain | (raw.label > 0))
    inside = tuple(slice(start, stop) for start, stop in box)
    brain = brain[inside]
    image = np.zeros((len(sequences), *brain.shape), np.float16)
    stats = {}
    for channel, name in enumerate(sequences):
        if name in raw.volumes:
            volume = raw.volumes[name][inside]
            stats[name] = _statistics(volume[brain], case.files[name])
            image[channel][brain] = (volume[brain] - stats[name].mean) / stats[name].std
    meta = SubjectMeta(
        subject=case.subject,
        patient=case.patient,
        sequences=tuple(stats),
        stats=stats,
        spacing_mm=_ras_spacing(raw.affine),
        original_shape=raw.shape,
        original_affine=raw.affine.tolist(),
        orientation="".join(nib.aff2axcodes(raw.affine)),
        crop_box=box,
    )
    return Preprocessed(image, brain.astype(np.uint8), None if raw.label is None else np.ascontiguousarray(raw.label[inside]), meta)


def restore(labels: np.ndarray, meta: SubjectMeta) -> np.ndarray:
    """A map over the crop box (X, Y, Z) on the grid and in the orientation of the original file; 0 outside the box."""
    to_file = nib.orientations.ornt_transform(nib.orientations.axcodes2ornt("RAS"), nib.orientations.axcodes2ornt(meta.orientation))
    from_file = nib.io_orientation(np.array(meta.original_affine))
    ras_shape = np.empty(3, int)
    ras_shape[from_file[:, 0].astype(int)] = meta.original_shape
    whole = np.zeros(ras_shape, labels.dtype)
    whole[tuple(slice(start, stop) for start, stop in meta.crop_box)] = labels
    return np.ascontiguousarray(nib.apply_orientation(whole, to_file))


def load_case(case: Case, label_scheme: LabelScheme | None) -> RawCase:
    """All volumes of a case in RAS+; they must share one grid. Raises UserError naming the file."""
    first = next(iter(case.files.values()))
    shape, affine = None, None
    volumes = {}
    for name, path in case.files.items():
        data, own_affine = read_volume(path)
        if affine is None:
            shape, affine = data.shape, own_affine
        _same_grid(path, data.shape, own_affine, first, shape, affine)
        data = data.astype(np.float32)
        if not np.isfinite(data).all():
            raise UserError(f"{path}: holds NaN or infinite values; repair or leave out this scan")
        volumes[name] = _to_ras(data, affine)
    label = None
    if label_scheme is not None and case.label is not None:
        data, own_affine = read_volume(case.label)
        _same_grid(case.label, data.shape, own_affine, first, shape, affine)
        label = _to_ras(_checked_labels(data, label_scheme, case.label), affine)
    return RawCase(volumes, label, shape, affine)


def check_headers(case: Case) -> None:
    """Raise UserError where the headers alone tell that `load_case` will."""
    (first, reference), *others = ((path, _open(path)) for path in case.files.values())
    for path, image in others:
        _same_grid(path, image.shape, image.affine, first, reference.shape, reference.affine)


def read_volume(path: Volume) -> tuple[np.ndarray, np.ndarray]:
    """Voxels (3 axes, as in the file, scaled) and affine (4, 4) of a NIfTI file. Raises UserError."""
    image = _open(path)
    try:
        data = np.asanyarray(image.dataobj)
    except UNREADABLE:
        raise UserError(f"{path}: truncated or not a NIfTI; copy or download it again") from None
    if data.ndim != 3 or 0 in data.shape:
        raise UserError(f"{path}: expected a volume with 3 axes, found shape {data.shape}; split it into one file per sequence")
    if data.dtype.kind not in "iuf":
        raise UserError(f"{path}: expected one real number per voxel, found {data.dtype}; convert it to grey values")
    affine = image.affine
    if not np.isfinite(affine).all() or np.isnan(nib.io_orientation(affine)).any():
        raise UserError(f"{path}: the affine in its header is singular; restore the header's geometry")
    return data, affine


def _open(path: Volume) -> nib.Nifti1Image:
    try:
        return nib.load(path.path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except UNREADABLE:
        raise UserError(f"{path}: truncated or not a NIfTI; copy or download it again") from None


def brain_mask(volumes: list[np.ndarray]) -> np.ndarray:
    """(X, Y, Z) bool: voxels that are not 0 in any volume, holes filled.

    Skull-stripped data has background exactly 0; brain voxels may be negative.
    """
    return binary_fill_holes(np.any([volume != 0 for volume in volumes], axis=0))


def bounding_box(mask: np.ndarray) -> Box:
    """(start, stop) per axis of the True voxels; the whole array if there are none."""
    if not mask.any():
        return tuple((0, length) for length in mask.shape)
    box = []
    for axis in range(mask.ndim):
        hit = np.flatnonzero(mask.any(axis=tuple(other for other in range(mask.ndim) if other != axis)))
        box.append((int(hit[0]), int(hit[-1]) + 1))
    return tuple(box)


def _statistics(voxels: np.ndarray, path: Volume) -> SequenceStats:
    if voxels.size == 0 or voxels.min() == voxels.max():
        raise UserError(f"{path}: every brain voxel has the same value; this scan carries nothing, leave it out")
    voxels = voxels.astype(np.float64)
    low, low5, high5, high = np.percentile(voxels, STATS_PERCENTILES)
    return SequenceStats(
        mean=voxels.mean(), std=voxels.std(), min=voxels.min(), max=voxels.max(), p0_1=low, p0_5=low5, p99_5=high5, p99_9=high
    )


def _checked_labels(data: np.ndarray, scheme: LabelScheme, path: Volume) -> np.ndarray:
    """(X, Y, Z) uint8; UserError if a value is not one of the scheme's."""
    values = np.unique(data)
    strange = [f"{value:g}" for value in values if value not in scheme.values]
    if strange:
        allowed = ", ".join(str(value) for value in scheme.values)
        shown = ", ".join(strange[:5]) + (", ..." if len(strange) > 5 else "")
        raise UserError(f"{path}: label values {shown} are outside scheme {scheme.name} ({allowed}); correct it or the spec's label_scheme")
    return data.astype(np.uint8)


def _same_grid(path: Volume, shape: tuple, affine: np.ndarray, first: Volume, first_shape: tuple, first_affine: np.ndarray) -> None:
    if shape != first_shape:
        raise UserError(f"{path}: shape {shape} differs from {first_shape} of {first}; resample them to one grid")
    if not np.allclose(affine, first_affine, rtol=0, atol=AFFINE_TOLERANCE_MM):
        raise UserError(f"{path}: its affine differs from that of {first}; resample them to one grid")


def _to_ras(data: np.ndarray, affine: np.ndarray) -> np.ndarray:
    return nib.apply_orientation(data, nib.io_orientation(affine))


def _ras_spacing(affine: np.ndarray) -> tuple[float, float, float]:
    """Voxel size in mm along X, Y, Z after reorientation to RAS+."""
    spacing = np.empty(3)
    spacing[nib.io_orientation(affine)[:, 0].astype(int)] = nib.affines.voxel_sizes(affine)
    return tuple(spacing.tolist())

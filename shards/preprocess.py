"""From a case's files to what a shard set stores of it.

Volumes are reoriented to RAS+, resampled where the data set says so, cropped to the brain box and z-scored over the
brain per sequence. `geometry.restore` leads back to the file's own grid.
"""

from dataclasses import dataclass

import nibabel as nib
import numpy as np

from mstkd.errors import UserError
from mstkd.shards.clahe import equalised
from mstkd.shards.dataset import Case, DatasetSpec, Volume
from mstkd.shards.facts import SubjectFacts, subject_facts
from mstkd.shards.geometry import (
    Box, Spacing, bounding_box, in_stored_order, on_file_axes, ras_spacing_mm, resample_image, resample_nearest, resampled_shape,
)  # fmt: skip
from mstkd.shards.intensity_statistics import statistics
from mstkd.shards.raw_case import RawCase, load_case, refuse_constant
from mstkd.shards.spec import SequenceStats, SubjectMeta


@dataclass(frozen=True)
class Preprocessed:
    """One subject as stored: cropped to the brain box, X Y Z voxels RAS+."""

    image: np.ndarray  # (M, X, Y, Z) float16, z-scored over the brain, 0 outside it; absent sequences are 0
    brain: np.ndarray  # (X, Y, Z) uint8
    label: np.ndarray | None  # (X, Y, Z) uint8 in the label scheme
    meta: SubjectMeta
    facts: SubjectFacts
    clahe: np.ndarray | None = None  # (M, X, Y, Z) float16 in [0, 1], where the data set asks for it
    file_label: np.ndarray | None = None  # of a resampled subject: uint8 on the grid and in the axes of its file, to be scored on


def preprocess(case: Case, dataset: DatasetSpec, sequences: tuple[str, ...] = ()) -> Preprocessed:
    """Read and normalise one case; channels follow `sequences` (by default the data set's), a label is read if the case has one.

    With `preprocessing.spacing_mm` images are resampled by cubic splines and masks and labels to the nearest voxel;
    where the spacing is strongly anisotropic (ratio over 3) slices are not interpolated across (`resample_image`).
    The box holds the brain and every labelled voxel, and `margin_voxels` around them. A label outside a given brain mask
    is kept whole and counted in the facts, while the brain stays as given: widening it by the truth would show the
    network where the tumour is.

    A sequence whose file or brain carries one value throughout counts as missing and is recorded, if the data set allows
    missing sequences. Raises UserError, naming the file: unreadable, not finite, constant, on another grid than its
    siblings, label values outside the scheme, a mask that is none.
    """
    sequences = sequences or tuple(dataset.sequences)
    raw = load_case(case, dataset)
    frame = _frame(raw, dataset, case.subject)
    image, stats, medians = _normalised(raw, frame, case, dataset, sequences)
    meta = SubjectMeta(
        subject=case.subject,
        patient=case.patient,
        site=case.site,
        field_strength_t=case.field_strength_t,
        sequences=tuple(stats),
        stats=stats,
        spacing_mm=frame.spacing_mm,
        brain_from=raw.brain_from,
        constant=tuple(name for name in sequences if name in case.files and name not in stats),
        original_shape=raw.shape,
        original_affine=raw.affine.tolist(),
        orientation="".join(nib.aff2axcodes(raw.affine)),
        grid_shape=frame.shape,
        crop_box=frame.box,
    )
    facts = subject_facts(image, frame.brain, frame.label, meta, sequences, dataset.scheme, raw.by_convention, raw.grid_from, medians)
    file_label = None if frame.shape is None or raw.label is None else on_file_axes(raw.label, meta)
    clahe = equalised(image, frame.brain, meta, sequences) if dataset.preprocessing.clahe else None
    return Preprocessed(image, frame.brain.astype(np.uint8), frame.label, meta, facts, clahe, file_label)


def stored_zscore(voxels: np.ndarray, stats: SequenceStats, volume: Volume) -> np.ndarray:
    """`voxels` (N,) as float16 z-scores. Raises UserError where one is beyond float16 (65504): it would be stored as infinite."""
    z = (voxels - stats.mean) / stats.std
    farthest = max(z.max(), -z.min())
    if farthest > np.finfo(np.float16).max:
        raise UserError(f"{volume}: a voxel lies {farthest:.3g} standard deviations from the mean, beyond float16; clip or repair this scan")
    return z.astype(np.float16)


@dataclass(frozen=True)
class _Frame:
    """The grid of what is stored, and brain and label on it."""

    spacing_mm: Spacing
    shape: tuple[int, int, int] | None  # of the whole grid, where it is resampled
    box: Box
    brain: np.ndarray  # (X, Y, Z) bool, cropped
    label: np.ndarray | None  # (X, Y, Z) uint8, cropped

    @property
    def inside(self) -> tuple[slice, ...]:
        return tuple(slice(start, stop) for start, stop in self.box)


def _frame(raw: RawCase, dataset: DatasetSpec, subject: str) -> _Frame:
    own_mm, config = ras_spacing_mm(raw.affine), dataset.preprocessing
    spacing_mm, shape, brain, label = own_mm, None, raw.brain, raw.label
    if config.spacing_mm is not None and (shape := resampled_shape(brain.shape, own_mm, config.spacing_mm)) is not None:
        spacing_mm = config.spacing_mm
        brain = resample_nearest(brain, own_mm, spacing_mm, shape)
        label = None if label is None else resample_nearest(label, own_mm, spacing_mm, shape)
        if not brain.any():
            raise UserError(f"subject {subject}: no brain voxel is left at {spacing_mm} mm; choose a finer preprocessing.spacing_mm")
    box = bounding_box(brain if label is None else brain | (label > 0), config.margin_voxels)
    inside = tuple(slice(start, stop) for start, stop in box)
    return _Frame(spacing_mm, shape, box, np.ascontiguousarray(brain[inside]), None if label is None else np.ascontiguousarray(label[inside]))


def _normalised(
    raw: RawCase, frame: _Frame, case: Case, dataset: DatasetSpec, sequences: tuple[str, ...]
) -> tuple[np.ndarray, dict[str, SequenceStats], dict[str, float]]:
    """Image (M, X, Y, Z) float16 over the box, and statistics and median per sequence that varies inside the brain."""
    image, stats, medians = np.zeros((len(sequences), *frame.brain.shape), np.float16), {}, {}
    for channel, name in enumerate(sequences):
        if name not in raw.volumes:
            continue
        data = raw.volumes[name]
        data = in_stored_order(data[frame.inside] if frame.shape is None else _resampled(data, raw, frame))
        voxels = data[frame.brain].astype(np.float32)
        if voxels.min() == voxels.max():
            refuse_constant(case.files[name], dataset)
            continue
        stats[name], medians[name] = statistics(voxels)
        image[channel][frame.brain] = stored_zscore(voxels, stats[name], case.files[name])
    if not stats:
        raise UserError(f"subject {case.subject}: no scan varies inside the brain; leave this subject out")
    return image, stats, medians


def _resampled(data: np.ndarray, raw: RawCase, frame: _Frame) -> np.ndarray:
    """The brain of a volume (X, Y, Z) over the frame's box. What is outside takes the brain's mean first.

    Otherwise splines would draw the background's value into the brain's rim.
    """
    filled = np.where(raw.brain, data, data[raw.brain].mean(dtype=np.float64).astype(np.float32))
    return resample_image(filled, ras_spacing_mm(raw.affine), frame.spacing_mm, frame.shape, frame.box)


"""The volumes of one case as they come from the files: on one grid, RAS+, raw intensities, with brain and label."""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from mstkd.errors import UserError
from mstkd.shards.brain import background_value, brain_mask, checked_mask
from mstkd.shards.dataset import Case, DatasetSpec, Volume
from mstkd.shards.geometry import bounding_box, in_stored_order, resample_by_header, to_ras
from mstkd.shards.labels import scheme_labels
from mstkd.shards.nifti import Grid, OpenFiles, check_same_grid, grid_of, open_image, orientation_is_convention, same_grid


@dataclass(frozen=True)
class RawCase:
    """One case on its common RAS+ grid, and the geometry of the file whose grid that is."""

    volumes: dict[str, np.ndarray]  # per sequence that carries more than one value (X, Y, Z), raw intensities: float32, or integers of up to 16 bits as they came
    brain: np.ndarray  # (X, Y, Z) bool
    brain_from: Literal["volumes", "mask"]
    label: np.ndarray | None  # (X, Y, Z) uint8
    shape: tuple[int, int, int]  # of the file, before reorientation
    affine: np.ndarray  # (4, 4) of the file, voxel -> mm
    grid_from: str | None  # the sequence whose grid the others were brought to, where the data set has a common one
    by_convention: bool  # a header does not say where left is


def grid_sequence(case: Case, dataset: DatasetSpec) -> str:
    """The sequence whose grid a case is stored on: `preprocessing.common_grid`, or the first one that the case has."""
    common = dataset.preprocessing.common_grid
    return common if common in case.files else next(iter(case.files))


def load_case(case: Case, dataset: DatasetSpec) -> RawCase:
    """All volumes of a case on one RAS+ grid, its brain, and its label if it has one.

    The files must share a grid, unless the data set names a `common_grid`: then the others are resampled to it by
    their headers (images order 3, masks and labels nearest). A subject that lacks that sequence lies on the grid of its
    first one. Raises UserError naming the file.
    """
    name = grid_sequence(case, dataset)
    reference = case.files[name]
    image = open_image(reference)
    grid = grid_of(image, reference)
    placed = _Placer(reference, grid, dataset.preprocessing.common_grid is not None)
    volumes, foregrounds = _read_sequences(case, dataset, placed)
    if case.brain is None:
        brain = brain_mask([to_ras(mask, grid[1]) for mask in foregrounds])
    else:
        data, affine = OpenFiles().read(case.brain)
        mask = placed.place(checked_mask(data, case.brain), affine, case.brain, order=0)
        brain = in_stored_order(to_ras(_not_empty(mask, case.brain), grid[1]))
    label = None
    if dataset.scheme is not None and case.label is not None:
        data, affine = OpenFiles().read(case.label)
        label = in_stored_order(to_ras(placed.place(scheme_labels(data, dataset, case.label), affine, case.label, order=0), grid[1]))
    return RawCase(
        volumes={sequence: to_ras(data, grid[1]) for sequence, data in volumes.items()},
        brain=brain,
        brain_from="volumes" if case.brain is None else "mask",
        label=label,
        shape=grid[0],
        affine=grid[1],
        grid_from=name if dataset.preprocessing.common_grid else None,
        by_convention=orientation_is_convention(image),
    )


def check_headers(case: Case, dataset: DatasetSpec) -> None:
    """Raise UserError where the headers of a case's sequences and brain mask alone tell that `load_case` will."""
    reference = case.files[grid_sequence(case, dataset)]
    grid = grid_of(open_image(reference), reference)
    for volume in (*case.files.values(), *([case.brain] if case.brain else [])):
        own = grid_of(open_image(volume), volume)
        if dataset.preprocessing.common_grid is None:
            check_same_grid(volume, own, reference, grid)


def kept_share(case: Case, dataset: DatasetSpec) -> float:
    """The share of a case's volume in its brain box, nearly: as the mask says, or else the one scan whose grid it is stored on."""
    volume = case.brain or case.files[grid_sequence(case, dataset)]
    data, _ = OpenFiles().read(volume)
    outside = 0.0 if case.brain else background_value(data, dataset.preprocessing.background, volume)
    box = bounding_box(data != outside, dataset.preprocessing.margin_voxels)
    return math.prod(stop - start for start, stop in box) / data.size


@dataclass(frozen=True)
class _Placer:
    """Brings the volumes of a case to the grid of one of them, or refuses those that lie on another."""

    reference: Volume
    grid: Grid
    resample: bool

    def place(self, data: np.ndarray, affine: np.ndarray, volume: Volume, order: int, outside: float = 0) -> np.ndarray:
        own = (data.shape, affine)
        if self.resample and not same_grid(own, self.grid):
            return resample_by_header(data, affine, self.grid, order, outside)
        check_same_grid(volume, own, self.reference, self.grid)
        return data


def _read_sequences(case: Case, dataset: DatasetSpec, placed: _Placer) -> tuple[dict[str, np.ndarray], list[np.ndarray]]:
    """Per sequence its voxels on the common grid, as `RawCase` has them; the foregrounds, where no mask is given."""
    volumes, foregrounds, constant, files = {}, [], [], OpenFiles()
    for sequence, volume in case.files.items():
        data, affine = files.read(volume)
        data = _finite(data, volume)
        if data.min() == data.max():
            refuse_constant(volume, dataset)
            constant.append(sequence)
            continue
        outside = 0.0
        if case.brain is None:
            outside = background_value(data, dataset.preprocessing.background, volume)
            foregrounds.append(placed.place(data != data.dtype.type(outside), affine, volume, order=0))
        volumes[sequence] = placed.place(data, affine, volume, order=3, outside=outside)
    if not volumes:
        raise UserError(f"subject {case.subject}: every scan carries one value throughout ({', '.join(constant)}); leave this subject out")
    return volumes, foregrounds


def refuse_constant(volume: Volume, dataset: DatasetSpec) -> None:
    """Raise UserError unless the data set allows that a sequence is missing, which is what a constant one amounts to."""
    if not dataset.allow_missing:
        raise UserError(
            f"{volume}: every brain voxel has the same value; this scan carries nothing, leave it out (and say allow_missing: true in the spec)"
        )


def _finite(data: np.ndarray, volume: Volume) -> np.ndarray:
    """As float32, but for what float32 holds exactly and twice as large."""
    if data.dtype.kind in "iu" and data.dtype.itemsize <= 2:
        return data
    whole = data.dtype.kind in "iu"
    with np.errstate(over="ignore"):
        data = data.astype(np.float32)
    if not whole and not np.isfinite(data).all():
        raise UserError(f"{volume}: holds NaN or infinite values, or some beyond float32; repair or leave out this scan")
    return data


def _not_empty(mask: np.ndarray, volume: Volume) -> np.ndarray:
    if not mask.any():
        raise UserError(f"{volume}: the brain mask is empty on the common grid; its header puts it elsewhere, correct it")
    return mask

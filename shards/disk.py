"""Will a shard set fit on the disk? Estimated from headers and from the brain box of one scan."""

import errno
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib

from mstkd.errors import UserError
from mstkd.files import size_text
from mstkd.shards.cases import Case
from mstkd.shards.dataset import DatasetSpec
from mstkd.shards.nifti import Grid, grid_of, open_image
from mstkd.shards.raw_case import grid_sequence, kept_share

FULL = (errno.ENOSPC, errno.EDQUOT)
SAMPLED_HEADERS = 64  # subjects whose headers are read, spread over the set
SUBJECT_OVERHEAD_BYTES = 8192  # tar headers, padding, meta.json, and the index entry without fingerprints
FINGERPRINT_TEXT_BYTES = 11000  # per sequence, as text in index.json


@dataclass(frozen=True)
class Estimate:
    """Bytes that subjects will take."""

    likely: int  # as much of each volume kept as of the measured subject
    bound: int  # nothing cropped

    def text(self) -> str:
        return f"about {size_text(self.likely)} (at most {size_text(self.bound)}, if nothing were cropped)"


def estimate(cases: Sequence[Case], dataset: DatasetSpec, bytes_per_subject: float | None = None) -> Estimate:
    """What `cases` will take, from their headers and the brain box in the first one's first scan, or at the known size of others like them.

    Raises UserError where a header or that scan cannot be read.
    """
    if not cases:
        return Estimate(0, 0)
    step = math.ceil(len(cases) / SAMPLED_HEADERS)
    sample = cases[::step]
    channels = len(dataset.sequences)
    overhead = SUBJECT_OVERHEAD_BYTES + channels * FINGERPRINT_TEXT_BYTES
    voxel_bytes = (4 if dataset.preprocessing.clahe else 2) * channels + (1 if dataset.scheme is None else 2)
    voxels = sum(_voxels(case, dataset) for case in sample) / len(sample)
    if dataset.preprocessing.spacing_mm is not None and dataset.scheme is not None:  # the label is kept on its file's grid, too
        overhead += max(math.prod(_file_grid(case, dataset)[0]) for case in sample)
    bound = len(cases) * (voxels * voxel_bytes + overhead)
    if bytes_per_subject is None:
        bytes_per_subject = voxels * kept_share(cases[0], dataset) * voxel_bytes + overhead
    return Estimate(min(round(len(cases) * bytes_per_subject), round(bound)), round(bound))


def check_space(expected: Estimate, folder: Path) -> None:
    """Raise UserError if the disk of `folder` has less room than is likely needed. A quota is not seen here."""
    free = shutil.disk_usage(folder).free
    if expected.likely > free:
        raise UserError(f"{folder}: needs {expected.text()}, and its disk has {size_text(free)} free; make room, or use an --out on another disk")


def full_disk(error: OSError, folder: Path) -> UserError:
    """What to say when the disk, or a quota, was full in the middle; `error` is one of FULL."""
    what = "the quota is used up" if error.errno == errno.EDQUOT else f"the disk is full ({size_text(shutil.disk_usage(folder).free)} free)"
    return UserError(f"{folder}: {what}; make room")


def _voxels(case: Case, dataset: DatasetSpec) -> float:
    """Voxels of the case's stored grid before cropping."""
    shape, affine = _file_grid(case, dataset)
    target_mm = dataset.preprocessing.spacing_mm
    scale = 1.0 if target_mm is None else math.prod(nib.affines.voxel_sizes(affine)) / math.prod(target_mm)
    return math.prod(shape) * scale


def _file_grid(case: Case, dataset: DatasetSpec) -> Grid:
    volume = case.files[grid_sequence(case, dataset)]
    return grid_of(open_image(volume), volume)

"""Whether a subject's meta data can be true: written by others, it decides on intensities and on the way back to the file."""

import nibabel as nib
import numpy as np

from mstkd.shards.geometry import ras_shape
from mstkd.shards.spec import META, SequenceStats, SubjectMeta

ROUNDING = 1e-5  # of the range: percentiles are interpolated in float32


def check_meta(meta: SubjectMeta) -> None:
    """Raise ValueError naming the field whose value contradicts itself or another one."""
    affine = np.array(meta.original_affine)
    numbers = [*meta.spacing_mm, *affine.ravel(), *(value for stats in meta.stats.values() for value in stats.model_dump().values())]
    if not np.isfinite(numbers).all():
        raise ValueError(f"{META}: a number is not finite")
    if min(meta.spacing_mm) <= 0:
        raise ValueError(f"{META}: spacing_mm {meta.spacing_mm} is not above 0")
    if affine.shape != (4, 4) or np.isnan(nib.io_orientation(affine)).any():
        raise ValueError(f"{META}: original_affine is no 4 x 4 matrix that can be inverted")
    if "".join(nib.aff2axcodes(affine)) != meta.orientation:
        raise ValueError(f"{META}: orientation {meta.orientation} is not that of original_affine")
    grid = meta.grid_shape or ras_shape(meta.original_shape, affine)
    if any(stop > length for (_, stop), length in zip(meta.crop_box, grid)):
        raise ValueError(f"{META}: crop_box {meta.crop_box} leaves the grid {grid}")
    for name, stats in meta.stats.items():
        if not _rising(stats):
            raise ValueError(f"{META}: stats.{name}: std must be above 0, and min, percentiles and max must rise")


def _rising(stats: SequenceStats) -> bool:
    steps = np.diff([stats.min, stats.p0_1, stats.p0_5, stats.p99_5, stats.p99_9, stats.max])
    return stats.std > 0 and bool((steps >= -ROUNDING * (stats.max - stats.min)).all()) and stats.max >= stats.min

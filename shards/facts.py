"""Figures of one subject for the data set's fingerprint, taken from what is stored of it."""

import math

import numpy as np
from pydantic import Field

from mstkd.shards.geometry import ras_shape, ras_spacing_mm
from mstkd.shards.spec import LabelScheme, SequenceStats, Strict, SubjectMeta

RANGES = {"0.1-99.9": ("p0_1", "p99_9"), "0.5-99.5": ("p0_5", "p99_5")}  # the percentile ranges a method may clip to


class SequenceFacts(Strict):
    """One sequence over the brain of one subject."""

    stats: SequenceStats  # raw intensities
    median: float  # raw
    z_min: float
    z_max: float
    clipped: dict[str, int]  # per percentile range: labelled voxels of the brain that clipping to it would change


class SubjectFacts(Strict):
    """Axes are X, Y, Z of RAS+."""

    subject: str
    sequences: dict[str, SequenceFacts]
    constant: tuple[str, ...]
    file_shape: tuple[int, int, int]
    file_spacing_mm: tuple[float, float, float]
    stored_shape: tuple[int, int, int]
    stored_spacing_mm: tuple[float, float, float]
    orientation: str  # axis codes of the file
    by_convention: bool = False  # its header does not say where left is
    grid_from: str | None = None  # the sequence whose grid is stored
    brain_from: str
    brain_share: float  # of the file's volume
    site: str | None
    field_strength_t: float | None
    labelled_voxels: int = Field(0, ge=0)  # in any region of the scheme
    labelled_in_brain: int = Field(0, ge=0)


def subject_facts(
    image: np.ndarray,
    brain: np.ndarray,
    label: np.ndarray | None,
    meta: SubjectMeta,
    sequences: tuple[str, ...],
    scheme: LabelScheme | None,
    by_convention: bool = False,
    grid_from: str | None = None,
    medians: dict[str, float] | None = None,
) -> SubjectFacts:
    """Facts of a stored subject: z-scored image (M, X, Y, Z) with channels `sequences`, brain and label (X, Y, Z).

    `medians`: of the raw intensities, where they were measured with `meta.stats`; else median and range are taken from the z-scores.
    """
    labelled = _labelled(label, scheme)
    seen = labelled[brain.ravel()[labelled] != 0]
    affine = np.array(meta.original_affine)
    return SubjectFacts(
        subject=meta.subject,
        sequences={
            name: _sequence_facts(image[sequences.index(name)], brain, seen, meta.stats[name], (medians or {}).get(name))
            for name in meta.sequences
        },
        constant=meta.constant,
        file_shape=ras_shape(meta.original_shape, affine),
        file_spacing_mm=ras_spacing_mm(affine),
        stored_shape=brain.shape,
        stored_spacing_mm=meta.spacing_mm,
        orientation=meta.orientation,
        by_convention=by_convention,
        grid_from=grid_from,
        brain_from=meta.brain_from,
        brain_share=np.count_nonzero(brain) / math.prod(meta.grid_shape or meta.original_shape),
        site=meta.site,
        field_strength_t=meta.field_strength_t,
        labelled_voxels=len(labelled),
        labelled_in_brain=len(seen),
    )


def _labelled(label: np.ndarray | None, scheme: LabelScheme | None) -> np.ndarray:
    """Places, in the flattened label map, of the voxels in any region of the scheme."""
    if label is None or scheme is None:
        return np.zeros(0, int)
    places = np.flatnonzero(label != 0)  # few, and no region holds 0
    return places[np.isin(label.ravel()[places], sorted({value for values in scheme.regions.values() for value in values}))]


def _sequence_facts(z: np.ndarray, brain: np.ndarray, labelled: np.ndarray, stats: SequenceStats, median: float | None) -> SequenceFacts:
    tumour = z.ravel()[labelled]
    clipped = {}
    for name, limits in RANGES.items():
        # rounded as the voxels are: those that lie on a limit are not beyond it
        low, high = (np.float16((getattr(stats, limit) - stats.mean) / stats.std) for limit in limits)
        clipped[name] = int(((tumour < low) | (tumour > high)).sum())
    if median is None:  # statistics that others wrote: what the voxels say counts
        voxels = z[brain != 0].astype(np.float32)
        median, z_min, z_max = float(np.median(voxels)) * stats.std + stats.mean, voxels.min(), voxels.max()
    else:
        z_min, z_max = (np.float16((limit - stats.mean) / stats.std) for limit in (stats.min, stats.max))  # as stored
    return SequenceFacts(
        stats=stats,
        median=median,
        z_min=float(z_min),
        z_max=float(z_max),
        clipped=clipped,
    )

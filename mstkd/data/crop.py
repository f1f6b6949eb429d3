"""The training crop: where it lies, and cutting it without reading the rest of the volume."""

import numpy as np

from mstkd.data.sample import Sample

Shape = tuple[int, int, int]


def crop(sample: Sample, size: Shape, foreground_share: float, draws: np.random.Generator) -> Sample:
    """A crop of `size` (X, Y, Z) voxels, its image float32; smaller volumes are padded evenly with 0 (brain, label: 0).

    The place is uniform, or, in a share of the crops, centred on a labelled voxel, jittered by up to a quarter of
    the crop. Only the voxels of the crop are read from a mapped image.
    """
    foreground = draws.random() < foreground_share
    start = _uniform(sample.brain.shape, size, draws)
    if foreground and sample.label is not None:
        voxels = np.flatnonzero(sample.label)
        if len(voxels):
            start = _around(voxels[draws.integers(len(voxels))], sample.label.shape, size, draws)
    return Sample(
        image=_cut(sample.image, start, size, np.float32),
        brain=_cut(sample.brain, start, size, np.uint8),
        label=None if sample.label is None else _cut(sample.label, start, size, np.uint8),
        meta=sample.meta,
    )


def _uniform(shape: Shape, size: Shape, draws: np.random.Generator) -> list[int]:
    return [int(draws.integers(max(n - c, 0) + 1)) for n, c in zip(shape, size, strict=True)]


def _around(voxel: int, shape: Shape, size: Shape, draws: np.random.Generator) -> list[int]:
    centre = np.unravel_index(voxel, shape)
    jitter = [int(draws.integers(-(c // 4), c // 4 + 1)) for c in size]
    return [
        int(np.clip(v + j - c // 2, 0, max(n - c, 0))) for v, j, c, n in zip(centre, jitter, size, shape, strict=True)
    ]


def _cut(volume: np.ndarray, start: list[int], size: Shape, dtype: type) -> np.ndarray:
    box = (..., *(slice(s, s + c) for s, c in zip(start, size, strict=True)))
    part = volume[box].astype(dtype, order="C")
    missing = [c - n for c, n in zip(size, part.shape[-3:], strict=True)]
    if not any(missing):
        return part
    pad = [(0, 0)] * (part.ndim - 3) + [(m // 2, m - m // 2) for m in missing]
    return np.pad(part, pad)

"""The training crop: where it lies, and cutting it without reading the rest of the volume."""

from collections import OrderedDict

import numpy as np

from mstkd.data.sample import Sample

Shape = tuple[int, int, int]


class Foreground:
    """Draws labelled voxels of the subjects of one shard set.

    It remembers how many of them each slab of X holds, so that from the second time on a draw reads one slab of the
    label and not the volume. The draw itself depends on the label and the generator alone.
    """

    def __init__(self, subjects: int = 4096):
        self._capacity = subjects  # a few hundred bytes each
        self._counts: OrderedDict[str, np.ndarray] = OrderedDict()

    def draw(self, sample: Sample, draws: np.random.Generator) -> tuple[int, ...] | None:
        """One labelled voxel (x, y, z), each equally likely; None, and nothing drawn, if there is none."""
        until = np.cumsum(self._per_slab(sample))
        if not until[-1]:
            return None
        rank = int(draws.integers(until[-1]))  # among the labelled voxels in C order
        x = int(np.searchsorted(until, rank, side="right"))
        slab = sample.label[x]
        place = np.flatnonzero(slab)[rank - (until[x - 1] if x else 0)]
        return x, *(int(i) for i in np.unravel_index(place, slab.shape))

    def _per_slab(self, sample: Sample) -> np.ndarray:
        key = sample.meta.subject
        if key not in self._counts:
            self._counts[key] = np.array([np.count_nonzero(slab) for slab in sample.label != 0])
            if len(self._counts) > self._capacity:
                self._counts.popitem(last=False)
        return self._counts[key]


def crop(
    sample: Sample, size: Shape, foreground_share: float, draws: np.random.Generator, foreground: Foreground | None = None
) -> Sample:
    """A copy of `size` (X, Y, Z) voxels in the types stored; smaller volumes are padded evenly with 0.

    The place is uniform, or, in a share of the crops, centred on a labelled voxel, jittered by up to a quarter of
    the crop. Only the voxels of the crop are read from a mapped image. `foreground`: that of the subject's shard set.
    """
    centred = draws.random() < foreground_share
    start = _uniform(sample.brain.shape, size, draws)
    if centred and sample.label is not None:
        voxel = (foreground or Foreground()).draw(sample, draws)
        if voxel:
            start = _around(voxel, sample.label.shape, size, draws)
    return Sample(
        image=_cut(sample.image, start, size),
        brain=_cut(sample.brain, start, size),
        label=None if sample.label is None else _cut(sample.label, start, size),
        meta=sample.meta,
    )


def _uniform(shape: Shape, size: Shape, draws: np.random.Generator) -> list[int]:
    return [int(draws.integers(max(n - c, 0) + 1)) for n, c in zip(shape, size, strict=True)]


def _around(centre: tuple[int, ...], shape: Shape, size: Shape, draws: np.random.Generator) -> list[int]:
    jitter = [int(draws.integers(-(c // 4), c // 4 + 1)) for c in size]
    return [
        int(np.clip(v + j - c // 2, 0, max(n - c, 0))) for v, j, c, n in zip(centre, jitter, size, shape, strict=True)
    ]


def _cut(volume: np.ndarray, start: list[int], size: Shape) -> np.ndarray:
    box = (..., *(slice(s, s + c) for s, c in zip(start, size, strict=True)))
    part = volume[box]
    missing = [c - n for c, n in zip(size, part.shape[-3:], strict=True)]
    if not any(missing):
        return part.copy(order="C")
    whole = np.zeros((*volume.shape[:-3], *size), volume.dtype)
    whole[(..., *(slice(m // 2, m // 2 + n) for m, n in zip(missing, part.shape[-3:], strict=True)))] = part
    return whole

"""Statistics of a scan's voxels, exact: the order statistics are those of a full sort, at a fraction of its time."""

import numpy as np

from mstkd.shards.spec import SequenceStats

PERCENTILES = (0.1, 0.5, 50, 99.5, 99.9)
INTERVALS = np.r_[2**16 - 1 : 2**15 - 1 : -1, 0 : 2**15]  # upper 16 bits of a float32, by ascending value: negative ones mirrored
CHUNK_VOXELS = 2**15  # of float64, so that what is computed of them stays in the processor's cache


def statistics(voxels: np.ndarray) -> tuple[SequenceStats, float]:
    """Statistics and median of raw intensities (N,) float32, all finite."""
    low, low5, median, high5, high = percentiles(voxels, PERCENTILES)
    mean, std = mean_and_std(voxels)
    stats = SequenceStats(mean=mean, std=std, min=voxels.min(), max=voxels.max(), p0_1=low, p0_5=low5, p99_5=high5, p99_9=high)
    return stats, median


def percentiles(voxels: np.ndarray, shares: tuple[float, ...]) -> list[float]:
    """As np.percentile, linear between neighbours, of (N,) float32; `shares` in per cent."""
    places = np.array(shares) / 100 * (len(voxels) - 1)
    below = np.floor(places).astype(int)
    ranks = np.concatenate([below, np.minimum(below + 1, len(voxels) - 1)])
    lower, upper = order_statistics(voxels, ranks).astype(np.float64).reshape(2, -1)
    return (lower + (upper - lower) * (places - below)).tolist()


def order_statistics(voxels: np.ndarray, ranks: np.ndarray) -> np.ndarray:
    """np.sort(voxels)[ranks] of (N,) float32.

    The upper half of a float's bits puts it into one of 2^16 intervals. The voxels in each are counted, and only those
    in the intervals that hold a rank are sorted.
    """
    intervals = (voxels.view(np.uint32) >> 16).astype(np.intp)
    counts = np.bincount(intervals, minlength=INTERVALS.size)[INTERVALS]
    holding = np.searchsorted(counts.cumsum(), ranks, side="right")
    chosen = np.zeros(INTERVALS.size, bool)
    chosen[INTERVALS[holding]] = True
    members = np.sort(voxels[chosen.take(intervals)])
    skipped = np.where(chosen[INTERVALS], 0, counts).cumsum()  # voxels in lower intervals that are not among the members
    return members[ranks - skipped[holding]]


def mean_and_std(voxels: np.ndarray) -> tuple[float, float]:
    """Mean and population standard deviation of (N,) float32, in float64."""
    mean, squares = voxels.mean(dtype=np.float64), 0.0
    for start in range(0, len(voxels), CHUNK_VOXELS):
        deviation = voxels[start : start + CHUNK_VOXELS] - mean  # mean is a float64 scalar of NumPy: so is the result
        squares += np.square(deviation, out=deviation).sum()
    return float(mean), float(np.sqrt(squares / len(voxels)))

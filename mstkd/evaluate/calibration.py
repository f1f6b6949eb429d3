"""Whether probabilities are as often right as they say: the expected calibration error (ECE)."""

import numpy as np
from numpy.typing import NDArray

from mstkd.errors import UserError
from mstkd.evaluate.metrics import Mask

BINS = 15


def calibration_error(probability: NDArray[np.float32], truth: Mask) -> float:
    """ECE of a region's probability (X, Y, Z), 0 to 1, over all voxels of a box (Naeini et al., AAAI 2015; BINS as in Guo et al., ICML 2017).

    Over bins of equal width the mean of |mean probability - share of true voxels|, weighted by their voxels. As a region is there or
    not, its own probability is looked at, not that of the likelier answer: (1 - p, not there) would count every voxel twice. Raises
    UserError where a probability is no number.
    """
    if not np.isfinite(probability).all():
        raise UserError("evaluate.calibration: the network's probabilities hold NaN; choose another checkpoint")
    bins = np.minimum((probability * BINS).astype(np.uint8), BINS - 1).ravel()
    said = np.bincount(bins, probability.ravel(), BINS)
    true = np.bincount(bins[truth.ravel()], minlength=BINS)
    return float(np.abs(said - true).sum() / truth.size)

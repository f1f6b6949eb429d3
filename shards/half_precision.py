"""Stored float16 volumes as float32."""

import numpy as np

VALUES = np.arange(2**16, dtype=np.uint16).view(np.float16).astype(np.float32)  # of every pattern of 16 bits


def widened(halves: np.ndarray) -> np.ndarray:
    """A float16 array as float32, exactly. Looked up: NumPy converts bit by bit, which takes twice the time."""
    return VALUES.take(halves.view(np.uint16), mode="wrap")  # no index is out of range, so none is checked

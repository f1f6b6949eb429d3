"""The normalisation a method declares: an affine map and a clip per sequence, from the statistics in meta.json."""

from collections.abc import Sequence

import numpy as np

from mstkd.config import IntensityConfig
from mstkd.shards.clahe import equalised
from mstkd.shards.spec import SequenceStats, SubjectMeta


class Intensity:
    """Turns stored z-scored volumes into a method's intensities; loader and `predict` share it."""

    def __init__(self, config: IntensityConfig):
        self.config = config
        self.hidden_value = config.hidden_value

    def apply(self, image: np.ndarray, brain: np.ndarray, meta: SubjectMeta, sequences: Sequence[str]) -> np.ndarray:
        """Normalised float32 (M, X, Y, Z) from z-scored, or `prepared`, `image` of the same shape and `brain` (X, Y, Z), non-zero inside.

        `sequences` names the M channels. Outside the brain stands the background value of the normalisation; a
        sequence that the subject lacks is `hidden_value` throughout.
        """
        result = np.full(image.shape, self.hidden_value, dtype=np.float32)
        inside = np.asarray(brain, dtype=bool)
        for channel, sequence in enumerate(sequences):
            if sequence in meta.sequences:
                self._normalise(image[channel], inside, meta.stats[sequence], out=result[channel])
        return result

    def prepared(self, image: np.ndarray, brain: np.ndarray, meta: SubjectMeta, sequences: Sequence[str]) -> np.ndarray:
        """What `apply` takes in place of a whole stored image, or a part of it: itself, or equalised."""
        return equalised(image, brain, meta, sequences) if self.config.kind == "clahe" else image

    def _normalise(self, z: np.ndarray, inside: np.ndarray, stats: SequenceStats, out: np.ndarray) -> None:
        if self.config.kind in ("zscore", "clahe"):
            np.multiply(z, inside, out=out)
            return
        low, high = self._raw_range(stats)
        floor, ceiling = self.config.interval
        if high <= low:  # constant: everything is the minimum
            return
        per_raw = (ceiling - floor) / (high - low)
        scaled = z.astype(np.float32) * np.float32(stats.std * per_raw) + np.float32((stats.mean - low) * per_raw + floor)
        background = floor
        if self.config.kind == "reference_minmax":
            background = floor - low * per_raw  # where raw 0 is mapped to
        out[...] = np.where(inside, np.clip(scaled, floor, ceiling), np.float32(background))

    def _raw_range(self, stats: SequenceStats) -> tuple[float, float]:
        if self.config.kind == "percentile":
            return (stats.p0_1, stats.p99_9) if self.config.percentile == "0.1" else (stats.p0_5, stats.p99_5)
        if self.config.kind == "reference_minmax":  # the whole array: outside the brain its value is 0
            return min(stats.min, 0.0), max(stats.max, 0.0)
        return stats.min, stats.max

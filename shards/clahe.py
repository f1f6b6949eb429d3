"""Contrast-limited adaptive histogram equalisation of stored volumes (Zuiderveld, Graphics Gems IV, 1994), in three dimensions.

As in the released code of UHF-guided segmentation (arXiv:2402.08409): kernel a fifth of the volume per axis, clip limit 0.2. There it was
computed again for every item of every epoch; here once, when the set is built.
"""

from collections.abc import Sequence

import numpy as np

from mstkd.shards.spec import SubjectMeta

KERNELS = 5  # per axis
CLIP_LIMIT = 0.2


def equalised(image: np.ndarray, brain: np.ndarray, meta: SubjectMeta, sequences: Sequence[str]) -> np.ndarray:
    """The whole stored image (M, X, Y, Z), z-scored, equalised: float16 in [0, 1], 0 outside the brain (X, Y, Z) and in absent sequences.

    The 0.5 and 99.5 percentiles of the brain become 0 and 1 first.
    """
    from skimage.exposure import equalize_adapthist  # late: most builds equalise nothing

    result, inside = np.zeros(image.shape, np.float16), np.asarray(brain, dtype=bool)
    kernel = [max(size // KERNELS, 1) for size in brain.shape]
    for channel, name in enumerate(sequences):
        stats = meta.stats.get(name)
        if name not in meta.sequences or stats.p99_5 <= stats.p0_5:
            continue
        raw = image[channel].astype(np.float32) * stats.std + stats.mean
        unit = np.where(inside, np.clip((raw - stats.p0_5) / (stats.p99_5 - stats.p0_5), 0, 1), 0)
        result[channel] = np.where(inside, equalize_adapthist(unit, kernel, CLIP_LIMIT), 0)
    return result

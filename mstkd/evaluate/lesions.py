"""Lesion-wise scores of BraTS 2023 (Saluja et al., "BraTS 2023 Lesion-Wise Performance Metrics").

Truth components that meet after three 18-connected dilations are one lesion. Every 26-connected predicted component
that touches a lesion's dilation belongs to it; one that touches none is a false lesion.
"""

import numpy as np
from scipy.ndimage import binary_dilation, generate_binary_structure, label

from mstkd.evaluate.metrics import Mask, Reference, bounding_box, dice

DILATIONS = 3
SMALLEST_MM3 = 50.0  # truth lesions up to this size are not scored
PENALTY_MM = 374.0


def lesion_wise(prediction: Mask, truth: Mask, spacing_mm: tuple[float, ...]) -> tuple[float, float]:
    """(mean Dice, mean HD95 in mm) over scored truth lesions and false lesions; without any (1, 0)."""
    either = prediction | truth
    if not either.any():
        return 1.0, 0.0
    box = bounding_box(either)
    prediction, truth = np.pad(prediction[box], DILATIONS), np.pad(truth[box], DILATIONS)  # lesions may meet beyond the box
    near, everywhere = generate_binary_structure(3, 2), np.ones((3, 3, 3))
    grown, count = label(binary_dilation(truth, near, DILATIONS), everywhere)
    predicted, predicted_count = label(prediction, everywhere)
    matched: set[int] = set()
    scores = []
    for number in range(1, count + 1):
        lesion = truth & (grown == number)
        touching = np.unique(predicted[binary_dilation(lesion, near, DILATIONS)])
        touching = touching[touching > 0]
        matched.update(touching.tolist())
        if np.count_nonzero(lesion) * np.prod(spacing_mm) <= SMALLEST_MM3:
            continue
        found = np.isin(predicted, touching) if len(touching) else np.zeros_like(truth)
        scores.append((dice(found, lesion), Reference(lesion, spacing_mm, PENALTY_MM).hd95_mm(found)))
    scores += [(0.0, PENALTY_MM)] * (predicted_count - len(matched))
    if not scores:
        return 1.0, 0.0
    means = np.mean(scores, axis=0)
    return float(means[0]), float(means[1])

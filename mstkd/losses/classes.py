"""What a network learns of label maps whose classes exclude each other. Pure functions.

Source of weights and Dice: Oh et al., arXiv:2402.08409, and its released code. Letters: B samples, K classes, "..." the spatial axes.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from mstkd.losses.dice import soft_dice

RARE = 5.0  # the largest weight of a class, and what a border adds


def frequency_weights(target: Tensor, classes: int) -> Tensor:
    """(B, ...) weights of voxels of a map of class indices (B, ...): the median class's count over the own class's, 5 at most.

    Classes are counted over the batch; those that are absent do not count for the median.
    """
    count = torch.stack([(target == index).sum() for index in range(classes)]).float()
    ranked, present = count.masked_fill(count == 0, float("inf")).sort().values, (count > 0).sum()
    median = (ranked.gather(0, ((present - 1) // 2)[None]) + ranked.gather(0, (present // 2)[None])) / 2
    return (median / count.clamp_min(1)).clamp_max(RARE)[target]


def edge_weights(target: Tensor) -> Tensor:
    """(B, ...) 5 where the class differs from a neighbour's along some axis, else 0.

    These are the voxels where the map's gradient is not zero, and the inside of structures that are one voxel thin.
    """
    edge = torch.zeros_like(target, dtype=torch.bool)
    for axis in range(1, target.dim()):
        length = target.shape[axis] - 1
        differs = target.narrow(axis, 0, length) != target.narrow(axis, 1, length)
        edge.narrow(axis, 0, length).logical_or_(differs)
        edge.narrow(axis, 1, length).logical_or_(differs)
    return RARE * edge


def weighted_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Mean over all voxels of cross-entropy times frequency and edge weights; logits (B, K, ...), class indices (B, ...)."""
    weights = frequency_weights(target, logits.shape[1]) + edge_weights(target)
    return (weights * F.cross_entropy(logits, target, reduction="none")).mean()


def class_dice(logits: Tensor, target: Tensor, absent: Literal["skipped", "counted"] = "skipped") -> Tensor:
    """Mean soft Dice loss of the classes that the batch shows; logits (B, K, ...), class indices (B, ...).

    `absent`: classes that it does not show. Counted, as in the released code, each costs 1 whatever the network says.
    """
    truth = F.one_hot(target, logits.shape[1]).movedim(-1, 1).to(logits.dtype)
    loss = soft_dice(logits.softmax(1), truth)
    if absent == "counted":
        return loss.mean()
    here = truth.flatten(2).sum((0, 2)) > 0
    return (loss * here).sum() / here.sum()

"""Soft Dice, per channel."""

from torch import Tensor

EPSILON = 1e-7


def soft_dice(probability: Tensor, target: Tensor) -> Tensor:
    """(K,) losses `1 - 2 sum(pg) / (sum(p^2) + sum(g^2) + 1e-7)` of probability and target, both (B, K, X, Y, Z) or (B, K, X, Y).

    The sums run over batch and voxels together. A channel without a target voxel has loss 1 and almost no
    gradient; a cross-entropy companion helps there. Source: V-Net (3DV 2016), as MST-KDNet sums it.
    """
    voxels = (0, *range(2, probability.dim()))
    overlap = (probability * target).sum(voxels)
    size = probability.square().sum(voxels) + target.square().sum(voxels)
    return 1 - 2 * overlap / (size + EPSILON)


def plain_dice(probability: Tensor, target: Tensor, reference: bool = False) -> Tensor:
    """(K,) losses `1 - (2 sum(pg) + 1) / (sum(p) + sum(g) + 1)` of probability and target, both (B, K, X, Y, Z); mean over the batch.

    The sums run over a sample's voxels. `reference`: as ShaSpec's released code (arXiv:2307.14126), without the 1 in the numerator: a
    perfect prediction is then not 0, and an empty target gives 1 whatever is predicted, hence no gradient towards silence.
    """
    voxels = (2, 3, 4)
    overlap = 2 * (probability * target).sum(voxels)
    size = probability.sum(voxels) + target.sum(voxels)
    return 1 - ((overlap + (0 if reference else 1)) / (size + 1)).mean(0)

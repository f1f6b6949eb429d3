"""What a student learns from a teacher: probabilities, logits, features, attention; most of it from MST-KDNet (MICCAI 2025, arXiv:2507.22626).

Pure functions; `full` is the teacher's tensor, `missing` the student's. B samples, K classes, H heads, N tokens.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

EPSILON = 1e-7


def ramp_up(epoch: int, epochs: int) -> float:
    """Gaussian ramp `exp(-5 (1 - min(e, E) / E)^2)` from 0.0067 at epoch 0 to 1 at `epochs` (Laine & Aila, ICLR 2017)."""
    return math.exp(-5 * (1 - min(epoch, epochs) / epochs) ** 2)


def consistency(full: Tensor, missing: Tensor) -> Tensor:
    """Mean squared difference of probabilities (B, K, X, Y, Z), summed over the K channels."""
    return (full - missing).square().mean((0, 2, 3, 4)).sum()


def standardised_kl(full: Tensor, missing: Tensor, temperature: float) -> Tensor:
    """`tau^2 KL(full || missing)` of softmax(z-scored logits / tau) over the classes; mean over batch and voxels.

    Logits (B, K, X, Y, Z). The z-score runs over the classes with the unbiased standard deviation, so that a
    positive affine change of a voxel's logits leaves the loss as it is (logit standardisation, CVPR 2024).
    """
    target = F.log_softmax(_standardise(full, 1) / temperature, 1)
    source = F.log_softmax(_standardise(missing, 1) / temperature, 1)
    return F.kl_div(source, target, log_target=True, reduction="none").sum(1).mean() * temperature**2


def reference_kl(full: Tensor, missing: Tensor, temperature: float) -> Tensor:
    """The released code's form of `standardised_kl`, for parity runs.

    Three oddities: the student is the target, the z-score runs along Z, and the sum over everything is divided by
    the batch size and once more by the number of elements.
    """
    target = F.log_softmax(_standardise(missing, -1) / temperature, 1)
    source = F.log_softmax(_standardise(full, -1) / temperature, 1)
    return F.kl_div(source, target, log_target=True, reduction="batchmean") / full.numel() * temperature**2


def feature_matching(full: Sequence[Tensor], missing: Sequence[Tensor]) -> Tensor:
    """Sum over the layers of the mean squared difference of two features of equal shape."""
    return torch.stack([F.mse_loss(m, f) for f, m in zip(full, missing, strict=True)]).sum()


def moment_matching(full: Sequence[Tensor], missing: Sequence[Tensor]) -> Tensor:
    """Sum over the layers of the mean squared differences of two features' means and standard deviations over the channels, voxel by voxel.

    Features (B, C, ...); the standard deviation is the biased one. Source: Oh et al., arXiv:2402.08409; there summed over the batch.
    """
    pairs = [(_moments(m), _moments(f)) for f, m in zip(full, missing, strict=True)]
    return torch.stack([F.mse_loss(m, f) for ours, theirs in pairs for m, f in zip(ours, theirs, strict=True)]).sum()


def _moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation over the channels, (B, ...) each."""
    variance = features.var(1, correction=0)
    return features.mean(1), variance.clamp_min(EPSILON**2).sqrt()  # the root's gradient at 0 is infinite


def attention_extremes(full: Sequence[Tensor], missing: Sequence[Tensor], scale: float = 1.0) -> Tensor:
    """Extreme-value distillation of L attention maps, each (B, H, N, N), multiplied by `scale` first.

    The maps of one network are weighted by their elementwise maximum, minimum and mean over the layers; the loss
    is the sum of the 3 L mean squared differences of the products. Entries are about 1/N, so the squared
    products are about 1/N^4: `scale = N` makes the value independent of the crop and safe in half precision.
    """
    return (_extremes(full, scale) - _extremes(missing, scale)).square().mean((2, 3, 4, 5)).sum()


def _extremes(maps: Sequence[Tensor], scale: float) -> Tensor:
    """(3, L, B, H, N, N): every map times each statistic."""
    stack = torch.stack(tuple(maps)) * scale
    statistics = torch.stack([stack.amax(0), stack.amin(0), stack.mean(0)])
    return statistics[:, None] * stack


def _standardise(logits: Tensor, axis: int) -> Tensor:
    centred = logits - logits.mean(axis, keepdim=True)
    # the unbiased standard deviation, by hand: Tensor.std is fifty times slower over a few classes of many voxels
    variance = centred.square().sum(axis, keepdim=True) / (logits.shape[axis] - 1)
    deviation = variance.clamp_min(EPSILON**2).sqrt()  # the root's gradient at 0 is infinite
    return centred / (EPSILON + deviation)

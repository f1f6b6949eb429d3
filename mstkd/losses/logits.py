"""What a student learns from a teacher's logits of overlapping regions."""

import torch.nn.functional as F
from torch import Tensor


def bernoulli_kl(full: Tensor, missing: Tensor, temperature: float) -> Tensor:
    """`tau^2 KL(full || missing)` of the Bernoulli variables sigmoid(logits / tau), mean over all elements.

    Logits (B, K, X, Y, Z), each channel a region of its own: the softened targets of Hinton et al.
    (arXiv:1503.02531) where the classes do not exclude each other. 0 where the two agree.
    """
    target = (full / temperature).sigmoid()
    cross, own = (F.binary_cross_entropy_with_logits(logits / temperature, target) for logits in (missing, full))
    return (cross - own) * temperature**2

"""What pulls shared features together and specific ones apart (ShaSpec: Wang et al., CVPR 2023, arXiv:2307.14126).

Letters: B samples, M views or sequences.
"""

from itertools import combinations

import torch
import torch.nn.functional as F
from torch import Tensor


def distribution_alignment(shared: Tensor, available: Tensor) -> Tensor:
    """DAO, the L1 form: M / |P| times the sum of mean |r_i - r_j| over the pairs P of available ones, averaged over the samples.

    `shared` (B, M, ...), `available` (B, M) bool. 0 for a sample with one available; as the released code's sum over
    neighbours where all are there.
    """
    count, shared = available.shape[1], shared.float()
    pairs = list(combinations(range(count), 2))
    if not pairs:
        return shared.sum() * 0
    distances = torch.stack([(shared[:, i] - shared[:, j]).abs().flatten(1).mean(1) for i, j in pairs], dim=1)
    both = torch.stack([available[:, i] & available[:, j] for i, j in pairs], dim=1)
    return (count * torch.where(both, distances, 0).sum(1) / both.sum(1).clamp_min(1)).mean()


def domain_classification(logits: Tensor, available: Tensor) -> Tensor:
    """DCO: cross-entropy of naming the view that a specific feature came from, over the available ones of a sample, averaged over the samples.

    `logits` (B, M, M): for the feature of view m, a score for each view; `available` (B, M) bool.
    """
    samples, count = available.shape
    own = torch.arange(count, device=logits.device).expand(samples, count)
    losses = F.cross_entropy(logits.float().flatten(0, 1), own.flatten(), reduction="none").reshape(samples, count)
    return (torch.where(available, losses, 0).sum(1) / available.sum(1)).mean()

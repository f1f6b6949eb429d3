"""Distribution alignment (DAO) and domain classification (DCO) of ShaSpec (Wang et al., CVPR 2023, arXiv:2307.14126).

Pure functions. N features of pairs (sample, sequence), sample by sample; M sequences, C channels.
"""

import math
from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor


def alignment(
    shared: Tensor, pairs: Sequence[tuple[int, int]], sequences: int, kind: Literal["l1", "mse", "kl"] = "l1", cyclic: bool = False
) -> Tensor:
    """How far shared features (N, C, ...) of one sample's sequences are from each other: M times the mean over pairs of sequences.

    Mean over the samples; a sample with one sequence counts 0. l1, mse: mean over a feature's elements. kl: of the softmax over the
    channels in each voxel, mean of both directions, mean over the voxels. `cyclic`: neighbours in a ring of all M only, as in the
    released code, which with all of them given is this sum: (0, 1), (1, 2), ..., (M-1, 0).
    """
    distance = DISTANCES[kind]
    samples: dict[int, dict[int, Tensor]] = {}
    for (sample, sequence), feature in zip(pairs, shared.unbind(), strict=True):
        samples.setdefault(sample, {})[sequence] = feature
    ring = [(m, (m + 1) % sequences) for m in range(sequences)]
    total = 0 * shared.mean()  # in the graph even without a pair: under ZeRO-3 every rank's backward pass must meet the same modules
    for features in samples.values():
        chosen = [pair for pair in ring if features.keys() >= set(pair)] if cyclic else list(combinations(features, 2))
        for one, other in chosen:
            total = total + distance(features[one], features[other]) * (sequences / len(chosen))
    return total / len(samples)


def undecided(domains: Tensor) -> Tensor:
    """Cross-entropy of domain logits (N, M) to the uniform distribution, less its minimum ln M; mean over N."""
    return -F.log_softmax(domains, 1).mean() - math.log(domains.shape[1])


def classification(domains: Tensor, pairs: Sequence[tuple[int, int]]) -> Tensor:
    """Cross-entropy of domain logits (N, M) to the sequences that the features came from; mean over N."""
    return F.cross_entropy(domains, torch.tensor([sequence for _, sequence in pairs], device=domains.device))


def _symmetric_kl(one: Tensor, other: Tensor) -> Tensor:
    """Of two features (C, x, y, z): (KL(p || q) + KL(q || p)) / 2 over the channels, mean over the voxels."""
    p, q = F.log_softmax(one, 0), F.log_softmax(other, 0)
    return ((p.exp() - q.exp()) * (p - q)).sum(0).mean() / 2


DISTANCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"l1": F.l1_loss, "mse": F.mse_loss, "kl": _symmetric_kl}

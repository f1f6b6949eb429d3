"""How far a completed stack is from the true one. Pure functions; B samples, M sequences, S pixels per axis."""

from typing import NamedTuple

from torch import Tensor


class Errors(NamedTuple):
    """Mean squared errors over samples, pixels and, in each sample, the sequences of one kind; 0-d."""

    missing: Tensor
    observed: Tensor
    loss: Tensor


def completion_errors(made: Tensor, image: Tensor, missing: Tensor, w_missing: float = 1.0, w_observed: float = 1.0, joint: bool = True) -> Errors:
    """Of `made` against `image`, both (B, M, S, S) float32, with v (B, M) float: 1 = missing; each sample has both kinds.

    `joint`: the loss is the mean over all sequences, each with its weight (Meng et al., IEEE TMI 2024), else over the missing ones alone.
    Every sample counts the same, however many it lacks: a batch cut in parts has the mean of their losses.
    """
    errors = (made - image).square().mean((2, 3))
    of_missing, of_observed, count = (errors * missing).sum(1), (errors * (1 - missing)).sum(1), missing.sum(1)
    alone = (of_missing / count).mean()
    loss = (w_missing * of_missing + w_observed * of_observed).mean() / missing.shape[1] if joint else w_missing * alone
    return Errors(alone.detach(), (of_observed / (missing.shape[1] - count)).mean().detach(), loss)

"""Critics: Wasserstein with a gradient penalty (Gulrajani et al., NeurIPS 2017, arXiv:1704.00028), least squares (Mao et al., ICCV 2017,
arXiv:1611.04076), and plain ones. Pure functions; B samples."""

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

EPSILON = 1e-12  # below the root of a squared norm: its gradient at 0 is infinite


def critic_loss(real: Tensor, fake: Tensor) -> Tensor:
    """`mean(fake) - mean(real)` of a critic's scores (B, ...): minus its estimate of the Wasserstein distance."""
    return fake.mean() - real.mean()


def deception_loss(fake: Tensor) -> Tensor:
    """`-mean(fake)` of a critic's scores (B, ...): what the generator of these samples descends."""
    return -fake.mean()


def gradient_penalty(scores: Callable[[Tensor], Tensor], real: Tensor, fake: Tensor, patch: Literal["sum", "mean"] = "sum") -> Tensor:
    """Mean over the batch of `(|grad f(h)| - 1)^2` at points h drawn between real and fake samples, both (B, ...).

    `scores` gives (B, ...) scores of samples, whose `patch` sum or mean is f; with n scores per sample, `sum` asks of their mean a
    gradient of 1 / n. One uniform share per sample (torch's generator). Differentiable in the critic's weights.
    """
    share = torch.rand(len(real), *[1] * (real.dim() - 1), device=real.device)
    between = (share * real + (1 - share) * fake).detach().requires_grad_()
    values = scores(between.view_as(between)).flatten(1)  # torch's FLOP counter cannot follow a module whose input is the leaf itself
    total = (values.sum(1) if patch == "sum" else values.mean(1)).sum()
    (gradient,) = torch.autograd.grad(total, between, create_graph=True)
    norm = (gradient.flatten(1).square().sum(1) + EPSILON).sqrt()
    return (norm - 1).square().mean()


def realness_error(logits: Tensor, real: bool) -> Tensor:
    """Mean cross-entropy of logits (B, ...) against "all are real", or "none is" (Goodfellow et al., NeurIPS 2014)."""
    return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, float(real)))


def least_squares_critic_loss(real: Tensor, fake: Tensor) -> Tensor:
    """`0.5 (mean (real - 1)^2 + mean fake^2)` of a critic's scores (B, ...)."""
    return 0.5 * ((real - 1).square().mean() + fake.square().mean())


def least_squares_deception_loss(fake: Tensor) -> Tensor:
    """`0.5 mean (fake - 1)^2` of a critic's scores (B, ...): what the generator of these samples descends."""
    return 0.5 * (fake - 1).square().mean()

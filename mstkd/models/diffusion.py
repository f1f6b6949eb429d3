"""Gaussian diffusion of the missing sequences of a stack (Ho et al., NeurIPS 2020): tables, the forward process, two samplers.

Letters: T steps, beta_t, A_t = prod (1 - beta_s) over s <= t, A_0 = 1; B samples, M sequences, S pixels per axis. Tables are in double precision
and begin with t = 0, the clean stack. The mask of a stack is v (B, M) float: 1 = the sequence is missing, 0 = it is observed. Networks predict
the clean stack x_0 and no noise. Observed sequences are never noised, and stand in every step of a sampler, and in its result, as they were given.
"""

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Denoiser = Callable[[Tensor, Tensor, Tensor], Tensor]  # (x_t (B, M, S, S), t (B,), v (B, M)) -> x_0 (B, M, S, S)

LARGEST_BETA = 0.999  # of the cosine schedule, as published


@dataclass(frozen=True)
class Diffusion:
    """The forward process q(x_t | x_{t-1}) = N(sqrt(1 - beta_t) x_{t-1}, beta_t I)."""

    beta: tuple[float, ...]  # beta_0 = 0, beta_1 ... beta_T
    kept: tuple[float, ...]  # A_0 ... A_T

    @classmethod
    def of(cls, betas: Sequence[float]) -> "Diffusion":
        """From beta_1 ... beta_T."""
        return cls((0.0, *betas), tuple(accumulate((1 - beta for beta in betas), operator.mul, initial=1.0)))

    @classmethod
    def linear(cls, steps: int, first: float, last: float) -> "Diffusion":
        """beta_t from `first` to `last` in even steps (Ho et al.: 1e-4 to 0.02 in 1000)."""
        return cls.of([first + (last - first) * step / max(steps - 1, 1) for step in range(steps)])

    @classmethod
    def cosine(cls, steps: int) -> "Diffusion":
        """A_t as a squared cosine (Nichol & Dhariwal, ICML 2021, equation 17)."""
        kept = [math.cos((step / steps + 0.008) / 1.008 * math.pi / 2) ** 2 for step in range(steps + 1)]
        return cls.of([min(1 - after / before, LARGEST_BETA) for before, after in pairwise(kept)])

    @property
    def steps(self) -> int:
        """T."""
        return len(self.beta) - 1

    def noised(self, image: Tensor, t: Tensor, missing: Tensor, noise: Tensor) -> Tensor:
        """M_t of stacks `image` (B, M, S, S) at t (B,) from 1: missing sequences with `noise` of N(0, I), observed ones bit for bit."""
        kept = torch.tensor(self.kept, dtype=torch.float64, device=t.device)[t][:, None, None, None]
        mixed = kept.sqrt().to(image.dtype) * image + (1 - kept).sqrt().to(image.dtype) * noise
        return torch.where(hidden(missing), mixed, image)

    def posterior(self, t: int, variance: Literal["beta", "beta_tilde"] = "beta") -> tuple[float, float, float]:
        """c1, c2 and s^2 of q(x_{t-1} | x_t, x_0) = N(c1 x_0 + c2 x_t, s^2 I).

        `beta`: s^2 = beta_t, as the paper sets it; `beta_tilde`: the posterior's own, (1 - A_{t-1}) / (1 - A_t) beta_t.
        """
        beta, kept, before = self.beta[t], self.kept[t], self.kept[t - 1]
        spread = beta if variance == "beta" else (1 - before) / (1 - kept) * beta
        if t == 1:  # exactly: the formula gives 1.00000000000011
            return 1.0, 0.0, spread
        return math.sqrt(before) * beta / (1 - kept), math.sqrt(1 - beta) * (1 - before) / (1 - kept), spread


class Move(NamedTuple):
    """One reverse step from t: clean * x_0 + noisy * x_t + std * z, z of N(0, I). The last of a sampler is x_0 itself."""

    t: int
    clean: float
    noisy: float
    std: float


def ancestral(diffusion: Diffusion, variance: Literal["beta", "beta_tilde"] = "beta") -> list[Move]:
    """All T steps (Ho et al., algorithm 2); no noise is added at t = 1."""
    moves = []
    for t in range(diffusion.steps, 0, -1):
        clean, noisy, spread = diffusion.posterior(t, variance)
        moves.append(Move(t, clean, noisy, math.sqrt(spread) if t > 1 else 0.0))
    return moves


def ddim(diffusion: Diffusion, steps: int, eta: float = 0.0) -> list[Move]:
    """`steps` of the T, evenly spaced, from T down (Song et al., ICLR 2021, equations 12 and 16). `eta` 0: none adds noise."""
    times = [round(diffusion.steps * step / steps) for step in range(steps, -1, -1)]
    moves = []
    for t, after in pairwise(times):
        kept, kept_after = diffusion.kept[t], diffusion.kept[after]
        std = eta * math.sqrt((1 - kept_after) / (1 - kept)) * math.sqrt(1 - kept / kept_after)
        noise = math.sqrt(max(1 - kept_after - std**2, 0.0)) / math.sqrt(1 - kept)  # of x_t - sqrt(A_t) x_0, which is noise
        moves.append(Move(t, math.sqrt(kept_after) - noise * math.sqrt(kept), noise, std))
    return moves


@dataclass(frozen=True)
class Noise:
    """N(0, I) from a generator of its own. `shared`: the same for all samples of a batch, so that neighbouring slices do not flicker."""

    generator: torch.Generator
    shared: bool = False

    def __call__(self, like: Tensor) -> Tensor:
        shape = (1, *like.shape[1:]) if self.shared else like.shape
        return torch.randn(shape, generator=self.generator, device=self.generator.device, dtype=like.dtype).expand_as(like)


def complete(denoise: Denoiser, given: Tensor, missing: Tensor, moves: Sequence[Move], noise: Noise, samples: int = 1, clamp: bool = True) -> Tensor:
    """Stacks (B, M, S, S) with their missing sequences sampled; what `given` (B, M, S, S) holds in their place changes nothing.

    `samples`: the mean of so many, which is nearer to the truth in the square and blurs. `clamp`: every prediction to [-1, 1].
    """
    total = sum(_sampled(denoise, given, missing, moves, noise, clamp) for _ in range(samples))
    return torch.where(hidden(missing), total / samples, given)


def _sampled(denoise: Denoiser, given: Tensor, missing: Tensor, moves: Sequence[Move], noise: Noise, clamp: bool) -> Tensor:
    gone = hidden(missing)
    x = torch.where(gone, noise(given), given)
    for move in moves:
        made = denoise(x, torch.full((len(x),), move.t, device=x.device), missing).to(x.dtype)
        made = made.clamp(-1, 1) if clamp else made
        after = move.clean * made + move.noisy * x
        x = torch.where(gone, after + move.std * noise(x) if move.std else after, given)
    return x


def hidden(missing: Tensor) -> Tensor:
    """v (B, M) as a mask (B, M, 1, 1) bool over pixels: True = missing."""
    return missing.bool()[:, :, None, None]

"""Linear regression by voxel: every missing sequence as a weighted sum of the given ones, for each pattern by itself.

The comparator between copying a given sequence and a network: what intensities alone predict, without neighbours or anatomy. A missing voxel
is w . (given voxels) + b where something given is not background, and background elsewhere; w and b belong to the pattern. They begin as the mean of
what is given, and learn by squared error over the missing sequences, as `m2dn` does with `joint: false`.
"""

import torch
from torch import Tensor, nn

from mstkd.batch import Batch, Progress, StepOutput, hide
from mstkd.config import AvailabilityConfig, OptimizerConfig, Section
from mstkd.losses.completion import completion_errors
from mstkd.losses.precision import full_precision
from mstkd.methods import DataFacts, Method, Role, RoleStep
from mstkd.methods._translation import TanhIntensity
from mstkd.methods.m2dn import check_proper, given_subsets, missing_of


class RegressionConfig(Section):
    intensity: TanhIntensity = TanhIntensity()


class Regressions(nn.Module):
    """A linear regression for every target in every pattern of M sequences."""

    def __init__(self, sequences: int):
        super().__init__()
        numbers = torch.arange(2**sequences)[:, None] >> torch.arange(sequences) & 1  # (2^M, M): which are given, by the pattern's number
        shares = numbers / numbers.sum(1, keepdim=True).clamp(min=1)
        self.weight = nn.Parameter(shares[:, None].repeat(1, sequences, 1))  # (pattern, target, given)
        self.bias = nn.Parameter(torch.zeros(2**sequences, sequences))

    def forward(self, image: Tensor, available: Tensor) -> Tensor:
        """(B, M, S, S), 0 at background, from image (B, M, S, S), in which background is 0; what is not available (B, M) is not looked at."""
        number = (available.long() << torch.arange(available.shape[1], device=available.device)).sum(1)
        given = hide(image, available, 0.0)
        made = torch.einsum("btm,bmxy->btxy", self.weight[number], given) + self.bias[number][:, :, None, None]
        return torch.where((given > 0).any(1, keepdim=True), made, 0.0)


class RegressionStep(RoleStep):
    def __init__(self, network: Regressions, background: float):
        super().__init__()
        self.network, self.background = network, background

    def forward(self, batch: Batch, carry: dict[str, Tensor], progress: Progress) -> StepOutput:
        with full_precision(batch.image):
            made = self.network(batch.image.float() - self.background, batch.available) + self.background
            errors = completion_errors(made, batch.image, missing_of(batch.available), joint=False)
        return StepOutput(errors.loss, {"missing": errors.missing})


class VoxelRegression(Method):
    Config = RegressionConfig
    task = "synthesis"
    dimensions = 2
    stages = ("train",)
    scored = ("student",)
    paper = "none: linear regression"
    reproduces = "a floor that learns from intensities alone"
    config: RegressionConfig

    def __init__(self, config: RegressionConfig, facts: DataFacts):
        self.config, self._subsets = config, given_subsets(None, facts.sequences)
        self.networks: dict[str, nn.Module] = {"student": Regressions(len(facts.sequences))}

    @property
    def subsets(self) -> tuple[str, ...]:
        return self._subsets

    def availability(self, stage: str) -> AvailabilityConfig:
        return AvailabilityConfig(kind="proper")

    def check_available(self, available: Tensor) -> None:
        check_proper(available)

    def roles(self, stage: str) -> dict[str, Role]:
        step = RegressionStep(self.networks["student"], self.intensity.hidden_value)
        return {"student": Role(step, ("student",), optimizer=OptimizerConfig(name="adam", lr=1e-2))}

    @torch.no_grad()
    def predict(self, image: Tensor, available: Tensor, network: str = "student") -> Tensor:
        self.check_available(available)
        background = self.intensity.hidden_value
        with full_precision(image):
            made = self.networks[network](image.float() - background, available) + background
        return torch.where(available[:, :, None, None], image, made.to(image.dtype))


METHOD = VoxelRegression

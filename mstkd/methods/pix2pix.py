"""pix2pix for one pattern: the missing sequences from the given ones, by a U-Net that a critic of patches compares with true pairs.

From Isola et al. (CVPR 2017, arXiv:1611.07004) it takes the conditional critic, the cross-entropy with half weight for the critic, L1 times 100,
Adam with 2e-4 and beta_1 = 0.5, and a rate that falls in the second half. Not its own are the networks: the generator is one encoder-decoder pair of
UTAD-Net (instance norms, no dropout, so that it draws nothing), the critic has four strided layers, patches of 78 pixels (there 70), and no
norms. One model per pattern is what one model for all is measured against; a sweep over `method.subset` trains them all.
"""

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from mstkd.batch import Batch, Progress, StepOutput
from mstkd.config import AvailabilityConfig, OptimizerConfig, Section
from mstkd.errors import UserError
from mstkd.losses.adversarial import realness_error
from mstkd.losses.precision import full_precision
from mstkd.methods import DataFacts, Method, Role, RoleStep
from mstkd.methods._terms import weighted
from mstkd.methods._translation import SCHEDULE, CriticConfig, NetworkConfig, TanhIntensity, check_size
from mstkd.methods.m2dn import given_subsets
from mstkd.models.critics import PatchCritic, initialise
from mstkd.models.utad_net import Decoder, Double, Encoder, Up
from mstkd.subsets import parse_subset


class PatchCriticConfig(CriticConfig):
    layers: int = Field(4, ge=1)


class Pix2PixWeights(Section):
    l1: float = Field(100.0, ge=0)
    adversarial: float = Field(1.0, ge=0)


class Pix2PixConfig(Section):
    network: NetworkConfig = NetworkConfig()
    critic: PatchCriticConfig = PatchCriticConfig()
    subset: str | None = None  # what is given, e.g. t1+t2; default: all but the last sequence
    weights: Pix2PixWeights = Pix2PixWeights()
    intensity: TanhIntensity = TanhIntensity()


class PairGenerator(nn.Module):
    """Some sequences of a slice from others."""

    def __init__(self, inputs: int, outputs: int, width: int, levels: int):
        super().__init__()
        self.encoder, self.decoder = Encoder(inputs, width, levels), Decoder(width, levels, outputs)
        initialise(self)

    def forward(self, given: Tensor) -> Tensor:
        """(B, outputs, S, S) float32 in [-1, 1] from (B, inputs, S, S)."""
        return self.decoder(*self.encoder(given))


class CriticStep(RoleStep):
    """The critic tells true pairs from made ones."""

    def __init__(self, critic: nn.Module, generator: nn.Module, given: list[int], missing: list[int]):
        super().__init__()
        self.critic, self.generator = critic, (generator,)  # a tuple: not registered as a submodule
        self.given, self.missing = given, missing

    def forward(self, batch: Batch, carry: dict[str, Tensor], progress: Progress) -> StepOutput:
        given, truth = batch.image[:, self.given], batch.image[:, self.missing]
        with torch.no_grad():
            made = self.generator[0](given)
        pairs = self.critic(torch.cat([given, truth], 1)), self.critic(torch.cat([given, made], 1))
        with full_precision(given):
            loss = (realness_error(pairs[0].float(), True) + realness_error(pairs[1].float(), False)) / 2
        return StepOutput(loss, {"critic": loss.detach()})


class GeneratorStep(RoleStep):
    """The generator comes near to the truth and deceives the critic."""

    def __init__(self, generator: nn.Module, critic: nn.Module, given: list[int], missing: list[int], weights: Pix2PixWeights):
        super().__init__()
        self.generator, self.critic = generator, (critic,)
        self.given, self.missing, self.weights = given, missing, weights

    def forward(self, batch: Batch, carry: dict[str, Tensor], progress: Progress) -> StepOutput:
        given, truth = batch.image[:, self.given], batch.image[:, self.missing]
        made = self.generator(given)
        verdict = self.critic[0](torch.cat([given, made], 1))
        with full_precision(given):
            terms = {"l1": F.l1_loss(made, truth), "adversarial": realness_error(verdict.float(), True)}
        return weighted(terms, self.weights)


class Pix2Pix(Method):
    Config = Pix2PixConfig
    task = "synthesis"
    dimensions = 2
    stages = ("train",)
    scored = ("student",)
    blocks = (Double, Up)
    paper = "Isola et al., CVPR 2017"
    reproduces = "losses and training, one model per pattern, with UTAD-Net's networks; no table"

    def __init__(self, config: Pix2PixConfig, facts: DataFacts):
        check_size(facts, 2**config.network.levels, f"method.network.levels {config.network.levels}")
        if facts.slice_size % 2**config.critic.layers:
            raise UserError(f"method.critic.layers {config.critic.layers}: data.slices.size {facts.slice_size} cannot be halved so often; use fewer")
        self.config = config
        self._subsets = given_subsets(config.subset or "+".join(facts.sequences[:-1]), facts.sequences)
        shown = parse_subset(self._subsets[0], facts.sequences)
        self.given, self.missing = ([index for index, there in enumerate(shown) if there == wanted] for wanted in (True, False))
        self.networks: dict[str, nn.Module] = {
            "student": PairGenerator(len(self.given), len(self.missing), **config.network.model_dump()),
            "critic": PatchCritic(len(facts.sequences), **config.critic.model_dump()),
        }

    @property
    def subsets(self) -> tuple[str, ...]:
        return self._subsets

    def availability(self, stage: str) -> AvailabilityConfig:
        return AvailabilityConfig(kind="fixed", subsets=list(self.subsets))

    def roles(self, stage: str) -> dict[str, Role]:
        generator, critic = self.networks["student"], self.networks["critic"]
        common = {"optimizer": OptimizerConfig(name="adam", lr=2e-4, betas=(0.5, 0.999)), "schedule": SCHEDULE}
        return {
            "critic": Role(CriticStep(critic, generator, self.given, self.missing), ("critic",), borrows=("student",), **common),
            "generator": Role(
                GeneratorStep(generator, critic, self.given, self.missing, self.config.weights), ("student",), borrows=("critic",), **common
            ),
        }

    @torch.no_grad()
    def predict(self, image: Tensor, available: Tensor, network: str = "student") -> Tensor:
        """Raises UserError unless every sample is given the sequences of `method.subset` and no others."""
        shown = torch.zeros_like(available)
        shown[:, self.given] = True
        if not torch.equal(available, shown):
            raise UserError(f"method.subset: this network completes {self.subsets[0]} alone, and was given another subset; train one for it")
        completed = image.clone()
        completed[:, self.missing] = self.networks[network](image[:, self.given]).to(image.dtype)
        return completed


METHOD = Pix2Pix

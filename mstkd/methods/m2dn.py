"""M2DN: missing sequences of axial slices, sampled by a diffusion model that is told which ones they are.

Source: Meng et al., IEEE TMI 2024 (document 10444695), by notes that quote it; the paper itself and code were not to be had. One network predicts
every clean sequence from the observed ones and the noised missing ones; observed sequences are put back as they are at every step. From the
paper: the network (see `mstkd/models/m2dn.py`), clean stacks as what is predicted, the loss over all sequences, reverse variance beta_t, all
patterns but "all" and "none" missing. Chosen here, as the notes are silent: widths, T = 1000 with beta from 1e-4 to 0.02, patterns equally likely,
Adam with 1e-4, the moving average of weights that is evaluated, samplers of fewer steps.
In here, and in `mstkd/models`, a mask v (B, M) float says 1 = MISSING, 0 = available; `missing_of` makes it, and nothing else does.

Ablations by `unified`, `joint` and `mask`: all on is the method; `joint: false` U+M, `mask: false` U+J, both U; `unified: false` a model of one
pattern, J, and with `joint: false` and `mask: false` an ordinary conditional diffusion model. What the paper calls J we infer. The same network
without diffusion is `one_shot`.
"""

from abc import abstractmethod
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from mstkd.batch import Batch, Progress, StepOutput
from mstkd.config import AvailabilityConfig, OptimizerConfig, Section
from mstkd.errors import UserError
from mstkd.losses.completion import completion_errors
from mstkd.losses.precision import full_precision
from mstkd.methods import DataFacts, Method, Role, RoleStep
from mstkd.methods._translation import TanhIntensity
from mstkd.models.diffusion import Diffusion, Move, Noise, ancestral, complete, ddim
from mstkd.models.m2dn import M2DNNetwork, ModalityDecoder, ModalityEncoder, Residual
from mstkd.subsets import all_subsets, parse_subset, proper, subset_name

RAMP = (1, 10)  # of the moving average: (1 + k) / (10 + k)
MOST_KEPT = 0.1  # of the clean stack after T steps, in standard deviations: samplers begin with noise alone


class NetworkConfig(Section):
    """Defaults: 3,204,473 parameters for three sequences of 256 pixels per axis."""

    width: int = Field(32, ge=1)  # channels of a sequence's encoder; the bottleneck has four times as many
    bottleneck: Literal[4, 8, 16] = 16  # pixels per axis
    mask_at_input: bool = False  # tells every encoder what is missing, too


class CompletionWeights(Section):
    missing: float = Field(1.0, ge=0)
    observed: float = Field(1.0, ge=0)


class CompletionConfig(Section):
    """What every method has that completes stacks with M2DN's network."""

    network: NetworkConfig = NetworkConfig()
    unified: bool = True  # one network for all patterns
    subset: str | None = None  # without `unified`: what is given, e.g. t1+t2
    joint: bool = True  # the loss is over all sequences, else over the missing ones
    mask: bool = True  # the network is told which are missing
    weights: CompletionWeights = CompletionWeights()
    decay: float = Field(0.9999, ge=0, lt=1)  # of the moving average, per update
    intensity: TanhIntensity = TanhIntensity()

    @model_validator(mode="after")
    def _one_pattern(self) -> "CompletionConfig":
        if self.unified == (self.subset is not None):
            raise ValueError("give method.subset, e.g. t1+t2, together with unified: false, and only then")
        return self


class DiffusionConfig(Section):
    steps: int = Field(1000, ge=1)  # T
    schedule: Literal["linear", "cosine"] = "linear"
    beta: tuple[float, float] = (1e-4, 0.02)  # first and last, of the linear schedule; a shorter T needs larger ones
    variance: Literal["beta", "beta_tilde"] = "beta"  # of the ancestral sampler; beta_tilde: the posterior's

    @model_validator(mode="after")
    def _rising(self) -> "DiffusionConfig":
        if not 0 < self.beta[0] <= self.beta[1] < 1:
            raise ValueError(f"beta {list(self.beta)}: give two values above 0 and below 1, the smaller one first")
        return self

    def built(self) -> Diffusion:
        """Raises UserError where a stack is still to be seen after T steps."""
        diffusion = Diffusion.cosine(self.steps) if self.schedule == "cosine" else Diffusion.linear(self.steps, *self.beta)
        if (left := diffusion.kept[-1] ** 0.5) > MOST_KEPT:
            scaled = [round(beta * 1000 / self.steps, 6) for beta in (1e-4, 0.02)]
            raise UserError(
                f"method.diffusion: after {self.steps} steps {left:.2f} of the image is left, {MOST_KEPT} at most may be; "
                f"use larger beta, e.g. {scaled if scaled[1] < 1 else 'schedule: cosine'}"
            )
        return diffusion


class SamplerConfig(Section):
    kind: Literal["ddim", "ancestral"] = "ddim"  # ancestral: all T steps
    steps: int = Field(50, ge=1)  # of ddim
    eta: float = Field(0.0, ge=0, le=1)  # of ddim: noise that is added on the way; 0: none
    samples: int = Field(1, ge=1)  # whose mean is taken
    noise: Literal["fresh", "shared"] = "fresh"
    """shared: every slice, of every case, starts from the same noise, which a fixed seed draws: whatever the batches, neighbouring slices do not
    flicker. fresh: each from its own, by torch's generator."""


class M2DNConfig(CompletionConfig):
    diffusion: DiffusionConfig = DiffusionConfig()
    sampler: SamplerConfig = SamplerConfig()

    @model_validator(mode="after")
    def _as_many_steps(self) -> "M2DNConfig":
        if self.sampler.kind == "ddim" and self.sampler.steps > self.diffusion.steps:
            raise ValueError(f"sampler.steps {self.sampler.steps}: the diffusion has only {self.diffusion.steps} (method.diffusion.steps)")
        return self


class CompletionStep(RoleStep):
    """The network learns the clean stack from what is left of it."""

    def __init__(self, network: nn.Module, config: CompletionConfig):
        super().__init__()
        self.network, self.config = network, config

    def forward(self, batch: Batch, carry: dict[str, Tensor], progress: Progress) -> StepOutput:
        missing = missing_of(batch.available)
        made = self.completed(batch, missing)
        with full_precision(made):
            weights = self.config.weights
            errors = completion_errors(made.float(), batch.image, missing, weights.missing, weights.observed, self.config.joint)
        return StepOutput(errors.loss, {"missing": errors.missing, "observed": errors.observed})

    def completed(self, batch: Batch, missing: Tensor) -> Tensor:
        """What the network makes of a batch, (B, M, S, S)."""
        raise NotImplementedError


class DenoisingStep(CompletionStep):
    """At a time t of each sample, drawn evenly from 1 to T, as the noise is, too; one t for all that the sample lacks."""

    def __init__(self, network: nn.Module, config: M2DNConfig, diffusion: Diffusion):
        super().__init__(network, config)
        self.diffusion = diffusion

    def completed(self, batch: Batch, missing: Tensor) -> Tensor:
        t = torch.randint(1, self.diffusion.steps + 1, (len(missing),), device=missing.device)
        noised = self.diffusion.noised(batch.image, t, missing, torch.randn_like(batch.image))
        return self.network(noised, t, missing)


class SliceCompletion(Method):
    """What every method has that completes stacks with M2DN's network: the trained `network`, and the `student`, its moving average."""

    task = "synthesis"
    dimensions = 2
    stages = ("train",)
    scored = ("student",)
    blocks = (ModalityEncoder, Residual, ModalityDecoder)
    config: CompletionConfig

    def __init__(self, config: CompletionConfig, facts: DataFacts):
        self.config, self.facts = config, facts
        self._subsets = given_subsets(config.subset, facts.sequences)
        check_size(facts.slice_size, config.network.bottleneck)
        settings = {**config.network.model_dump(), "mask": config.mask}
        self.networks: dict[str, nn.Module] = {name: M2DNNetwork(len(facts.sequences), facts.slice_size, **settings) for name in ("student", "network")}

    @property
    def subsets(self) -> tuple[str, ...]:
        return self._subsets

    def availability(self, stage: str) -> AvailabilityConfig:
        return AvailabilityConfig(kind="proper") if self.config.unified else AvailabilityConfig(kind="fixed", subsets=list(self._subsets))

    def check_available(self, available: Tensor) -> None:
        check_proper(available)

    def roles(self, stage: str) -> dict[str, Role]:
        optimizer = OptimizerConfig(name="adam", lr=1e-4, betas=(0.9, 0.999))
        averages = {"averages": {"student": "network"}, "decay": self.config.decay, "ramp": RAMP}
        return {"network": Role(self.step(self.networks["network"]), ("network",), optimizer=optimizer, **averages)}

    @abstractmethod
    def step(self, network: nn.Module) -> CompletionStep:
        """The role's step, which trains `network`."""


class M2DN(SliceCompletion):
    Config = M2DNConfig
    sampling = ("sampler", "diffusion.variance")
    paper = "Meng et al., IEEE TMI 2024"
    reproduces = "network, loss and samplers as far as notes on the paper say; no table"

    def __init__(self, config: M2DNConfig, facts: DataFacts):
        super().__init__(config, facts)
        self.diffusion = config.diffusion.built()

    def step(self, network: nn.Module) -> DenoisingStep:
        return DenoisingStep(network, self.config, self.diffusion)

    def moves(self) -> list[Move]:
        """The steps of the sampler."""
        sampler = self.config.sampler
        if sampler.kind == "ancestral":
            return ancestral(self.diffusion, self.config.diffusion.variance)
        return ddim(self.diffusion, sampler.steps, sampler.eta)

    @torch.no_grad()
    def predict(self, image: Tensor, available: Tensor, network: str = "student") -> Tensor:
        """Raises UserError where a sample (B, M) has nothing or everything available. Fresh noise is a function of torch's CPU generator."""
        self.check_available(available)
        sampler = self.config.sampler
        seed = 0 if sampler.noise == "shared" else int(torch.randint(2**63 - 1, (), device="cpu"))
        noise = Noise(torch.Generator(image.device).manual_seed(seed), sampler.noise == "shared")
        return complete(self.networks[network], image, missing_of(available), self.moves(), noise, sampler.samples)


def missing_of(available: Tensor) -> Tensor:
    """v (B, M) float, 1 = missing, from (B, M) bool, True = available."""
    return (~available).float()


def check_proper(available: Tensor) -> None:
    """Raise UserError where a sample (B, M) has no sequence to complete from, or every one."""
    if not bool((available.any(1) & ~available.all(1)).all()):
        everything = bool(available.all(1).any())
        raise UserError(
            f"data.availability: a sample has {'every sequence, and nothing is to be completed' if everything else 'no sequence to complete from'}; "
            "give at least one and leave out at least one (kind: proper)"
        )


def given_subsets(subset: str | None, sequences: tuple[str, ...]) -> tuple[str, ...]:
    """Names of the subsets that can be completed: every proper one, or `subset` alone. Raises UserError where nothing is left to complete."""
    if len(sequences) < 2:
        raise UserError(f"data.shards: the set has {sequences[0]} alone; a completion needs two sequences")
    try:
        chosen = all_subsets(sequences) if subset is None else [parse_subset(subset, sequences)]
    except UserError as error:
        raise UserError(f"method.{error}") from None
    if subset is not None and not proper(chosen):
        raise UserError(f"method.subset {subset}: leaves nothing to complete; leave a sequence out")
    return tuple(subset_name(sequences, part) for part in proper(chosen))


def check_size(size: int, bottleneck: int) -> None:
    """Raise UserError unless slices of `size` pixels per axis can be halved down to the bottleneck."""
    smallest = 4 * bottleneck
    if size & (size - 1) or size < smallest:
        nearest = max(smallest, 2 ** (size.bit_length() - 1))
        raise UserError(f"data.slices.size {size}: the network halves slices down to {bottleneck} pixels and needs a power of two from {smallest} on; use {nearest}")


METHOD = M2DN

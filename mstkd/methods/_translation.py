"""What methods have in common that learn, unpaired, to translate axial slices from one sequence to another: `utad_net`, `stargan`, `resvit`.

A generator is told which sequence to make; critics tell real slices from generated ones and name their sequence (WGAN-GP with a classifier, as in
Choi et al., CVPR 2018, arXiv:1711.09020); what was translated must lead back. Where there are masks the same holds of the tumour alone.
"""

from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, field_validator
from torch import Tensor, nn

from mstkd.batch import Batch, Progress, StepOutput
from mstkd.config import AvailabilityConfig, IntensityConfig, OptimizerConfig, ScheduleConfig, Section
from mstkd.errors import UserError
from mstkd.losses.adversarial import critic_loss, deception_loss, gradient_penalty
from mstkd.losses.precision import full_precision
from mstkd.losses.translation import local_consistency, tumour_image
from mstkd.methods import DataFacts, Method, Role, RoleStep
from mstkd.methods._terms import weighted
from mstkd.models.critics import Critic
from mstkd.models.recompute import statistics_kept
from mstkd.models.utad_net import Translation

PREFERRED = ("flair", "t2", "t1ce", "t1")  # source of a translation, where a case has several: the first of these
SCHEDULE = ScheduleConfig(name="linear", per="epoch", constant_share=0.5, min_lr_ratio=0.01)  # the rate falls in the second half


class TanhIntensity(IntensityConfig):
    """What networks that end in tanh need: the background is -1."""

    kind: Literal["percentile", "minmax"] = "percentile"
    percentile: Literal["0.1", "0.5"] = "0.1"
    interval: tuple[float, float] = (-1.0, 1.0)

    @field_validator("interval")
    @classmethod
    def _of_tanh(cls, value: tuple[float, float]) -> tuple[float, float]:
        if value != (-1.0, 1.0):
            raise ValueError("the networks end in tanh: give [-1, 1]")
        return value


class CriticConfig(Section):
    width: int = Field(64, ge=1)  # channels after the first convolution
    layers: int = Field(6, ge=1)  # each halves the pixels per axis


class TranslationWeights(Section):
    """Weights of the loss terms, by the names under which the terms are logged (unweighted)."""

    gradient_penalty: float = Field(10.0, ge=0)
    adversarial: float = Field(1.0, ge=0)
    classification: float = Field(1.0, ge=0)  # of the sequence: of real slices for the critics, of generated ones for the generator
    reconstruction: float = Field(10.0, ge=0)


class TranslationConfig(Section):
    """What every method has that learns to translate slices from unpaired ones."""

    critic: CriticConfig = CriticConfig()
    weights: TranslationWeights = TranslationWeights()
    n_critic: int = Field(5, ge=1)  # updates of the critics to one of the generator
    gp_patch: Literal["sum", "mean"] = "sum"
    target_sampling: Literal["others", "permute"] = "others"
    intensity: TanhIntensity = TanhIntensity()


class NetworkConfig(Section):
    """Defaults: the published network, 106,779,778 parameters for four sequences."""

    width: int = Field(64, ge=1)  # channels at full resolution
    levels: int = Field(4, ge=1)  # each halves the pixels per axis


@dataclass(frozen=True)
class Masks:
    """Tumour masks of slices."""

    kind: Literal["region", "zeros", "random"]
    values: tuple[int, ...]  # of the region, in the label scheme

    def __call__(self, label: Tensor, draw: torch.Generator | None = None) -> Tensor:
        """(B, 1, S, S) bool of label maps (B, S, S) uint8; `draw`, on the CPU: instead of torch's own generator."""
        if self.kind == "zeros":
            return torch.zeros_like(label, dtype=torch.bool)[:, None]
        if self.kind == "random":
            device = label.device if draw is None else "cpu"
            return (torch.rand(label.shape, generator=draw, device=device) < 0.5).to(label.device)[:, None]
        return torch.isin(label, torch.tensor(self.values, dtype=label.dtype, device=label.device))[:, None]


@dataclass(frozen=True)
class Task:
    """What all that translates knows of how it is done."""

    sequences: int
    masks: Masks | None = None  # None: nobody is told of tumours
    guided: bool = False  # the local encoder sees the tumour image, else the whole slice

    def translate(self, generator: nn.Module, image: Tensor, target: Tensor, mask: Tensor | None) -> Translation:
        """Slices (B, 1, S, S) as the sequences `target` (B,) show them; with masks (B, 1, S, S) there is a tumour image, too."""
        code = (target[:, None] == torch.arange(self.sequences, device=target.device)).to(image.dtype)
        made = generator(image, code, tumour_image(image, mask)) if self.guided else generator(image, code)
        return made._replace(tumour=tumour_image(made.image, mask)) if made.tumour is None and mask is not None else made


class CriticsStep(RoleStep):
    """The critics learn what real slices look like, and which sequence they show; they choose what is generated, for both roles."""

    def __init__(self, critics: nn.ModuleDict, generator: nn.Module, task: Task, config: TranslationConfig):
        super().__init__()
        self.critics, self.generator = critics, (generator,)  # a tuple: not registered as a submodule
        self.task, self.config = task, config

    def forward(self, batch: Batch, carry: dict[str, Tensor], progress: Progress) -> StepOutput:
        image, source = observed(batch.image, batch.available)
        target = draw_targets(source, self.task.sequences, self.config.target_sampling)
        mask = None if self.task.masks is None else self.task.masks(labels(batch))
        with torch.no_grad(), statistics_kept(self.generator[0]):  # they are the generator's own passes'
            made = self.task.translate(self.generator[0], image, target, mask)
        pairs = {"whole": (image, made.image)} | ({} if mask is None else {"tumour": (tumour_image(image, mask), made.tumour)})
        loss, scalars, weights = 0.0, {}, self.config.weights
        for name, (real, fake) in pairs.items():
            terms = critic_terms(self.critics[name], real, fake, source, self.config.gp_patch)
            loss = loss + terms["critic"] + weights.classification * terms["classification"] + weights.gradient_penalty * terms["gradient_penalty"]
            scalars |= {f"{term}_{name}": value.detach() for term, value in terms.items()}
        return StepOutput(loss, scalars, {"target": target} | ({} if mask is None else {"mask": mask}))


class GeneratorStep(RoleStep):
    """The generator deceives the critics, comes back to where it started and, as a student, does what the teacher does."""

    def __init__(self, generator: nn.Module, critics: nn.ModuleDict, task: Task, config: TranslationConfig, teacher: nn.Module | None = None):
        super().__init__()
        self.generator = generator
        self.borrowed = (critics, teacher)  # a tuple: not registered, so neither trained nor switched to training mode nor saved
        self.task, self.config = task, config

    def forward(self, batch: Batch, carry: dict[str, Tensor], progress: Progress) -> StepOutput:
        critics, teacher = self.borrowed
        image, source = observed(batch.image, batch.available)
        target, mask = carry["target"], carry.get("mask")
        made = self.task.translate(self.generator, image, target, mask)
        returned = self.task.translate(self.generator, made.image, source, mask)
        verdicts = [critics["whole"](made.image), *([] if mask is None else [critics["tumour"](made.tumour)])]
        with full_precision(image):
            terms = {
                "adversarial": sum(deception_loss(verdict.realness.float()) for verdict in verdicts),
                "classification": sum(F.cross_entropy(verdict.sequence.float(), target) for verdict in verdicts),
                "reconstruction": F.l1_loss(returned.image, image),
            }
            if mask is not None:
                terms["local"] = local_consistency(made.tumour, tumour_image(made.image, mask), tumour_image(image, mask), returned.tumour)
        if teacher is not None:
            with torch.no_grad():
                full = replace(self.task, guided=True).translate(teacher, image, target, mask)
            terms |= transfer(full, made)
        return weighted(terms, self.config.weights)


class SliceTranslation(Method):
    """What every method has that learns to translate slices from unpaired ones: `networks["critics"]` and one generator per stage."""

    task = "synthesis"
    dimensions = 2
    complete_only = False
    config: TranslationConfig
    facts: DataFacts

    @property
    def subsets(self) -> tuple[str, ...]:
        return tuple(sorted(self.facts.sequences, key=lambda name: (*PREFERRED, name).index(name)))

    def availability(self, stage: str) -> AvailabilityConfig:
        return AvailabilityConfig(kind="single")

    def roles_of(self, name: str, task: Task, teacher: nn.Module | None = None) -> dict[str, Role]:
        """Of a stage that trains the generator `name`, with the published optimiser and schedule."""
        critics, generator = self.networks["critics"], self.networks[name]
        common = {"optimizer": OptimizerConfig(name="adam", lr=1e-4, betas=(0.9, 0.999)), "schedule": SCHEDULE}
        judging, making = CriticsStep(critics, generator, task, self.config), GeneratorStep(generator, critics, task, self.config, teacher)
        return {
            "critics": Role(judging, ("critics",), borrows=(name,), double_backward=True, **common),
            "generator": Role(making, (name,), borrows=("critics",), every=self.config.n_critic, **common),
        }

    def check_available(self, available: Tensor) -> None:
        counts = sorted(set(available.sum(1).tolist()))
        if counts != [1]:
            raise UserError(f"data.availability: a slice is translated from exactly one sequence, and samples here have {counts}; use kind single")

    def predict(self, image: Tensor, available: Tensor, network: str = "student") -> Tensor:
        if network in self.oracles:
            raise UserError(f"network {network}: it needs the tumour mask of the slice that it translates; take the student, which needs none")
        return self.completed(image, available, network, Task(len(self.facts.sequences)))

    @torch.no_grad()
    def completed(self, image: Tensor, available: Tensor, network: str, task: Task, mask: Tensor | None = None) -> Tensor:
        """(B, M, S, S): the available sequence as it was given, the others as `network` translates it."""
        self.check_available(available)
        given, source = observed(image, available)
        rows, whole = torch.arange(len(image), device=image.device), torch.empty_like(image)
        whole[rows, source] = given[:, 0]
        for target in others(source, task.sequences):
            whole[rows, target] = task.translate(self.networks[network], given, target, mask).image[:, 0].to(image.dtype)
        return whole


class PlainTranslation(SliceTranslation):
    """One generator, `student`, trained in one stage and without any mask; a subclass says which."""

    stages = ("train",)
    scored = ("student",)

    def __init__(self, config: TranslationConfig, facts: DataFacts):
        self.config, self.facts = config, facts
        self.networks = {"student": self.generator(), "critics": build_critics(config, facts, ("whole",))}

    @abstractmethod
    def generator(self) -> nn.Module:
        """The generator that `config` and `facts` describe. Raises UserError where it cannot take the slices."""

    def roles(self, stage: str) -> dict[str, Role]:
        return self.roles_of("student", Task(len(self.facts.sequences)))


def observed(image: Tensor, available: Tensor) -> tuple[Tensor, Tensor]:
    """The one available sequence of each sample, (B, 1, S, S), and its index (B,)."""
    source = available.int().argmax(1)
    return image[torch.arange(len(image), device=image.device), source][:, None], source


def labels(batch: Batch) -> Tensor:
    if batch.label is None:
        raise UserError(f"subject {batch.subject[0]}: no label in the shard set; utad_net's losses need tumour masks of training subjects in both stages")
    return batch.label


def others(source: Tensor, sequences: int) -> list[Tensor]:
    """The M - 1 other sequences of each sample: tensors (B,)."""
    return [(source + step) % sequences for step in range(1, sequences)]


def draw_targets(source: Tensor, sequences: int, sampling: Literal["others", "permute"]) -> Tensor:
    """Sequences (B,) to translate to, drawn with torch's generator. Raises UserError where a micro-batch of one is to be permuted."""
    if sampling == "others":
        return (source + torch.randint(1, sequences, source.shape, device=source.device)) % sequences
    if len(source) == 1:
        raise UserError("method.target_sampling: permute needs train.micro_batch of 2 or more; a single slice would only become itself")
    return source[torch.randperm(len(source), device=source.device)]


def critic_terms(critic: nn.Module, real: Tensor, fake: Tensor, source: Tensor, patch: Literal["sum", "mean"]) -> dict[str, Tensor]:
    """Of one critic, real slices of the sequences `source` (B,) and generated ones, both (B, 1, S, S)."""
    truth, made = critic(real), critic(fake)
    with full_precision(real):
        return {
            "critic": critic_loss(truth.realness.float(), made.realness.float()),
            "classification": F.cross_entropy(truth.sequence.float(), source),
            "gradient_penalty": gradient_penalty(lambda between: critic(between).realness, real.float(), fake.float(), patch),
        }


def transfer(full: Translation, made: Translation) -> dict[str, Tensor]:
    """What the student learns of the teacher: the fused feature and the whole slice, mean absolute differences."""
    return {"feature": F.l1_loss(made.fused.float(), full.fused.float()), "image": F.l1_loss(made.image, full.image)}


def build_critics(config: TranslationConfig, facts: DataFacts, names: tuple[str, ...]) -> nn.ModuleDict:
    """Critics of whole slices and of tumour images, alike. Raises UserError where they do not fit the slices."""
    size, layers = facts.slice_size, config.critic.layers
    if size % 2**layers:
        raise UserError(f"method.critic.layers {layers}: data.slices.size {size} cannot be halved so often; use fewer layers or another size")
    return nn.ModuleDict({name: Critic(len(facts.sequences), size, config.critic.width, layers) for name in names})


def check_size(facts: DataFacts, stride: int, cause: str) -> None:
    """Raise UserError if a generator that, by its `cause`, reduces slices by `stride` cannot take these; or if there is nothing to translate to."""
    if len(facts.sequences) < 2:
        raise UserError(f"data.shards: the set has {facts.sequences[0]} alone; a translation needs two sequences")
    if facts.slice_size % stride or facts.slice_size < 2 * stride:  # an instance of one pixel has no variance
        raise UserError(f"data.slices.size {facts.slice_size}: {cause} needs a multiple of {stride}, {2 * stride} at least")

"""UTAD-Net: translation of axial slices between sequences, learnt unpaired; a teacher that is told where the tumour is, a student that is not.

Source: Huang et al., arXiv:2403.20168, and its released code. Every subject shows one sequence, drawn once for the whole run; the labels
of the training subjects give masks to the teacher's input and to the losses of both stages. The student translates without one.
Where this differs from the paper or the released code, and why:
- both critics are one role: one Adam over disjoint weights is the same as two (only `gradient_clipping`, off by default, would join them);
- `preset: code` (default) weights the gradient penalty by 10, `paper` by 1; there is no other difference between the two;
- the penalty is on the sum of a critic's patch scores, as released, though the adversarial term is their mean: `gp_patch`;
- targets are the other sequences, equally likely; the released code permutes the batch's own, a quarter of them identities: `target_sampling`;
- the fusion has instance norms; with the released batch norms teacher and student of equal weights differ: `network.fusion_norm`;
- the frozen teacher is in evaluation mode and without gradient (there its gradients were computed, and kept for ever);
- the learning rate of the last epoch is the published 1e-6 (there 2.98e-6);
- intensities are cut at the 0.1 and 99.9 percentiles: 99.5 flattens a quarter of the tumour in some FLAIR (`intensity: {percentile: "0.5"}`).
The paper names its structures (`student_arch`) and mask ablations (`mask`) without describing them: what they are here stands beside the
keys. Of the paper's baselines `stargan` and `resvit` are provided, as far as their files say; DRIT++, TarGAN and ReMIC are not.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn

from mstkd.batch import Batch, Progress, StepOutput
from mstkd.config import AvailabilityConfig, IntensityConfig, OptimizerConfig, ScheduleConfig, Section
from mstkd.errors import UserError
from mstkd.losses.adversarial import critic_loss, deception_loss, gradient_penalty
from mstkd.losses.precision import full_precision
from mstkd.losses.translation import local_consistency, tumour_image
from mstkd.methods import DataFacts, Method, Role, RoleStep
from mstkd.models.critics import Critic
from mstkd.models.recompute import statistics_kept
from mstkd.models.utad_net import Double, Fusion, Generator, Translation, Up
from mstkd.shards.spec import LabelScheme

PREFERRED = ("flair", "t2", "t1ce", "t1")  # source of a translation, where a case has several: the first of these
PENALTY = {"code": 10.0, "paper": 1.0}  # weight of the gradient penalty


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


class UTADWeights(TranslationWeights):
    local: float = Field(10.0, ge=0)
    feature: float = Field(10.0, ge=0)  # of the distillation, as is
    image: float = Field(10.0, ge=0)


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


class UTADNetworkConfig(NetworkConfig):
    fusion_norm: Literal["instance", "batch"] = "instance"


class UTADNetConfig(TranslationConfig):
    preset: Literal["code", "paper"] = "code"  # a key that is given wins over it
    network: UTADNetworkConfig = UTADNetworkConfig()
    weights: UTADWeights = UTADWeights()
    region: Literal["WT", "TC", "ET"] = "WT"  # what the masks show
    mask: Literal["region", "zeros", "random"] = "region"  # ablation, in training and for the teacher: no tumour, or each pixel by a coin
    student_arch: Literal["full", "global", "no_local_encoder", "no_local_decoder"] = "full"
    """Without the local encoder the global one stands in for it; without the local decoder the tumour image is cut from the
    generated slice. global: without both and without fusion; its deepest map is then the distilled feature."""
    student_init: Literal["teacher", "random"] = "teacher"  # teacher: all but the local encoder

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, values: Any) -> Any:
        weights, penalty = values.get("weights", {}), PENALTY.get(str(values.get("preset", "code")))
        if penalty is None or not isinstance(weights, dict):
            return values  # refused by the fields themselves
        return {**values, "weights": {"gradient_penalty": penalty, **weights}}


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
        refuse_several(batch.available)
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
        loss = sum(getattr(self.config.weights, name) * term for name, term in terms.items())
        return StepOutput(loss, {name: term.detach() for name, term in terms.items()})


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
        schedule = ScheduleConfig(name="linear", per="epoch", constant_share=0.5, min_lr_ratio=0.01)
        common = {"optimizer": OptimizerConfig(name="adam", lr=1e-4, betas=(0.9, 0.999)), "schedule": schedule}
        judging, making = CriticsStep(critics, generator, task, self.config), GeneratorStep(generator, critics, task, self.config, teacher)
        return {
            "critics": Role(judging, ("critics",), borrows=(name,), double_backward=True, **common),
            "generator": Role(making, (name,), borrows=("critics",), every=self.config.n_critic, **common),
        }

    def predict(self, image: Tensor, available: Tensor, network: str = "student") -> Tensor:
        if network in self.oracles:
            raise UserError(f"network {network}: it needs the tumour mask of the slice that it translates; take the student, which needs none")
        return self.completed(image, available, network, Task(len(self.facts.sequences)))

    @torch.no_grad()
    def completed(self, image: Tensor, available: Tensor, network: str, task: Task, mask: Tensor | None = None) -> Tensor:
        """(B, M, S, S): the available sequence as it was given, the others as `network` translates it."""
        refuse_several(available)
        given, source = observed(image, available)
        rows, whole = torch.arange(len(image), device=image.device), torch.empty_like(image)
        whole[rows, source] = given[:, 0]
        for target in others(source, task.sequences):
            whole[rows, target] = task.translate(self.networks[network], given, target, mask).image[:, 0].to(image.dtype)
        return whole


class UTADNet(SliceTranslation):
    Config = UTADNetConfig
    stages = ("teacher", "student")
    oracles = ("teacher",)
    offers_fused = True
    blocks = (Double, Up, Fusion)
    paper = "Huang et al., arXiv:2403.20168"
    reproduces = "networks, losses and training; paper and code by presets; no table yet"

    def __init__(self, config: UTADNetConfig, facts: DataFacts):
        check_size(facts, 2**config.network.levels, f"method.network.levels {config.network.levels}")
        self.config, self.facts = config, facts
        self.oracles = ("teacher",) if config.mask == "region" else ()  # the ablations' masks tell it nothing
        self.masks = Masks(config.mask, region_values(facts.label_scheme, config.region) if config.mask == "region" else ())
        arches = {"student": config.student_arch, "teacher": "full"}
        self.networks: dict[str, nn.Module] = {
            name: Generator(len(facts.sequences), **config.network.model_dump(), branches=arch) for name, arch in arches.items()
        }
        self.networks["critics"] = build_critics(config, facts, ("whole", "tumour"))

    def roles(self, stage: str) -> dict[str, Role]:
        return self.roles_of(stage, self._task(stage), self.networks["teacher"] if stage == "student" else None)

    def needs(self, stage: str) -> dict[str, str]:
        return {"teacher": "teacher"} if stage == "student" else {}

    def begin(self, stage: str) -> None:
        """The student takes the teacher's weights and keeps the fresh ones of its local encoder, which sees something else."""
        if stage == "student" and self.config.student_init == "teacher":
            student, teacher = (self.networks[name].state_dict() for name in ("student", "teacher"))
            for key, value in student.items():
                if not key.startswith("local_encoder."):
                    value.copy_(teacher[key])

    def predict(self, image: Tensor, available: Tensor, network: str = "student") -> Tensor:
        if network == "teacher" and network not in self.oracles:
            return self.predict_oracle(image, available, torch.zeros_like(image[:, 0], dtype=torch.uint8), network)
        return super().predict(image, available, network)

    def predict_oracle(self, image: Tensor, available: Tensor, label: Tensor, network: str) -> Tensor:
        return self.completed(image, available, network, self._task(network), self._mask(label))

    @torch.no_grad()
    def fused(self, image: Tensor, available: Tensor, label: Tensor, network: str) -> Tensor:
        """(B, M - 1, C, s, s) float32: the fused features on the way to each other sequence, in the same order for both networks.

        For the error of the student's against the teacher's (Table III); image and available as in `predict`, the teacher's masks from `label`.
        """
        given, source = observed(image, available)
        task, mask = self._task(network), self._mask(label)
        features = [task.translate(self.networks[network], given, target, mask).fused for target in others(source, task.sequences)]
        return torch.stack(features, 1).float()

    def _task(self, network: str) -> Task:
        return Task(len(self.facts.sequences), self.masks, guided=network == "teacher")

    def _mask(self, label: Tensor) -> Tensor:
        return self.masks(label, torch.Generator().manual_seed(0))  # the same in every call: a prediction can be repeated


def observed(image: Tensor, available: Tensor) -> tuple[Tensor, Tensor]:
    """The one available sequence of each sample, (B, 1, S, S), and its index (B,)."""
    source = available.int().argmax(1)
    return image[torch.arange(len(image), device=image.device), source][:, None], source


def refuse_several(available: Tensor) -> None:
    """Raise UserError unless each sample (B, M) has exactly one sequence."""
    if not bool((available.sum(1) == 1).all()):
        counts = sorted(set(available.sum(1).tolist()))
        raise UserError(f"data.availability: a slice is translated from exactly one sequence, and samples here have {counts}; use kind single")


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


def region_values(scheme: LabelScheme | None, region: str) -> tuple[int, ...]:
    if scheme is None or region not in scheme.regions:
        raise UserError(f"method.region: {region} is no region of {scheme.name if scheme else 'a set without labels'}; it needs one with masks of tumours, e.g. brats2018")
    return scheme.regions[region]


METHOD = UTADNet

"""UHF-guided segmentation: features like those of a 7T scan, injected into the segmentation of a low-field one (arXiv:2402.08409).

Four stages: `base` (B) trains a plain segmenter; `teacher` (T) auto-encodes 7T images, its encoder says what 7T features are;
`keeper` (K) learns from pairs to tell them from the low-field image; `fusion` (F) attaches adaptive fusion to the base segmenter, feeds
it the frozen keeper's features and trains on. At use time only the low-field image is needed; the base is scored beside the student.
Pairs and labelled scans are other people's heads, in other shard sets with other sequences, hence two runs: one on pairs,
`stages=[T,K]`, and one on labelled scans with `teacher.path=` the first, which trains B and F. A labelled set of pairs can do all in one.
Controls of where a gain comes from: `keeper: random` and `zeros`, and a `high_field` that is the low-field image itself.
The source is known by its abstract, by summaries and by its code. Where this differs from the released code, and why:
- the teacher's noise is Gaussian of mean 0 (there uniform in [0, 1): a bias that its decoder learns and nobody gives it later): `noise`;
- the keeper's gate finds the strongest voxel on every axis; moments are averaged over the batch, not summed;
- the best teacher and keeper are chosen by PSNR on validation subjects that are not the ones reported on (there by the held-out
  subject, and only if PSNR and SSIM both rise); the best segmenter by the mean Dice of the foreground classes (there with background);
- labels are moved to the nearest voxel (there by cubic splines), quarter turns are exact, and the shipped recipes train the base;
- fusion begins from the base of the same run and split, so it has been trained longer than the base that stands beside it.
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, field_validator
from torch import Tensor, nn

from mstkd.batch import Batch, Progress, StepOutput
from mstkd.config import AvailabilityConfig, IntensityConfig, OptimizerConfig, Section
from mstkd.errors import UserError
from mstkd.losses.adversarial import least_squares_critic_loss, least_squares_deception_loss
from mstkd.losses.distillation import feature_matching, moment_matching
from mstkd.losses.precision import full_precision
from mstkd.methods import DataFacts, Method, Role, RoleStep
from mstkd.methods._terms import weighted
from mstkd.models.uhf_backbones import Double, Up, build_backbone, multiple_of
from mstkd.models.uhf_fusion import Fusion, GuidedSegmenter
from mstkd.models.uhf_keeper import Dense, Guide, Keeper, Silent
from mstkd.models.uhf_layers import Block, PatchCritic, channels_of
from mstkd.models.uhf_teacher import Teacher
from mstkd.targets import ExclusiveClasses

SMALLEST = 32  # voxels per axis that the critic can take
UNTRAINED_SEED = 0  # of `keeper: random`, which no checkpoint holds


class UnitIntensity(IntensityConfig):
    """Images in [0, 1], the range that their likeness is measured in."""

    kind: Literal["percentile", "minmax", "clahe"] = "percentile"  # clahe: as the released code prepares IBSR

    @field_validator("interval")
    @classmethod
    def _unit(cls, value: tuple[float, float]) -> tuple[float, float]:
        if value != (0.0, 1.0):
            raise ValueError("the likeness of 7T images is measured between 0 and 1: give [0, 1]")
        return value


class NetworkConfig(Section):
    """Defaults: the published sizes."""

    width: int = Field(16, ge=1)  # channels of the teacher at full resolution
    keeper_width: int = Field(4, ge=1)
    critic_width: int = Field(16, ge=1)


class BaseConfig(Section):
    architecture: Literal["UNet", "SegResNet", "SwinUNETR"] = "UNet"
    arguments: dict[str, Any] = {}  # of the network's class, besides input and output; default: its own


class NoiseConfig(Section):
    """What is added to the maps that the teacher's decoder is given in training."""

    kind: Literal["gaussian", "uniform"] = "gaussian"  # uniform: in [0, std), as released
    std: float = Field(1.0, ge=0)
    levels: list[Literal[1, 2, 3, 4, 5]] = [1, 2, 3, 4, 5]


class WeightConfig(Section):
    """Weights of the loss terms, by the names under which the terms are logged (unweighted)."""

    image: float = Field(100.0, ge=0)
    feature: float = Field(1.0, ge=0)
    moment: float = Field(1.0, ge=0)
    adversarial: float = Field(1.0, ge=0)  # of half the squared distance from "real"


class UHFGuidedConfig(Section):
    low_field: str | None = None  # the sequence that is segmented; default: the set's first
    high_field: str | None = None  # the one that the teacher sees; default: the set's last
    keeper: Literal["trained", "random", "zeros"] = "trained"  # random: it learnt nothing, and is the same in every run; zeros: features of 0
    network: NetworkConfig = NetworkConfig()
    base: BaseConfig = BaseConfig()
    noise: NoiseConfig = NoiseConfig()
    weights: WeightConfig = WeightConfig()
    intensity: UnitIntensity = UnitIntensity()


class TeacherStep(RoleStep):
    """The teacher learns to give a 7T image back, and to tell its finer maps from its coarser ones."""

    def __init__(self, teacher: Teacher, high: int, weights: WeightConfig):
        super().__init__()
        self.teacher, self.high, self.weights = teacher, high, weights

    def forward(self, batch: Batch, carry: dict[str, Tensor], progress: Progress) -> StepOutput:
        image = batch.image[:, [self.high]]
        seen = self.teacher(image)
        with full_precision(image):
            return weighted(teacher_terms(seen.image, image, seen.features, seen.predicted), self.weights)


class CriticStep(RoleStep):
    """The critic learns to tell 7T images from those that the keeper's features decode to."""

    def __init__(self, critic: nn.Module, keeper: nn.Module, teacher: Teacher, low: int, high: int):
        super().__init__()
        self.critic, self.borrowed = critic, (keeper, teacher)  # a tuple: not registered as submodules
        self.low, self.high = low, high

    def forward(self, batch: Batch, carry: dict[str, Tensor], progress: Progress) -> StepOutput:
        keeper, teacher = self.borrowed
        with torch.no_grad():
            made = teacher.decoder(keeper(batch.image[:, [self.low]]))
        real, fake = self.critic(batch.image[:, [self.high]]), self.critic(made)
        with full_precision(real):
            loss = least_squares_critic_loss(real.float(), fake.float())
        return StepOutput(loss, {"critic": loss.detach()})


class KeeperStep(RoleStep):
    """The keeper learns the teacher's features of the 7T image from the low-field one, by themselves and by what they decode to."""

    def __init__(self, keeper: nn.Module, critic: nn.Module, teacher: Teacher, low: int, high: int, weights: WeightConfig):
        super().__init__()
        self.keeper, self.borrowed = keeper, (critic, teacher)  # a tuple: not registered as submodules
        self.low, self.high, self.weights = low, high, weights

    def forward(self, batch: Batch, carry: dict[str, Tensor], progress: Progress) -> StepOutput:
        critic, teacher = self.borrowed
        image = batch.image[:, [self.high]]
        with torch.no_grad():
            wanted = teacher.encoder(image)
        guide = self.keeper(batch.image[:, [self.low]])
        made = teacher.decoder(guide)
        score = critic(made)
        with full_precision(image):
            return weighted(keeper_terms(guide, wanted, made, image, score), self.weights)


def class_terms(logits: Tensor, target: Tensor) -> dict[str, Tensor]:
    """Of logits (B, K, X, Y, Z) and class indices (B, X, Y, Z)."""
    return {"ce": F.cross_entropy(logits, target)}


class SegmentStep(RoleStep):
    """A segmenter learns the labels of the low-field image; with a frozen `keeper` it is given that one's features, too."""

    def __init__(
        self, segmenter: nn.Module, keeper: nn.Module | None, low: int, classes: ExclusiveClasses | None,
        terms: Callable[[Tensor, Tensor], dict[str, Tensor]] = class_terms,
    ):  # fmt: skip
        """`terms` of the loss, which are added up, from logits and class indices."""
        super().__init__()
        self.segmenter, self.keeper = segmenter, (keeper,)  # a tuple: not registered, so neither trained nor saved
        self.low, self.classes, self.terms = low, classes, terms

    def forward(self, batch: Batch, carry: dict[str, Tensor], progress: Progress) -> StepOutput:
        if batch.label is None:
            raise UserError(f"subject {batch.subject[0]}: no label in the shard set; the stages base and fusion train on labelled subjects only")
        logits = segmented(batch.image[:, [self.low]], self.segmenter, self.keeper[0])
        with full_precision(logits):
            terms = self.terms(logits.float(), self.classes.encode(batch.label))
        return StepOutput(sum(terms.values()), {name: term.detach() for name, term in terms.items()})


def stage_steps(
    stage: str, of: Callable[[str], Callable], teacher: Teacher, low: int, high: int, weights: WeightConfig, classes: ExclusiveClasses | None,
    terms: Callable[[Tensor, Tensor], dict[str, Tensor]] = class_terms,
) -> dict[str, RoleStep]:  # fmt: skip
    """The steps of a stage by the network that each of them trains, in update order; `of` gives a network by name, as it is called."""
    match stage:
        case "teacher":
            return {"teacher": TeacherStep(of("teacher"), high, weights)}
        case "keeper":
            return {
                "critic": CriticStep(of("critic"), of("keeper"), teacher, low, high),
                "keeper": KeeperStep(of("keeper"), of("critic"), teacher, low, high, weights),
            }
        case "fusion":
            return {"student": SegmentStep(of("student"), of("keeper"), low, classes, terms)}
    return {"base": SegmentStep(of("base"), None, low, classes, terms)}


class UHFGuided(Method):
    Config = UHFGuidedConfig
    task = "segmentation"
    stages = ("base", "teacher", "keeper", "fusion")
    aliases = {"B": "base", "T": "teacher", "K": "keeper", "F": "fusion"}
    scored = ("student", "base")
    painters = ("keeper", "teacher")
    companions = {"student": ("keeper",)}
    runs_apart = True
    exclusive = True
    blocks = (Block, Dense, Guide, Fusion, Double, Up)
    paper = "Oh et al., arXiv:2402.08409; MICCAI 2022"
    reproduces = "networks, losses and stages in 3D; the released code's defects mended; no table is known"

    def __init__(self, config: UHFGuidedConfig, facts: DataFacts):
        self.config, self.facts = config, facts
        self.low = _channel("low_field", config.low_field, facts, 0)
        self.high = _channel("high_field", config.high_field, facts, -1) if config.high_field in (None, *facts.sequences) else self.low
        self.classes = ExclusiveClasses(facts.label_scheme) if facts.label_scheme else None
        self.networks = self._build()

    def _build(self) -> dict[str, nn.Module]:
        return build_networks(self.config, 3, self.classes.count if self.classes else 1)  # a set without labels trains teacher and keeper alone

    @property
    def subsets(self) -> tuple[str, ...]:
        return (self.facts.sequences[self.low],)

    @classmethod
    def check_crop(cls, config: UHFGuidedConfig, crop: tuple[int, int, int], key: str = "data.crop") -> None:
        if min(crop) < SMALLEST:
            raise UserError(f"{key} {list(crop)}: the critic needs {SMALLEST} voxels along each axis; use {[max(size, SMALLEST) for size in crop]}")
        step = multiple_of(config.base.architecture, config.base.arguments)
        if any(size % step for size in crop):
            nearest = [-(-size // step) * step for size in crop]
            raise UserError(f"{key} {list(crop)}: {config.base.architecture} of method.base needs multiples of {step}; use {nearest}")

    def check_stage(self, stage: str) -> None:
        if stage in ("teacher", "keeper") and self.config.keeper != "trained":
            raise UserError(f"stages: with method.keeper={self.config.keeper} nobody needs {stage}; give stages=[base,fusion]")
        if stage in ("teacher", "keeper") and self.high == self.low and self.config.high_field not in self.facts.sequences:
            there = f"the set has {', '.join(self.facts.sequences)}{f' and no {name}' if (name := self.config.high_field) else ' alone'}"
            raise UserError(
                f"stages: {stage} learns from pairs of low-field and 7T images, and {there}; train it on a set of pairs in a run of its own "
                "(stages=[teacher,keeper]), then give this one teacher.path=RUN"
            )
        if stage in ("base", "fusion") and self.classes is None:
            raise UserError(f"stages: {stage} learns labels, and the set has none; give stages=[teacher,keeper] here, and train {stage} on a labelled set")

    def availability(self, stage: str) -> AvailabilityConfig:
        return AvailabilityConfig(kind="natural") if stage in ("teacher", "keeper") else AvailabilityConfig(kind="fixed", subsets=list(self.subsets))

    def roles(self, stage: str) -> dict[str, Role]:
        borrows, optimizer = {"critic": ("keeper",), "keeper": ("critic",)}, OptimizerConfig(name="adam", lr=2e-4, betas=(0.9, 0.999))
        return {name: Role(step, (name,), borrows=borrows.get(name, ()), optimizer=optimizer) for name, step in self._steps(stage).items()}

    def _steps(self, stage: str) -> dict[str, RoleStep]:
        """By the network that each of them trains, in update order."""
        return stage_steps(stage, self.networks.__getitem__, self.networks["teacher"], self.low, self.high, self.config.weights, self.classes)

    def needs(self, stage: str) -> dict[str, str]:
        guides = {"keeper": "keeper"} if self.config.keeper == "trained" else {}
        return {"keeper": {"teacher": "teacher"}, "fusion": {**guides, "base": "base"}}.get(stage, {})

    def begin(self, stage: str) -> None:
        """Fusion starts from the base segmenter; the modules that it adds are fresh."""
        if stage == "fusion":
            self.networks["student"].segmenter.load_state_dict(self.networks["base"].state_dict())

    def predict(self, image: Tensor, available: Tensor, network: str = "student") -> Tensor:
        """Logits (B, K, X, Y, Z) of student and base; of teacher and keeper the 7T image (B, 1, X, Y, Z)."""
        low, networks = image[:, [self.low]], self.networks
        if network == "teacher":
            return networks["teacher"](image[:, [self.high]]).image
        if network == "keeper":
            return networks["teacher"].decoder(networks["keeper"](low))
        return segmented(low, networks[network], networks["keeper"] if network == "student" else None)

    def painted(self, network: str) -> tuple[str, str]:
        low, high = (self.facts.sequences[index] for index in (self.low, self.high))
        return (high if network == "teacher" else low), high

    def to_labels(self, logits: Tensor) -> Tensor:
        return self.classes.decode(logits)

    def probabilities(self, logits: Tensor) -> dict[str, Tensor]:
        return self.classes.probabilities(logits)


def _channel(key: str, name: str | None, facts: DataFacts, default: int) -> int:
    if name is not None and name not in facts.sequences:
        raise UserError(f"method.{key}: the set has no sequence {name}; choose from {', '.join(facts.sequences)}")
    return facts.sequences.index(name if name is not None else facts.sequences[default])


def build_networks(config: UHFGuidedConfig, dimensions: int, outputs: int) -> dict[str, nn.Module]:
    """The method's networks by name, for volumes or slices, with so many classes. Raises UserError where they cannot be built."""
    network, base, noise = config.network, config.base, config.noise
    try:
        plain, segmenter = (build_backbone(base.architecture, outputs, dimensions, base.arguments) for _ in range(2))
        student = GuidedSegmenter(segmenter, channels_of(network.width, dimensions), dimensions)
    except ValueError as error:
        raise UserError(f"method.base: {error}; see the class's arguments in mstkd/models/uhf_backbones.py or MONAI") from None
    return {
        "student": student, "base": plain, "teacher": Teacher(dimensions, network.width, noise.kind, noise.std, noise.levels),
        "keeper": build_keeper(config, dimensions), "critic": PatchCritic(dimensions, network.critic_width),
    }  # fmt: skip


def build_keeper(config: UHFGuidedConfig, dimensions: int) -> nn.Module:
    """The keeper, or what stands in its place as a control."""
    if config.keeper == "zeros":
        return Silent(dimensions, config.network.width)
    with nullcontext() if config.keeper == "trained" else torch.random.fork_rng(devices=[]):
        if config.keeper == "random":
            torch.manual_seed(UNTRAINED_SEED)
        return Keeper(dimensions, config.network.width, config.network.keeper_width)


def segmented(image: Tensor, segmenter: nn.Module, keeper: nn.Module | None) -> Tensor:
    """Logits of a low-field image (B, 1, X, Y, Z); the keeper is left as it is."""
    if keeper is None:
        return segmenter(image)
    with torch.no_grad():
        guide = keeper(image)
    return segmenter(image, guide)


def teacher_terms(made: Tensor, image: Tensor, features: list[Tensor], predicted: list[Tensor]) -> dict[str, Tensor]:
    """Of the 7T image given back, (B, 1, X, Y, Z), and what the head makes of maps 1 to 4; both maps and head are taught."""
    predicted = [p.float() for p in predicted]
    return {"image": F.l1_loss(made.float(), image), "feature": feature_matching([f.float() for f in features[: len(predicted)]], predicted)}


def keeper_terms(guide: list[Tensor], wanted: list[Tensor], made: Tensor, image: Tensor, score: Tensor) -> dict[str, Tensor]:
    """Of the keeper's five maps and the teacher's, the image they decode to and the true one, and the critic's score of it."""
    guide, wanted = ([x.float() for x in maps] for maps in (guide, wanted))
    return {
        "feature": feature_matching(wanted, guide), "moment": moment_matching(wanted, guide), "image": F.l1_loss(made.float(), image),
        "adversarial": least_squares_deception_loss(score.float()),
    }  # fmt: skip


METHOD = UHFGuided

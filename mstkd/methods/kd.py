"""KD: a teacher trained first on all sequences and then frozen teaches a student that sees any subset.

The classic scheme: softened logits (Hinton et al., arXiv:1503.02531) and matched feature maps (FitNets,
arXiv:1412.6550) beside the student's own loss on the labels. The teacher may also come from elsewhere: `teacher.path`.
"""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from mstkd.batch import Batch, Progress, StepOutput
from mstkd.config import IntensityConfig, OptimizerConfig, ScheduleConfig, Section
from mstkd.errors import UserError
from mstkd.losses.dice import soft_dice
from mstkd.losses.distillation import feature_matching, standardised_kl
from mstkd.losses.logits import bernoulli_kl
from mstkd.losses.precision import full_precision
from mstkd.methods import DataFacts, Role, RoleStep
from mstkd.methods._terms import weighted
from mstkd.methods._tumours import TumourSegmentation, encoded
from mstkd.models.segmenter import Projections, Segmentation, Segmenter, stride
from mstkd.targets import TumourChannels


class ArchitectureConfig(Section):
    architecture: Literal["mst_kdnet", "SegResNet", "UNet", "DynUNet", "SwinUNETR"] = "SegResNet"
    arguments: dict[str, Any] = {}  # of the network's class, besides input, output and crop; default: its own


class NetworkConfig(ArchitectureConfig):
    features: list[str] | None = None  # submodules whose outputs are matched; default: the deepest map and the decoder's last


class FitWeights(Section):
    """Weights of the loss terms, by the names under which the terms are logged (unweighted)."""

    dice: float = Field(1.0, ge=0)
    bce: float = Field(1.0, ge=0)


class WeightConfig(FitWeights):
    kl: float = Field(1.0, ge=0)
    feature: float = Field(0.1, ge=0)  # 0: no projections are built


class FitConfig(Section):
    """What every method has that learns the labels with these losses."""

    weights: FitWeights = FitWeights()
    targets: Literal["region", "disjoint"] = "region"
    rc_channel: bool = False  # resection cavity as a channel of its own instead of background
    intensity: IntensityConfig = IntensityConfig()


class DistillConfig(FitConfig):
    """What every method has that also learns from a teacher."""

    weights: WeightConfig = WeightConfig()
    divergence: Literal["regions", "standardised"] = "regions"  # of the logits: per region, or over z-scored channels (CVPR 2024)
    tau: float = Field(4.0, gt=0)  # temperature of the logits


class KDConfig(DistillConfig):
    teacher: NetworkConfig = NetworkConfig()
    student: NetworkConfig = NetworkConfig()


class FitStep(RoleStep):
    """A network that sees every sequence learns the labels."""

    def __init__(self, network: nn.Module, channels: TumourChannels, weights: FitWeights):
        super().__init__()
        self.network, self.channels, self.weights = network, channels, weights

    def forward(self, batch: Batch, carry: dict[str, Tensor], progress: Progress) -> StepOutput:
        terms = fit_terms(self.network(self.seen(batch)).logits, encoded(batch, self.channels))
        return weighted(terms, self.weights)

    def seen(self, batch: Batch) -> Tensor:
        """What the network is given, (B, M, X, Y, Z)."""
        return batch.image


class DistillStep(RoleStep):
    """The student, which sees a subset, learns the labels and what the teacher makes of all sequences."""

    def __init__(self, student: nn.Module, projection: nn.Module | None, teacher: nn.Module, channels: TumourChannels, config: DistillConfig):
        super().__init__()
        self.student, self.projection = student, projection
        self.teacher = (teacher,)  # a tuple: not registered, so neither trained nor switched to training mode nor saved
        self.channels, self.config = channels, config

    def forward(self, batch: Batch, carry: dict[str, Tensor], progress: Progress) -> StepOutput:
        with torch.no_grad():
            full = self.teacher[0](batch.image)
        missing = self.student(batch.visible())
        fit = weighted(fit_terms(missing.logits, encoded(batch, self.channels)), self.config.weights)
        transfer = weighted(self._transfer(full, missing), self.config.weights)
        return StepOutput(fit.loss + self.transfer_share(progress) * transfer.loss, fit.scalars | transfer.scalars)

    def transfer_share(self, progress: Progress) -> float:
        """How much of the teacher's terms counts now."""
        return 1.0

    def _transfer(self, full: Segmentation, missing: Segmentation) -> dict[str, Tensor]:
        divergence = bernoulli_kl if self.config.divergence == "regions" else standardised_kl
        features = missing.features if self.projection is None else self.projection(missing.features)
        with full_precision(missing.logits):
            terms = {"kl": divergence(full.logits.float(), missing.logits.float(), self.config.tau)}
            if self.config.weights.feature:
                terms["feature"] = feature_matching(*_alike(full.features, features))
        return terms


class KD(TumourSegmentation):
    Config = KDConfig
    stages = ("teacher", "student")
    sees_all = ("teacher",)
    paper = "Hinton et al., 2015; FitNets, ICLR 2015"
    reproduces = "both ideas, for segmentation; none of their tables"

    def __init__(self, config: KDConfig, facts: DataFacts):
        self.config = config
        self.channels = TumourChannels(facts.label_scheme, config.targets, config.rc_channel)
        # the student first: with the same seed it begins with the weights that it would have alone
        self.networks: dict[str, nn.Module] = {name: build_network(name, getattr(config, name), facts, self.channels.count) for name in ("student", "teacher")}
        if config.weights.feature:
            self.networks["projection"] = build_projection(self.networks["student"], self.networks["teacher"])

    @classmethod
    def check_crop(cls, config: KDConfig, crop: tuple[int, int, int], key: str = "data.crop") -> None:
        for name in cls.stages:
            check_divisible(name, getattr(config, name), crop, key)

    def roles(self, stage: str) -> dict[str, Role]:
        if stage == "teacher":
            return {"teacher": fit_role(FitStep(self.networks["teacher"], self.channels, self.config.weights), ("teacher",))}
        projection = self.networks.get("projection")
        step = DistillStep(self.networks["student"], projection, self.networks["teacher"], self.channels, self.config)
        return {"student": fit_role(step, ("student",) if projection is None else ("student", "projection"))}

    def needs(self, stage: str) -> dict[str, str]:
        return {"teacher": "teacher"} if stage == "student" else {}


def build_network(name: str, config: ArchitectureConfig, facts: DataFacts, outputs: int, inputs: int | None = None) -> Segmenter:
    """The network of the section `method.<name>`, for all sequences or only so many `inputs`; raises UserError where it cannot be built."""
    features = config.features if isinstance(config, NetworkConfig) else ()
    try:
        return Segmenter(config.architecture, inputs or len(facts.sequences), outputs, facts.crop, config.arguments, features)
    except ValueError as error:
        raise UserError(f"method.{name}: {error}; see the class's arguments in mstkd/models/segmenter.py or MONAI") from None


def build_projection(student: Segmenter, teacher: Segmenter) -> Projections:
    """From the student's feature maps to channels like the teacher's. Raises UserError if they are not equally many."""
    if len(student.features) != len(teacher.features):
        given = " and ".join(f"{len(network.features)} of the {name}" for name, network in (("student", student), ("teacher", teacher)))
        raise UserError(f"method.student.features: {given} cannot be matched; name equally many in both, or set method.weights.feature to 0")
    return Projections(student.channels, teacher.channels)


def check_divisible(name: str, config: ArchitectureConfig, crop: tuple[int, int, int], key: str) -> None:
    """Raise UserError if the network of `method.<name>` cannot halve this crop as often as it does."""
    try:
        steps = stride(config.architecture, config.arguments)
    except (TypeError, IndexError):
        return  # no strides: building the network says so
    if any(size % step for size, step in zip(crop, steps, strict=True)):
        nearest = [-(-size // step) * step for size, step in zip(crop, steps, strict=True)]
        raise UserError(f"{key} {list(crop)}: {config.architecture} of method.{name} needs multiples of {list(steps)}; use {nearest}")


def fit_terms(logits: Tensor, target: Tensor) -> dict[str, Tensor]:
    """How far logits (B, K, X, Y, Z) are from the targets in {0, 1}; Dice is the mean over the channels."""
    with full_precision(logits):
        logits = logits.float()
        return {"dice": soft_dice(logits.sigmoid(), target).mean(), "bce": F.binary_cross_entropy_with_logits(logits, target)}


def _alike(full: tuple[Tensor, ...], missing: tuple[Tensor, ...]) -> tuple[list[Tensor], list[Tensor]]:
    """Float32 maps of equal size and scale: the teacher's resampled where another architecture has another size, both over its root mean square.

    FitNets matches maps as they are; then the deepest ones, whose values are in the hundreds, would outweigh all other terms.
    """
    pairs = []
    for f, m in zip(full, missing, strict=True):
        f, m = f.float(), m.float()
        f = f if f.shape == m.shape else F.interpolate(f, m.shape[2:], mode="trilinear")
        size = f.detach().square().mean().sqrt().clamp_min(1e-6)
        pairs.append((f / size, m / size))
    return [f for f, _ in pairs], [m for _, m in pairs]


def fit_role(step: RoleStep, networks: tuple[str, ...]) -> Role:
    """The role of these networks with the optimiser that all methods here use."""
    return Role(step, networks, optimizer=OptimizerConfig(name="adamw", lr=3e-4, weight_decay=1e-5), schedule=ScheduleConfig(name="poly"))


METHOD = KD

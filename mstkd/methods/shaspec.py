"""ShaSpec: one segmentation network with shared and specific features of every sequence (CVPR 2023, arXiv:2307.14126).

Two stages of one network: `complete` hides nothing, `missing` goes on with random subsets. Nothing is distilled; a missing sequence's
feature is generated from the shared ones of those that are there. Where this differs from the released code, and why:
- a missing sequence is generated from the mean, as in the paper, not from the first in the list: `generated: first`;
- it is not encoded: its skips are the mean of the others' (there an encoding of zeros: `skip_fill: reference`), and it takes part in
  neither auxiliary loss (`include_missing`); 2 encoder passes per available sequence instead of 8 per sample;
- the pyramid's global context passes group norms, also where the branches are joined; there an instance norm of one voxel made it
  constant, and the one behind the join would take any constant away: `reference_global`;
- alignment is over all pairs of available sequences, at the scale of the code's four of six: `cyclic`;
- Dice is smoothed in numerator and denominator, so that an empty target teaches silence: `reference_dice`;
- subsets are drawn per sample and repeatable; the released one is per batch, unseeded, and new in every tile of a validation;
- the restart of the learning rate at the second stage is explicit: `warm_restart`; the paper names a cosine:
  `train.roles.missing.schedule={name: cosine, after_steps: 80000}`; the second stage begins with fresh momentum, from the weights that
  scored best on complete input;
- z-scores over the brain, not capped at a histogram's tail; channels are WT, TC, ET (there ET, WT, TC), by the data's label scheme.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from mstkd.batch import Batch, Progress, StepOutput
from mstkd.config import AvailabilityConfig, IntensityConfig, OptimizerConfig, ScheduleConfig, Section
from mstkd.errors import UserError
from mstkd.losses.dice import plain_dice
from mstkd.losses.domain import alignment, classification, undecided
from mstkd.methods import DataFacts, Role, RoleStep
from mstkd.methods._tumours import TumourSegmentation, encoded
from mstkd.models.shaspec import STRIDE, Bottleneck, Pyramid, ShaSpecNetwork, ShaSpecOutput, Up
from mstkd.targets import TumourChannels

REGIONS = 3  # WT, TC, ET: the channels of the logits


class NetworkConfig(Section):
    """Defaults: the published network, 187,708,132 parameters for four sequences."""

    width: int = Field(64, ge=4, multiple_of=4)  # channels at full resolution
    blocks: tuple[int, int, int, int] = (3, 4, 6, 3)  # of the encoder's layers
    generated: Literal["mean", "first"] = "mean"
    skip_fill: Literal["mean", "reference"] = "mean"
    reference_global: bool = False


class DomainWeights(Section):
    """Of the small losses beside the task's, by the names under which they are logged (unweighted); the paper's alpha and beta."""

    dao: float = Field(0.1, ge=0)  # alignment of shared features
    dco: float = Field(0.02, ge=0)  # classification of specific features


class ShaSpecConfig(Section):
    network: NetworkConfig = NetworkConfig()
    weights: DomainWeights = DomainWeights()
    alignment: Literal["l1", "mse", "kl", "ce"] = "l1"
    cyclic: bool = False  # alignment of neighbours in the list only
    include_missing: bool = False  # both losses also see encodings of zeros
    reference_dice: bool = False
    two_stages: bool = True  # False: `missing` starts afresh; then give stages=[missing]
    warm_restart: int = Field(0, ge=0)  # steps that the learning rate of `missing` counts as done, as many as `complete` has; 0: a curve of its own
    intensity: IntensityConfig = IntensityConfig()


class SegmentStep(RoleStep):
    """The network learns the labels, shared features learn to look alike, specific ones to be told apart."""

    def __init__(self, student: nn.Module, alignment: nn.Module | None, channels: TumourChannels, config: ShaSpecConfig):
        super().__init__()
        self.student, self.alignment = student, alignment
        self.channels, self.config = channels, config

    def forward(self, batch: Batch, carry: dict[str, Tensor], progress: Progress) -> StepOutput:
        target = encoded(batch, self.channels)[:, :REGIONS]
        output = self.student(batch.image, batch.available)
        with torch.autocast(batch.image.device.type, enabled=False):
            terms = task_terms(output.logits.float(), target, self.config.reference_dice)
            terms["dao"] = self._alignment(output)
            terms["dco"] = classification(output.domains.float(), output.pairs)
        weights = self.config.weights
        loss = terms["dice"] + terms["bce"] + weights.dao * terms["dao"] + weights.dco * terms["dco"]
        return StepOutput(loss, {name: term.detach() for name, term in terms.items()})

    def _alignment(self, output: ShaSpecOutput) -> Tensor:
        shared, config = output.shared.float(), self.config
        if self.alignment is not None:
            return undecided(self.alignment(shared.mean((2, 3, 4))))
        return alignment(shared, output.pairs, output.domains.shape[1], config.alignment, config.cyclic)


class ShaSpec(TumourSegmentation):
    Config = ShaSpecConfig
    stages = ("complete", "missing")
    complete_only = False
    scored = ("student",)
    blocks = (Bottleneck, Pyramid, Up)
    paper = "Wang et al., CVPR 2023, arXiv:2307.14126"
    reproduces = "network, losses and training of the paper; the released code's defects as options"

    def __init__(self, config: ShaSpecConfig, facts: DataFacts):
        self.config = config
        self.channels = TumourChannels(facts.label_scheme, "region", rc_channel=False)
        arguments = config.network.model_dump() | {"encode_missing": config.include_missing}
        student = ShaSpecNetwork(len(facts.sequences), REGIONS, **arguments)
        self.networks: dict[str, nn.Module] = {"student": student}
        if config.alignment == "ce":
            self.networks["alignment"] = nn.Linear(student.domain.in_features, len(facts.sequences))

    @classmethod
    def check_crop(cls, config: ShaSpecConfig, crop: tuple[int, int, int], key: str = "data.crop") -> None:
        if tuple(crop) == STRIDE or any(size % step for size, step in zip(crop, STRIDE, strict=True)):
            nearest = [-(-size // step) * step for size, step in zip(crop, STRIDE, strict=True)]
            fits = nearest if tuple(nearest) != STRIDE else [2 * STRIDE[0], *STRIDE[1:]]
            raise UserError(f"{key} {list(crop)}: needs multiples of {list(STRIDE)}, more than one of them; use {fits}")

    def availability(self, stage: str) -> AvailabilityConfig | None:
        return AvailabilityConfig(kind="natural") if stage == "complete" else None

    def roles(self, stage: str) -> dict[str, Role]:
        step = SegmentStep(self.networks["student"], self.networks.get("alignment"), self.channels, self.config)
        optimizer = OptimizerConfig(name="sgd", lr=1e-2, momentum=0.99, nesterov=True, weight_decay=0.0)
        schedule = ScheduleConfig(name="poly", power=0.9, after_steps=self.config.warm_restart if self.needs(stage) else 0)
        return {stage: Role(step, tuple(self.networks), optimizer=optimizer, schedule=schedule)}

    def needs(self, stage: str) -> dict[str, str]:
        return dict.fromkeys(self.networks, "complete") if stage == "missing" and self.config.two_stages else {}

    def predict(self, image: Tensor, available: Tensor, network: str = "student") -> Tensor:
        self.check_crop(self.config, tuple(image.shape[2:]), "inference.window")
        with torch.no_grad():
            return self.networks[network](image, available).logits

    def features(self, image: Tensor, available: Tensor) -> dict[str, tuple[Tensor, list[int]]]:
        with torch.no_grad():
            output = self.networks["student"](image, available)
        sequences = [sequence for _, sequence in output.pairs]
        return {name: (getattr(output, name).mean((2, 3, 4)).float(), sequences) for name in ("shared", "specific")}


def task_terms(logits: Tensor, target: Tensor, reference_dice: bool = False) -> dict[str, Tensor]:
    """Of logits (B, K, X, Y, Z) and targets in {0, 1}: Dice, mean over the channels, and cross-entropy, summed over them."""
    cross_entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    return {"dice": plain_dice(logits.sigmoid(), target, reference_dice).mean(), "bce": cross_entropy.mean((0, 2, 3, 4)).sum()}


METHOD = ShaSpec

"""MST-KDNet: teacher and student segmentation networks, trained together (MICCAI 2025, arXiv:2507.22626).

The teacher sees all sequences, the student any non-empty subset; only the student is needed at inference.
Where this differs from the released code, and why:
- the student's background channel has its own Dice and consistency terms (there it got no gradient);
- the KL term goes from teacher to student over the classes (there swapped, z-scored along Z): `reference_kl`;
- attention maps are scaled by the number of tokens, so that any crop works: `reference_evd`;
- style matching is on and has a scale at which it acts (there commented out, factor 6.6e-15): `reference_scale`;
- target channels are the regions of the paper's figure (there disjoint labels): `targets: disjoint`;
- min-max runs over the brain (there over the whole array): `intensity: {kind: reference_minmax}`;
- the critic pools before its last layer (there one crop only: `reference_head`) and keeps its optimiser (there a
  new one every step); evaluation uses running statistics and no dropout (there batch statistics: `bn_eval: batch`).
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from mstkd.batch import Batch, Progress, StepOutput, hide
from mstkd.config import IntensityConfig, OptimizerConfig, ScheduleConfig, Section
from mstkd.errors import UserError
from mstkd.losses.dice import soft_dice
from mstkd.losses.distillation import attention_extremes, consistency, feature_matching, ramp_up, reference_kl, standardised_kl
from mstkd.losses.precision import full_precision
from mstkd.losses.style import reference_style_matching, style_matching
from mstkd.methods import DataFacts, Role, RoleStep
from mstkd.methods._terms import weighted
from mstkd.methods._transformer import TransformerConfig
from mstkd.methods._tumours import TumourSegmentation, encoded
from mstkd.models.mst_kdnet import Features, MSTKDNetwork, ResidualBlock, Up, stride
from mstkd.models.style_critic import StyleCritic
from mstkd.models.symmetric import symmetric
from mstkd.models.transformer_unet import Decoder, Layer
from mstkd.targets import TumourChannels

log = logging.getLogger(__name__)

FEW_TOKENS = 27
PUBLISHED_TOKENS = 120  # of the 160 x 192 x 128 crop, to which the published weight of the attention term belongs


class NetworkConfig(TransformerConfig):
    """Defaults: the published network, 154,334,148 parameters each for teacher and student."""

    width: int = Field(16, ge=8, multiple_of=8)  # channels at full resolution; GroupNorm has 8 groups
    decoder_width: int = Field(16, ge=1)  # of the transformer's decoder: its features have 4, 8, 16 and 32 times as many channels
    layers: int = Field(12, ge=4, multiple_of=4)  # four evenly spaced ones are distilled
    mlp_dim: int = Field(2048, ge=1)
    dropout: float = Field(0.1, ge=0, lt=1)  # transformer
    fuse_dropout: float = Field(0.2, ge=0, lt=1)  # where style and content are joined
    norm: Literal["batch", "instance"] = "batch"  # of the transformer's decoder
    bn_eval: Literal["running", "batch"] = "running"  # statistics of `norm: batch` in evaluation
    last_stride: Literal[1, 2] = 2  # 1: one down-sampling fewer, for small crops; 16 instead of 32 voxels per token and axis


class WeightConfig(Section):
    """Weights of the loss terms, by the names under which the terms are logged (unweighted)."""

    dice_teacher: float = Field(0.4, ge=0)
    dice_student: float = Field(0.6, ge=0)
    bce: float = Field(0.0, ge=0)  # companion of Dice, shared out like it: Dice has no gradient in a saturated channel or an empty target
    consistency: float = Field(10.0, ge=0)  # reached after `ramp_epochs`
    kl: float = Field(1.0, ge=0)
    content: float = Field(0.2, ge=0)
    mst: float = Field(0.2, ge=0)
    evd: float = Field(1e8 / PUBLISHED_TOKENS**4, ge=0)
    gsm: float = Field(0.1, ge=0)
    adversarial: float = Field(2e-4, ge=0)


class TrunkConfig(Section):
    """What every method with this network has."""

    network: NetworkConfig = NetworkConfig()
    intensity: IntensityConfig = IntensityConfig(kind="minmax")
    targets: Literal["region", "disjoint"] = "region"
    rc_channel: bool = False  # resection cavity as a channel of its own instead of background
    missing_fill: Literal["zeros", "noise"] = "zeros"  # noise: standard normal


class MSTKDNetConfig(TrunkConfig):
    weights: WeightConfig = WeightConfig()
    ramp_epochs: int = Field(20, ge=1)
    tau: float = Field(7.0, gt=0)  # temperature of the logit distillation
    detach_teacher: bool = False  # True: no gradient from the transfer terms into the teacher
    no_mstkd: bool = False  # ablation: without mst and evd
    no_gsme: bool = False  # ablation: without gsm, adversarial and critic
    no_slkd: bool = False  # ablation: without consistency and kl
    reference_kl: bool = False
    reference_scale: bool = False  # of gsm
    reference_evd: bool = False  # attention maps scaled by 120 whatever the crop
    reference_head: bool = False  # of the critic


class NetworksStep(RoleStep):
    """Teacher and student in one role; the critic is borrowed and stays frozen."""

    def __init__(self, teacher: nn.Module, student: nn.Module, critic: nn.Module | None, channels: TumourChannels, config: MSTKDNetConfig):
        super().__init__()
        self.teacher, self.student = teacher, student
        self.borrowed = (critic,) if critic is not None else ()  # a tuple: not registered as a submodule
        self.channels, self.config = channels, config

    def forward(self, batch: Batch, carry: dict[str, Tensor], progress: Progress) -> StepOutput:
        target = encoded(batch, self.channels)
        full, missing = self.teacher(batch.image), self.student(student_input(batch, self.config.missing_fill))
        deceived = [critic(missing.style) for critic in self.borrowed]
        with full_precision(batch.image):
            terms = self._terms(_float(full), _float(missing), target)
            for logit in deceived:
                terms["adversarial"] = _bce(logit.float(), 0.0)
        carry = {"style_full": full.style.detach(), "style_missing": missing.style.detach()}
        return weighted(terms, self.config.weights, carry, consistency=ramp_up(progress.epoch, self.config.ramp_epochs))

    def _terms(self, full: Features, missing: Features, target: Tensor) -> dict[str, Tensor]:
        """All loss terms but the adversarial one, unweighted."""
        config = self.config
        terms = {
            "dice_teacher": soft_dice(full.logits.sigmoid(), target).sum(),
            "dice_student": soft_dice(missing.logits.sigmoid(), target).sum(),
        }
        if config.weights.bce:
            cross_entropies = (F.binary_cross_entropy_with_logits(features.logits, target) for features in (full, missing))
            shares = (config.weights.dice_teacher, config.weights.dice_student)
            terms["bce"] = sum(share * term for share, term in zip(shares, cross_entropies, strict=True))
        if config.detach_teacher:
            full = Features(*([t.detach() for t in f] if isinstance(f, tuple) else f.detach() for f in full))
        terms["content"] = F.mse_loss(missing.content, full.content)
        if not config.no_slkd:
            divergence = reference_kl if config.reference_kl else standardised_kl
            terms["consistency"] = consistency(full.logits.sigmoid(), missing.logits.sigmoid())
            terms["kl"] = divergence(full.logits, missing.logits, config.tau)
        if not config.no_mstkd:
            tokens = PUBLISHED_TOKENS if config.reference_evd else full.attention[0].shape[-1]
            terms["mst"] = feature_matching(full.decoded, missing.decoded)
            terms["evd"] = attention_extremes(full.attention, missing.attention, scale=tokens)
        if not config.no_gsme:
            matching = reference_style_matching if config.reference_scale else style_matching
            terms["gsm"] = matching(*((f.encoded, f.style, f.content) for f in (full, missing)))
        return terms


class CriticStep(RoleStep):
    """The critic learns to call the teacher's style maps 0 and the student's 1."""

    def __init__(self, critic: nn.Module):
        super().__init__()
        self.critic = critic

    def forward(self, batch: Batch, carry: dict[str, Tensor], progress: Progress) -> StepOutput:
        full, missing = self.critic(carry["style_full"]), self.critic(carry["style_missing"])
        with full_precision(full):
            loss = _bce(full.float(), 0.0) + _bce(missing.float(), 1.0)
        return StepOutput(loss, {"critic": loss.detach()})


class MSTKDNet(TumourSegmentation):
    Config = MSTKDNetConfig
    stages = ("distill",)
    complete_only = True
    scored = ("student", "teacher")
    blocks = (ResidualBlock, Up, Layer, Decoder)
    paper = "Zhu et al., MICCAI 2025"
    reproduces = "networks, losses, critic; released code by options; no table yet"

    def __init__(self, config: MSTKDNetConfig, facts: DataFacts):
        self.config = config
        self.channels = TumourChannels(facts.label_scheme, config.targets, config.rc_channel)
        # the student first: with the same seed it begins with the weights of student_only's
        self.networks = {name: build_trunk(config, facts, self.channels) for name in ("student", "teacher")}
        if not config.no_gsme:
            self.networks["critic"] = StyleCritic(8 * config.network.width, config.reference_head)

    @classmethod
    def check_crop(cls, config: MSTKDNetConfig, crop: tuple[int, int, int], key: str = "data.crop") -> None:
        check_divisible(config.network, crop, key)
        if key == "data.crop" and config.reference_head and not config.no_gsme and config.network.last_stride == 1:
            raise UserError("method.reference_head: needs method.network.last_stride 2; set method.reference_head to false")
        if key == "data.crop" and config.reference_head and not config.no_gsme and tuple(size // 64 for size in crop) != (2, 3, 2):
            raise UserError(f"method.reference_head: fits crops like [160, 192, 128], not {list(crop)}; set method.reference_head to false")

    def roles(self, stage: str) -> dict[str, Role]:
        teacher, student, critic = (self.networks.get(name) for name in ("teacher", "student", "critic"))
        step = NetworksStep(teacher, student, critic, self.channels, self.config)
        networks = networks_role(step, ("teacher", "student"), borrows=("critic",) if critic is not None else ())
        if critic is None:
            return {"networks": networks}
        optimizer = OptimizerConfig(name="adam", lr=1e-4, betas=(0.9, 0.99))
        return {"networks": networks, "critic": Role(CriticStep(critic), networks=("critic",), optimizer=optimizer)}

    def predict(self, image: Tensor, available: Tensor, network: str = "student") -> Tensor:
        check_divisible(self.config.network, tuple(image.shape[2:]), "inference.window")
        with torch.no_grad(), _evaluating(self.networks[network]) as module:
            return module(hide(image, available, self._hidden(image))).logits

    def _hidden(self, image: Tensor) -> Tensor | float:
        """What hidden sequences hold; noise is the same in every call, so that a prediction can be repeated."""
        if self.config.missing_fill == "noise":
            if symmetric():
                raise UserError("method.missing_fill noise: a graph holds no noise; export this run with --format safetensors")
            generator = torch.Generator().manual_seed(0)
            return torch.randn(image.shape, generator=generator).to(image)
        return self.config.intensity.hidden_value


def build_trunk(config: TrunkConfig, facts: DataFacts, channels: TumourChannels) -> MSTKDNetwork:
    """Teacher or student: they are alike."""
    network = MSTKDNetwork(len(facts.sequences), channels.count, facts.crop, **config.network.model_dump())
    say_tokens(network.tokens)
    return network


def networks_role(step: RoleStep, networks: tuple[str, ...], borrows: tuple[str, ...] = ()) -> Role:
    """The role of these networks with the published optimiser and schedule."""
    optimizer = OptimizerConfig(name="adam", lr=1e-4, weight_decay=1e-5)
    return Role(step, networks, borrows, optimizer=optimizer, schedule=ScheduleConfig(name="poly", per="epoch", power=0.9))


def student_input(batch: Batch, fill: Literal["zeros", "noise"]) -> Tensor:
    """(B, M, X, Y, Z): the available sequences; the others hold zeros (the lower end of the interval) or noise."""
    if fill == "zeros":
        return batch.visible()
    return hide(batch.image, batch.available, torch.randn_like(batch.image))


def check_divisible(network: NetworkConfig, size: tuple[int, int, int], key: str) -> None:
    """Raise UserError if the network cannot halve this size as often as it does."""
    step = stride(network.last_stride)
    if any(n % step for n in size):
        nearest = [-(-n // step) * step for n in size]
        raise UserError(f"{key} {list(size)}: each axis must be divisible by {step}; use {nearest}")


@cache
def say_tokens(tokens: int) -> None:
    """Once per process: how much the attention has to work with."""
    log.info("the transformer sees %d tokens per crop", tokens)
    if tokens < FEW_TOKENS:
        log.warning("%d tokens per crop are few for attention to tell anything: use a larger data.crop or method.network.last_stride=1", tokens)


def _bce(logit: Tensor, truth: float) -> Tensor:
    return F.binary_cross_entropy_with_logits(logit, torch.full_like(logit, truth))


def _float(features: Features) -> Features:
    """The same features in float32: the loss terms span fifteen orders of magnitude."""
    return Features(*(tuple(t.float() for t in f) if isinstance(f, tuple) else f.float() for f in features))


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[nn.Module]:
    """Evaluation mode for the block: no dropout, no change of a running statistic."""
    training = module.training
    module.eval()
    try:
        yield module
    finally:
        module.train(training)


METHOD = MSTKDNet

"""mmFormer: one network that fuses whatever sequences there are (Zhang et al., MICCAI 2022, arXiv:2206.02425).

The competitor of MST-KDNet's tables that needs no teacher: features of hidden sequences are masked, a transformer relates
those of the others. Two regularisers, in training only: a decoder shared by all sequences segments from each one alone,
and the fused decoder's coarser levels are supervised. The first sees every sequence that the subject has, as in the paper.
Where this differs from the paper, and why:
- overlapping regions by sigmoid, Dice and binary cross-entropy, as in the other methods here (there exclusive classes by
  softmax, weighted cross-entropy and Dice), so that a comparison is one of methods;
- transformer layers are those of MST-KDNet (ReLU, there GELU), and the one across sequences has position embeddings of its own;
- convolutions pad with zeros.
"""

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from mstkd.batch import Batch, Progress, StepOutput
from mstkd.config import OptimizerConfig, ScheduleConfig
from mstkd.errors import UserError
from mstkd.losses.dice import soft_dice
from mstkd.losses.precision import full_precision
from mstkd.methods import DataFacts, Role, RoleStep
from mstkd.methods._terms import weighted
from mstkd.methods._transformer import TransformerConfig
from mstkd.methods._tumours import TumourSegmentation, encoded
from mstkd.methods.kd import FitConfig, FitWeights, fit_terms
from mstkd.models.mmformer import STRIDE, Fusion, Join, Level, MMFormer
from mstkd.models.transformer_unet import Layer
from mstkd.targets import TumourChannels


class NetworkConfig(TransformerConfig):
    """Defaults: about the published size."""

    width: int = Field(8, ge=1)  # channels at full resolution
    embed_dim: int = Field(512, ge=1)
    layers: int = Field(1, ge=1)  # of each transformer
    heads: int = Field(8, ge=1)
    mlp_dim: int = Field(4096, ge=1)
    dropout: float = Field(0.1, ge=0, lt=1)  # transformers


class MMFormerWeights(FitWeights):
    """`dice` and `bce` also weigh the two inside the regularisers."""

    separate: float = Field(1.0, ge=0)  # sum over the sequences, each decoded alone
    deep: float = Field(1.0, ge=0)  # sum over the coarser levels


class MMFormerConfig(FitConfig):
    network: NetworkConfig = NetworkConfig()
    weights: MMFormerWeights = MMFormerWeights()


class MMFormerStep(RoleStep):
    """Fused, separate and coarse logits learn the labels."""

    def __init__(self, network: nn.Module, channels: TumourChannels, weights: MMFormerWeights):
        super().__init__()
        self.network, self.channels, self.weights = network, channels, weights

    def forward(self, batch: Batch, carry: dict[str, Tensor], progress: Progress) -> StepOutput:
        target = encoded(batch, self.channels)
        output = self.network(batch.image, batch.available, batch.present)
        terms = fit_terms(output.logits, target)
        terms["separate"] = sum(self._alone(logits, target, there) for logits, there in zip(output.separate, batch.present.unbind(1), strict=True))
        terms["deep"] = sum(self._fit(logits, target) for logits in output.deep)
        return weighted(terms, self.weights)

    def _fit(self, logits: Tensor, target: Tensor) -> Tensor:
        return weighted(fit_terms(logits, target), self.weights).loss

    def _alone(self, logits: Tensor, target: Tensor, there: Tensor) -> Tensor:
        """The loss over the samples that have the sequence, (B,) bool; 0 without one, yet with a gradient: ranks stay in step."""
        given, share = there[:, None, None, None, None], there / there.sum().clamp(min=1)
        with full_precision(logits):
            logits = logits.float()
            dice = soft_dice(logits.sigmoid() * given, target * given).mean() * there.any()
            bce = F.binary_cross_entropy_with_logits(logits, target, reduction="none").flatten(1).mean(1) @ share
        return self.weights.dice * dice + self.weights.bce * bce


class MMFormerMethod(TumourSegmentation):
    Config = MMFormerConfig
    stages = ("train",)
    complete_only = False
    scored = ("student",)
    any_order = True
    blocks = (Level, Layer, Fusion, Join)
    paper = "Zhang et al., MICCAI 2022"
    reproduces = "network and regularisers, with other losses; no table yet"

    def __init__(self, config: MMFormerConfig, facts: DataFacts):
        self.config = config
        self.channels = TumourChannels(facts.label_scheme, config.targets, config.rc_channel)
        self.networks = {"student": MMFormer(facts.sequences, self.channels.count, facts.crop, **config.network.model_dump())}

    @classmethod
    def check_crop(cls, config: MMFormerConfig, crop: tuple[int, int, int], key: str = "data.crop") -> None:
        if any(size % STRIDE for size in crop) or max(crop) == STRIDE:  # its deepest map needs more than one voxel to be normalised
            nearest = [max(-(-size // STRIDE) * STRIDE, 2 * STRIDE) for size in crop]
            raise UserError(f"{key} {list(crop)}: mmformer needs multiples of {STRIDE}, one of them at least {2 * STRIDE}; use {nearest}")

    def roles(self, stage: str) -> dict[str, Role]:
        step = MMFormerStep(self.networks["student"], self.channels, self.config.weights)
        optimizer = OptimizerConfig(name="adam", lr=2e-4, weight_decay=1e-4)
        return {"student": Role(step, ("student",), optimizer=optimizer, schedule=ScheduleConfig(name="poly", per="epoch"))}

    def predict(self, image: Tensor, available: Tensor, network: str = "student") -> Tensor:
        return self.networks[network](image, available).logits


METHOD = MMFormerMethod

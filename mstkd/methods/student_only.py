"""The student of MST-KDNet without a teacher: what modality dropout alone reaches.

Controlled against `mst_kdnet`: with the same recipe and seed it has the same network, the same initial weights, the same
crops and subsets in the same order, the student's share of the loss, optimiser and schedule. The role has the same name,
so that `method.name` is all that a study changes; the critic and the transfer terms are what is left out.
"""

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from mstkd.batch import Batch, Progress, StepOutput
from mstkd.config import Section
from mstkd.losses.dice import soft_dice
from mstkd.losses.precision import full_precision
from mstkd.methods import DataFacts, Role, RoleStep
from mstkd.methods._terms import weighted
from mstkd.methods._tumours import encoded
from mstkd.methods.mst_kdnet import MSTKDNet, TrunkConfig, build_trunk, check_divisible, networks_role, student_input
from mstkd.targets import TumourChannels


class StudentWeights(Section):
    """As in mst_kdnet, and by the same names."""

    dice_student: float = Field(0.6, ge=0)
    bce: float = Field(0.0, ge=0)


class StudentOnlyConfig(TrunkConfig):
    weights: StudentWeights = StudentWeights()


class AloneStep(RoleStep):
    """One network learns the labels from the available sequences, with its share of MST-KDNet's loss."""

    def __init__(self, name: str, network: nn.Module, channels: TumourChannels, config: TrunkConfig):
        super().__init__()
        self.name, self.network, self.channels, self.config = name, network, channels, config

    def forward(self, batch: Batch, carry: dict[str, Tensor], progress: Progress) -> StepOutput:
        target, weights, dice = encoded(batch, self.channels), self.config.weights, f"dice_{self.name}"
        logits = self.network(student_input(batch, self.config.missing_fill)).logits
        with full_precision(logits):
            terms = {dice: soft_dice(logits.float().sigmoid(), target).sum()}
            if weights.bce:
                terms["bce"] = getattr(weights, dice) * F.binary_cross_entropy_with_logits(logits.float(), target)
        return weighted(terms, weights)


class StudentOnly(MSTKDNet):
    Config = StudentOnlyConfig
    stages = ("train",)
    scored = ("student",)
    paper = "none: the student of mst_kdnet"
    reproduces = "mst_kdnet without its teacher, all else equal"

    def __init__(self, config: StudentOnlyConfig, facts: DataFacts):
        self.config = config
        self.channels = TumourChannels(facts.label_scheme, config.targets, config.rc_channel)
        self.networks = {name: build_trunk(config, facts, self.channels) for name in self.scored}

    @classmethod
    def check_crop(cls, config: StudentOnlyConfig, crop: tuple[int, int, int], key: str = "data.crop") -> None:
        check_divisible(config.network, crop, key)

    def roles(self, stage: str) -> dict[str, Role]:
        (name,) = self.scored
        return {"networks": networks_role(AloneStep(name, self.networks[name], self.channels, self.config), (name,))}


METHOD = StudentOnly

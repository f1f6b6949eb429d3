"""A teacher trained first and a student after it, of one convolution each: something to chain jobs with."""

from torch import nn
from torch.nn import functional as F
from toys.painting import Painting

from mstkd.batch import StepOutput
from mstkd.config import Section
from mstkd.methods import Role, RoleStep


class Fit(RoleStep):
    def __init__(self, network: nn.Module, config):
        super().__init__()
        self.network, self.config = network, config

    def forward(self, batch, carry, progress):
        if progress.step == self.config.fail_at:
            raise RuntimeError("told to fail")
        loss = F.mse_loss(self.network(batch.visible()), (batch.label > 0).float()[:, None].expand(-1, 3, -1, -1, -1))
        return StepOutput(loss * self.config.weight, {"fit": loss.detach()})


class TwoStage(Painting):
    class Config(Section):
        fail_at: int = -1
        weight: float = 1.0

    stages = ("teacher", "student")

    def __init__(self, config, facts):
        self.config, self.facts = config, facts
        self.networks = {name: nn.Conv3d(len(facts.sequences), 3, 3, padding=1) for name in self.stages}

    def roles(self, stage):
        return {stage: Role(Fit(self.networks[stage], self.config), (stage,))}

    def needs(self, stage):
        return {"teacher": "teacher"} if stage == "student" else {}


METHOD = TwoStage

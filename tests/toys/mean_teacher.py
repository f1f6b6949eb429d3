"""A student whose teacher is its own moving average: small enough for hundreds of engine steps."""

import torch
from torch import nn
from torch.nn import functional as F
from toys.co_trained import CoTrained, network

from mstkd.batch import StepOutput
from mstkd.config import OptimizerConfig, Section
from mstkd.methods import Method, Role, RoleStep


class Step(RoleStep):
    def __init__(self, method):
        super().__init__()
        self.student, self.teacher = method.networks["student"], (method.networks["teacher"],)
        self.nan_at = method.config.nan_at

    def forward(self, batch, carry, progress):
        assert not self.teacher[0].training and self.student.training
        with torch.no_grad():
            full = self.teacher[0](batch.image)
        missing = self.student(batch.visible())
        loss = F.mse_loss(missing, (batch.label > 0).float()[:, None].expand_as(missing)) + F.mse_loss(missing, full)
        return StepOutput(loss * float("nan") if progress.step in self.nan_at else loss)


class MeanTeacher(CoTrained):
    class Config(Section):
        nan_at: list[int] = []
        ramp: tuple[int, int] = (0, 1)
        batch_norm: bool = False  # its running statistics, and so the teacher's outputs, depend on the rank count

    check_available = Method.check_available

    def __init__(self, config, facts):
        self.config, self.facts = config, facts
        self.networks = {name: network(len(facts.sequences), 8) for name in ("student", "teacher")}
        for net in () if config.batch_norm else self.networks.values():
            net[1] = nn.GroupNorm(2, 8)

    def roles(self, stage):
        averages = {"averages": {"teacher": "student"}, "decay": 0.9, "ramp": self.config.ramp}
        return {"networks": Role(Step(self), ("student",), optimizer=OptimizerConfig(lr=1e-2), **averages)}


METHOD = MeanTeacher

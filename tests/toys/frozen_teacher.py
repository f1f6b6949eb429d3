"""A teacher with BatchNorm and dropout, trained first, and a student that follows it: wide enough for ZeRO-3 to cut its weights."""

import torch
from torch import nn
from torch.nn import functional as F
from toys.painting import Painting

from mstkd.batch import StepOutput
from mstkd.config import OptimizerConfig, Section
from mstkd.methods import Role, RoleStep


def network(channels: int, width: int) -> nn.Module:
    middle = nn.Conv3d(width, width, 3, padding=1)  # 110,656 parameters for 64: DeepSpeed keeps less than 100,000 whole
    return nn.Sequential(nn.Conv3d(channels, width, 3, padding=1), nn.BatchNorm3d(width), nn.Dropout(0.3), nn.ReLU(), middle, nn.Conv3d(width, 3, 1))


class Fit(RoleStep):
    def __init__(self, teacher):
        super().__init__()
        self.teacher = teacher

    def forward(self, batch, carry, progress):
        return StepOutput(F.mse_loss(self.teacher(batch.image), (batch.label > 0).float()[:, None].expand(-1, 3, -1, -1, -1)))


class Follow(RoleStep):
    def __init__(self, student, teacher, gradient_through):
        super().__init__()
        self.student, self.teacher, self.gradient_through = student, (teacher,), gradient_through

    def forward(self, batch, carry, progress):
        teacher = self.teacher[0]
        assert not any(module.training for module in teacher.modules()) and not any(p.requires_grad for p in teacher.parameters())
        with torch.no_grad():
            full = teacher(batch.image)
            unchanged = teacher(torch.ones_like(batch.image[:1])).mean()
        loss = F.mse_loss(self.student(batch.visible()), full)
        if self.gradient_through:  # as through a frozen encoder: the teacher judges what the student makes of the image
            loss = loss + F.mse_loss(teacher(self.student(batch.visible()).mean(1, keepdim=True).expand_as(batch.image)), full)
        return StepOutput(loss, {"unchanged": unchanged})


class FrozenTeacher(Painting):
    class Config(Section):
        width: int = 64
        gradient_through: bool = False

    stages = ("teacher", "student")
    sees_all = ("teacher",)

    def __init__(self, config, facts):
        self.config, self.facts = config, facts
        sequences = len(facts.sequences)
        self.networks = {"teacher": network(sequences, config.width), "student": nn.Conv3d(sequences, 3, 3, padding=1)}

    def roles(self, stage):
        adam = OptimizerConfig(lr=1e-2)
        if stage == "teacher":
            return {"teacher": Role(Fit(self.networks["teacher"]), ("teacher",), optimizer=adam)}
        step = Follow(self.networks["student"], self.networks["teacher"], self.config.gradient_through)
        return {"student": Role(step, ("student",), optimizer=adam)}

    def needs(self, stage):
        return {"teacher": "teacher"} if stage == "student" else {}

    def predict(self, image, available, network="student"):
        assert network != "teacher" or available.all()
        return super().predict(image, available, network)


METHOD = FrozenTeacher

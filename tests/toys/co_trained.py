"""A method small enough for hundreds of engine steps: co-trained teacher and student (BatchNorm) and a critic."""

import torch
from torch import nn
from torch.nn import functional as F
from toys.painting import Painting

from mstkd.batch import StepOutput
from mstkd.config import OptimizerConfig, ScheduleConfig, Section
from mstkd.errors import UserError
from mstkd.methods import Role, RoleStep


def network(channels: int, width: int) -> nn.Module:
    return nn.Sequential(nn.Conv3d(channels, width, 3, padding=1), nn.BatchNorm3d(width), nn.ReLU(), nn.Conv3d(width, 3, 1))


class NetworksStep(RoleStep):
    def __init__(self, method):
        super().__init__()
        self.teacher, self.student = method.networks["teacher"], method.networks["student"]
        self.critic = (method.networks["critic"],)
        self.nan_at = method.config.nan_at

    def forward(self, batch, carry, progress):
        full, missing = self.teacher(batch.image), self.student(batch.visible())
        target = (batch.label > 0).float()[:, None].expand_as(full)
        fit = F.mse_loss(full, target) + F.mse_loss(missing, target)
        match = F.mse_loss(full, missing)
        fool = F.binary_cross_entropy_with_logits(self.critic[0](missing), torch.zeros(len(missing), 1, device=full.device))
        loss = fit + 0.1 * match + 1e-3 * fool
        if progress.step in self.nan_at:
            match = match * float("nan")
            loss = loss + match
        return StepOutput(loss, {"fit": fit.detach(), "match": match.detach()}, {"full": full.detach(), "missing": missing.detach()})


class CriticStep(RoleStep):
    def __init__(self, method):
        super().__init__()
        self.critic = method.networks["critic"]

    def forward(self, batch, carry, progress):
        real, fake = self.critic(carry["full"]), self.critic(carry["missing"])
        loss = F.binary_cross_entropy_with_logits(real, torch.zeros_like(real)) + F.binary_cross_entropy_with_logits(fake, torch.ones_like(fake))
        return StepOutput(loss, {"critic": loss.detach()})


class CoTrained(Painting):
    class Config(Section):
        nan_at: list[int] = []
        critic_every: int = 1
        width: int = 8
        at_most: int = 4  # sequences that a sample may show

    stages = ("distill",)

    def __init__(self, config, facts):
        self.config, self.facts = config, facts
        m = len(facts.sequences)
        critic = nn.Sequential(nn.Conv3d(3, 4, 3, stride=2), nn.LeakyReLU(0.2), nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(4, 1))
        self.networks = {"teacher": network(m, config.width), "student": network(m, config.width), "critic": critic}

    def check_available(self, available):
        if int(available.sum(1).max()) > self.config.at_most:
            raise UserError(f"more than {self.config.at_most} sequences")

    def roles(self, stage):
        adam = OptimizerConfig(lr=1e-2)
        return {
            "networks": Role(NetworksStep(self), ("teacher", "student"), borrows=("critic",), optimizer=adam, schedule=ScheduleConfig(name="poly")),
            "critic": Role(CriticStep(self), ("critic",), every=self.config.critic_every, optimizer=adam),
        }


METHOD = CoTrained

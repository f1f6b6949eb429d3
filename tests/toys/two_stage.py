"""A teacher trained first and a student after it, of one convolution each: something to chain jobs with."""

import torch
from torch import nn
from torch.nn import functional as F

from mstkd.batch import StepOutput
from mstkd.config import IntensityConfig, Section
from mstkd.methods import Method, Role, RoleStep


class Fit(RoleStep):
    def __init__(self, network: nn.Module, config):
        super().__init__()
        self.network, self.config = network, config

    def forward(self, batch, carry, progress):
        if progress.step == self.config.fail_at:
            raise RuntimeError("told to fail")
        loss = F.mse_loss(self.network(batch.visible()), (batch.label > 0).float()[:, None].expand(-1, 3, -1, -1, -1))
        return StepOutput(loss * self.config.weight, {"fit": loss.detach()})


class TwoStage(Method):
    class Config(Section):
        fail_at: int = -1
        weight: float = 1.0

    task, stages = "segmentation", ("teacher", "student")
    intensity = IntensityConfig()

    def __init__(self, config, facts):
        self.config, self.facts = config, facts
        self.networks = {name: nn.Conv3d(len(facts.sequences), 3, 3, padding=1) for name in self.stages}

    def roles(self, stage):
        return {stage: Role(Fit(self.networks[stage], self.config), (stage,))}

    def needs(self, stage):
        return {"teacher": "teacher"} if stage == "student" else {}

    def predict(self, image, available, network="student"):
        return self.networks[network](image)

    def to_labels(self, logits):
        scheme = self.facts.label_scheme
        labels = torch.zeros(logits.shape[0], *logits.shape[2:], dtype=torch.uint8, device=logits.device)
        for k, region in enumerate(scheme.regions):
            labels[logits[:, k] > 0.5] = scheme.paint[region]
        return labels


METHOD = TwoStage

"""A segmentation method of one convolution per network: nothing to train, results to reason about."""

import torch
from torch import nn
from toys.painting import Painting

from mstkd.batch import StepOutput
from mstkd.config import Section
from mstkd.methods import Role, RoleStep


class BothStep(RoleStep):
    def __init__(self, method):
        super().__init__()
        self.teacher, self.student = method.networks["teacher"], method.networks["student"]

    def forward(self, batch, carry, progress):
        return StepOutput((self.teacher(batch.image) - self.student(batch.visible())).square().mean())


class Linear(Painting):
    """Region k where the 3x3x3 mean of a weighted sum of the visible z-scores passes a threshold."""

    class Config(Section):
        pass

    stages, threshold = ("distill",), 0.0

    def __init__(self, config, facts):
        self.config, self.facts = config, facts
        self.networks = {name: self._network(len(facts.sequences), shift) for name, shift in (("student", 0.0), ("teacher", 0.1))}

    def roles(self, stage):
        return {"both": Role(BothStep(self), ("teacher", "student"))}

    def predict(self, image, available, network="student"):
        assert not self.networks[network].training
        return super().predict(image, available, network)

    def probabilities(self, logits):
        return dict(zip(self.facts.label_scheme.regions, logits.sigmoid().unbind(1)))

    @staticmethod
    def _network(sequences, shift):
        network = nn.Sequential(nn.Conv3d(sequences, 3, 3, padding=1), nn.Dropout(0.5))
        with torch.no_grad():
            network[0].weight.fill_(1 / 27 / sequences)
            network[0].bias.copy_(torch.tensor([-0.5, -0.7, -0.9]) + shift)
        return network


METHOD = Linear

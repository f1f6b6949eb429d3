"""A segmentation method of two dimensions: one convolution, trained on what it sees of an axial slice."""

from torch import nn
from torch.nn import functional as F

from mstkd.batch import StepOutput
from mstkd.config import IntensityConfig, Section
from mstkd.methods import Method, Role, RoleStep


class Fit(RoleStep):
    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, batch, carry, progress):
        return StepOutput(F.mse_loss(self.network(batch.visible()), (batch.label > 0).float()[:, None]))


class Axial(Method):
    class Config(Section):
        pass

    task, stages, dimensions, complete_only, scored = "segmentation", ("student",), 2, False, ("student",)
    intensity = IntensityConfig(kind="percentile", percentile="0.1", interval=(-1.0, 1.0))

    def __init__(self, config, facts):
        assert facts.crop is None and facts.slice_size
        self.config, self.facts = config, facts
        self.networks = {"student": nn.Conv2d(len(facts.sequences), 1, 3, padding=1)}

    def roles(self, stage):
        return {"student": Role(Fit(self.networks["student"]), ("student",))}

    def predict(self, image, available, network="student"):
        return self.networks[network](image)


METHOD = Axial

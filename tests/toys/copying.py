"""A synthesis method of slices: what is missing is the mean of what is given, times a weight. Results to reason about."""

import torch
from torch import nn

from mstkd.batch import StepOutput
from mstkd.config import IntensityConfig, Section
from mstkd.methods import Method, Role, RoleStep


class Fit(RoleStep):
    def __init__(self, method):
        super().__init__()
        self.method, self.student, self.teacher = (method,), method.networks["student"], method.networks["teacher"]

    def forward(self, batch, carry, progress):
        (method,) = self.method
        image = batch.visible()
        return StepOutput(sum((method.predict(image, batch.available, name) - batch.image).square().mean() for name in ("student", "teacher")))


class Copying(Method):
    class Config(Section):
        given: list[str] | None = None
        intensity: IntensityConfig = IntensityConfig(kind="percentile", percentile="0.1", interval=(-1, 1))
        noise: float = 0.0

    task, dimensions, stages = "synthesis", 2, ("copy",)
    scored, oracles = ("teacher", "student"), ("teacher",)
    sampling = ("noise",)

    def __init__(self, config, facts):
        self.config, self.scheme = config, facts.label_scheme
        self.networks = {name: nn.Conv2d(1, 1, 1) for name in ("student", "teacher")}
        for network in self.networks.values():
            nn.init.ones_(network.weight), nn.init.zeros_(network.bias)

    @property
    def intensity(self):
        return self.config.intensity

    @property
    def subsets(self):
        return self.config.given and tuple(self.config.given)

    def roles(self, stage):
        return {"both": Role(Fit(self), ("teacher", "student"))}

    def predict(self, image, available, network="student"):
        assert torch.is_grad_enabled() or not self.networks[network].training  # dropout and batch statistics must not act when it is used
        given = available[:, :, None, None]
        mean = (image * given).sum(1, keepdim=True) / given.sum(1, keepdim=True)
        made = self.networks[network](mean) + self.config.noise * torch.randn_like(mean)
        return torch.where(given, image, made.expand_as(image))

    def predict_oracle(self, image, available, label, network):
        """As without the label, but WT is as dark as it can be."""
        tumour = torch.isin(label, torch.tensor(self.scheme.regions["WT"], dtype=torch.uint8))
        made = self.predict(image, available, network)
        return torch.where(tumour[:, None] & ~available[:, :, None, None], torch.full_like(made, -1), made)


METHOD = Copying

"""A student with a frozen teacher, whose weights the roles' builder sets where training would have loaded them."""

from torch import nn
from toys.mean_teacher import MeanTeacher, Step

from mstkd.config import OptimizerConfig
from mstkd.methods import Role


class Given(MeanTeacher):
    def needs(self, stage):
        return {"teacher": "before"}

    def roles(self, stage):
        teacher = self.networks["teacher"].requires_grad_(False).eval()
        nn.init.constant_(teacher[0].weight, 0.25)
        return {"networks": Role(Step(self), ("student",), optimizer=OptimizerConfig(lr=1e-2))}


METHOD = Given

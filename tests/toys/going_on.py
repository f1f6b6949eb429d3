"""One network that the second stage goes on training."""

from torch import nn
from toys.two_stage import Fit, TwoStage

from mstkd.methods import Role


class GoingOn(TwoStage):
    scored = ("teacher",)

    def __init__(self, config, facts):
        self.config, self.facts = config, facts
        self.networks = {"teacher": nn.Conv3d(len(facts.sequences), 3, 3, padding=1)}

    def roles(self, stage):
        return {stage: Role(Fit(self.networks["teacher"], self.config), ("teacher",))}


METHOD = GoingOn

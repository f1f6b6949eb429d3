"""A network for one subset of the sequences alone: the model a site would train that always has just these.

Its input has the channels of `method.subset` and no others. One model per subset is what a single model for all of them
is measured against; a sweep over `method.subset` trains them all.
"""

from torch import Tensor

from mstkd.batch import Batch
from mstkd.config import AvailabilityConfig
from mstkd.errors import UserError
from mstkd.methods import DataFacts, Role
from mstkd.methods.kd import FitStep, build_network, fit_role
from mstkd.methods.monai_network import MonaiNetwork, MonaiNetworkConfig
from mstkd.subsets import parse_subset, subset_name
from mstkd.targets import TumourChannels


class DedicatedConfig(MonaiNetworkConfig):
    subset: str | None = None  # e.g. t1+t2; default: all sequences


class DedicatedStep(FitStep):
    def __init__(self, indices: list[int], *arguments):
        super().__init__(*arguments)
        self.indices = indices

    def seen(self, batch: Batch) -> Tensor:
        return batch.visible()[:, self.indices]


class Dedicated(MonaiNetwork):
    Config = DedicatedConfig
    complete_only = True  # the same subjects for every subset
    paper = "none"
    reproduces = "one model per subset"

    def __init__(self, config: DedicatedConfig, facts: DataFacts):
        self.config = config
        self.channels = TumourChannels(facts.label_scheme, config.targets, config.rc_channel)
        try:
            given = parse_subset(config.subset or "+".join(facts.sequences), facts.sequences)
        except UserError as error:
            raise UserError(f"method.{error}") from None
        self.subset = subset_name(facts.sequences, given)
        self.indices = [index for index, there in enumerate(given) if there]
        self.networks = {"student": build_network("network", config.network, facts, self.channels.count, len(self.indices))}

    @property
    def subsets(self) -> tuple[str, ...]:
        return (self.subset,)

    def availability(self, stage: str) -> AvailabilityConfig:
        return AvailabilityConfig(kind="fixed", subsets=[self.subset])

    def roles(self, stage: str) -> dict[str, Role]:
        step = DedicatedStep(self.indices, self.networks["student"], self.channels, self.config.weights)
        return {"student": fit_role(step, ("student",))}

    def predict(self, image: Tensor, available: Tensor, network: str = "student") -> Tensor:
        return self.networks[network](image[:, self.indices]).logits


METHOD = Dedicated

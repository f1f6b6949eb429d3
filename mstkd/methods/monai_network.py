"""A segmentation network by name, trained with modality dropout: the baseline that needs no teacher.

MONAI's DynUNet, SegResNet, SwinUNETR or UNet with their own arguments, or the trunk of MST-KDNet. Each sample hides the
sequences that its draw hides; the network learns the labels from the others, with the losses of `kd`.
"""

from torch import Tensor, nn

from mstkd.batch import Batch
from mstkd.methods import DataFacts, Role
from mstkd.methods._tumours import TumourSegmentation
from mstkd.methods.kd import ArchitectureConfig, FitConfig, FitStep, build_network, check_divisible, fit_role
from mstkd.models.segmenter import BLOCKS
from mstkd.targets import TumourChannels


class MonaiNetworkConfig(FitConfig):
    network: ArchitectureConfig = ArchitectureConfig()


class SeenStep(FitStep):
    def seen(self, batch: Batch) -> Tensor:
        return batch.visible()


class MonaiNetwork(TumourSegmentation):
    Config = MonaiNetworkConfig
    stages = ("train",)
    complete_only = False
    scored = ("student",)
    blocks = BLOCKS
    paper = "none: MONAI's networks"
    reproduces = "modality dropout with any of them"

    def __init__(self, config: MonaiNetworkConfig, facts: DataFacts):
        self.config = config
        self.channels = TumourChannels(facts.label_scheme, config.targets, config.rc_channel)
        self.networks: dict[str, nn.Module] = {"student": build_network("network", config.network, facts, self.channels.count)}

    @classmethod
    def check_crop(cls, config: MonaiNetworkConfig, crop: tuple[int, int, int], key: str = "data.crop") -> None:
        check_divisible("network", config.network, crop, key)

    def roles(self, stage: str) -> dict[str, Role]:
        return {"student": fit_role(SeenStep(self.networks["student"], self.channels, self.config.weights), ("student",))}


METHOD = MonaiNetwork

"""StarGAN's scheme with UTAD-Net's parts: one generator for all pairs of sequences, told by a code where to go, and one critic.

From Choi et al. (CVPR 2018, arXiv:1711.09020) it takes the target code as input maps, the critic that also classifies, the cycle
back to the source, and the weights (penalty 10, reconstruction 10, classification 1). Generator and critic are not its own: they are
UTAD-Net's global branch and whole-slice critic, so that against `utad_net` the tumour-aware parts and the distillation are what is
left out. Unpaired, and without any mask.
"""

from torch import nn

from mstkd.methods import DataFacts, Role
from mstkd.methods.utad_net import NetworkConfig, SliceTranslation, Task, TranslationConfig, build_critics, check_size
from mstkd.models.utad_net import Double, Generator, Up


class StarGANConfig(TranslationConfig):
    network: NetworkConfig = NetworkConfig()


class StarGAN(SliceTranslation):
    Config = StarGANConfig
    stages = ("train",)
    scored = ("student",)
    blocks = (Double, Up)
    paper = "Choi et al., CVPR 2018"
    reproduces = "the scheme, with UTAD-Net's global branch and critic; no table"

    def __init__(self, config: StarGANConfig, facts: DataFacts):
        check_size(facts, 2**config.network.levels, f"method.network.levels {config.network.levels}")
        self.config, self.facts = config, facts
        self.networks: dict[str, nn.Module] = {
            "student": Generator(len(facts.sequences), **config.network.model_dump(), branches="global"),
            "critics": build_critics(config, facts, ("whole",)),
        }

    def roles(self, stage: str) -> dict[str, Role]:
        return self.roles_of("student", Task(len(self.facts.sequences)))


METHOD = StarGAN

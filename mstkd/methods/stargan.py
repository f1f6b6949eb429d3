"""StarGAN's scheme with UTAD-Net's parts: one generator for all pairs of sequences, told by a code where to go, and one critic.

From Choi et al. (CVPR 2018, arXiv:1711.09020) it takes the target code as input maps, the critic that also classifies, the cycle
back to the source, and the weights (penalty 10, reconstruction 10, classification 1). Generator and critic are not its own: they are
UTAD-Net's global branch and whole-slice critic, so that against `utad_net` the tumour-aware parts and the distillation are what is
left out. Unpaired, and without any mask.
"""

from torch import nn

from mstkd.methods._translation import NetworkConfig, PlainTranslation, TranslationConfig, check_size
from mstkd.models.utad_net import Double, Generator, Up


class StarGANConfig(TranslationConfig):
    network: NetworkConfig = NetworkConfig()


class StarGAN(PlainTranslation):
    Config = StarGANConfig
    blocks = (Double, Up)
    paper = "Choi et al., CVPR 2018"
    reproduces = "the scheme, with UTAD-Net's global branch and critic; no table"

    def generator(self) -> nn.Module:
        network = self.config.network
        check_size(self.facts, 2**network.levels, f"method.network.levels {network.levels}")
        return Generator(len(self.facts.sequences), **network.model_dump(), branches="global")


METHOD = StarGAN

"""A ResViT-style generator, trained unpaired: residual transformer blocks between a convolutional encoder and decoder.

From Dalmaz et al. (IEEE TMI 2022, arXiv:2106.16031) it takes the generator: encoder and decoder of three convolutions, nine residual
blocks, the first and the sixth of which join local features with a transformer's context, and one transformer shared by the two.
What it does not take: pairs of images and their pixel-wise loss (there is none in unpaired data), the generator pre-trained without
transformers, ImageNet weights, the patch discriminator, and details of layers (mstkd/models/resvit.py). Targets, critic and losses are
those of `stargan`, so that against it the generator alone is different. Without any mask.
"""

from typing import Annotated

from pydantic import Field, model_validator
from torch import nn

from mstkd.methods._transformer import TransformerConfig
from mstkd.methods._translation import PlainTranslation, TranslationConfig, check_size
from mstkd.models.resvit import STRIDE, Attending, Residual, ResViTGenerator


class NetworkConfig(TransformerConfig):
    """Defaults: the published sizes."""

    width: int = Field(64, ge=1)  # channels at full resolution
    blocks: int = Field(9, ge=1)
    attending: list[Annotated[int, Field(ge=0)]] = [0, 5]  # positions of the blocks with a transformer, from 0
    layers: int = Field(12, ge=1)
    mlp_dim: int = Field(3072, ge=1)
    dropout: float = Field(0.1, ge=0, lt=1)  # transformer

    @model_validator(mode="after")
    def _blocks_are_there(self) -> "NetworkConfig":
        if any(position >= self.blocks for position in self.attending):
            raise ValueError(f"attending {self.attending}: there are {self.blocks} blocks, counted from 0")
        return self


class ResViTConfig(TranslationConfig):
    network: NetworkConfig = NetworkConfig()


class ResViT(PlainTranslation):
    Config = ResViTConfig
    blocks = (Residual, Attending)
    paper = "Dalmaz et al., IEEE TMI 2022"
    reproduces = "the generator, unpaired and without ImageNet weights; no table"

    def generator(self) -> nn.Module:
        check_size(self.facts, STRIDE, "resvit")
        return ResViTGenerator(len(self.facts.sequences), self.facts.slice_size, **self.config.network.model_dump())


METHOD = ResViT

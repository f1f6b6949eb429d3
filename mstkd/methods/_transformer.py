"""The settings of a transformer that several networks have."""

from pydantic import Field, model_validator

from mstkd.config import Section


class TransformerConfig(Section):
    embed_dim: int = Field(768, ge=1)
    heads: int = Field(12, ge=1)

    @model_validator(mode="after")
    def _heads_divide(self) -> "TransformerConfig":
        if self.embed_dim % self.heads:
            raise ValueError(f"embed_dim {self.embed_dim} is not a multiple of heads {self.heads}")
        return self

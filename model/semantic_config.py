"""What decides the sizes of semantic ids and their decoder, and how they are trained; no torch."""

from typing import Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

MAX_WIDTH = 4096
MAX_SEMANTIC_K = 10_000
"""The largest number of candidates that a plan may ask the decoder for."""
_MAX_CODE_BITS = 62


class SemanticConfig(BaseModel):
    """Sizes of the codes and of the decoder over them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    levels: int = Field(default=3, ge=1, le=8, description="codes L of an item")
    width: int = Field(default=256, ge=2, le=MAX_WIDTH, description="codes V of a level")
    hidden: int = Field(default=64, ge=1, le=4096, description="width E of the decoder's state")
    blocks: int = Field(default=1, ge=1, le=8, description="gated layers of the decoder")
    expansion: int = Field(default=2, ge=1, le=8, description="units of a gate per hidden unit")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.width**self.levels > 1 << _MAX_CODE_BITS:
            raise ValueError(
                f"width ** levels must be at most 2 ** {_MAX_CODE_BITS}, "
                f"got {self.width} ** {self.levels}"
            )
        return self


class SemanticSpec(BaseModel):
    """The semantic ids of a generation: what its decoder and its codes are made from."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    decoder: SemanticConfig = Field(description="sizes of the codes and of the decoder")
    state_dim: int = Field(ge=1, description="leading elements of the user state that it reads")


class SemanticTrainingConfig(BaseModel):
    """What a person decides about the training of semantic ids."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    decoder: SemanticConfig = Field(
        default=SemanticConfig(), description="sizes of the codes and of the decoder"
    )
    steps: int = Field(default=1000, ge=1, description="batches")
    batch: int = Field(default=512, ge=1, description="examples of a batch")
    learning_rate: float = Field(default=3e-3, gt=0, description="of Adam, at its highest")
    warm_up: int = Field(
        default=50, ge=0, description="steps in which the learning rate rises, at most a tenth"
    )
    dropout: float = Field(
        default=0.1, ge=0, lt=1, description="of the elements of the scaled user state"
    )

"""The sequence encoders to choose from and their settings; free of torch."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field


class MeanEncoderConfig(BaseModel):
    """The mean of the items so far; it has no parameters."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["mean"] = Field(default="mean", description="mean of the items so far")
    max_length: int = Field(default=50, ge=1, le=512, description="longest session L, in items")


class AttentionEncoderConfig(BaseModel):
    """Layers of causal self-attention and a perceptron."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["attention"] = Field(default="attention", description="causal self-attention")
    max_length: int = Field(default=50, ge=1, le=512, description="longest session L, in items")
    layers: int = Field(default=2, ge=1, le=16, description="number of layers")
    heads: int = Field(default=2, ge=1, le=64, description="attention heads A; they divide D")
    feed_forward: int = Field(
        default=1, ge=1, le=8, description="hidden width of the perceptron as a multiple of D"
    )
    dropout: float = Field(
        default=0.2, ge=0, lt=1, description="share of activations that training leaves out"
    )
    absolute_positions: bool = Field(
        default=True, description="learn a vector for each position, counted from the oldest item"
    )
    relative_bias: bool = Field(
        default=False, description="learn a bias of the scores for each distance and head"
    )


class HSTUEncoderConfig(BaseModel):
    """Layers of the Hierarchical Sequential Transduction Unit."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["hstu"] = Field(default="hstu", description="sequential transduction units")
    max_length: int = Field(default=50, ge=1, le=512, description="longest session L, in items")
    layers: int = Field(default=2, ge=1, le=16, description="number of layers")
    heads: int = Field(default=2, ge=1, le=64, description="attention heads A; they divide D")
    dropout: float = Field(
        default=0.2, ge=0, lt=1, description="share of activations that training leaves out"
    )
    absolute_positions: bool = Field(
        default=True, description="learn a vector for each position, counted from the oldest item"
    )
    relative_bias: bool = Field(
        default=True, description="learn a bias of the scores for each distance and head"
    )


SequenceEncoderConfig = Annotated[
    MeanEncoderConfig | AttentionEncoderConfig | HSTUEncoderConfig, Field(discriminator="kind")
]
"""Which sequence encoder a tower has, by ``kind``, and its own settings."""


def check_encoder(config: SequenceEncoderConfig, *, dim: int) -> None:
    """Check that a tower of this width can have this encoder.

    Raises:
        ValueError: if ``dim`` is below 1, or ``config.heads`` does not divide it.
    """
    if dim < 1:
        raise ValueError(f"dim must be at least 1, got {dim}")
    if not isinstance(config, MeanEncoderConfig) and dim % config.heads:
        raise ValueError(f"encoder.heads must divide dim={dim}, got {config.heads}")

"""Which reranker a model has, and its settings; knows no tensors."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt


class MLPConfig(BaseModel):
    """A perceptron over user, item and their products."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["mlp"] = Field(default="mlp", description="selects this reranker")
    hidden: tuple[PositiveInt, PositiveInt] = Field(
        default=(64, 32), description="widths of the hidden layers"
    )


class SelfAttentionConfig(BaseModel):
    """Stacked self-attention over the session and one candidate at a time."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["self_attention"] = Field(
        default="self_attention", description="selects this reranker"
    )
    session_rows: int = Field(
        default=31, ge=1, le=1024, description="last known ids of a history that are attended to"
    )
    layers: int = Field(default=2, ge=1, le=16, description="attention layers")
    attention_heads: int = Field(default=2, ge=1, le=64, description="heads of each layer")
    hidden: int = Field(
        default=128, ge=1, le=8192, description="width of the feed-forward part of each layer"
    )


class MixtureOfLogitsConfig(BaseModel):
    """A gated mixture of the inner products of user and item components."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["mixture_of_logits"] = Field(
        default="mixture_of_logits", description="selects this reranker"
    )
    user_components: int = Field(default=8, ge=1, le=64, description="embeddings of a user")
    item_components: int = Field(default=4, ge=1, le=64, description="embeddings of an item")
    component_dim: int = Field(
        default=32, ge=1, le=1024, description="dimension of these embeddings"
    )
    gate_hidden: int = Field(
        default=64, ge=1, le=4096, description="width of the hidden layer of each part of the gate"
    )
    temperature: float = Field(
        default=0.05, gt=0, le=100, description="what the cosines of components are divided by"
    )


RankerConfig = Annotated[
    MLPConfig | SelfAttentionConfig | MixtureOfLogitsConfig, Field(discriminator="kind")
]
"""Settings of one of the rerankers, told apart by ``kind``."""


def session_rows(config: RankerConfig) -> int:
    """Session rows that the reranker reads at the end of the user state; 0 without a session."""
    return config.session_rows if isinstance(config, SelfAttentionConfig) else 0


def check_ranker(config: RankerConfig, *, dim: int, session_length: int) -> None:
    """Check that a tower of these sizes can have this reranker.

    Args:
        config: of the reranker.
        dim: embedding dimension.
        session_length: most ids of a history that the tower reads.

    Raises:
        ValueError: naming the setting of the reranker and that of the tower, if it cannot.
    """
    if not isinstance(config, SelfAttentionConfig):
        return
    if dim % config.attention_heads:
        raise ValueError(
            f"ranker.attention_heads must divide dim {dim}, got {config.attention_heads}"
        )
    if config.session_rows > session_length:
        raise ValueError(
            f"ranker.session_rows must be at most the tower's history of {session_length} ids "
            f"(max_history), got {config.session_rows}"
        )

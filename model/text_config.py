"""What decides the shapes of a text encoder, and what it makes of a text."""

import re
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

MAX_DIM = 1024
QUERY = "query"
"""The user feature with the text of a request, where a config names no other."""

_PLACEHOLDER = re.compile(r"\{([A-Za-z_][A-Za-z0-9_]*)\}")


class TextTowerConfig(BaseModel):
    """Everything that decides the shapes of a ``TextTower`` and what it makes of a text."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    encoder: dict[str, Any] = Field(
        description="configuration of the encoder, as its config.json has it"
    )
    tokenizer_bytes: int = Field(ge=2, description="length of the tokenizer's JSON")
    dim: int | None = Field(
        default=None,
        ge=1,
        le=MAX_DIM,
        description="embedding dimension D after a linear projection; null: none, D is E",
    )
    heads: tuple[str, ...] = Field(
        default=("user",), min_length=1, max_length=1, description="name of the query embedding"
    )
    tasks: tuple[str, ...] = Field(
        default=(), max_length=0, description="none: the tower has no reranker"
    )
    query: str = Field(default=QUERY, description="user feature that holds the text of a request")
    item_text: tuple[str, ...] = Field(
        default=("{title}",),
        min_length=1,
        description="parts of an item's text, each with one {feature}; a part whose feature has no "
        "values is left out",
    )
    part_separator: str = Field(default=". ", description="between the parts of an item's text")
    value_separator: str = Field(default=", ", description="between the values of a feature")
    query_prefix: str = Field(default="", description="what a query begins with")
    item_prefix: str = Field(default="", description="what an item's text begins with")
    pooling: Literal["mean", "cls"] = Field(
        default="mean", description="mean: of the states of all tokens; cls: state of the first"
    )
    normalize: bool = Field(default=True, description="whether embeddings have unit length")
    max_tokens: int = Field(
        default=128, ge=8, le=8192, description="tokens of a text that count, special ones included"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        for part in self.item_text:
            rest = _PLACEHOLDER.sub("", part)
            if len(_PLACEHOLDER.findall(part)) != 1 or "{" in rest or "}" in rest:
                raise ValueError(f"item_text must have one {{feature}} in each part, got {part!r}")
        return self

    @property
    def item_features(self) -> tuple[str, ...]:
        """Names of the item features that the parts of an item's text hold."""
        return tuple(_PLACEHOLDER.findall(part)[0] for part in self.item_text)


class TextTrainingConfig(BaseModel):
    """What a person decides about texts in a two-tower model."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    encoder: str = Field(
        min_length=1,
        description="folder of the encoder, as save_pretrained of transformers writes it",
    )
    item_text: tuple[str, ...] = Field(
        default=("{title}", "Genres: {genres}", "Tags: {tags}"),
        min_length=1,
        description="parts of an item's text, each with one {feature}",
    )
    query_texts: tuple[str, ...] = Field(
        default=("genres", "tags"),
        min_length=1,
        description="item features of which each value is a text that asks for the item",
    )
    query_share: float = Field(
        default=0.3, gt=0, lt=1, description="positions that are trained with a text of their item"
    )
    alone_share: float = Field(
        default=0.5, ge=0, le=1, description="share of those that are trained without the history"
    )
    query_prefix: str = Field(default="", description="what a query begins with")
    item_prefix: str = Field(default="", description="what an item's text begins with")
    max_tokens: int = Field(
        default=64, ge=8, le=8192, description="tokens of a text that count, special ones included"
    )

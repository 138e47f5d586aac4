"""Requests as a caller states them; free of torch, so that a client needs none."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

from silvershard.model.errors import FieldError


@dataclass(frozen=True)
class WeightedIds(Sequence[Any]):
    """Ids of a user feature with a weight each; as a sequence it is the ids.

    Weights may be negative. An id of weight 0 counts as not given: it takes no place in a list that
    is cut, and is not reported where it is unknown.
    """

    ids: Sequence[int] | Sequence[str]
    weights: Sequence[float]
    """One per id; finite float32."""

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, at: Any) -> Any:
        return self.ids[at]


# Weighted ids are a sequence of their ids.
FeatureValues = Sequence[int] | Sequence[float] | Sequence[str]
FilterParam = int | float | str | Sequence[int] | Sequence[float] | Sequence[str]


class RequestError(FieldError):
    """A request that cannot be served as stated; names the field."""


class FilterMode(IntEnum):
    """How a request wants its filter answered; numbers as on the wire."""

    DEFAULT = 0
    """The same answers as BLOOM_VERIFIED."""
    BLOOM = 1
    """No verification: every eligible item passes, and a few that are not eligible."""
    BLOOM_VERIFIED = 2
    """Exactly the eligible items."""
    EXACT = 3
    """The same answers as BLOOM_VERIFIED."""


@dataclass(frozen=True)
class Request:
    """One retrieval request; field meanings are those of ``silvershard.v1.RetrieveRequest``."""

    features: Mapping[str, FeatureValues] = field(default_factory=dict)
    k: int = 10
    filter: str = ""
    params: Mapping[str, FilterParam] = field(default_factory=dict)
    exclude_ids: Sequence[int] = ()
    nprobe: int = 0
    ann_k: int = 0
    semantic_k: int | None = None
    """Candidates of the decoder of semantic ids; 0: it is not asked, None: the model's default."""
    plan: str = ""
    exact: bool = False
    filter_mode: FilterMode = FilterMode.DEFAULT
    task_weights: Mapping[str, float] = field(default_factory=dict)
    value: str = ""
    """A value formula in place of the model's; empty for the model's."""
    return_fields: Sequence[str] = ()

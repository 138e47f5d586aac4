"""Updates as Python values: what a client asks for, and what became of it.

Shapes: n rows, D embedding dimension.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

import numpy as np
from google.rpc import code_pb2
from numpy.typing import ArrayLike, NDArray

from silvershard.cluster import retrieval_pb2
from silvershard.cluster.consistency import UpdateToken, tokens_from, tokens_to
from silvershard.shard.errors import DeadlineExceeded

Scalar = int | float | str
Column = Scalar | Sequence[Scalar] | NDArray[np.generic]
"""One value, or several of one kind; a sequence of none is null or empty."""


class Durability(Enum):
    """What has happened when ``apply`` returns; what is not rejected is durable in any case."""

    LOGGED = 0
    APPLIED_ONE = 1
    """One replica of every shard has applied it."""
    APPLIED_ALL_READY = 2
    """Every replica that serves has applied it."""


@dataclass(frozen=True, slots=True)
class ItemUpsert:
    """The whole item: what is not given becomes empty, null or zero."""

    item_id: int
    attributes: Mapping[str, Column] = field(default_factory=dict)
    """What filters read."""
    signals: Mapping[str, float] = field(default_factory=dict)
    """What value formulas read."""
    fields: Mapping[str, Scalar | None] = field(default_factory=dict)
    """What answers return; None is null."""
    features: Mapping[str, Column] = field(default_factory=dict)
    """Raw, for the item tower of the model."""
    embedding: ArrayLike | None = None
    """``(D,)``, only for a model without an item tower."""
    ttl_s: float | None = None
    """The item is deleted after so many seconds; None: never."""
    version: int = 0
    """The last writer wins; 0: the next one."""
    if_version: int | None = None
    """The version that the item must have now; 0: it must not exist."""


@dataclass(frozen=True, slots=True)
class ItemPatch:
    """Some columns of an item; the others stay as they are, and it is not embedded again."""

    item_id: int
    attributes: Mapping[str, Column] = field(default_factory=dict)
    signals: Mapping[str, float] = field(default_factory=dict)
    fields: Mapping[str, Scalar | None] = field(default_factory=dict)
    features: Mapping[str, Column] = field(default_factory=dict)
    """Kept for the next generation."""
    version: int = 0
    if_version: int | None = None


@dataclass(frozen=True, slots=True)
class ItemDelete:
    """The end of an item."""

    item_id: int
    urgent: bool = False
    """Whether it goes ahead of everything else that waits."""
    version: int = 0
    if_version: int | None = None


@dataclass(frozen=True, slots=True, eq=False)
class TableRows:
    """New rows of an embedding table that the user tower reads."""

    table: str
    rows: Sequence[int]
    values: ArrayLike
    """``(n, D)``, float32."""
    version: int = 0


Update = ItemUpsert | ItemPatch | ItemDelete | TableRows


@dataclass(frozen=True, slots=True)
class UpdateRejection:
    """An update that was not accepted; the others of its call are."""

    index: int
    """Of the update in its call."""
    code: str
    """Name of the ``google.rpc.Code``."""
    reason: str
    current_version: int = 0
    """Of the item, where the version is what is wrong."""


class ApplyResult(NamedTuple):
    """What became of a call."""

    tokens: tuple[UpdateToken, ...]
    """One per log partition; ``Query.after`` takes them, to read what was written."""
    rejected: tuple[UpdateRejection, ...]


class LoggedNotApplied(DeadlineExceeded):
    """Updates that are durable, but were not applied within the time of their call."""

    def __init__(self, result: ApplyResult) -> None:
        refused = f"; {len(result.rejected)} others are rejected" if result.rejected else ""
        super().__init__(
            "the updates are logged and will be applied, but were not within the time of the call: "
            f"give its tokens to a query to wait for them{refused}"
        )
        self.result = result


def result_to(result: ApplyResult) -> retrieval_pb2.ApplyResponse:
    """Return an outcome as a message."""
    message = retrieval_pb2.ApplyResponse(tokens=tokens_to(result.tokens))
    for one in result.rejected:
        message.rejected.add(
            index=one.index,
            code=code_pb2.Code.Value(one.code),
            reason=one.reason,
            current_version=one.current_version,
        )
    return message


def result_from(message: retrieval_pb2.ApplyResponse) -> ApplyResult:
    """Return the outcome in a message."""
    names = {number: name for name, number in code_pb2.Code.items()}
    return ApplyResult(
        tokens_from(message.tokens),
        tuple(
            UpdateRejection(
                one.index, names.get(one.code, "UNKNOWN"), one.reason, one.current_version
            )
            for one in message.rejected
        ),
    )

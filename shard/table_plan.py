"""Which shard of a remote embedding table holds which row.

Rows are numbered again by a *position*, and shard s holds the positions from ``bounds[s]`` to
``bounds[s + 1]``. Positions are the rows themselves, or a permutation of them that spreads
neighbours over the shards, for tables whose popular rows lie together.

Shapes: n rows asked for, S shards.
"""

import math
from functools import lru_cache
from typing import Literal, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from silvershard.model.request import RequestError
from silvershard.shard.table_rows import Ints, record_bytes

MAX_ROWS = 1 << 31
"""A position times the multiplier of the permutation must stay below 2^62."""

_GOLDEN = (math.sqrt(5) - 1) / 2


class TablePlan(BaseModel):
    """A table and its cut into shards; a pure function of these five fields."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(
        min_length=1, max_length=100, pattern=r"^[A-Za-z0-9_.-]+$", description="of the table"
    )
    num_rows: int = Field(ge=1, le=MAX_ROWS, description="rows of the whole table")
    dim: int = Field(ge=1, le=16384, description="embedding dimension D")
    num_shards: int = Field(ge=1, le=4096, description="shards S that the rows are cut into")
    placement: Literal["contiguous", "hashed"] = Field(
        default="hashed",
        description="contiguous: neighbouring rows lie together; hashed: they are spread evenly",
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.num_shards > self.num_rows:
            raise ValueError(
                f"num_shards must be at most num_rows={self.num_rows}, got {self.num_shards}"
            )
        return self

    @property
    def record_bytes(self) -> int:
        """Return the bytes of a row as it is stored and sent."""
        return record_bytes(self.dim)

    @property
    def bounds(self) -> Ints:
        """Return the first position of every shard and the end of the last one, ``(S + 1,)``."""
        return _bounds(self.num_rows, self.num_shards)

    def span(self, shard: int) -> range:
        """Return the positions that ``shard`` holds.

        Raises:
            RequestError: if there is no such shard.
        """
        if not 0 <= shard < self.num_shards:
            raise RequestError("shard", f"must be from 0 to {self.num_shards - 1}, got {shard}")
        return range(int(self.bounds[shard]), int(self.bounds[shard + 1]))

    def positions(self, rows: Ints) -> Ints:
        """Return the positions ``(n,)`` of rows ``(n,)`` from 0 to ``num_rows - 1``."""
        return (
            rows
            if self.placement == "contiguous"
            else rows * _multiplier(self.num_rows) % self.num_rows
        )

    def rows(self, positions: Ints) -> Ints:
        """Return the rows ``(n,)`` at positions ``(n,)``."""
        if self.placement == "contiguous":
            return positions
        return positions * pow(_multiplier(self.num_rows), -1, self.num_rows) % self.num_rows

    def owners(self, positions: Ints) -> Ints:
        """Return the shard ``(n,)`` of every position ``(n,)``."""
        return self.bounds[1:].searchsorted(positions, side="right")


# Kept beside the plans, not in them, since pydantic compares all attributes of equal models.
@lru_cache(maxsize=256)
def _bounds(num_rows: int, num_shards: int) -> Ints:
    bounds = np.arange(num_shards + 1, dtype=np.int64) * num_rows // num_shards
    bounds.flags.writeable = False
    return bounds


@lru_cache(maxsize=256)
def _multiplier(num_rows: int) -> int:
    """Return the number nearest the golden section of ``num_rows`` that has no factor in common.

    Source: Knuth, The Art of Computer Programming, volume 3, section 6.4 (Fibonacci hashing).
    """
    wanted = max(1, round(num_rows * _GOLDEN))
    offsets = (sign * step for step in range(num_rows + 1) for sign in (1, -1))
    return next(wanted + one for one in offsets if math.gcd(wanted + one, num_rows) == 1)

"""The map of a remote embedding table: which process holds which of its rows.

Whoever runs the table processes writes it, clients poll it and keep their last good one.
"""

from pathlib import Path
from typing import Self

import numpy as np
from pydantic import Field, FiniteFloat, model_validator

from silvershard.cluster.document import Document
from silvershard.cluster.map_file import read_map, write_map
from silvershard.shard.table_plan import TablePlan
from silvershard.shard.table_rows import Floats

_WHAT = "table map"


def map_path(folder: Path, generation: int, table: str) -> Path:
    """Return the file of the map of a table of a generation, in the folder of all maps."""
    return folder / f"gen-{generation:06d}" / f"{table}.json"


class TableEntry(Document):
    """One process that holds one shard of a table."""

    shard: int = Field(ge=0, description="index of the shard")
    address: str = Field(min_length=1, description="host:port of its gRPC server")
    epoch: int = Field(ge=1, description="incarnation; grows with every restart of the shard")
    rows: int = Field(ge=1, description="rows that it holds")
    pid: int = Field(ge=1, description="its process")


class TableShardMap(Document):
    """A table and where its rows are; ``entries`` may lack shards that are down."""

    version: int = Field(ge=1, description="grows with every change")
    plan: TablePlan = Field(description="the table and its cut, the same in every version")
    entries: tuple[TableEntry, ...] = Field(description="processes that serve, in any order")
    default_row: tuple[FiniteFloat, ...] = Field(
        default=(),
        description="values that stand for a row that cannot be had, as many as the table's "
        "dim; none: zeros",
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        seen = set()
        for entry in self.entries:
            if entry.shard >= self.plan.num_shards:
                raise ValueError(f"shard must be below {self.plan.num_shards}, got {entry.shard}")
            if entry.shard in seen:
                raise ValueError(f"shard {entry.shard} is listed twice")
            seen.add(entry.shard)
            held = len(self.plan.span(entry.shard))
            if entry.rows != held:
                raise ValueError(
                    f"rows must be {held} in shard {entry.shard} by the plan, got {entry.rows}"
                )
        if self.default_row and len(self.default_row) != self.plan.dim:
            raise ValueError(
                f"default_row must have {self.plan.dim} values, got {len(self.default_row)}"
            )
        return self

    @property
    def default_values(self) -> Floats:
        """Return the default row ``(D,)``."""
        values = self.default_row or (0.0,) * self.plan.dim
        return np.array(values, dtype=np.float32)

    @classmethod
    def read(cls, path: Path) -> Self:
        """Return the map in the file ``path``.

        Raises:
            StateError: if there is none, or it is damaged.
        """
        return read_map(cls, path, _WHAT)

    def write_atomic(self, path: Path) -> None:
        """Replace the file ``path``; a reader sees the old map or the new one, never a part.

        Raises:
            StateError: if it cannot be written.
        """
        write_map(self, path, _WHAT)

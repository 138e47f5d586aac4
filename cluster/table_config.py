"""Settings of embedding tables: where they lie, and how the remote ones are asked."""

from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator

from silvershard.cluster.config import PingSection
from silvershard.cluster.map_file import read_map, write_map
from silvershard.shard.table_plan import TablePlan

_WHAT = "table holding"


class RemoteTableSection(BaseModel):
    """How the rows of a remote table are asked for and kept."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    deadline_ms: int = Field(
        default=20, ge=1, description="time after which missing rows are replaced by the default"
    )
    cache_mib: int = Field(
        default=64, ge=0, le=1 << 20, description="memory for rows asked for lately; 0: none"
    )
    poll_ms: int = Field(default=100, ge=1, description="time between two looks at the table map")
    ping: PingSection = Field(default=PingSection(), description="how hung shards are noticed")


class TablesSection(BaseModel):
    """Where the embedding tables of a generation lie."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    remote: tuple[str, ...] = Field(
        default=(),
        description="tables of the user tower that `publish` takes out of the model, as int8; "
        "table processes serve their rows",
    )
    shards: int = Field(
        default=2,
        ge=1,
        le=64,
        description="table processes of a generation with remote tables; each holds a part of "
        "every such table",
    )
    deadline_ms: int = Field(
        default=20, ge=1, description="time after which default rows stand for missing remote rows"
    )
    cache_mib: int = Field(
        default=64,
        ge=0,
        le=1 << 20,
        description="memory of a shard for rows of each remote table; 0: none",
    )
    sharding: dict[str, Literal["table", "row", "column"]] = Field(
        default={},
        description="how quantised tables are cut where a shard has several devices, by table; "
        "the planner chooses for others",
    )
    host_budget_mib: int = Field(
        default=0,
        ge=0,
        description="memory of a shard for its quantised tables on several devices; 0: four fifths "
        "of what is free",
    )

    @field_validator("remote")
    @classmethod
    def _check_remote(cls, remote: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(remote)) != len(remote):
            raise ValueError("must name each table once")
        return remote

    def client(self, ping: PingSection) -> RemoteTableSection:
        """Return the settings of a client of these tables."""
        return RemoteTableSection(deadline_ms=self.deadline_ms, cache_mib=self.cache_mib, ping=ping)


class ShardTables(BaseModel):
    """What a shard is told of its embedding tables."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    maps: str = Field(
        default="",
        description="folder of the maps of remote tables, with one folder per generation; empty: "
        "remote tables are loaded with the model",
    )
    client: RemoteTableSection = Field(
        default=RemoteTableSection(), description="how remote tables are asked"
    )
    wait_s: float = Field(
        default=60.0, ge=0, description="longest wait for the maps of remote tables"
    )
    sharding: dict[str, Literal["table", "row", "column"]] = Field(
        default={}, description="how quantised tables are cut over several devices, by table"
    )
    host_bytes: int = Field(
        default=0, ge=0, description="budget of quantised tables; 0: most of what is free"
    )


class TableRows(BaseModel):
    """The rows of one table that table processes hold."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    plan: TablePlan = Field(description="the table and its cut")
    path: str = Field(
        default="", description="safetensors file of the whole table; empty: generated rows"
    )
    seed: int = Field(default=0, description="of generated rows")


class TableHolding(BaseModel):
    """What the table processes of one set of rows hold; every incarnation reads it anew."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tables: tuple[TableRows, ...] = Field(description="of which each process holds a part")
    log_url: str = Field(default="", description="update log to follow; empty: none")
    log_id: int = Field(default=0, ge=0, description="log that the cut is of; 0: of none")
    cut: tuple[int, ...] = Field(
        default=(), description="positions up to which changes are in the rows; empty: none are"
    )

    @classmethod
    def read(cls, path: Path) -> Self:
        """Return the holding in the file ``path``.

        Raises:
            StateError: if there is none, or it is damaged.
        """
        return read_map(cls, path, _WHAT)

    def write_atomic(self, path: Path) -> None:
        """Replace the file ``path``.

        Raises:
            StateError: if it cannot be written.
        """
        write_map(self, path, _WHAT)

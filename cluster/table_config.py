"""Settings of embedding tables: where they lie, and how the remote ones are asked."""

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from silvershard.cluster.config import PingSection


class RemoteTableSection(BaseModel):
    """How the rows of a remote table are asked for and kept."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    deadline_ms: int = Field(
        default=20, ge=1, description="time after which missing rows are replaced by the default"
    )
    cache_mib: int = Field(
        default=64, ge=0, le=1 << 20, description="memory for rows asked for lately; 0: none"
    )
    max_stale_ms: int = Field(
        default=1000,
        ge=1,
        description="how far a row in the cache may be behind its shard; when the shard was not "
        "heard of for so long, the row is asked for again",
    )
    poll_ms: int = Field(default=100, ge=1, description="time between two looks at the table map")
    ping: PingSection = Field(
        default=PingSection(), description="how changes and hung shards are noticed"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.max_stale_ms < 2 * self.ping.every_ms:
            raise ValueError(
                f"max_stale_ms must be at least twice ping.every_ms={self.ping.every_ms}, "
                f"got {self.max_stale_ms}"
            )
        return self


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
    max_stale_ms: int = Field(
        default=1000,
        ge=1,
        description="how far a cached remote row may be behind its table process; at least twice "
        "ping.every_ms",
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
        """Return the settings of a client of these tables.

        Raises:
            ValueError: if rows may be less behind than beats are apart.
        """
        return RemoteTableSection(
            deadline_ms=self.deadline_ms,
            cache_mib=self.cache_mib,
            max_stale_ms=self.max_stale_ms,
            ping=ping,
        )


class ShardTables(BaseModel):
    """What a shard is told of its embedding tables."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    maps: dict[str, str] = Field(default={}, description="file of the map of each remote table")
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

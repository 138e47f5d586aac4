"""Settings of the clients of remote embedding tables."""

from typing import Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

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

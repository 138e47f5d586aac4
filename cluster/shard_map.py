"""The shard map: which process serves which shard of which generation, as one small file.

The launcher writes it, routers poll it. A router keeps its last good map, so it goes on serving
without the launcher, and takes no older one of the same start of the cluster.
"""

from pathlib import Path
from typing import Self

from pydantic import Field, model_validator

from silvershard.cluster.document import Document
from silvershard.cluster.map_file import read_map, write_map

LIVE = "live"
"""The alias of the generation that answers whoever names none."""


class ShardEntry(Document):
    """One process that serves one shard."""

    shard: int = Field(ge=0, description="index of the shard")
    replica: int = Field(ge=0, description="index of the copy of the shard")
    address: str = Field(min_length=1, description="host:port of its gRPC server")
    epoch: int = Field(ge=1, description="incarnation; grows with every restart of the replica")
    documents: int = Field(ge=0, description="items that it serves")
    pid: int = Field(ge=1, description="its process")
    release: str = Field(default="", description="release of silvershard that it runs")
    wire: int = Field(
        default=0, ge=0, description="version of what it says to routers; 0: it has not said"
    )
    relieves: int = Field(
        default=0,
        ge=0,
        description="epoch of the incarnation that it relieves in order, and that may still answer "
        "what it was asked; 0: none",
    )


class ShardMap(Document):
    """What is served, and where; ``entries`` may lack shards that are down.

    The processes may hold further generations beside the live one, for rollback, canaries and pins.
    """

    version: int = Field(ge=1, description="grows with every change")
    origin: str = Field(
        default="", description="start of the cluster within which versions grow; empty: the only"
    )
    generation: int = Field(ge=1, description="the live one, which all entries serve")
    snapshot: str = Field(min_length=1, description="directory of that generation")
    num_shards: int = Field(ge=1, description="shards S that the catalogue is cut into")
    entries: tuple[ShardEntry, ...] = Field(description="processes that serve, in any order")
    snapshots: dict[int, str] = Field(
        default_factory=dict,
        description="directories of further generations that the entries hold, by number",
    )
    aliases: dict[str, int] = Field(
        default_factory=dict,
        description="names of generations beside `live`, which is always the one above",
    )
    sequencer: str = Field(default="", description="host:port that takes updates; empty: none")
    log_url: str = Field(default="", description="update log that the entries follow; empty: none")
    log_partitions: int = Field(default=1, ge=1, description="partitions L of that log")

    @property
    def hosted(self) -> dict[int, str]:
        """Return the directory of every generation that can be asked for."""
        return {**self.snapshots, self.generation: self.snapshot}

    @model_validator(mode="after")
    def _check(self) -> Self:
        for alias, generation in self.aliases.items():
            if generation not in self.hosted:
                raise ValueError(
                    f"alias {alias} must name a generation of {sorted(self.hosted)}, "
                    f"got {generation}"
                )
        if self.aliases.get(LIVE, self.generation) != self.generation:
            raise ValueError(
                f"alias {LIVE} must be generation {self.generation}, got {self.aliases[LIVE]}"
            )
        seen = set()
        for entry in self.entries:
            if entry.shard >= self.num_shards:
                raise ValueError(f"shard must be below {self.num_shards}, got {entry.shard}")
            if (entry.shard, entry.replica) in seen:
                raise ValueError(f"shard {entry.shard} replica {entry.replica} is listed twice")
            seen.add((entry.shard, entry.replica))
        return self

    def replicas(self, shard: int) -> list[ShardEntry]:
        """Return the processes that serve ``shard``, by replica."""
        found = [entry for entry in self.entries if entry.shard == shard]
        return sorted(found, key=lambda entry: entry.replica)

    @classmethod
    def read(cls, path: Path) -> Self:
        """Return the map in the file ``path``.

        Raises:
            StateError: if there is none, or it is damaged.
        """
        return read_map(cls, path, "shard map")

    def write_atomic(self, path: Path) -> None:
        """Replace the file ``path``; a reader sees the old map or the new one, never a part.

        Raises:
            StateError: if it cannot be written.
        """
        write_map(self, path, "shard map")

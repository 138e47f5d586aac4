"""How large a cluster shall be: by its settings, or as `scale` left it.

What was scaled last is in the control store, and stays in force through a restart for as long as
the settings say what they said then; a person who changes them afterwards is obeyed.
"""

from pydantic import Field

from silvershard.cluster.document import Document
from silvershard.deploy.config import Config
from silvershard.deploy.config_sections import ShardingSection

SIZE_LIMITS = {"shards": (1, 1 << 20), "replicas": (1, 16), "standby": (0, 4)}
"""The least and the most; of shards there are at most as many as partitions, too."""


class ClusterSize(Document):
    """How many processes a cluster consists of."""

    shards: int = Field(ge=1, description="parts that the catalogue is cut into")
    replicas: int = Field(ge=1, le=16, description="shard processes of each part that are asked")
    standby: int = Field(default=0, ge=0, le=4, description="further ones, kept warm")

    @property
    def copies(self) -> int:
        """Return the processes of each part."""
        return self.replicas + self.standby

    def __str__(self) -> str:
        """Return it for people."""
        parts = [
            f"{self.shards} shard{'s' * (self.shards > 1)}",
            f"{self.replicas} replica{'s' * (self.replicas > 1)}",
        ]
        if self.standby:
            parts.append(f"{self.standby} standby")
        return " x ".join(parts)


class Scaled(Document):
    """What `scale` did last."""

    size: ClusterSize = Field(description="how large the cluster shall be")
    instead_of: ClusterSize = Field(description="what the settings said when it was scaled")


def size_of(config: Config) -> ClusterSize:
    """Return the size that settings ask for."""
    return size_from(config.sharding)


def size_from(sharding: ShardingSection) -> ClusterSize:
    """Return the size that a section asks for."""
    return ClusterSize(shards=sharding.shards, replicas=sharding.replicas, standby=sharding.standby)


def sharding_of(sharding: ShardingSection, size: ClusterSize) -> ShardingSection:
    """Return a section with other numbers."""
    return sharding.model_copy(update=size.model_dump())


def resized(config: Config, size: ClusterSize) -> Config:
    """Return settings with other numbers."""
    return config.model_copy(update={"sharding": sharding_of(config.sharding, size)})


def in_force(config: Config, scaled: Scaled | None) -> Config:
    """Return settings as a cluster starts with them.

    Args:
        config: as a person wrote them.
        scaled: what `scale` did last; None: nothing.
    """
    if scaled is None or scaled.instead_of != size_of(config):
        return config
    return resized(config, scaled.size)

"""The sections of the configuration that belong to deployment."""

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from silvershard.model.limits import MAX_ANN_K
from silvershard.model.semantic_config import MAX_SEMANTIC_K


class PathsSection(BaseModel):
    """Where data come from."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    data: str = Field(
        default="",
        description="folder or zip of a MovieLens data set; empty: $SILVERSHARD_DATA, else a "
        "download, else generated films",
    )
    cache: str = Field(
        default="", description="folder for downloads; empty: $XDG_CACHE_HOME or ~/.cache"
    )
    max_malformed: int = Field(
        default=10,
        ge=0,
        description="unreadable rows of ratings.csv that are dropped, and said so, before it is an "
        "error",
    )


class ModelSection(BaseModel):
    """What is trained."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(
        default="movielens", min_length=1, description="logical model name that requests can give"
    )
    seed: int = Field(default=17, ge=0, description="seed of training, clustering and hashing")
    checkpoint_every: int = Field(
        default=100, ge=1, description="training steps between checkpoints, which --resume needs"
    )


class IndexSection(BaseModel):
    """How a generation is indexed when it is published."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    clusters: int = Field(
        default=0,
        ge=0,
        description="clusters of the index; 0: a power of two near 2.6 root of the items",
    )
    probe_share: float = Field(
        default=0.125, gt=0, le=1, description="share of the clusters probed by default"
    )
    ann_k: int = Field(
        default=600,
        ge=1,
        le=MAX_ANN_K,
        description="candidates per head that pass the scan cut by default",
    )
    semantic_k: int = Field(
        default=200,
        ge=0,
        le=MAX_SEMANTIC_K,
        description="candidates of the decoder of semantic ids by default, where training.semantic "
        "made one",
    )
    page_slots: Literal[64, 128] = Field(default=64, description="slots of a page")
    planned_shards: int = Field(
        default=8, ge=1, description="most shards to cut a generation into without republishing"
    )
    table_precision: Literal["float32", "int8", "int4"] = Field(
        default="float32", description="of the embedding tables of a published generation"
    )
    false_positive_rate: float = Field(
        default=0.001, ge=1e-9, lt=1, description="target of one Bloom term, before verification"
    )
    golden_requests: int = Field(
        default=24,
        ge=0,
        le=10_000,
        description="requests whose answers a publish writes, and checks on what it wrote; 0: none",
    )
    recall_requests: int = Field(
        default=48,
        ge=0,
        le=10_000,
        description="requests on which a publish measures what plans find of exact answers, for "
        "the `expected_recall` of answers; 0: they have none",
    )


class ShardingSection(BaseModel):
    """How a generation is served: by shards times replicas processes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    shards: int = Field(default=2, ge=1, description="parts that the catalogue is cut into")
    replicas: int = Field(default=1, ge=1, le=16, description="shard processes of each part")
    standby: int = Field(
        default=0,
        ge=0,
        le=4,
        description="further processes of each part, kept warm to take the place of one that ends",
    )
    devices: tuple[str, ...] = Field(
        default=("cpu",), min_length=1, description="local devices of each shard"
    )
    threads: int = Field(
        default=0, ge=0, description="threads of each shard process; 0: cores divided by processes"
    )

    @property
    def copies(self) -> int:
        """Return the processes of each part, those that are asked and those kept warm."""
        return self.replicas + self.standby

    @field_validator("devices")
    @classmethod
    def _check_devices(cls, devices: tuple[str, ...]) -> tuple[str, ...]:
        for device in devices:
            if device != "cpu":
                raise ValueError(f"this version serves on cpu only, got {device!r}")
        return devices


class PlacementSection(BaseModel):
    """Where copies may lie."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    spread: Literal["host", "zone"] = Field(
        default="host", description="what no two copies of a shard share where that is possible"
    )
    labels: dict[str, str] = Field(
        default_factory=dict, description="labels that a host must have to get copies"
    )


class ReplicasSection(BaseModel):
    """How the copies of a shard are spread over the machines."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    placement: PlacementSection = Field(
        default=PlacementSection(),
        description="`spread`: host or zone, which no two copies of a shard share where that is "
        "possible; `labels`: what a host must have to get copies",
    )
    replace_after_s: float = Field(
        default=600.0,
        ge=0,
        allow_inf_nan=False,
        description="time after which the copies of one of several hosts that Ray has lost are "
        "started on the others; 0: never",
    )


class AdminSection(BaseModel):
    """Where operators and their programs reach the admin plane."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    enabled: bool = Field(default=True, description="serve the admin plane")
    host: str = Field(
        default="127.0.0.1",
        min_length=1,
        description="address to bind; another than loopback needs security.tls and "
        "security.tokens, or security.insecure",
    )
    port: int = Field(
        default=0,
        ge=0,
        le=65535,
        description="gRPC port of the admin plane; 0: any free one, which `status` shows",
    )


class ControlSection(BaseModel):
    """Where it is written down what a cluster shall serve."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    store: str = Field(
        default="",
        pattern=r"^$|^rediss?://",
        description="control store: `redis://host:port/db?prefix=name`, to which `up` moves what "
        "is in the old one; empty: where it is, at first a file in the state directory",
    )


class ChaosSection(BaseModel):
    """Whether faults may be injected."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    enabled: bool = Field(
        default=False,
        description="let `silvershard chaos` and the admin plane inject faults into this cluster",
    )


class RuntimeSection(BaseModel):
    """How the processes of a cluster are started, watched and stopped."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    object_store_bytes: int = Field(
        default=80 << 20, ge=75 << 20, description="shared memory of the embedded Ray"
    )
    routers: int = Field(
        default=1,
        ge=1,
        le=64,
        description="router processes of a single machine; they share `listen.port`, and each "
        "further one has probes and metrics at the port above",
    )
    start_timeout_s: float = Field(
        default=120.0, gt=0, description="longest start of a cluster before `up` gives up"
    )
    stop_timeout_s: float = Field(
        default=20.0, gt=0, description="longest orderly end before processes are killed"
    )
    drain_s: float = Field(
        default=5.0, ge=0, description="longest wait of a stopping router for requests in flight"
    )
    crash_limit: int = Field(
        default=5, ge=1, description="quick deaths in a row after which a process is given up"
    )
    crash_window_s: float = Field(
        default=60.0, gt=0, description="a death sooner than this after the start is quick"
    )
    hang_s: float = Field(
        default=10.0,
        ge=1,
        description="a process that has answered no health check for so long is killed",
    )


class UpdatesSection(BaseModel):
    """How items change while they are served."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    enabled: bool = Field(
        default=True, description="start a sequencer and let shards follow the update log"
    )
    log: str = Field(
        default="",
        pattern=r"^$|^(sqlite|redis)://",
        description="update log: `sqlite:///path` or `redis://host:port/db?prefix=name`; empty: a "
        "SQLite file in the state directory",
    )
    partitions: int = Field(
        default=1, ge=1, le=64, description="partitions of a log that is made, a power of two"
    )
    max_batch: int = Field(
        default=1024,
        ge=1,
        le=65536,
        description="updates that a shard applies at once at most, while queries wait",
    )
    headroom: float = Field(
        default=0.1,
        gt=0,
        le=10,
        description="free pages of a shard for new items, as a share of the pages in use at start",
    )
    feed_block: float = Field(
        default=0.95,
        gt=0,
        le=1,
        description="share of the item slots of any shard in use from which upserts are refused",
    )
    feed_block_hysteresis: float = Field(
        default=0.02,
        ge=0,
        lt=1,
        description="how far below feed_block the use must fall for upserts to pass again",
    )
    expiry_every_ms: int = Field(
        default=1000, ge=10, description="time between two looks for items whose ttl is over"
    )

    @field_validator("partitions")
    @classmethod
    def _check_partitions(cls, partitions: int) -> int:
        if partitions & (partitions - 1):
            raise ValueError(f"must be a power of two, got {partitions}")
        return partitions

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.feed_block_hysteresis >= self.feed_block:
            raise ValueError(
                f"updates.feed_block_hysteresis must be below updates.feed_block, "
                f"{self.feed_block}, got {self.feed_block_hysteresis}"
            )
        return self


class SwapSection(BaseModel):
    """How one generation takes over from another."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    timeout_s: float = Field(
        default=900.0,
        gt=0,
        description="longest time until every shard process has a generation prepared",
    )
    drain_ms: int = Field(
        default=10_000,
        ge=0,
        description="time from the swap until the old generation may be given up",
    )
    keep_previous: bool = Field(
        default=True,
        description="keep the old generation in memory after a swap, following the log, so that "
        "`rollback` takes seconds",
    )
    memory_mib: int = Field(
        default=0,
        ge=0,
        description="memory that all shard processes may take; 0: what the machine has",
    )
    max_recall_loss: float = Field(
        default=0.1,
        ge=0,
        le=1,
        description="by how much the recall of the index of a new generation may be below that of "
        "the live one",
    )

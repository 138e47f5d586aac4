"""Settings of the processes of a cluster; deploy joins them with those of the other folders."""

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from silvershard.cluster.http_address import split_address
from silvershard.cluster.security_config import SecuritySection

MEBIBYTE = 1 << 20


class ListenSection(BaseModel):
    """Where a router takes requests."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    host: str = Field(default="127.0.0.1", min_length=1, description="address to bind")
    port: int = Field(
        default=8001, ge=0, le=65535, description="gRPC port; 0 lets the system choose a free one"
    )


class OtelSection(BaseModel):
    """Which requests a collector of OpenTelemetry traces is told of."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    endpoint: str = Field(
        default="",
        pattern=r"^$|^https?://[^/\s]+$",
        description="collector that takes OTLP over gRPC, `http://host:4317` or with TLS "
        "`https://host:4317`; empty: nothing is told; needs the extra `otel`",
    )
    sample: float = Field(
        default=0.001, ge=0, le=1, description="share of the requests that is told in any case"
    )
    always: tuple[Literal["degraded", "error", "slow"], ...] = Field(
        default=("degraded", "error", "slow"), description="requests that are always told"
    )
    slow_ms: int = Field(default=100, ge=1, description="from when a request counts as slow")


class RecallAuditSection(BaseModel):
    """Which answers a router searches again in all clusters, to know its recall."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sample: float = Field(default=0.001, ge=0, le=1, description="share of the answers; 0: none")
    k: int = Field(default=100, ge=1, le=10_000, description="most results that are compared")
    share: float = Field(
        default=0.02, gt=0, le=1, description="share of the time in which an audit may run"
    )


class ObservabilitySection(BaseModel):
    """Where a router answers probes and shows its metrics."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    http: str = Field(
        default="127.0.0.1:8002",
        description="host:port of /livez, /readyz, /healthz, /version and /metrics; empty: no "
        "HTTP; where listen.port is 0 this port is any free one too, which `status` shows",
    )
    insecure: bool = Field(
        default=False,
        description="allow an address other than loopback although it asks nobody who they are",
    )

    otel: OtelSection = Field(
        default=OtelSection(),
        description="traces: `endpoint`, `sample`, `always`, `slow_ms`",
    )
    recall_audit: RecallAuditSection = Field(
        default=RecallAuditSection(),
        description="answers that are searched again in all clusters: `sample`, `k`, `share`",
    )

    @field_validator("http")
    @classmethod
    def _check_http(cls, http: str) -> str:
        if http:
            split_address(http)
        return http


class PingSection(BaseModel):
    """How a router notices that a shard hangs."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    every_ms: int = Field(default=100, ge=1, description="time between two pings of a replica")
    suspect_after: int = Field(
        default=2, ge=1, description="unanswered pings after which other replicas are preferred"
    )
    eject_after: int = Field(
        default=5,
        ge=1,
        description="unanswered pings after which a replica is asked only if there is no other",
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.eject_after < self.suspect_after:
            raise ValueError(
                f"eject_after must be at least suspect_after={self.suspect_after}, "
                f"got {self.eject_after}"
            )
        return self


class HealthSection(BaseModel):
    """How replicas that answer badly are kept from requests."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_ejected: float = Field(
        default=0.34,
        ge=0,
        le=1,
        description="share of the replicas of a shard that may be ejected; of more bad ones than "
        "that, the least bad are asked",
    )


class HedgingSection(BaseModel):
    """When a second replica is asked because the first is slow."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    enabled: bool = Field(
        default=True, description="ask a second replica when the first takes unusually long"
    )
    after: Literal["p90", "p95", "p99"] = Field(
        default="p95",
        description="latency of the shard after which its second replica is asked, at least 2 ms",
    )
    budget: float = Field(
        default=0.05,
        ge=0,
        le=1,
        description="share of the calls to shards that may be hedged; a replica that gives no sign "
        "of life is hedged beyond it",
    )


class RetriesSection(BaseModel):
    """How often a failed call is sent to another replica."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_attempts: int = Field(
        default=2, ge=1, description="replicas of a shard that are asked one after the other"
    )
    budget: float = Field(
        default=0.1, ge=0, le=1, description="share of the calls to shards that may be retried"
    )


class QuerySection(BaseModel):
    """How requests are limited, batched and given up."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    default_deadline_ms: int = Field(
        default=2000, ge=1, description="time limit of a request that sets none"
    )
    deadline_max_ms: int = Field(
        default=10_000, ge=1, description="longest time limit; a longer one is cut to it"
    )
    min_coverage: float = Field(
        default=0.9,
        ge=0,
        le=1,
        description="share of the documents that must answer, where the request does not say",
    )
    merge_headroom_ms: int = Field(
        default=3, ge=0, description="time kept back from the shards for merging and answering"
    )
    max_batch: int = Field(default=64, ge=1, description="requests that run as one batch")
    max_delay_us: int = Field(
        default=500, ge=0, description="longest wait of a request for others to share its batch"
    )
    lagging_ms: int = Field(
        default=10_000,
        ge=0,
        description="how far a shard may be behind the update log before answers say "
        "UPDATES_LAGGING",
    )
    max_request_bytes: int = Field(
        default=4 * MEBIBYTE, ge=1024, description="largest message that a router accepts"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.default_deadline_ms > self.deadline_max_ms:
            raise ValueError(
                f"default_deadline_ms must be at most deadline_max_ms={self.deadline_max_ms}, "
                f"got {self.default_deadline_ms}"
            )
        return self


class ConcurrencySection(BaseModel):
    """How many batches a router runs at the same time."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    mode: Literal["adaptive", "fixed"] = Field(
        default="adaptive",
        description="adaptive: between min and max, by how the latency of a batch compares with "
        "its own minimum; fixed: max",
    )
    min: int = Field(default=4, ge=1, description="least batches")
    max: int = Field(default=64, ge=1, description="most batches")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.max < self.min:
            raise ValueError(f"max must be at least min={self.min}, got {self.max}")
        return self


class TenantSection(BaseModel):
    """What a tenant may ask of a router."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    qps: float = Field(
        gt=0, description="requests per second; as many as of one second may come at once"
    )
    priority: int = Field(default=0, description="added to the priority of each of its requests")


class AdmissionSection(BaseModel):
    """Which requests wait, run and are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    queue: int = Field(
        default=256,
        ge=1,
        description="requests that may wait, and so the most in one RetrieveBatch; beyond them the "
        "lowest priority is refused first, with a delay",
    )
    concurrency: ConcurrencySection = Field(
        default=ConcurrencySection(),
        description="batches that run at the same time: mode (`adaptive` or `fixed`), min, max",
    )
    hot: float = Field(
        default=0.8,
        gt=0,
        le=1,
        description="load, as a share of the batches that may run, above which a router neither "
        "hedges nor retries",
    )
    tenants: dict[str, TenantSection] = Field(
        default_factory=dict,
        max_length=1000,
        description="limits by tenant: qps, and a priority that is added to that of its requests; "
        "`default` is shared by all that are not named, who have no limit without it",
    )


class DegradeFloors(BaseModel):
    """What overload leaves of a request at least."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    nprobe: int = Field(
        default=8,
        ge=1,
        description="clusters per head; more by as much as a selective filter asks for more",
    )
    ann_k: int = Field(default=200, ge=1, description="candidates per head")
    required_tasks: tuple[str, ...] = Field(
        default=(), description="tasks that keep the reranker from being skipped"
    )


class DegradeTrigger(BaseModel):
    """When a router spends less on each request, and when it no longer does."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    queue_delay_ms: float = Field(
        default=5.0, gt=0, description="age of the oldest request that waits"
    )
    recover_after_ms: int = Field(
        default=5000, ge=1, description="time without such a delay until a step is taken back"
    )


class DegradeSection(BaseModel):
    """What is left out of requests under overload, before any are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    ladder: tuple[Literal["nprobe", "ann_k", "tasks"], ...] = Field(
        default=("nprobe", "ann_k", "tasks"),
        description="steps in their order; none: requests are refused instead",
    )
    floors: DegradeFloors = Field(
        default=DegradeFloors(),
        description="what is left at least: nprobe, ann_k, required_tasks",
    )
    trigger: DegradeTrigger = Field(
        default=DegradeTrigger(),
        description="queue_delay_ms: age of the oldest request that waits; once it was above for "
        "0.1 s, the newest goes first and a step is taken; recover_after_ms: time without that "
        "until one is taken back",
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len(set(self.ladder)) < len(self.ladder):
            raise ValueError(f"ladder must name each step once, got {', '.join(self.ladder)}")
        return self


class RouterConfig(BaseModel):
    """What a router process needs; written by the launcher, read from its ``--config`` file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    map_path: str = Field(min_length=1, description="shard map file that the launcher keeps true")
    faults_dir: str = Field(
        default="", description="where faults of its links are written down; empty: there are none"
    )
    poll_ms: int = Field(default=100, ge=1, description="time between two looks at the shard map")
    drain_s: float = Field(
        default=10.0, ge=0, description="longest wait for requests in flight on SIGTERM"
    )
    num_threads: int = Field(default=1, ge=1, description="threads of each tensor operation")
    listen: ListenSection = Field(default=ListenSection(), description="where requests come in")
    shared: bool = Field(
        default=False,
        description="other routers of this machine share its ports; it alone answers health checks "
        "at a further one",
    )
    security: SecuritySection = Field(
        default=SecuritySection(), description="who may ask, and how the shards are reached"
    )
    query: QuerySection = Field(default=QuerySection(), description="limits of requests")
    ping: PingSection = Field(default=PingSection(), description="detection of hung shards")
    health: HealthSection = Field(
        default=HealthSection(), description="ejection of replicas that answer badly"
    )
    hedging: HedgingSection = Field(
        default=HedgingSection(), description="second calls where the first is slow"
    )
    retries: RetriesSection = Field(
        default=RetriesSection(), description="second calls where the first failed"
    )
    observability: ObservabilitySection = Field(
        default=ObservabilitySection(http=""), description="probes and metrics; by default none"
    )
    admission: AdmissionSection = Field(
        default=AdmissionSection(), description="which requests wait, run and are refused"
    )
    degrade: DegradeSection = Field(
        default=DegradeSection(), description="what is left out of requests under overload"
    )

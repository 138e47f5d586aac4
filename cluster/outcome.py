"""How much of the catalogue an answer covers, and the errors of covering too little."""

from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Self

from silvershard.shard.errors import CoverageError, DeadlineExceeded


class DegradeReason(StrEnum):
    """Why an answer is not what it would be with everything in reach; names as on the wire."""

    SHARD_UNAVAILABLE = "SHARD_UNAVAILABLE"
    SHARD_TIMEOUT = "SHARD_TIMEOUT"
    SHARD_OVERLOADED = "SHARD_OVERLOADED"
    VERSION_MISMATCH_DROPPED = "VERSION_MISMATCH_DROPPED"
    STALE_REPLICA_DROPPED = "STALE_REPLICA_DROPPED"
    """It had not applied what the request demands."""
    UPDATES_LAGGING = "UPDATES_LAGGING"
    """A shard answered that is far behind the update log."""
    NPROBE_REDUCED = "NPROBE_REDUCED"
    """Overload: fewer clusters were probed than the request would get otherwise."""
    RERANK_DEPTH_REDUCED = "RERANK_DEPTH_REDUCED"
    """Overload: fewer candidates were kept and reranked."""
    TASKS_SKIPPED = "TASKS_SKIPPED"
    """Overload: probabilities of tasks are missing that the request wanted to be told."""
    EMBEDDING_FALLBACK = "EMBEDDING_FALLBACK"
    """Default rows stood for rows of a remote table that could not be had in time."""


@dataclass(frozen=True)
class ShardOutcome:
    """How a shard that is missing from an answer failed."""

    shard: int
    replica: str
    """Index of the last replica that was asked; empty when there was none to ask."""
    code: str
    """Name of the gRPC status."""
    reasons: tuple[str, ...]
    documents: int
    """Items that this shard serves and that the answer therefore lacks."""
    latency_us: int
    attempts: int
    """Replicas that were asked, one after the other or side by side."""
    hedged: bool = False
    """Whether one of them was asked because another was slow."""


@dataclass(frozen=True)
class Coverage:
    """How much of the catalogue an answer covers."""

    documents: float
    """Documents whose shard answered / documents addressed, 0..1; exactly 1.0 if all answered."""
    shards_total: int
    shards_full: int
    shards_failed: int
    reasons: tuple[str, ...] = ()
    """Names of ``DegradeReason``, each once, sorted."""
    shards: tuple[ShardOutcome, ...] = ()
    """The shards that did not answer, by index."""
    expected_recall: float | None = None
    """Share of an exact search's answer that is expected in this one, 0..1; None: unknown."""

    @property
    def degraded(self) -> bool:
        """Return True when there is a reason for which the answer is not what it should be."""
        return bool(self.reasons)

    def because(self, reason: DegradeReason) -> Self:
        """Return the same coverage with another reason."""
        return replace(self, reasons=tuple(sorted({*self.reasons, reason.value})))


class CoverageLost(CoverageError):
    """Too few documents answered, and no replica is left to ask."""

    def __init__(self, coverage: Coverage, minimum: float) -> None:
        super().__init__(coverage.documents, minimum)
        if not coverage.shards_full:
            self.args = ("no shard answered",)
        self.coverage = coverage


class CoverageTimedOut(DeadlineExceeded):
    """Time ran out before enough documents had answered."""

    def __init__(self, coverage: Coverage, minimum: float) -> None:
        answered = f"{coverage.documents:.4f} of the documents had answered"
        super().__init__(
            f"time ran out when {answered if coverage.shards_full else 'no shard had answered'}, "
            f"at least {minimum:.4f} are required"
        )
        self.coverage = coverage
        self.minimum = minimum

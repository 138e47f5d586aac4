"""How much of the catalogue an answer covers, and the errors of covering too little."""

from dataclasses import dataclass
from enum import StrEnum

from silvershard.shard.errors import CoverageError, DeadlineExceeded


class DegradeReason(StrEnum):
    """Why an answer does not cover everything; names as on the wire."""

    SHARD_UNAVAILABLE = "SHARD_UNAVAILABLE"
    SHARD_TIMEOUT = "SHARD_TIMEOUT"
    SHARD_OVERLOADED = "SHARD_OVERLOADED"
    VERSION_MISMATCH_DROPPED = "VERSION_MISMATCH_DROPPED"


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

    @property
    def degraded(self) -> bool:
        """Return True when some shard did not answer."""
        return bool(self.reasons)


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

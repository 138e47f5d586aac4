"""The public messages as Python values, and the one table that maps errors to gRPC statuses.

Shapes: K results.
"""

import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import numpy as np
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import Message
from google.rpc import code_pb2, error_details_pb2, status_pb2

from silvershard.cluster import retrieval_pb2
from silvershard.cluster.outcome import (
    Coverage,
    CoverageLost,
    CoverageTimedOut,
    ShardOutcome,
)
from silvershard.cluster.updates import ApplyResult, LoggedNotApplied, result_from, result_to
from silvershard.model.counts import Counts
from silvershard.model.dtypes import INT64_MAX, INT64_MIN
from silvershard.model.request import (
    FeatureValues,
    FilterMode,
    FilterParam,
    Request,
    RequestError,
    WeightedIds,
)
from silvershard.shard.errors import (
    CandidatesExpired,
    ConfigError,
    CoverageError,
    DeadlineExceeded,
    Fenced,
    GenerationError,
    LogDamaged,
    LogMissing,
    LogTrimmed,
    LogUnavailable,
    MutationError,
    Overloaded,
    PoolExhausted,
    RemoteError,
    ReplicaStale,
    RepositoryError,
    RetrievalError,
    ShardUnavailable,
    SnapshotError,
    StateError,
    UpdatesUnsupported,
)

DOMAIN = "silvershard"

_MAX_TEXT = 600
_MAX_REJECTED = 10
_RETRY_AFTER_S = 1.0
"""When to try again what was refused for want of room by one that cannot tell for how long."""


class StatusRow(NamedTuple):
    """How one class of error looks on the wire."""

    code: str
    """Name of the ``google.rpc.Code``."""
    reason: str
    """``ErrorInfo.reason``."""


# A class that is not listed has the row of its nearest listed base.
STATUSES: Mapping[type[Exception], StatusRow] = {
    RequestError: StatusRow("INVALID_ARGUMENT", "INVALID_REQUEST"),
    MutationError: StatusRow("INVALID_ARGUMENT", "INVALID_UPDATE"),
    SnapshotError: StatusRow("DATA_LOSS", "SNAPSHOT_DAMAGED"),
    RepositoryError: StatusRow("UNAVAILABLE", "REPOSITORY_UNAVAILABLE"),
    GenerationError: StatusRow("FAILED_PRECONDITION", "VERSION_MISMATCH"),
    ReplicaStale: StatusRow("FAILED_PRECONDITION", "REPLICA_STALE"),
    CandidatesExpired: StatusRow("ABORTED", "CANDIDATES_EXPIRED"),
    ShardUnavailable: StatusRow("UNAVAILABLE", "SHARD_UNAVAILABLE"),
    LoggedNotApplied: StatusRow("DEADLINE_EXCEEDED", "LOGGED_NOT_APPLIED"),
    DeadlineExceeded: StatusRow("DEADLINE_EXCEEDED", "DEADLINE_EXCEEDED"),
    CoverageError: StatusRow("UNAVAILABLE", "COVERAGE_TOO_LOW"),
    Overloaded: StatusRow("RESOURCE_EXHAUSTED", "OVERLOADED"),
    ConfigError: StatusRow("FAILED_PRECONDITION", "CONFIG_REFUSED"),
    LogMissing: StatusRow("UNAVAILABLE", "LOG_MISSING"),
    LogUnavailable: StatusRow("UNAVAILABLE", "LOG_UNAVAILABLE"),
    LogDamaged: StatusRow("DATA_LOSS", "LOG_DAMAGED"),
    LogTrimmed: StatusRow("FAILED_PRECONDITION", "LOG_TRIMMED"),
    Fenced: StatusRow("UNAVAILABLE", "FENCED"),
    StateError: StatusRow("FAILED_PRECONDITION", "STATE_REFUSED"),
    PoolExhausted: StatusRow("RESOURCE_EXHAUSTED", "POOL_EXHAUSTED"),
    UpdatesUnsupported: StatusRow("FAILED_PRECONDITION", "UPDATES_UNSUPPORTED"),
    RemoteError: StatusRow("UNKNOWN", "REFUSED"),
    RetrievalError: StatusRow("INTERNAL", "INTERNAL"),
}


class Refusal(RemoteError):
    """A request that a router refuses for what it addresses, with its own status."""

    def __init__(self, code: str, message: str, reason: str) -> None:
        super().__init__(code, message)
        self.reason = reason


class FieldViolation(NamedTuple):
    """What is wrong with one field of a request."""

    field: str
    description: str


class RequestRefused(RemoteError):
    """A request that the cluster did not answer, as its client sees it."""

    def __init__(
        self,
        code: str,
        message: str,
        *,
        reason: str = "",
        violations: Sequence[FieldViolation] = (),
        coverage: Coverage | None = None,
        retry_after_s: float | None = None,
        logged: ApplyResult | None = None,
    ) -> None:
        super().__init__(code, message)
        self.logged = logged
        self.reason = reason
        self.violations = tuple(violations)
        self.coverage = coverage
        self.retry_after_s = retry_after_s


def status_row(error: Exception) -> StatusRow | None:
    """Return how an error looks on the wire; None for one that only a bug can cause."""
    if isinstance(error, Refusal):
        return StatusRow(error.code, error.reason)
    if isinstance(error, RemoteError):
        return StatusRow(error.code, STATUSES[RemoteError].reason)
    for kind in type(error).__mro__:
        if kind in STATUSES:
            return STATUSES[kind]
    return None


def code_number(code: str) -> int:
    """Return the number of a status name."""
    return int(code_pb2.Code.Value(code))


def code_name(number: int) -> str:
    """Return the name of a status number; UNKNOWN for one that does not exist."""
    return code_pb2.Code.Name(number) if number in code_pb2.Code.values() else "UNKNOWN"


def _packed(detail: Message) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(detail)
    return packed


def _short(text: str) -> str:
    """Return a text that fits the metadata of a call, which carries its status twice."""
    return text if len(text) <= _MAX_TEXT else text[: _MAX_TEXT - 3] + "..."


def status_of(error: Exception, error_id: str = "") -> status_pb2.Status:
    """Return the rich status of an error.

    Args:
        error: any error; one that is not in the table becomes INTERNAL without its text.
        error_id: what the log names an internal error by.
    """
    row = status_row(error)
    if row is None or row.code == "INTERNAL":
        return status_pb2.Status(
            code=code_number("INTERNAL"), message=f"internal error {error_id}".strip()
        )
    info = error_details_pb2.ErrorInfo(reason=row.reason, domain=DOMAIN)
    details: list[any_pb2.Any] = [_packed(info)]
    message = _short(error.message if isinstance(error, RemoteError) else str(error))
    if isinstance(error, RequestError):
        bad = error_details_pb2.BadRequest()
        bad.field_violations.add(field=_short(error.field), description=_short(error.message))
        details.append(_packed(bad))
    if row.code == "RESOURCE_EXHAUSTED":
        delay = duration_pb2.Duration()
        after_s = getattr(error, "retry_after_s", None) or _RETRY_AFTER_S
        delay.FromNanoseconds(int(after_s * 1e9))
        details.append(_packed(error_details_pb2.RetryInfo(retry_delay=delay)))
    if isinstance(error, CoverageLost | CoverageTimedOut):
        details.append(_packed(coverage_to(error.coverage)))
    if isinstance(error, LoggedNotApplied):
        result = error.result
        fits = len(result.rejected) <= _MAX_REJECTED
        details.append(_packed(result_to(result if fits else result._replace(rejected=()))))
    return status_pb2.Status(code=code_number(row.code), message=message, details=details)


def refused(code: str, message: str, details: Iterable[any_pb2.Any]) -> RequestRefused:
    """Return the error that a client raises for a status with its details."""
    reason, coverage, retry_after_s, logged = "", None, None, None
    violations: list[FieldViolation] = []
    for detail in details:
        info, bad = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
        retry, partial = error_details_pb2.RetryInfo(), retrieval_pb2.Coverage()
        applied = retrieval_pb2.ApplyResponse()
        if detail.Unpack(info):
            reason = info.reason
        elif detail.Unpack(bad):
            violations += [
                FieldViolation(one.field, one.description) for one in bad.field_violations
            ]
        elif detail.Unpack(retry):
            retry_after_s = retry.retry_delay.ToNanoseconds() / 1e9
        elif detail.Unpack(partial):
            coverage = coverage_from(partial)
        elif detail.Unpack(applied):
            logged = result_from(applied)
    return RequestRefused(
        code,
        message,
        reason=reason,
        violations=violations,
        coverage=coverage,
        retry_after_s=retry_after_s,
        logged=logged,
    )


def coverage_to(coverage: Coverage) -> retrieval_pb2.Coverage:
    """Return a coverage as a message."""
    message = retrieval_pb2.Coverage(
        documents=coverage.documents,
        degraded=coverage.degraded,
        shards_total=coverage.shards_total,
        shards_full=coverage.shards_full,
        shards_failed=coverage.shards_failed,
        reasons=[_REASON_PREFIX + name for name in coverage.reasons],
        expected_recall=coverage.expected_recall,
    )
    for one in coverage.shards:
        message.shards.add(
            shard=one.shard,
            replica=one.replica,
            grpc_code=code_number(one.code),
            reasons=[_REASON_PREFIX + name for name in one.reasons],
            documents=one.documents,
            latency_us=one.latency_us,
            attempts=one.attempts,
            hedged=one.hedged,
        )
    return message


def counts_from(counts: retrieval_pb2.StageCounts) -> Counts:
    """Return what the stages counted, from its message."""
    return Counts(
        addressed=counts.addressed,
        probed=counts.probed,
        eligible=counts.eligible if counts.HasField("eligible") else None,
        ann_kept=counts.ann_kept,
        reranked=counts.reranked,
        semantic_kept=counts.semantic_kept,
    )


def coverage_from(message: retrieval_pb2.Coverage) -> Coverage:
    """Return the coverage in a message."""
    return Coverage(
        documents=message.documents,
        shards_total=message.shards_total,
        shards_full=message.shards_full,
        shards_failed=message.shards_failed,
        reasons=tuple(_reason_from(number) for number in message.reasons),
        expected_recall=message.expected_recall if message.HasField("expected_recall") else None,
        shards=tuple(
            ShardOutcome(
                shard=one.shard,
                replica=one.replica,
                code=code_name(one.grpc_code),
                reasons=tuple(_reason_from(number) for number in one.reasons),
                documents=one.documents,
                latency_us=one.latency_us,
                attempts=one.attempts,
                hedged=one.hedged,
            )
            for one in message.shards
        ),
    )


_REASON_PREFIX = "DEGRADE_REASON_"


def _reason_from(number: int) -> str:
    if number not in retrieval_pb2.DegradeReason.values():
        return str(number)
    return retrieval_pb2.DegradeReason.Name(number).removeprefix(_REASON_PREFIX)


def values_to(name: str, values: FilterParam | FeatureValues) -> retrieval_pb2.Values:
    """Return values of one kind as a message.

    Args:
        name: of the field, for the error.
        values: one value or several; floats keep all their bits, weights of ids are float32.

    Raises:
        ValueError: if they are of several kinds, or not ints, floats or strings, or one does not
            fit 64 bits, or if weights are not one number per id that fits float32.
    """
    if isinstance(values, WeightedIds):
        for what, part in (("ids", values.ids), ("weights", values.weights)):
            if not _is_list(part):
                raise ValueError(f"{name}: {what} must be a list, got {type(part).__name__}")
        message = values_to(name, values.ids)
        message.weights = _weights_to(name, values)
        return message
    if isinstance(values, np.ndarray):
        values = values.tolist()
    listed: list[Any] = list(cast(Sequence[Any], values)) if _is_list(values) else [values]
    listed = [one.item() if isinstance(one, np.generic) else one for one in listed]
    kinds = {type(one) for one in listed}
    if not kinds:
        return retrieval_pb2.Values()
    if kinds == {int}:
        for one in listed:
            if not INT64_MIN <= one <= INT64_MAX:
                raise ValueError(f"{name}: must be 64-bit signed ints, got {_of_bits(one)}")
        return retrieval_pb2.Values(ints=listed)
    if kinds == {str}:
        return retrieval_pb2.Values(strings=listed)
    if kinds <= {int, float}:
        try:
            return retrieval_pb2.Values(doubles=listed)
        except OverflowError:
            largest = max((one for one in listed if isinstance(one, int)), key=abs)
            raise ValueError(
                f"{name}: must be numbers that fit float64, got {_of_bits(largest)}"
            ) from None
    names = ", ".join(sorted(kind.__name__ for kind in kinds))
    raise ValueError(f"{name}: must be ints, floats or strings of one kind, got {names}")


def _is_list(values: object) -> bool:
    """Return whether it is a sequence of values and no value itself."""
    if isinstance(values, np.ndarray):
        return values.ndim == 1
    return isinstance(values, Sequence) and not isinstance(values, str | bytes | bytearray)


def _of_bits(value: int) -> str:
    """Return a name for an int that may have more digits than Python prints."""
    return f"an int of {value.bit_length()} bits"


def _weights_to(name: str, values: WeightedIds) -> bytes:
    weights = list(values.weights)
    if len(weights) != len(values.ids):
        raise ValueError(
            f"{name}: must have as many weights as ids, {len(values.ids)}, got {len(weights)}"
        )
    for position, weight in enumerate(weights):
        try:
            struct.pack("<f", weight)
        except (OverflowError, struct.error):
            raise ValueError(
                f"{name}: weight {position} must be a number that fits float32, got {weight!r}"
            ) from None
    return struct.pack(f"<{len(weights)}f", *weights)


def param_from(name: str, message: retrieval_pb2.Values) -> FeatureValues:
    """Return the values of a filter parameter, which have no weights.

    Raises:
        RequestError: naming the field, if they are of several kinds, or have weights.
    """
    values = values_from(name, message)
    if isinstance(values, WeightedIds):
        raise RequestError(name, "must have no weights, which go with ids of user features alone")
    return values


def values_from(name: str, message: retrieval_pb2.Values) -> FeatureValues:
    """Return the values in a message, ``WeightedIds`` if it has weights; empty if there are none.

    Raises:
        RequestError: naming the field, if they are of several kinds, or weights are not as many.
    """
    given: dict[str, FeatureValues] = {
        "ints": tuple(message.ints),
        "floats": tuple(message.floats),
        "strings": tuple(message.strings),
        "doubles": tuple(message.doubles),
    }
    kinds = [kind for kind, values in given.items() if values]
    if len(kinds) > 1:
        raise RequestError(name, f"must be values of one kind, got {' and '.join(kinds)}")
    values = given[kinds[0]] if kinds else ()
    if not message.weights:
        return values
    if len(message.weights) != 4 * len(values):
        raise RequestError(
            name, f"weights must have {4 * len(values)} bytes, got {len(message.weights)}"
        )
    # Whether they are ids is for the schema to say.
    ids = cast(Sequence[int] | Sequence[str], values)
    return WeightedIds(ids, struct.unpack(f"<{len(ids)}f", message.weights))


def request_from(message: retrieval_pb2.RetrieveRequest) -> Request:
    """Return the request in a message; what only a generation can tell is not checked.

    Raises:
        RequestError: naming the field.
    """
    search = message.search
    mode = int(search.filter_mode)
    if mode not in {known.value for known in FilterMode}:
        raise RequestError("search.filter_mode", f"unknown mode {mode}")
    for name, weight in message.task_weights.items():
        if not math.isfinite(weight):
            raise RequestError(f"task_weights.{name}", f"must be a finite float32, got {weight}")
    named = message.named.features
    return Request(
        features={name: values_from(f"features.{name}", named[name]) for name in sorted(named)},
        k=message.k,
        filter=message.filter,
        params={
            name: param_from(f"params.{name}", message.params[name])
            for name in sorted(message.params)
        },
        exclude_ids=tuple(message.exclude_ids),
        nprobe=search.nprobe,
        ann_k=search.ann_k,
        semantic_k=search.semantic_k if search.HasField("semantic_k") else None,
        plan=search.plan,
        exact=search.exact,
        filter_mode=FilterMode(mode),
        task_weights=dict(message.task_weights),
        value=message.value,
        return_fields=tuple(message.return_fields),
    )


def request_to(request: Request) -> retrieval_pb2.RetrieveRequest:
    """Return a request as a message.

    Raises:
        ValueError: naming the field that has no form on the wire.
    """
    _check_counts("k", [request.k], 2**32)
    _check_counts("nprobe", [request.nprobe], 2**32)
    _check_counts("ann_k", [request.ann_k], 2**32)
    _check_counts("semantic_k", [request.semantic_k or 0], 2**32)
    _check_counts("exclude_ids", request.exclude_ids, 2**64)
    message = retrieval_pb2.RetrieveRequest(
        k=request.k,
        filter=request.filter,
        exclude_ids=[int(one) for one in request.exclude_ids],
        return_fields=request.return_fields,
        value=request.value,
        search=retrieval_pb2.SearchParams(
            nprobe=request.nprobe,
            ann_k=request.ann_k,
            semantic_k=request.semantic_k,
            plan=request.plan,
            exact=request.exact,
            filter_mode=retrieval_pb2.FilterMode.Name(request.filter_mode.value),
        ),
    )
    for name, weight in request.task_weights.items():
        message.task_weights[name] = weight
    for name, values in request.features.items():
        message.named.features[name].CopyFrom(values_to(f"features.{name}", values))
    for name, param in request.params.items():
        message.params[name].CopyFrom(values_to(f"params.{name}", param))
    return message


def _check_counts(name: str, values: Iterable[int], limit: int) -> None:
    for value in values:
        if not 0 <= value < limit:
            raise ValueError(f"{name}: must be in 0..{limit - 1}, got {value}")

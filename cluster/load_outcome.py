"""What came of a request of a load: its class, and its line in a record of all answers."""

from collections.abc import Mapping
from enum import StrEnum
from typing import Any, NamedTuple

from google.protobuf.message import DecodeError
from google.rpc import status_pb2

from silvershard.cluster import retrieval_pb2
from silvershard.cluster.codec import coverage_from, refused
from silvershard.cluster.load import OK, UNSENT, Entry

UNREADABLE = "UNREADABLE"
"""Code of an answer that is none."""


class Outcome(StrEnum):
    """What a request counts as: late before partial, and partial before degraded."""

    OK = "ok"
    DEGRADED = "degraded"
    """Everything answered, but some of it with less work than the model's."""
    PARTIAL = "partial"
    """Documents are missing from the answer."""
    LATE = "late"
    """An answer that came after its deadline."""
    ERROR = "error"
    UNSENT = "unsent"
    """The generator did not send it, see ``UNSENT``."""


FAILED = (Outcome.LATE, Outcome.ERROR, Outcome.UNSENT)


class Judged(NamedTuple):
    """An entry as it counts."""

    outcome: Outcome
    code: str
    coverage: float | None
    """Of an answer, or of an error that states it."""
    reasons: tuple[str, ...]
    """Names of what degraded it."""
    answer: retrieval_pb2.RetrieveResponse | None
    message: str
    """Of an error, for people."""


def judge(entry: Entry, deadline_s: float) -> Judged:
    """Return what an entry counts as.

    Args:
        entry: what came of a request.
        deadline_s: from when it was due.
    """
    if entry.code in UNSENT:
        return Judged(Outcome.UNSENT, entry.code, None, (), None, "")
    if entry.code != OK:
        return _failed(entry)
    try:
        answer = retrieval_pb2.RetrieveResponse.FromString(entry.body)
    except DecodeError as error:
        return Judged(Outcome.ERROR, UNREADABLE, None, (), None, str(error))
    coverage = coverage_from(answer.coverage)
    outcome = Outcome.OK
    if entry.done_s - entry.at_s > deadline_s:
        outcome = Outcome.LATE
    elif coverage.documents < 1:
        outcome = Outcome.PARTIAL
    elif coverage.degraded:
        outcome = Outcome.DEGRADED
    return Judged(outcome, OK, coverage.documents, coverage.reasons, answer, "")


def _failed(entry: Entry) -> Judged:
    status = status_pb2.Status()
    try:
        status.ParseFromString(entry.body)
    except DecodeError:
        status.Clear()
    error = refused(entry.code, status.message, status.details)
    coverage = error.coverage
    return Judged(
        Outcome.ERROR,
        entry.code,
        None if coverage is None else coverage.documents,
        () if coverage is None else coverage.reasons,
        None,
        error.message,
    )


def record_line(
    entry: Entry,
    judged: Judged,
    *,
    request: Mapping[str, Any],
    router: str,
    zero_s: float,
    zero_unix_s: float,
) -> dict[str, Any]:
    """Return an answer as one line of a record, which a checker of histories reads.

    Times are seconds since the load began to count; those of its warm-up are negative.

    Args:
        entry: what came of the request.
        judged: what it counts as.
        request: its index among the different requests, and its parameters.
        router: address that was asked.
        zero_s: when the load began to count, in the time of ``entry``.
        zero_unix_s: the same moment as a Unix time.
    """
    answer = judged.answer or retrieval_pb2.RetrieveResponse()
    version = answer.version
    at_s = entry.at_s - zero_s
    return {
        "kind": "query",
        "number": entry.number,
        "at_s": round(at_s, 6),
        "sent_s": round(entry.sent_s - zero_s, 6),
        "done_s": round(entry.done_s - zero_s, 6),
        "unix_s": round(zero_unix_s + at_s, 6),
        "code": judged.code,
        "outcome": judged.outcome.value,
        "message": judged.message,
        "request": dict(request),
        "ids": list(answer.item_ids),
        "exhausted": answer.exhausted,
        "plan": answer.plan,
        "generation": version.generation,
        "cut": [one.position for one in sorted(version.cut, key=lambda one: one.partition)],
        "coverage": judged.coverage,
        "reasons": list(judged.reasons),
        "shard_map_version": version.shard_map_version,
        "router": router,
    }

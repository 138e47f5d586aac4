"""How fresh an answer must be, and how fresh it is, as values and as messages."""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from google.protobuf import duration_pb2

from silvershard.cluster import retrieval_pb2
from silvershard.cluster.update_log import MAX_PARTITIONS, MAX_POSITION
from silvershard.model.request import RequestError

_MAX_DURATION_S = 315_576_000_000
"""Ten thousand years, the longest ``google.protobuf.Duration``."""


class UpdateToken(NamedTuple):
    """A place in the update log."""

    log_id: int
    """Of the log as a whole."""
    partition: int
    """Of the log."""
    position: int
    """1 is the first one of a partition."""


class Consistency(NamedTuple):
    """How fresh the replicas that answer must be."""

    after: tuple[UpdateToken, ...] = ()
    """Only replicas that have applied these; at most one token of a partition of a log."""
    max_staleness_s: float | None = None
    """None: any."""


ANY = Consistency()
"""Every replica may answer."""


class Freshness(NamedTuple):
    """What an answer reflects."""

    cut: tuple[UpdateToken, ...]
    """Per log partition, what the slowest answering shard had applied."""
    staleness_s: float
    """Of the slowest answering shard."""


def newest(tokens: Iterable[UpdateToken]) -> tuple[UpdateToken, ...]:
    """Return the tokens that stand for all of them: the last one of each partition of each log."""
    last: dict[tuple[int, int], int] = {}
    for log_id, partition, position in tokens:
        last[log_id, partition] = max(position, last.get((log_id, partition), 0))
    return tuple(UpdateToken(*place, last[place]) for place in sorted(last))


def tokens_to(tokens: Iterable[UpdateToken]) -> list[retrieval_pb2.UpdateToken]:
    """Return tokens as messages.

    Raises:
        ValueError: if a number does not fit its field.
    """
    return [
        retrieval_pb2.UpdateToken(log_epoch=log_id, partition=partition, position=position)
        for log_id, partition, position in tokens
    ]


def tokens_from(messages: Iterable[retrieval_pb2.UpdateToken]) -> tuple[UpdateToken, ...]:
    """Return the tokens in messages."""
    return tuple(UpdateToken(one.log_epoch, one.partition, one.position) for one in messages)


def duration_to(seconds: float) -> duration_pb2.Duration:
    """Return a time, rounded down to nanoseconds, as a message.

    Raises:
        ValueError: if it is negative, not finite or beyond ten thousand years.
    """
    if not 0 <= seconds <= _MAX_DURATION_S:
        raise ValueError(f"must be in 0..{_MAX_DURATION_S} s, got {seconds}")
    whole = math.floor(seconds)
    return duration_pb2.Duration(seconds=whole, nanos=int((seconds - whole) * 1e9))


def duration_from(name: str, message: duration_pb2.Duration) -> float:
    """Return the seconds in a message.

    Raises:
        RequestError: naming the field, if it is negative or no valid duration.
    """
    if not (0 <= message.seconds <= _MAX_DURATION_S and 0 <= message.nanos < 10**9):
        raise RequestError(
            name,
            f"must be a duration that is not negative, got {message.seconds} s and "
            f"{message.nanos} ns",
        )
    return float(message.seconds + message.nanos / 1e9)


def consistency_to(consistency: Consistency) -> retrieval_pb2.Consistency:
    """Return a demand as a message.

    Raises:
        ValueError: naming the field that has no form on the wire.
    """
    try:
        message = retrieval_pb2.Consistency(after=tokens_to(consistency.after))
    except (TypeError, ValueError) as error:
        raise ValueError(f"after: must be tokens of updates: {error}") from None
    if consistency.max_staleness_s is not None:
        try:
            message.max_staleness.CopyFrom(duration_to(consistency.max_staleness_s))
        except ValueError as error:
            raise ValueError(f"max_staleness_s: {error}") from None
    return message


def consistency_from(message: retrieval_pb2.Consistency) -> Consistency:
    """Return the demand in a message; what only the log can tell is not checked.

    Raises:
        RequestError: naming the field.
    """
    for at, one in enumerate(message.after):
        if one.partition >= MAX_PARTITIONS:
            raise RequestError(
                f"consistency.after[{at}].partition",
                f"must be below {MAX_PARTITIONS}, got {one.partition}",
            )
        if one.position > MAX_POSITION:
            raise RequestError(
                f"consistency.after[{at}].position",
                f"must be at most {MAX_POSITION}, got {one.position}",
            )
    staleness_s = None
    if message.HasField("max_staleness"):
        staleness_s = duration_from("consistency.max_staleness", message.max_staleness)
    return Consistency(newest(tokens_from(message.after)), staleness_s)


def stamp(message: retrieval_pb2.VersionStamp, freshness: Freshness) -> None:
    """Write what an answer reflects into its version."""
    message.cut.extend(tokens_to(freshness.cut))
    message.staleness.CopyFrom(duration_to(min(freshness.staleness_s, _MAX_DURATION_S)))


def freshness_from(message: retrieval_pb2.VersionStamp) -> Freshness | None:
    """Return what an answer reflects; None for a generation that follows no log."""
    if not message.HasField("staleness"):
        return None
    return Freshness(tokens_from(message.cut), message.staleness.ToNanoseconds() / 1e9)


def cut_tokens(log_id: int, cut: Sequence[int]) -> tuple[UpdateToken, ...]:
    """Return the tokens of a cut: of every log partition the last position that is applied."""
    return tuple(UpdateToken(log_id, at, position) for at, position in enumerate(cut))

"""What a shard had applied when it ran a call, and whether that is as fresh as a request demands.

Shapes: L log partitions.
"""

from collections.abc import Collection
from typing import NamedTuple

from silvershard.cluster.codec import Refusal
from silvershard.cluster.consistency import ANY, Consistency, Freshness, cut_tokens
from silvershard.model.request import RequestError

FOREIGN_TOKEN = "FOREIGN_TOKEN"
AFTER = "consistency.after"
"""The field of a request that names its tokens."""

Cut = tuple[int, ...]
"""``(L,)`` last position applied of every log partition; empty for a generation without a log."""


Refused = tuple[tuple[int, str], ...]
"""Items, -1 for a table, and why they were refused."""


class Seen(NamedTuple):
    """What a shard had applied when it ran a call."""

    log_id: int
    """0: its generation follows no log."""
    cut: Cut
    staleness_s: float
    """For how long an update may have been in the log without being applied."""
    documents: int
    """Live documents of the shard."""


class Lag(NamedTuple):
    """How far a follower has come."""

    cut: Cut
    ends: Cut
    """``(L,)`` last position of every log partition, as last seen."""
    current_s: float
    """Reading of the clock at which the cut was the end of the log; -inf: never yet."""
    oldest_unix_s: float
    """When the last record before the oldest one that is not applied was logged; inf: all are."""
    looked_s: float = float("-inf")
    """Reading of the clock just before ``ends`` were read; -inf: they never were."""
    refused: Refused = ()
    """The newest items up to the cut whose updates were refused for what they say, and why."""


class Demand(NamedTuple):
    """What a replica must have applied before it runs a call."""

    consistency: Consistency = ANY
    wait_s: float = 0.0
    """Longest wait until it has."""

    @property
    def is_any(self) -> bool:
        """Return whether every replica will do."""
        return self.consistency == ANY


ANYTHING = Demand()


def is_met(consistency: Consistency, seen: Seen) -> bool:
    """Return whether a replica that saw this is fresh enough."""
    for token in consistency.after:
        if token.partition >= len(seen.cut) or seen.cut[token.partition] < token.position:
            return False
    most_s = consistency.max_staleness_s
    return most_s is None or seen.staleness_s <= most_s


def check_tokens(consistency: Consistency, log_id: int, num_partitions: int) -> None:
    """Refuse tokens that are not of the log that is followed.

    Args:
        consistency: the demand.
        log_id: of that log; 0: none is followed.
        num_partitions: L.

    Raises:
        Refusal: FOREIGN_TOKEN, naming the first such token.
    """
    for at, token in enumerate(consistency.after):
        problem = ""
        if not log_id:
            problem = "the generation follows no update log, so that there can be no token"
        elif token.log_id != log_id:
            problem = f"must be of the update log that is followed, {log_id}, got {token.log_id}"
        elif token.partition >= num_partitions:
            problem = f"must be of a log partition below {num_partitions}, got {token.partition}"
        if problem:
            raise Refusal("FAILED_PRECONDITION", f"{AFTER}[{at}]: {problem}", FOREIGN_TOKEN)


def check_end(consistency: Consistency, ends: Cut) -> None:
    """Refuse tokens that no acknowledgement can have given.

    Args:
        consistency: a demand for tokens of the log that is followed.
        ends: ``(L,)`` last positions of the log, read after the demand was stated: what was
            acknowledged before is in them.

    Raises:
        RequestError: naming the first token beyond them.
    """
    for token in consistency.after:
        if token.position > ends[token.partition]:
            raise RequestError(
                AFTER,
                f"must be at most {ends[token.partition]} in log partition {token.partition}, "
                f"where the update log ends, got {token.position}",
            )


def slowest(seen: Collection[Seen]) -> Freshness | None:
    """Return what an answer of several shards reflects; None if none of them follows a log.

    Raises:
        ValueError: if they follow different logs.
    """
    following = [one for one in seen if one.log_id]
    if not following:
        return None
    logs = {one.log_id for one in following}
    if len(logs) > 1:
        raise ValueError(f"the shards of an answer must follow one log, got {sorted(logs)}")
    cut = [min(positions) for positions in zip(*(one.cut for one in following), strict=True)]
    return Freshness(
        cut=cut_tokens(logs.pop(), cut),
        staleness_s=max(one.staleness_s for one in following),
    )

from typing import Any

import pytest

from silvershard.cluster.codec import Refusal
from silvershard.cluster.consistency import ANY, Consistency, Freshness, UpdateToken
from silvershard.cluster.freshness import (
    ANYTHING,
    Demand,
    Seen,
    check_end,
    check_tokens,
    is_met,
    slowest,
)
from silvershard.model.request import RequestError

LOG = 9


def after(*places: tuple[int, int], log_id: int = LOG, **more: Any) -> Consistency:
    return Consistency(tuple(UpdateToken(log_id, *place) for place in places), **more)


@pytest.mark.parametrize(
    ("consistency", "met"),
    [
        (ANY, True),
        (after((0, 5)), True),
        (after((0, 6)), False),
        (after((0, 5), (1, 0)), True),
        (after((0, 5), (1, 1)), False),
        (after((2, 0)), False),
        (Consistency(max_staleness_s=0.5), True),
        (Consistency(max_staleness_s=0.49), False),
        (after((0, 6), max_staleness_s=1.0), False),
    ],
)
def test_a_demand_is_met_by_every_position_and_the_staleness(
    consistency: Consistency, met: bool
) -> None:
    assert is_met(consistency, Seen(LOG, (5, 0), 0.5, 10)) is met


def test_a_demand_for_nothing_says_so() -> None:
    assert ANYTHING.is_any
    assert not Demand(after((0, 1))).is_any
    assert not Demand(Consistency(max_staleness_s=0.0)).is_any


@pytest.mark.parametrize(
    ("consistency", "log_id", "complaint"),
    [
        (after((0, 1)), 0, r"consistency.after\[0\]: the generation follows no update log"),
        (after((0, 1), log_id=8), LOG, "must be of the update log that is followed, 9, got 8"),
        (after((0, 1), (2, 1)), LOG, r"after\[1\]: must be of a log partition below 2, got 2"),
    ],
)
def test_tokens_of_another_log_are_refused(
    consistency: Consistency, log_id: int, complaint: str
) -> None:
    with pytest.raises(Refusal, match=complaint) as raised:
        check_tokens(consistency, log_id, 2)
    assert (raised.value.code, raised.value.reason) == ("FAILED_PRECONDITION", "FOREIGN_TOKEN")


def test_tokens_of_the_log_and_a_staleness_alone_are_fine() -> None:
    check_tokens(after((0, 1), (1, 7)), LOG, 2)
    check_tokens(Consistency(max_staleness_s=1.0), 0, 0)


def test_a_token_beyond_the_end_of_the_log_is_refused_with_both() -> None:
    check_end(after((0, 5), (1, 7)), (5, 7))
    with pytest.raises(RequestError, match=r"at most 7 in log partition 1.*ends, got 8") as raised:
        check_end(after((0, 5), (1, 8)), (5, 7))
    assert raised.value.field == "consistency.after"


def test_an_answer_is_as_fresh_as_its_slowest_shard_in_every_partition() -> None:
    seen = [Seen(LOG, (5, 2), 0.1, 10), Seen(LOG, (4, 3), 0.3, 20), Seen(LOG, (9, 9), 0.0, 5)]
    assert slowest(seen) == Freshness((UpdateToken(LOG, 0, 4), UpdateToken(LOG, 1, 2)), 0.3)


def test_shards_that_follow_no_log_say_nothing_of_it() -> None:
    static = Seen(0, (), 0.0, 10)
    assert slowest([]) is None
    assert slowest([static, static]) is None
    assert slowest([static, Seen(LOG, (4,), 0.3, 1)]) == Freshness((UpdateToken(LOG, 0, 4),), 0.3)


def test_shards_of_different_logs_are_a_bug() -> None:
    with pytest.raises(ValueError, match=r"one log, got \[8, 9\]"):
        slowest([Seen(9, (1,), 0.0, 1), Seen(8, (1,), 0.0, 1)])

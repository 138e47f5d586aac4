import math

import pytest
from google.protobuf import duration_pb2

from silvershard.cluster import retrieval_pb2
from silvershard.cluster.consistency import (
    ANY,
    Consistency,
    Freshness,
    UpdateToken,
    consistency_from,
    consistency_to,
    cut_tokens,
    duration_from,
    duration_to,
    freshness_from,
    newest,
    stamp,
)
from silvershard.model.request import RequestError

ONE, TWO = UpdateToken(9, 0, 5), UpdateToken(9, 1, 3)


def test_a_demand_comes_through_unchanged() -> None:
    for demand in (ANY, Consistency((ONE, TWO)), Consistency((), 0.0), Consistency((ONE,), 1.25)):
        data = consistency_to(demand).SerializeToString()
        assert consistency_from(retrieval_pb2.Consistency.FromString(data)) == demand


def test_only_the_last_token_of_a_partition_counts() -> None:
    other = UpdateToken(8, 0, 7)
    assert newest([TWO, ONE, UpdateToken(9, 0, 4), other, TWO]) == (other, ONE, TWO)
    message = consistency_to(Consistency((ONE, UpdateToken(9, 0, 8))))
    assert consistency_from(message).after == (UpdateToken(9, 0, 8),)


@pytest.mark.parametrize(
    ("token", "field"),
    [
        (UpdateToken(9, 64, 1), r"after\[0\]\.partition"),
        (UpdateToken(9, 0, 1 << 53), r"after\[0\]\.position"),
    ],
)
def test_tokens_beyond_any_log_are_refused(token: UpdateToken, field: str) -> None:
    with pytest.raises(RequestError, match=field):
        consistency_from(consistency_to(Consistency((token,))))


@pytest.mark.parametrize("seconds", [-0.1, math.inf, math.nan, 1e12])
def test_a_time_that_is_no_duration_is_refused(seconds: float) -> None:
    with pytest.raises(ValueError, match="max_staleness_s: must be in"):
        consistency_to(Consistency((), seconds))


def test_tokens_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="after: must be tokens"):
        consistency_to(Consistency((UpdateToken(-1, 0, 0),)))


@pytest.mark.parametrize(("seconds", "nanos"), [(-1, 0), (0, -1), (0, 10**9), (10**12, 0)])
def test_a_message_that_is_no_duration_is_refused(seconds: int, nanos: int) -> None:
    with pytest.raises(RequestError, match=r"ttl: must be a duration"):
        duration_from("ttl", duration_pb2.Duration(seconds=seconds, nanos=nanos))


def test_durations_keep_their_nanoseconds() -> None:
    for seconds in (0.0, 1e-9, 0.999999999, 1.5, 86_400.25):
        assert duration_from("ttl", duration_to(seconds)) == pytest.approx(seconds, abs=1e-9)


def test_an_answer_tells_its_cut_and_staleness() -> None:
    message = retrieval_pb2.VersionStamp()
    assert freshness_from(message) is None
    freshness = Freshness(cut_tokens(9, [5, 3]), 0.25)
    assert freshness.cut == (ONE, TWO)
    stamp(message, freshness)
    assert freshness_from(message) == freshness
    endless = retrieval_pb2.VersionStamp()
    stamp(endless, Freshness((), math.inf))
    assert endless.staleness.seconds > 10**11

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from silvershard.cluster.histogram import RELATIVE_ERROR, Histogram

TIMES = st.lists(st.floats(0, 1e5), min_size=1, max_size=200)
SHARES = (0.0, 0.01, 0.5, 0.9, 0.99, 0.999, 1.0)


def filled(times: list[float]) -> Histogram:
    made = Histogram()
    for seconds in times:
        made.add(seconds)
    return made


def exact(times: list[float], share: float) -> float:
    """The smallest time that ``share`` of the times do not exceed."""
    return sorted(times)[max(math.ceil(share * len(times) - 1e-9), 1) - 1]


@given(TIMES, st.floats(0, 1))
def test_every_percentile_is_within_the_error_of_the_exact_one(
    times: list[float], share: float
) -> None:
    histogram = filled(times)
    for one in (*SHARES, share):
        found = histogram.quantile(one)
        assert found is not None
        assert found == pytest.approx(exact(times, one), rel=RELATIVE_ERROR * 1.001, abs=1e-6)


@given(TIMES, TIMES)
def test_merging_loses_nothing(one: list[float], other: list[float]) -> None:
    merged, whole = filled(one), filled(one + other)
    merged.merge(filled(other))
    assert merged.counts == whole.counts
    assert [merged.quantile(share) for share in SHARES] == [
        whole.quantile(share) for share in SHARES
    ]
    assert merged.total_s == pytest.approx(whole.total_s)


def test_the_ends_are_exact_and_the_error_is_below_one_percent() -> None:
    histogram = filled([0.00321, 0.0457, 1.2345])
    assert RELATIVE_ERROR <= 0.01
    assert (histogram.quantile(0.0), histogram.quantile(1.0)) == (0.00321, 1.2345)
    assert histogram.mean_s == pytest.approx((0.00321 + 0.0457 + 1.2345) / 3)


def test_nothing_was_counted_yet() -> None:
    assert Histogram().quantile(0.5) is None
    assert Histogram().mean_s is None


def test_a_time_below_zero_counts_as_zero() -> None:
    histogram = filled([-1.0])
    assert (histogram.quantile(0.5), histogram.count) == (0.0, 1)


@pytest.mark.parametrize("seconds", [math.nan, math.inf])
def test_a_time_that_is_no_number_is_refused(seconds: float) -> None:
    with pytest.raises(ValueError, match="a time must be a finite number of seconds"):
        Histogram().add(seconds)


@pytest.mark.parametrize("share", [-0.1, 1.1, math.nan])
def test_a_share_out_of_range_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match=r"share must be in 0\.\.1"):
        filled([1.0]).quantile(share)

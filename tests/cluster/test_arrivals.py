import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from silvershard.cluster.arrivals import Stretch, arrivals, share_of


def times(*stretches: Stretch, poisson: bool = False, seed: int = 0) -> list[float]:
    return list(arrivals(stretches, poisson=poisson, seed=seed))


def steady(seconds: float, rate: float) -> Stretch:
    return Stretch(seconds, rate, rate)


def test_a_constant_rate_is_kept_to_the_request() -> None:
    found = times(steady(2.0, 50))
    assert found == pytest.approx([number / 50 for number in range(100)])


def test_steps_follow_each_other_at_their_own_rates() -> None:
    found = times(steady(1.0, 10), steady(2.0, 100))
    assert sum(one < 1 for one in found) == 10
    later = [one for one in found if one >= 1]
    assert len(later) == 200
    assert {round(after - before, 6) for before, after in pairwise(later)} == {0.01}


def test_a_ramp_grows_evenly() -> None:
    found = times(Stretch(10.0, 0, 100))
    assert len(found) == 500
    # The integral of the rate up to t is 5 t squared.
    assert [sum(one < until for one in found) for until in (2, 5, 10)] == pytest.approx(
        [20, 125, 500], abs=1
    )


@given(st.integers(0, 1000), st.floats(20, 200), st.floats(20, 200))
def test_drawn_times_ascend_within_the_load_and_keep_its_rate(
    seed: int, rate: float, end_rate: float
) -> None:
    stretch = Stretch(5.0, rate, end_rate)
    found = times(stretch, poisson=True, seed=seed)
    assert found == sorted(found)
    assert 0 <= found[0] <= found[-1] < 5.0
    assert abs(len(found) - stretch.requests) < 6 * math.sqrt(stretch.requests)


def test_drawn_gaps_are_exponential() -> None:
    found = times(steady(100.0, 100), poisson=True, seed=3)
    gaps = [after - before for before, after in pairwise(found)]
    mean = sum(gaps) / len(gaps)
    deviation = math.sqrt(sum((gap - mean) ** 2 for gap in gaps) / len(gaps))
    assert (mean, deviation) == pytest.approx((0.01, 0.01), rel=0.05)


def test_the_seed_decides_every_time() -> None:
    stretch = steady(1.0, 100)
    assert times(stretch, poisson=True, seed=5) == times(stretch, poisson=True, seed=5)
    assert times(stretch, poisson=True, seed=5) != times(stretch, poisson=True, seed=6)


def test_processes_together_send_what_one_would() -> None:
    whole = list(enumerate(times(steady(1.0, 50), poisson=True)))
    shares = [list(share_of(iter([one for _, one in whole]), process, 3)) for process in range(3)]
    assert sorted(one for share in shares for one in share) == whole
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize(
    ("stretch", "message"),
    [
        ((0.0, 1.0, 1.0), "must last a positive number of seconds, got 0"),
        ((math.inf, 1.0, 1.0), "must last a positive number of seconds, got inf"),
        ((1.0, -1.0, 1.0), "a rate must be a number from 0, got -1"),
        ((1.0, 1.0, math.nan), "a rate must be a number from 0, got nan"),
        ((1.0, 0.0, 0.0), "a rate above 0 at its begin or its end"),
    ],
)
def test_what_is_no_stretch_is_refused(stretch: tuple[float, float, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Stretch(*stretch)

import pytest
from hypothesis import given
from hypothesis import strategies as st

from silvershard.cluster.load_peak import PeakSearch


@given(st.floats(1, 50_000), st.floats(1, 50_000))
def test_the_peak_is_found_to_the_precision(capacity: float, first: float) -> None:
    search = PeakSearch(first)
    found = search.run(lambda rate: rate <= capacity)
    assert found is not None
    assert found <= capacity <= found * 1.0501
    assert len(search.trials) < 40


def test_rates_are_doubled_and_then_halved_in_between() -> None:
    search = PeakSearch(100, precision=0.2)
    assert search.run(lambda rate: rate <= 350) == 350
    assert [one.rate for one in search.trials] == [100, 200, 400, 300, 350]


def test_nothing_held() -> None:
    search = PeakSearch(4, least=1)
    assert search.run(lambda rate: False) is None
    assert [one.rate for one in search.trials] == [4, 2, 1]


def test_there_is_a_highest_rate() -> None:
    search = PeakSearch(4, most=10)
    assert search.run(lambda rate: True) == 10
    assert [one.rate for one in search.trials] == [4, 8, 10]


def test_a_rate_that_held_above_one_that_did_not_is_no_peak() -> None:
    answers = {100: True, 200: False, 150: True, 175: False}
    search = PeakSearch(100, precision=0.2)
    assert search.run(lambda rate: answers[round(rate)]) == pytest.approx(150)

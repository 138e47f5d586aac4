import math

import pytest

from silvershard.cluster.batch_times import BatchTimes


def taught(*batches: tuple[int, float]) -> BatchTimes:
    """Return what was learned of batches one after the other: sizes, and seconds that they took."""
    times, now_s = BatchTimes(), 100.0
    for size, spent_s in batches:
        times.started(size, now_s)
        now_s += spent_s
        times.ended(size, now_s, answered=True)
    return times


def test_nothing_is_known_before_the_first_batch() -> None:
    times = BatchTimes()
    assert times.each_s == 0.0
    assert times.fitting(0.001, 100.0) == math.inf
    times.started(5, 100.0)
    assert times.fitting(0.001, 101.0) == math.inf


def test_requests_one_after_the_other_show_in_small_batches() -> None:
    times = taught((1, 0.02), (2, 0.03), (4, 0.05))
    # 10 ms of its own and 10 ms for each request; half of the time that is left may be used.
    assert times.each_s == pytest.approx(0.01)
    assert times.fitting(2.0, 200.0) == pytest.approx(99.0)
    assert times.fitting(0.2, 200.0) == pytest.approx(9.0)


def test_what_takes_no_longer_with_more_requests_may_have_any_number() -> None:
    assert taught((1, 0.01), (8, 0.01), (3, 0.01)).fitting(0.05, 200.0) == math.inf
    # Times that fall with the size are chance.
    assert taught((1, 0.02), (8, 0.01)).fitting(0.05, 200.0) == math.inf


def test_batches_all_alike_tell_of_no_more_than_their_share() -> None:
    times = taught(*[(4, 0.08)] * 5)
    assert times.each_s == pytest.approx(0.02)
    assert times.fitting(1.0, 200.0) == pytest.approx(25.0)
    # What was learned from others stays.
    known = taught((1, 0.01), (8, 0.01), *[(8, 0.01)] * 200)
    assert known.fitting(0.05, 200.0) == math.inf


def test_those_that_run_come_first() -> None:
    times = taught((1, 0.02), (2, 0.03), (4, 0.05))
    times.started(4, 200.0)
    times.started(9, 200.0)
    # 50 ms and 100 ms are ahead of its own 10 ms, and half of 2 s is there.
    assert times.fitting(2.0, 200.0) == pytest.approx(84.0)
    assert times.fitting(2.0, 200.1) == pytest.approx(94.0)
    # Those that take longer than expected are about to end.
    assert times.fitting(2.0, 300.0) == pytest.approx(99.0)


def test_side_by_side_each_took_the_time_since_the_one_before_it_ended() -> None:
    times, now_s = BatchTimes(), 0.0
    for size in (1, 2, 4, 8):
        times.started(size, now_s)
    for size in (1, 2, 4, 8):
        now_s += 0.01 * size
        times.ended(size, now_s, answered=True)
    assert times.each_s == pytest.approx(0.01)


def test_as_many_as_take_no_longer_than_a_batch_by_itself_always_fit() -> None:
    times = taught((1, 0.11), (2, 0.12), (4, 0.14))
    assert times.fitting(0.01, 200.0) == pytest.approx(10.0)
    assert taught((1, 0.1), (2, 0.2), (3, 0.3)).fitting(0.01, 200.0) == 1.0


def test_what_was_refused_tells_nothing() -> None:
    times = taught((1, 0.01), (2, 0.02))
    times.started(64, 200.0)
    times.ended(64, 200.0001, answered=False)
    assert times.each_s == pytest.approx(0.01)

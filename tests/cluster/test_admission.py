import random
from typing import Any

import pytest

from silvershard.cluster.admission import (
    Admission,
    ConcurrencyLimit,
    TenantLimits,
    Ticket,
    WaitingLine,
)
from silvershard.cluster.config import AdmissionSection, ConcurrencySection, TenantSection
from silvershard.shard.errors import DeadlineExceeded, Overloaded


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


def ticket(priority: int = 0, *, deadline_s: float = 1e9, demands: bool = False) -> Ticket:
    return Ticket(priority, "", deadline_s, demands)


def line_of(clock: Clock, capacity: int = 4) -> WaitingLine[Ticket]:
    return WaitingLine(capacity, 0.005, clock)


def test_equals_are_served_in_order_of_arrival_until_one_has_waited_too_long(clock: Clock) -> None:
    line = line_of(clock)
    tickets = [ticket(), ticket(1), ticket()]
    for one in tickets:
        assert line.enter([one]) == []
        clock.now_s += 0.001
    assert list(line.in_order()) == [tickets[1], tickets[0], tickets[2]]
    assert (line.delay_s, line.newest_first) == (pytest.approx(0.003), False)
    assert (line.num_ahead_of(0), line.num_ahead_of(1), line.num_ahead_of(2)) == (3, 1, 0)
    clock.now_s += 0.09
    # A burst is no line that stands.
    assert not line.newest_first
    clock.now_s += 0.01
    assert line.newest_first
    assert list(line.in_order()) == [tickets[1], tickets[2], tickets[0]]
    assert (line.num_ahead_of(0), line.num_ahead_of(1)) == (1, 0)
    assert line.remove(tickets[0])
    assert not line.remove(tickets[0])
    assert not line.remove(ticket(7))
    assert line.delay_s == pytest.approx(0.102)
    assert len(line) == 2
    for one in tickets[1:]:
        line.remove(one)
    line.enter([ticket()])
    clock.now_s += 0.09
    # It was empty a moment ago.
    assert not line.newest_first


def test_those_that_wait_for_updates_are_no_delay(clock: Clock) -> None:
    line = line_of(clock)
    line.enter([ticket(demands=True), ticket(3, demands=True)])
    clock.now_s += 1
    assert line.delay_s == 0
    assert line.num_demanding == 2
    line.enter([ticket(3)])
    clock.now_s += 0.002
    assert line.delay_s == pytest.approx(0.002)


def test_a_full_line_refuses_the_lowest_priority_first(clock: Clock) -> None:
    line = line_of(clock, 3)
    low, middle, lowest = ticket(-1), ticket(), ticket(-2)
    line.enter([low, middle, lowest])
    assert line.enter([ticket(-2)]) is None
    assert line.enter([ticket(-1), ticket(5)]) is None
    high = ticket(1)
    assert line.enter([high]) == [lowest]
    assert line.enter([ticket(1), ticket(0)]) is None
    other = ticket(0)
    assert line.enter([other]) == [low]
    assert list(line.in_order()) == [high, middle, other]
    assert line.enter([ticket()] * 4) is None


def test_where_the_newest_goes_first_the_oldest_equal_leaves(clock: Clock) -> None:
    line = line_of(clock, 3)
    tickets = [ticket(), ticket(), ticket(1)]
    for one in tickets:
        line.enter([one])
    clock.now_s += 0.11
    newest = ticket()
    assert line.enter([newest]) == [tickets[0]]
    assert list(line.in_order()) == [tickets[2], newest, tickets[1]]
    assert line.enter([ticket(-1)]) is None
    assert line.enter([ticket(1), ticket(0)]) == [tickets[1], newest]


def test_who_leaves_is_always_who_would_be_served_last(clock: Clock) -> None:
    rng = random.Random(5)
    for _ in range(300):
        line = line_of(clock, 6)
        for _ in range(6):
            line.enter([ticket(rng.randrange(3))])
            clock.now_s += rng.random() * 0.04
        order = list(line.in_order())
        group = [ticket(rng.randrange(3)) for _ in range(rng.randrange(1, 4))]
        newest_first = line.newest_first
        displaced = line.enter(group)
        least = min(one.priority for one in group)
        after = [one for one in order if one.priority < least + newest_first]
        if displaced is None:
            assert len(after) < len(group)
            assert list(line.in_order()) == order
        else:
            assert set(displaced) == set(order[len(order) - len(group) :])
            assert set(displaced) <= set(after)
            assert len(line) == 6


# ---- how many run


def limit_of(clock: Clock, **config: Any) -> ConcurrencyLimit:
    return ConcurrencyLimit(ConcurrencySection(**config), clock)


def run_batches(
    limit: ConcurrencyLimit, clock: Clock, seconds: float, parallel: int, size: int = 8
) -> int:
    """Keep as many batches running as may, where so many are served side by side in 10 ms."""
    end_s = clock.now_s + seconds
    ends: list[tuple[float, float]] = []
    free_s = [clock.now_s] * parallel
    while clock.now_s < end_s:
        while len(ends) < limit.value:
            first = min(range(parallel), key=lambda at: free_s[at])
            free_s[first] = max(free_s[first], clock.now_s) + 0.01
            ends.append((free_s[first], clock.now_s))
        ends.sort()
        clock.now_s, started_s = ends.pop(0)
        limit.finished(size, started_s, someone_waits=True)
    return limit.value


def test_a_fixed_limit_stays(clock: Clock) -> None:
    limit = limit_of(clock, mode="fixed", min=1, max=7)
    assert run_batches(limit, clock, 3.0, parallel=1) == 7


@pytest.mark.parametrize("parallel", [1, 2, 16, 40])
def test_the_limit_follows_what_the_shards_do_side_by_side(clock: Clock, parallel: int) -> None:
    limit = limit_of(clock)
    assert limit.value == 4
    values = [run_batches(limit, clock, 0.99, parallel) for _ in range(35)]
    for at, value in enumerate(values):
        # It begins anew three times, and never grows from one time to the next.
        if at % 10 > 2:
            assert max(parallel, 4) <= value <= max(2 * parallel, 8), (at, values)


def test_the_limit_does_not_grow_while_nobody_waits_and_falls_when_shards_slow_down(
    clock: Clock,
) -> None:
    limit = limit_of(clock, min=2)
    for _ in range(100):
        started_s = clock.now_s
        clock.now_s += 0.01
        limit.finished(1, started_s, someone_waits=False)
    assert limit.value == 2
    assert run_batches(limit, clock, 1.0, parallel=8) >= 8
    for _ in range(60):
        started_s = clock.now_s
        clock.now_s += 0.1
        limit.finished(8, started_s, someone_waits=True)
    assert limit.value == 2


def test_a_batch_is_compared_with_batches_of_its_size(clock: Clock) -> None:
    limit = limit_of(clock)
    for _ in range(130):
        for size, spent_s in ((1, 0.001), (60, 0.03)):
            started_s = clock.now_s
            clock.now_s += spent_s
            limit.finished(size, started_s, someone_waits=True)
    assert limit.value == 64


# ---- tenants


def test_a_tenant_may_save_up_one_second(clock: Clock) -> None:
    limits = TenantLimits({"a": TenantSection(qps=3, priority=2)}, clock)
    clock.now_s += 60
    for _ in range(3):
        limits.take("a")
    with pytest.raises(Overloaded, match="tenant 'a' has used up its 3 requests per second") as it:
        limits.take("a")
    assert it.value.retry_after_s == pytest.approx(1 / 3)
    clock.now_s += it.value.retry_after_s
    limits.take("a")
    with pytest.raises(Overloaded):
        limits.take("a")
    limits.give_back("a")
    limits.take("a")
    assert (limits.priority_of("a"), limits.priority_of("b")) == (2, 0)


def test_less_than_one_request_per_second_is_possible(clock: Clock) -> None:
    limits = TenantLimits({"a": TenantSection(qps=0.25)}, clock)
    limits.take("a")
    with pytest.raises(Overloaded) as raised:
        limits.take("a")
    assert raised.value.retry_after_s == pytest.approx(4.0)


def test_names_that_are_made_up_get_no_bucket_of_their_own(clock: Clock) -> None:
    free = TenantLimits({"a": TenantSection(qps=1)}, clock)
    for at in range(1000):
        free.take(f"tenant-{at}")
    limited = TenantLimits({"default": TenantSection(qps=2)}, clock)
    limited.take("x")
    limited.take("y")
    with pytest.raises(Overloaded, match="tenant 'default'"):
        limited.take("z")
    assert len(limited._left) == 1


# ---- all together


def admission_of(clock: Clock, **config: Any) -> Admission[Ticket]:
    concurrency = ConcurrencySection(mode="fixed", min=1, max=2)
    section = AdmissionSection(**{"queue": 4, "concurrency": concurrency, **config})
    return Admission(section, max_batch=2, target_delay_s=0.005, clock=clock)


def test_a_router_is_hot_after_it_was_busy_for_a_while_and_cools_down(clock: Clock) -> None:
    admission = admission_of(clock)
    assert not admission.is_hot()
    started_s = [admission.started(1), admission.started(1)]
    clock.now_s += 0.1
    # A burst is no load.
    assert not admission.is_hot()
    clock.now_s += 0.1
    assert admission.is_hot()
    assert admission.load == pytest.approx(0.8647, abs=1e-3)
    assert admission.is_hot()
    admission.ended(2, started_s[0], answered=True)
    clock.now_s += 1
    assert admission.load == pytest.approx(0.5, abs=1e-3)
    assert not admission.is_hot()
    admission.ended(2, started_s[1], answered=True)
    clock.now_s += 1
    assert admission.load < 0.01


def test_batches_that_are_too_large_to_be_in_time_become_smaller_and_grow_again(
    clock: Clock,
) -> None:
    admission: Admission[Ticket] = Admission(
        AdmissionSection(), max_batch=8, target_delay_s=0.005, clock=clock
    )

    def ended(size: int, *, late: bool) -> int:
        clock.now_s += 0.01
        admission.ended(size, admission.started(size), answered=True, late=late)
        return admission.largest

    assert admission.largest == 8
    assert ended(8, late=True) == 4
    # Others of that size were on their way.
    assert ended(8, late=True) == 4
    assert [ended(3, late=False), ended(4, late=False), ended(5, late=False)] == [4, 5, 6]
    assert [ended(size, late=True) for size in (6, 3, 1, 1)] == [3, 1, 1, 1]
    assert [ended(size, late=False) for size in (1, 2, 3, 4, 5, 6, 7, 8)][-2:] == [8, 8]
    # The size of a small one was not the reason.
    assert [ended(1, late=True), ended(4, late=True)] == [8, 8]
    assert ended(5, late=True) == 2


def test_the_delay_is_the_time_until_those_that_wait_are_served(clock: Clock) -> None:
    admission = admission_of(clock)
    assert admission.retry_after_s() == 0.01
    first = admission.started(1)
    clock.now_s += 0.2
    admission.ended(2, first, answered=True)
    admission.started(1)
    admission.started(1)
    assert admission.admit([ticket(), ticket(), ticket()]) == []
    # Two batches of 0.2 s, two at a time.
    assert admission.retry_after_s() == pytest.approx(0.2)
    assert admission.admit([ticket()]) == []
    with pytest.raises(Overloaded, match="4 of at most 4 requests are waiting") as raised:
        admission.admit([ticket()])
    assert raised.value.retry_after_s == pytest.approx(0.3)
    assert admission.dropped.refused == {"queue": 1}


def test_what_came_to_no_end_of_its_own_tells_nothing_of_the_time_of_a_batch(clock: Clock) -> None:
    admission = admission_of(clock)
    started_s = admission.started(1)
    clock.now_s += 5
    admission.ended(2, started_s, answered=False)
    admission.started(1)
    admission.started(1)
    assert admission.retry_after_s() == 0.01
    assert admission.admit([ticket(deadline_s=clock.now_s + 0.001)]) == []


def test_those_that_cannot_be_done_in_time_leave_with_the_reason(clock: Clock) -> None:
    admission = admission_of(clock)
    first = admission.started(1)
    clock.now_s += 0.2
    admission.ended(2, first, answered=True)
    admission.started(1)
    admission.started(1)
    now_s = clock.now_s
    late, tight, enough = (ticket(deadline_s=now_s + left_s) for left_s in (0.0, 0.39, 0.41))
    leaving = dict(admission.admit([late, tight, enough]))
    assert isinstance(leaving[late], DeadlineExceeded)
    assert isinstance(leaving[tight], Overloaded)
    assert list(leaving) == [late, tight]
    assert list(admission.line.in_order()) == [enough]
    clock.now_s += 0.2
    (gone,) = admission.sweep()
    assert gone[0] is enough
    assert len(admission.line) == 0
    assert admission.dropped.refused == {"deadline": 2}
    assert admission.dropped.expired == {"queue": 1}

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from silvershard.cluster.arrivals import Stretch, arrivals
from silvershard.cluster.histogram import Histogram
from silvershard.cluster.load import (
    DEADLINE_EXCEEDED,
    IN_FLIGHT_LIMIT,
    OK,
    SENT_TOO_LATE,
    Entry,
    Journal,
    OpenLoop,
    Reply,
    Send,
)

SERVICE_S = 0.005


class StallingServer:
    """Answers one request after the other, 5 ms each, and nothing at all during a stall."""

    def __init__(self, loop: Any, begin_s: float, end_s: float) -> None:
        self._loop = loop
        self._stall = loop.time() + begin_s, loop.time() + end_s
        self._turn = asyncio.Lock()

    async def answer(self) -> None:
        async with self._turn:
            now_s = self._loop.time()
            if self._stall[0] <= now_s < self._stall[1]:
                await asyncio.sleep(self._stall[1] - now_s)
            await asyncio.sleep(SERVICE_S)

    async def send(self, number: int, timeout_s: float) -> Reply:
        try:
            async with asyncio.timeout(timeout_s):
                await self.answer()
        except TimeoutError:
            return Reply(DEADLINE_EXCEEDED, b"")
        return Reply(OK, str(number).encode())


@pytest.fixture
def journal() -> Iterator[Journal]:
    with Journal() as made:
        yield made


@pytest.fixture
def put(virtual: Any, journal: Journal) -> Callable[..., list[Entry]]:
    """Puts a load at 100 requests per second on a virtual clock and returns what came of it."""

    def run(
        send: Send, *, seconds: float = 1.0, deadline_s: float = 10.0, limit: int = 10_000
    ) -> list[Entry]:
        loop = OpenLoop(
            send, journal, deadline_s=deadline_s, max_in_flight=limit, clock=virtual.time
        )
        due = arrivals([Stretch(seconds, 100, 100)], poisson=False, seed=0)
        virtual.run_until_complete(loop.run(enumerate(due), virtual.time()))
        return list(journal.entries())

    return run


def latencies(entries: list[Entry]) -> Histogram:
    found = Histogram()
    for one in entries:
        found.add(one.done_s - one.at_s)
    return found


def test_a_stall_shows_in_the_percentiles_although_a_closed_loop_hides_it(
    virtual: Any, put: Callable[..., list[Entry]]
) -> None:
    server = StallingServer(virtual, 10.0, 12.0)
    entries = put(server.send, seconds=20.0)
    assert len(entries) == 2000
    # Nobody is served for 2 s of 20, and the queue of those 2 s takes 2 s more: a fifth waits.
    opened = latencies(entries)
    assert opened.quantile(0.99) == pytest.approx(2.0, abs=0.15)
    assert opened.quantile(0.9) == pytest.approx(1.0, abs=0.15)

    async def ask_in_turn() -> Histogram:
        closed, stalling = Histogram(), StallingServer(virtual, 10.0, 12.0)
        end_s = virtual.time() + 20.0
        while (began_s := virtual.time()) < end_s:
            await stalling.answer()
            closed.add(virtual.time() - began_s)
        return closed

    hidden = virtual.run_until_complete(ask_in_turn())
    assert hidden.quantile(0.99) == pytest.approx(SERVICE_S, rel=0.01)


def test_requests_go_out_when_they_are_due_whatever_became_of_others(
    put: Callable[..., list[Entry]],
) -> None:
    async def never(number: int, timeout_s: float) -> Reply:
        await asyncio.sleep(timeout_s)
        return Reply(DEADLINE_EXCEEDED, b"")

    entries = put(never, seconds=3.0, deadline_s=1.0)
    assert [one.sent_s for one in entries] == pytest.approx([n / 100 for n in range(300)])
    assert {one.code for one in entries} == {DEADLINE_EXCEEDED}
    assert [one.done_s - one.at_s for one in entries] == pytest.approx([1.0] * 300)


def test_no_more_are_in_flight_than_may_be_and_the_others_are_told_of(
    put: Callable[..., list[Entry]],
) -> None:
    running, most = 0, 0

    async def slow(number: int, timeout_s: float) -> Reply:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.5)
        running -= 1
        return Reply(OK, b"")

    entries = put(slow, limit=10)
    assert most == 10
    assert Counter(one.code for one in entries) == {OK: 20, IN_FLIGHT_LIMIT: 80}
    assert len(entries) == 100


def test_the_deadline_counts_from_when_a_request_was_due(
    virtual: Any, put: Callable[..., list[Entry]]
) -> None:
    asked: dict[int, float] = {}

    async def answer(number: int, timeout_s: float) -> Reply:
        asked[number] = timeout_s
        if number == 0:
            # Whoever keeps the generator busy makes the next ones late.
            virtual.now_s += 0.3
        return Reply(OK, b"")

    entries = put(answer, deadline_s=0.25)
    codes = {one.number: one.code for one in entries}
    assert asked[0] == pytest.approx(0.25)
    assert codes[1] == SENT_TOO_LATE
    assert codes[99] == OK
    late = next(number for number in sorted(asked) if number)
    assert 0 < asked[late] < 0.05
    assert entries[late].sent_s == pytest.approx(0.3)


def test_one_that_ignores_its_deadline_does_not_hold_up_the_end(
    virtual: Any, put: Callable[..., list[Entry]]
) -> None:
    async def hang(number: int, timeout_s: float) -> Reply:
        await asyncio.Event().wait()
        raise AssertionError

    began_s = virtual.time()
    entries = put(hang, deadline_s=1.0)
    assert {one.code for one in entries} == {DEADLINE_EXCEEDED}
    assert virtual.time() - began_s < 4.0


def test_a_load_that_is_stopped_keeps_what_was_answered(virtual: Any, journal: Journal) -> None:
    async def answer(number: int, timeout_s: float) -> Reply:
        await asyncio.sleep(0.095)
        return Reply(OK, b"")

    async def run() -> OpenLoop:
        loop = OpenLoop(answer, journal, deadline_s=1.0, max_in_flight=100, clock=virtual.time)
        virtual.call_later(0.502, loop.stop)
        due = arrivals([Stretch(3600, 100, 100)], poisson=False, seed=0)
        await loop.run(enumerate(due), virtual.time())
        return loop

    began_s = virtual.time()
    loop = virtual.run_until_complete(run())
    assert virtual.time() - began_s < 0.6
    assert (len(journal), loop.cut_short) == (41, 10)
    assert {one.code for one in journal.entries()} == {OK}


def test_a_load_may_be_stopped_before_it_begins(virtual: Any, journal: Journal) -> None:
    async def answer(number: int, timeout_s: float) -> Reply:
        return Reply(OK, b"")

    loop = OpenLoop(answer, journal, deadline_s=1.0, max_in_flight=1, clock=virtual.time)
    loop.stop()
    virtual.run_until_complete(loop.run(enumerate([0.0]), virtual.time()))
    assert len(journal) == 0


def test_what_goes_wrong_while_sending_is_raised(put: Callable[..., list[Entry]]) -> None:
    async def fail(number: int, timeout_s: float) -> Reply:
        if number == 7:
            raise OSError("no room")
        return Reply(OK, b"")

    with pytest.raises(OSError, match="no room"):
        put(fail)


def test_a_journal_gives_back_every_entry_in_order() -> None:
    entries = [
        Entry(number, number / 7, number / 7 + 1e-9, number + 0.25, code, bytes([number]) * number)
        for number, code in enumerate([OK, "UNAVAILABLE", OK, IN_FLIGHT_LIMIT])
    ]
    with Journal() as journal:
        for one in reversed(entries):
            journal.add(one)
        assert list(journal.entries()) == entries
        assert list(journal.entries()) == entries

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from silvershard.cluster.batcher import Batcher
from silvershard.cluster.consistency import ANY, Consistency, UpdateToken
from silvershard.cluster.coordinator import Query
from silvershard.model.request import Request
from silvershard.shard.errors import Overloaded


class Runner:
    """Answers a query with its k, when it is let go."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.cancelled = 0
        self.error: Exception | None = None

    async def run(self, queries: Sequence[Query]) -> list[Any]:
        self.batches.append([query.request.k for query in queries])
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        if self.error is not None:
            raise self.error
        return [query.request.k for query in queries]


@pytest.fixture
def runner() -> Runner:
    return Runner()


def make(virtual: Any, **options: Any) -> Batcher:
    settings = {"max_batch": 4, "max_delay_s": 0.5, "max_running": 2, "queue": 6}
    return Batcher(**{**settings, **options}, clock=virtual.time)


def query(virtual: Any, k: int, remaining_s: float = 2.0) -> Query:
    return Query(Request(k=k), 0.9, virtual.time() + remaining_s, virtual.time())


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def test_requests_of_one_call_are_answered_in_order(virtual: Any, runner: Runner) -> None:
    batcher = make(virtual)
    queries = [query(virtual, k) for k in range(3)]
    assert virtual.run_until_complete(batcher.submit(queries, runner.run)) == [0, 1, 2]
    assert runner.batches == [[0, 1, 2]]


def test_while_nothing_runs_nothing_waits(virtual: Any, runner: Runner) -> None:
    batcher = make(virtual)
    before_s = virtual.time()
    virtual.run_until_complete(batcher.submit([query(virtual, 1)], runner.run))
    assert virtual.time() == before_s


def test_requests_wait_for_neighbours_while_others_run(virtual: Any, runner: Runner) -> None:
    batcher = make(virtual)

    async def scene() -> None:
        runner.gate.clear()
        first = asyncio.ensure_future(batcher.submit([query(virtual, 1)], runner.run))
        await settle()
        others = [
            asyncio.ensure_future(batcher.submit([query(virtual, k)], runner.run)) for k in (2, 3)
        ]
        await settle()
        assert runner.batches == [[1]]
        await asyncio.sleep(0.49)
        assert runner.batches == [[1]]
        await asyncio.sleep(0.02)
        assert runner.batches == [[1], [2, 3]]
        runner.gate.set()
        assert await asyncio.gather(first, *others) == [[1], [2], [3]]

    virtual.run_until_complete(scene())


def test_a_full_batch_starts_at_once_and_none_is_larger(virtual: Any, runner: Runner) -> None:
    batcher = make(virtual)

    async def scene() -> None:
        runner.gate.clear()
        first = asyncio.ensure_future(batcher.submit([query(virtual, 0)], runner.run))
        await settle()
        rest = asyncio.ensure_future(
            batcher.submit([query(virtual, k) for k in range(1, 7)], runner.run)
        )
        await settle()
        assert runner.batches == [[0], [1, 2, 3, 4]]
        runner.gate.set()
        await asyncio.gather(first, rest)
        assert runner.batches[2] == [5, 6]

    virtual.run_until_complete(scene())


def test_a_full_queue_refuses_with_a_delay_and_runs_nothing(virtual: Any, runner: Runner) -> None:
    batcher = make(virtual, max_running=1, queue=2)

    async def scene() -> None:
        runner.gate.clear()
        running = asyncio.ensure_future(batcher.submit([query(virtual, 0)], runner.run))
        await settle()
        waiting = asyncio.ensure_future(
            batcher.submit([query(virtual, 1), query(virtual, 2)], runner.run)
        )
        await settle()
        with pytest.raises(Overloaded) as raised:
            await batcher.submit([query(virtual, 3)], runner.run)
        assert 0.01 <= raised.value.retry_after_s <= 1.0
        runner.gate.set()
        await asyncio.gather(running, waiting)
        assert await batcher.submit([query(virtual, 4)], runner.run) == [4]
        assert runner.batches == [[0], [1, 2], [4]]

    virtual.run_until_complete(scene())


def test_requests_that_come_together_are_admitted_together_or_not_at_all(
    virtual: Any, runner: Runner
) -> None:
    batcher = make(virtual, max_running=1, queue=6)

    def submit(*numbers: int) -> Any:
        queries = [query(virtual, k) for k in numbers]
        return asyncio.ensure_future(batcher.submit(queries, runner.run))

    async def scene() -> None:
        runner.gate.clear()
        # Nothing waits yet, so as many as the queue holds fit; four of them start at once.
        first = submit(*range(6))
        await settle()
        with pytest.raises(Overloaded, match="2 of at most 6 requests are waiting"):
            await submit(*range(10, 15))
        second = submit(*range(20, 24))
        await settle()
        with pytest.raises(Overloaded, match="6 of at most 6"):
            await submit(30)
        runner.gate.set()
        assert await first == list(range(6))
        assert await second == list(range(20, 24))
        ran = [k for batch in runner.batches for k in batch]
        assert ran == [*range(6), *range(20, 24)]

    virtual.run_until_complete(scene())


def test_requests_whose_callers_have_left_hold_no_place_in_the_queue(
    virtual: Any, runner: Runner
) -> None:
    batcher = make(virtual, max_running=1, queue=2)

    async def scene() -> None:
        runner.gate.clear()
        tasks = [
            asyncio.ensure_future(batcher.submit([query(virtual, k)], runner.run)) for k in range(3)
        ]
        await settle()
        tasks[1].cancel()
        await settle()
        late = asyncio.ensure_future(batcher.submit([query(virtual, 9)], runner.run))
        await settle()
        runner.gate.set()
        assert await late == [9]
        assert await tasks[2] == [2]

    virtual.run_until_complete(scene())


def test_requests_with_little_time_do_not_hurry_their_neighbours(
    virtual: Any, runner: Runner
) -> None:
    batcher = make(virtual)
    queries = [query(virtual, k, remaining_s) for k, remaining_s in enumerate((8, 1, 9, 1.5, 0))]
    fates = virtual.run_until_complete(batcher.submit(queries, runner.run))
    assert fates == [0, 1, 2, 3, 4]
    assert runner.batches == [[0, 2], [1, 3], [4]]


def test_batches_are_of_one_generation(virtual: Any, runner: Runner) -> None:
    other = Runner()
    batcher = make(virtual, max_running=1)

    async def scene() -> None:
        runner.gate.clear()
        tasks = [
            asyncio.ensure_future(batcher.submit([query(virtual, k)], one.run))
            for k, one in enumerate((runner, runner, other, runner))
        ]
        await settle()
        runner.gate.set()
        await asyncio.gather(*tasks)

    virtual.run_until_complete(scene())
    assert runner.batches == [[0], [1, 3]]
    assert other.batches == [[2]]


def test_a_cancelled_request_leaves_the_queue(virtual: Any, runner: Runner) -> None:
    batcher = make(virtual, max_running=1)

    async def scene() -> None:
        runner.gate.clear()
        running = asyncio.ensure_future(batcher.submit([query(virtual, 0)], runner.run))
        await settle()
        waiting = [
            asyncio.ensure_future(batcher.submit([query(virtual, k)], runner.run)) for k in (1, 2)
        ]
        await settle()
        waiting[0].cancel()
        await settle()
        runner.gate.set()
        assert await running == [0]
        assert await waiting[1] == [2]
        assert runner.batches == [[0], [2]]

    virtual.run_until_complete(scene())


def test_a_batch_is_cancelled_when_nobody_waits_for_it_any_more(
    virtual: Any, runner: Runner
) -> None:
    batcher = make(virtual)

    async def scene() -> None:
        runner.gate.clear()
        both = [query(virtual, 0), query(virtual, 1)]
        alone = asyncio.ensure_future(batcher.submit(both, runner.run))
        await settle()
        alone.cancel()
        await settle()
        assert runner.cancelled == 1
        tasks = [
            asyncio.ensure_future(batcher.submit([query(virtual, k)], runner.run)) for k in (2, 3)
        ]
        await asyncio.sleep(1)
        tasks[0].cancel()
        await settle()
        runner.gate.set()
        assert await tasks[1] == [3]

    virtual.run_until_complete(scene())


def test_an_error_of_the_run_is_the_fate_of_each(virtual: Any, runner: Runner) -> None:
    batcher = make(virtual)
    runner.error = ZeroDivisionError()
    fates = virtual.run_until_complete(
        batcher.submit([query(virtual, 0), query(virtual, 1)], runner.run)
    )
    assert fates == [runner.error, runner.error]


def demanding(virtual: Any, k: int) -> Query:
    return replace(query(virtual, k), consistency=Consistency((UpdateToken(9, 0, k),)))


def test_nobody_waits_for_the_updates_of_others(virtual: Any, runner: Runner) -> None:
    batcher = make(virtual, max_running=4, max_batch=2)
    waits = Runner()
    waits.gate.clear()

    async def run(queries: Sequence[Query]) -> list[Any]:
        kind = waits if queries[0].consistency != ANY else runner
        return await kind.run(queries)

    async def scene() -> None:
        late = asyncio.ensure_future(batcher.submit([demanding(virtual, k) for k in range(5)], run))
        await settle()
        # Half of what may run is left to those that demand nothing.
        assert waits.batches == [[0, 1], [2, 3]]
        assert await batcher.submit([query(virtual, 7)], run) == [7]
        assert not late.done()
        waits.gate.set()
        assert await late == [0, 1, 2, 3, 4]
        assert waits.batches == [[0, 1], [2, 3], [4]]
        assert await batcher.submit([demanding(virtual, 5), query(virtual, 6)], run) == [5, 6]
        assert (waits.batches[-1], runner.batches[-1]) == ([5], [6])

    virtual.run_until_complete(scene())


def test_even_the_only_batch_that_may_run_may_wait_for_updates(
    virtual: Any, runner: Runner
) -> None:
    batcher = make(virtual, max_running=1)
    assert virtual.run_until_complete(batcher.submit([demanding(virtual, 3)], runner.run)) == [3]

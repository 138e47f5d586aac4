import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest

from silvershard.cluster.group_commit import (
    MAX_GROUP,
    MAX_GROUP_BYTES,
    Backlog,
    GroupCommit,
    decided,
    groups_of,
)
from silvershard.cluster.sequencer import Outcome, Write
from silvershard.shard.errors import DeadlineExceeded, Fenced, LogUnavailable, StateError

LATER_S = 1e9


def writes(*item_ids: int) -> list[Write]:
    return [
        Write(at, "delete", item_id, "", 0, None, False, 0, b"", 0, 0)
        for at, item_id in enumerate(item_ids)
    ]


class Store:
    """Logs the groups that it is given, one at a time, when the test lets it."""

    def __init__(self) -> None:
        self.groups: list[list[list[int]]] = []
        self.turn = threading.Semaphore(0)
        self.error: Exception | None = None
        self.now_s = 0.0

    def commit(self, calls: Sequence[Sequence[Write]]) -> list[Outcome]:
        self.groups.append([[one.item_id for one in call] for call in calls])
        assert self.turn.acquire(timeout=10)
        if self.error is not None:
            raise self.error
        return [Outcome(sum(len(call) for call in calls[: at + 1]), ()) for at in range(len(calls))]


@asynccontextmanager
async def queue_of(store: Store) -> AsyncIterator[GroupCommit]:
    queue = GroupCommit(store.commit, clock=lambda: store.now_s)
    task = asyncio.create_task(queue.run())
    try:
        yield queue
    finally:
        task.cancel()
        store.turn.release(1000)
        queue.close(StateError("ended"))


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.001)


def test_what_arrives_during_an_append_shares_the_next_one(run: Any) -> None:
    async def scene() -> None:
        store = Store()
        async with queue_of(store) as queue:
            first = queue.submit(writes(1), LATER_S, urgent=False)
            await until(lambda: len(store.groups) == 1)
            rest = [queue.submit(writes(at, at), LATER_S, urgent=False) for at in (2, 3)]
            rest.append(queue.submit(writes(4), LATER_S, urgent=True))
            store.turn.release(2)
            assert await first == (1, ())
            assert [one.position for one in await asyncio.gather(*rest)] == [3, 5, 1]
            assert store.groups == [[[1]], [[4], [2, 2], [3, 3]]]

    run(scene())


def test_a_group_has_a_limit_and_keeps_the_order(run: Any) -> None:
    async def scene() -> None:
        store = Store()
        async with queue_of(store) as queue:
            queue.submit(writes(0), LATER_S, urgent=False)
            await until(lambda: len(store.groups) == 1)
            large = [
                queue.submit(writes(*range(size)), LATER_S, urgent=False)
                for size in (MAX_GROUP, 600, 400, 100)
            ]
            store.turn.release(10)
            await asyncio.gather(*large)
            sizes = [[len(call) for call in group] for group in store.groups[1:]]
            assert sizes == [[MAX_GROUP], [600, 400], [100]]

    run(scene())


def heavy(count: int, size: int) -> list[Write]:
    """Writes of ``size`` bytes each."""
    return [one._replace(body=b"x" * size) for one in writes(*range(count))]


def test_a_group_has_a_limit_of_bytes_too(run: Any) -> None:
    async def scene() -> None:
        store = Store()
        async with queue_of(store) as queue:
            queue.submit(writes(0), LATER_S, urgent=False)
            await until(lambda: len(store.groups) == 1)
            half = MAX_GROUP_BYTES // 2
            large = [
                queue.submit(heavy(1, size), LATER_S, urgent=False)
                for size in (half, half, half, half + 1, 3 * half, 1)
            ]
            store.turn.release(10)
            await asyncio.gather(*large)
            assert [len(group) for group in store.groups[1:]] == [2, 1, 1, 1, 1]

    run(scene())


def test_a_call_is_split_into_groups_by_count_and_bytes() -> None:
    def sizes(given: list[Write]) -> list[int]:
        parts = list(groups_of(given))
        assert [one for part in parts for one in part] == given
        return [len(part) for part in parts]

    third = MAX_GROUP_BYTES // 3
    assert sizes([]) == []
    assert sizes(heavy(2 * MAX_GROUP + 1, 1)) == [MAX_GROUP, MAX_GROUP, 1]
    assert sizes(heavy(7, third)) == [3, 3, 1]
    assert sizes([*heavy(1, 1), *heavy(2, 4 * third), *heavy(2, 1)]) == [1, 1, 1, 2]


def test_a_backlog_has_room_by_count_and_bytes_and_for_anything_alone(run: Any) -> None:
    async def scene() -> None:
        backlog = Backlog(10, 100)
        assert backlog.fits(11, 101)
        backlog.add(2, 60)
        assert backlog.fits(8, 40)
        assert not backlog.fits(9, 1)
        assert not backlog.fits(1, 41)
        waiting = asyncio.create_task(backlog.until_fits(1, 41))
        backlog.add(1, 1)
        backlog.remove(1, 1)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert not waiting.done()
        backlog.remove(2, 60)
        await asyncio.wait_for(waiting, 5)
        assert (backlog.updates, backlog.bytes) == (0, 0)

    run(scene())


def test_what_nobody_waits_for_is_not_committed(run: Any) -> None:
    async def scene() -> None:
        store = Store()
        async with queue_of(store) as queue:
            first = queue.submit(writes(1), LATER_S, urgent=False)
            await until(lambda: len(store.groups) == 1)
            late = queue.submit(writes(2), 5.0, urgent=False)
            gone = queue.submit(writes(3), LATER_S, urgent=False)
            last = queue.submit(writes(4), LATER_S, urgent=False)
            gone.cancel()
            store.now_s = 5.0
            store.turn.release(2)
            await asyncio.gather(first, last)
            with pytest.raises(DeadlineExceeded, match="nothing of it is logged"):
                await late
            assert store.groups == [[[1]], [[4]]]

    run(scene())


def test_a_failure_is_that_of_all_calls_of_the_append_and_of_no_other(run: Any) -> None:
    async def scene() -> None:
        store = Store()
        store.error = LogUnavailable("sqlite:///log", "is full")
        async with queue_of(store) as queue:
            failed = [queue.submit(writes(at), LATER_S, urgent=False) for at in (1, 2)]
            store.turn.release()
            for one in failed:
                with pytest.raises(LogUnavailable):
                    await one
            store.error = None
            store.turn.release()
            assert await queue.submit(writes(3), LATER_S, urgent=False) == (1, ())

    run(scene())


def test_other_work_runs_between_appends(run: Any) -> None:
    async def scene() -> None:
        store = Store()
        async with queue_of(store) as queue:
            first = queue.submit(writes(1), LATER_S, urgent=False)
            await until(lambda: len(store.groups) == 1)
            work = queue.call(lambda: len(store.groups))
            assert not work.done()
            store.turn.release()
            assert await work == 1
            await first

    run(scene())


def test_closing_fails_what_waits(run: Any) -> None:
    async def scene() -> None:
        store = Store()
        async with queue_of(store) as queue:
            queue.submit(writes(1), LATER_S, urgent=False)
            await until(lambda: len(store.groups) == 1)
            waiting = queue.submit(writes(2), LATER_S, urgent=False)
            queue.close(StateError("ended"))
            with pytest.raises(StateError, match="ended"):
                await waiting

    run(scene())


def test_a_call_of_several_pieces_says_whether_any_of_it_is_logged() -> None:
    logged, late = Outcome(3, ()), DeadlineExceeded("nothing of it is logged")
    assert decided([logged, logged], "u") == [logged, logged]
    with pytest.raises(DeadlineExceeded, match=r"^nothing of it is logged$"):
        decided([late, late], "u")
    with pytest.raises(DeadlineExceeded, match=r"a part of it is logged$"):
        decided([late, logged], "u")


def test_what_is_worse_than_to_be_late_is_said_instead() -> None:
    late, unknown = DeadlineExceeded("late"), LogUnavailable("redis://a", "is away")
    fenced = Fenced(0, 1, 2)
    for outcomes in ([late, unknown], [unknown, Outcome(3, ())]):
        with pytest.raises(LogUnavailable):
            decided(outcomes, "u")
    # Who is told that the log was lost may send the call to the next sequencer.
    for outcomes in ([fenced], [late, fenced], [fenced, fenced]):
        with pytest.raises(Fenced):
            decided(outcomes, "u")
    for outcomes in ([unknown, fenced], [fenced, Outcome(3, ())]):
        with pytest.raises(LogUnavailable, match=r"log u: .* some of the call may be logged"):
            decided(outcomes, "u")

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from silvershard.cluster import shard_pb2
from silvershard.cluster.codec import Refusal
from silvershard.cluster.consistency import Consistency, UpdateToken
from silvershard.cluster.follower import UpdateCounts
from silvershard.cluster.freshness import Demand, Lag, Seen
from silvershard.cluster.hosting import (
    Hosted,
    Hosting,
    HostState,
    Loaded,
    ready,
    seen_from,
    seen_to,
)
from silvershard.model.request import RequestError
from silvershard.shard.errors import (
    GenerationError,
    LogTrimmed,
    Overloaded,
    ReplicaStale,
    ShardUnavailable,
    SnapshotError,
    StateError,
)
from silvershard.shard.page_pool import PoolUsage

LOG = 9


class Spec:
    def __init__(self, generation: int) -> None:
        self.generation = generation


class Executor:
    shard = 0
    documents = 5

    def __init__(self, generation: int) -> None:
        self.spec = Spec(generation)
        self.cut: tuple[int, ...] = ()
        self.threads: list[str] = []
        self.tidied: list[str] = []

    def apply(self, prepared: Any, cut: tuple[int, ...]) -> list[Any]:
        self.tidy_up()
        return self.commit(prepared, cut)

    def tidy_up(self) -> None:
        self.tidied.append(threading.current_thread().name)

    def commit(self, prepared: Any, cut: tuple[int, ...]) -> list[Any]:
        self.threads.append(threading.current_thread().name)
        if isinstance(prepared, Exception):
            raise prepared
        self.cut = cut
        return []

    def usage(self) -> PoolUsage:
        return PoolUsage(10, 4, 5, 1, 20, 3, 1.5, 0)


class Follows:
    """A follower that does what the test says."""

    log_id = LOG
    staleness_s = 0.25

    def __init__(self, commit: Any) -> None:
        self.commit = commit
        self.refused = ((11, "no room for its values"), (-1, "no such table"))
        self.lag = Lag((0,), (7,), 0.0, 0.0, refused=self.refused)
        self.counts = UpdateCounts(batches=2, records=9, urgent=1, rejected=3)
        self.failure = self.trouble = ""
        self.progressed: Callable[[], None] = lambda: None
        self.started = self.stopped = False
        self.hurried = 0
        self.may_catch_up = threading.Event()
        self.may_catch_up.set()
        self.error: Exception | None = None

    def catch_up(self) -> None:
        assert self.may_catch_up.wait(10)
        if self.error is not None:
            raise self.error
        self.commit("backlog", (7,))

    def hurry(self) -> None:
        self.hurried += 1

    def start(self, progressed: Callable[[], None]) -> None:
        self.started = True
        self.progressed = progressed

    def stop(self) -> None:
        self.stopped = True


class Bench:
    """A hosting whose generations the test loads."""

    def __init__(self) -> None:
        self.model = ThreadPoolExecutor(1, thread_name_prefix="model")
        self.executors: dict[int, Executor] = {}
        self.followers: dict[int, Follows] = {}
        self.errors: dict[str, Exception] = {}
        self.may_load = threading.Event()
        self.may_load.set()
        self.may_catch_up = threading.Event()
        self.may_catch_up.set()
        self.changes = 0
        self.loads: list[int] = []
        self.loading = self.most_loading = 0
        self.checks = False
        self.now_s: Callable[[], float] = time.monotonic
        self.hosting = Hosting(0, self.model.submit, lambda: self.now_s(), self.load, self.changed)

    def changed(self) -> None:
        self.changes += 1

    def load(self, path: Path, check: Callable[[], None] = lambda: None) -> Loaded:
        self.loads.append(int(path.name))
        self.loading += 1
        self.most_loading = max(self.most_loading, self.loading)
        try:
            assert self.may_load.wait(10)
            if self.checks:
                check()
        finally:
            self.loading -= 1
        if str(path) in self.errors:
            raise self.errors[str(path)]
        generation = int(path.name)
        executor: Any = self.executors.setdefault(generation, Executor(generation))

        def follow(commit: Any) -> Any:
            follower = self.followers.setdefault(generation, Follows(commit))
            follower.commit = commit
            follower.may_catch_up = self.may_catch_up
            return follower

        return Loaded(executor, follow)


@pytest.fixture
def bench() -> Iterator[Bench]:
    made = Bench()
    yield made
    made.model.shutdown()


def until(condition: Callable[[], bool]) -> None:
    end_s = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end_s, "the state that was waited for did not come"
        time.sleep(0.001)


def prepared(bench: Bench, generation: int) -> Hosted:
    hosted = bench.hosting.prepare(generation, f"/s/{generation}")
    until(lambda: hosted.serves)
    return hosted


def test_a_generation_is_loaded_catches_up_and_only_then_serves(bench: Bench) -> None:
    bench.may_load.clear()
    bench.may_catch_up.clear()
    hosted = bench.hosting.prepare(3, "/s/3")
    assert hosted.state is HostState.LOADING
    with pytest.raises(GenerationError, match="generation 3 was asked for, this shard holds 0"):
        bench.hosting.find(3)
    bench.may_load.set()
    until(lambda: hosted.state is HostState.CATCHING_UP)
    with pytest.raises(GenerationError):
        bench.hosting.find(3)
    assert bench.changes == 0
    bench.may_catch_up.set()
    until(lambda: hosted.serves)
    until(lambda: bench.followers[3].started)
    assert bench.hosting.find(3) is hosted
    assert bench.changes == 1
    # Nobody was served yet, so that the model was not held for what was logged before.
    assert bench.executors[3].threads == ["prepare-3"]
    assert hosted.seen == Seen(LOG, (7,), 0.25, 5)


def test_preparing_again_changes_nothing(bench: Bench) -> None:
    hosted = prepared(bench, 3)
    assert bench.hosting.prepare(3, "/s/3") is hosted
    with pytest.raises(StateError, match="is held from /s/3, /elsewhere was asked for"):
        bench.hosting.prepare(3, "/elsewhere")


def test_what_serves_is_changed_on_the_thread_of_the_model(bench: Bench) -> None:
    prepared(bench, 3)
    until(lambda: bench.followers[3].started)
    bench.followers[3].commit("next", (8,))
    assert bench.executors[3].threads[-1].startswith("model")
    assert bench.executors[3].cut == (8,)
    with pytest.raises(ZeroDivisionError):
        bench.followers[3].commit(ZeroDivisionError("odd"), (9,))
    # The cut never moves without its updates.
    assert bench.executors[3].cut == (8,)


def test_a_query_that_waits_passes_between_a_commit_and_its_tidying_up(bench: Bench) -> None:
    prepared(bench, 3)
    until(lambda: bench.followers[3].started)
    executor, done = bench.executors[3], []
    free = threading.Event()
    bench.model.submit(free.wait, 10)
    executor.commit = lambda prepared, cut: done.append("commit") or []  # type: ignore[method-assign,func-returns-value]
    executor.tidy_up = lambda: done.append("tidy up")  # type: ignore[method-assign]
    committing = threading.Thread(target=bench.followers[3].commit, args=("next", (8,)))
    committing.start()
    until(lambda: bench.model._work_queue.qsize() == 1)
    bench.model.submit(done.append, "query")
    free.set()
    committing.join(10)
    assert done == ["commit", "query", "tidy up"]


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (SnapshotError("/s/3", "dense.safetensors is missing"), "dense.safetensors is missing"),
        (MemoryError("no room"), "internal error: MemoryError: no room"),
    ],
)
def test_a_generation_that_cannot_be_loaded_says_why_and_may_be_tried_again(
    bench: Bench, error: Exception, reason: str
) -> None:
    bench.errors["/s/3"] = error
    hosted = bench.hosting.prepare(3, "/s/3")
    until(lambda: hosted.state is HostState.FAILED)
    assert reason in hosted.report().reason
    with pytest.raises(ShardUnavailable, match="generation 3 left service"):
        bench.hosting.find(3)
    bench.errors.clear()
    assert prepared(bench, 3) is not hosted


def test_a_snapshot_of_another_generation_is_refused(bench: Bench) -> None:
    hosted = bench.hosting.prepare(4, "/s/3")
    until(lambda: hosted.state is HostState.FAILED)
    assert hosted.reason == "/s/3 holds generation 3, not 4"


def test_a_log_that_cannot_be_followed_keeps_a_generation_out(bench: Bench) -> None:
    bench.followers[3] = Follows(None)
    bench.followers[3].error = LogTrimmed("test://", 0, 0, 7)
    hosted = bench.hosting.prepare(3, "/s/3")
    until(lambda: hosted.state is HostState.FAILED)
    assert "trimmed up to 7" in hosted.reason
    assert not bench.followers[3].started


def test_a_follower_that_fails_takes_its_generation_out_of_service(bench: Bench) -> None:
    three, four = prepared(bench, 3), prepared(bench, 4)
    until(lambda: bench.followers[3].started and bench.followers[4].started)
    before = bench.changes
    bench.followers[3].failure = "no room"
    bench.followers[3].progressed()
    assert three.state is HostState.FAILED
    assert bench.hosting.served == [four]
    assert bench.changes == before + 1
    with pytest.raises(ShardUnavailable, match="generation 3 left service: no room"):
        bench.hosting.find(3)


def test_a_generation_is_let_go_of_and_its_follower_ends(bench: Bench) -> None:
    prepared(bench, 3)
    four = prepared(bench, 4)
    bench.hosting.retire(3)
    bench.hosting.retire(3)
    bench.hosting.retire(77)
    assert bench.hosting.all == [four]
    until(lambda: bench.followers[3].stopped)
    with pytest.raises(GenerationError, match="generation 3 was asked for, this shard holds 4"):
        bench.hosting.find(3)


def test_what_is_let_go_of_while_it_loads_never_serves(bench: Bench) -> None:
    bench.may_load.clear()
    hosted = bench.hosting.prepare(3, "/s/3")
    bench.hosting.retire(3)
    bench.may_load.set()
    until(lambda: 3 in bench.followers and bench.followers[3].stopped)
    assert bench.hosting.all == []
    assert not hosted.serves


def test_loading_ends_where_it_is_not_wanted_any_more_and_the_next_waits_for_that(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    bench.checks = True
    bench.may_load.clear()
    first = bench.hosting.prepare(3, "/s/3")
    until(lambda: bench.loading == 1)
    bench.hosting.retire(3)
    again = bench.hosting.prepare(3, "/s/3")
    until(lambda: sum(one.name == "prepare-3" for one in threading.enumerate()) == 2)
    # Long enough for a second load to begin, if it did not wait.
    time.sleep(0.05)
    bench.may_load.set()
    until(lambda: again.serves)
    assert bench.loads == [3, 3]
    assert bench.most_loading == 1
    assert (first.executor, first.state) == (None, HostState.LOADING)
    assert "cannot be prepared" not in caplog.text


def test_a_hosting_without_a_loader_refuses_further_generations(bench: Bench) -> None:
    hosting = Hosting(2, bench.model.submit, time.monotonic)
    with pytest.raises(StateError, match="shard 2 was started for its generations alone"):
        hosting.prepare(4, "/s/4")


def test_the_report_holds_what_a_supervisor_needs(bench: Bench) -> None:
    report = prepared(bench, 3).report()
    assert (report.generation, report.snapshot) == (3, "/s/3")
    assert report.state == shard_pb2.GENERATION_STATE_PREPARED
    # That of the refusals, which come after what is applied.
    assert list(report.seen.cut) == [0]
    assert list(report.ends) == [7]
    assert (report.pool.pages, report.pool.free_pages, report.pool.dead_slots) == (10, 4, 20)
    assert (report.pool.longest_list, report.pool.mean_list) == (3, 1.5)
    assert (report.updates.records, report.updates.rejected) == (9, 3)
    assert [(one.item_id, one.reason) for one in report.refused] == [
        (11, "no room for its values"),
        (-1, "no such table"),
    ]
    bench.followers[3].trouble = "the log is away"
    assert bench.hosting.find(3).report().reason == "the log is away"


def test_ready_catches_up_before_anybody_is_served(bench: Bench) -> None:
    loaded = ready(bench.load(Path("/s/3")))
    assert loaded.executor.cut == (7,)


def test_what_was_seen_survives_the_wire() -> None:
    seen = Seen(LOG, (5, 0), 0.25, 10)
    assert seen_from(seen_to(seen)) == seen


# ---- waiting for updates


def demand(position: int, *, wait_s: float = 5.0, **more: Any) -> Demand:
    return Demand(Consistency((UpdateToken(LOG, 0, position),), **more), wait_s)


async def waiting_for(bench: Bench, hosted: Hosted, wanted: Demand) -> asyncio.Task[None]:
    bench.hosting.attach(asyncio.get_running_loop())
    task = asyncio.ensure_future(bench.hosting.wait(hosted, wanted, bench.now_s()))
    await asyncio.sleep(0)
    return task


def test_a_call_waits_for_its_updates_and_not_longer(bench: Bench, run: Any) -> None:
    hosted = prepared(bench, 3)
    until(lambda: bench.followers[3].started)

    async def scene() -> None:
        await bench.hosting.wait(hosted, demand(7), bench.now_s())
        task = await waiting_for(bench, hosted, demand(9))
        assert bench.followers[3].hurried == 1
        for position in (8, 9):
            assert not task.done()
            await asyncio.to_thread(bench.followers[3].commit, "next", (position,))
            await asyncio.to_thread(bench.followers[3].progressed)
        await task

    run(scene())


def test_a_commit_between_the_look_and_the_wait_is_not_missed(
    bench: Bench, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    hosted = prepared(bench, 3)
    looks = iter([False, True])
    monkeypatch.setattr(bench.hosting, "_is_met", lambda *_: next(looks))
    run(bench.hosting.wait(hosted, demand(8, wait_s=0.01), bench.now_s()))


def test_a_call_whose_updates_do_not_come_is_told_so(bench: Bench, run: Any) -> None:
    hosted = prepared(bench, 3)

    async def scene() -> None:
        with pytest.raises(ReplicaStale, match=r"is at cut \[7\]"):
            await bench.hosting.wait(hosted, demand(8, wait_s=0.01), bench.now_s())
        with pytest.raises(ReplicaStale):
            await bench.hosting.wait(hosted, demand(8, wait_s=-1.0), bench.now_s())

    run(scene())


def test_staleness_counts_from_when_the_call_arrived(bench: Bench, run: Any) -> None:
    hosted = prepared(bench, 3)
    fresh = Consistency(max_staleness_s=0.2)

    async def scene() -> None:
        arrived_s = bench.now_s()
        with pytest.raises(ReplicaStale):
            await bench.hosting.wait(hosted, Demand(fresh, 0.001), arrived_s)
        # A tenth of a second later, 0.25 s of staleness is 0.15 s when the call arrived.
        await bench.hosting.wait(hosted, Demand(fresh, 0.001), arrived_s - 0.1)

    run(scene())


def test_a_generation_that_ends_fails_those_that_wait(bench: Bench, run: Any) -> None:
    failing, going = prepared(bench, 3), prepared(bench, 4)
    until(lambda: bench.followers[3].started)

    async def scene() -> None:
        one = await waiting_for(bench, failing, demand(99))
        other = await waiting_for(bench, going, demand(99))
        bench.followers[3].failure = "no room"
        await asyncio.to_thread(bench.followers[3].progressed)
        with pytest.raises(ShardUnavailable, match="no room"):
            await one
        bench.hosting.retire(4)
        with pytest.raises(GenerationError):
            await other

    run(scene())


def test_tokens_of_another_log_are_refused_at_once(bench: Bench, run: Any) -> None:
    hosted = prepared(bench, 3)
    static = bench.hosting.add(Loaded(Executor(5)))  # type: ignore[arg-type]

    async def scene() -> None:
        foreign = Demand(Consistency((UpdateToken(LOG + 1, 0, 1),)), 5.0)
        with pytest.raises(Refusal, match="update log that is followed"):
            await bench.hosting.wait(hosted, foreign, bench.now_s())
        with pytest.raises(Refusal, match="follows no update log"):
            await bench.hosting.wait(static, demand(1), bench.now_s())
        await bench.hosting.wait(static, Demand(Consistency((), 0.0), 0.0), bench.now_s())

    run(scene())


def test_a_token_beyond_the_log_is_refused_once_somebody_has_looked(bench: Bench, run: Any) -> None:
    hosted = prepared(bench, 3)
    follower = bench.followers[3]
    until(lambda: follower.started)

    async def scene() -> None:
        # What was acknowledged since the last look may be in the log.
        follower.lag = Lag((7,), (7,), 0.0, 0.0, bench.now_s())
        task = await waiting_for(bench, hosted, demand(9))
        await asyncio.to_thread(follower.progressed)
        assert not task.done()
        follower.lag = Lag((7,), (9,), 0.0, 0.0, bench.now_s())
        await asyncio.to_thread(follower.progressed)
        late = await waiting_for(bench, hosted, demand(10))
        assert not late.done()
        follower.lag = Lag((7,), (9,), 0.0, 0.0, bench.now_s())
        await asyncio.to_thread(follower.progressed)
        with pytest.raises(RequestError, match=r"at most 9 in log partition 0.*got 10") as raised:
            await late
        assert raised.value.field == "consistency.after"
        assert not task.done()
        await asyncio.to_thread(follower.commit, "next", (9,))
        await asyncio.to_thread(follower.progressed)
        await task

    run(scene())


@pytest.mark.parametrize(("limit", "size"), [("_MAX_WAITING", 0), ("_MAX_WAITING_BYTES", 30)])
def test_only_so_many_calls_wait_and_their_places_come_back(
    bench: Bench, run: Any, monkeypatch: pytest.MonkeyPatch, limit: str, size: int
) -> None:
    monkeypatch.setattr(f"silvershard.cluster.hosting.{limit}", 2 * size or 2)
    hosted = prepared(bench, 3)
    until(lambda: bench.followers[3].started)
    wait = partial(bench.hosting.wait, hosted, size=size)

    async def scene() -> None:
        bench.hosting.attach(asyncio.get_running_loop())
        for _ in range(2):
            tasks = [
                asyncio.ensure_future(wait(demand(position), bench.now_s()))
                for position in (bench.executors[3].cut[0] + 1, 99)
            ]
            await asyncio.sleep(0)
            refusal = f"2 calls of {2 * size} bytes wait for updates"
            with pytest.raises(Overloaded, match=refusal):
                await wait(demand(99), bench.now_s())
            # Who need not wait needs no place.
            await wait(demand(1), bench.now_s())
            position = bench.executors[3].cut[0] + 1
            await asyncio.to_thread(bench.followers[3].commit, "next", (position,))
            await asyncio.to_thread(bench.followers[3].progressed)
            await tasks[0]
            tasks[1].cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        with pytest.raises(ReplicaStale):
            await wait(demand(99, wait_s=0.001), bench.now_s())

    run(scene())


def test_closing_ends_every_follower_and_a_commit_that_is_lost_is_no_failure(
    bench: Bench,
) -> None:
    prepared(bench, 3)
    bench.hosting.close()
    assert bench.followers[3].stopped
    cancelled: Future[Any] = Future()
    cancelled.cancel()
    bench.hosting._run_on_model = lambda *_: cancelled
    assert list(bench.followers[3].commit("late", (9,))) == []

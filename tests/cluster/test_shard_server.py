import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import grpc.aio
import pytest
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc

from silvershard.cluster import shard_pb2, shard_pb2_grpc, shard_server, tensors
from silvershard.cluster.codec import code_name
from silvershard.cluster.follower import UpdateCounts
from silvershard.cluster.freshness import Lag
from silvershard.cluster.hosting import Hosted, Loaded
from silvershard.cluster.query_gaps import QueryGaps
from silvershard.cluster.shard_server import ShardServer
from silvershard.cluster.table_lookup import TableCounts
from silvershard.model.compiled_request import compile_request
from silvershard.model.request import Request
from silvershard.model.retriever import assemble
from silvershard.model.types import Cutoffs, Work
from silvershard.shard.errors import ConfigError, StateError
from silvershard.shard.page_pool import PoolUsage

EPOCH = 7
CLOCKS = {"monotonic": time.monotonic, "time_ns": time.time_ns}
REPORT = shard_pb2.GenerationReport(pool=shard_pb2.PoolReport(retired_slots=2, dead_slots=7))


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


class Caller:
    """A raw stream to a shard server."""

    def __init__(self, server: ShardServer, stub: Any) -> None:
        self.server = server
        self.stub = stub
        self.stream = stub.Execute()
        self.last = 0

    def call(self, **fields: Any) -> shard_pb2.ShardCall:
        self.last += 1
        defaults = {"call_id": self.last, "generation": 1, "epoch": EPOCH, "remaining_us": 10**7}
        return shard_pb2.ShardCall(**{**defaults, **fields})

    async def send(self, **fields: Any) -> int:
        await self.stream.write(self.call(**fields))
        return self.last

    async def receive(self) -> Any:
        async with asyncio.timeout(5):
            return await self.stream.read()

    async def ask(self, **fields: Any) -> Any:
        await self.send(**fields)
        return await self.receive()


@asynccontextmanager
async def serving(executor: Any, **options: Any) -> AsyncIterator[Caller]:
    server = ShardServer(executor, epoch=EPOCH, **options)
    await server.start()
    try:
        async with grpc.aio.insecure_channel(server.address) as channel:
            yield Caller(server, shard_pb2_grpc.ShardStub(channel))
    finally:
        await server.stop(0)


@pytest.fixture
def executor(make_executors: Any) -> Any:
    return make_executors(2)[0]


@pytest.fixture
def work(whole: Any) -> Work:
    compiled = compile_request(Request(features={"history": [1]}, k=3), whole.spec)
    encoded = whole.encode([compiled.features])
    plan = compiled.plan(whole.spec, None)
    return assemble([compiled], [plan], encoded.embedding, encoded.user_state)


def block(executor: Any, name: str) -> tuple[threading.Event, threading.Event]:
    """Make a method of an executor say that it was reached, and wait until it is let go."""
    reached, let_go = threading.Event(), threading.Event()
    method = getattr(executor, name)

    def blocked(*arguments: Any) -> Any:
        reached.set()
        assert let_go.wait(10)
        return method(*arguments)

    setattr(executor, name, blocked)
    return reached, let_go


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.001)


def scan_of(count: int = 1) -> shard_pb2.TensorMap:
    return tensors.to_map({"scan": torch.zeros(count, 0, 4, dtype=torch.int64)})


EVERYTHING = Cutoffs(torch.full((1, 2), float("-inf")), torch.full((1, 2), 2**63 - 1))


def test_replies_name_their_call_and_the_incarnation(run: Any, executor: Any) -> None:
    async def scene() -> None:
        async with serving(executor) as caller:
            ids = [await caller.send(count=scan_of()) for _ in range(5)]
            replies = [await caller.receive() for _ in range(5)]
            assert sorted(reply.call_id for reply in replies) == ids
            assert {(one.epoch, one.generation, one.code) for one in replies} == {(EPOCH, 1, 0)}
            count = tensors.from_map(replies[0].tensors, tensors.COUNT)["count"]
            assert count.tolist() == [executor.documents]

    run(scene())


def test_the_rounds_give_what_the_executor_gives(run: Any, executor: Any, work: Work) -> None:
    async def scene() -> None:
        async with serving(executor) as caller:
            opened = await caller.ask(key="a", open=tensors.work_to_map(work))
            first = tensors.round_one_from_map(opened.tensors, dict(opened.times_us))
            assert set(first.times) == {"ann"}
            closed = await caller.ask(key="a", close=tensors.cutoffs_to_map(EVERYTHING))
            second = tensors.round_two_from_map(closed.tensors, dict(closed.times_us))
            assert set(second.times) == {"refine", "rerank", "value"}
            for got, wanted in zip(second[:6], executor.close("a", EVERYTHING)[:6], strict=True):
                assert torch.equal(got, wanted)
            assert executor.num_open == 1
            await caller.send(released=["a"])
            await until(lambda: executor.num_open == 0)

    run(scene())


@pytest.mark.parametrize(
    ("fields", "code", "reason"),
    [
        ({"generation": 2}, "FAILED_PRECONDITION", "VERSION_MISMATCH"),
        ({"epoch": 6}, "FAILED_PRECONDITION", "STALE_EPOCH"),
        ({"remaining_us": 0}, "DEADLINE_EXCEEDED", "DEADLINE_EXCEEDED"),
        (
            {"close": tensors.cutoffs_to_map(EVERYTHING), "key": "never opened"},
            *("ABORTED", "CANDIDATES_EXPIRED"),
        ),
        ({"count": shard_pb2.TensorMap()}, "INVALID_ARGUMENT", "MALFORMED_TENSOR"),
        ({"count": None}, "INVALID_ARGUMENT", "INVALID_REQUEST"),
        (
            {"fields": shard_pb2.Fields(item_ids=[1], names=["nothing"])},
            *("INVALID_ARGUMENT", "INVALID_REQUEST"),
        ),
    ],
)
def test_what_cannot_be_served_is_refused_and_the_stream_goes_on(
    run: Any, executor: Any, fields: dict[str, Any], code: str, reason: str
) -> None:
    async def scene() -> None:
        async with serving(executor) as caller:
            op = {} if {"close", "fields"} & set(fields) else {"count": scan_of()}
            reply = await caller.ask(**{**op, **fields})
            assert (code_name(reply.code), reply.reason) == (code, reason)
            assert reply.message
            assert (reply.epoch, reply.generation) == (EPOCH, 1)
            assert (await caller.ask(count=scan_of())).code == 0

    run(scene())


def test_any_epoch_is_served_when_none_is_named(run: Any, executor: Any) -> None:
    async def scene() -> None:
        async with serving(executor) as caller:
            assert (await caller.ask(epoch=0, count=scan_of())).code == 0

    run(scene())


def test_a_bug_is_internal_and_logged_under_its_id(
    run: Any, executor: Any, caplog: pytest.LogCaptureFixture
) -> None:
    def count(_: object) -> None:
        raise ZeroDivisionError("secret")

    executor.count = count

    async def scene() -> None:
        async with serving(executor) as caller:
            reply = await caller.ask(count=scan_of())
            assert code_name(reply.code) == "INTERNAL"
            assert "secret" not in reply.message
            error_id = reply.message.removeprefix("internal error ")
            assert len(error_id) == 12
            assert error_id in caplog.text
            assert "ZeroDivisionError" in caplog.text

    run(scene())


def test_work_whose_time_ran_out_in_the_queue_is_not_done(run: Any, make_executors: Any) -> None:
    clock = Clock()
    executor = make_executors(2, clock=clock)[0]
    reached, let_go = block(executor, "encode")
    counted: list[object] = []
    executor.count = counted.append

    async def scene() -> None:
        async with serving(executor, clock=clock) as caller:
            await caller.send(encode=shard_pb2.Encode(users=[{}]))
            await asyncio.to_thread(reached.wait, 5)
            late = await caller.send(count=scan_of(), remaining_us=50_000)
            await until(lambda: caller.server._pending == 2)
            clock.now_s += 0.05
            let_go.set()
            replies = {reply.call_id: reply for reply in [await caller.receive() for _ in "ab"]}
            assert code_name(replies[late].code) == "DEADLINE_EXCEEDED"
            assert counted == []

    run(scene())


def test_candidates_expire_with_the_time_of_their_query(
    run: Any, make_executors: Any, work: Work
) -> None:
    clock = Clock()
    executor = make_executors(2, clock=clock)[0]

    async def scene() -> None:
        async with serving(executor, clock=clock) as caller:
            await caller.ask(key="a", open=tensors.work_to_map(work), remaining_us=2_000_000)
            clock.now_s += 1.99
            closing = {"key": "a", "close": tensors.cutoffs_to_map(EVERYTHING)}
            assert (await caller.ask(**closing)).code == 0
            clock.now_s += 0.02
            assert (await caller.ask(**closing)).reason == "CANDIDATES_EXPIRED"
            assert executor.num_open == 0

    run(scene())


def test_a_shard_says_what_it_looked_up_in_remote_tables(run: Any, executor: Any) -> None:
    counts = TableCounts(5, 40, 10, 27, 3, {"DEADLINE_EXCEEDED": 2})

    async def scene() -> None:
        async with serving(executor) as caller:
            report = await caller.stub.Inspect(shard_pb2.InspectRequest())
            (held,) = report.generations
            assert (report.epoch, report.shard, held.generation) == (EPOCH, 0, 1)
            assert held.state == shard_pb2.GENERATION_STATE_PREPARED
            assert held.seen == shard_pb2.Seen(documents=executor.documents)
            assert list(report.tables) == []
        async with serving(executor, lookups=lambda: {"history": counts}) as caller:
            (found,) = (await caller.stub.Inspect(shard_pb2.InspectRequest())).tables
            assert (found.table, found.lookups, found.rows) == ("history", 5, 40)
            assert (found.cached, found.fetched, found.defaulted) == (10, 27, 3)
            assert dict(found.failures) == {"DEADLINE_EXCEEDED": 2}

    run(scene())


def test_a_release_drops_what_has_not_started(run: Any, executor: Any, work: Work) -> None:
    reached, let_go = block(executor, "encode")
    opened: list[str] = []
    real_open = executor.open
    executor.open = lambda key, *rest: (opened.append(key), real_open(key, *rest))[1]

    async def scene() -> None:
        async with serving(executor) as caller:
            await caller.send(encode=shard_pb2.Encode(users=[{}]))
            await asyncio.to_thread(reached.wait, 5)
            await caller.send(key="a", open=tensors.work_to_map(work))
            await caller.send(key="b", open=tensors.work_to_map(work))
            await caller.send(released=["a"])
            last = await caller.send(count=scan_of())
            await until(lambda: caller.server._pending == 4)
            await asyncio.sleep(0.01)
            let_go.set()
            while (await caller.receive()).call_id != last:
                pass
            assert opened == ["b"]

    run(scene())


def test_a_router_that_goes_away_leaves_nothing_open(run: Any, executor: Any, work: Work) -> None:
    async def scene() -> None:
        async with serving(executor) as caller:
            await caller.ask(key="a", open=tensors.work_to_map(work))
            assert executor.num_open == 1
            caller.stream.cancel()
            await until(lambda: executor.num_open == 0)

    run(scene())


def test_a_router_that_says_goodbye_gets_its_answers_first(run: Any, executor: Any) -> None:
    async def scene() -> None:
        async with serving(executor) as caller:
            await caller.send(count=scan_of())
            await caller.stream.done_writing()
            assert (await caller.receive()).code == 0
            assert await caller.receive() is grpc.aio.EOF
            assert await caller.stream.code() == grpc.StatusCode.OK

    run(scene())


def test_a_full_queue_refuses(run: Any, executor: Any) -> None:
    reached, let_go = block(executor, "encode")

    async def scene() -> None:
        async with serving(executor, max_queue=2) as caller:
            await caller.send(encode=shard_pb2.Encode(users=[{}]))
            await asyncio.to_thread(reached.wait, 5)
            await caller.send(count=scan_of())
            refused = await caller.ask(count=scan_of())
            assert code_name(refused.code) == "RESOURCE_EXHAUSTED"
            assert refused.call_id == 3
            let_go.set()
            assert {(await caller.receive()).code for _ in "ab"} == {0}
            assert (await caller.ask(count=scan_of())).code == 0

    run(scene())


def test_health_and_pings_answer_while_the_model_works(run: Any, executor: Any) -> None:
    reached, let_go = block(executor, "encode")

    async def scene() -> None:
        async with serving(executor) as caller:
            await caller.send(encode=shard_pb2.Encode(users=[{}]))
            await asyncio.to_thread(reached.wait, 5)
            pings = caller.stub.Ping()
            for sequence in (1, 2):
                await pings.write(shard_pb2.Beat(sequence=sequence))
                seen = shard_pb2.Seen(documents=executor.documents)
                assert await pings.read() == shard_pb2.Beat(
                    sequence=sequence,
                    epoch=EPOCH,
                    served=[shard_pb2.ServedGeneration(generation=1, seen=seen)],
                )
            async with grpc.aio.insecure_channel(caller.server.address) as channel:
                health = health_pb2_grpc.HealthStub(channel)
                for name in ("", "shard/0"):
                    request = health_pb2.HealthCheckRequest(service=name)
                    assert (await health.Check(request)).status == 1
            pings.cancel()
            let_go.set()
            assert (await caller.receive()).code == 0

    run(scene())


def test_stopping_frees_the_port_and_fails_the_streams(run: Any, executor: Any) -> None:
    async def scene() -> None:
        async with serving(executor) as caller:
            assert (await caller.ask(count=scan_of())).code == 0
            port = int(caller.server.address.split(":")[1])
            await caller.server.stop(0)
            with pytest.raises(grpc.aio.AioRpcError):
                await caller.stream.read()
            again = ShardServer(executor, port=port)
            await again.start()
            await again.stop(0)

    run(scene())


def test_a_port_in_use_and_a_foreign_address_are_refused(run: Any, executor: Any) -> None:
    async def scene() -> None:
        async with serving(executor) as caller:
            port = int(caller.server.address.split(":")[1])
            with pytest.raises(StateError, match="cannot listen on"):
                await ShardServer(executor, port=port).start()
            with pytest.raises(ConfigError, match="must be a loopback address"):
                await ShardServer(executor, host="0.0.0.0").start()

    run(scene())


def test_epochs_grow_with_every_incarnation(executor: Any) -> None:
    first = ShardServer(executor).epoch
    assert ShardServer(executor).epoch > first


# ---- generations side by side, and freshness


class Live:
    """An executor that a test moves on, as if it followed a log."""

    def __init__(self, executor: Any, generation: int) -> None:
        self.executor = executor
        self.spec = executor.spec.model_copy(update={"generation": generation})
        self.cut: tuple[int, ...] = (4,)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.executor, name)

    def usage(self) -> PoolUsage:
        return PoolUsage(10, 4, 5, 1, 20, 3, 1.5, 0)


class Idle:
    """A follower of nothing."""

    log_id = 9
    lag = Lag((4,), (6,), 0.0, 0.0)
    counts = UpdateCounts()
    refused = ()
    staleness_s = 0.25
    failure = trouble = ""

    def start(self, progressed: Callable[[], None]) -> None:
        self.progressed = progressed

    def catch_up(self) -> None: ...

    def hurry(self) -> None: ...

    def stop(self) -> None: ...


def loaded(executor: Any, generation: int) -> tuple[Live, Idle, Loaded]:
    live, idle = Live(executor, generation), Idle()
    return live, idle, Loaded(live, lambda _: idle)  # type: ignore[arg-type,return-value]


def fresh(position: int, *, log_id: int = 9, wait_us: int = 5_000_000) -> shard_pb2.Freshness:
    after = [shard_pb2.LogPosition(partition=0, position=position)]
    return shard_pb2.Freshness(log_id=log_id, after=after, wait_us=wait_us)


def test_a_reply_says_what_it_was_made_from(run: Any, executor: Any) -> None:
    live, _, made = loaded(executor, 1)

    async def scene() -> None:
        async with serving(made) as caller:
            reply = await caller.ask(count=scan_of())
            assert reply.seen == shard_pb2.Seen(
                log_id=9, cut=[4], staleness_us=250_000, documents=executor.documents
            )
            live.cut = (5,)
            assert list((await caller.ask(count=scan_of())).seen.cut) == [5]

    run(scene())


def test_updates_give_way_to_calls_that_run_and_not_to_those_that_wait_for_them(
    run: Any, executor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    live, idle, made = loaded(executor, 1)
    gaps = QueryGaps(longest_s=60)
    running: list[int] = []
    count = executor.count
    monkeypatch.setattr(
        executor, "count", lambda scan: (running.append(gaps._calls), count(scan))[1]
    )

    async def scene() -> None:
        async with serving(made, gaps=gaps) as caller:
            await caller.send(count=scan_of(), fresh=fresh(6))
            await caller.ask(count=scan_of())
            assert running == [1]
            assert await asyncio.to_thread(gaps.wait) < 30
            live.cut = (6,)
            await asyncio.to_thread(idle.progressed)
            await caller.receive()
            assert await asyncio.to_thread(gaps.wait) < 30

    run(scene())


def test_a_call_that_waits_for_updates_holds_up_nobody(run: Any, executor: Any) -> None:
    live, idle, made = loaded(executor, 1)

    async def scene() -> None:
        async with serving(made) as caller:
            waiting = await caller.send(count=scan_of(), fresh=fresh(6))
            for _ in range(3):
                assert (await caller.ask(count=scan_of())).call_id != waiting
            live.cut = (6,)
            await asyncio.to_thread(idle.progressed)
            reply = await caller.receive()
            assert (reply.call_id, list(reply.seen.cut)) == (waiting, [6])

    run(scene())


@pytest.mark.parametrize(
    ("demand", "code", "reason"),
    [
        (fresh(6, wait_us=1000), "FAILED_PRECONDITION", "REPLICA_STALE"),
        (fresh(1, log_id=8), "FAILED_PRECONDITION", "FOREIGN_TOKEN"),
        (
            shard_pb2.Freshness(max_staleness_us=1000, wait_us=1000),
            *("FAILED_PRECONDITION", "REPLICA_STALE"),
        ),
    ],
    ids=["behind", "foreign", "stale"],
)
def test_a_demand_that_is_not_met_is_refused(
    run: Any, executor: Any, demand: Any, code: str, reason: str
) -> None:
    _, _, made = loaded(executor, 1)

    async def scene() -> None:
        async with serving(made) as caller:
            reply = await caller.ask(count=scan_of(), fresh=demand)
            assert (code_name(reply.code), reply.reason) == (code, reason)
            assert not reply.message.startswith(code)
            assert (await caller.ask(count=scan_of())).code == 0

    run(scene())


def test_a_token_that_the_log_does_not_hold_is_refused_at_once(run: Any, executor: Any) -> None:
    _, idle, made = loaded(executor, 1)
    idle.lag = idle.lag._replace(looked_s=float("inf"))

    async def scene() -> None:
        async with serving(made) as caller:
            reply = await caller.ask(count=scan_of(), fresh=fresh(7))
            assert (code_name(reply.code), reply.reason) == ("INVALID_ARGUMENT", "INVALID_REQUEST")
            assert reply.field == "consistency.after"
            assert reply.message.startswith("must be at most 6 in log partition 0")
            assert (await caller.ask(count=scan_of())).code == 0

    run(scene())


def test_generations_are_prepared_asked_and_retired_side_by_side(
    run: Any, make_executors: Any, work: Work
) -> None:
    first, second = make_executors(2)[0], make_executors(2)[0]

    def load(path: Any, _: Any) -> Loaded:
        return loaded(second, int(path.name))[2]

    async def state(caller: Caller) -> dict[int, int]:
        report = await caller.stub.Inspect(shard_pb2.InspectRequest())
        return {one.generation: one.state for one in report.generations}

    async def scene() -> None:
        prepared = shard_pb2.GENERATION_STATE_PREPARED
        async with serving(first, snapshot="/s/1", load=load) as caller:
            assert (await caller.ask(generation=2, count=scan_of())).reason == "VERSION_MISMATCH"
            for _ in range(2):
                request = shard_pb2.PrepareRequest(generation=2, snapshot="/s/2")
                report = await caller.stub.Prepare(request)
                assert (report.generation, report.snapshot) == (2, "/s/2")
            async with asyncio.timeout(5):
                while await state(caller) != {1: prepared, 2: prepared}:
                    await asyncio.sleep(0.001)
            for generation, executor in ((1, first), (2, second)):
                reply = await caller.ask(
                    generation=generation, key=f"k{generation}", open=tensors.work_to_map(work)
                )
                assert (reply.generation, reply.code) == (generation, 0)
                assert executor.num_open == 1
            await caller.send(released=["k2"])
            await until(lambda: (first.num_open, second.num_open) == (1, 0))
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await caller.stub.Prepare(
                    shard_pb2.PrepareRequest(generation=1, snapshot="/elsewhere")
                )
            assert raised.value.code() is grpc.StatusCode.FAILED_PRECONDITION
            assert (caller.server.generation, caller.server.executor.spec.generation) == (2, 2)
            await caller.stub.Retire(shard_pb2.RetireRequest(generation=1))
            assert await state(caller) == {2: prepared}
            assert (await caller.ask(generation=1, count=scan_of())).generation == 2
            assert (await caller.ask(generation=2, count=scan_of())).code == 0

    run(scene())


def test_a_shard_that_serves_nothing_is_not_healthy_and_says_why(run: Any, executor: Any) -> None:
    _, idle, made = loaded(executor, 1)

    async def scene() -> None:
        async with serving(made) as caller:
            idle.failure = "no room"
            await asyncio.to_thread(idle.progressed)
            reply = await caller.ask(count=scan_of())
            assert (code_name(reply.code), reply.reason) == ("UNAVAILABLE", "SHARD_UNAVAILABLE")
            assert "generation 1 left service: no room" in reply.message
            async with grpc.aio.insecure_channel(caller.server.address) as channel:
                request = health_pb2.HealthCheckRequest(service="shard/0")
                stub = health_pb2_grpc.HealthStub(channel)
                async with asyncio.timeout(5):
                    while (await stub.Check(request)).status == 1:
                        await asyncio.sleep(0.001)
            with pytest.raises(StateError, match="no generation in service"):
                _ = caller.server.generation
            pings = caller.stub.Ping()
            await pings.write(shard_pb2.Beat(sequence=1))
            assert list((await pings.read()).served) == []
            pings.cancel()

    run(scene())


def test_fields_are_those_of_the_query_that_found_the_items(
    run: Any, executor: Any, work: Work
) -> None:
    asked: list[Any] = []
    real = executor.fields
    executor.fields = lambda *arguments: (asked.append(arguments[2]), real(*arguments))[1]

    async def scene() -> None:
        async with serving(executor) as caller:
            fields = shard_pb2.Fields(item_ids=[], names=["title"])
            gone = await caller.ask(key="a", fields=fields)
            assert gone.reason == "CANDIDATES_EXPIRED"
            await caller.ask(key="a", open=tensors.work_to_map(work))
            assert (await caller.ask(key="a", fields=fields)).code == 0
            assert (await caller.ask(fields=fields)).code == 0
            assert asked == ["a", None]

    run(scene())


async def counts(caller: Caller) -> tuple[dict[str, int], dict[str, int]]:
    report = await caller.stub.Inspect(shard_pb2.InspectRequest())
    return dict(report.expired), dict(report.cancelled)


@pytest.mark.parametrize(("stage", "op"), [("semantic", "open"), ("rerank", "close")])
def test_time_that_runs_out_between_two_stages_ends_the_call_and_is_counted(
    run: Any, make_executors: Any, work: Work, stage: str, op: str
) -> None:
    clock = Clock()
    executor = make_executors(2, clock=clock)[0]
    retriever = executor._retriever
    whole = {"open": retriever._scan, "close": retriever.indexes[0].refine}

    def slow(*given: Any) -> Any:
        clock.now_s += 0.05
        return whole[op](*given)

    async def scene() -> None:
        async with serving(executor, clock=clock) as caller:
            with pytest.MonkeyPatch.context() as patch:
                owner = retriever if op == "open" else retriever.indexes[0]
                patch.setattr(owner, "_scan" if op == "open" else "refine", slow)
                calls = {
                    "open": {"open": tensors.work_to_map(work)},
                    "close": {"close": tensors.cutoffs_to_map(EVERYTHING)},
                }
                if op == "close":
                    assert (await caller.ask(key="a", **calls["open"])).code == 0
                reply = await caller.ask(key="a", **calls[op], remaining_us=40_000)
                assert code_name(reply.code) == "DEADLINE_EXCEEDED"
                assert stage in reply.message
            assert await counts(caller) == ({stage: 1}, {})
            # Nothing of a round that did not end is kept.
            assert executor.num_open == (op == "close")

    run(scene())


def test_a_call_that_is_cancelled_does_not_run_and_its_neighbours_do(
    run: Any, executor: Any
) -> None:
    reached, let_go = block(executor, "encode")
    counted: list[object] = []
    real_count = executor.count
    executor.count = lambda scan: (counted.append(scan), real_count(scan))[1]

    async def scene() -> None:
        async with serving(executor) as caller:
            await caller.send(encode=shard_pb2.Encode(users=[{}]))
            await asyncio.to_thread(reached.wait, 5)
            gone = await caller.send(count=scan_of())
            stays = await caller.send(count=scan_of())
            await until(lambda: caller.server._pending == 3)
            await caller.send(cancel=gone)
            await caller.send(cancel=999)
            await until(
                lambda: any(job.dropped for jobs in caller.server._by_key.values() for job in jobs)
            )
            let_go.set()
            replies = [(await caller.receive()).call_id for _ in "ab"]
            assert replies == [1, stays]
            assert len(counted) == 1
            await until(lambda: caller.server._pending == 0)
            assert await counts(caller) == ({}, {"count": 1})

    run(scene())


def test_a_slow_shard_takes_so_much_longer_and_a_full_one_says_so(
    run: Any, executor: Any, suffer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    slept: list[float] = []
    monkeypatch.setattr(shard_server, "time", SimpleNamespace(sleep=slept.append, **CLOCKS))
    faults = suffer("slow", "shard 0.0", delay_ms=70)

    async def scene() -> None:
        async with serving(executor, faults=faults) as caller:
            assert (await caller.ask(count=scan_of())).code == 0
            assert slept == [0.07]
            suffer("fill", "shard 0.0")
            assert (await caller.ask(count=scan_of())).code == 0
            assert slept == [0.07]
            monkeypatch.setattr(Hosted, "report", lambda _: REPORT)
            assert caller.server.inspect().generations[0].pool.retired_slots == 9
            suffer("fill", "shard 0.0", state="cleared")
            assert caller.server.inspect().generations[0].pool.retired_slots == 2

    run(scene())

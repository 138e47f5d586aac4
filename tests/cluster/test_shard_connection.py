import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import grpc.aio
import pytest

from silvershard.cluster import shard_pb2, shard_pb2_grpc, wire
from silvershard.cluster.codec import Refusal
from silvershard.cluster.config import PingSection
from silvershard.cluster.freshness import AFTER, FOREIGN_TOKEN, Seen
from silvershard.cluster.listen import bind, server_options
from silvershard.cluster.shard_connection import ShardConnection
from silvershard.cluster.shard_link import LinkState
from silvershard.cluster.shard_map import ShardEntry
from silvershard.model.request import RequestError
from silvershard.shard.errors import DeadlineExceeded, ReplicaStale, ShardUnavailable

PING = PingSection(every_ms=5, suspect_after=2000, eject_after=2000)


class Echo(shard_pb2_grpc.ShardServicer):
    """A shard that replies with a code and a reason, and says what it serves."""

    def __init__(self) -> None:
        self.code = 0
        self.reason = self.message = self.field = ""
        self.seen = shard_pb2.Seen()
        self.calls: list[shard_pb2.ShardCall] = []
        self.served: list[shard_pb2.ServedGeneration] = []
        self.epoch = 7
        self.wire: Any = wire.METADATA
        self.let_go: asyncio.Event | None = None
        """Replies wait for it."""

    async def Execute(self, _: object, context: Any) -> None:
        await context.send_initial_metadata(self.wire)
        while (call := await context.read()) is not grpc.aio.EOF:
            self.calls.append(call)
            if self.let_go is not None:
                await self.let_go.wait()
            await context.write(
                shard_pb2.ShardReply(
                    call_id=call.call_id,
                    generation=call.generation,
                    epoch=7,
                    code=self.code,
                    reason=self.reason,
                    message=self.message,
                    field=self.field,
                    seen=self.seen,
                )
            )

    async def Ping(self, _: object, context: Any) -> None:
        while (beat := await context.read()) is not grpc.aio.EOF:
            await context.write(
                shard_pb2.Beat(sequence=beat.sequence, epoch=self.epoch, served=self.served)
            )


@asynccontextmanager
async def connected(shard: Echo, **options: Any) -> AsyncIterator[ShardConnection]:
    server = grpc.aio.server(options=server_options(1 << 20))
    shard_pb2_grpc.add_ShardServicer_to_server(shard, server)
    address = bind(server, "127.0.0.1", 0)
    await server.start()
    entry = ShardEntry(shard=2, replica=1, address=address, epoch=7, documents=1, pid=1)
    connection = ShardConnection(entry, options.get("ping", PING), faults=options.get("faults"))
    connection.start()
    try:
        yield connection
    finally:
        await connection.aclose()
        await server.stop(0)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(8):
        while not condition():
            await asyncio.sleep(0.002)


def test_a_shard_of_another_wire_version_is_not_asked_until_it_is_replaced(
    run: Any, caplog: pytest.LogCaptureFixture
) -> None:
    shard = Echo()
    shard.wire = (("silvershard-wire", "99"),)

    async def scene() -> None:
        async with connected(shard) as connection:
            with pytest.raises(ShardUnavailable, match="speaks wire version 99, this router"):
                # Before it is known who is there.
                await connection.call(shard_pb2.ShardCall(), 1, 5)
            await until(lambda: bool(connection.refusal))
            assert connection.state is LinkState.DOWN
            assert not connection.reached
            with pytest.raises(ShardUnavailable, match="speaks wire version 99, this router"):
                await connection.call(shard_pb2.ShardCall(), 1, 5)
            assert shard.calls == []
            shard.wire = wire.METADATA
            await until(lambda: connection.reached)
            assert connection.refusal == ""
            assert (await connection.call(shard_pb2.ShardCall(), 1, 5)).generation == 1

    run(scene())
    # Once, however often it is tried again.
    assert sum("is not asked" in one.message for one in caplog.records) == 1


def test_calls_end_each_in_its_own_time_by_one_timer(run: Any) -> None:
    shard = Echo()

    async def scene() -> None:
        shard.let_go = asyncio.Event()
        loop = asyncio.get_running_loop()
        ended: list[tuple[str, float]] = []

        async def ask(name: str, limit_s: float) -> None:
            began_s = loop.time()
            with pytest.raises(DeadlineExceeded, match=f"within {limit_s:.3f} s"):
                await connection.call(shard_pb2.ShardCall(), 1, limit_s)
            assert loop.time() - began_s > limit_s - 0.01
            ended.append((name, limit_s))

        async with connected(shard) as connection:
            await until(lambda: connection.reached)
            await asyncio.gather(ask("late", 0.3), ask("early", 0.05), ask("middle", 0.15))
            assert [name for name, _ in ended] == ["early", "middle", "late"]
            shard.let_go.set()
            # A call that ends in time leaves a timer behind, which must not end the next one.
            await connection.call(shard_pb2.ShardCall(), 1, 0.2)
            shard.let_go.clear()
            await ask("next", 0.4)

    run(scene())


def test_every_call_names_its_own_generation(run: Any) -> None:
    shard = Echo()

    async def scene() -> None:
        async with connected(shard) as connection:
            for generation in (3, 4):
                reply = await connection.call(shard_pb2.ShardCall(), generation, 5)
                assert reply.generation == generation
            assert {call.epoch for call in shard.calls} == {7}
            assert len({call.call_id for call in shard.calls}) == 2

    run(scene())


def test_what_is_given_up_is_said_with_the_next_call_and_only_once(run: Any) -> None:
    shard = Echo()

    async def scene() -> None:
        async with connected(shard) as connection:
            connection.release("a")
            connection.release("b")
            for _ in range(2):
                await connection.call(shard_pb2.ShardCall(count=shard_pb2.TensorMap()), 1, 5)
            assert [list(call.released) for call in shard.calls] == [["a", "b"], []]

    run(scene())


def test_what_is_given_up_is_said_soon_where_no_call_follows(run: Any) -> None:
    shard = Echo()

    async def scene() -> None:
        async with connected(shard) as connection:
            await connection.call(shard_pb2.ShardCall(), 1, 5)
            for key in ("a", "b"):
                connection.release(key)
                await until(lambda key=key: list(shard.calls[-1].released) == [key])
                assert shard.calls[-1].WhichOneof("op") is None
                assert shard.calls[-1].epoch == 7
            assert len(shard.calls) == 3

    run(scene())


def test_what_is_given_up_while_there_is_no_connection_is_forgotten(run: Any) -> None:
    async def scene() -> None:
        entry = ShardEntry(shard=2, replica=1, address="127.0.0.1:1", epoch=7, documents=1, pid=1)
        connection = ShardConnection(entry, PING)
        connection.release("a")
        await until(lambda: not connection._released)

    run(scene())


@pytest.mark.parametrize(
    ("reason", "kind", "message"),
    [
        ("REPLICA_STALE", ReplicaStale, "shard 2: behind"),
        (FOREIGN_TOKEN, Refusal, "behind"),
        ("VERSION_MISMATCH", ShardUnavailable, "FAILED_PRECONDITION: behind"),
    ],
)
def test_a_demand_that_is_not_met_has_an_error_of_its_own(
    run: Any, reason: str, kind: type[Exception], message: str
) -> None:
    shard = Echo()
    shard.code, shard.reason, shard.message = 9, reason, "behind"

    async def scene() -> None:
        async with connected(shard) as connection:
            with pytest.raises(kind, match=message) as raised:
                await connection.call(shard_pb2.ShardCall(), 3, 5)
            if isinstance(raised.value, Refusal):
                assert (raised.value.code, raised.value.reason) == (
                    "FAILED_PRECONDITION",
                    FOREIGN_TOKEN,
                )

    run(scene())


def test_a_token_that_is_refused_names_its_field(run: Any) -> None:
    shard = Echo()
    shard.code, shard.reason, shard.message = 3, "INVALID_REQUEST", "must be at most 4"

    async def scene() -> None:
        async with connected(shard) as connection:
            shard.field = AFTER
            with pytest.raises(RequestError, match="must be at most 4") as raised:
                await connection.call(shard_pb2.ShardCall(), 3, 5)
            assert raised.value.field == AFTER
            # What else a shard refuses is for the router to answer for.
            shard.field = "op"
            with pytest.raises(ShardUnavailable, match="INVALID_ARGUMENT: op: must be at most 4"):
                await connection.call(shard_pb2.ShardCall(), 3, 5)

    run(scene())


def test_beats_tell_what_is_served_and_how_fresh_it_is(run: Any) -> None:
    shard = Echo()

    async def scene() -> None:
        async with connected(shard) as connection:
            assert connection.served is None
            assert connection.state is LinkState.UP
            await until(lambda: connection.served == {})
            seen = shard_pb2.Seen(log_id=9, cut=[5], staleness_us=250_000, documents=10)
            shard.served = [shard_pb2.ServedGeneration(generation=3, seen=seen)]
            await until(lambda: connection.served == {3: Seen(9, (5,), 0.25, 10)})
            shard.epoch, shard.served = 8, []
            await asyncio.sleep(0.01)
            # Another incarnation says nothing of this one.
            assert connection.served != {}
            # So do replies, of the generations that beats have named.
            shard.seen.CopyFrom(shard_pb2.Seen(log_id=9, cut=[6], documents=11))
            for generation in (3, 4):
                await connection.call(shard_pb2.ShardCall(), generation, 5)
            assert connection.served == {3: Seen(9, (6,), 0.0, 11)}

    run(scene())


def test_a_shard_that_stops_reading_is_sent_no_more(
    run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("silvershard.cluster.shard_connection._MAX_UNSENT", 3)

    class Deaf(Echo):
        async def Execute(self, _: object, context: Any) -> None:
            await context.send_initial_metadata(wire.METADATA)
            await asyncio.Event().wait()

    async def scene() -> None:
        async with connected(Deaf()) as connection:
            await until(lambda: connection.reached)
            # More than fits into the buffers on the way.
            large = shard_pb2.ShardCall(key="x" * 100_000)
            tasks = []
            async with asyncio.timeout(8):
                while not any(task.done() for task in tasks):
                    call = shard_pb2.ShardCall()
                    call.CopyFrom(large)
                    tasks.append(asyncio.ensure_future(connection.call(call, 3, 30)))
                    await asyncio.sleep(0.002)
            assert not connection.is_idle
            with pytest.raises(ShardUnavailable, match="has stopped reading"):
                await tasks[-1]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            assert connection.is_idle

    run(scene())


def test_a_shard_is_told_of_a_call_that_nobody_waits_for_any_more(run: Any) -> None:
    class Silent(Echo):
        async def Execute(self, _: object, context: Any) -> None:
            await context.send_initial_metadata(wire.METADATA)
            while (call := await context.read()) is not grpc.aio.EOF:
                self.calls.append(call)

    shard = Silent()

    async def scene() -> None:
        async with connected(shard) as connection:
            asking = asyncio.ensure_future(connection.call(shard_pb2.ShardCall(), 3, 5))
            await until(lambda: len(shard.calls) == 1)
            asking.cancel()
            await until(lambda: len(shard.calls) == 2)
            first, second = shard.calls
            assert second.WhichOneof("op") == "cancel"
            assert (second.cancel, second.epoch) == (first.call_id, 7)
            assert connection._connection is not None
            assert connection._connection.pending == {}

    run(scene())


def test_what_a_partition_separates_gets_no_call_no_reply_and_no_beat(
    run: Any, suffer: Any
) -> None:
    shard = Echo()
    ping = PingSection(every_ms=5, suspect_after=4, eject_after=8)
    faults = suffer("partition", "shard 2.1")

    async def scene() -> None:
        async with connected(shard, ping=ping, faults=faults) as connection:
            await until(lambda: connection.state is LinkState.EJECTED)
            with pytest.raises(DeadlineExceeded):
                await connection.call(shard_pb2.ShardCall(key="lost"), 3, 0.05)
            connection.release("lost")
            await until(lambda: not connection._released)
            suffer("partition", "shard 2.1", state="cleared")
            await until(lambda: connection.state is LinkState.UP)
            assert (await connection.call(shard_pb2.ShardCall(), 3, 5)).generation == 3
            assert [call.key for call in shard.calls] == [""]
            # What was sent before is answered into the void.
            shard.let_go = asyncio.Event()
            waiting = asyncio.create_task(connection.call(shard_pb2.ShardCall(), 3, 0.2))
            await until(lambda: len(shard.calls) == 2)
            suffer("partition", "shard 2.1")
            shard.let_go.set()
            with pytest.raises(DeadlineExceeded):
                await waiting

    run(scene())

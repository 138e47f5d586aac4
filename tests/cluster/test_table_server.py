import asyncio
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc.aio
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from silvershard.cluster import table_pb2, table_pb2_grpc
from silvershard.cluster.codec import code_name
from silvershard.cluster.table_follower import TableProgress
from silvershard.cluster.table_server import MAX_CALL_ROWS, TableServer
from silvershard.shard.errors import ConfigError, StateError
from silvershard.shard.table import TableShard
from silvershard.shard.table_plan import TablePlan
from silvershard.shard.table_rows import dequantize_rows

EPOCH = 7
PLAN = TablePlan(name="users", num_rows=300, dim=8, num_shards=3, placement="contiguous")


class Caller:
    """A raw stream to a table server."""

    def __init__(self, server: TableServer, stub: Any) -> None:
        self.server = server
        self.stub = stub
        self.stream = stub.Execute()
        self.last = 0

    async def send(self, **fields: Any) -> int:
        self.last += 1
        defaults = {"call_id": self.last, "epoch": EPOCH, "remaining_us": 10**7}
        await self.stream.write(table_pb2.TableCall(**{**defaults, **fields}))
        return self.last

    async def receive(self) -> Any:
        async with asyncio.timeout(5):
            return await self.stream.read()

    async def ask(self, **fields: Any) -> Any:
        await self.send(**fields)
        return await self.receive()


@asynccontextmanager
async def serving(table: TableShard, **options: Any) -> AsyncIterator[Caller]:
    server = TableServer(table, epoch=EPOCH, **options)
    await server.start()
    try:
        async with grpc.aio.insecure_channel(server.address) as channel:
            yield Caller(server, table_pb2_grpc.TableStub(channel))
    finally:
        await server.stop(0)


@pytest.fixture
def table() -> TableShard:
    """Positions 100 to 199."""
    return TableShard.generated(PLAN, 1)


def take(*positions: int) -> table_pb2.Take:
    return table_pb2.Take(positions=np.array(positions, dtype=np.int64).tobytes())


def change(table: TableShard, version: int, value: float, *rows: int) -> None:
    table.apply(version, np.array(rows), np.full((len(rows), 8), value, dtype=np.float32))


def records_in(reply: Any) -> list[list[int]]:
    rows: list[list[int]] = np.frombuffer(reply.records, np.uint8).reshape(-1, 12).tolist()
    return rows


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.001)


async def away(server: TableServer) -> None:
    """Let calls pile up."""
    server._busy = True
    assert server._worker is not None
    server._worker.cancel()
    await until(server._worker.done)


def back(server: TableServer) -> None:
    server._busy = False
    server._worker = asyncio.create_task(server._work())


def test_rows_come_back_in_order_from_the_incarnation_that_was_asked(run: Any, table: Any) -> None:
    async def scene() -> None:
        async with serving(table) as caller:
            reply = await caller.ask(take=take(150, 100, 199, 150))
            assert records_in(reply) == table.take(np.array([150, 100, 199, 150])).tolist()
            assert (reply.call_id, reply.epoch, reply.code) == (1, EPOCH, 0)
            empty = await caller.ask(take=take())
            assert (empty.call_id, empty.records) == (2, b"")

    run(scene())


def test_replies_of_one_stream_keep_the_order_of_the_calls(run: Any, table: Any) -> None:
    async def scene() -> None:
        async with serving(table) as caller:
            ids = [await caller.send(take=take(100 + at % 100)) for at in range(200)]
            assert [(await caller.receive()).call_id for _ in ids] == ids

    run(scene())


def test_calls_of_many_streams_in_one_turn_wait_for_each_other(run: Any, table: Any) -> None:
    async def scene() -> None:
        async with serving(table) as caller:
            queued: list[Any] = []
            put_nowait = caller.server._jobs.put_nowait

            def note(job: Any) -> None:
                queued.append(job)
                put_nowait(job)

            caller.server._jobs.put_nowait = note  # type: ignore[method-assign]
            streams = [Caller(caller.server, caller.stub) for _ in range(20)]
            for _ in range(20):
                await asyncio.gather(*(one.send(take=take(100)) for one in streams))
                replies = await asyncio.gather(*(one.receive() for one in streams))
                assert [reply.call_id for reply in replies] == [one.last for one in streams]
            assert queued
            assert caller.server._pending == 0
            assert not caller.server._busy

    run(scene())


def test_each_call_gets_the_rows_of_the_version_that_it_names(run: Any, table: Any) -> None:
    before = table.take(np.array([110, 111])).tolist()
    change(table, 4, 1.0, 110)
    change(table, 6, 2.0, 110, 111)

    async def scene() -> None:
        async with serving(table) as caller:
            rows = {
                at: records_in(await caller.ask(take=take(110, 111), row_version=at))
                for at in (0, 4, 5, 6)
            }
            assert rows[0] == before
            assert rows[4] == rows[5] != rows[6]
            assert rows[4][1] == before[1]
            assert rows[6][0] == rows[6][1]

    run(scene())


def test_a_call_for_a_version_to_come_waits_for_it_and_holds_up_nobody(
    run: Any, table: Any
) -> None:
    async def scene() -> None:
        async with serving(table) as caller:
            server = caller.server
            late = await caller.send(take=take(110), row_version=2)
            beat = await caller.send(take=take(), row_version=2)
            now = await caller.send(take=take(111))
            assert [(await caller.receive()).call_id for _ in range(2)] == [beat, now]
            change(table, 1, 1.0, 110)
            server.advanced()
            other = await caller.send(take=take(112), row_version=1)
            assert (await caller.receive()).call_id == other
            # As the thread that follows the log does.
            await asyncio.to_thread(change, table, 2, 2.0, 110)
            await asyncio.to_thread(server.advanced)
            reply = await caller.receive()
            assert (reply.call_id, reply.code) == (late, 0)
            assert reply.records == table.take(np.array([110])).tobytes()
            assert server._waiting == set()
            await until(lambda: server._pending == 0)

    run(scene())


def test_a_version_that_does_not_come_in_time_is_said(run: Any, table: Any) -> None:
    change(table, 3, 1.0, 110)

    async def scene() -> None:
        async with serving(table) as caller:
            reply = await caller.ask(take=take(110), row_version=4, remaining_us=20_000)
            assert code_name(reply.code) == "DEADLINE_EXCEEDED"
            assert reply.message == "table users is at row version 3, 4 was asked for"
            await until(lambda: caller.server._pending == 0)
            caller.server.advanced()
            assert (await caller.ask(take=take(110), row_version=3)).code == 0

    run(scene())


def test_a_version_too_long_ago_is_refused(run: Any) -> None:
    table = TableShard(PLAN, 1, np.zeros((100, 12), dtype=np.uint8), undo_bytes=0)
    for version in range(1, 13):
        change(table, version, version, *range(100, 200))

    async def scene() -> None:
        async with serving(table) as caller:
            reply = await caller.ask(take=take(110), row_version=1)
            assert code_name(reply.code) == "FAILED_PRECONDITION"
            assert "as of versions 2 to 12, 1 was asked for" in reply.message
            assert (await caller.ask(take=take(110), row_version=2)).code == 0

    run(scene())


def test_a_report_says_how_far_the_rows_are(run: Any, table: Any) -> None:
    class Following:
        log_id, rejected, trouble = 77, 2, "it is away"

        def progress(self, name: str) -> TableProgress:
            assert name == "users"
            return TableProgress(partition=3, position=40, end=44, changes=1)

    change(table, 9, 1.0, 110)

    async def scene() -> None:
        follower: Any = Following()
        async with serving(table, follower=follower) as caller:
            report = await caller.stub.Inspect(table_pb2.TableInspect())
            assert report == table_pb2.TableState(
                table="users",
                shard=1,
                epoch=EPOCH,
                row_version=9,
                log_id=77,
                partition=3,
                position=40,
                end=44,
                changes=1,
                rejected=2,
                trouble="it is away",
            )
        async with serving(table) as caller:
            assert (await caller.stub.Inspect(table_pb2.TableInspect())).log_id == 0

    run(scene())


def test_another_incarnation_is_refused_and_none_in_particular_is_not(run: Any, table: Any) -> None:
    async def scene() -> None:
        async with serving(table) as caller:
            reply = await caller.ask(epoch=6, take=take(100))
            assert code_name(reply.code) == "FAILED_PRECONDITION"
            assert (reply.reason, reply.epoch) == ("STALE_EPOCH", EPOCH)
            assert (await caller.ask(epoch=0, take=take(100))).code == 0

    run(scene())


def test_bad_calls_name_the_field_and_harm_nobody(run: Any, table: Any) -> None:
    good = table.take(np.array([100]))
    bad = [
        ({"take": take(99)}, "positions: must be from 100 to 199 in shard 1"),
        ({"take": take(100, 200)}, "positions: must be from 100 to 199"),
        ({"take": table_pb2.Take(positions=bytes(9))}, "positions: must have 8 bytes each"),
        (
            {"take": table_pb2.Take(positions=bytes(8 * MAX_CALL_ROWS + 8))},
            f"positions: must be at most {MAX_CALL_ROWS} in a call",
        ),
        ({}, "op: must name an operation"),
    ]

    async def scene() -> None:
        async with serving(table) as caller:
            for fields, message in bad:
                reply = await caller.ask(**fields)
                assert code_name(reply.code) == "INVALID_ARGUMENT", fields
                assert reply.reason == "INVALID_REQUEST"
                assert message in reply.message
            assert records_in(await caller.ask(take=take(100))) == good.tolist()

    run(scene())


def test_the_largest_call_passes_the_size_limit(run: Any, table: Any) -> None:
    positions = np.arange(MAX_CALL_ROWS) % 100 + 100

    async def scene() -> None:
        async with serving(table) as caller:
            records = table.take(positions)
            reply = await caller.ask(take=take(*positions.tolist()))
            assert reply.records == records.tobytes()
            await caller.send(take=table_pb2.Take(positions=bytes(1 << 24)))
            with pytest.raises(grpc.aio.AioRpcError, match="larger than max"):
                await caller.receive()

    run(scene())


def test_an_error_inside_is_logged_under_a_number_and_told_without_details(
    run: Any, table: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise KeyError("secret")

    monkeypatch.setattr(table, "take", fail)

    async def scene() -> None:
        async with serving(table) as caller:
            reply = await caller.ask(take=take(100))
            assert code_name(reply.code) == "INTERNAL"
            assert reply.message.startswith("internal error ")
            assert "secret" not in reply.message
            assert reply.message in caplog.text
            assert "secret" in caplog.text

    run(scene())


def test_calls_whose_time_ran_out_while_they_waited_are_not_run(run: Any, table: Any) -> None:
    now_s = [100.0]

    async def scene() -> None:
        async with serving(table, clock=lambda: now_s[0]) as caller:
            read, taken = table.take, []

            def slow(*arguments: Any) -> Any:
                now_s[0] += 0.01
                taken.append(arguments)
                return read(*arguments)

            table.take = slow
            assert (await caller.ask(take=take(100), remaining_us=1)).code == 0
            reply = await caller.ask(take=take(100), remaining_us=0)
            assert code_name(reply.code) == "DEADLINE_EXCEEDED"
            assert len(taken) == 1

    run(scene())


def test_more_calls_than_the_queue_holds_are_refused(run: Any, table: Any) -> None:
    async def scene() -> None:
        async with serving(table, max_queue=2) as caller:
            server = caller.server
            await away(server)
            for _ in range(4):
                await caller.send(take=take(100))
            refused = [await caller.receive() for _ in range(2)]
            assert [one.call_id for one in refused] == [3, 4]
            assert {code_name(one.code) for one in refused} == {"RESOURCE_EXHAUSTED"}
            back(server)
            assert [(await caller.receive()).call_id for _ in range(2)] == [1, 2]
            await until(lambda: server._pending == 0)
            assert (await caller.ask(take=take(100))).code == 0

    run(scene())


def test_what_a_client_left_behind_is_dropped_and_frees_the_queue(run: Any, table: Any) -> None:
    reads: list[int] = []
    read = table.take

    def counting(*arguments: Any) -> Any:
        reads.append(1)
        return read(*arguments)

    table.take = counting

    async def scene() -> None:
        async with serving(table) as caller:
            server = caller.server
            await away(server)
            for _ in range(3):
                await caller.send(take=take(100))
            await until(lambda: server._pending == 3)
            caller.stream.cancel()
            await until(lambda: server._pending == 0)
            back(server)
            other = Caller(server, caller.stub)
            assert (await other.ask(take=take(100))).code == 0
            assert len(reads) == 1

    run(scene())


def test_health_names_the_shard_and_ends_with_the_server(run: Any, table: Any) -> None:
    async def scene() -> None:
        async with (
            serving(table) as caller,
            grpc.aio.insecure_channel(caller.server.address) as channel,
        ):
            stub = health_pb2_grpc.HealthStub(channel)
            for name in ("", "table/users/1"):
                status = await stub.Check(health_pb2.HealthCheckRequest(service=name))
                assert status.status == health_pb2.HealthCheckResponse.SERVING
            watch = stub.Watch(health_pb2.HealthCheckRequest(service="table/users/1"))
            assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
            stopping = asyncio.create_task(caller.server.stop(5))
            assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
            watch.cancel()
            caller.stream.cancel()
            await stopping

    run(scene())


def test_hosts_and_ports_that_cannot_be_bound_are_refused(run: Any, table: Any) -> None:
    async def scene() -> None:
        with pytest.raises(ConfigError, match=r"listen\.host must be a loopback address"):
            await TableServer(table, host="0.0.0.0").start()
        async with serving(table) as caller:
            port = int(caller.server.address.rsplit(":", 1)[1])
            with pytest.raises(StateError, match="the port is in use"):
                await TableServer(table, port=port).start()

    run(scene())


def test_every_start_is_a_later_incarnation(table: TableShard) -> None:
    first = TableServer(table)
    assert TableServer(table).epoch > first.epoch > 0


def test_rows_that_change_under_load_are_never_torn_for_a_client(run: Any, table: Any) -> None:
    rows = np.arange(100, 200)
    ended = threading.Event()

    def flip(server: TableServer) -> None:
        version = 0
        while not ended.is_set():
            version += 1
            table.apply(version, rows, np.full((100, 8), version % 2000, dtype=np.float32))
            server.advanced()

    async def scene() -> None:
        async with serving(table) as caller:
            writer = threading.Thread(target=flip, args=(caller.server,))
            writer.start()
            try:
                for _ in range(300):
                    # Some are there already, and some are waited for.
                    version = table.row_version + 2
                    reply = await caller.ask(take=take(*rows.tolist()), row_version=version)
                    assert reply.code == 0
                    found = dequantize_rows(np.frombuffer(reply.records, np.uint8).reshape(-1, 12))
                    assert (found == version % 2000).all()
            finally:
                ended.set()
                writer.join(10)

    run(scene())


def test_a_table_server_needs_no_torch() -> None:
    code = "import sys, silvershard.cluster.table_server\nprint('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "False", done.stderr

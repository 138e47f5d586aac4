import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc.aio
import pytest

from silvershard.cluster import table_pb2, table_pb2_grpc
from silvershard.cluster.config import PingSection
from silvershard.cluster.listen import server_options
from silvershard.cluster.table_link import Outcome, Refused, TableLink
from silvershard.cluster.table_map import TableEntry

EPOCH = 7
PATIENT = PingSection(every_ms=20, suspect_after=50, eject_after=500)


class Shard(table_pb2_grpc.TableServicer):
    """A table server that answers as a test says."""

    def __init__(self) -> None:
        self.calls: list[Any] = []
        self.answering = asyncio.Event()
        self.answering.set()
        self.reply: Callable[[Any], Any] = lambda call: table_pb2.TableReply(
            call_id=call.call_id, epoch=EPOCH
        )

    async def Execute(self, _requests: object, context: Any) -> None:  # type: ignore[override]
        await context.send_initial_metadata(())
        while (call := await context.read()) is not grpc.aio.EOF:
            self.calls.append(call)
            await self.answering.wait()
            reply = self.reply(call)
            if reply is not None:
                await context.write(reply)

    async def start(self, port: int = 0) -> str:
        self.server = grpc.aio.server(options=server_options(1 << 20))
        table_pb2_grpc.add_TableServicer_to_server(self, self.server)
        port = self.server.add_insecure_port(f"127.0.0.1:{port}")
        await self.server.start()
        return f"127.0.0.1:{port}"


class Bench:
    """A link to a shard, and what it handed on."""

    def __init__(self, shard: Shard, address: str, ping: PingSection) -> None:
        self.shard = shard
        self.address = address
        entry = TableEntry(shard=0, address=address, epoch=EPOCH, rows=9, pid=1)
        self.link = TableLink(entry, ping)

    def send(self, remaining_s: float = 5.0, data: bytes = b"12345678") -> asyncio.Future[Outcome]:
        future: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()

        call = table_pb2.TableCall(take=table_pb2.Take(positions=data))
        future.call_id = self.link.send(call, remaining_s, future.set_result)  # type: ignore[attr-defined]
        return future

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(8):
            while not condition():
                await asyncio.sleep(0.002)


@asynccontextmanager
async def linked(ping: PingSection = PATIENT) -> AsyncIterator[Bench]:
    shard = Shard()
    bench = Bench(shard, await shard.start(), ping)
    bench.link.start()
    try:
        yield bench
    finally:
        await bench.link.aclose()
        await shard.server.stop(0)


def is_beat(call: Any) -> bool:
    return call.WhichOneof("op") == "take" and not call.take.positions


def test_a_call_carries_what_the_shard_checks(run: Any) -> None:
    async def scene() -> None:
        async with linked() as bench:
            bench.shard.reply = lambda call: table_pb2.TableReply(
                call_id=call.call_id, epoch=EPOCH, records=call.take.positions
            )
            outcome = await bench.send()
            assert isinstance(outcome, table_pb2.TableReply)
            assert outcome.records == b"12345678"
            call = next(one for one in bench.shard.calls if not is_beat(one))
            assert (call.epoch, call.remaining_us) == (EPOCH, 5_000_000)

    run(scene())


def test_beats_are_sent_without_a_call_and_one_at_a_time(run: Any) -> None:
    async def scene() -> None:
        async with linked(PingSection(every_ms=5, suspect_after=50, eject_after=500)) as bench:
            await bench.until(lambda: len(bench.shard.calls) >= 3)
            assert all(is_beat(one) for one in bench.shard.calls)
            assert bench.link.reached
            bench.shard.answering.clear()
            await bench.until(lambda: bench.link._misses >= 5)
            assert len(bench.link._connection.pending) == 1

    run(scene())


def test_a_refusal_is_no_answer_but_a_sign_of_life(run: Any) -> None:
    async def scene() -> None:
        async with linked() as bench:
            bench.shard.reply = lambda call: table_pb2.TableReply(
                call_id=call.call_id, epoch=EPOCH, code=8, message="too many"
            )
            assert await bench.send() == Refused("RESOURCE_EXHAUSTED", "too many")
            assert bench.link._heard

    run(scene())


def test_another_incarnation_on_the_address_is_neither_an_answer_nor_a_sign_of_life(
    run: Any,
) -> None:
    async def scene() -> None:
        async with linked(PingSection(every_ms=5, suspect_after=2, eject_after=3)) as bench:
            bench.shard.reply = lambda call: table_pb2.TableReply(
                call_id=call.call_id, epoch=EPOCH + 1
            )
            assert await bench.send() == Refused("UNAVAILABLE", "answered as epoch 8, 7 was asked")
            await bench.until(lambda: bench.link.hung)

    run(scene())


def test_a_lost_connection_fails_what_is_in_flight_and_comes_back(run: Any) -> None:
    async def scene() -> None:
        async with linked() as bench:
            await bench.send()
            bench.shard.answering.clear()
            waiting = bench.send()
            await bench.until(lambda: not is_beat(bench.shard.calls[-1]))
            await bench.shard.server.stop(0)
            outcome = await waiting
            assert isinstance(outcome, Refused)
            assert outcome.code == "UNAVAILABLE"
            await bench.until(lambda: not bench.link.reached)
            # Nobody is there: no call waits for its deadline.
            assert await bench.send() == Refused("UNAVAILABLE", f"no answer from {bench.address}")
            bench.shard.answering.set()
            await bench.shard.start(int(bench.address.rsplit(":", 1)[1]))
            await bench.until(lambda: bench.link.reached)
            assert isinstance(await bench.send(), table_pb2.TableReply)

    run(scene())


def test_a_shard_that_hangs_is_not_asked_until_it_answers_again(run: Any) -> None:
    async def scene() -> None:
        async with linked(PingSection(every_ms=10, suspect_after=2, eject_after=3)) as bench:
            await bench.until(lambda: bench.link.reached)
            bench.shard.answering.clear()
            await bench.until(lambda: bench.link.hung)
            assert not bench.link.reached
            assert await bench.send() == Refused("UNAVAILABLE", f"no answer from {bench.address}")
            bench.shard.answering.set()
            await bench.until(lambda: bench.link.reached)
            assert isinstance(await bench.send(), table_pb2.TableReply)

    run(scene())


def test_a_call_before_the_connection_waits_for_it(run: Any) -> None:
    async def scene() -> None:
        shard = Shard()
        bench = Bench(shard, await shard.start(), PATIENT)
        bench.link.start()
        assert not bench.link.reached
        assert isinstance(await bench.send(), table_pb2.TableReply)
        await bench.link.aclose()
        await shard.server.stop(0)

    run(scene())


def test_a_forgotten_call_is_heard_of_no_more_but_its_answer_is_a_sign_of_life(run: Any) -> None:
    async def scene() -> None:
        async with linked() as bench:
            await bench.send()
            bench.shard.answering.clear()
            waiting = bench.send()
            bench.link.forget(waiting.call_id)  # type: ignore[attr-defined]
            bench.link.forget(10**6)
            bench.link._heard = False
            bench.shard.answering.set()
            await bench.until(lambda: not bench.link._connection.pending)
            assert bench.link._heard
            assert not waiting.done()

    run(scene())


def test_bytes_that_are_no_reply_end_the_connection_and_are_logged(
    run: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scene() -> None:
        async with linked() as bench:
            await bench.send()

            def broken(*_: Any) -> None:
                # What the library makes of bytes that are no message.
                raise ValueError("garbled")

            with monkeypatch.context() as patch:
                patch.setattr(bench.link, "_receive", broken)
                outcome = await bench.send()
                assert outcome == Refused("UNAVAILABLE", "malformed answer: garbled")
            assert f"table shard 0 at {bench.address}: malformed answer: garbled" in caplog.text
            await bench.until(lambda: bench.link.reached)
            assert isinstance(await bench.send(), table_pb2.TableReply)

    run(scene())


def test_closing_fails_what_is_in_flight_and_leaves_no_task(run: Any) -> None:
    async def scene() -> None:
        async with linked() as bench:
            await bench.send()
            bench.shard.answering.clear()
            waiting = bench.send()
            await bench.link.aclose()
            assert await waiting == Refused("UNAVAILABLE", "the link was closed")
            assert all(task.done() for task in bench.link._tasks)
            bench.shard.answering.set()

    run(scene())

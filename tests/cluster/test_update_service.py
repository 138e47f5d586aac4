import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from silvershard.cluster import retrieval_pb2, retrieval_pb2_grpc, update_pb2
from silvershard.cluster.live_generation import load_live_generation
from silvershard.cluster.sequencer import Sequencer
from silvershard.cluster.sequencer_server import MAX_MUTATIONS, SequencerServer
from silvershard.cluster.service import DETAILS, PUSHBACK
from silvershard.cluster.update_log import open_log
from silvershard.cluster.update_message import mutation_to
from silvershard.cluster.update_service import UpdateService
from silvershard.cluster.updates import ItemPatch, ItemUpsert, Update, result_from

SEQUENCER = update_pb2.DESCRIPTOR.services_by_name["Sequencer"].full_name


def request(*updates: Update, **fields: Any) -> retrieval_pb2.ApplyRequest:
    return retrieval_pb2.ApplyRequest(mutations=[mutation_to(one) for one in updates], **fields)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.001)


class Front:
    """An update service on a server of its own; ``address`` is where it finds the sequencer."""

    def __init__(self) -> None:
        self.address: str | None = None
        self.service = UpdateService(lambda: self.address)
        self.stub: Any = None
        self.sequencers: list[SequencerServer] = []


@pytest.fixture
def front(generation: Any, tmp_path: Path) -> Callable[..., Any]:
    """``async with front(...) as one`` runs a sequencer behind a service."""

    @asynccontextmanager
    async def running(**options: Any) -> AsyncIterator[Front]:
        log = open_log(f"sqlite://{tmp_path}/log.db")
        one = Front()
        sequencer = SequencerServer(
            Sequencer(log, load_live_generation(generation.path)), **options
        )
        await sequencer.start()
        one.sequencers.append(sequencer)
        one.address = sequencer.address
        server = grpc.aio.server()
        one.service.add_to(server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        try:
            async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
                one.stub = retrieval_pb2_grpc.UpdatesStub(channel)
                yield one
        finally:
            await server.stop(0)
            await one.service.aclose()
            for sequencer in one.sequencers:
                await sequencer.stop(0)
            log.close()

    return running


def test_updates_and_refusals_pass_through(run: Any, front: Any) -> None:
    async def scene() -> None:
        async with front(max_queue=100) as one:
            reply = result_from(await one.stub.Apply(request(ItemUpsert(1), ItemPatch(2))))
            assert reply.tokens[0].position == 1
            assert [refusal.code for refusal in reply.rejected] == ["NOT_FOUND"]
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await one.stub.Apply(request(*[ItemUpsert(1)] * (MAX_MUTATIONS + 1)))
            assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert DETAILS in dict(raised.value.trailing_metadata())
            one.sequencers[0]._queued.updates = 100
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await one.stub.Apply(request(ItemUpsert(1)))
            assert raised.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert PUSHBACK in dict(raised.value.trailing_metadata())

    run(scene())


def test_without_a_sequencer_nothing_is_taken(run: Any, front: Any) -> None:
    async def scene() -> None:
        async with front() as one:
            one.address = None
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await one.stub.Apply(request(ItemUpsert(1)))
            assert raised.value.code() is grpc.StatusCode.UNAVAILABLE
            assert "no sequencer takes updates" in raised.value.details()
            stream = one.stub.StreamUpdates()
            with pytest.raises(grpc.aio.AioRpcError, match="no sequencer takes updates"):
                await stream.read()

    run(scene())


def test_a_sequencer_that_is_gone_leaves_the_outcome_unknown(run: Any, front: Any) -> None:
    async def scene() -> None:
        async with front() as one:
            await one.stub.Apply(request(ItemUpsert(1)))
            await one.sequencers[0].stop(0)
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await one.stub.Apply(request(ItemUpsert(1)))
            assert raised.value.code() is grpc.StatusCode.UNAVAILABLE
            assert "what became of the updates is unknown" in raised.value.details()

    run(scene())


def test_a_sequencer_that_moves_is_followed_on_one_channel(run: Any, front: Any) -> None:
    async def scene() -> None:
        async with front() as one:
            await one.stub.Apply(request(ItemUpsert(1)))
            link = one.service._link
            await one.stub.Apply(request(ItemUpsert(2)))
            assert one.service._link is link
            first = one.sequencers[0].sequencer
            second = SequencerServer(Sequencer(first.log, first.live))
            await second.start()
            one.sequencers.append(second)
            one.address = second.address
            reply = result_from(await one.stub.Apply(request(ItemUpsert(3))))
            assert reply.tokens[0].position == 3
            assert one.service._link is not link
            await until(lambda: not one.service._closing)

    run(scene())


def test_a_call_waits_for_the_sequencer_that_took_the_log_over(run: Any, front: Any) -> None:
    async def scene() -> None:
        async with front() as one:
            await one.stub.Apply(request(ItemUpsert(1)))
            first = one.sequencers[0].sequencer
            second = SequencerServer(Sequencer(first.log, first.live))
            await second.start()
            one.sequencers.append(second)
            calls = [asyncio.create_task(ask_for(one, item)) for item in (2, 3)]
            await until(lambda: one.sequencers[0]._stepped_down)
            assert not any(call.done() for call in calls)
            one.address = None
            await asyncio.sleep(0)
            one.address = second.address
            positions = [result.tokens[0].position for result in await asyncio.gather(*calls)]
            assert sorted(positions) == [2, 3]

    run(scene())


async def ask_for(one: Front, item: int) -> Any:
    return result_from(await one.stub.Apply(request(ItemUpsert(item)), timeout=30))


def test_a_call_that_nobody_takes_over_says_who_lost_the_log(run: Any, front: Any) -> None:
    async def scene() -> None:
        async with front() as one:
            first = one.sequencers[0].sequencer
            Sequencer(first.log, first.live)
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await one.stub.Apply(request(ItemUpsert(2)), timeout=0.5)
            assert raised.value.code() in (
                grpc.StatusCode.UNAVAILABLE,
                grpc.StatusCode.DEADLINE_EXCEEDED,
            )

    run(scene())


class Stopped:
    """A sequencer whose process does not run; ``go_on`` lets it answer what it was asked."""

    def __init__(self) -> None:
        self.asked = 0
        self.go_on = asyncio.Event()
        self._server = grpc.aio.server()

    async def __aenter__(self) -> "Stopped":
        handlers = {
            "Apply": grpc.unary_unary_rpc_method_handler(self._apply),
            "StreamUpdates": grpc.stream_stream_rpc_method_handler(self._stream),
        }
        self._server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler(SEQUENCER, handlers),)
        )
        self.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        await self._server.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._server.stop(0)

    async def _apply(self, _request: bytes, _context: Any) -> bytes:
        self.asked += 1
        await self.go_on.wait()
        return b""

    async def _stream(self, _requests: object, context: Any) -> None:
        await context.read()
        await context.write(await self._apply(b"", context))


async def ask(one: Front, kind: str) -> None:
    if kind == "Apply":
        await one.stub.Apply(request(ItemUpsert(1)), timeout=60)
        return
    stream = one.stub.StreamUpdates(timeout=60)
    await stream.write(request(ItemUpsert(1)))
    assert await stream.read() is not grpc.aio.EOF


@pytest.mark.parametrize("kind", ["Apply", "StreamUpdates"])
@pytest.mark.parametrize("moves", [True, False])
def test_a_call_to_a_sequencer_that_hangs_ends_when_it_moves(
    run: Any, front: Any, kind: str, moves: bool
) -> None:
    async def scene() -> None:
        async with front() as one, Stopped() as stopped:
            moved, one.address = one.address, stopped.address
            call = asyncio.create_task(ask(one, kind))
            await until(lambda: stopped.asked == 1)
            one.address = moved if moves else None
            async with asyncio.timeout(5):
                with pytest.raises(grpc.aio.AioRpcError) as raised:
                    await call
            assert raised.value.code() is grpc.StatusCode.UNAVAILABLE
            assert "what became of the updates is unknown: it has moved" in raised.value.details()
            one.address = moved
            await ask(one, kind)

    run(scene())


def test_two_calls_to_two_sequencers_that_hang_both_end(run: Any, front: Any) -> None:
    async def scene() -> None:
        async with front() as one, Stopped() as first, Stopped() as second:
            moved = one.address
            calls = []
            for stopped in (first, second):
                one.address = stopped.address
                calls.append(asyncio.create_task(ask(one, "Apply")))
                await until(lambda stopped=stopped: stopped.asked == 1)
            one.address = moved
            async with asyncio.timeout(5):
                found = await asyncio.gather(*calls, return_exceptions=True)
            assert [getattr(error, "code", str)() for error in found] == [
                grpc.StatusCode.UNAVAILABLE
            ] * 2

    run(scene())


@pytest.mark.parametrize("kind", ["Apply", "StreamUpdates"])
def test_what_a_sequencer_that_moved_still_answers_passes(run: Any, front: Any, kind: str) -> None:
    async def scene() -> None:
        async with front() as one, Stopped() as stopped:
            moved, one.address = one.address, stopped.address
            call = asyncio.create_task(ask(one, kind))
            await until(lambda: stopped.asked == 1)
            one.address = moved
            await one.stub.Apply(request(ItemUpsert(2)))
            stopped.go_on.set()
            await call

    run(scene())


def test_a_stream_passes_both_ways_in_order(run: Any, front: Any) -> None:
    async def scene() -> None:
        async with front() as one:
            stream = one.stub.StreamUpdates()
            await stream.write(request(ItemUpsert(1)))
            first = result_from(await stream.read())
            assert first.tokens[0].position == 1
            for at in range(50):
                await stream.write(request(ItemUpsert(at), ItemPatch(1)))
            await stream.write(request(ItemUpsert(1), model="books"))
            await stream.done_writing()
            found = [result_from(await stream.read()) for _ in range(51)]
            assert await stream.read() is grpc.aio.EOF
            assert [answer.tokens[0].position for answer in found[:-1]] == list(range(3, 103, 2))
            assert [refusal.code for refusal in found[-1].rejected] == ["NOT_FOUND"]

    run(scene())


def test_a_stream_breaks_off_with_its_sequencer(run: Any, front: Any) -> None:
    async def scene() -> None:
        async with front() as one:
            stream = one.stub.StreamUpdates()
            await stream.write(request(ItemUpsert(1)))
            assert result_from(await stream.read()).tokens
            await one.sequencers[0].stop(0)
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await stream.read()
            assert raised.value.code() is grpc.StatusCode.UNAVAILABLE

    run(scene())


def test_a_client_that_goes_away_ends_its_stream(run: Any, front: Any) -> None:
    async def scene() -> None:
        async with front() as one:
            stream = one.stub.StreamUpdates()
            await stream.write(request(ItemUpsert(1)))
            await stream.read()
            stream.cancel()
            await one.stub.Apply(request(ItemUpsert(2)))
            assert one.sequencers[0]._queued.updates == 0

    run(scene())

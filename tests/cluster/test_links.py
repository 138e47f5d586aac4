import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import grpc.aio
import pytest
import torch

from silvershard.cluster import shard_pb2, shard_pb2_grpc, tensors, wire
from silvershard.cluster.config import PingSection
from silvershard.cluster.consistency import Consistency, UpdateToken
from silvershard.cluster.freshness import Demand, Seen
from silvershard.cluster.links import Connections, GrpcShardLink, Links
from silvershard.cluster.listen import bind, server_options
from silvershard.cluster.shard_connection import ShardConnection
from silvershard.cluster.shard_link import LinkState
from silvershard.cluster.shard_map import ShardEntry, ShardMap
from silvershard.cluster.shard_server import ShardServer
from silvershard.model.compiled_request import compile_request
from silvershard.model.request import Request
from silvershard.model.retriever import assemble
from silvershard.model.types import Cutoffs, Work
from silvershard.shard.errors import (
    CandidatesExpired,
    DeadlineExceeded,
    GenerationError,
    Overloaded,
    ShardUnavailable,
)

PING = PingSection(every_ms=5, suspect_after=4, eject_after=8)
# Pings that a busy machine answers late leave the state to what the test does.
PATIENT = PingSection(every_ms=5, suspect_after=2000, eject_after=2000)
EVERYTHING = Cutoffs(torch.full((2, 2), float("-inf")), torch.full((2, 2), 2**63 - 1))
SCAN = torch.zeros(2, 0, 4, dtype=torch.int64)
Reply = shard_pb2.ShardReply


class Scripted(shard_pb2_grpc.ShardServicer):
    """A shard that replies what the test says."""

    def __init__(self) -> None:
        self.reply: Callable[[shard_pb2.ShardCall], list[Reply]] = lambda call: []
        self.calls: list[shard_pb2.ShardCall] = []
        self.epoch = 7
        self.generations = [1]
        self.answers_pings = True
        self.address = ""
        self.streams: list[Any] = []

    async def Execute(self, _: object, context: Any) -> None:
        self.streams.append(context)
        await context.send_initial_metadata(wire.METADATA)
        while (call := await context.read()) is not grpc.aio.EOF:
            self.calls.append(call)
            for reply in self.reply(call):
                await context.write(reply)

    async def Ping(self, _: object, context: Any) -> None:
        while (beat := await context.read()) is not grpc.aio.EOF:
            if self.answers_pings:
                served = [shard_pb2.ServedGeneration(generation=one) for one in self.generations]
                await context.write(
                    shard_pb2.Beat(sequence=beat.sequence, epoch=self.epoch, served=served)
                )

    @asynccontextmanager
    async def serving(self, port: int = 0) -> AsyncIterator[None]:
        server = grpc.aio.server(options=server_options(1 << 20))
        shard_pb2_grpc.add_ShardServicer_to_server(self, server)
        self.address = bind(server, "127.0.0.1", port)
        await server.start()
        try:
            yield
        finally:
            await server.stop(0)


def entry(address: str, epoch: int = 7, shard: int = 0, replica: int = 0) -> ShardEntry:
    return ShardEntry(
        shard=shard, replica=replica, address=address, epoch=epoch, documents=1, pid=1
    )


@asynccontextmanager
async def linked(
    one: ShardEntry, generation: int = 1, ping: PingSection = PING
) -> AsyncIterator[GrpcShardLink]:
    connection = ShardConnection(one, ping)
    connection.start()
    try:
        yield GrpcShardLink(connection, generation)
    finally:
        await connection.aclose()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(8):
        while not condition():
            await asyncio.sleep(0.002)


def answering(**fields: Any) -> Callable[[shard_pb2.ShardCall], list[Reply]]:
    def reply(call: shard_pb2.ShardCall) -> list[Reply]:
        return [Reply(**{"call_id": call.call_id, "generation": 1, "epoch": 7, **fields})]

    return reply


def counts(*values: int) -> shard_pb2.TensorMap:
    return tensors.to_map({"count": torch.tensor(values)})


@pytest.fixture
def work(whole: Any) -> Work:
    requests = [Request(features={"history": [1]}, k=3), Request(k=5)]
    compiled = [compile_request(one, whole.spec) for one in requests]
    encoded = whole.encode([one.features for one in compiled])
    plans = [one.plan(whole.spec, None) for one in compiled]
    return assemble(compiled, plans, encoded.embedding, encoded.user_state)


def test_a_link_gives_what_the_executor_gives_bit_for_bit(
    run: Any, make_executors: Any, work: Work, map_entry: Any
) -> None:
    executor = make_executors(2)[1]
    local = make_executors(2)[1]

    async def scene() -> None:
        server = ShardServer(executor)
        await server.start()
        try:
            async with linked(map_entry(server)) as link:
                users = [{"history": (1, 2**60)}, {"history": ()}]
                (encoded, seen), expected = await link.encode(users, 5), local.encode(users)
                assert seen == Seen(0, (), 0.0, executor.documents)
                assert torch.equal(encoded.embedding, expected.embedding)
                assert torch.equal(encoded.user_state, expected.user_state)
                assert encoded.warnings == expected.warnings
                assert any(encoded.warnings)
                assert encoded.fallback == (False, False)
                executor.encode = lambda _: expected._replace(fallback=(False, True))
                assert (await link.encode(users, 5))[0].fallback == (False, True)
                assert torch.equal(await link.count(work.scan, 5), local.count(work.scan))
                (first, seen), expected_first = (
                    await link.open("a", work, 5),
                    local.open("a", work, 1e9),
                )
                assert seen == Seen(0, (), 0.0, executor.documents)
                for got, wanted in zip(first[:4], expected_first[:4], strict=True):
                    assert torch.equal(got, wanted)
                cutoffs = Cutoffs(first.scores[:, :, 3], first.item_ids[:, :, 3])
                second = await link.close("a", cutoffs, 5)
                expected_second = local.close("a", cutoffs)
                for got, wanted in zip(second[:6], expected_second[:6], strict=True):
                    assert torch.equal(got, wanted)
                ids = second.item_ids[1][:2].tolist()
                assert await link.fields("a", ids, ["title", "year"], 5) == local.fields(
                    ids, ["title", "year"]
                )
                link.release("a")
                await until(lambda: executor.num_open == 0)
        finally:
            await server.stop(0)

    run(scene())


def test_calls_share_a_stream_and_answers_may_come_in_any_order(run: Any) -> None:
    shard = Scripted()
    held: list[shard_pb2.ShardCall] = []

    def reply(call: shard_pb2.ShardCall) -> list[Reply]:
        held.append(call)
        if len(held) < 3:
            return []
        return [
            answering(tensors=counts(one.call_id, int(one.count.layout.split()[2])))(one)[0]
            for one in reversed(held)
        ]

    shard.reply = reply

    async def scene() -> None:
        async with shard.serving(), linked(entry(shard.address)) as link:
            found = await asyncio.gather(*(link.count(SCAN, 5) for _ in range(3)))
            assert [one.tolist() for one in found] == [[1, 2], [2, 2], [3, 2]]
            assert len(shard.streams) == 1

    run(scene())


def test_a_call_names_the_incarnation_and_the_time_left(run: Any) -> None:
    shard = Scripted()
    shard.reply = answering(tensors=counts(1, 2))

    async def scene() -> None:
        async with shard.serving(), linked(entry(shard.address)) as link:
            await link.count(SCAN, 1.5)
            (call,) = shard.calls
            assert (call.generation, call.epoch, call.remaining_us) == (1, 7, 1_500_000)

    run(scene())


@pytest.mark.parametrize(
    ("fields", "error", "text"),
    [
        ({"epoch": 6}, ShardUnavailable, "answered as epoch 6, 7 was asked"),
        ({"epoch": 8, "code": 9, "reason": "STALE_EPOCH"}, ShardUnavailable, "epoch 8"),
        ({"generation": 2}, GenerationError, "generation 1 was asked for, this shard holds 2"),
        (
            {"generation": 2, "code": 9, "reason": "VERSION_MISMATCH"},
            *(GenerationError, "generation 1 was asked for"),
        ),
        ({"code": 10, "reason": "CANDIDATES_EXPIRED"}, CandidatesExpired, "no open candidates"),
        ({"code": 4, "message": "late"}, DeadlineExceeded, "shard 0: late"),
        ({"code": 8, "message": "full"}, Overloaded, "shard 0: full"),
        ({"code": 13, "message": "internal error 1"}, ShardUnavailable, "INTERNAL: internal error"),
        ({"code": 3, "message": "bad"}, ShardUnavailable, "INVALID_ARGUMENT: bad"),
        ({}, ShardUnavailable, "malformed answer: tensor 'count' is missing"),
        ({"tensors": counts(1)}, ShardUnavailable, "malformed answer: answer must be of shape"),
        ({"tensors": counts(1, 2, 3)}, ShardUnavailable, "malformed answer"),
    ],
)
def test_an_answer_that_cannot_be_used_is_refused(
    run: Any, fields: dict[str, Any], error: type[Exception], text: str
) -> None:
    shard = Scripted()
    shard.reply = answering(**fields)

    async def scene() -> None:
        async with shard.serving(), linked(entry(shard.address), ping=PATIENT) as link:
            with pytest.raises(error) as raised:
                await link.count(SCAN, 5)
            assert text in str(raised.value)
            assert link.state is LinkState.UP
            shard.reply = answering(tensors=counts(1, 2))
            assert (await link.count(SCAN, 5)).tolist() == [1, 2]

    run(scene())


def test_answers_for_another_batch_are_refused(run: Any, work: Work, whole: Any) -> None:
    shard = Scripted()
    first, candidates = whole.open(work)
    cutoffs = whole.merge.cutoffs([first], work.ann_k)
    second = whole.close(work, candidates, cutoffs)
    one_head = first._replace(scores=first.scores[:, :1], item_ids=first.item_ids[:, :1])

    async def scene() -> None:
        async with shard.serving(), linked(entry(shard.address)) as link:
            shard.reply = answering(tensors=tensors.round_to_map(one_head))
            with pytest.raises(ShardUnavailable, match="must be of shape"):
                await link.open("a", work, 5)
            shard.reply = answering(tensors=tensors.round_to_map(second))
            one = Cutoffs(cutoffs.scores[:1], cutoffs.item_ids[:1])
            with pytest.raises(ShardUnavailable, match="must be of shape"):
                await link.close("a", one, 5)
            shard.reply = answering(fields=shard_pb2.FieldColumns())
            with pytest.raises(ShardUnavailable, match="must have 1 values, got 0"):
                await link.fields("a", [1], ["title"], 5)

    run(scene())


def test_a_silent_shard_costs_the_time_given_and_nothing_else(run: Any) -> None:
    shard = Scripted()

    async def scene() -> None:
        async with shard.serving(), linked(entry(shard.address)) as link:
            with pytest.raises(DeadlineExceeded, match=r"did not answer within 0\.010 s"):
                await link.count(SCAN, 0.01)
            task = asyncio.ensure_future(link.count(SCAN, 5))
            await until(lambda: len(shard.calls) == 2)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            late = answering(tensors=counts(9, 9))(shard.calls[0])
            shard.reply = lambda call: [*late, *answering(tensors=counts(1, 2))(call)]
            assert (await link.count(SCAN, 5)).tolist() == [1, 2]
            assert len(shard.streams) == 1

    run(scene())


def test_without_a_server_a_link_is_down_and_fails_at_once(run: Any) -> None:
    async def scene() -> None:
        shard = Scripted()
        async with shard.serving():
            pass
        async with linked(entry(shard.address)) as link:
            assert link.state is LinkState.UP
            assert not link.reached
            with pytest.raises(ShardUnavailable):
                await link.count(SCAN, 5)
            assert link.state is LinkState.DOWN
            with pytest.raises(ShardUnavailable):
                await link.count(SCAN, 5)
            link.release("a")

    run(scene())


def test_calls_in_flight_fail_with_the_connection_and_the_link_comes_back(run: Any) -> None:
    async def scene() -> None:
        shard = Scripted()
        async with linked_to_a_port(shard) as link:
            port = int(shard.address.split(":")[1])
            async with shard.serving(port):
                await until(lambda: link.reached)
                task = asyncio.ensure_future(link.count(SCAN, 8))
                await until(lambda: bool(shard.calls))
            with pytest.raises(ShardUnavailable):
                await task
            assert link.state is LinkState.DOWN
            shard.reply = answering(tensors=counts(1, 2))
            async with shard.serving(port):
                await until(lambda: link.reached)
                assert (await link.count(SCAN, 5)).tolist() == [1, 2]

    run(scene())


@asynccontextmanager
async def linked_to_a_port(shard: Scripted) -> AsyncIterator[GrpcShardLink]:
    async with shard.serving():
        pass
    async with linked(entry(shard.address)) as link:
        yield link


def test_a_shard_that_misses_pings_is_suspect_then_ejected_then_back(run: Any) -> None:
    shard = Scripted()

    async def scene() -> None:
        async with shard.serving(), linked(entry(shard.address)) as link:
            await until(lambda: link.reached)
            await until(lambda: link.state is LinkState.UP)
            shard.answers_pings = False
            seen = []

            def ejected() -> bool:
                if not seen or seen[-1] is not link.state:
                    seen.append(link.state)
                return link.state is LinkState.EJECTED

            await until(ejected)
            assert seen == [LinkState.UP, LinkState.SUSPECT, LinkState.EJECTED]
            assert not link.reached
            shard.answers_pings = True
            await until(lambda: link.state is LinkState.UP)

    run(scene())


def test_answers_count_as_signs_of_life_like_pings(run: Any) -> None:
    shard = Scripted()
    shard.answers_pings = False
    shard.reply = answering(tensors=counts(1, 2))

    async def scene() -> None:
        async with shard.serving(), linked(entry(shard.address)) as link:
            await until(lambda: link.state is LinkState.EJECTED)
            await link.count(SCAN, 5)
            await until(lambda: link.state is LinkState.UP)

    run(scene())


def test_pings_of_another_incarnation_are_no_sign_of_life(run: Any) -> None:
    shard = Scripted()
    shard.epoch = 8

    async def scene() -> None:
        async with shard.serving(), linked(entry(shard.address)) as link:
            await until(lambda: link.state is LinkState.EJECTED)

    run(scene())


def test_bytes_that_are_no_reply_break_the_stream_and_not_the_link(
    run: Any, caplog: pytest.LogCaptureFixture
) -> None:
    garbage = [True]

    async def execute(_: object, context: Any) -> None:
        await context.send_initial_metadata(wire.METADATA)
        while (data := await context.read()) is not grpc.aio.EOF:
            if garbage.pop() if garbage else False:
                await context.write(b"\xff\xff\xff")
            else:
                call = shard_pb2.ShardCall.FromString(data)
                (reply,) = answering(tensors=counts(1, 2))(call)
                await context.write(reply.SerializeToString())

    async def ping(_: object, context: Any) -> None:
        await context.read()
        await context.write(b"\xff\xff\xff")

    handlers = {
        "Execute": grpc.stream_stream_rpc_method_handler(execute),
        "Ping": grpc.stream_stream_rpc_method_handler(ping),
    }
    name = "silvershard.internal.v1.Shard"

    async def scene() -> None:
        server = grpc.aio.server(options=server_options(1 << 20))
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(name, handlers),))
        address = bind(server, "127.0.0.1", 0)
        await server.start()
        try:
            async with linked(entry(address)) as link:
                with pytest.raises(ShardUnavailable, match="malformed answer"):
                    await link.count(SCAN, 5)
                await until(lambda: link.connection._connected is True)
                assert (await link.count(SCAN, 5)).tolist() == [1, 2]
                await until(lambda: "pings of shard 0: malformed" in caplog.text)
                await until(lambda: link.state is LinkState.EJECTED)
        finally:
            await server.stop(0)

    run(scene())


def test_a_stream_cancelled_on_this_side_is_opened_again(run: Any) -> None:
    shard = Scripted()
    shard.reply = answering(tensors=counts(1, 2))

    async def scene() -> None:
        async with shard.serving(), linked(entry(shard.address)) as link:
            await until(lambda: link.reached)
            # A message beyond the limit ends the stream that carries it.
            with pytest.raises(ShardUnavailable):
                await link.count(torch.zeros(2, 1 << 15, 4, dtype=torch.int64), 5)
            await until(lambda: link.reached)
            assert (await link.count(SCAN, 5)).tolist() == [1, 2]

    run(scene())


def test_closing_a_link_fails_what_is_in_flight(run: Any) -> None:
    shard = Scripted()

    async def scene() -> None:
        async with shard.serving(), linked(entry(shard.address)) as link:
            task = asyncio.ensure_future(link.count(SCAN, 5))
            await until(lambda: bool(shard.calls))
            await link.connection.aclose()
            with pytest.raises(ShardUnavailable, match="the link was closed"):
                await task

    run(scene())


def test_the_links_follow_the_map(run: Any) -> None:
    def shard_map(version: int, *entries: ShardEntry) -> ShardMap:
        return ShardMap(version=version, generation=1, snapshot="s", num_shards=2, entries=entries)

    async def scene() -> None:
        first, second = Scripted(), Scripted()
        first.reply = second.reply = answering(tensors=counts(1, 2))
        connections = Connections(PING)
        links = Links(connections, 1)
        async with first.serving(), second.serving():
            old = entry(first.address)
            links.update(shard_map(1, old, entry(first.address, shard=1, replica=1)))
            (kept,) = links.replicas(1)
            (replaced,) = links.replicas(0)
            await until(lambda: replaced.reached)
            new = entry(second.address, epoch=9)
            added = entry(second.address, shard=1)
            links.update(shard_map(2, new, added, entry(first.address, shard=1, replica=1)))
            assert [link.connection.entry for link in links.replicas(0)] == [new]
            assert [link.connection.entry for link in links.replicas(1)] == [
                added,
                kept.connection.entry,
            ]
            assert links.replicas(1)[1] is kept
            await until(lambda: replaced.state is LinkState.DOWN)
            links.close()
            assert not links.replicas(0)
            await connections.aclose()
            assert kept.state is LinkState.DOWN

    run(scene())


def test_a_call_carries_what_it_demands(run: Any, work: Work) -> None:
    shard = Scripted()
    shard.reply = answering(tensors=counts(1, 2))
    tokens = (UpdateToken(9, 0, 5), UpdateToken(9, 3, 7))

    async def scene() -> None:
        async with shard.serving(), linked(entry(shard.address)) as link:
            await link.count(SCAN, 5)
            await link.count(SCAN, 5, Demand(Consistency(tokens), 0.5))
            await link.count(SCAN, 5, Demand(Consistency((), 0.0), 0.25))
            demand = Demand(Consistency(tokens), 1.0)
            for ask in (link.encode([{}, {}], 5, demand), link.open("a", work, 5, demand)):
                with pytest.raises(ShardUnavailable, match="malformed"):
                    await ask
        plain, after, fresh, *others = shard.calls
        assert not plain.HasField("fresh")
        assert (after.fresh.log_id, after.fresh.wait_us) == (9, 500_000)
        assert [(one.partition, one.position) for one in after.fresh.after] == [(0, 5), (3, 7)]
        assert not after.fresh.HasField("max_staleness_us")
        assert fresh.fresh.HasField("max_staleness_us")
        assert (fresh.fresh.max_staleness_us, fresh.fresh.wait_us) == (0, 250_000)
        assert all(call.fresh.log_id == 9 for call in others)
        assert len(others) == 2

    run(scene())


def test_a_replica_without_the_generation_is_suspect_until_it_has_it(run: Any) -> None:
    shard = Scripted()

    async def scene() -> None:
        async with shard.serving(), linked(entry(shard.address), ping=PATIENT) as link:
            two = GrpcShardLink(link.connection, 2)
            await until(lambda: link.seen is not None and link.connection.reached)
            assert (link.state, two.state) == (LinkState.UP, LinkState.SUSPECT)
            assert two.seen is None
            assert (link.reached, two.reached) == (True, False)
            shard.generations = [1, 2]
            await until(lambda: two.state is LinkState.UP)
            assert two.reached

    run(scene())


def test_generations_share_the_connection_to_a_process(run: Any) -> None:
    def shard_map(generation: int, *entries: ShardEntry) -> ShardMap:
        return ShardMap(
            version=1, generation=generation, snapshot="s", num_shards=1, entries=entries
        )

    async def scene() -> None:
        shard = Scripted()
        shard.generations = [1, 2]
        async with shard.serving():
            own = entry(shard.address)
            connections = Connections(PATIENT)
            old, new = Links(connections, 1), Links(connections, 2)
            old.update(shard_map(1, own))
            (before,) = old.replicas(0)
            await until(lambda: before.reached)
            # What the entry says of documents is no reason to connect again.
            new.update(shard_map(2, own.model_copy(update={"documents": 99})))
            (after,) = new.replicas(0)
            assert after.connection is before.connection
            assert (before.generation, after.generation) == (1, 2)
            old.close()
            assert after.reached
            assert len(shard.streams) == 1
            new.close()
            await until(lambda: after.state is LinkState.DOWN)
            await connections.aclose()

    run(scene())


def map_of(*entries: ShardEntry) -> ShardMap:
    return ShardMap(version=1, generation=1, snapshot="s", num_shards=2, entries=entries)


def test_whoever_is_drained_still_answers_what_it_was_asked(run: Any) -> None:
    async def scene() -> None:
        shard = Scripted()
        async with shard.serving():
            connections = Connections(PATIENT)
            links = Links(connections, 1, linger_s=30)
            links.update(map_of(entry(shard.address)))
            (link,) = links.replicas(0)
            task = asyncio.ensure_future(link.count(SCAN, 8))
            await until(lambda: bool(shard.calls))
            links.update(map_of())
            assert not links.replicas(0)
            await asyncio.sleep(0.005)
            (call,) = shard.calls
            answer = Reply(call_id=call.call_id, generation=1, epoch=7, tensors=counts(1, 2))
            await shard.streams[0].write(answer)
            assert (await task).tolist() == [1, 2]
            await until(lambda: link.state is LinkState.DOWN)
            await connections.aclose()

    run(scene())


def test_a_drained_process_is_waited_for_no_longer_than_a_call_lives(run: Any) -> None:
    async def scene() -> None:
        shard = Scripted()
        async with shard.serving():
            for linger_s, ends in ((0.05, True), (30, False)):
                connections = Connections(PATIENT)
                links = Links(connections, 1, linger_s=linger_s)
                links.update(map_of(entry(shard.address)))
                (link,) = links.replicas(0)
                num_calls = len(shard.calls)
                task = asyncio.ensure_future(link.count(SCAN, 8))
                await until(lambda: len(shard.calls) > num_calls)  # noqa: B023
                links.update(map_of())
                if ends:
                    with pytest.raises(ShardUnavailable, match="the link was closed"):
                        await task
                # Nor for longer than the router itself.
                await connections.aclose()
                with pytest.raises(ShardUnavailable, match="the link was closed"):
                    await task

    run(scene())


def test_who_is_relieved_in_order_may_still_answer(run: Any) -> None:
    async def scene() -> None:
        shard, successor = Scripted(), Scripted()
        successor.reply = answering(tensors=counts(3, 4), epoch=9)
        async with shard.serving(), successor.serving():
            connections = Connections(PATIENT)
            links = Links(connections, 1, linger_s=30)
            links.update(map_of(entry(shard.address)))
            (link,) = links.replicas(0)
            task = asyncio.ensure_future(link.count(SCAN, 8))
            await until(lambda: bool(shard.calls))
            newer = entry(successor.address, epoch=9)
            links.update(map_of(newer.model_copy(update={"relieves": 7})))
            (call,) = shard.calls
            late = Reply(call_id=call.call_id, generation=1, epoch=7, tensors=counts(1, 2))
            await shard.streams[0].write(late)
            assert (await task).tolist() == [1, 2]
            assert (await links.replicas(0)[0].count(SCAN, 8)).tolist() == [3, 4]
            links.close()
            await connections.aclose()

    run(scene())


def test_answers_of_an_epoch_that_a_newer_map_fences_are_refused(run: Any) -> None:
    async def scene() -> None:
        shard, successor = Scripted(), Scripted()
        successor.reply = answering(tensors=counts(3, 4), epoch=9)
        async with shard.serving(), successor.serving():
            connections = Connections(PATIENT)
            links, retired = (Links(connections, 1, linger_s=30) for _ in range(2))
            for one in (links, retired):
                one.update(map_of(entry(shard.address)))
            (link,) = links.replicas(0)
            (held,) = retired.replicas(0)
            task = asyncio.ensure_future(held.count(SCAN, 8))
            await until(lambda: bool(shard.calls))
            # Links of a generation that is going out of service follow no map any more.
            links.update(map_of(entry(successor.address, epoch=9)))
            with pytest.raises(ShardUnavailable, match="epoch 7 is fenced by a newer one"):
                await task
            assert held.state is LinkState.DOWN
            assert retired.replicas(0) == (held,)
            (call,) = shard.calls
            late = Reply(call_id=call.call_id, generation=1, epoch=7, tensors=counts(1, 2))
            await shard.streams[0].write(late)
            with pytest.raises(ShardUnavailable, match="epoch 7 is fenced by a newer one"):
                await held.count(SCAN, 8)
            assert len(shard.calls) == 1
            assert link.connection is held.connection
            assert (await links.replicas(0)[0].count(SCAN, 8)).tolist() == [3, 4]
            for one in (links, retired):
                one.close()
            await connections.aclose()

    run(scene())


def test_a_call_that_nobody_waits_for_is_given_up(run: Any) -> None:
    shard = Scripted()

    async def scene() -> None:
        async with shard.serving(), linked(entry(shard.address), ping=PATIENT) as link:
            for ask in (link.count(SCAN, 8), link.encode([{}], 8)):
                shard.calls.clear()
                task = asyncio.ensure_future(ask)
                await until(lambda: bool(shard.calls))
                task.cancel()
                await until(lambda: len(shard.calls) == 2)
                asked, cancelled = shard.calls
                assert cancelled.WhichOneof("op") == "cancel"
                assert cancelled.cancel == asked.call_id
                assert task.cancelled()

    run(scene())

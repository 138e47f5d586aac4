import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc

from silvershard.cluster import retrieval_pb2, update_pb2, update_pb2_grpc
from silvershard.cluster.consistency import UpdateToken
from silvershard.cluster.feed_block import FeedBlock, RoomReport
from silvershard.cluster.live_generation import LiveGeneration, load_live_generation
from silvershard.cluster.sequencer import Sequencer
from silvershard.cluster.sequencer_server import MAX_MUTATIONS, SequencerServer
from silvershard.cluster.service import DETAILS, PUSHBACK
from silvershard.cluster.shard_map import ShardMap
from silvershard.cluster.update_log import UpdateLog, open_log
from silvershard.cluster.update_message import mutation_to
from silvershard.cluster.updates import (
    ApplyResult,
    ItemDelete,
    ItemPatch,
    ItemUpsert,
    Update,
    result_from,
)
from silvershard.shard.errors import ConfigError, LogUnavailable, StateError

LOGGED = retrieval_pb2.DURABILITY_LOGGED
ONE = retrieval_pb2.DURABILITY_APPLIED_ONE
ALL = retrieval_pb2.DURABILITY_APPLIED_ALL_READY


class FakeReports:
    """Shards whose cut and room the test says."""

    def __init__(self) -> None:
        self.map: ShardMap | None = None
        self.waits: list[tuple[Sequence[UpdateToken], bool]] = []
        self.done = asyncio.Event()
        self.rooms: list[RoomReport] = []
        self._changed = asyncio.Event()

    async def run(self) -> None:
        await asyncio.Event().wait()

    async def changed(self) -> None:
        await self._changed.wait()

    def tell(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def room(self, page_slots: int, num_clusters: int) -> list[RoomReport]:
        return self.rooms

    async def applied(self, tokens: Sequence[UpdateToken], *, every_replica: bool) -> None:
        self.waits.append((tokens, every_replica))
        await self.done.wait()


class Held:
    """A log whose appends wait for the test."""

    def __init__(self, log: UpdateLog) -> None:
        self._log = log
        self.free = threading.Event()
        self.appends: list[list[int]] = []
        self.error: Exception | None = None

    def append(self, partition: int, epoch: int, records: Any, logged_unix_ms: int) -> int:
        self.appends.append([one.item_id for one in records])
        assert self.free.wait(10)
        if self.error is not None:
            raise self.error
        return self._log.append(partition, epoch, records, logged_unix_ms)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._log, name)


class Caller:
    def __init__(self, server: SequencerServer, channel: grpc.aio.Channel) -> None:
        self.server = server
        self.log: Any = server.sequencer.log
        self.channel = channel
        self.stub = update_pb2_grpc.SequencerStub(channel)

    async def apply(self, *updates: Update, timeout_s: float = 8, **fields: Any) -> ApplyResult:
        return result_from(await self.stub.Apply(request(*updates, **fields), timeout=timeout_s))

    async def refused(self, *updates: Update, **fields: Any) -> Any:
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await self.apply(*updates, **fields)
        return raised.value

    async def health(self) -> int:
        stub = health_pb2_grpc.HealthStub(self.channel)
        reply = await stub.Check(health_pb2.HealthCheckRequest())
        return int(reply.status)


def request(*updates: Update, **fields: Any) -> retrieval_pb2.ApplyRequest:
    return retrieval_pb2.ApplyRequest(mutations=[mutation_to(one) for one in updates], **fields)


def details_of(error: grpc.aio.AioRpcError) -> status_pb2.Status:
    (packed,) = (value for key, value in error.trailing_metadata() if key == DETAILS)
    return status_pb2.Status.FromString(packed)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.001)


@pytest.fixture(scope="module")
def live(generation: Any) -> LiveGeneration:
    return load_live_generation(generation.path)


@pytest.fixture
def serve(live: LiveGeneration, tmp_path: Path) -> Callable[..., Any]:
    """``async with serve(...) as caller`` runs a sequencer over a log of its own."""

    @asynccontextmanager
    async def serving(
        *,
        num_partitions: int = 1,
        hold: bool = False,
        feed: FeedBlock | None = None,
        **options: Any,
    ) -> AsyncIterator[Caller]:
        log: Any = open_log(f"sqlite://{tmp_path}/log.db", num_partitions)
        try:
            sequencer = Sequencer(Held(log) if hold else log, live, feed=feed)
            server = SequencerServer(sequencer, feed=feed, **options)
            await server.start()
            try:
                async with grpc.aio.insecure_channel(server.address) as channel:
                    yield Caller(server, channel)
            finally:
                if hold:
                    sequencer.log.free.set()  # type: ignore[attr-defined]
                await server.stop(0)
        finally:
            log.close()

    return serving


def test_an_ack_names_the_place_in_the_log(run: Any, serve: Any) -> None:
    async def scene() -> None:
        async with serve() as caller:
            log_id = caller.log.log_id
            result = await caller.apply(ItemUpsert(1), ItemUpsert(2), ItemPatch(3))
            assert result.tokens == (UpdateToken(log_id, 0, 2),)
            (refusal,) = result.rejected
            assert (refusal.index, refusal.code) == (2, "NOT_FOUND")
            assert [one.item_id for one in caller.log.read(0, 0, 9)] == [1, 2]
            assert (await caller.apply()).tokens == ()
            assert await caller.health() == health_pb2.HealthCheckResponse.SERVING

    run(scene())


def test_a_large_request_keeps_its_order_and_its_indices(run: Any, serve: Any) -> None:
    async def scene() -> None:
        async with serve(num_partitions=2) as caller:
            updates: list[Update] = [ItemUpsert(at % 1500) for at in range(3000)]
            updates[2500] = ItemPatch(77_000)
            updates[7] = ItemUpsert(7, signals={"nothing": 1.0})
            result = await caller.apply(*updates)
            assert [one.index for one in result.rejected] == [7, 2500]
            assert sum(one.position for one in result.tokens) == 2998
            for partition in range(2):
                versions = [one.version for one in caller.log.read(partition, 0, 3000)]
                assert sorted(set(versions)) == [1, 2]
                assert versions.index(2) > len(versions) // 2 - 10

    run(scene())


def test_calls_at_the_same_time_share_an_append(run: Any, serve: Any) -> None:
    async def scene() -> None:
        async with serve(hold=True) as caller:
            first = asyncio.create_task(caller.apply(ItemUpsert(1)))
            await until(lambda: len(caller.log.appends) == 1)
            rest = [asyncio.create_task(caller.apply(ItemUpsert(at))) for at in range(2, 20)]
            await until(lambda: caller.server._queued.updates == 19)
            caller.log.free.set()
            results = await asyncio.gather(first, *rest)
            assert len(caller.log.appends) == 2
            positions = sorted(one.tokens[0].position for one in results)
            assert positions == list(range(1, 20))
            assert caller.server._queued.updates == 0

    run(scene())


def test_urgent_deletes_go_ahead_of_what_waits(run: Any, serve: Any) -> None:
    async def scene() -> None:
        async with serve(hold=True) as caller:
            tasks = [asyncio.create_task(caller.apply(ItemUpsert(1)))]
            await until(lambda: len(caller.log.appends) == 1)
            # Larger than one append.
            many = [ItemUpsert(at) for at in range(1000, 3000)]
            tasks.append(asyncio.create_task(caller.apply(*many)))
            await until(lambda: len(caller.server._commits[0]._others) == 2)
            urgent = [ItemDelete(5, urgent=True, version=3), ItemDelete(6, urgent=True, version=3)]
            tasks.append(asyncio.create_task(caller.apply(*urgent)))
            await until(lambda: len(caller.server._commits[0]._urgent) == 1)
            caller.log.free.set()
            await asyncio.gather(*tasks)
            assert caller.log.appends[1][:2] == [5, 6]
            assert [one.item_id for one in caller.log.read_urgent(0, 0, 9)] == [5, 6]

    run(scene())


def test_a_full_queue_refuses_with_a_delay(run: Any, serve: Any) -> None:
    async def scene() -> None:
        async with serve(hold=True, max_queue=10) as caller:
            first = asyncio.create_task(caller.apply(*[ItemUpsert(at) for at in range(9)]))
            await until(lambda: len(caller.log.appends) == 1)
            error = await caller.refused(ItemUpsert(1), ItemUpsert(2))
            assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert "9 updates are queued" in error.details()
            assert int(dict(error.trailing_metadata())[PUSHBACK]) > 0
            second = asyncio.create_task(caller.apply(ItemUpsert(1)))
            await until(lambda: caller.server._queued.updates == 10)
            caller.log.free.set()
            await asyncio.gather(first, second)
            assert caller.server._queued.updates == 0

    run(scene())


def test_a_queue_is_full_of_bytes_as_of_updates(run: Any, serve: Any) -> None:
    async def scene() -> None:
        async with serve(hold=True, max_queue_bytes=3000) as caller:
            large = ItemUpsert(1, fields={"title": "x" * 2000})
            tasks = [asyncio.create_task(caller.apply(large))]
            await until(lambda: len(caller.log.appends) == 1)
            error = await caller.refused(large)
            assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert "1 updates are queued, 20" in error.details()
            stream = caller.stub.StreamUpdates()
            await stream.write(request(large))
            await stream.done_writing()
            tasks.append(asyncio.create_task(caller.apply(ItemUpsert(2))))
            await until(lambda: caller.server._queued.updates == 2)
            caller.log.free.set()
            await asyncio.gather(*tasks)
            assert [len(result_from(one).tokens) async for one in stream] == [1]
            assert caller.server._queued.bytes == 0

    run(scene())


def test_what_is_wrong_with_a_request_is_refused_as_a_whole(run: Any, serve: Any) -> None:
    async def scene() -> None:
        async with serve() as caller:
            many = [ItemUpsert(1)] * (MAX_MUTATIONS + 1)
            for error, code, text in (
                (await caller.refused(*many), "INVALID_ARGUMENT", "must be at most 10000"),
                (await caller.refused(durability=9), "INVALID_ARGUMENT", "unknown durability 9"),
                (await caller.refused(model="books"), "NOT_FOUND", "no model 'books'"),
                (await caller.refused(durability=ONE), "FAILED_PRECONDITION", "must be LOGGED"),
            ):
                assert error.code().name == code
                assert text in error.details()
            assert (await caller.apply(ItemUpsert(1), model="films")).tokens
            raw = caller.channel.unary_unary("/silvershard.internal.v1.Sequencer/Apply")
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await raw(b"\xff\xff")
            assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert caller.server._queued.updates == 0

    run(scene())


def test_a_call_whose_time_ran_out_in_the_queue_is_not_logged(run: Any, serve: Any) -> None:
    async def scene() -> None:
        async with serve(hold=True) as caller:
            first = asyncio.create_task(caller.apply(ItemUpsert(1)))
            await until(lambda: len(caller.log.appends) == 1)
            late = await caller.refused(ItemUpsert(2), timeout_s=0.05)
            assert late.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            gone = asyncio.create_task(caller.apply(ItemUpsert(3)))
            await until(lambda: caller.server._queued.updates >= 2)
            gone.cancel()
            await until(lambda: caller.server._queued.updates == 1)
            caller.log.free.set()
            await first
            await caller.apply(ItemUpsert(4))
            assert [one.item_id for one in caller.log.read(0, 0, 9)] == [1, 4]

    run(scene())


def test_an_unreachable_log_acks_nothing_and_comes_back(run: Any, serve: Any) -> None:
    async def scene() -> None:
        async with serve(hold=True) as caller:
            caller.log.free.set()
            caller.log.error = LogUnavailable("sqlite:///log", "is full")
            error = await caller.refused(ItemUpsert(1))
            assert error.code() is grpc.StatusCode.UNAVAILABLE
            assert "is full" in error.details()
            caller.log.error = None
            assert (await caller.apply(ItemUpsert(1))).tokens[0].position == 1

    run(scene())


def test_a_bug_is_internal_and_told_by_an_id(
    run: Any, serve: Any, caplog: pytest.LogCaptureFixture
) -> None:
    async def scene() -> None:
        async with serve(hold=True) as caller:
            caller.log.free.set()
            caller.log.error = ZeroDivisionError("a secret")
            error = await caller.refused(ItemUpsert(1))
            assert error.code() is grpc.StatusCode.INTERNAL
            assert "secret" not in error.details()
            assert error.details().split()[-1] in caplog.text

    run(scene())


def test_a_fenced_sequencer_steps_down(run: Any, serve: Any, live: Any, tmp_path: Path) -> None:
    async def scene() -> None:
        told: list[str] = []
        async with serve(on_fenced=lambda: told.append("fenced")) as caller:
            await caller.apply(ItemUpsert(1))
            other = open_log(f"sqlite://{tmp_path}/log.db")
            successor = Sequencer(other, live)
            for _ in range(2):
                error = await caller.refused(ItemUpsert(2))
                assert error.code() is grpc.StatusCode.UNAVAILABLE
                assert "is over" in error.details()
            assert told == ["fenced"]
            assert await caller.health() == health_pb2.HealthCheckResponse.NOT_SERVING
            assert len(other.read(0, 0, 9)) == 1
            assert successor.fenced is None
            other.close()

    run(scene())


@pytest.mark.parametrize(("durability", "every"), [(ONE, False), (ALL, True)])
def test_an_answer_waits_until_shards_have_applied_it(
    run: Any, serve: Any, durability: Any, every: bool
) -> None:
    async def scene() -> None:
        reports = FakeReports()
        async with serve(reports=reports) as caller:
            pending = asyncio.create_task(caller.apply(ItemUpsert(1), durability=durability))
            await until(lambda: bool(reports.waits))
            token = UpdateToken(caller.log.log_id, 0, 1)
            assert reports.waits == [((token,), every)]
            assert not pending.done()
            reports.done.set()
            assert (await pending).tokens == (token,)

    run(scene())


def test_what_is_logged_but_not_applied_in_time_comes_with_its_tokens(run: Any, serve: Any) -> None:
    async def scene() -> None:
        async with serve(reports=FakeReports()) as caller:
            error = await caller.refused(ItemUpsert(1), ItemPatch(2), durability=ONE, timeout_s=1)
            assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            assert "are logged and will be applied" in error.details()
            status, response = details_of(error), retrieval_pb2.ApplyResponse()
            info = error_details_pb2.ErrorInfo()
            assert status.details[0].Unpack(info)
            assert info.reason == "LOGGED_NOT_APPLIED"
            assert status.details[-1].Unpack(response)
            assert response.tokens[0].position == 1
            assert [one.index for one in response.rejected] == [1]
            assert len(caller.log.read(0, 0, 9)) == 1

    run(scene())


def test_the_room_and_the_generation_of_the_map_are_followed(
    run: Any, serve: Any, publish_model: Any, live: LiveGeneration
) -> None:
    published = publish_model()
    other = load_live_generation(published.path)

    async def scene() -> None:
        reports, feed = FakeReports(), FeedBlock(0.9, 0.05)
        async with serve(reports=reports, feed=feed) as caller:
            reports.rooms = [RoomReport(0, 0, 100, 20, (0,)), RoomReport(1, 0, 100, 95, (0,))]
            reports.map = ShardMap(
                version=1,
                generation=2,
                snapshot="/nowhere",
                num_shards=2,
                entries=(),
            )
            reports.tell()
            await until(lambda: len(feed._shards) == 2)
            assert caller.server.sequencer.live is live
            path = str(published.path)
            # The number is that of the map; the other generation is number 1 as well.
            reports.map = reports.map.model_copy(update={"snapshot": path})
            reports.tell()
            await until(lambda: caller.server.sequencer.live is not live)
            assert (caller.server.sequencer.live.item_ids == other.item_ids).all()
            codes = [one.code for one in (await caller.apply(*map(ItemUpsert, range(40)))).rejected]
            assert set(codes) == {"RESOURCE_EXHAUSTED"}
            assert 10 < len(codes) < 30
            report = await caller.stub.Report(update_pb2.SequencerReportRequest())
            assert [(one.shard, one.use, one.limit) for one in report.blocked] == [(1, 0.95, 0.9)]

    run(scene())


def test_upserts_wait_for_the_first_word_of_their_shard(run: Any, serve: Any) -> None:
    async def scene() -> None:
        reports, feed = FakeReports(), FeedBlock(0.9, 0.05)
        async with serve(reports=reports, feed=feed) as caller:
            waiting = asyncio.create_task(caller.apply(ItemUpsert(1), ItemDelete(2, version=1)))
            stream = caller.stub.StreamUpdates()
            await stream.write(request(ItemUpsert(3)))
            await stream.write(request(ItemPatch(3)))
            await until(lambda: caller.server._queued.updates == 3)
            assert (await caller.apply(ItemDelete(4, version=1))).tokens[0].position == 1
            assert not waiting.done()
            reports.rooms = [RoomReport(0, 0, 100, 20, (0,))]
            reports.tell()
            assert not (await waiting).rejected
            for _ in range(2):
                assert not result_from(await stream.read()).rejected
            assert {one.item_id for one in caller.log.read(0, 1, 9)} == {1, 2, 3}
            assert caller.log.end(0) == 5

    run(scene())


def test_upserts_whose_shard_says_nothing_are_refused_in_the_time_of_the_call(
    run: Any, serve: Any
) -> None:
    async def scene() -> None:
        async with serve(reports=FakeReports(), feed=FeedBlock(0.9, 0.05)) as caller:
            result = await caller.apply(ItemUpsert(1), ItemDelete(2, version=1), timeout_s=0.3)
            (blocked,) = result.rejected
            assert (blocked.index, blocked.code) == (0, "RESOURCE_EXHAUSTED")
            assert "has not said yet" in blocked.reason
            assert result.tokens
            assert caller.server._queued.updates == 0

    run(scene())


def test_items_expire_by_themselves(run: Any, serve: Any) -> None:
    async def scene() -> None:
        async with serve(expiry_every_s=0.005) as caller:
            await caller.apply(ItemUpsert(1, ttl_s=0.01), ItemUpsert(2, ttl_s=1000))
            await until(lambda: caller.log.end(0) == 3)
            assert caller.log.heads(0, [1])[1].deleted
            assert not caller.log.heads(0, [2])[2].deleted

    run(scene())


def test_the_report_tells_positions_and_counts(run: Any, serve: Any) -> None:
    async def scene() -> None:
        async with serve(num_partitions=2) as caller:
            await caller.apply(*[ItemUpsert(at) for at in range(10)], ItemPatch(99))
            report = await caller.stub.Report(update_pb2.SequencerReportRequest())
            assert report.log_id == caller.log.log_id
            assert (report.model, report.generation, report.queued) == ("films", 1, 0)
            assert [one.epoch for one in report.partitions] == [1, 1]
            assert sum(one.end for one in report.partitions) == 10
            assert {(one.op, one.code): one.count for one in report.counts} == {
                ("upsert", 0): 10,
                ("patch", code_pb2.NOT_FOUND): 1,
            }

    run(scene())


def test_a_stream_acks_in_order_and_survives_bad_requests(run: Any, serve: Any) -> None:
    async def scene() -> None:
        async with serve() as caller:
            stream = caller.stub.StreamUpdates()
            sent = [
                request(ItemUpsert(1)),
                request(ItemPatch(1, version=5)),
                request(ItemPatch(9)),
                request(ItemUpsert(1), ItemUpsert(2), model="books"),
                request(*[ItemUpsert(at) for at in range(100, 200)]),
                request(ItemUpsert(3), durability=ONE),
                request(ItemDelete(1)),
            ]
            for one in sent:
                await stream.write(one)
            await stream.done_writing()
            found = [result_from(one) async for one in stream]
            codes = [[one.code for one in result.rejected] for result in found]
            assert codes == [
                [],
                [],
                ["NOT_FOUND"],
                ["NOT_FOUND"] * 2,
                [],
                ["FAILED_PRECONDITION"],
                [],
            ]
            ends = [result.tokens[0].position for result in found if result.tokens]
            assert ends == [1, 2, 102, 103]
            assert caller.server._queued.updates == 0

    run(scene())


def test_malformed_bytes_in_a_stream_are_rejected_and_it_goes_on(run: Any, serve: Any) -> None:
    async def scene() -> None:
        async with serve() as caller:
            raw = caller.channel.stream_stream("/silvershard.internal.v1.Sequencer/StreamUpdates")
            stream = raw()
            for one in (b"\xff\xff", request(ItemUpsert(1)).SerializeToString()):
                await stream.write(one)
            await stream.done_writing()
            answers = [
                result_from(retrieval_pb2.ApplyResponse.FromString(one)) async for one in stream
            ]
            assert [one.code for one in answers[0].rejected] == ["INVALID_ARGUMENT"]
            assert answers[1].tokens[0].position == 1

    run(scene())


def test_a_stream_waits_for_room_in_the_queue(run: Any, serve: Any) -> None:
    async def scene() -> None:
        async with serve(hold=True, max_queue=4) as caller:
            stream = caller.stub.StreamUpdates()
            for at in range(30):
                await stream.write(request(ItemUpsert(at), ItemUpsert(at + 100)))
            await stream.done_writing()
            await until(lambda: caller.server._queued.updates == 4)
            caller.log.free.set()
            found = [result_from(one) async for one in stream]
            assert [one.tokens[0].position for one in found] == list(range(2, 62, 2))

    run(scene())


def test_a_stream_ends_when_the_log_fails(run: Any, serve: Any) -> None:
    async def scene() -> None:
        async with serve(hold=True) as caller:
            stream = caller.stub.StreamUpdates()
            await stream.write(request(ItemUpsert(1)))
            await until(lambda: len(caller.log.appends) == 1)
            await stream.write(request(ItemUpsert(2)))
            await until(lambda: caller.server._queued.updates == 2)
            caller.log.error = LogUnavailable("sqlite:///log", "is full")
            caller.log.free.set()
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await stream.read()
            assert raised.value.code() is grpc.StatusCode.UNAVAILABLE
            await until(lambda: caller.server._queued.updates == 0)

    run(scene())


def test_eight_clients_on_the_same_items_lose_no_ack(run: Any, serve: Any) -> None:
    async def scene() -> None:
        async with serve(num_partitions=2) as caller:
            acked: list[UpdateToken] = []

            async def client(seed: int) -> None:
                for turn in range(25):
                    result = await caller.apply(ItemUpsert((seed + turn) % 7))
                    assert not result.rejected
                    acked.extend(result.tokens)

            await asyncio.gather(*(client(seed) for seed in range(8)))
            assert len(set(acked)) == 200
            for partition in range(2):
                versions: dict[int, int] = {}
                for one in caller.log.read(partition, 0, 1000):
                    assert one.version == versions.get(one.item_id, 0) + 1
                    versions[one.item_id] = one.version
            assert sum(caller.log.end(partition) for partition in range(2)) == 200

    run(scene())


def test_only_loopback_is_bound_unless_told_otherwise(run: Any, serve: Any) -> None:
    async def scene() -> None:
        with pytest.raises(ConfigError, match="insecure"):
            async with serve(host="0.0.0.0"):
                pass
        async with serve() as caller:
            port = int(caller.server.address.rpartition(":")[2])
            with pytest.raises(StateError, match="in use"):
                async with serve(port=port):
                    pass

    run(scene())

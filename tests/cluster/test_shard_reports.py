import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc.aio

from silvershard.cluster import shard_pb2, shard_pb2_grpc
from silvershard.cluster.consistency import UpdateToken
from silvershard.cluster.feed_block import RoomReport
from silvershard.cluster.shard_map import ShardEntry, ShardMap
from silvershard.cluster.shard_reports import ShardReports

LOG = 9


class FakeShard(shard_pb2_grpc.ShardServicer):  # type: ignore[misc]
    """A shard process that says what the test wants."""

    def __init__(self, shard: int, replica: int = 0) -> None:
        self.shard, self.replica = shard, replica
        self.cuts = {1: [0, 0]}
        """Per generation."""
        self.pages = 10
        self.asked = 0
        self.is_mute = False

    async def Inspect(self, _request: Any, context: Any) -> shard_pb2.ShardReport:
        self.asked += 1
        if self.is_mute:
            await asyncio.Event().wait()
        report = shard_pb2.ShardReport(epoch=1)
        for generation, cut in self.cuts.items():
            report.generations.add(
                generation=generation,
                seen=shard_pb2.Seen(log_id=LOG, cut=cut),
                pool=shard_pb2.PoolReport(pages=self.pages, live_slots=300, retired_slots=20),
            )
        return report


class Scene:
    def __init__(self, path: Path, shards: Sequence[FakeShard]) -> None:
        self.path = path
        self.shards = shards
        self.entries: list[ShardEntry] = []
        self.reports = ShardReports(path, every_s=0.005, eager_s=0.001, timeout_s=0.1)
        self.version = 0

    def write(self, *, generation: int = 1, leave_out: Sequence[int] = ()) -> None:
        self.version += 1
        ShardMap(
            version=self.version,
            generation=generation,
            snapshot="/nowhere",
            num_shards=1 + max(one.shard for one in self.shards),
            entries=tuple(one for at, one in enumerate(self.entries) if at not in leave_out),
        ).write_atomic(self.path)

    async def heard(self) -> None:
        """Wait until the room of all shards is known."""
        await until(lambda: len(self.reports.room(64, 2)) == len(self.shards))


@asynccontextmanager
async def scene_of(path: Path, *shards: FakeShard) -> AsyncIterator[Scene]:
    scene = Scene(path / "map.json", shards)
    servers = []
    for one in shards:
        server = grpc.aio.server()
        shard_pb2_grpc.add_ShardServicer_to_server(one, server)
        address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        scene.entries.append(
            ShardEntry(
                shard=one.shard,
                replica=one.replica,
                address=address,
                epoch=1,
                documents=1,
                pid=1,
            )
        )
        await server.start()
        servers.append(server)
    task = asyncio.create_task(scene.reports.run())
    try:
        yield scene
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        for server in servers:
            await server.stop(0)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.001)


def test_the_room_of_every_replica_of_the_map_is_known(run: Any, tmp_path: Path) -> None:
    async def scene() -> None:
        async with scene_of(tmp_path, FakeShard(0), FakeShard(1)) as one:
            assert one.reports.room(64, 2) == []
            one.shards[1].cuts[1] = [3, 4]
            one.write()
            await one.heard()
            assert one.reports.room(64, 2) == [
                RoomReport(0, 0, 512, 320, (0, 0)),
                RoomReport(1, 0, 512, 320, (3, 4)),
            ]
            one.shards[0].pages = 20
            await until(lambda: one.reports.room(64, 2)[0].slots == 1152)
            one.write(leave_out=[0])
            await until(lambda: len(one.reports.room(64, 2)) == 1)

    run(scene())


def test_a_wait_ends_when_one_replica_of_every_shard_has_applied(run: Any, tmp_path: Path) -> None:
    async def scene() -> None:
        shards = FakeShard(0), FakeShard(0, 1), FakeShard(1)
        async with scene_of(tmp_path, *shards) as one:
            tokens = [UpdateToken(LOG, 0, 5), UpdateToken(LOG, 1, 2)]
            first = asyncio.create_task(one.reports.applied(tokens, every_replica=False))
            every = asyncio.create_task(one.reports.applied(tokens, every_replica=True))
            one.write()
            await one.heard()
            shards[0].cuts[1] = [5, 1]
            shards[2].cuts[1] = [9, 9]
            await until(lambda: one.reports.room(64, 2)[0].cut == (5, 1))
            assert not first.done()
            shards[0].cuts[1] = [5, 2]
            await first
            assert not every.done()
            shards[1].cuts[1] = [6, 6]
            await every
            assert not one.reports._hurry.is_set()

    run(scene())


def test_a_shard_that_the_map_lacks_has_not_applied(run: Any, tmp_path: Path) -> None:
    async def scene() -> None:
        async with scene_of(tmp_path, FakeShard(0), FakeShard(1)) as one:
            one.write(leave_out=[1])
            token = UpdateToken(LOG, 0, 0)
            waiting = asyncio.create_task(one.reports.applied([token], every_replica=True))
            await until(lambda: len(one.reports.room(64, 2)) == 1)
            asked = one.shards[0].asked
            await until(lambda: one.shards[0].asked > asked + 3)
            assert not waiting.done()
            one.write()
            await waiting

    run(scene())


def test_a_replica_that_follows_no_log_has_no_room(run: Any, tmp_path: Path) -> None:
    async def scene() -> None:
        async with scene_of(tmp_path, FakeShard(0)) as one:
            one.shards[0].cuts[1] = []
            one.write()
            await until(lambda: one.shards[0].asked > 2)
            assert one.reports.room(64, 2) == []

    run(scene())


def test_tokens_of_another_log_are_never_applied(run: Any, tmp_path: Path) -> None:
    async def scene() -> None:
        async with scene_of(tmp_path, FakeShard(0)) as one:
            one.write()
            await one.heard()
            token = UpdateToken(LOG + 1, 0, 0)
            waiting = asyncio.create_task(one.reports.applied([token], every_replica=False))
            asked = one.shards[0].asked
            await until(lambda: one.shards[0].asked > asked + 3)
            assert not waiting.done()
            waiting.cancel()

    run(scene())


def test_a_shard_that_is_away_has_not_applied_and_keeps_its_room(run: Any, tmp_path: Path) -> None:
    async def scene() -> None:
        shards = FakeShard(0), FakeShard(1)
        async with scene_of(tmp_path, *shards) as one:
            one.write()
            await one.heard()
            shards[1].is_mute = True
            shards[0].cuts[1] = [1, 1]
            waiting = asyncio.create_task(
                one.reports.applied([UpdateToken(LOG, 0, 1)], every_replica=False)
            )
            asked = shards[1].asked
            await until(lambda: shards[1].asked > asked + 1)
            assert not waiting.done()
            assert len(one.reports.room(64, 2)) == 2
            shards[1].is_mute = False
            shards[1].cuts[1] = [1, 1]
            await waiting

    run(scene())


def test_only_the_live_generation_counts(run: Any, tmp_path: Path) -> None:
    async def scene() -> None:
        async with scene_of(tmp_path, FakeShard(0)) as one:
            one.write()
            await one.heard()
            one.write(generation=2)
            await until(lambda: one.reports.room(64, 2) == [])
            one.shards[0].cuts[2] = [7, 7]
            await one.heard()
            assert one.reports.room(64, 2)[0].cut == (7, 7)

    run(scene())


def test_the_last_map_is_kept_where_there_is_none(run: Any, tmp_path: Path) -> None:
    async def scene() -> None:
        async with scene_of(tmp_path, FakeShard(0)) as one:
            one.write()
            await one.heard()
            one.path.unlink()
            asked = one.shards[0].asked
            await until(lambda: one.shards[0].asked > asked + 2)
            assert one.reports.map is not None
            assert len(one.reports.room(64, 2)) == 1

    run(scene())


def test_a_report_that_comes_before_a_task_begins_to_wait_is_noticed(tmp_path: Path) -> None:
    async def notice() -> None:
        reports = ShardReports(tmp_path / "map.json")
        waiting = asyncio.create_task(reports.changed())
        # Whoever was ready to run before the task tells it first.
        reports._tell()
        async with asyncio.timeout(5):
            await waiting

    asyncio.run(notice())

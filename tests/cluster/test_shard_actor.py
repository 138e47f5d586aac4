import os
import signal
import time
from typing import Any

import pytest

from silvershard.cluster.client import Client
from silvershard.cluster.config import ListenSection, RouterConfig
from silvershard.cluster.mutation_codec import logged
from silvershard.cluster.router import Router
from silvershard.cluster.shard_map import ShardEntry, ShardMap
from silvershard.cluster.update_log import NewRecord, open_log
from silvershard.cluster.update_message import mutation_to
from silvershard.cluster.updates import ItemUpsert
from silvershard.model.request import Request

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def entry_of(described: dict[str, Any]) -> ShardEntry:
    return ShardEntry(
        **{name: described[name] for name in ShardEntry.model_fields if name in described}
    )


def test_actors_serve_their_shards_and_come_back_as_another_incarnation(
    ray: Any, generation: Any, tmp_path: Any, loop_thread: Any, ask_whole: Any
) -> None:
    from silvershard.cluster.shard_actor import ShardActor

    actors = [ShardActor.remote(str(generation.path), shard, 2) for shard in range(2)]
    described = ray.get([actor.describe.remote() for actor in actors], timeout=60)
    assert [one["shard"] for one in described] == [0, 1]
    assert sum(one["documents"] for one in described) == 600
    assert {one["generation"] for one in described} == {1}
    assert len({one["pid"] for one in described} | {os.getpid()}) == 3

    def write(version: int, *entries: dict[str, Any]) -> None:
        ShardMap(
            version=version,
            generation=1,
            snapshot=str(generation.path),
            num_shards=2,
            entries=tuple(entry_of(one) for one in entries),
        ).write_atomic(tmp_path / "map.json")

    write(1, *described)
    config = RouterConfig(
        map_path=str(tmp_path / "map.json"), poll_ms=5, listen=ListenSection(port=0)
    )
    router = Router(config)
    loop_thread.call(router.start())
    expected = ask_whole(Request(k=20)).item_ids.tolist()
    try:
        with Client(router.address, timeout_s=20) as client:
            client.wait_until_ready(20)
            assert client.retrieve(k=20).item_ids.tolist() == expected
            os.kill(described[0]["pid"], signal.SIGKILL)
            while not (partial := client.retrieve(k=20, min_coverage=0.0)).is_partial:
                time.sleep(0.005)
            assert partial.coverage.documents == described[1]["documents"] / 600
            again = None
            while again is None:
                try:
                    again = ray.get(actors[0].describe.remote(), timeout=60)
                except ray.exceptions.ActorUnavailableError:
                    time.sleep(0.01)
            assert again["epoch"] > described[0]["epoch"]
            assert again["pid"] != described[0]["pid"]
            write(2, again, described[1])
            while client.retrieve(k=20, min_coverage=0.0).is_partial:
                time.sleep(0.005)
            assert client.retrieve(k=20).item_ids.tolist() == expected
            ray.get(actors[1].stop.remote(0.1), timeout=30)
            while not client.retrieve(k=20, min_coverage=0.0).is_partial:
                time.sleep(0.005)
    finally:
        loop_thread.call(router.stop())
        for actor in actors:
            ray.kill(actor)


def test_an_actor_that_starts_again_serves_what_map_and_log_say_by_now(
    ray: Any, generation: Any, tmp_path: Any
) -> None:
    from silvershard.cluster.shard_actor import ShardActor

    log = open_log(f"sqlite://{tmp_path}/log.db")
    epoch = log.acquire(0)

    def append(item_id: int, version: int) -> None:
        payload = logged(mutation_to(ItemUpsert(item_id)), version)
        log.append(0, epoch, [NewRecord(item_id, version, False, False, 0, payload)], 0)

    append(1 << 41, 1)
    map_path = tmp_path / "map.json"
    ShardMap(
        version=1, generation=1, snapshot=str(generation.path), num_shards=1, entries=()
    ).write_atomic(map_path)
    actor = ShardActor.remote(
        "/nowhere", 0, 1, replica=1, map_path=str(map_path), log_url=log.url, headroom=0.5
    )
    try:
        described = ray.get(actor.describe.remote(), timeout=60)
        assert (described["replica"], described["documents"]) == (1, 601)
        assert described["generations"] == [1]
        os.kill(described["pid"], signal.SIGKILL)
        append(1 << 42, 2)
        again = None
        while again is None:
            try:
                again = ray.get(actor.describe.remote(), timeout=60)
            except ray.exceptions.ActorUnavailableError:
                time.sleep(0.01)
        assert again["pid"] != described["pid"]
        assert again["documents"] == 602
    finally:
        ray.kill(actor)
        log.close()

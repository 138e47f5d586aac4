"""Updates from the client through router, sequencer and log into shards, and back as answers."""

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from silvershard.cluster.client import Client
from silvershard.cluster.config import ListenSection, QuerySection, RouterConfig
from silvershard.cluster.feed_block import FeedBlock
from silvershard.cluster.hosting import ready
from silvershard.cluster.live_generation import load_live_generation
from silvershard.cluster.router import Router
from silvershard.cluster.sequencer import Sequencer
from silvershard.cluster.sequencer_server import SequencerServer
from silvershard.cluster.shard_loader import ShardLoader
from silvershard.cluster.shard_map import ShardEntry, ShardMap
from silvershard.cluster.shard_reports import ShardReports
from silvershard.cluster.shard_server import ShardServer
from silvershard.cluster.update_log import open_log
from silvershard.cluster.updates import Durability, ItemDelete, ItemPatch, ItemUpsert

MAKER = 777
"""An attribute value that only items of these tests have."""
FIRST = 1 << 41
"""Beyond every published item."""
SHARDS = 2


def film(number: int, title: str = "new") -> ItemUpsert:
    return ItemUpsert(
        FIRST + number,
        attributes={"maker": [MAKER], "year": 2000},
        signals={"popularity": 0.5},
        fields={"title": title},
        features={"genres": ["Drama"]},
    )


class Cluster:
    """Two shards, a sequencer and a router in threads of this process."""

    def __init__(self, folder: Path, snapshot: Path) -> None:
        self.log = open_log(f"sqlite://{folder}/log.db")
        self.map_path = folder / "map.json"
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        self.shards = []
        for shard in range(SHARDS):
            load = ShardLoader(shard, SHARDS, log=self.log, headroom=0.2)
            server = ShardServer(ready(load(snapshot)), snapshot=str(snapshot), load=load)
            self.run(server.start())
            self.shards.append(server)
        feed = FeedBlock(0.9, 0.05)
        live = load_live_generation(snapshot)
        self.sequencer = SequencerServer(
            Sequencer(self.log, live, feed=feed),
            reports=ShardReports(self.map_path, every_s=0.01),
            feed=feed,
        )
        self.run(self.sequencer.start())
        entries = [
            ShardEntry(
                shard=one.shard, replica=0, address=one.address, epoch=one.epoch, documents=1, pid=1
            )
            for one in self.shards
        ]
        ShardMap(
            version=1,
            generation=1,
            snapshot=str(snapshot),
            num_shards=SHARDS,
            entries=tuple(entries),
            sequencer=self.sequencer.address,
            log_url=self.log.url,
        ).write_atomic(self.map_path)
        config = RouterConfig(
            map_path=str(self.map_path),
            poll_ms=5,
            drain_s=1.0,
            listen=ListenSection(port=0),
            query=QuerySection(min_coverage=1.0, default_deadline_ms=10_000),
        )
        self.router = Router(config)
        self.run(self.router.start())

    def run(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(60)

    def close(self) -> None:
        self.run(self.router.stop())
        self.run(self.sequencer.stop(0))
        for one in self.shards:
            self.run(one.stop(0))
        self.log.close()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()


@pytest.fixture
def client(tmp_path: Path, generation: Any) -> Iterator[Client]:
    cluster = Cluster(tmp_path, generation.path)
    try:
        with Client(cluster.router.address, model="films", timeout_s=30) as client:
            client.wait_until_ready(30)
            # Until the shards have reported their room, upserts are refused.
            while client.apply([film(0)]).rejected:
                pass
            client.delete(FIRST)
            yield client
    finally:
        cluster.close()


def titles(client: Client, **how: Any) -> dict[int, Any]:
    result = client.retrieve(
        k=20_000, filter=f"maker:{MAKER}", return_fields=["title"], exact=True, **how
    )
    return dict(zip(result.item_ids.tolist(), result.fields["title"], strict=True))


def test_a_token_shows_what_was_written_and_a_wait_shows_it_to_everybody(client: Client) -> None:
    for number in range(1, 20):
        tokens = client.apply([film(number, f"title {number}")]).tokens
        seen = titles(client, after=tokens)
        assert seen == {FIRST + at: f"title {at}" for at in range(1, number + 1)}
    client.apply([ItemPatch(FIRST + 1, fields={"title": "other"})], durability=Durability.LOGGED)
    tokens = client.delete(FIRST + 2, urgent=True)
    seen = titles(client, after=tokens)
    assert seen[FIRST + 1] == "other"
    assert FIRST + 2 not in seen
    for durability in (Durability.APPLIED_ONE, Durability.APPLIED_ALL_READY):
        client.apply([film(50), ItemDelete(FIRST + 3, version=100)], durability=durability)
        seen = titles(client)
        assert FIRST + 50 in seen
        assert FIRST + 3 not in seen
        client.apply([ItemDelete(FIRST + 50)], durability=durability)
        assert FIRST + 50 not in titles(client)


def test_full_shards_refuse_upserts_and_lose_no_accepted_one(client: Client) -> None:
    accepted: set[int] = set()
    blocked = ""
    batches = ([film(at + step) for step in range(20)] for at in range(1, 20_000, 20))
    for batch in batches:
        result = client.apply(batch)
        refused = {one.index for one in result.rejected}
        accepted |= {one.item_id for at, one in enumerate(batch) if at not in refused}
        if len(refused) == len(batch):
            assert {one.code for one in result.rejected} == {"RESOURCE_EXHAUSTED"}
            blocked = result.rejected[0].reason
            break
    assert "of the items that it has room for" in blocked
    assert len(accepted) > 50
    some = sorted(accepted)[0]
    tokens = client.patch(some, fields={"title": "patched"})
    seen = titles(client, after=tokens)
    assert set(seen) == accepted
    assert seen[some] == "patched"
    # Room comes back with deletes, and is told within the next reports.
    client.apply([ItemDelete(one) for one in accepted], durability=Durability.APPLIED_ALL_READY)
    assert titles(client) == {}
    while client.apply([film(30_000)]).rejected:
        pass
    assert list(titles(client, after=client.patch(FIRST + 30_000))) == [FIRST + 30_000]


def test_a_stream_is_seen_whole_in_its_order(client: Client) -> None:
    batches = [[film(at % 10 + 1, f"{at}"), film(at % 10 + 101, f"{at}")] for at in range(200)]
    tokens = ()
    for result in client.apply_stream(batches):
        assert not result.rejected
        tokens = result.tokens
    seen = titles(client, after=tokens)
    assert seen == {
        **{FIRST + at % 10 + 1: f"{at}" for at in range(190, 200)},
        **{FIRST + at % 10 + 101: f"{at}" for at in range(190, 200)},
    }

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from silvershard.cluster import Client
from silvershard.cluster.table_map import TableEntry, TableShardMap
from silvershard.deploy import launch, operate
from silvershard.deploy.config import Config, load
from silvershard.deploy.errors import ExitCode
from silvershard.deploy.shard_watch import ShardDead
from silvershard.deploy.state import ClusterRecord, StateDir
from silvershard.deploy.table_tier import TableHost, TableTier
from silvershard.model.request import Request
from silvershard.shard.generations import generation_dir
from silvershard.shard.load import load_retriever
from silvershard.shard.table_files import RowFile, row_files

DEFAULT = (0.5, -0.5, 0.0, 1.0)


class FakeHost:
    """A process of tables that does what the test says."""

    def __init__(self, shard: int) -> None:
        self.shard = shard
        self.count = 0
        self.said: TableHost | ShardDead | None = None
        self.ended = False

    def serve(self, rows: dict[str, int], epoch: int = 1) -> None:
        self.said = TableHost(
            shard=self.shard,
            pid=os.getpid(),
            tables={
                name: TableEntry(
                    shard=self.shard,
                    address=f"127.0.0.1:{9000 + self.shard}",
                    epoch=epoch,
                    rows=count,
                    pid=os.getpid(),
                )
                for name, count in rows.items()
            },
        )

    def restarts(self) -> int:
        return self.count

    def entry(self) -> TableHost | None:
        if isinstance(self.said, ShardDead):
            raise self.said
        return self.said

    def ask_again(self) -> None:
        self.said = None

    def end(self) -> None:
        self.ended = True


class Setup:
    """Two tables over two processes; one of the tables has a single row."""

    def __init__(self, root: Path) -> None:
        self.state = StateDir(root)
        self.state.create()
        self.hosts = [FakeHost(0), FakeHost(1)]
        files = [
            RowFile("users", root / "users.safetensors", 11, 4, DEFAULT),
            RowFile("one", root / "one.safetensors", 1, 4, DEFAULT),
        ]
        config = load(None, environ={}, options={"tables.deadline_ms": 7, "ping.every_ms": 50})
        self.tier = TableTier(self.state, config, files, lambda shard: self.hosts[shard])
        self.tier.start()

    def map(self, table: str) -> TableShardMap:
        return TableShardMap.read(self.state.table_map_file(table))

    def served(self, table: str) -> list[int]:
        return [entry.shard for entry in self.map(table).entries]


@pytest.fixture
def setup(tmp_path: Path) -> Iterator[Setup]:
    made = Setup(tmp_path)
    yield made
    made.tier.end()
    assert all(host.ended for host in made.hosts)


def test_the_first_map_of_a_table_is_whole(setup: Setup) -> None:
    setup.hosts[0].serve({"users": 5, "one": 1})
    setup.tier.poll()
    assert not setup.state.table_map_file("users").exists()
    assert setup.served("one") == [0]
    setup.hosts[1].serve({"users": 6})
    setup.tier.poll()
    assert setup.served("users") == [0, 1]
    assert setup.map("users").default_row == DEFAULT
    assert setup.map("one").version == 1


def test_a_lost_process_leaves_the_maps_and_returns_to_them(setup: Setup) -> None:
    setup.hosts[0].serve({"users": 5, "one": 1})
    setup.hosts[1].serve({"users": 6})
    setup.tier.poll()
    setup.hosts[0].count = 1
    setup.tier.poll()
    assert (setup.served("users"), setup.served("one")) == ([1], [])
    first, second = setup.tier.records
    assert (first.state, first.pid, first.rows, first.restarts) == ("restarting", 0, 6, 1)
    assert (second.state, second.rows) == ("serving", 6)
    assert second.addresses == {"users": "127.0.0.1:9001"}
    setup.hosts[0].serve({"users": 5, "one": 1}, epoch=2)
    setup.tier.poll()
    assert setup.served("users") == [0, 1]
    assert setup.map("users").entries[0].epoch == 2
    assert setup.map("users").version == 3
    written = setup.state.table_map_file("users").stat().st_mtime_ns
    setup.tier.poll()
    assert setup.state.table_map_file("users").stat().st_mtime_ns == written


def test_a_process_that_never_starts_says_why(setup: Setup) -> None:
    setup.hosts[1].said = ShardDead("users.safetensors: cannot be read")
    setup.tier.poll()
    watch = setup.tier.watches[1]
    assert (watch.state, watch.name) == ("failed", "table process 1")
    assert watch.record.reason == "users.safetensors: cannot be read"


def test_shards_are_told_of_maps_and_settings(setup: Setup) -> None:
    told = setup.tier.for_shards()
    assert told.maps == {
        "users": str(setup.state.root / "tables" / "users.json"),
        "one": str(setup.state.root / "tables" / "one.json"),
    }
    assert (told.client.deadline_ms, told.client.ping.every_ms) == (7, 50)
    assert told.host_bytes == 0


def test_a_generation_without_remote_tables_has_no_process(tmp_path: Path) -> None:
    tier = TableTier(StateDir(tmp_path), Config(), [])
    tier.start()
    tier.poll()
    assert (tier.num_processes, tier.records, tier.for_shards().maps) == (0, (), {})
    assert list(tmp_path.iterdir()) == []


def until(true: Callable[[], bool], what: str) -> None:
    give_up_s = time.monotonic() + 60
    while not true():
        assert time.monotonic() < give_up_s, what
        time.sleep(0.01)


@contextmanager
def started(state: StateDir) -> Iterator[ClusterRecord]:
    """Run a cluster that ends with the test, and with the test process."""
    # A busy machine must not look like a late table process.
    tables = {"tables.cache_mib": 0, "tables.deadline_ms": 2000}
    options = {"listen.port": 0, "model.name": "films", **tables}
    config = load(None, environ={}, options=options)
    record = launch.start(state, config, detached=False)
    try:
        yield record
    finally:
        launch.stop(state, timeout_s=20.0)


@pytest.mark.ray
@pytest.mark.slow
def test_a_cluster_with_remote_tables_gives_the_bytes_of_the_module_through_a_crash(
    publish_model: Any, tmp_path: Path
) -> None:
    made = publish_model("int8", remote=("history", "recent", "history_genres"))
    assert len(row_files(made.path)) == 3
    state = StateDir(tmp_path / "s")
    state.create()
    state.generations.mkdir()
    generation_dir(state.generations, 1).symlink_to(made.path)
    ids = made.catalogue.item_ids
    queries = [{"features": {"history": ids[at : at + 9].tolist()}, "k": 20} for at in range(8)]
    whole = load_retriever(publish_model("int8").path)[0]

    def tables() -> list[dict[str, Any]]:
        document, _ = operate.status(state)
        found: list[dict[str, Any]] = document["tables"]
        return found

    with started(state) as record, Client(record.address, timeout_s=30) as client:
        assert [one.state for one in record.tables] == ["serving", "serving"]
        assert sum(one.rows for one in record.tables) == 151 + 151 + 6
        before = [client.retrieve(**query) for query in queries]
        for got, query in zip(before, queries, strict=True):
            (wanted,) = whole([Request(**query)])
            assert got.coverage.reasons == ()
            assert got.item_ids.tolist() == wanted.item_ids.tolist()
            assert got.scores.tobytes() == wanted.scores.numpy().tobytes()

        # One that is stopped is late; then it is killed and comes back.
        victim = record.tables[0].pid
        os.kill(victim, signal.SIGSTOP)
        late = [client.retrieve(**query) for query in queries]
        assert all(one.coverage.reasons == ("EMBEDDING_FALLBACK",) for one in late)
        assert all(one.coverage.degraded and one.coverage.documents == 1.0 for one in late)
        document, code = operate.status(state)
        assert (document["state"], code) == ("degraded", ExitCode.DEGRADED)
        assert "not answering" in operate.render_cluster(document)
        looked_up = document["lookups"]
        assert set(looked_up) == {"history", "recent", "history_genres"}
        assert looked_up["history"]["defaulted"] > 0
        assert looked_up["history"]["fetched"] > 0
        os.kill(victim, signal.SIGKILL)
        until(lambda: tables()[0]["restarts"] == 1, "the process was not started again")
        until(lambda: tables()[0]["state"] == "serving", "the process does not serve")
        assert tables()[0]["pid"] != victim
        until(lambda: not client.retrieve(**queries[0]).coverage.degraded, "it did not heal")
        for got, was in zip([client.retrieve(**one) for one in queries], before, strict=True):
            assert got.coverage.reasons == ()
            assert got.scores.tobytes() == was.scores.tobytes()
    assert not (state.root / "tables").exists()

import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from silvershard.cluster import Client
from silvershard.cluster.table_config import TableHolding
from silvershard.cluster.table_map import TableEntry, TableShardMap, map_path
from silvershard.cluster.updates import TableRows
from silvershard.deploy import activate, launch, operate, recluster
from silvershard.deploy.config import load
from silvershard.deploy.errors import ExitCode
from silvershard.deploy.shard_watch import ShardDead
from silvershard.deploy.state import ClusterRecord, StateDir
from silvershard.deploy.table_tier import TableHost, TableTiers, published_rows
from silvershard.model.request import Request
from silvershard.shard.generations import generation_dir
from silvershard.shard.load import load_retriever
from silvershard.shard.table_files import row_files
from silvershard.shard.table_rows import quantize_rows

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
    """Generations of two tables over two processes; one of the tables has a single row."""

    def __init__(self, root: Path) -> None:
        self.state = StateDir(root)
        self.state.create()
        self.hosts: list[FakeHost] = []
        self.told: list[TableHolding] = []
        config = load(None, environ={}, options={"tables.deadline_ms": 7, "ping.every_ms": 50})
        self.tiers = TableTiers(self.state, config, self._start)

    def _start(self, shard: int, holding: Path) -> FakeHost:
        self.told.append(TableHolding.read(holding))
        self.hosts.append(FakeHost(shard))
        return self.hosts[-1]

    def publish(self, generation: int, seed: int = 0, log_id: int = 0, cut: Any = ()) -> None:
        """Write what is read of a generation; its rows depend on the seed."""
        path = generation_dir(self.state.generations, generation)
        (path / "rows").mkdir(parents=True)
        files = {}
        for name, count in {"users": 11, "one": 1}.items():
            records = quantize_rows(
                np.full((count, 4), DEFAULT, dtype=np.float32) + np.float32(seed), 4
            )
            save_file({"records": records}, path / "rows" / f"{name}.safetensors")
            files[f"rows/{name}.safetensors"] = {"sha256": f"{name}-{seed}", "size": 1}
        document = {
            "spec": {"generation": generation, "model": "films", "partition_documents": [1]},
            "content_hash": "0",
            "files": files,
            "log_id": log_id,
            "cut": cut,
        }
        (path / "manifest.json").write_text(json.dumps(document))

    def map(self, table: str, generation: int = 1) -> TableShardMap:
        return TableShardMap.read(map_path(self.state.tables_dir, generation, table))

    def served(self, table: str, generation: int = 1) -> list[int]:
        return [entry.shard for entry in self.map(table, generation).entries]


@pytest.fixture
def setup(tmp_path: Path) -> Iterator[Setup]:
    made = Setup(tmp_path)
    made.publish(1)
    made.tiers.hold({1})
    yield made
    made.tiers.end()
    assert all(host.ended for host in made.hosts)


def test_the_first_map_of_a_table_is_whole(setup: Setup) -> None:
    setup.hosts[0].serve({"users": 5, "one": 1})
    setup.tiers.poll()
    assert not map_path(setup.state.tables_dir, 1, "users").exists()
    assert setup.served("one") == [0]
    setup.hosts[1].serve({"users": 6})
    setup.tiers.poll()
    assert setup.served("users") == [0, 1]
    assert setup.map("users").default_row == pytest.approx(DEFAULT, abs=0.01)
    assert setup.map("one").version == 1


def test_a_lost_process_leaves_the_maps_and_returns_to_them(setup: Setup) -> None:
    setup.hosts[0].serve({"users": 5, "one": 1})
    setup.hosts[1].serve({"users": 6})
    setup.tiers.poll()
    setup.hosts[0].count = 1
    setup.tiers.poll()
    assert (setup.served("users"), setup.served("one")) == ([1], [])
    first, second = setup.tiers.records
    assert (first.state, first.pid, first.rows, first.restarts) == ("restarting", 0, 6, 1)
    assert (second.state, second.rows, second.generations) == ("serving", 6, (1,))
    assert second.addresses == {"users": "127.0.0.1:9001"}
    setup.hosts[0].serve({"users": 5, "one": 1}, epoch=2)
    setup.tiers.poll()
    assert setup.served("users") == [0, 1]
    assert setup.map("users").entries[0].epoch == 2
    assert setup.map("users").version == 3
    path = map_path(setup.state.tables_dir, 1, "users")
    written = path.stat().st_mtime_ns
    setup.tiers.poll()
    assert path.stat().st_mtime_ns == written


def test_a_process_that_never_starts_says_why(setup: Setup) -> None:
    setup.hosts[1].said = ShardDead("users.safetensors: cannot be read")
    setup.tiers.poll()
    watch = setup.tiers.watches[1]
    assert (watch.state, watch.name) == ("failed", "table process 1")
    assert watch.record.reason == "users.safetensors: cannot be read"


def test_shards_are_told_of_maps_and_settings(setup: Setup) -> None:
    told = setup.tiers.for_shards()
    assert told.maps == str(setup.state.root / "tables")
    assert (told.client.deadline_ms, told.client.ping.every_ms) == (7, 50)
    assert told.host_bytes == 0


def test_processes_are_told_of_rows_and_of_the_log_from_their_cut(tmp_path: Path) -> None:
    setup = Setup(tmp_path)
    setup.publish(3, log_id=9, cut=[4])
    setup.tiers.hold({3})
    assert len(setup.told) == 2
    for told in setup.told:
        assert {one.plan.name: one.plan.num_shards for one in told.tables} == {"one": 1, "users": 2}
        assert all(Path(one.path).is_file() for one in told.tables)
        assert (told.log_id, told.cut) == (9, (4,))
        assert told.log_url == f"sqlite:///{setup.state.updates_file}"
    setup.tiers.end()


def test_a_generation_with_other_rows_has_processes_of_its_own(setup: Setup) -> None:
    setup.publish(2, seed=1)
    setup.tiers.hold({1, 2})
    assert len(setup.hosts) == 4
    for host in setup.hosts:
        host.serve({"users": 5, "one": 1} if host.shard == 0 else {"users": 6})
    setup.tiers.poll()
    assert setup.served("users", 2) == setup.served("users", 1) == [0, 1]
    assert [one.generations for one in setup.tiers.records] == [(1,), (1,), (2,), (2,)]
    setup.tiers.hold({2})
    assert [host.ended for host in setup.hosts] == [True, True, False, False]
    assert not map_path(setup.state.tables_dir, 1, "users").parent.exists()
    setup.tiers.hold({1, 2})
    assert len(setup.hosts) == 6


def test_generations_with_the_same_rows_share_their_processes(setup: Setup) -> None:
    setup.publish(2, log_id=9, cut=[4])
    setup.publish(3, log_id=9, cut=[7])
    setup.tiers.hold({1, 3})
    setup.tiers.hold({1, 2, 3})
    assert len(setup.hosts) == 2
    for host in setup.hosts:
        host.serve({"users": 5, "one": 1} if host.shard == 0 else {"users": 6})
    setup.tiers.poll()
    assert [setup.served("users", one) for one in (1, 2, 3)] == [[0, 1]] * 3
    # The files of the first one may be pruned now; what starts again reads others.
    setup.tiers.hold({2, 3})
    (holding,) = setup.state.tables_dir.glob("tier-*.json")
    told = TableHolding.read(holding)
    assert (told.log_id, told.cut) == (9, (4,))
    assert all("gen-000002" in one.path for one in told.tables)
    assert [one.generations for one in setup.tiers.records] == [(2, 3), (2, 3)]
    assert not any(host.ended for host in setup.hosts)


@pytest.mark.parametrize(
    ("log_id", "cut"),
    [(0, ()), (9, [3]), (8, [4])],
    ids=["from the very start", "from before", "of another log"],
)
def test_rows_that_have_more_to_replay_are_not_shared(
    tmp_path: Path, log_id: int, cut: Any
) -> None:
    setup = Setup(tmp_path)
    setup.publish(1, log_id=9, cut=[4])
    setup.publish(2, log_id=log_id, cut=cut)
    setup.tiers.hold({1, 2})
    assert len(setup.hosts) == 4
    setup.tiers.end()


def test_a_generation_without_remote_tables_has_no_process(tmp_path: Path, capfd: Any) -> None:
    setup = Setup(tmp_path)
    path = generation_dir(setup.state.generations, 1)
    setup.publish(1)
    document = json.loads((path / "manifest.json").read_text()) | {"files": {}}
    (path / "manifest.json").write_text(json.dumps(document))
    setup.tiers.hold({1})
    setup.tiers.poll()
    assert (setup.tiers.watches, setup.tiers.records) == ([], ())
    # One that cannot be read has none either, and that is said once.
    setup.tiers.hold({1, 2})
    setup.tiers.hold({1, 2})
    assert capfd.readouterr().err.count("manifest.json is missing") == 1
    assert not setup.state.tables_dir.exists()


def until(true: Callable[[], bool], what: str) -> None:
    give_up_s = time.monotonic() + 60
    while not true():
        assert time.monotonic() < give_up_s, what
        time.sleep(0.01)


@contextmanager
def started(state: StateDir, **options: Any) -> Iterator[ClusterRecord]:
    """Run a cluster that ends with the test, and with the test process."""
    # A busy machine must not look like a late table process.
    fixed = {
        "listen.port": 0,
        "model.name": "films",
        "tables.deadline_ms": 2000,
        "runtime.start_timeout_s": 400,
    }
    config = load(None, environ={}, options={**fixed, **options})
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

    uncached = {"tables.cache_mib": 0}
    with (
        started(state, **uncached) as record,
        Client(record.address, timeout_s=30) as client,
    ):
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


@pytest.mark.ray
@pytest.mark.slow
def test_rows_change_while_they_are_served_through_a_crash_a_swap_and_back(
    publish_model: Any, tmp_path: Path
) -> None:
    made = publish_model("int8", remote=("history", "recent"))
    state = StateDir(tmp_path / "s")
    state.create()
    shutil.copytree(made.path, generation_dir(state.generations, 1))
    # The same model whole in this process, whose tables change alike.
    whole = load_retriever(publish_model("int8").path)[0]
    generator, ids = np.random.default_rng(3), made.catalogue.item_ids
    queries = [
        {"features": {"history": ids[at : at + 9].tolist()}, "k": 20, "exact": True}
        for at in range(0, 32, 8)
    ]
    tokens: tuple[Any, ...] = ()

    def change(client: Client) -> None:
        nonlocal tokens
        for table in ("history", "recent"):
            rows = generator.permutation(151)[:90]
            values = generator.standard_normal((90, 16)).astype(np.float32) * 0.3
            result = client.apply([TableRows(table, rows.tolist(), values)])
            assert not result.rejected
            tokens = result.tokens
            whole.model.update_rows(table, torch.from_numpy(rows), torch.from_numpy(values))

    def check(client: Client, generation: int) -> None:
        for query in queries:
            (wanted,) = whole([Request(**query)])
            got = client.retrieve(**query, after=tokens)
            assert (got.generation, got.coverage.reasons) == (generation, ())
            assert got.item_ids.tolist() == wanted.item_ids.tolist()
            assert got.scores.tobytes() == wanted.scores.numpy().tobytes()

    options = {"index.golden_requests": 4, "sharding.threads": 1}
    with started(state, **options) as record, Client(record.address, timeout_s=30) as client:
        config = load(
            None, environ={}, options={"listen.port": 0, "model.name": "films", **options}
        )
        check(client, 1)
        for _ in range(6):
            change(client)
            check(client, 1)

        victim = record.tables[0].pid
        os.kill(victim, signal.SIGKILL)
        change(client)
        until(
            lambda: (found := state.read_record()) is not None
            and found.tables[0].state == "serving"
            and found.tables[0].pid != victim,
            "the process was not started again",
        )
        until(lambda: not client.retrieve(**queries[0]).coverage.degraded, "it did not heal")
        check(client, 1)

        published = recluster.republish(state, config)
        assert published.generation == 2
        assert published_rows(published.path).checksums != published_rows(made.path).checksums
        change(client)
        activate.activate(state, config, 2, load=False, timeout_s=120, report=print)
        until(lambda: client.retrieve(k=1).generation == 2, "it does not answer")
        check(client, 2)
        found = state.read_record()
        assert found is not None
        assert sorted(one.generations for one in found.tables) == [(1,), (1,), (2,), (2,)]
        change(client)
        check(client, 2)
        activate.rollback(state, timeout_s=120, report=print)
        until(lambda: client.retrieve(k=1).generation == 1, "it does not answer")
        check(client, 1)

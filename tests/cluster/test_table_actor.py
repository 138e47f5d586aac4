import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from silvershard.cluster.config import PingSection
from silvershard.cluster.table_client import RemoteTable
from silvershard.cluster.table_config import RemoteTableSection
from silvershard.cluster.table_lookup import EMBEDDING_FALLBACK
from silvershard.cluster.table_map import TableEntry, TableShardMap
from silvershard.shard.table import TableShard
from silvershard.shard.table_plan import TablePlan
from silvershard.shard.table_rows import dequantize_rows, quantize_rows

pytestmark = [pytest.mark.ray, pytest.mark.slow]

CONFIG = RemoteTableSection(
    deadline_ms=5000, poll_ms=5, ping=PingSection(every_ms=20, suspect_after=50, eject_after=250)
)


def make_map(version: int, plan: TablePlan, *described: dict[str, Any]) -> TableShardMap:
    entries = tuple(TableEntry.model_validate(one) for one in described)
    return TableShardMap(version=version, plan=plan, entries=entries)


def test_ten_million_rows_on_two_actors_are_those_of_a_local_table_through_a_crash(
    ray: Any, tmp_path: Path
) -> None:
    from silvershard.cluster.table_actor import TableActor

    plan = TablePlan(name="users", num_rows=10_000_000, dim=64, num_shards=2)
    source = {"plan": plan.model_dump(), "seed": 3}
    actors = [TableActor.remote(shard, [source]) for shard in range(2)]
    local = TableShard.generated(plan.model_copy(update={"num_shards": 1}), 0, seed=3)

    def expected(ids: np.ndarray) -> np.ndarray:
        return dequantize_rows(local.take(plan.positions(ids)))

    hosts = ray.get([actor.describe.remote() for actor in actors], timeout=120)
    described = [one["tables"]["users"] for one in hosts]
    assert [one["pid"] for one in described] == [one["pid"] for one in hosts]
    assert [one["rows"] for one in described] == [5_000_000, 5_000_000]
    assert len({one["pid"] for one in described} | {os.getpid()}) == 3
    for one in described:
        # The rows of a shard are 340 MB; the process beside them is small without torch.
        assert resident_bytes(one["pid"]) < 600e6

    path = tmp_path / "users.json"
    make_map(1, plan, *described).write_atomic(path)
    generator = np.random.default_rng(0)
    try:
        with RemoteTable.follow(path, CONFIG) as table:
            table.wait_until_ready(30)
            for size in (1, 1000, 100_000):
                ids = generator.integers(0, plan.num_rows, size)
                lookup = table.lookup(ids)
                assert lookup.reasons == ()
                np.testing.assert_array_equal(lookup.values, expected(ids))

            fresh = generator.choice(plan.num_rows, 2000, replace=False)
            values = generator.standard_normal((2000, 64)).astype(np.float32)
            table.update(fresh, values)
            local.update(fresh, values)
            np.testing.assert_array_equal(table.lookup(fresh).values, expected(fresh))

            os.kill(described[0]["pid"], signal.SIGKILL)
            lost = plan.owners(plan.positions(ids)) == 0
            # Rows in the cache still count, so ask for others until some are missing.
            while not (lookup := table.lookup(generator.integers(0, plan.num_rows, 50))).reasons:
                time.sleep(0.005)
            assert lookup.reasons == (EMBEDDING_FALLBACK,)
            np.testing.assert_array_equal(table.lookup(ids[~lost]).values, expected(ids[~lost]))

            again = None
            while again is None:
                try:
                    again = ray.get(actors[0].describe.remote(), timeout=120)["tables"]["users"]
                except ray.exceptions.ActorUnavailableError:
                    time.sleep(0.01)
            assert again["epoch"] > described[0]["epoch"]
            assert again["pid"] != described[0]["pid"]
            make_map(2, plan, again, described[1]).write_atomic(path)
            while table.lookup(generator.integers(0, plan.num_rows, 50)).reasons:
                time.sleep(0.005)
            # The new incarnation has the rows of the source, without the updates.
            source = TableShard.generated(plan, 0, seed=3)
            back = plan.positions(fresh)
            mine = back < 5_000_000
            local.put(back[mine], source.take(back[mine]))
            for asked in (ids, fresh):
                lookup = table.lookup(asked)
                assert lookup.reasons == ()
                np.testing.assert_array_equal(lookup.values, expected(asked))

            ray.get(actors[1].stop.remote(0.1), timeout=30)
            while not table.lookup(generator.integers(0, plan.num_rows, 50)).reasons:
                time.sleep(0.005)
    finally:
        for actor in actors:
            ray.kill(actor)


def test_actors_load_parts_of_several_files_and_refuse_two_sources(
    ray: Any, tmp_path: Path
) -> None:
    from silvershard.cluster.table_actor import TableActor

    generator = np.random.default_rng(0)
    values = {
        name: generator.standard_normal((size, 8)).astype(np.float32)
        for name, size in (("users", 1000), ("tags", 30))
    }
    plans = {
        name: TablePlan(name=name, num_rows=len(one), dim=8, num_shards=2)
        for name, one in values.items()
    }
    tables = []
    for name, one in values.items():
        path = tmp_path / f"{name}.safetensors"
        save_file({"weight": one}, path)
        tables.append({"plan": plans[name].model_dump(), "path": str(path)})
    actors = [TableActor.remote(shard, tables) for shard in range(2)]
    refused = TableActor.remote(0, [tables[0] | {"seed": 1}])
    empty = TableActor.remote(0, [])
    try:
        hosts = ray.get([actor.describe.remote() for actor in actors], timeout=60)
        assert [one["shard"] for one in hosts] == [0, 1]
        for name, one in values.items():
            described = [host["tables"][name] for host in hosts]
            with RemoteTable(make_map(1, plans[name], *described), CONFIG) as table:
                table.wait_until_ready(10)
                lookup = table.lookup(np.arange(len(one)))
                expected = dequantize_rows(quantize_rows(one, 8))
                np.testing.assert_array_equal(lookup.values, expected)
        with pytest.raises(ray.exceptions.RayActorError, match="either path or seed"):
            ray.get(refused.describe.remote(), timeout=60)
        with pytest.raises(ray.exceptions.RayActorError, match="at least one table"):
            ray.get(empty.describe.remote(), timeout=60)
    finally:
        for actor in (*actors, refused, empty):
            ray.kill(actor)


def resident_bytes(pid: int) -> int:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")

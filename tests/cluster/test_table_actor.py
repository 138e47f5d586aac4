import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from silvershard.cluster import retrieval_pb2
from silvershard.cluster.config import PingSection
from silvershard.cluster.mutation_codec import logged
from silvershard.cluster.table_client import RemoteTable
from silvershard.cluster.table_config import RemoteTableSection, TableHolding, TableRows
from silvershard.cluster.table_lookup import EMBEDDING_FALLBACK
from silvershard.cluster.table_map import TableEntry, TableShardMap
from silvershard.cluster.update_log import NO_ITEM, NewRecord, open_log
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
    log = open_log(f"sqlite:///{tmp_path}/log.sqlite")
    holding = tmp_path / "tier.json"
    TableHolding(tables=(TableRows(plan=plan, seed=3),), log_url=log.url).write_atomic(holding)
    actors = [TableActor.remote(shard, str(holding)) for shard in range(2)]
    local = TableShard.generated(plan.model_copy(update={"num_shards": 1}), 0, seed=3)

    def expected(ids: np.ndarray) -> np.ndarray:
        return dequantize_rows(local.take(plan.positions(ids)))

    hosts = ray.get([actor.describe.remote() for actor in actors], timeout=120)
    described = [one["tables"]["users"] for one in hosts]
    assert [one["pid"] for one in described] == [one["pid"] for one in hosts]
    assert [one["rows"] for one in described] == [5_000_000, 5_000_000]
    assert len({one["pid"] for one in described} | {os.getpid()}) == 3
    for one in described:
        # The rows of a shard are 340 MB; the process beside them is small without torch, and what
        # rows were before takes memory with the first change only.
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
            version = append_change(log, "users", fresh, values)
            table.advance(version, fresh)
            local.apply(version, fresh, values)
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
            # The new incarnation replayed the log.
            for asked in (ids, fresh):
                lookup = table.lookup(asked)
                assert lookup.reasons == ()
                np.testing.assert_array_equal(lookup.values, expected(asked))

            ray.get(actors[1].stop.remote(0.1), timeout=30)
            while not table.lookup(generator.integers(0, plan.num_rows, 50)).reasons:
                time.sleep(0.005)
    finally:
        log.close()
        for actor in actors:
            ray.kill(actor)


def append_change(log: Any, table: str, rows: np.ndarray, values: np.ndarray) -> int:
    """Log a change of rows in pieces that a log takes; return the last version."""
    version, epoch = 0, log.acquire(0)
    for start in range(0, len(rows), 1000):
        part = values[start : start + 1000]
        tensor = retrieval_pb2.Tensor(shape=part.shape, data=part.tobytes())
        update = retrieval_pb2.RowUpdate(
            table=table, rows=rows[start : start + 1000], values=tensor
        )
        version += 1
        payload = logged(retrieval_pb2.Mutation(rows=update), version)
        log.append(0, epoch, [NewRecord(NO_ITEM, version, False, False, 0, payload, table)], 1)
    return version


def test_actors_load_parts_of_several_files_and_refuse_what_they_cannot_hold(
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
        tables.append(TableRows(plan=plans[name], path=str(path)))
    log = open_log(f"sqlite:///{tmp_path}/log.sqlite")

    def holding(name: str, **fields: Any) -> str:
        path = tmp_path / f"{name}.json"
        TableHolding(**{"tables": tuple(tables), **fields}).write_atomic(path)
        return str(path)

    whole = holding("whole")
    actors = [TableActor.remote(shard, whole) for shard in range(2)]
    bad = {
        "table holding .*none.json": TableActor.remote(0, str(tmp_path / "none.json")),
        "at least one table": TableActor.remote(2, whole),
        "the rows hold changes of log 5": TableActor.remote(
            0, holding("other", log_url=log.url, log_id=5, cut=(1,))
        ),
    }
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
        for message, actor in bad.items():
            with pytest.raises(ray.exceptions.RayActorError, match=message):
                ray.get(actor.describe.remote(), timeout=60)
    finally:
        log.close()
        for actor in (*actors, *bad.values()):
            ray.kill(actor)


def resident_bytes(pid: int) -> int:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")

"""A cluster is scaled under load, and what may go wrong meanwhile."""

from pathlib import Path
from typing import Any

import pytest
from history.checker import PROPERTIES

from silvershard.cluster import Client, Query
from silvershard.deploy.config import load
from silvershard.deploy.processes import descendants
from silvershard.deploy.scale import scale
from silvershard.model.request import Request
from silvershard.shard.golden import difference
from silvershard.shard.load import load_retriever

pytestmark = pytest.mark.slow

TIMEOUT_S = 150.0
READER_TIMEOUT_S = 5.0
OPTIONS = {
    "sharding.shards": 2,
    "swap.drain_ms": 500,
    "query.deadline_max_ms": 5000,
    "runtime.crash_limit": 10_000,
    # Processes that load on two cores are late to answer, which is no sign of a hang.
    "ping.eject_after": 100,
}
PUBLISHED = (
    Request(k=50, exact=True, filter="NOT genre:own"),
    Request(k=200, exact=True, filter="genre:comedy AND NOT genre:own"),
    Request(k=30, plan="", filter="year > 1990 AND NOT genre:own"),
)
"""What is asked of the films only, which no update changes."""


def scaled(cluster: Any, **size: int) -> dict[str, Any]:
    return scale(
        cluster.state,
        load(None, environ={}, options=cluster.options),
        timeout_s=TIMEOUT_S,
        report=lambda _: None,
        **size,
    )


def places(cluster: Any) -> list[tuple[int, int]]:
    return sorted((one.shard, one.replica) for one in cluster.record.shards)


def is_settled(cluster: Any, shards: int, copies: int) -> bool:
    """Return whether there are so many shard processes, and no others."""
    actors = [one for one in descendants(cluster.record.driver.pid) if is_shard(one.pid)]
    wanted = sorted((shard, replica) for shard in range(shards) for replica in range(copies))
    return cluster.is_whole() and places(cluster) == wanted and len(actors) == len(wanted)


def is_shard(pid: int) -> bool:
    try:
        return b"ShardActor" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def same_as_the_module(cluster: Any, path: Path, history: list[int]) -> None:
    retriever, _ = load_retriever(path)
    with Client(cluster.address(), timeout_s=10.0) as client:
        for request in PUBLISHED:
            for features in ({}, {"history": history}):
                asked = Query(**{**request.__dict__, "features": features}, min_coverage=1.0)
                result = client.retrieve(asked)
                (wanted,) = retriever([Request(**{**request.__dict__, "features": features})])
                assert difference(result, wanted) is None
                assert len(result.item_ids) == len(wanted.item_ids) > 0


def test_scaling_under_load(
    tmp_path: Path,
    crash: Any,
    marked_generations: list[Path],
    marked_recorder: Any,
    generation: Any,
) -> None:
    recorder = marked_recorder
    with crash.running(tmp_path / "s", marked_generations[:1], **OPTIONS) as cluster:
        crash.until(cluster.is_whole, "the cluster did not become whole")
        writer = crash.Writer(cluster.address, recorder, seed=1)
        liked = generation.catalogue.item_ids[:6].tolist()
        readers = [
            crash.Reader(
                cluster.address, recorder, liked, [writer.ledger], timeout_s=READER_TIMEOUT_S
            )
            for _ in range(2)
        ]
        with crash.working(writer, *readers):
            for size in ((3, 1), (2, 2), (1, 1)):
                shards, replicas = size
                before = writer.ledger.acked
                done = scaled(cluster, shards=shards, replicas=replicas)
                assert done["done"]
                assert writer.ledger.acked > before
                crash.until(
                    lambda size=size: is_settled(cluster, *size), f"it has not {size} processes"
                )
                same_as_the_module(cluster, marked_generations[0], liked)
                crash.look_at_all(cluster, recorder, writer.ledger)
            ledger = writer.end()
        assert writer.failures == 0
        assert not writer.rejected
        assert all(one.audits for one in readers)
        crash.look_at_all(cluster, recorder, ledger)
    shards_by_map: dict[int, set[int]] = {}
    for one in recorder.events():
        version = getattr(one, "shard_map_version", None)
        if version is not None:
            shards_by_map.setdefault(version, set()).add(one.shards_total)
    assert {shards for found in shards_by_map.values() for shards in found} == {1, 2, 3}
    assert all(len(found) == 1 for found in shards_by_map.values())
    crash.assert_right(recorder, *set(PROPERTIES) - {"bounded_recovery"})

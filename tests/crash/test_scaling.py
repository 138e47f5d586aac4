"""A cluster is scaled under load, and what may go wrong meanwhile."""

import random
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from history.checker import PROPERTIES

from silvershard.cluster import Client, Query
from silvershard.deploy.activate import activate, rollback
from silvershard.deploy.config import load
from silvershard.deploy.errors import CommandError
from silvershard.deploy.processes import descendants, kill_all
from silvershard.deploy.restart import restart
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
    Request(k=200, exact=True, filter="genre:Comedy AND NOT genre:own"),
    Request(k=30, exact=True, filter="year > 1990 AND NOT genre:own"),
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
                # An exact plan names the number of items, those of the writer too.
                assert difference(replace(result, plan=wanted.plan), wanted) is None
                assert len(result.item_ids) == len(wanted.item_ids) > 0


@pytest.mark.timeout(1800)
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
        assert writer.failures == []
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


class Scales:
    """Commands that scale a cluster, one at a time, in the background."""

    def __init__(self, cluster: Any, until: Any) -> None:
        self._cluster = cluster
        self._until = until
        self._commands = ThreadPoolExecutor(1)

    def __enter__(self) -> "Scales":
        return self

    def __exit__(self, *_: object) -> None:
        self._commands.shutdown()

    def start(self, **size: int) -> "Future[Any]":
        return self._commands.submit(scaled, self._cluster, **size)

    def reach(self, words: str) -> str:
        """Wait until the operation says something; return its name."""
        store = self._cluster.state.control

        def said() -> bool:
            going = store.read().current
            return going is not None and going.progress.startswith(words)

        self._until(said, f"it does not come to {words}")
        going = store.read().current
        assert going is not None
        return str(going.operation_id)


@pytest.mark.timeout(1800)
def test_what_goes_wrong_while_a_cluster_is_scaled_leaves_the_old_set_or_none(
    tmp_path: Path,
    crash: Any,
    marked_generations: list[Path],
    marked_recorder: Any,
    generation: Any,
) -> None:
    recorder = marked_recorder
    options = {**OPTIONS, "sharding.shards": 1}
    with crash.running(tmp_path / "s", marked_generations[:2], **options) as cluster:
        crash.until(cluster.is_whole, "the cluster did not become whole")
        store, said = cluster.state.control, []
        writer = crash.Writer(cluster.address, recorder, seed=2)
        liked = generation.catalogue.item_ids[:6].tolist()
        reader = crash.Reader(
            cluster.address, recorder, liked, [writer.ledger], timeout_s=READER_TIMEOUT_S
        )
        with crash.working(writer, reader), Scales(cluster, crash.until) as scales:
            # Generation 1 is live, and 2 the one before it.
            config = load(None, environ={}, options=cluster.options)
            with recorder.activation(1):
                activate(
                    cluster.state, config, 1, load=False, timeout_s=TIMEOUT_S, report=said.append
                )
            # It is called off.
            refused = scales.start(shards=2)
            store.call_off(scales.reach("prepared"), "the test did")
            with pytest.raises(CommandError, match="the test did"):
                refused.result(TIMEOUT_S)
            crash.until(lambda: is_settled(cluster, 1, 1), "what was called off is still there")
            assert store.read().scaled is None
            # A shard of the new set is killed, and waited for.
            old = {one.pid for one in cluster.record.shards}
            done = scales.start(shards=2)
            scales.reach("prepared")
            with recorder.fault("kill", "a shard of the new set"):
                victims: list[Any] = []

                def found() -> bool:
                    driver = cluster.record.driver.pid
                    victims[:] = [
                        one
                        for one in descendants(driver)
                        if is_shard(one.pid) and one.pid not in old
                    ]
                    return bool(victims)

                crash.until(found, "there is no new process")
                assert not kill_all(victims[:1])
            assert done.result(TIMEOUT_S)["done"]
            crash.until(lambda: is_settled(cluster, 2, 1), "it has not two shards")
            # The new set holds the generation before, so that it is there without a load.
            held = {one.generation: one.prepared for one in cluster.record.generations}
            assert held == {1: 2, 2: 2}
            with recorder.activation(2):
                rollback(cluster.state, timeout_s=TIMEOUT_S, report=said.append)
            crash.until(lambda: cluster.record.generation == 2, "generation 2 is not live again")
            crash.look_at_all(cluster, recorder, writer.ledger)
        assert writer.failures == []
        # The driver dies meanwhile, and its cluster comes back as it was.
        with Scales(cluster, crash.until) as scales:
            lost = scales.start(shards=3)
            name = scales.reach("prepared")
            cluster.kill("supervisor", random.Random(1))
            with pytest.raises(CommandError, match="the cluster ended before it was done"):
                lost.result(TIMEOUT_S)
        crash.until(lambda: not cluster.state.is_locked(), "the guard does not end")
        cluster.restart()
        assert store.read().operation(name).state == "abandoned"
        # What was scaled is in force, and not what the settings said before.
        crash.until(lambda: is_settled(cluster, 2, 1), "it has not two shards again")
        same_as_the_module(cluster, marked_generations[1], liked)
        crash.look_at_all(cluster, recorder, writer.end())
    crash.assert_right(recorder, *set(PROPERTIES) - {"bounded_recovery"})


@pytest.mark.timeout(1800)
def test_all_shards_are_restarted_under_load(
    tmp_path: Path,
    crash: Any,
    marked_generations: list[Path],
    marked_recorder: Any,
    generation: Any,
) -> None:
    recorder = marked_recorder
    options = {**OPTIONS, "query.deadline_max_ms": 2000, "query.default_deadline_ms": 2000}
    options |= {"runtime.routers": 2}
    with crash.running(tmp_path / "s", marked_generations[:1], **options) as cluster:
        crash.until(cluster.is_whole, "the cluster did not become whole")
        writer = crash.Writer(cluster.address, recorder, seed=3)
        liked = generation.catalogue.item_ids[:6].tolist()
        reader = crash.Reader(
            cluster.address, recorder, liked, [writer.ledger], timeout_s=READER_TIMEOUT_S
        )
        before = {one.pid for one in cluster.record.shards}
        routers = {one.pid for one in cluster.record.routers}
        assert len(routers) == 2
        with crash.working(writer, reader):
            done = restart(cluster.state, timeout_s=TIMEOUT_S, report=lambda _: None)
            assert (done["processes"], done["routers"], done["done"]) == (2, 2, True)
            crash.until(lambda: is_settled(cluster, 2, 1), "it has not two processes")
            ledger = writer.end()
        assert writer.failures == []
        assert not before & {one.pid for one in cluster.record.shards}
        assert not routers & {one.pid for one in cluster.record.routers}
        same_as_the_module(cluster, marked_generations[0], liked)
        crash.look_at_all(cluster, recorder, ledger)
    crash.assert_right(recorder, *set(PROPERTIES) - {"bounded_recovery"})

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from silvershard.deploy.cluster_size import ClusterSize, size_of
from silvershard.deploy.cluster_store import ClusterStore, Launched
from silvershard.deploy.config import load
from silvershard.deploy.control_store import wanted
from silvershard.deploy.errors import CommandError, Refused, TimedOut
from silvershard.deploy.fleet import OneMachine, change_state, check_new_copies, listing
from silvershard.deploy.host_fleet import HostFleet, fleet_of
from silvershard.deploy.host_places import first_layout
from silvershard.deploy.placement import Copy
from silvershard.deploy.state import ShardRecord, StateDir
from silvershard.shard.outline import read_outline

TWO = {"sharding.shards": 2, "sharding.replicas": 2}


@pytest.fixture
def fleet(
    idle_state: StateDir, make_redis: Callable[..., Any], launched: Callable[..., Launched]
) -> Iterator[HostFleet]:
    """Two hosts with a copy of both shards each, and much memory; one copy does not answer."""
    store = ClusterStore(make_redis().url())
    idle_state.control_url_file.write_text(store.url)
    idle_state.control.change(lambda now: now.model_copy(update={"live": 1}))
    made = launched(idle_state.root, **TWO)
    hosts = tuple(one.model_copy(update={"memory_bytes": 1 << 40}) for one in made.hosts)
    store.begin(made.model_copy(update={"hosts": hosts}))
    record = idle_state.read_record()
    assert record is not None
    shards = tuple(
        ShardRecord(
            shard=one.shard,
            replica=one.replica,
            host=one.host,
            documents=300,
            state="serving" if (one.shard, one.replica) != (1, 1) else "restarting",
        )
        for one in first_layout(made).copies
    )
    record = record.model_copy(update={"ray": "10.0.0.9:6379", "shards": shards})
    idle_state.write_record(record)
    found = fleet_of(idle_state, record)
    assert isinstance(found, HostFleet)
    yield found
    store.close()


def test_a_single_machine_is_a_fleet_of_its_own(idle_state: StateDir) -> None:
    record = idle_state.read_record()
    assert record is not None
    assert isinstance(fleet_of(idle_state, record), OneMachine)


def test_hosts_are_listed_with_what_they_hold(fleet: HostFleet) -> None:
    assert listing(fleet)["hosts"] == [
        {"host": "a", "state": "up", "copies": 2, "serving": 1},
        {"host": "b", "state": "up", "copies": 2, "serving": 2},
    ]
    # Settings are those of the cluster, whatever a command was given.
    assert size_of(fleet.settings(load(None, environ={}))) == ClusterSize(shards=2, replicas=2)


def test_a_host_is_drained_where_the_other_has_room(fleet: HostFleet, idle_state: StateDir) -> None:
    found = change_state(fleet, "a", "retired")
    assert sorted(found["moves"]) == [
        "shard 0 replica 0 from a to b",
        "shard 1 replica 1 from a to b",
    ]
    assert idle_state.control.read().host_states == {"a": "retired"}
    assert listing(fleet)["hosts"][0]["state"] == "retired"
    check_new_copies(fleet)
    with pytest.raises(Refused, match="host b cannot be set to maintenance: shard 1 would lose"):
        change_state(fleet, "b", "maintenance")


def test_a_host_that_was_listed_otherwise_can_be_up(fleet: HostFleet, idle_state: StateDir) -> None:
    made = fleet._launched
    a, b = made.hosts
    changed = made.model_copy(update={"hosts": (a, b.model_copy(update={"state": "retired"}))})
    other = HostFleet(idle_state, fleet._record, fleet._store, changed)
    other.set_state("b", "up")
    assert [one.state for one in other.holding().hosts] == ["up", "up"]
    assert idle_state.control.read().host_states == {"b": "up"}
    other.set_state("b", "retired")
    assert idle_state.control.read().host_states == {}


def test_a_drain_is_waited_for(fleet: HostFleet, idle_state: StateDir) -> None:
    store, lines = fleet._store, []
    term = store.take_over()
    layout = first_layout(fleet._launched)

    def hear(line: str) -> None:
        lines.append(line)
        mine = [one for one in layout.copies if one.host == "a"][len(lines) :]
        found = layout.model_copy(update={"copies": tuple(mine)})
        store.write(term, "layout", found.model_dump_json())

    # What failed before is no concern of this one.
    past = wanted("move", 0, "live").ended("failed", "no memory")
    idle_state.control.change(lambda now: now.with_operation(past))
    fleet.await_empty("a", timeout_s=None, report=hear)
    assert lines == [f"{left} shard processes are still on a" for left in (2, 1)]


def test_a_drain_that_cannot_be_done_or_takes_long_says_what_is_left(
    fleet: HostFleet, idle_state: StateDir
) -> None:
    with pytest.raises(
        TimedOut, match=r"2 shard processes are still on a after 0\.01 s: it goes on"
    ):
        fleet.await_empty("a", timeout_s=0.01, report=lambda line: None)
    going = wanted("move", 0, "live").model_copy(update={"progress": "prepared 0 of 2"})
    idle_state.control.change(lambda now: now.with_operation(going))

    def fail(line: str) -> None:
        assert line == "2 shard processes are still on a; prepared 0 of 2"
        ended = going.ended("failed", "shard 0 could not start")
        idle_state.control.change(lambda now: now.with_operation(ended))

    with pytest.raises(CommandError, match="still on a: shard 0 could not start; it is tried"):
        fleet.await_empty("a", timeout_s=60.0, report=fail)


def test_scaling_is_planned_with_the_room_of_the_hosts(
    fleet: HostFleet, idle_state: StateDir
) -> None:
    outlines = {1: read_outline(idle_state.generations / "gen-000001")}
    before = ClusterSize(shards=2, replicas=2)
    config = fleet.settings(load(None, environ={}))
    found = fleet.plan_scale(config, before, ClusterSize(shards=3, replicas=2), outlines)
    assert (found.starts, found.ends, found.reason) == (6, 4, "")
    assert found.held_bytes > 0
    assert found.new_bytes > found.held_bytes
    assert (2 << 40) - found.held_bytes - found.free_bytes < 2 << 30
    more = fleet.plan_scale(config, before, ClusterSize(shards=2, replicas=3), outlines)
    assert (more.starts, more.new_bytes) == (2, found.held_bytes // 2)
    fewer = fleet.plan_scale(config, before, ClusterSize(shards=2, replicas=1), outlines)
    assert (fewer.starts, fewer.ends, fewer.new_bytes, fewer.reason) == (0, 2, 0, "")
    for name in ("a", "b"):
        fleet.set_state(name, "maintenance")
    found = fleet.plan_scale(config, before, ClusterSize(shards=3, replicas=2), outlines)
    assert "has no host" in found.reason
    assert Copy(0, 0) in fleet.holding().present

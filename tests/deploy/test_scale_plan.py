from typing import Any

import pytest

from silvershard.deploy.cluster_size import ClusterSize
from silvershard.deploy.config import load
from silvershard.deploy.footprint import PROCESS_BYTES
from silvershard.deploy.scale_plan import changed, plan_scale, render
from silvershard.shard.outline import Outline, read_outline

MIB = 1 << 20
ONE = ClusterSize(shards=2, replicas=1)
CONFIG = load(None, environ={})


@pytest.fixture
def outline(generation: Any) -> Outline:
    return read_outline(generation.path)


def plan(outline: Outline, after: ClusterSize, before: ClusterSize = ONE, **changes: Any) -> Any:
    given = {"held_bytes": 0, "free_bytes": 1 << 40, **changes}
    config = given.pop("config", CONFIG)
    return plan_scale(config, before, after, {1: outline}, **given)


def test_another_number_of_shards_starts_all_and_ends_all(outline: Outline) -> None:
    found = plan(outline, ClusterSize(shards=3, replicas=2))
    assert (found.starts, found.ends, found.reason) == (6, 2, "")
    assert found.new_bytes > 6 * PROCESS_BYTES
    one = plan(outline, ClusterSize(shards=3, replicas=1))
    assert found.new_bytes == 2 * one.new_bytes
    assert render(one)[0] == (
        "2 shards x 1 replica now, 3 shards x 1 replica then: 3 processes start, 2 end"
    )


def test_more_or_fewer_copies_leave_the_others_alone(outline: Outline) -> None:
    more = ClusterSize(shards=2, replicas=2, standby=1)
    found = plan(outline, more)
    assert (found.starts, found.ends) == (4, 0)
    back = plan(outline, ONE, more)
    assert (back.starts, back.ends, back.new_bytes) == (0, 4, 0)


def test_what_has_no_room_beside_the_others_is_refused_with_numbers(outline: Outline) -> None:
    enough = plan(outline, ClusterSize(shards=3, replicas=1)).new_bytes
    assert plan(outline, ClusterSize(shards=3, replicas=1), free_bytes=enough).reason == ""
    found = plan(
        outline, ClusterSize(shards=3, replicas=1), held_bytes=700 * MIB, free_bytes=enough - 1
    )
    assert found.reason.startswith("3 new processes with generations 1 take ")
    assert "beside the 700.0 MiB that are held" in found.reason
    limit = load(None, environ={}, options={"swap.memory_mib": 800})
    found = plan(outline, ClusterSize(shards=3, replicas=1), held_bytes=700 * MIB, config=limit)
    assert found.free_bytes == 100 * MIB
    assert "and 100.0 MiB are free: free memory, raise swap.memory_mib" in found.reason


def test_only_another_number_of_shards_ends_what_stays_in_number() -> None:
    assert changed(ONE, ONE) == (0, 0)
    assert changed(ONE, ClusterSize(shards=1, replicas=2)) == (2, 2)
    assert changed(ONE, ClusterSize(shards=2, replicas=3)) == (4, 0)

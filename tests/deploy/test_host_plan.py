from pathlib import Path

import pytest

from silvershard.deploy.config import load
from silvershard.deploy.config_sections import ShardingSection
from silvershard.deploy.errors import Refused
from silvershard.deploy.host_places import Beside
from silvershard.deploy.host_plan import plan_beside, wanted_now
from silvershard.deploy.placement import Copy, Host
from silvershard.deploy.plan import HEAD_BYTES, NODE_BYTES
from silvershard.shard.generations import generation_dir

CONFIG = load(None, environ={})
TWO = ShardingSection(shards=2, replicas=2)
THREE = ShardingSection(shards=3, replicas=1)


def hosts(left_bytes: int) -> list[Host]:
    """Three hosts with so much memory beside Ray and the control plane."""
    kept = (HEAD_BYTES, NODE_BYTES, NODE_BYTES)
    return [Host(f"h{at}", 2.0, left_bytes + one) for at, one in enumerate(kept)]


@pytest.fixture(scope="module")
def snapshot(two_generations: Path) -> Path:
    return generation_dir(two_generations, 1)


@pytest.fixture(scope="module")
def each_bytes(snapshot: Path) -> int:
    """What a copy of half of the catalogue takes at most."""
    _, wanted = wanted_now(CONFIG, snapshot, TWO, hosts(1 << 40))
    return max(wanted.need_of(one)[0] for one in wanted.copies())


def test_what_there_is_and_what_it_takes(snapshot: Path, each_bytes: int) -> None:
    room, wanted = wanted_now(CONFIG, snapshot, TWO, hosts(1 << 40))
    assert [one.memory_bytes for one in room] == [1 << 40] * 3
    assert (len(wanted.needs), wanted.replicas) == (2, 2)
    # Where a second generation has no room, it is asked for none.
    _, tight = wanted_now(CONFIG, snapshot, TWO, hosts(each_bytes - 1))
    assert tight.needs[0].memory_bytes < wanted.needs[0].memory_bytes
    # What a copy takes does not depend on who is there.
    down = [one._replace(state="down") for one in hosts(1 << 40)]
    assert wanted_now(CONFIG, snapshot, TWO, down)[1] == wanted


def test_a_new_set_has_room_only_beside_the_old_one(snapshot: Path, each_bytes: int) -> None:
    listed = hosts(3 * each_bytes)
    made = plan_beside(CONFIG, snapshot, THREE, listed, {}, [], generations=2)
    assert sorted(made.placement.at.values()) == ["h0", "h1", "h2"]
    old = [Beside(2, Copy(shard, at), "h1") for at in range(2) for shard in range(2)]
    made = plan_beside(CONFIG, snapshot, THREE, listed, {}, old, generations=2)
    assert set(made.placement.at.values()) == {"h0", "h2"}
    full = [one._replace(host=host.name) for host in listed for one in old]
    with pytest.raises(Refused, match="of host memory"):
        plan_beside(CONFIG, snapshot, THREE, listed, {}, full, generations=2)


def test_copies_that_are_there_stay(snapshot: Path, each_bytes: int) -> None:
    present = {Copy(0, 0): "h2", Copy(1, 0): "h0"}
    made = plan_beside(CONFIG, snapshot, TWO, hosts(4 * each_bytes), present, [], generations=1)
    assert {one: made.placement.at[one] for one in present} == present
    assert made.placement.at[Copy(0, 1)] != "h2"

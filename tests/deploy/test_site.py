from pathlib import Path

from silvershard.cluster.shard_map import ShardEntry, ShardMap
from silvershard.deploy.site import ThisMachine
from silvershard.deploy.state import StateDir


def test_a_single_machine_adds_nothing(tmp_path: Path) -> None:
    site = ThisMachine(StateDir(tmp_path))
    assert (site.name, site.ray, site.plan, site.agents) == ("", "", None, None)
    site.leave()
    name = "shard-0-0"
    assert (site.host_of(name), site.find(name)) == ("", None)
    assert (site.options(name), site.binding(name), site.lacking(3)) == ({}, {}, "")
    started: list[str] = []

    def start() -> None:
        started.append("here")

    site.movable("sequencer", start)  # type: ignore[arg-type]
    site.poll({3})
    assert started == ["here"]


def test_the_map_of_a_single_machine_is_a_file_that_is_never_adopted(tmp_path: Path) -> None:
    state = StateDir(tmp_path)
    site = ThisMachine(state)
    entry = ShardEntry(shard=0, replica=0, address="x:9", epoch=5, documents=3, pid=9)
    made = ShardMap(version=1, generation=3, snapshot="/g", num_shards=1, entries=(entry,))
    site.write_map(made)
    assert ShardMap.read(state.shard_map_file) == made
    assert site.read_map() is None

from pathlib import Path
from typing import Any

from silvershard.cluster.shard_map import ShardEntry, ShardMap
from silvershard.deploy.next_map import next_map


class Generations:
    """What is in service, as the test says."""

    def __init__(self, *places: tuple[int, int]) -> None:
        self.live = 1
        self.aliases: dict[str, int] = {}
        self.snapshots: dict[int, str] = {}
        self.in_service = tuple(
            ShardEntry(shard=s, replica=r, address="a:1", epoch=1, documents=3, pid=1)
            for s, r in places
        )

    def path(self, generation: int) -> Path:
        return Path(f"/g/{generation}")


def made(before: ShardMap | None, generations: Any, **more: Any) -> ShardMap | None:
    return next_map(before, generations, num_shards=2, num_named=2, **more)


def test_the_first_map_is_whole() -> None:
    assert made(None, Generations((0, 0))) is None
    first = made(None, Generations((0, 0), (1, 0)), log_url="l", log_partitions=4, sequencer="s:1")
    assert first is not None
    assert (first.version, first.generation, first.snapshot) == (1, 1, "/g/1")
    assert (first.num_shards, len(first.entries)) == (2, 2)
    assert (first.log_url, first.log_partitions, first.sequencer) == ("l", 4, "s:1")


def test_a_later_map_may_lack_shards_and_has_the_next_version() -> None:
    first = made(None, Generations((0, 0), (1, 0)))
    assert made(first, Generations((0, 0), (1, 0))) is None
    second = made(first, Generations((1, 0)))
    assert second is not None
    assert (second.version, [one.shard for one in second.entries]) == (2, [1])


def test_maps_that_follow_on_each_other_have_one_origin_and_others_another() -> None:
    first = made(None, Generations((0, 0), (1, 0)))
    assert first is not None
    second = made(first, Generations((1, 0)))
    assert second is not None
    assert first.origin
    assert second.origin == first.origin
    other = made(None, Generations((0, 0), (1, 0)))
    assert other is not None
    assert other.origin != first.origin


def test_every_change_of_what_is_served_makes_another_map() -> None:
    generations = Generations((0, 0), (1, 0))
    first = made(None, generations)
    generations.live, generations.snapshots = 2, {1: "/g/1"}
    second = made(first, generations)
    assert second is not None
    assert (second.version, second.generation, second.hosted) == (2, 2, {1: "/g/1", 2: "/g/2"})
    generations.aliases = {"canary": 1}
    third = made(second, generations)
    assert third is not None
    assert (third.version, third.aliases) == (3, {"canary": 1})

import numpy as np
import pytest
import torch

from silvershard.shard.partition import (
    choose_num_partitions,
    hash_ids,
    part_of,
    partition_of,
    shard_partitions,
)

MASK = (1 << 64) - 1


def splitmix64(value: int, seed: int) -> int:
    """Unsigned big-integer oracle."""
    mixed = (value + 0x9E3779B97F4A7C15 * (seed + 1)) & MASK
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & MASK
    return (mixed ^ (mixed >> 31)) >> 1


@pytest.mark.parametrize("seed", [0, 1, 12345])
def test_hashes_equal_the_big_integer_definition(seed: int) -> None:
    values = [0, 1, 2, 63, 1 << 40, (1 << 63) - 1, 987654321987654321]
    got = hash_ids(torch.tensor(values), seed).tolist()
    assert got == [splitmix64(value, seed) for value in values]


def test_partitions_of_consecutive_ids_are_even() -> None:
    owner = partition_of(torch.arange(64_000), 64)
    sizes = torch.bincount(owner, minlength=64)
    assert int(sizes.min()) > 850
    assert int(sizes.max()) < 1150


def test_a_partition_does_not_depend_on_the_other_items() -> None:
    ids = torch.randint(0, 1 << 62, (500,), generator=torch.Generator().manual_seed(3))
    whole = partition_of(ids, 128)
    assert all(int(partition_of(ids[at : at + 1], 128)) == int(whole[at]) for at in range(500))


@pytest.mark.parametrize("bad", [0, -4, 3, 100])
def test_a_partition_count_that_is_no_power_of_two_is_refused(bad: int) -> None:
    with pytest.raises(ValueError, match="power of two"):
        partition_of(torch.arange(3), bad)


@pytest.mark.parametrize(("shards", "expected"), [(1, 64), (8, 64), (9, 128), (100, 1024)])
def test_partitions_are_at_least_64_and_eight_per_shard(shards: int, expected: int) -> None:
    assert choose_num_partitions(shards) == expected


@pytest.mark.parametrize("num_shards", [1, 2, 3, 7, 63, 64])
def test_shards_cover_every_partition_once_and_evenly(num_shards: int) -> None:
    ranges = [shard_partitions(shard, num_shards, 64) for shard in range(num_shards)]
    assert [one for owned in ranges for one in owned] == list(range(64))
    sizes = {len(owned) for owned in ranges}
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize(("shard", "num_shards"), [(0, 0), (0, 65), (-1, 2), (2, 2)])
def test_a_shard_out_of_range_is_refused(shard: int, num_shards: int) -> None:
    with pytest.raises(ValueError, match="must be in"):
        shard_partitions(shard, num_shards, 64)


def test_planned_shards_must_be_positive() -> None:
    with pytest.raises(ValueError, match="planned_shards"):
        choose_num_partitions(0)


def test_every_part_of_a_shard_holds_partitions_of_its_own() -> None:
    partitions = np.arange(64)
    parts = part_of(partitions, 3)
    assert set(parts.tolist()) == {0, 1, 2}
    assert [part_of(one, 3) for one in partitions.tolist()] == parts.tolist()

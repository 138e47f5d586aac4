import random

import pytest
import torch
from history.placing import partition_of, shard_of

from silvershard.shard import partition


@pytest.mark.parametrize("num_partitions", [1, 64, 1024])
def test_partitions_are_those_of_the_cluster(num_partitions: int) -> None:
    draw = random.Random(1)
    ids = [0, 1, (1 << 63) - 1, *(draw.getrandbits(63) for _ in range(300))]
    expected = partition.partition_of(torch.tensor(ids), num_partitions).tolist()
    assert [partition_of(one, num_partitions) for one in ids] == expected


@pytest.mark.parametrize("num_shards", [1, 2, 3, 5, 7, 64])
def test_every_item_is_of_the_shard_that_serves_its_partition(num_shards: int) -> None:
    for item in range(300):
        shard = shard_of(item, 64, num_shards)
        assert partition_of(item, 64) in partition.shard_partitions(shard, num_shards, 64)

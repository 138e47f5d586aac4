from silvershard.shard.assignment import shard_partitions


def test_consecutive_shards_serve_consecutive_partitions() -> None:
    assert [shard_partitions(shard, 3, 8) for shard in range(3)] == [
        range(0, 2),
        range(2, 5),
        range(5, 8),
    ]

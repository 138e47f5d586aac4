"""Which shard serves a partition; read without torch."""


def shard_partitions(shard: int, num_shards: int, num_partitions: int) -> range:
    """Return the partitions that ``shard`` serves: consecutive, sizes differing by at most one.

    Raises:
        ValueError: if ``shard`` is out of range, or there are more shards than partitions.
    """
    if not 1 <= num_shards <= num_partitions:
        raise ValueError(f"num_shards must be in 1..{num_partitions}, got {num_shards}")
    if not 0 <= shard < num_shards:
        raise ValueError(f"shard must be in 0..{num_shards - 1}, got {shard}")
    return range(shard * num_partitions // num_shards, (shard + 1) * num_partitions // num_shards)

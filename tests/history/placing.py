"""Which shard holds an item, computed without the code that places it."""

_BITS = (1 << 64) - 1
_GAMMA, _MIX_1, _MIX_2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def partition_of(item_id: int, num_partitions: int) -> int:
    """Return the partition of an item.

    Source: Steele, Lea and Flood, "Fast Splittable Pseudorandom Number Generators", OOPSLA 2014.
    """
    mixed = item_id + _GAMMA & _BITS
    mixed = (mixed ^ mixed >> 30) * _MIX_1 & _BITS
    mixed = (mixed ^ mixed >> 27) * _MIX_2 & _BITS
    return (mixed ^ mixed >> 31) >> 1 & num_partitions - 1


def shard_of(item_id: int, num_partitions: int, num_shards: int) -> int:
    """Return the shard that holds an item: shard s of S has the partitions from s * P // S on."""
    partition = partition_of(item_id, num_partitions)
    return ((partition + 1) * num_shards - 1) // num_partitions

"""Which partition an item belongs to, and which shard serves a partition.

Shapes: n items, P partitions, S shards.
"""

from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from silvershard.shard.assignment import shard_partitions as shard_partitions

_Numbers = TypeVar("_Numbers", int, NDArray[np.int64])

MIN_PARTITIONS = 64
PARTITIONS_PER_SHARD = 8

# splitmix64 constants, as signed 64-bit integers.
# Source: Steele, Lea and Flood, "Fast Splittable Pseudorandom Number Generators", OOPSLA 2014.
_GAMMA = 0x9E3779B97F4A7C15 - (1 << 64)
_MIX_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MIX_2 = 0x94D049BB133111EB - (1 << 64)


def _shift_right(values: Tensor, bits: int) -> Tensor:
    """Return a logical right shift of int64 values."""
    return (values >> bits) & ((1 << (64 - bits)) - 1)


def hash_ids(item_ids: Tensor, seed: int = 0) -> Tensor:
    """Return 63-bit splitmix64 hashes, int64 >= 0, the same on every platform.

    Args:
        item_ids: int64 of any shape.
        seed: 0 for partitions; other seeds give independent hashes.
    """
    # Wrapped by hand: torch refuses Python integers beyond 64 bits.
    offset = (_GAMMA * (seed + 1) + (1 << 63)) % (1 << 64) - (1 << 63)
    mixed = item_ids + offset
    mixed = (mixed ^ _shift_right(mixed, 30)) * _MIX_1
    mixed = (mixed ^ _shift_right(mixed, 27)) * _MIX_2
    mixed = mixed ^ _shift_right(mixed, 31)
    return _shift_right(mixed, 1)


def choose_num_partitions(planned_shards: int) -> int:
    """Return the smallest power of two that is at least 64 and 8 times the planned shards."""
    if planned_shards < 1:
        raise ValueError(f"planned_shards must be at least 1, got {planned_shards}")
    wanted = max(MIN_PARTITIONS, PARTITIONS_PER_SHARD * planned_shards)
    return 1 << (wanted - 1).bit_length()


def partition_of(item_ids: Tensor, num_partitions: int) -> Tensor:
    """Return the partition of every item, int64 in ``0..num_partitions - 1``.

    Args:
        item_ids: int64 of any shape, not negative.
        num_partitions: P, a power of two.
    """
    if num_partitions < 1 or num_partitions & (num_partitions - 1):
        raise ValueError(f"num_partitions must be a power of two, got {num_partitions}")
    return hash_ids(item_ids) & (num_partitions - 1)


def part_of(partitions: _Numbers, num_parts: int) -> _Numbers:
    """Return which of the parts of its shard, one per local device, holds each partition."""
    return partitions % num_parts

"""A cache of table rows whose every step runs over a whole batch of positions.

A row may lie in any of the eight places of one set, which a hash of its position chooses; a new row
takes the place that was asked for least recently. That is an LRU cache but for the choice of the
set, with a fixed number of array operations per batch whatever its size.

Shapes: n positions, W bytes of a record.
"""

import numpy as np

from silvershard.shard.table_rows import Ints, Records, split, whole

WAYS = 8

# Source: Steele, Lea and Flood, "Fast Splittable Pseudorandom Number Generators", OOPSLA 2014.
_MIX = np.uint64(0x9E3779B97F4A7C15)
_EMPTY = -1
_PLACE_BYTES = 12
"""The position of a place and when it was last asked for."""


class RowCache:
    """Records by position; not for several threads at once."""

    def __init__(self, max_bytes: int, record_bytes: int) -> None:
        """Make an empty cache of the largest size that fits ``max_bytes``; 0 holds nothing."""
        sets = max_bytes // (WAYS * (record_bytes + _PLACE_BYTES))
        self._bits = sets.bit_length() - 1
        self.num_places = WAYS << self._bits if sets else 0
        # Positions are below 2^31; half the bytes to compare save a third of a search.
        self._keys = np.full((self.num_places // WAYS, WAYS), _EMPTY, dtype=np.int32)
        self._asked = np.zeros(self._keys.shape, dtype=np.int64)
        self._width = record_bytes
        self._records = whole(np.zeros((self.num_places, record_bytes), dtype=np.uint8))
        self._now = 0

    def __len__(self) -> int:
        """Return how many rows are held."""
        return int((self._keys != _EMPTY).sum())

    @property
    def num_bytes(self) -> int:
        """Return the memory that is set aside."""
        return int(self._keys.nbytes + self._asked.nbytes + self._records.nbytes)

    def find(self, positions: Ints) -> Ints:
        """Return the place ``(n,)`` of every position ``(n,)``, -1 where it is not held."""
        if not self.num_places:
            return np.full(len(positions), -1, dtype=np.int64)
        sets = self._sets(positions)
        matches = self._keys.take(sets, axis=0) == positions.astype(np.int32)[:, None]  # (n, WAYS)
        rows, ways = np.divmod(np.flatnonzero(matches), WAYS)
        places = np.full(len(positions), -1, dtype=np.int64)
        places[rows] = sets[rows] * WAYS + ways
        return places

    def take(self, places: Ints) -> Records:
        """Return the records ``(n, W)`` at places ``(n,)`` of ``find``, which are recent now."""
        self._now += 1
        self._asked.reshape(-1)[places] = self._now
        return split(self._records.take(places), self._width)

    def insert(self, positions: Ints, records: Records) -> None:
        """Hold the records ``(n, W)`` of positions ``(n,)``, which do not repeat.

        What is held already stays as it is. Of new rows that choose the same place, as two of one
        set do, the last one is held.
        """
        new = np.flatnonzero(self.find(positions) < 0)
        if not self.num_places or not len(new):
            return
        self._now += 1
        positions, fresh = positions[new], whole(records)[new]
        sets = self._sets(positions)
        places = sets * WAYS + self._asked.take(sets, axis=0).argmin(axis=1)
        # Of a repeated index numpy keeps the last value, so the three stay of one row.
        self._keys.reshape(-1)[places] = positions
        self._asked.reshape(-1)[places] = self._now
        self._records[places] = fresh

    def drop(self, positions: Ints) -> None:
        """Hold these positions ``(n,)`` no longer; they may repeat and need not be held."""
        places = self.find(positions)
        self._free(places[places >= 0])

    def _free(self, places: Ints) -> None:
        self._keys.reshape(-1)[places] = _EMPTY
        self._asked.reshape(-1)[places] = 0

    def _sets(self, positions: Ints) -> Ints:
        if not self._bits:
            return np.zeros(len(positions), dtype=np.int64)
        mixed = positions.view(np.uint64) * _MIX
        return (mixed >> np.uint64(64 - self._bits)).view(np.int64)

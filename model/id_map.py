"""Where the items of an index are and at which version: a hash map in arrays that grows in steps.

Shapes: n ids of a call.

Source: Knuth, "The Art of Computer Programming", volume 3, section 6.4 (open addressing with linear
probing). The growth in steps is that of the dictionaries of Redis (``dict.c``, incremental rehash).
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

_Ids = NDArray[np.int64]

NO_SLOT = -1
_SMALLEST = 1 << 10
# A table is at most five eighths full: a lookup then reads 1.8 cells on average if the id is there.
_FULL_EIGHTHS = 5
_GROWN_EIGHTHS = 4
# Cells that a call moves while the map grows, and how many more per id that the call brings.
_MOVED_PER_CALL = 1 << 14
_MOVED_PER_ID = 8
_MIX = np.uint64(0x9E3779B97F4A7C15)
_HALF = np.uint64(32)


class Located(NamedTuple):
    """What an index knows of some ids."""

    slots: _Ids
    """``(n,)`` int64, -1 where the id is not held."""
    versions: _Ids
    """``(n,)`` int64 last version, of ids that were deleted too; 0 where none is known."""


class _Table:
    """Cells of a power of two; an empty cell is zero.

    So a key is its id plus one, modulo 2**64, and a slot is kept plus one. A key without slot and
    version was forgotten; its cell is taken until the table is replaced.
    """

    def __init__(self, size: int) -> None:
        self.keys = np.zeros(size, dtype=np.int64)
        self.slots = np.zeros(size, dtype=np.int32)
        self.versions = np.zeros(size, dtype=np.int64)
        self.used = 0
        self._shift = np.uint64(65 - size.bit_length())

    def __len__(self) -> int:
        return len(self.keys)

    def first(self, keys: _Ids) -> _Ids:
        """Return the cell where the search for every key begins."""
        mixed = keys.view(np.uint64)
        mixed = (mixed ^ (mixed >> _HALF)) * _MIX
        cells: _Ids = ((mixed ^ (mixed >> _HALF)) * _MIX >> self._shift).astype(np.int64)
        return cells

    def find(self, keys: _Ids) -> _Ids:
        """Return the cell of every key, or the empty cell where its search ends."""
        cells, last = self.first(keys), len(self.keys) - 1
        found = self.keys[cells]
        pending = np.flatnonzero((found != keys) & (found != 0))
        while len(pending):
            further = (cells[pending] + 1) & last
            cells[pending] = further
            found = self.keys[further]
            pending = pending[(found != keys[pending]) & (found != 0)]
        return cells

    def insert(self, keys: _Ids) -> _Ids:
        """Return the cell of every key, distinct ones; those that are not there take one."""
        cells = self.find(keys)
        missing = np.flatnonzero(self.keys[cells] != keys)
        while len(missing):
            # Of several keys that end at one empty cell the last takes it; the others go on.
            self.keys[cells[missing]] = keys[missing]
            lost = self.keys[cells[missing]] != keys[missing]
            self.used += int(len(missing) - np.count_nonzero(lost))
            missing = missing[lost]
            cells[missing] = self.find(keys[missing])
        return cells


class IdMap:
    """Slot and version of every id that an index holds, and the version of ids that it held.

    It grows without a pause: a table of twice the size takes over, and with every change a bounded
    number of cells moves there. As cells keep the order of their hashes, so much of the new memory
    is touched for the first time as is moved. An id that was deleted keeps its version until it is
    forgotten; where many were, a table of the same size takes over without them.
    """

    def __init__(self, item_ids: _Ids, slots: _Ids) -> None:
        """Hold distinct ids at version 0.

        Args:
            item_ids: ``(n,)`` int64 >= 0.
            slots: ``(n,)`` int64 in [0, 2**31 - 1).
        """
        size = _SMALLEST
        while 2 * len(item_ids) > size:
            size *= 2
        self._table = _Table(size)
        self._old: _Table | None = None
        self._moved = 0
        cells = self._table.insert(item_ids + 1)
        self._table.slots[cells] = slots + 1
        self.num_ids = len(item_ids)
        """Ids that are held, or were and are not forgotten."""
        self._num_forgotten = 0
        """Ids that only take a cell."""

    def touch(self) -> None:
        """Make the system give the memory of the versions now, before the first change.

        That change would pay for it: 35 ms where there are a million ids.
        """
        self._table.versions += 0

    @property
    def num_cells(self) -> int:
        """Return the cells of all tables, each of 20 bytes."""
        return len(self._table) + (0 if self._old is None else len(self._old))

    def _by_table(self, keys: _Ids) -> Iterator[tuple[_Table, _Ids | slice]]:
        """Yield the tables with the positions of the keys that belong there."""
        if self._old is None:
            yield self._table, slice(None)
            return
        moved = self._old.first(keys) < self._moved
        yield self._table, np.flatnonzero(moved)
        yield self._old, np.flatnonzero(~moved)

    def locate(self, item_ids: _Ids) -> Located:
        """Return slots and versions of ids ``(n,)`` int64; negative ids are held by no index."""
        keys = item_ids + 1
        slots, versions = np.empty_like(keys), np.empty_like(keys)
        for table, own in self._by_table(keys):
            cells = table.find(keys[own])
            slots[own] = table.slots[cells]
            versions[own] = table.versions[cells]
        slots -= 1
        return Located(slots, versions)

    def put(self, item_ids: _Ids, slots: _Ids, versions: _Ids) -> None:
        """Set slot and version of distinct ids.

        Args:
            item_ids: ``(n,)`` int64 >= 0.
            slots: ``(n,)`` int64; -1 keeps the version of an id that is held no more.
            versions: ``(n,)`` int64.
        """
        taken = self.num_ids + self._num_forgotten + len(item_ids)
        if 8 * taken > _FULL_EIGHTHS * len(self._table):
            self._move(len(self._table))
            size = len(self._table)
            while 8 * (self.num_ids + len(item_ids)) > _GROWN_EIGHTHS * size:
                size *= 2
            self._old, self._table, self._moved = self._table, _Table(size), 0
        self._move(_MOVED_PER_CALL + _MOVED_PER_ID * len(item_ids))
        keys = item_ids + 1
        for table, own in self._by_table(keys):
            before = table.used
            cells = table.insert(keys[own])
            unknown = np.count_nonzero((table.slots[cells] == 0) & (table.versions[cells] == 0))
            self.num_ids += int(unknown)
            self._num_forgotten -= int(unknown) - (table.used - before)
            table.slots[cells] = slots[own] + 1
            table.versions[cells] = versions[own]

    def forget(self, item_ids: _Ids, versions: _Ids) -> None:
        """Forget those of some distinct ids that are not held and were last seen at a version.

        Args:
            item_ids: ``(n,)`` int64 >= 0.
            versions: ``(n,)`` int64 >= 1.
        """
        keys = item_ids + 1
        for table, own in self._by_table(keys):
            cells = table.find(keys[own])
            gone = (table.slots[cells] == 0) & (table.versions[cells] == versions[own])
            table.versions[cells[gone]] = 0
            self.num_ids -= int(np.count_nonzero(gone))
            self._num_forgotten += int(np.count_nonzero(gone))

    def _move(self, cells: int) -> None:
        """Move the keys that begin at the next cells of the smaller table, at least ``cells``."""
        old = self._old
        if old is None:
            return
        size = len(old)
        end = min(self._moved + cells, size)
        # Behind an empty cell are no keys that begin before it. The last run goes on at the front.
        while old.keys[end % size] != 0:
            end += 1
        place = np.arange(self._moved, end)
        at = place % size
        first = old.first(old.keys[at])
        # Keys of the last run that stand at the front move with that run, not with the first.
        at = at[(old.keys[at] != 0) & (first >= self._moved) & (first <= place)]
        known = (old.slots[at] != 0) | (old.versions[at] != 0)
        self._num_forgotten -= int(len(at) - np.count_nonzero(known))
        at = at[known]
        there = self._table.insert(old.keys[at])
        self._table.slots[there] = old.slots[at]
        self._table.versions[there] = old.versions[at]
        self._moved = end
        if self._moved >= size:
            self._old = None

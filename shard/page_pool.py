"""Which slots of a pool of pages are taken, and which pages the clusters own.

A slot is dead, live, or retired: no longer live, but read by queries that are still open. A page
with neither live nor retired slots goes back to the free ones. The pages of a cluster stand at the
front of its row of the page table, which is replaced by a wider one when a cluster outgrows it.

Shapes: n items, N pages of G slots, W = G / 64 words, C clusters, X columns of the page table.
"""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_Ints = NDArray[np.int64]
_Mask = NDArray[np.bool_]

NO_PAGE = -1
TABLE_MULTIPLE = 8
"""A page table has so many columns or a multiple, as the scan skips so many empty ones at once."""
_GAMMA = 0x9E3779B97F4A7C15
_MIX = np.uint64(_GAMMA)
_ALL_ONES = (1 << 64) - 1
_HALF = np.uint64(32)


class PoolUsage(NamedTuple):
    """How full a pool is."""

    pages: int
    """N, free ones included."""
    free_pages: int
    live_slots: int
    retired_slots: int
    """Slots that wait for open queries."""
    dead_slots: int
    """Slots that can be taken, those of free pages included."""
    longest_list: int
    """Live items of the largest cluster."""
    mean_list: float
    """Live items per cluster."""
    overflowed: int
    """Live items that stand in a page of another cluster, because no page was free."""
    assignment_error: float = 0.0
    """Share of live items, of a sample, that stand in pages of a cluster that is not the nearest
    one, as ``AssignmentSample`` defines it."""


def scrambled(values: _Ints, salt: int) -> NDArray[np.uint64]:
    """Return hashes of int64 values, the same everywhere."""
    mixed = values.view(np.uint64) ^ np.uint64(salt * _GAMMA & _ALL_ONES)
    mixed = (mixed ^ (mixed >> _HALF)) * _MIX
    hashed: NDArray[np.uint64] = (mixed ^ (mixed >> _HALF)) * _MIX
    return hashed >> _HALF


def slot_bits(slots: _Ints) -> NDArray[np.uint64]:
    """Return the bit of every slot in its word."""
    bits: NDArray[np.uint64] = np.left_shift(np.uint64(1), (slots & 63).astype(np.uint64))
    return bits


class PagePool:
    """The slots and pages of one part of an index.

    Args:
        page_table: ``(C, X)`` int32, changed in place; its pages stand at the front of its rows.
        live: ``(N, W)`` int64 the live plane, read here and written by whoever writes the slots.
        centroids: ``(C, D)`` float32, which say what the nearest clusters are.
    """

    def __init__(self, page_table: Tensor, live: Tensor, centroids: Tensor) -> None:
        self.page_table = page_table
        """``(C, X)`` int32; a call of ``take`` may put a wider one in its place."""
        self._table: NDArray[np.int32] = page_table.numpy()
        self._live_words: NDArray[np.uint64] = live.numpy().view(np.uint64)
        self._centroids = centroids
        self._num_pages, words = self._live_words.shape
        self._page_slots = 64 * words
        self._held = self._live_words.copy()
        self._live = np.bitwise_count(self._live_words).sum(1, dtype=np.int64)  # (N,)
        self._used = self._live.copy()
        clusters = len(self._table)
        self._owner = np.full(self._num_pages, -1, dtype=np.int64)
        at, place = np.nonzero(self._table >= 0)
        self._owner[self._table[at, place]] = at
        self._owned = np.bincount(at, minlength=clusters)  # (C,)
        self._items = np.bincount(at, self._live[self._table[at, place]], clusters).astype(np.int64)
        free = np.flatnonzero(self._owner < 0)
        self._num_free = len(free)
        # A stack, the last one is taken first.
        self._free = np.zeros(self._num_pages, dtype=np.int64)
        self._free[: len(free)] = free[::-1]
        self._draining = np.zeros(self._num_pages, dtype=np.bool_)

    @property
    def dead_slots(self) -> int:
        """Return how many slots can be taken."""
        return int(self._num_pages * self._page_slots - self._used.sum())

    def usage(self, overflowed: int) -> PoolUsage:
        """Return how full the pool is."""
        live, used = int(self._live.sum()), int(self._used.sum())
        return PoolUsage(
            pages=self._num_pages,
            free_pages=self._num_free,
            live_slots=live,
            retired_slots=used - live,
            dead_slots=self.dead_slots,
            longest_list=int(self._items.max(initial=0)),
            mean_list=live / max(len(self._items), 1),
            overflowed=overflowed,
        )

    def cluster_of(self, slots: _Ints) -> _Ints:
        """Return the clusters whose pages hold some slots, ``(n,)`` int64."""
        clusters: _Ints = self._owner[slots // self._page_slots]
        return clusters

    def has_room(self, clusters: _Ints) -> _Mask:
        """Return which clusters can take an item more into pages of their own, ``(n,)`` bool."""
        dead = np.zeros(len(self._items), dtype=np.int64)
        owned = np.flatnonzero((self._owner >= 0) & ~self._draining)
        np.add.at(dead, self._owner[owned], self._page_slots - self._used[owned])
        room: _Mask = (dead > 0)[clusters] | (self._num_free > 0)
        return room

    def take(self, item_ids: _Ints, clusters: _Ints, salt: int) -> _Ints:
        """Return a dead slot for every item, which is live from now on, ``(n,)`` int64.

        An item stands in a page of its cluster; where this has no room and no page is free, in one
        of the nearest cluster with room.
        Which slot it gets depends on the set of items, the salt and the slots taken before, never
        on the order of the items.

        Args:
            item_ids: ``(n,)`` int64, distinct.
            clusters: ``(n,)`` int64 in [0, C).
            salt: another one for every call.

        Raises:
            ValueError: if there are fewer than n dead slots; nothing is taken then.
        """
        if len(item_ids) > self.dead_slots:
            raise ValueError(f"{len(item_ids)} slots are needed, {self.dead_slots} are dead")
        slots = self._take_at_home(item_ids, clusters, salt)
        homeless = np.flatnonzero(slots < 0)
        if len(homeless):
            self._draining[:] = False
            hosts = self._hosts(clusters[homeless])
            slots[homeless] = self._take_at_home(item_ids[homeless], hosts, salt)
        return slots

    def _take_at_home(self, item_ids: _Ints, clusters: _Ints, salt: int) -> _Ints:
        """Return slots in pages of the clusters; -1 for items that these have no room for."""
        slots = np.full(len(item_ids), -1, dtype=np.int64)
        if not len(item_ids):
            return slots
        hashes = scrambled(item_ids, salt)
        order = np.lexsort((item_ids, hashes, clusters))
        asking, first, wanted = np.unique(clusters[order], return_index=True, return_counts=True)
        self._grow(asking, wanted)
        dead, which = self._dead_slots(asking)
        room = np.bincount(which, minlength=len(asking))
        group = np.repeat(np.arange(len(asking)), wanted)
        rank = np.arange(len(order)) - first[group]
        housed = rank < room[group]
        group, rank, order = group[housed], rank[housed], order[housed]
        # A run of the dead slots of the cluster, in any order of the items, from anywhere.
        start = hashes[order][np.maximum.accumulate(np.where(rank == 0, np.arange(len(rank)), 0))]
        ahead = (room.cumsum() - room)[group]
        chosen = dead[ahead + (start.astype(np.int64) + rank) % np.maximum(room[group], 1)]
        slots[order] = chosen
        np.bitwise_or.at(self._held.reshape(-1), chosen >> 6, slot_bits(chosen))
        pages = chosen // self._page_slots
        np.add.at(self._used, pages, 1)
        np.add.at(self._live, pages, 1)
        np.add.at(self._items, asking[group], 1)
        return slots

    def _rows(self, clusters: _Ints) -> tuple[_Ints, _Ints]:
        """Return the pages of some clusters, one after the other, and which cluster each is of."""
        rows = self._table[clusters, : int(self._owned[clusters].max(initial=0))]
        which, place = np.nonzero(rows >= 0)
        return rows[which, place].astype(np.int64), which

    def _dead_slots(self, clusters: _Ints) -> tuple[_Ints, _Ints]:
        """Return the dead slots of some clusters, ascending in each page, and whose each is."""
        pages, which = self._rows(clusters)
        offered = ~self._draining[pages] & (self._used[pages] < self._page_slots)
        pages, which = pages[offered], which[offered]
        octets = (~self._held[pages]).view(np.uint8)
        bits = np.unpackbits(octets, axis=1, bitorder="little").view(np.bool_)  # (pages, G)
        at = np.flatnonzero(bits.reshape(-1))
        row = at // self._page_slots
        return pages[row] * self._page_slots + at % self._page_slots, which[row]

    def _grow(self, clusters: _Ints, wanted: _Ints) -> None:
        """Give free pages to clusters that lack room, while there are any."""
        pages, which = self._rows(clusters)
        room = (self._page_slots - self._used[pages]) * ~self._draining[pages]
        lacking = wanted - np.bincount(which, room, len(clusters)).astype(np.int64)
        more = np.maximum(-(-lacking // self._page_slots), 0)
        # The first ones are served first.
        ahead = more.cumsum() - more
        more = np.clip(self._num_free - ahead, 0, more)
        total = int(more.sum())
        if not total:
            return
        self._widen(int((self._owned[clusters] + more).max()))
        which = np.repeat(np.arange(len(clusters)), more)
        rank = np.arange(total) - (more.cumsum() - more)[which]
        fresh = self._free[self._num_free - total : self._num_free][::-1]
        self._num_free -= total
        self._table[clusters[which], self._owned[clusters[which]] + rank] = fresh
        self._owner[fresh] = clusters[which]
        self._owned[clusters] += more

    def _widen(self, longest: int) -> None:
        """Make the rows of the page table long enough for so many pages, with room for half more.

        It takes some 0.5 ms per 4 MB of the new table, a few times in the life of an index.
        """
        clusters, width = self._table.shape
        if longest <= width:
            return
        wider = -(-(longest + longest // 2) // TABLE_MULTIPLE) * TABLE_MULTIPLE
        table = torch.full((clusters, wider), NO_PAGE, dtype=torch.int32)
        table[:, :width] = self.page_table
        self.page_table = table
        self._table = table.numpy()

    def _hosts(self, clusters: _Ints) -> _Ints:
        """Return the nearest clusters with room for items, ``(n,)`` int64, when no page is free."""
        owned = np.flatnonzero(self._owner >= 0)
        room = np.zeros(len(self._items), dtype=np.int64)
        np.add.at(room, self._owner[owned], self._page_slots - self._used[owned])
        nearest: dict[int, _Ints] = {}
        hosts = np.empty_like(clusters)
        for at, cluster in enumerate(clusters.tolist()):
            if cluster not in nearest:
                distances = (self._centroids - self._centroids[cluster]).square().sum(1)
                nearest[cluster] = distances.argsort(stable=True).numpy()
            host = int(nearest[cluster][(room > 0)[nearest[cluster]].argmax()])
            room[host] -= 1
            hosts[at] = host
        return hosts

    def retire(self, slots: _Ints) -> None:
        """Take live slots out of their clusters; they stay as they are until ``free``."""
        pages = slots // self._page_slots
        np.add.at(self._live, pages, -1)
        np.add.at(self._items, self._owner[pages], -1)

    def free(self, slots: _Ints) -> None:
        """Make retired slots dead, and give back the pages that have no other ones."""
        np.bitwise_and.at(self._held.reshape(-1), slots >> 6, ~slot_bits(slots))
        pages = slots // self._page_slots
        np.add.at(self._used, pages, -1)
        empty = np.unique(pages[self._used[pages] == 0])
        if not len(empty):
            return
        clusters = np.unique(self._owner[empty])
        rows = self._table[clusters]
        rows[np.isin(rows, empty)] = NO_PAGE
        front = np.argsort(rows < 0, axis=1, kind="stable")
        self._table[clusters] = np.take_along_axis(rows, front, 1)
        self._owned[clusters] = (rows >= 0).sum(1)
        self._owner[empty] = -1
        self._draining[empty] = False
        self._free[self._num_free : self._num_free + len(empty)] = empty[::-1]
        self._num_free += len(empty)

    def loose_slots(self, limit: int) -> _Ints:
        """Return live slots of pages that their clusters can do without, about ``limit`` at most.

        Of every cluster with more pages than its items fill, the emptiest page is chosen where its
        items find room in the others. No item is placed there from now on, so that the page can go
        back once its items have moved.
        """
        loose = np.flatnonzero(self._owned > -(-self._items // self._page_slots))
        pages, which = self._rows(loose)
        if not len(pages):
            return np.zeros(0, dtype=np.int64)
        room = (self._page_slots - self._used[pages]) * ~self._draining[pages]
        elsewhere = np.bincount(which, room, len(loose)).astype(np.int64)[which] - room
        order = np.lexsort((pages, self._live[pages], which))
        emptiest = order[np.unique(which[order], return_index=True)[1]]
        moves = self._live[pages[emptiest]]
        emptiest = emptiest[(moves > 0) & (moves <= elsewhere[emptiest])]
        # Pages with few items first: each gives as much back as one with many.
        emptiest = emptiest[np.argsort(self._live[pages[emptiest]], kind="stable")]
        chosen = pages[emptiest]
        ahead = self._live[chosen].cumsum() - self._live[chosen]
        chosen = chosen[ahead < limit]
        self._draining[chosen] = True
        octets = self._live_words[chosen].view(np.uint8)
        bits = np.unpackbits(octets, axis=1, bitorder="little").view(np.bool_)
        row, offset = np.nonzero(bits)
        slots: _Ints = chosen[row] * self._page_slots + offset
        return slots

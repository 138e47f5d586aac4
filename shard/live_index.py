"""An index that changes in place while it is read: upserts, patches and deletes, batch by batch.

A changed item always gets a fresh slot. Its old one keeps everything but its live bit until no open
query can ask for it, so that every round of a query reads the same items.

Shapes: n items, N pages of G slots, F term slots, V columns, S signals, A category attributes.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from silvershard.kernels import PAD_TERM
from silvershard.model.id_map import Located
from silvershard.model.index import LIVE_PLANE, ItemIndex, SlotChange
from silvershard.model.planes import ATTRIBUTE_SHIFT, FIRST_EXACT_PLANE, ItemBits
from silvershard.model.spec import ServingSpec
from silvershard.shard.assignment_sample import AssignmentSample
from silvershard.shard.changes import NOTHING_TO_PATCH, Changes, PatchedItems
from silvershard.shard.errors import PoolExhausted
from silvershard.shard.fields import FieldStore, FieldValue, SlotFields
from silvershard.shard.page_pool import PagePool, PoolUsage
from silvershard.shard.slot_rows import SlotRows, exact_columns

_Ints = NDArray[np.int64]
_Mask = NDArray[np.bool_]

# Items that are moved at once so that pages which are not needed go back.
_MOVES = 256
# Times of tidying up from one look at how well the clusters fit, of some 0.2 ms, to the next.
_LOOK_EVERY = 4


class Applied(NamedTuple):
    """What a commit did beside what it was asked for."""

    rejected: list[tuple[int, str]]
    """Items whose change was refused, and why; they are as they were."""
    moved: int
    """Items that were moved so that pages which are not needed go back."""


class _Undo(NamedTuple):
    """The slots that some ids had before a commit."""

    epoch: int
    item_ids: _Ints
    """``(n,)`` int64 ascending."""
    slots: _Ints
    """``(n,)`` int64, -1 where the id was not held."""


class LiveIndex:
    """One part of a generation with room to change.

    Slots depend on the history of commits and reclaims alone; what a query finds depends on the
    items alone, unless some had to stand in pages of another cluster. One thread owns it.

    Args:
        index: built with headroom; changed in place from now on.
        fields: the stored columns of all its documents, and maybe of others.
        spec: of its generation.
        centroids: ``(C, D)`` float32 of its generation.
    """

    def __init__(
        self, index: ItemIndex, fields: FieldStore, spec: ServingSpec, centroids: Tensor
    ) -> None:
        self.index = index
        self.epoch = 0
        """Grows by one with every commit, and whenever items move."""
        self._planes = spec.planes
        self._rows = SlotRows(index, spec.planes)
        self._pool = PagePool(index.page_table, index.planes[LIVE_PLANE], centroids)
        self._sample = AssignmentSample(index, self._pool.cluster_of, centroids)
        index.id_map.touch()
        held = np.flatnonzero(self._rows.item_ids >= 0)
        self._fields = SlotFields(fields, self._rows.item_ids[held], held, len(self._rows.item_ids))
        self._retired: list[tuple[int, _Ints]] = []
        self._undo: list[_Undo] = []
        self._homes: dict[int, int] = {}
        """The clusters of live items that stand in pages of another one, by slot."""
        self._categories = spec.planes.categories
        self._documents = len(held)
        self._tidied = 0

    @property
    def documents(self) -> int:
        """Return the number of live documents."""
        return self._documents

    def usage(self) -> PoolUsage:
        """Return how full the pages are, and how well the clusters fit."""
        usage = self._pool.usage(len(self._homes))
        return usage._replace(assignment_error=self._sample.error)

    def apply(self, changes: Changes) -> Applied:
        """Commit changes and tidy up, at once; see ``commit`` and ``tidy_up``."""
        return Applied(self.commit(changes), self.tidy_up())

    def commit(self, changes: Changes) -> list[tuple[int, str]]:
        """Commit changes; whoever reads the index from now on sees all of them.

        A change whose version is not above what is known of its id is ignored. An upsert or delete
        of an id that is not held is remembered with its version, and so is every later one.

        Args:
            changes: every id once.

        Returns:
            The patches that were refused: of ids that are not held, and those that give an item
            more rare values than this generation holds.

        Raises:
            ValueError: if an id comes twice; nothing is applied.
            PoolExhausted: if there are fewer free slots than new items; nothing is applied.
        """
        upserts, patches = changes.upserts, changes.patches
        new_ids, patched_ids = upserts.item_ids.numpy(), patches.item_ids.numpy()
        dead_ids = changes.deletes.numpy()
        item_ids = np.concatenate([new_ids, patched_ids, dead_ids])
        if len(np.unique(item_ids)) < len(item_ids):
            raise ValueError("changes must hold every item id once, got one more than once")
        versions = np.concatenate(
            [upserts.versions.numpy(), patches.versions.numpy(), changes.delete_versions.numpy()]
        )
        known = self.index.id_map.locate(item_ids)
        fresh = versions > known.versions
        first_patch, first_delete = len(new_ids), len(new_ids) + len(patched_ids)
        rejected: list[tuple[int, str]] = []
        terms = self._patched_terms(
            patches,
            known.slots[first_patch:first_delete],
            fresh[first_patch:first_delete],
            rejected,
        )
        self._write(changes, item_ids, versions, known, fresh, terms)
        return rejected

    def tidy_up(self) -> int:
        """Move some items home, and off pages that are not needed; return how many.

        Readers find the same items. It belongs to every commit, and may be called for a while when
        there is nothing to commit; queries may pass between the two.
        """
        self._tidied += 1
        if self._tidied % _LOOK_EVERY == 0:
            self._sample.look()
        away = np.array(sorted(self._homes), dtype=np.int64)
        if len(away):
            away = away[self._pool.has_room(self._home_of(away))][:_MOVES]
        old = np.union1d(self._pool.loose_slots(_MOVES - len(away)), away)
        if not len(old):
            return 0
        item_ids, clusters = self._rows.item_ids[old], self._home_of(old)
        if len(old) > self._pool.dead_slots:
            return 0
        versions = self.index.id_map.locate(item_ids).versions
        exact = self._rows.exact_bits(old)
        self.epoch += 1
        self._retire(item_ids, old)
        new = self._take(item_ids, clusters)
        self._rows.copy(old, new)
        self._fields.copy(old, new)
        self._rows.write_planes(new, exact)
        self.index.id_map.put(item_ids, new, versions)
        self._rows.show(new, old)
        self._tell(old, new, old)
        return len(old)

    def _write(
        self,
        changes: Changes,
        item_ids: _Ints,
        versions: _Ints,
        known: Located,
        fresh: _Mask,
        terms: _Ints,
    ) -> None:
        """Write what is fresh; arguments as ``apply`` makes them, ids in the order of the three."""
        count, num_new = len(changes.patches.item_ids), len(changes.upserts.item_ids)
        new = np.flatnonzero(fresh[:num_new])
        patched = np.flatnonzero(fresh[num_new : num_new + count])
        # Planes are read in half the time in the order of the slots.
        patched = patched[np.argsort(known.slots[num_new + patched])]
        sources = known.slots[num_new + patched]
        written = np.concatenate([new, num_new + patched])
        clusters = np.concatenate(
            [changes.upserts.clusters.numpy()[new].astype(np.int64), self._home_of(sources)]
        )
        if len(written) > self._pool.dead_slots:
            usage = self.usage()
            raise PoolExhausted(len(written), usage.dead_slots, usage.retired_slots)
        self.epoch += 1
        kept = np.flatnonzero(fresh)
        old_slots = known.slots[kept]
        self._retire(item_ids[kept], old_slots)
        taken = self._take(item_ids[written], clusters)
        slots = np.full(len(item_ids), -1, dtype=np.int64)
        slots[written] = taken
        exact = np.concatenate(
            [
                self._write_new(changes, new, taken[: len(new)]),
                self._write_patched(changes.patches, patched, sources, taken[len(new) :], terms),
            ],
            axis=1,
        )
        self._rows.write_planes(taken, exact)
        self.index.id_map.put(item_ids[kept], slots[kept], versions[kept])
        self._rows.show(taken, old_slots[old_slots >= 0])
        self._documents += len(taken) - int(np.count_nonzero(old_slots >= 0))
        self._tell(
            old_slots[old_slots >= 0],
            taken,
            np.concatenate([np.full(len(new), -1, dtype=np.int64), sources]),
        )

    def _write_new(self, changes: Changes, rows: _Ints, slots: _Ints) -> _Mask:
        """Write upserts but their planes; return their exact bits, plane by plane."""
        upserts = changes.upserts
        if len(rows) < len(upserts.item_ids):
            at = torch.from_numpy(rows)
            codes = upserts.semantic_codes
            upserts = upserts._replace(
                item_ids=upserts.item_ids[at],
                codes=upserts.codes[at],
                scales=upserts.scales[at],
                cache=upserts.cache[at],
                bits=ItemBits(*(one[at] for one in upserts.bits)),
                signals=upserts.signals[at],
                fields={name: column[rows] for name, column in upserts.fields.items()},
                semantic_codes=None if codes is None else codes[at],
            )
        self._rows.write(slots, upserts)
        for name in self._fields.names:
            self._fields.write(name, slots, upserts.fields[name])
        return exact_columns(upserts.bits.exact)

    def _write_patched(
        self, patches: PatchedItems, rows: _Ints, old: _Ints, new: _Ints, terms: _Ints
    ) -> _Mask:
        """Write patched items but their planes; return their exact bits, plane by plane."""
        self._rows.copy(old, new)
        self._fields.copy(old, new)
        exact = self._rows.exact_bits(old)
        given_exact = exact_columns(patches.bits.exact)[:, rows]
        columns = patches.bits.columns.numpy()
        for name, given in patches.attributes.items():
            gives = given.numpy()[rows]
            if name in self._planes.columns:
                at = self._planes.columns[name]
                self._rows.columns[at, new[gives]] = columns[rows[gives], at]
                continue
            own = np.array([*self._planes.exact_planes.get(name, {}).values()], dtype=np.int64)
            own -= FIRST_EXACT_PLANE
            exact[np.ix_(own, gives)] = given_exact[np.ix_(own, gives)]
        self._rows.terms[new] = terms[rows]
        item, signal = np.nonzero(patches.signals_given.numpy()[rows])
        self._rows.signals[new[item], signal] = patches.signals.numpy()[rows[item], signal]
        for name, (values, is_given) in patches.fields.items():
            gives = is_given[rows]
            self._fields.write(name, new[gives], values[rows[gives]])
        return exact

    def _patched_terms(
        self, patches: PatchedItems, slots: _Ints, fresh: _Mask, rejected: list[tuple[int, str]]
    ) -> _Ints:
        """Return the terms of patched items, ``(m, F)`` int64; clear ``fresh`` of those refused."""
        given = patches.bits.terms.numpy()
        width = given.shape[1]
        ids = patches.item_ids.numpy()
        unknown = fresh & (slots < 0)
        rejected += [(one, NOTHING_TO_PATCH) for one in ids[unknown].tolist()]
        fresh &= ~unknown
        if not width or not len(slots):
            return given
        kept = self._rows.terms[slots]
        # Padding has the number that no attribute has.
        replaced = np.zeros((len(slots), (PAD_TERM >> ATTRIBUTE_SHIFT) + 1), dtype=np.bool_)
        for number, name in enumerate(self._categories):
            if name in patches.attributes:
                replaced[:, number] = patches.attributes[name].numpy()
        gone = np.take_along_axis(replaced, kept >> ATTRIBUTE_SHIFT, axis=1)
        kept[gone] = PAD_TERM
        both = np.sort(np.concatenate([kept, given], axis=1), axis=1)
        counts = (both != PAD_TERM).sum(1)
        crowded = fresh & (counts > width)
        rejected += [
            (item, f"the item would have {many} rare values, this generation holds {width}")
            for item, many in zip(ids[crowded].tolist(), counts[crowded].tolist(), strict=True)
        ]
        fresh &= ~crowded
        return both[:, :width]

    def _home_of(self, slots: _Ints) -> _Ints:
        """Return the clusters of the items in some slots, ``(n,)`` int64."""
        clusters = self._pool.cluster_of(slots)
        if self._homes:
            pairs = zip(slots.tolist(), clusters.tolist(), strict=True)
            clusters = np.array([self._homes.get(*pair) for pair in pairs], dtype=np.int64)
        return clusters

    def _take(self, item_ids: _Ints, clusters: _Ints) -> _Ints:
        """Return a slot for every item and note the clusters of those that stand elsewhere."""
        slots = self._pool.take(item_ids, clusters, self.epoch)
        if self.index.page_table is not self._pool.page_table:
            self.index.page_table = self._pool.page_table
        away = np.flatnonzero(self._pool.cluster_of(slots) != clusters)
        self._homes |= dict(zip(slots[away].tolist(), clusters[away].tolist(), strict=True))
        return slots

    def _retire(self, item_ids: _Ints, slots: _Ints) -> None:
        """Keep the slots that some ids had, -1 for none, for the queries that are open."""
        order = np.argsort(item_ids)
        self._undo.append(_Undo(self.epoch, item_ids[order], slots[order]))
        retired = slots[slots >= 0]
        self._pool.retire(retired)
        self._retired.append((self.epoch, retired))
        if self._homes:
            for slot in retired.tolist():
                self._homes.pop(slot, None)

    def _tell(self, retired: _Ints, taken: _Ints, sources: _Ints) -> None:
        change = SlotChange(*map(torch.from_numpy, (retired, taken, sources)))
        for watcher in self.index.watchers:
            watcher(change)

    def reclaim(self, oldest_open_epoch: int) -> None:
        """Let slots be taken that were retired by this epoch; no query reads an older one."""
        done = [slots for epoch, slots in self._retired if epoch <= oldest_open_epoch]
        if not done:
            return
        slots = np.concatenate(done)
        self._pool.free(slots)
        self._rows.item_ids[slots] = -1
        self._fields.forget(slots)
        self._retired = self._retired[len(done) :]
        self._undo = self._undo[len(done) :]

    def forget(self, item_ids: Tensor, versions: Tensor) -> None:
        """Forget ids ``(n,)`` that are still deleted at ``versions``; no older change can come.

        Until then the version of a deleted id keeps older changes of it out.
        """
        self.index.id_map.forget(item_ids.numpy(), versions.numpy())

    def slots_of(self, item_ids: Tensor) -> Tensor:
        """Return the slot of every item id, -1 where it is not held; int64 of any shape."""
        return self.index.slots_of(item_ids)

    def slots_at(self, item_ids: Tensor, epoch: int) -> Tensor:
        """Return the slot that every item id had at an epoch that is not reclaimed."""
        slots = self.index.slots_of(item_ids)
        if epoch >= self.epoch:
            return slots
        flat, ids = slots.flatten().numpy(), item_ids.flatten().numpy()
        for undo in reversed(self._undo):
            if undo.epoch <= epoch:
                break
            if not len(undo.item_ids):
                continue
            at = np.searchsorted(undo.item_ids, ids).clip(max=len(undo.item_ids) - 1)
            flat = np.where(undo.item_ids[at] == ids, undo.slots[at], flat)
        return torch.from_numpy(flat).view(item_ids.shape)

    def lookup(
        self, item_ids: Sequence[int], names: Sequence[str], epoch: int
    ) -> dict[str, list[FieldValue]]:
        """Return stored columns of items that this index held at an epoch; None is missing."""
        slots = self.slots_at(torch.tensor(item_ids, dtype=torch.int64), epoch)
        return self._fields.lookup(slots.numpy(), names)

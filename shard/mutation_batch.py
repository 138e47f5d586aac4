"""A batch of mutations of which the most frequent kind, patches of signals, lies in columns.

Shapes: n mutations, m patches of signals, S signals: those that are given, or those of the schema.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from silvershard.kernels import PAD_TERM
from silvershard.model.dtypes import INT64_MAX
from silvershard.model.planes import ItemBits
from silvershard.shard.changes import PatchedItems
from silvershard.shard.mutations import ItemValues, Mutation, Patch, RowChange

_NO_INTS = np.zeros(0, dtype=np.int64)
_NOTHING = np.zeros((0, 0), dtype=np.float32)

_Ints = NDArray[np.int64]
_Mask = NDArray[np.bool_]

Placed = tuple[int, Mutation]
"""A mutation and its place among all of its batch."""


class SignalPatches(NamedTuple):
    """Patches that give the same signals and nothing else; not checked against any schema."""

    places: _Ints
    """``(m,)`` where each stands in the order of the log, among all mutations of the batch."""
    item_ids: _Ints
    """``(m,)``."""
    versions: _Ints
    """``(m,)``."""
    names: tuple[str, ...]
    """``(S,)`` of the signals, each once."""
    values: NDArray[np.float32]
    """``(m, S)``."""

    def only(self, rows: _Mask) -> "SignalPatches":
        """Return some of the patches."""
        columns = (self.places, self.item_ids, self.versions)
        places, item_ids, versions = (column[rows] for column in columns)
        return SignalPatches(places, item_ids, versions, self.names, self.values[rows])

    def one_by_one(self) -> list[Placed]:
        """Return the patches as mutations."""
        columns = (self.places, self.item_ids, self.versions, self.values)
        one_by_one: list[Placed] = []
        for place, item, version, values in zip(*(one.tolist() for one in columns), strict=True):
            signals = dict(zip(self.names, values, strict=True))
            one_by_one.append((place, Patch(item, version, ItemValues(signals=signals))))
        return one_by_one


class MutationBatch(NamedTuple):
    """Mutations in the order of the log."""

    placed: Sequence[Placed]
    """Those that are not in columns."""
    patches: Sequence[SignalPatches] = ()
    """The others."""


class SignalColumns(NamedTuple):
    """Patches of the signals of a schema, checked; every item once."""

    item_ids: _Ints
    """``(m,)`` at least 0."""
    versions: _Ints
    """``(m,)`` at least 1."""
    values: NDArray[np.float32]
    """``(m, S)`` finite."""
    given: _Mask
    """``(m, S)`` which of them are given."""

    def only(self, rows: _Mask) -> "SignalColumns":
        """Return some of the patches."""
        return SignalColumns(
            self.item_ids[rows], self.versions[rows], self.values[rows], self.given[rows]
        )


def in_columns(
    batch: MutationBatch, signals: Sequence[str]
) -> tuple[SignalColumns, list[Mutation]]:
    """Return the patches that can stay in columns, and all other mutations in log order.

    A patch stays if it can be seen to be right, and is all that the batch has for its item: then
    it does not matter when it comes.

    Args:
        batch: not checked.
        signals: ``(S,)`` of the schema.
    """
    ids = [np.array([item_of(one) for _, one in batch.placed], dtype=np.int64)]
    ids += [patches.item_ids for patches in batch.patches]
    distinct, counts = np.unique(np.concatenate(ids), return_counts=True)
    repeated = distinct[counts > 1]
    others, columns = list(batch.placed), []
    for patches in batch.patches:
        stay = (patches.item_ids >= 0) & (patches.versions >= 1)
        stay &= np.isfinite(patches.values).all(1) & ~np.isin(patches.item_ids, repeated)
        if not set(signals).issuperset(patches.names):
            stay[:] = False
        others += patches.only(~stay).one_by_one()
        if stay.any():
            columns.append(_aligned(patches.only(stay), signals))
    others.sort(key=lambda pair: pair[0])
    none = SignalPatches(_NO_INTS, _NO_INTS, _NO_INTS, (), _NOTHING)
    columns.append(_aligned(none, signals))
    item_ids, versions, values, given = map(np.concatenate, zip(*columns, strict=True))
    joined = SignalColumns(item_ids, versions, values, given)
    return joined, [mutation for _, mutation in others]


def item_of(mutation: Mutation) -> int:
    """Return the item of a mutation that need not be right, -1 where it names none."""
    if isinstance(mutation, RowChange) or not isinstance(mutation.item_id, int):
        return -1
    return mutation.item_id if 0 <= mutation.item_id <= INT64_MAX else -1


def with_signals(patched: PatchedItems, more: SignalColumns) -> PatchedItems:
    """Return patched items and behind them those that give signals alone."""
    count, bits = len(more.item_ids), patched.bits
    return PatchedItems(
        item_ids=torch.cat([patched.item_ids, torch.from_numpy(more.item_ids)]),
        versions=torch.cat([patched.versions, torch.from_numpy(more.versions)]),
        bits=ItemBits(
            exact=_longer(bits.exact, count, 0),
            terms=_longer(bits.terms, count, PAD_TERM),
            columns=_longer(bits.columns, count, 0),
        ),
        attributes={name: _longer(given, count, 0) for name, given in patched.attributes.items()},
        signals=torch.cat([patched.signals, torch.from_numpy(more.values)]),
        signals_given=torch.cat([patched.signals_given, torch.from_numpy(more.given)]),
        fields={
            name: (_extended(values, count), _extended(given, count))
            for name, (values, given) in patched.fields.items()
        },
    )


def _extended(column: NDArray[Any], count: int) -> NDArray[Any]:
    return np.concatenate([column, np.zeros(count, dtype=column.dtype)])


def _longer(rows: Tensor, count: int, value: int) -> Tensor:
    """Return a column with so many more rows of one value."""
    return torch.cat([rows, rows.new_full((count, *rows.shape[1:]), value)])


def _aligned(patches: SignalPatches, signals: Sequence[str]) -> SignalColumns:
    at = [signals.index(name) for name in patches.names]
    values = np.zeros((len(patches.item_ids), len(signals)), dtype=np.float32)
    given = np.zeros(values.shape, dtype=np.bool_)
    values[:, at], given[:, at] = patches.values, True
    return SignalColumns(patches.item_ids, patches.versions, values, given)

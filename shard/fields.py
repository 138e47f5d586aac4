"""Stored columns of documents, which are returned on request and otherwise unused.

Shapes: n items of a call.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

FieldValue = int | float | str | None


_AT_ONCE = 1 << 16
"""Rows of texts that are moved at once: no other thread of Python runs meanwhile."""


def field_values(column: NDArray[Any]) -> list[FieldValue]:
    """Return the values of a column as Python objects; None is a missing value."""
    if column.dtype.kind == "i":
        missing = column == np.iinfo(np.int64).min
    elif column.dtype.kind == "f":
        missing = np.isnan(column)
    else:
        missing = np.zeros(len(column), dtype=bool)
    return [
        None if gone else value
        for value, gone in zip(column.tolist(), missing.tolist(), strict=True)
    ]


def _pieces(size: int) -> Iterator[slice]:
    """Yield slices that together are all of ``size`` rows."""
    for begin in range(0, size, _AT_ONCE):
        yield slice(begin, begin + _AT_ONCE)


def _reordered(column: NDArray[Any], order: NDArray[np.int64]) -> NDArray[Any]:
    moved = np.empty(len(order), dtype=column.dtype)
    for piece in _pieces(len(order)):
        moved[piece] = column[order[piece]]
    return moved


class FieldStore:
    """Stored columns of a set of documents, looked up by item id."""

    def __init__(self, item_ids: NDArray[np.int64], columns: Mapping[str, NDArray[Any]]) -> None:
        order = np.argsort(item_ids, kind="stable")
        self._ids = item_ids[order]
        self._columns = {name: _reordered(column, order) for name, column in columns.items()}

    @property
    def names(self) -> Sequence[str]:
        """Return the names of the columns."""
        return tuple(self._columns)

    def column(self, name: str, item_ids: NDArray[np.int64]) -> NDArray[Any]:
        """Return a column of items that this store holds, ``(n,)``."""
        return self._columns[name][np.searchsorted(self._ids, item_ids)]

    def lookup(self, item_ids: Sequence[int], names: Sequence[str]) -> dict[str, list[FieldValue]]:
        """Return the named columns of items that this store holds; None is a missing value."""
        ids = np.asarray(item_ids, dtype=np.int64)
        return {name: field_values(self.column(name, ids)) for name in names}


class SlotFields:
    """Stored columns of the documents of a live index, by slot.

    Args:
        store: the columns of all documents that are live now.
        item_ids: ``(n,)`` int64 those of this index.
        slots: ``(n,)`` int64 where they are.
        num_slots: slots of the index.
    """

    def __init__(
        self,
        store: FieldStore,
        item_ids: NDArray[np.int64],
        slots: NDArray[np.int64],
        num_slots: int,
    ) -> None:
        self._columns: dict[str, NDArray[Any]] = {}
        for name in store.names:
            laid = np.zeros(num_slots, dtype=store.column(name, item_ids[:0]).dtype)
            for piece in _pieces(len(slots)):
                laid[slots[piece]] = store.column(name, item_ids[piece])
            self._columns[name] = laid

    @property
    def names(self) -> Sequence[str]:
        """Return the names of the columns."""
        return tuple(self._columns)

    def write(self, name: str, slots: NDArray[np.int64], values: NDArray[Any]) -> None:
        """Set a column of some slots."""
        self._columns[name][slots] = values

    def copy(self, old: NDArray[np.int64], new: NDArray[np.int64]) -> None:
        """Set every column of some slots to that of others."""
        for column in self._columns.values():
            column[new] = column[old]

    def forget(self, slots: NDArray[np.int64]) -> None:
        """Let go of the texts of slots that nobody reads any more."""
        for column in self._columns.values():
            if column.dtype == object:
                column[slots] = 0

    def lookup(self, slots: NDArray[np.int64], names: Sequence[str]) -> dict[str, list[FieldValue]]:
        """Return the named columns of slots that hold an item; None is a missing value."""
        return {name: field_values(self._columns[name][slots]) for name in names}

"""Stored columns of documents, which are returned on request and otherwise unused."""

from collections.abc import Mapping, Sequence

import numpy as np

FieldValue = int | float | str | None


class FieldStore:
    """Stored columns of a set of documents, looked up by item id."""

    def __init__(self, item_ids: np.ndarray, columns: Mapping[str, np.ndarray]) -> None:
        order = np.argsort(item_ids, kind="stable")
        self._ids = item_ids[order]
        self._columns = {name: column[order] for name, column in columns.items()}

    def lookup(self, item_ids: Sequence[int], names: Sequence[str]) -> dict[str, list[FieldValue]]:
        """Return the named columns of items that this store holds; None is a missing value."""
        rows = np.searchsorted(self._ids, np.asarray(item_ids, dtype=np.int64))
        found: dict[str, list[FieldValue]] = {}
        for name in names:
            column = self._columns[name][rows]
            if column.dtype.kind == "i":
                missing = column == np.iinfo(np.int64).min
            elif column.dtype.kind == "f":
                missing = np.isnan(column)
            else:
                missing = np.zeros(len(column), dtype=bool)
            found[name] = [
                None if gone else value
                for value, gone in zip(column.tolist(), missing.tolist(), strict=True)
            ]
        return found

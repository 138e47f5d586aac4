"""What a lookup in a remote table gives, and what was looked up so far.

Shapes: n rows asked for, D embedding dimension, W bytes of a record.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from silvershard.shard.table_rows import Floats, Records, dequantize_rows

EMBEDDING_FALLBACK = "EMBEDDING_FALLBACK"
"""The reason in an answer for which default rows were used."""


class RecordLookup(NamedTuple):
    """Rows of a table as they are stored, some of which may be the default row."""

    records: Records
    """``(n, W)``."""
    defaulted: npt.NDArray[np.bool_]
    """``(n,)``: True where the row could not be had and the default row stands for it."""


class Lookup(NamedTuple):
    """Rows of a table, some of which may be the default row."""

    values: Floats
    """``(n, D)``."""
    defaulted: npt.NDArray[np.bool_]
    """``(n,)``: True where the row could not be had and the default row stands for it."""
    reasons: tuple[str, ...]
    """``EMBEDDING_FALLBACK`` if there is such a row."""


class PendingLookup:
    """A lookup on its way; several tables can be asked at once, and then waited for."""

    def __init__(self, finish: Callable[[], RecordLookup], default: Floats) -> None:
        """Make a lookup that ``finish`` waits for; ``default`` is the default row ``(D,)``."""
        self._finish = finish
        self._default = default

    def records(self) -> RecordLookup:
        """Wait until the rows are there or the deadline has passed; one wait per lookup."""
        return self._finish()

    def result(self) -> Lookup:
        """Wait as ``records`` does, and restore the values."""
        found = self._finish()
        values = dequantize_rows(found.records)
        if not found.defaulted.any():
            return Lookup(values, found.defaulted, ())
        values[found.defaulted] = self._default
        return Lookup(values, found.defaulted, (EMBEDDING_FALLBACK,))


@dataclass(frozen=True)
class TableCounts:
    """What was looked up so far; rows count once per lookup however often they repeat in it."""

    lookups: int
    rows: int
    cached: int
    fetched: int
    defaulted: int
    failures: Mapping[str, int]
    """Calls of lookups that brought no rows, by the name of the gRPC status."""

"""User tables whose rows are not in the model but come from a source, as 8-bit records.

What is looked up has the bits of a local int8 table with the same rows. A source that cannot give a
row gives the default row in its place and says so.

Shapes: B bags or sequences, n values of all of them together, D embedding dimension, W = D + 4
bytes of a record.
"""

from collections.abc import Mapping
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from silvershard.model.bags import Bags, Sequences, check_lookup
from silvershard.model.errors import FieldError
from silvershard.model.placement import Precision, check_tables, record_bytes
from silvershard.model.quantized_rows import quantize_rows, restore_rows
from silvershard.model.record_pool import RecordPool

PRECISION: Precision = "int8"
"""Of the rows of every remote table."""


class FetchedRows(NamedTuple):
    """Rows of one table as a source gives them."""

    records: Tensor
    """``(n, W)`` uint8."""
    defaulted: Tensor
    """``(n,)`` bool: True where the row could not be had and the default row stands for it."""


class RowSource(Protocol):
    """Where the rows of remote tables are."""

    def fetch(self, rows: Mapping[str, Tensor]) -> Mapping[str, FetchedRows]:
        """Return the rows ``(n,)`` int64 of each table, which may repeat, in order.

        All tables are asked at the same time. It does not fail because rows are out of reach.
        """
        ...

    def write(self, table: str, version: int, rows: Tensor, values: Tensor) -> None:
        """Give new rows of a table from now on.

        Args:
            table: its name.
            version: of this change; those of one table only grow.
            rows: ``(n,)`` int64, distinct.
            values: ``(n, D)`` float32.
        """
        ...


class Looked(NamedTuple):
    """What a batch found in remote tables."""

    pooled: Mapping[str, Tensor]
    """``(B, D)`` float32 weighted sum of each bag, by table."""
    sequences: Mapping[str, Tensor]
    """``(n, D)`` float32 embedding of each value in order, by table."""
    fallback: tuple[bool, ...]
    """Whether a default row stands for a row that could not be had, for each of the B."""


class NoTables(nn.Module):
    """The local tables of a tower whose tables are all remote."""

    features: tuple[str, ...] = ()

    def weight(self, feature: str) -> nn.Parameter:
        """Refuse: there is no table to train.

        Raises:
            ValueError: always.
        """
        raise ValueError(f"table {feature} is remote: only local tables are trained")

    def forward(self, bags: Mapping[str, Bags]) -> dict[str, Tensor]:
        """Return nothing."""
        return {}


class RemoteTables(nn.Module):
    """The remote tables of a user tower: pooled ones, and ones of sequences.

    It has no parameters; ``connect`` names the source of the rows. One thread looks up at a time.

    Args:
        pooled: rows of each table whose bags are pooled.
        sequences: rows of each table of which sequences are read.
        dim: D, a multiple of 4.

    Raises:
        FieldError: if the sizes do not fit; it names the table or the argument.
    """

    def __init__(self, pooled: Mapping[str, int], sequences: Mapping[str, int], dim: int) -> None:
        super().__init__()
        check_tables({**pooled, **sequences}, dim, PRECISION)
        self.pooled = dict(pooled)
        self.sequences = dict(sequences)
        self.dim = dim
        self._width = record_bytes(dim, PRECISION)
        self._pool = RecordPool(len(pooled), dim, PRECISION) if pooled else None
        self._source: RowSource | None = None

    @property
    def rows(self) -> dict[str, int]:
        """Return the rows of each table."""
        return {**self.pooled, **self.sequences}

    def connect(self, source: RowSource) -> None:
        """Take the rows of every lookup from this source from now on."""
        self._source = source

    def write(self, table: str, version: int, rows: Tensor, values: Tensor) -> bool:
        """Let the source give new rows of a table; return whether it is one of these.

        Arguments are those of ``RowSource``.

        Raises:
            RuntimeError: if no source is connected.
        """
        if table not in self.rows:
            return False
        if self._source is None:
            raise RuntimeError(f"table {table} is remote and no source is connected")
        self._source.write(table, version, rows, values)
        return True

    def forward(self, bags: Mapping[str, Bags], sequences: Mapping[str, Sequences]) -> Looked:
        """Return what a batch of users looks up in these tables.

        Args:
            bags: B bags for each of the pooled tables; B may be 0.
            sequences: B sequences for each of the others.

        Raises:
            FieldError: if the tables are others, a row is not in its table, or the source gives
                other records than were asked for.
            RuntimeError: if no source is connected.
        """
        given: dict[str, Bags | Sequences] = {**bags, **sequences}
        num_users = check_lookup(given, self.rows)
        if self._source is None:
            raise RuntimeError(f"tables {sorted(self.rows)} are remote and no source is connected")
        found = self._source.fetch({name: one.rows for name, one in given.items()})
        fallback = torch.zeros(num_users, dtype=torch.bool)
        for name, one in given.items():
            self._check(name, found.get(name), one.rows.shape[0])
            user = torch.arange(num_users).repeat_interleave(one.lengths)
            fallback[user[found[name].defaulted]] = True
        return Looked(
            self._pooled(bags, {name: found[name].records for name in bags}, num_users),
            {name: restore_rows(found[name].records, PRECISION) for name in sequences},
            tuple(fallback.tolist()),
        )

    def _pooled(
        self, bags: Mapping[str, Bags], records: Mapping[str, Tensor], num_users: int
    ) -> dict[str, Tensor]:
        if self._pool is None or not num_users:
            return {name: torch.zeros(0, self.dim) for name in bags}
        return self._pool({name: bags[name] for name in self.pooled}, records)

    def _check(self, name: str, found: FetchedRows | None, count: int) -> None:
        wanted = (count, self._width)
        if found is None or tuple(found.records.shape) != wanted:
            got = "none" if found is None else tuple(found.records.shape)
            raise FieldError(name, f"the source must give records {wanted}, got {got}")


class StoredRows:
    """A source of rows that lie in this process, for the model as a whole in one place."""

    def __init__(self, records: Mapping[str, Tensor]) -> None:
        """Take over the records ``(rows, W)`` uint8 of each table."""
        self._records = dict(records)

    def fetch(self, rows: Mapping[str, Tensor]) -> dict[str, FetchedRows]:
        """Return the rows ``(n,)`` int64 of each table; none of them is ever missing."""
        return {
            name: FetchedRows(
                self._records[name].index_select(0, wanted),
                torch.zeros(wanted.shape[0], dtype=torch.bool),
            )
            for name, wanted in rows.items()
        }

    def write(self, table: str, version: int, rows: Tensor, values: Tensor) -> None:
        """Replace rows of a table in place."""
        self._records[table][rows] = quantize_rows(values, PRECISION)

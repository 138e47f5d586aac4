"""Rows of quantised tables as records, and the memory of lookups that holds them in pieces.

A record is the scale and the bias of its row, both float16, then the codes; a value is
``code * scale + bias``. A code times a float16 scale is exact in float32, so a record has one
meaning on every machine, with and without fused multiply-add. A scale below 6e-5 (a row that spans
less than 0.016, in int8) is rounded to a multiple of 6e-8, so its values may be off by more than
half a code. Lookups keep records in memory that they lay out themselves: aligned to 16 bytes on
CUDA, cut into shards. Only records leave it.

Shapes: n rows, D embedding dimension, W = 4 + D * bits / 8 bytes of a record, V = W / 4 words.
Source: the 8-bit and 4-bit rows of FBGEMM's inference tables on CPU, byte for byte.
"""

import functools
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from silvershard.model.errors import FieldError
from silvershard.model.placement import (
    CODE_BITS,
    HEADER_BYTES,
    Kind,
    Precision,
    check_tables,
    record_bytes,
    word_columns,
)

MAX_VALUE = 65504.0
"""Largest magnitude of a value: that of float16, which holds the bias."""


def quantize_rows(values: Tensor, precision: Precision, *, field: str = "values") -> Tensor:
    """Return the record of each row, ``(n, W)`` uint8; the codes span its least to largest value.

    Args:
        values: ``(n, D)`` float32, D a multiple of 4 for int8 and of 8 for int4.
        precision: of the codes.
        field: what an error names.

    Raises:
        FieldError: if shape or dtype differ, or a value is NaN or beyond ``MAX_VALUE``.
    """
    if values.ndim != 2 or values.dtype != torch.float32:
        raise FieldError(field, f"must be (n, D) float32, got {tuple(values.shape)} {values.dtype}")
    values = values.detach().cpu().contiguous()
    if not values.shape[0]:
        return torch.empty(0, record_bytes(values.shape[1], precision), dtype=torch.uint8)
    low, high = values.amin(1), values.amax(1)
    fits = (low >= -MAX_VALUE) & (high <= MAX_VALUE)  # False where NaN
    if not fits.all():
        row = int((~fits).nonzero()[0, 0])
        raise FieldError(
            field, f"must be finite and within ±{MAX_VALUE:g}, got another value in row {row}"
        )
    _define_operators()
    fused = torch.ops.fbgemm.FloatOrHalfToFusedNBitRowwiseQuantizedSBHalf(
        values, CODE_BITS[precision]
    )
    return torch.cat([fused[:, -HEADER_BYTES:], fused[:, :-HEADER_BYTES]], 1)


@functools.cache
def _define_operators() -> None:
    with warnings.catch_warnings():
        # fbgemm names its own deprecated modules when it is imported.
        warnings.simplefilter("ignore", DeprecationWarning)
        import fbgemm_gpu  # noqa: F401


def restore_rows(records: Tensor, precision: Precision) -> Tensor:
    """Return the values ``(n, D)`` float32 of records ``(n, W)`` uint8."""
    header = records[:, :HEADER_BYTES].contiguous().view(torch.float16).float()
    codes = records[:, HEADER_BYTES:]
    if precision == "int4":
        codes = torch.stack([codes & 15, codes >> 4], 2).flatten(1)
    return codes.float() * header[:, :1] + header[:, 1:]


def sizes_of(weights: Mapping[str, Tensor]) -> tuple[dict[str, int], int]:
    """Return the rows of each table and D of tables ``(rows, D)``."""
    rows = {name: weight.shape[0] for name, weight in weights.items()}
    return rows, next(iter(weights.values())).shape[1]


class Piece(NamedTuple):
    """A rectangle of a table in the memory of a lookup; written in place.

    It is moved in words: bytes take four times as long to scatter.
    """

    memory: Tensor
    """``(m, w)`` int32: per row the header and the codes of these columns; w may be more."""
    first_row: int
    first_word: int
    """Of a record, where the codes that lie here begin."""
    num_words: int
    """Of the codes that lie here."""

    @property
    def _used(self) -> Tensor:
        return self.memory[:, : 1 + self.num_words]

    def _columns(self, words: Tensor) -> Tensor:
        """Return what lies here of the words ``(n, V)`` of records."""
        if words.shape[1] == 1 + self.num_words:
            return words
        codes = words[:, self.first_word : self.first_word + self.num_words]
        return torch.cat([words[:, :1], codes], 1)

    def _held(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return which of the rows ``(n,)`` lie here, and where."""
        at = rows - self.first_row
        held = ((at >= 0) & (at < self.memory.shape[0])).nonzero()[:, 0]
        return held, at.index_select(0, held).to(self.memory.device)

    def write(self, rows: Tensor, words: Tensor) -> None:
        """Store the words ``(n, V)`` of those rows ``(n,)`` that lie here."""
        held, at = self._held(rows)
        mine = self._columns(words.index_select(0, held))
        self._used.index_copy_(0, at, mine.to(self.memory.device))

    def fill(self, words: Tensor) -> None:
        """Store what lies here of the words ``(rows, V)`` of the whole table."""
        mine = words[self.first_row : self.first_row + self.memory.shape[0]]
        self._used.copy_(self._columns(mine))

    def read(self, rows: Tensor, out: Tensor) -> None:
        """Copy what lies here of the rows ``(n,)`` into their words ``(n, V)``."""
        held, at = self._held(rows)
        found = self._used.index_select(0, at).to(out.device)
        if out.shape[1] == 1 + self.num_words:
            out.index_copy_(0, held, found)
        else:
            out[:, :1].index_copy_(0, held, found[:, :1])
            codes = out[:, self.first_word : self.first_word + self.num_words]
            codes.index_copy_(0, held, found[:, 1:])


class StoredTable:
    """All pieces of one table; its records do not depend on how it is cut."""

    def __init__(self, num_rows: int, dim: int, precision: Precision) -> None:
        self.num_rows = num_rows
        self.dim = dim
        self.precision = precision
        self.pieces: list[Piece] = []

    @property
    def shape(self) -> tuple[int, int]:
        """Return (rows, W)."""
        return self.num_rows, record_bytes(self.dim, self.precision)

    def add(self, memory: Tensor, *, first_row: int, first_column: int, num_columns: int) -> None:
        """Name memory ``(m, w)`` uint8, w a multiple of 4, as the place of a rectangle."""
        words = word_columns(self.precision)
        piece = Piece(
            memory.view(torch.int32), first_row, 1 + first_column // words, num_columns // words
        )
        self.pieces.append(piece)

    def _whole(self) -> Tensor | None:
        """Return the words ``(rows, V)`` of all records where there is such a tensor."""
        memory = self.pieces[0].memory
        alone = len(self.pieces) == 1 and tuple(memory.shape) == (self.num_rows, self._num_words)
        return memory if alone and memory.device.type == "cpu" else None

    @property
    def _num_words(self) -> int:
        return self.shape[1] // 4

    def records(self) -> Tensor:
        """Return the records ``(rows, W)`` uint8: the memory itself if it is whole, else a copy."""
        whole = self._whole()
        if whole is None:
            return self.take(torch.arange(self.num_rows))
        return whole.view(torch.uint8)

    def take(self, rows: Tensor) -> Tensor:
        """Return the records ``(n, W)`` uint8 of rows ``(n,)`` int64, all below ``num_rows``."""
        whole = self._whole()
        if whole is not None:
            return whole.index_select(0, rows).view(torch.uint8)
        out = torch.empty(rows.shape[0], self._num_words, dtype=torch.int32)
        for piece in self.pieces:
            piece.read(rows, out)
        return out.view(torch.uint8)

    def fill(self, records: Tensor) -> None:
        """Store the records ``(rows, W)`` uint8 of the whole table."""
        dense = records.contiguous()
        # A tensor inside a larger one may begin at any byte.
        words = (dense.clone() if dense.storage_offset() % 4 else dense).view(torch.int32)
        for piece in self.pieces:
            piece.fill(words)

    def write(self, rows: Tensor, values: Tensor, *, field: str) -> None:
        """Quantise and store values ``(n, D)`` float32 as the rows ``(n,)`` int64.

        Raises:
            FieldError: if a shape or dtype differs, a row is not in the table or is named twice, or
                a value is NaN or too large; nothing is written then.
        """
        if rows.ndim != 1 or rows.dtype != torch.int64:
            raise FieldError(
                field, f"rows must be (n,) int64, got {tuple(rows.shape)} {rows.dtype}"
            )
        check_rows(rows, self.num_rows, field=field)
        if rows.unique().numel() != rows.numel():
            raise FieldError(field, "rows must be distinct, got one of them twice")
        if tuple(values.shape) != (rows.numel(), self.dim):
            raise FieldError(
                field, f"values must be ({rows.numel()}, {self.dim}), got {tuple(values.shape)}"
            )
        records = quantize_rows(values, self.precision, field=field)
        for piece in self.pieces:
            piece.write(rows, records.view(torch.int32))


def check_rows(rows: Tensor, num_rows: int, *, field: str) -> None:
    """Check that rows ``(n,)`` int64 are from 0 to ``num_rows - 1``.

    Raises:
        FieldError: if one is not.
    """
    if rows.numel():
        low, high = (int(one) for one in rows.aminmax())
        if low < 0 or high >= num_rows:
            wrong = low if low < 0 else high
            raise FieldError(field, f"rows must be from 0 to {num_rows - 1}, got {wrong}")


def records_problem(records: Tensor, shape: tuple[int, int]) -> str | None:
    """Return what keeps a tensor from being the records of a table, None where nothing does."""
    if records.dtype != torch.uint8 or tuple(records.shape) != shape:
        return f"must be {shape} uint8, got {tuple(records.shape)} {records.dtype}"
    header = records[:, :HEADER_BYTES].contiguous().view(torch.float16)
    if not header.isfinite().all():
        return "must have finite scales and biases, got another"
    return None


class QuantizedModule(nn.Module):
    """Quantised tables as records: their state, their updates and their lookups.

    The state is one tensor of records ``(rows, W)`` uint8 per table, under the name that the float
    table has; it says nothing of devices and cuts. Everything goes in and out in host memory.
    """

    kind: Kind
    _folder: str

    def __init__(self, rows: Mapping[str, int], dim: int, precision: Precision) -> None:
        super().__init__()
        check_tables(rows, dim, precision)
        self.features = tuple(rows)
        self.dim = dim
        self.precision: Precision = precision
        self._rows = dict(rows)
        self._stored = {name: StoredTable(count, dim, precision) for name, count in rows.items()}
        # In lists, so that TorchRec's names do not become names of the state.
        self._lookups: list[tuple[Any, tuple[str, ...]]] = []
        self._memories: list[Any] = []

    def _hold(self, lookup: Any, features: Sequence[str]) -> None:
        """Take a collection as the place of records, and as the lookup of these features."""
        sharded = lookup.tbes_configs() if hasattr(lookup, "tbes_configs") else {}
        for memory in sharded or lookup.tbes:
            views = [view for view, _ in memory.split_embedding_weights(split_scale_shifts=False)]
            names = [spec[0] for spec in memory.embedding_specs]
            tables = sharded[memory].embedding_tables if sharded else [None] * len(views)
            for name, view, table in zip(names, views, tables, strict=True):
                row, column = table.local_metadata.shard_offsets if table else (0, 0)
                width = table.local_cols if table else self.dim
                self._stored[name].add(view, first_row=row, first_column=column, num_columns=width)
            self._memories.append(memory)
        if features:
            self._lookups.append((lookup, tuple(features)))

    def weight(self, feature: str) -> nn.Parameter:
        """Refuse: quantised tables have no parameters to train.

        Raises:
            ValueError: always.
        """
        raise ValueError(f"table {feature} is {self.precision}: only float tables are trained")

    def records(self, table: str) -> Tensor:
        """Return the records ``(rows, W)`` uint8 of a table."""
        return self._table(table).records()

    def take(self, table: str, rows: Tensor) -> Tensor:
        """Return rows ``(n,)`` int64 of one table as values ``(n, D)`` float32."""
        stored = self._table(table)
        check_rows(rows, stored.num_rows, field=table)
        return restore_rows(stored.take(rows), self.precision)

    def update_rows(self, table: str, rows: Tensor, values: Tensor) -> None:
        """Quantise and store rows in place.

        A lookup that runs meanwhile may see the scale of one version with the codes of another:
        call it from the thread that looks up, between two batches.

        Args:
            table: name of a feature.
            rows: ``(n,)`` int64, distinct.
            values: ``(n, D)`` float32.

        Raises:
            FieldError: naming the table, if it is unknown, a shape or dtype differs, a row is not
                in it or comes twice, or a value is NaN or beyond the range of float16; nothing is
                written then.
        """
        self._table(table).write(rows, values, field=table)
        self._forget_cached()

    def _forget_cached(self) -> None:
        for memory in self._memories:
            memory.reset_cache_states()

    def _table(self, name: str) -> StoredTable:
        stored = self._stored.get(name)
        if stored is None:
            raise FieldError(name, f"must be one of the tables {list(self.features)}")
        return stored

    def quantize(self, weights: Mapping[str, Tensor]) -> None:
        """Quantise and store whole tables ``(rows, D)`` float32, by name.

        Raises:
            FieldError: naming a table that is unknown, has another shape or a value that is NaN or
                beyond the range of float16.
        """
        for name, weight in weights.items():
            stored = self._table(name)
            if tuple(weight.shape) != (stored.num_rows, self.dim):
                raise FieldError(
                    name,
                    f"must be ({stored.num_rows}, {self.dim}), got {tuple(weight.shape)}",
                )
            stored.fill(quantize_rows(weight, self.precision, field=name))
        self._forget_cached()

    def _key(self, prefix: str, name: str) -> str:
        return f"{prefix}tables.{self._folder}.{name}.weight"

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, stored in self._stored.items():
            destination[self._key(prefix, name)] = stored.records()

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        keys = {self._key(prefix, name): stored for name, stored in self._stored.items()}
        if strict:
            found = [key for key in state_dict if key.startswith(prefix)]
            unexpected_keys.extend(key for key in found if key not in keys)
        for key, stored in keys.items():
            if key not in state_dict:
                missing_keys.append(key)
                continue
            problem = records_problem(state_dict[key], stored.shape)
            if problem:
                error_msgs.append(f"{key} {problem}")
            else:
                stored.fill(state_dict[key])
        self._forget_cached()

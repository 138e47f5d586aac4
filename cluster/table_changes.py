"""Row changes out of the records of an update log, for whoever holds the rows.

What is refused here is what every shard refuses too, so that rows are the same everywhere. It needs
no torch, which keeps table processes small.

Shapes: n rows, D embedding dimension.
"""

import math
import zlib
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from google.protobuf.message import DecodeError

from silvershard.cluster import retrieval_pb2, update_pb2
from silvershard.shard.errors import MutationError
from silvershard.shard.table_plan import TablePlan
from silvershard.shard.table_rows import MAX_VALUE, Floats, Ints

MAX_CHANGE_BYTES = 1 << 20
"""Most content of one change: 8 bytes a row number, 4 a value."""

_MAX_INT64 = (1 << 63) - 1
_WIDTHS = {
    retrieval_pb2.Tensor.D_TYPE_F32: 4,
    retrieval_pb2.Tensor.D_TYPE_F16: 2,
    retrieval_pb2.Tensor.D_TYPE_BF16: 2,
}


class TableChange(NamedTuple):
    """New rows of one table."""

    table: str
    version: int
    rows: Ints
    """``(n,)``, distinct."""
    values: Floats
    """``(n, D)``."""


def log_partition(table: str, num_partitions: int) -> int:
    """Return the log partition in which the changes of a table are."""
    return zlib.crc32(table.encode()) % num_partitions


def change_from(payload: bytes, plans: Mapping[str, TablePlan]) -> TableChange | None:
    """Return the change in the payload of a record; None if it is of none of these tables.

    Raises:
        MutationError: if every shard refuses it, naming the field.
    """
    record = update_pb2.LoggedMutation()
    try:
        record.ParseFromString(payload)
    except DecodeError:
        raise MutationError("payload", "must be a LoggedMutation") from None
    if record.mutation.WhichOneof("op") != "rows":
        return None
    message, version = record.mutation.rows, record.mutation.version
    plan = plans.get(message.table)
    if plan is None:
        return None
    values = _values_from(message.values)
    if not 1 <= version <= _MAX_INT64:
        raise MutationError("version", f"must be in [1, {_MAX_INT64}], got {version}")
    rows = np.array(message.rows, dtype=np.int64)
    if not len(rows):
        raise MutationError("rows", "must be a list of rows, got none")
    if rows.min() < 0 or rows.max() >= plan.num_rows:
        raise MutationError("rows", f"must be from 0 to {plan.num_rows - 1} of {plan.name}")
    if len(np.unique(rows)) != len(rows):
        raise MutationError("rows", "must be distinct, got one more than once")
    if values.shape != (len(rows), plan.dim):
        raise MutationError("values", f"must be {(len(rows), plan.dim)}, got {values.shape}")
    size = 8 * len(rows) + 4 * values.size
    if size > MAX_CHANGE_BYTES:
        raise MutationError(
            "values", f"rows and values must be at most {MAX_CHANGE_BYTES} bytes, got {size}"
        )
    if not (np.abs(values) <= MAX_VALUE).all():  # False where NaN
        raise MutationError("values", f"must be finite and within ±{MAX_VALUE:g}")
    return TableChange(plan.name, version, rows, values)


def _values_from(message: retrieval_pb2.Tensor) -> Floats:
    """Return the numbers of a tensor of two dimensions.

    Raises:
        MutationError: if they are not numbers, or not as many as its shape says.
    """
    width = _WIDTHS.get(message.dtype)
    if width is None:
        raise MutationError("values", f"must be F32, F16 or BF16, got dtype {message.dtype}")
    if len(message.shape) != 2:
        raise MutationError("values", f"must have 2 dimensions, got {len(message.shape)}")
    size = math.prod(message.shape) * width
    if len(message.data) != size:
        raise MutationError(
            "values", f"must have {size} bytes for its shape, got {len(message.data)} bytes"
        )
    if message.dtype == retrieval_pb2.Tensor.D_TYPE_BF16:
        halves = np.frombuffer(message.data, dtype="<u2").astype(np.uint32)
        numbers = (halves << 16).view(np.float32)
    else:
        numbers = np.frombuffer(message.data, dtype=f"<f{width}").astype(np.float32)
    return numbers.reshape(tuple(message.shape))

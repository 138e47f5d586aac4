"""Stored columns of results as messages.

Shapes: K results.
"""

from collections.abc import Sequence

import numpy as np

from silvershard.cluster import retrieval_pb2
from silvershard.model.dtypes import ValueType
from silvershard.shard.fields import FieldValue


def column_to(values: Sequence[FieldValue], dtype: ValueType) -> retrieval_pb2.Column:
    """Return a column of stored values as a message; None is a missing value."""
    missing = np.array([value is None for value in values], dtype=bool)
    column = retrieval_pb2.Column()
    if dtype == "int":
        column.ints.values.extend(0 if one is None else int(one) for one in values)
    elif dtype == "float":
        column.doubles.values.extend(0.0 if one is None else float(one) for one in values)
    else:
        column.strings.values.extend("" if one is None else str(one) for one in values)
    column.SetInParent()
    getattr(column, {"int": "ints", "float": "doubles", "string": "strings"}[dtype]).SetInParent()
    if missing.any():
        column.null_bitmap = np.packbits(missing, bitorder="little").tobytes()
    return column


def column_from(message: retrieval_pb2.Column) -> list[FieldValue]:
    """Return the values of a column; None is a missing value.

    Raises:
        ValueError: if the null bitmap does not fit the values.
    """
    kind = message.WhichOneof("kind")
    values: list[FieldValue] = list(getattr(message, kind).values) if kind else []
    if not message.null_bitmap:
        return values
    bits = np.unpackbits(np.frombuffer(message.null_bitmap, dtype=np.uint8), bitorder="little")
    if len(message.null_bitmap) != (len(values) + 7) // 8:
        raise ValueError(
            f"null_bitmap must have {(len(values) + 7) // 8} bytes, got {len(message.null_bitmap)}"
        )
    return [None if gone else one for one, gone in zip(values, bits.tolist(), strict=False)]

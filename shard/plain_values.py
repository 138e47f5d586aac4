"""Whether the values of an item are right as they are, told in a tenth of the time of a check.

Nearly all that comes out of a message is: of the right types, short, and in range. What is not has
to be looked at value by value, to be converted or refused by name.
"""

import math
import struct
from collections.abc import Mapping

import numpy as np

from silvershard.model.catalogue import NULL_INT
from silvershard.model.dtypes import INT64_MAX, ValueType
from silvershard.model.schema import Schema

# 30 attributes and 30 features of 64 values of 256 bytes, and as many fields, are below the
# megabyte that a mutation may have.
_MOST_COLUMNS = 30
_MOST_VALUES = 64
_MOST_BYTES = 256
_MOST_SCHEMAS = 16

_MAX_FLOAT32 = float(np.finfo(np.float32).max)


class _Columns:
    """The columns of a schema by name."""

    def __init__(self, schema: Schema) -> None:
        self.schema = schema
        self.attributes = {
            one.name: (one.dtype, 1 if one.kind == "number" else _MOST_VALUES)
            for one in schema.attributes
        }
        self.signals = frozenset(schema.signals)
        self.fields = {one.name: one.dtype for one in schema.fields}
        self.features = {
            one.name: (one.dtype, min(one.max_length, _MOST_VALUES))
            for one in schema.item_features
            if one.kind == "ids"
        }


_columns: dict[int, _Columns] = {}
"""Of schemas by their identity: to hash one takes longer than the check of an item."""


def are_plain(
    attributes: object, signals: object, fields: object, features: object, schema: Schema
) -> bool:
    """Return True only if the checks of a mutation would return these values unchanged.

    Args:
        attributes: of an ``ItemValues``, of whatever types a caller gave.
        signals: as well.
        fields: as well.
        features: as well.
        schema: of the items.
    """
    columns = _columns_of(schema)
    return (
        _are_signals(signals, columns.signals)
        and _are_lists(attributes, columns.attributes)
        and _are_lists(features, columns.features)
        and _are_fields(fields, columns.fields)
    )


def _columns_of(schema: Schema) -> _Columns:
    found = _columns.get(id(schema))
    if found is None or found.schema is not schema:
        if len(_columns) >= _MOST_SCHEMAS:
            _columns.clear()
        found = _columns[id(schema)] = _Columns(schema)
    return found


def _are_signals(given: object, known: frozenset[str]) -> bool:
    if type(given) is not dict or not known.issuperset(given):
        return False
    if not given:
        return True
    values = tuple(given.values())
    if len(values) > _MOST_VALUES or set(map(type, values)) != {float}:
        return False
    if not max(map(abs, values)) <= _MAX_FLOAT32:
        return False
    form = f"{len(values)}f"
    # What is not a float32 comes back as another number, and NaN differs from itself.
    return struct.unpack(form, struct.pack(form, *values)) == values


def _are_lists(given: object, known: Mapping[str, tuple[ValueType, int]]) -> bool:
    if type(given) is not dict or len(given) > _MOST_COLUMNS:
        return False
    for name, values in given.items():
        if name not in known or type(values) is not tuple:
            return False
        dtype, most = known[name]
        if len(values) > most:
            return False
        for one in values:
            if not _is_scalar(one, dtype):
                return False
    return True


def _are_fields(given: object, known: Mapping[str, ValueType]) -> bool:
    if type(given) is not dict or len(given) > _MOST_COLUMNS:
        return False
    for name, value in given.items():
        if name not in known:
            return False
        dtype = known[name]
        if value is None:
            if dtype == "string":
                return False
        elif not _is_scalar(value, dtype):
            return False
    return True


def _is_scalar(value: object, dtype: ValueType) -> bool:
    if type(value) is int:
        return dtype == "int" and NULL_INT < value <= INT64_MAX
    if type(value) is str:
        return dtype == "string" and _is_text(value)
    return type(value) is float and dtype == "float" and math.isfinite(value)


def _is_text(value: str) -> bool:
    if len(value) > _MOST_BYTES:
        return False
    if value.isascii():
        return True
    try:
        return len(value.encode()) <= _MOST_BYTES
    except UnicodeEncodeError:
        return False

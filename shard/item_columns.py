"""Values of single items as columns, and so as a catalogue.

Shapes: n items.
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from silvershard.model.catalogue import NULL_INT, Catalogue, Ragged
from silvershard.model.dtypes import ValueType
from silvershard.model.schema import Schema
from silvershard.shard.mutations import ItemValues, Scalar

_NULLS: Mapping[ValueType, Any] = {"int": NULL_INT, "float": np.nan, "string": ""}
_TYPES: Mapping[ValueType, Any] = {"int": np.int64, "float": np.float64, "string": object}


def to_catalogue(
    item_ids: Sequence[int], values: Sequence[ItemValues], schema: Schema
) -> Catalogue:
    """Return items with these checked values; what is not given is empty, null or 0."""
    attributes = [one.attributes for one in values]
    return Catalogue(
        item_ids=np.array(item_ids, dtype=np.int64),
        categories={
            one.name: _ragged((given.get(one.name, ()) for given in attributes), one.dtype)
            for one in schema.categories
        },
        numbers={
            one.name: to_column((_first(given.get(one.name)) for given in attributes), one.dtype)
            for one in schema.numbers
        },
        signals=_signals(values, schema),
        fields={
            one.name: to_column((given.fields.get(one.name) for given in values), one.dtype)
            for one in schema.fields
        },
        features=to_features(values, schema),
    )


def to_features(values: Sequence[ItemValues], schema: Schema) -> dict[str, Ragged]:
    """Return every raw item feature, ``(n,)`` rows each."""
    return {
        one.name: _ragged((given.features.get(one.name, ()) for given in values), one.dtype)
        for one in schema.item_features
    }


def to_values(catalogue: Catalogue, schema: Schema) -> list[ItemValues]:
    """Return every value of every item: what ``to_catalogue`` makes the same catalogue of."""
    categories = {one.name: _rows(catalogue.categories[one.name]) for one in schema.categories}
    features = {one.name: _rows(catalogue.features[one.name]) for one in schema.item_features}
    numbers = {one.name: _scalars(catalogue.numbers[one.name], one.dtype) for one in schema.numbers}
    fields = {one.name: _scalars(catalogue.fields[one.name], one.dtype) for one in schema.fields}
    signals = catalogue.signals.tolist()
    return [
        ItemValues(
            attributes={
                **{name: rows[at] for name, rows in categories.items()},
                **{
                    name: () if column[at] is None else (column[at],)
                    for name, column in numbers.items()
                },
            },
            signals=dict(zip(schema.signals, signals[at], strict=True)),
            fields={name: column[at] for name, column in fields.items()},
            features={name: rows[at] for name, rows in features.items()},
        )
        for at in range(len(catalogue))
    ]


def to_column(values: Iterable[Scalar | None], dtype: ValueType) -> NDArray[Any]:
    """Return one value per item ``(n,)`` as a catalogue holds them; None is null."""
    null = _NULLS[dtype]
    return _array([null if value is None else value for value in values], dtype)


def _first(values: Sequence[Scalar] | None) -> Scalar | None:
    """Return the value of a number attribute, None for null."""
    return values[0] if values else None


def _ragged(rows: Iterable[Sequence[Scalar]], dtype: ValueType) -> Ragged:
    given = list(rows)
    offsets = np.zeros(len(given) + 1, dtype=np.int64)
    np.cumsum([len(row) for row in given], out=offsets[1:])
    return Ragged(_array(list(chain.from_iterable(given)), dtype), offsets)


def _array(values: list[Any], dtype: ValueType) -> NDArray[Any]:
    column = np.empty(len(values), dtype=_TYPES[dtype])
    column[:] = values
    return column


def _signals(values: Sequence[ItemValues], schema: Schema) -> NDArray[np.float32]:
    signals = np.zeros((len(values), len(schema.signals)), dtype=np.float32)
    column_of = {name: column for column, name in enumerate(schema.signals)}
    for row, one in enumerate(values):
        for name, value in one.signals.items():
            signals[row, column_of[name]] = value
    return signals


def _rows(column: Ragged) -> list[tuple[Scalar, ...]]:
    values, ends = column.values.tolist(), column.offsets.tolist()
    return [tuple(values[start:end]) for start, end in pairwise(ends)]


def _scalars(column: NDArray[Any], dtype: ValueType) -> list[Any]:
    """Return the values of a column, None where one is null."""
    if dtype == "string":
        return list(column.tolist())
    null = np.isnan(column) if dtype == "float" else column == NULL_INT
    return [
        None if gone else value for value, gone in zip(column.tolist(), null.tolist(), strict=True)
    ]

"""The items of a generation as columns in memory, before they are cut into partitions or pages.

Shapes: N items, V signals.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from silvershard.model.dtypes import INT64_MIN, ValueType
from silvershard.model.schema import Schema, SchemaError, UserFeature

NULL_INT = INT64_MIN
"""Marks an item without a value in an int column; a float column uses NaN."""

_MAX_FLOAT32 = float(np.finfo(np.float32).max)

_NUMPY_TYPES: Mapping[str, np.dtype[Any]] = {
    "int": np.dtype(np.int64),
    "float": np.dtype(np.float64),
    "string": np.dtype(object),
}


@dataclass(frozen=True, eq=False)
class Ragged:
    """One list of values per row, stored as a flat array and offsets.

    Attributes:
        values: all rows one after another; int64, float64, or object holding str.
        offsets: ``(N + 1,)`` int64, from 0 to ``len(values)``; row i is
            ``values[offsets[i]:offsets[i + 1]]``.
    """

    values: NDArray[Any]
    offsets: NDArray[np.int64]

    def __post_init__(self) -> None:
        if self.values.ndim != 1 or self.values.dtype not in _NUMPY_TYPES.values():
            raise ValueError(
                "values must be a 1-d array of int64, float64 or object, "
                f"got {self.values.dtype} {self.values.shape}"
            )
        offsets = self.offsets
        if offsets.ndim != 1 or offsets.dtype != np.int64 or len(offsets) < 1:
            raise ValueError(f"offsets must be (N + 1,) int64, got {offsets.dtype} {offsets.shape}")
        if offsets[0] != 0 or offsets[-1] != len(self.values) or (np.diff(offsets) < 0).any():
            raise ValueError(f"offsets must rise from 0 to len(values) = {len(self.values)}")

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Values per row, ``(N,)`` int64."""
        return np.diff(self.offsets)

    @property
    def row_of(self) -> NDArray[np.int64]:
        """The row that each value belongs to, ``(len(values),)`` int64."""
        return np.repeat(np.arange(len(self), dtype=np.int64), self.lengths)

    def row(self, index: int) -> NDArray[Any]:
        """The values of one row, ``0 <= index < N``."""
        if not 0 <= index < len(self):
            raise IndexError(f"row must be in [0, {len(self)}), got {index}")
        return self.values[self.offsets[index] : self.offsets[index + 1]]

    def take(self, rows: NDArray[np.int64]) -> "Ragged":
        """These rows in this order; a row may come more than once."""
        rows = np.asarray(rows, dtype=np.int64)
        starts, lengths = self.offsets[:-1][rows], self.lengths[rows]
        offsets = _offsets(lengths)
        shift = np.repeat(starts - offsets[:-1], lengths)
        return Ragged(self.values[shift + np.arange(offsets[-1], dtype=np.int64)], offsets)

    @classmethod
    def from_rows(
        cls, rows: Iterable[Sequence[Any]], *, dtype: ValueType | None = None
    ) -> "Ragged":
        """A Ragged holding these rows.

        Args:
            rows: a sequence of ints, floats or strings per row.
            dtype: type of the values; without it the first value decides, and int if there is none.
        """
        lists = [list(row) for row in rows]
        flat = [value for row in lists for value in row]
        values = as_column(flat, dtype or (_type_of(flat[0]) if flat else "int"))
        return cls(values, _offsets(np.array([len(row) for row in lists], dtype=np.int64)))

    @classmethod
    def concat(cls, parts: Sequence["Ragged"]) -> "Ragged":
        """The rows of all parts, part after part; at least one part."""
        return cls(
            np.concatenate([part.values for part in parts]),
            _offsets(np.concatenate([part.lengths for part in parts])),
        )


@dataclass(frozen=True, eq=False)
class UserColumn:
    """A user feature of several users.

    Attributes:
        values: ids of each user; or float64 numbers, as many as the feature is wide, or none.
        weights: ``(len(values.values),)`` float32, one per id; None where all are 1.
    """

    values: Ragged
    weights: NDArray[np.float32] | None = None

    def __post_init__(self) -> None:
        values = self.values.values
        if values.dtype == np.float64 and not np.isfinite(values).all():
            raise ValueError(f"numbers must be finite, got {values[~np.isfinite(values)][0]}")
        weights, wanted = self.weights, values.shape
        if weights is None:
            return
        if weights.shape != wanted or weights.dtype != np.float32:
            raise ValueError(
                f"weights must be {wanted} float32, got {weights.dtype} {weights.shape}"
            )
        if not np.isfinite(weights).all():
            raise ValueError(f"weights must be finite, got {weights[~np.isfinite(weights)][0]}")

    def kept(self, max_length: int) -> "UserColumn":
        """What is kept of ids: of each user the last ``max_length`` whose weight is not 0."""
        lengths, row_of = self.values.lengths, self.values.row_of
        given = np.ones(len(row_of), dtype=bool) if self.weights is None else self.weights != 0
        if given.all() and lengths.max(initial=0) <= max_length:
            return self
        counts = np.bincount(row_of[given], minlength=len(lengths))
        # Of what is given, how many of the same row come from here on.
        left = np.cumsum(counts)[row_of] - np.cumsum(given) + given
        chosen = given & (left <= max_length)
        offsets = _offsets(np.minimum(counts, max_length))
        weights = None if self.weights is None else self.weights[chosen]
        return UserColumn(Ragged(self.values.values[chosen], offsets), weights)

    def validate(self, feature: UserFeature) -> None:
        """Return if the values are what the feature declares.

        Raises:
            SchemaError: naming the feature, if values are of the wrong type, numbers are not finite
                or not as many as the feature is wide, or values that are not ids have weights.
        """
        _validate_values(feature.name, self.values.values, feature.dtype)
        if feature.kind == "numbers":
            _validate_numbers(feature, self.values, np.arange(len(self.values)))
        if feature.kind != "ids" and self.weights is not None:
            raise SchemaError(
                feature.name, f"must have no weights, which go with ids alone, got {feature.kind}"
            )


@dataclass(frozen=True, eq=False)
class Catalogue:
    """Items as columns; every column has one entry per item, in the same order.

    Attributes:
        item_ids: ``(N,)`` int64, unique, 0 or more.
        categories: the values of each category attribute.
        numbers: each number attribute, ``(N,)``: int64 with null ``INT64_MIN`` or float64 with
            null NaN.
        signals: ``(N, V)`` float32, finite, in the order of the schema.
        fields: each stored field, ``(N,)``: int64, float64, or object holding str.
        features: the raw ids, texts or float64 numbers of each item feature.
    """

    item_ids: NDArray[np.int64]
    categories: Mapping[str, Ragged]
    numbers: Mapping[str, NDArray[Any]]
    signals: NDArray[np.float32]
    fields: Mapping[str, NDArray[Any]]
    features: Mapping[str, Ragged]

    def __len__(self) -> int:
        return len(self.item_ids)

    def validate(self, schema: Schema) -> None:
        """Return if the columns are what the schema declares.

        Raises:
            SchemaError: naming the first column that is missing, undeclared, of the wrong type or
                length, or that holds a forbidden value, or more ids of an item than ``max_length``.
        """
        self._validate_item_ids()
        _same_names("categories", self.categories, [item.name for item in schema.categories])
        _same_names("numbers", self.numbers, [item.name for item in schema.numbers])
        _same_names("fields", self.fields, [item.name for item in schema.fields])
        _same_names("features", self.features, [item.name for item in schema.item_features])
        for attribute in schema.categories:
            self._validate_ragged(attribute.name, self.categories[attribute.name], attribute.dtype)
        for attribute in schema.numbers:
            self._validate_column(attribute.name, self.numbers[attribute.name], attribute.dtype)
        for field in schema.fields:
            self._validate_column(field.name, self.fields[field.name], field.dtype)
        for feature in schema.item_features:
            self._validate_ragged(feature.name, self.features[feature.name], feature.dtype)
            if feature.kind == "numbers":
                _validate_numbers(feature, self.features[feature.name], self.item_ids)
            if feature.kind == "ids":
                _validate_lengths(feature, self.features[feature.name], self.item_ids)
        self._validate_signals(schema.signals)

    def take(self, rows: NDArray[np.int64]) -> "Catalogue":
        """The items of these rows in this order."""
        rows = np.asarray(rows, dtype=np.int64)
        return Catalogue(
            item_ids=self.item_ids[rows],
            categories={name: column.take(rows) for name, column in self.categories.items()},
            numbers={name: column[rows] for name, column in self.numbers.items()},
            signals=self.signals[rows],
            fields={name: column[rows] for name, column in self.fields.items()},
            features={name: column.take(rows) for name, column in self.features.items()},
        )

    @classmethod
    def concat(cls, parts: Sequence[Self]) -> "Catalogue":
        """The items of all parts, part after part; at least one part, all with the same columns."""
        first = parts[0]
        return Catalogue(
            item_ids=np.concatenate([part.item_ids for part in parts]),
            categories={
                name: Ragged.concat([part.categories[name] for part in parts])
                for name in first.categories
            },
            numbers={
                name: np.concatenate([part.numbers[name] for part in parts])
                for name in first.numbers
            },
            signals=np.concatenate([part.signals for part in parts]),
            fields={
                name: np.concatenate([part.fields[name] for part in parts]) for name in first.fields
            },
            features={
                name: Ragged.concat([part.features[name] for part in parts])
                for name in first.features
            },
        )

    def _validate_item_ids(self) -> None:
        item_ids = self.item_ids
        if item_ids.ndim != 1 or item_ids.dtype != np.int64:
            raise SchemaError(
                "item_ids", f"must be (N,) int64, got {item_ids.dtype} {item_ids.shape}"
            )
        if len(item_ids) and item_ids.min() < 0:
            raise SchemaError("item_ids", f"must be 0 or more, got {item_ids.min()}")
        ordered = np.sort(item_ids)
        repeated = ordered[1:][ordered[1:] == ordered[:-1]]
        if len(repeated):
            raise SchemaError("item_ids", f"must be unique, got {repeated[0]} more than once")

    def _validate_ragged(self, name: str, column: Ragged, dtype: ValueType) -> None:
        if len(column) != len(self):
            raise SchemaError(name, f"must have {len(self)} rows, got {len(column)}")
        _validate_values(name, column.values, dtype)

    def _validate_column(self, name: str, column: NDArray[Any], dtype: ValueType) -> None:
        if column.shape != (len(self),):
            raise SchemaError(name, f"must have shape ({len(self)},), got {column.shape}")
        _validate_values(name, column, dtype)

    def _validate_signals(self, names: Sequence[str]) -> None:
        expected = (len(self), len(names))
        if self.signals.shape != expected or self.signals.dtype != np.float32:
            raise SchemaError(
                "signals",
                f"must be {expected} float32, got {self.signals.dtype} {self.signals.shape}",
            )
        bad = np.argwhere(~np.isfinite(self.signals))
        if len(bad):
            row, column = bad[0]
            raise SchemaError(
                names[column],
                f"must be finite, got {self.signals[row, column]} for item {self.item_ids[row]}",
            )


def as_column(values: Sequence[Any], dtype: ValueType) -> NDArray[Any]:
    """A 1-d array of these values: int64, float64, or object holding str.

    Raises:
        ValueError: if a value is not of that type; ints count as floats, bools as nothing.
    """
    if dtype == "string":
        for value in values:
            if not isinstance(value, str):
                raise ValueError(f"values must be str, got {type(value).__name__} {value!r}")
    elif len(values):
        kinds = "iu" if dtype == "int" else "iuf"
        given = np.asarray(values)
        if given.dtype.kind not in kinds:
            raise ValueError(f"values must be {dtype}, got {given.dtype}")
    column = np.empty(len(values), dtype=_NUMPY_TYPES[dtype])
    column[:] = values
    return column


def _offsets(lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    offsets = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets


def _type_of(value: object) -> ValueType:
    if isinstance(value, str):
        return "string"
    return "float" if isinstance(value, float | np.floating) else "int"


def _same_names(what: str, columns: Mapping[str, object], names: Sequence[str]) -> None:
    for name in names:
        if name not in columns:
            raise SchemaError(name, f"is declared by the schema but missing from {what}")
    for name in columns:
        if name not in names:
            raise SchemaError(name, f"is in {what} but not declared by the schema")


def _validate_values(name: str, values: NDArray[Any], dtype: ValueType) -> None:
    expected = _NUMPY_TYPES[dtype]
    if values.dtype != expected:
        raise SchemaError(name, f"must be {expected} for dtype {dtype}, got {values.dtype}")
    if dtype == "string":
        for value in values:
            if not isinstance(value, str):
                raise SchemaError(name, f"must hold str, got {type(value).__name__} {value!r}")


def _validate_lengths(feature: UserFeature, column: Ragged, item_ids: NDArray[np.int64]) -> None:
    for row in np.flatnonzero(column.lengths > feature.max_length)[:1]:
        raise SchemaError(
            feature.name,
            f"must have at most max_length={feature.max_length} ids, "
            f"got {column.lengths[row]} of item {item_ids[row]}",
        )


def _validate_numbers(feature: UserFeature, column: Ragged, rows: NDArray[np.int64]) -> None:
    """Check a column of numbers; ``rows`` names its rows."""
    lengths = column.lengths
    for row in np.flatnonzero((lengths != 0) & (lengths != feature.width)):
        raise SchemaError(
            feature.name,
            f"must have {feature.width} values or none, got {lengths[row]} in row {rows[row]}",
        )
    for at in np.flatnonzero(~(np.abs(column.values) <= _MAX_FLOAT32)):
        row = column.row_of[at]
        raise SchemaError(
            feature.name,
            f"position {at - column.offsets[row]} must be a finite float32, "
            f"got {column.values[at]} in row {rows[row]}",
        )

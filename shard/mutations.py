"""Changes of a live generation: what an update says of an item or of table rows, and its check.

The check needs no tensors: a sequencer refuses what no shard could take before it is logged. What
only an embedding can show, and a patch that overflows the terms that its item already has, is left
to the shards, which reject it alike.

Shapes: n rows, D embedding dimension.
"""

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from silvershard.model.catalogue import NULL_INT
from silvershard.model.dtypes import INT64_MAX, INT64_MIN, ValueType
from silvershard.model.planes import PlaneDictionary
from silvershard.model.schema import Schema, UserFeature
from silvershard.model.spec import ServingSpec
from silvershard.model.two_tower_config import SESSION, TwoTowerConfig
from silvershard.shard.errors import MutationError
from silvershard.shard.plain_values import are_plain

Scalar = int | float | str

MAX_TEXT_BYTES = 1 << 16
"""Longest string of a mutation, in bytes of UTF-8."""
MAX_MUTATION_BYTES = 1 << 20
"""Most content of one mutation: 8 bytes a number, its UTF-8 bytes a string."""
MAX_TABLE_VALUE = 65504.0
"""Largest magnitude of a table's value: that of float16, which quantised rows keep."""

_MAX_FLOAT32 = float(np.finfo(np.float32).max)
_NUMBER_BYTES = 8
_SHOWN = 40


@dataclass(frozen=True, slots=True)
class ItemValues:
    """Columns of one item by name; a name that is absent is not given."""

    attributes: Mapping[str, tuple[Scalar, ...]] = field(default_factory=dict)
    """A category has any number of values, a number one, or none for null."""
    signals: Mapping[str, float] = field(default_factory=dict)
    fields: Mapping[str, Scalar | None] = field(default_factory=dict)
    """None is null; the null of a string field is the empty string."""
    features: Mapping[str, tuple[Scalar, ...]] = field(default_factory=dict)
    """Raw values that the item tower reads."""

    def patched(self, patch: "ItemValues") -> "ItemValues":
        """Return these values, but what a patch gives as it gives it."""
        return ItemValues(
            attributes={**self.attributes, **patch.attributes},
            signals={**self.signals, **patch.signals},
            fields={**self.fields, **patch.fields},
            features={**self.features, **patch.features},
        )


@dataclass(frozen=True, slots=True)
class Upsert:
    """The whole item: what ``values`` does not give is empty, null, or 0."""

    item_id: int
    version: int
    values: ItemValues
    embedding: tuple[float, ...] | None = None
    """Of a model without an item tower; every generation that can be published has one."""
    expires_unix_ms: int = 0
    """When the log deletes the item; 0: never."""


@dataclass(frozen=True, slots=True)
class Patch:
    """Some columns of an item; the others stay as they are.

    Raw features are kept for the next generation: this one never embeds an item again for a patch.
    """

    item_id: int
    version: int
    values: ItemValues


@dataclass(frozen=True, slots=True)
class Delete:
    """The end of an item."""

    item_id: int
    version: int
    urgent: bool = False
    """Whether it goes ahead of what is queued; the result is the same."""


@dataclass(frozen=True, slots=True, eq=False)
class RowChange:
    """New rows of an embedding table of the user tower."""

    table: str
    version: int
    rows: tuple[int, ...]
    values: NDArray[np.float32]
    """``(n, D)``."""


ItemMutation = Upsert | Patch | Delete
Mutation = Upsert | Patch | Delete | RowChange


def updatable_tables(builder: str, config: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """Return the rows and D of every table whose rows may change while a generation lives.

    These are the tables that only the user tower reads: a query is encoded anew with every request.
    The tables of the item tower are frozen, since the embeddings in the index were made with them
    and must not drift from the tower that made them; a new generation brings new ones. A
    ``TwoTower`` shares no table between its towers, so nothing stands in both groups.

    Args:
        builder: name of the model's builder.
        config: what the builder makes the model from.
    """
    if builder != "two_tower":
        return {}
    tower = TwoTowerConfig.model_validate(config)
    rows = dict(tower.user_tables)
    if tower.session_length:
        rows[SESSION] = tower.table(tower.item).size + 1
    return {name: (count, tower.dim) for name, count in rows.items()}


def check(
    mutation: Mutation,
    spec: ServingSpec,
    tables: Mapping[str, tuple[int, int]] = MappingProxyType({}),
) -> Mutation:
    """Return a mutation that every shard of the generation can take, with plain Python values.

    It is what ``conform`` returns, and its rare values fit.

    Args:
        mutation: any.
        spec: of the generation that serves.
        tables: ``updatable_tables`` of the generation.

    Raises:
        MutationError: naming the field, what was required and what was got.
    """
    checked = conform(mutation, spec.item_schema, tables)
    if isinstance(checked, (Upsert, Patch)) and checked.values.attributes:
        _check_rare(checked.values, spec.planes)
    return checked


def conform(mutation: Mutation, schema: Schema, tables: Mapping[str, tuple[int, int]]) -> Mutation:
    """Return a mutation that fits a schema, with plain Python values.

    Ints of float columns become floats, signals and numbers of features are rounded to float32,
    null of a string field becomes the empty string. numpy numbers count as their kind; bools and
    numbers in strings do not.

    Args:
        mutation: any.
        schema: of the items.
        tables: ``updatable_tables`` of the generation.

    Raises:
        MutationError: naming the field, what was required and what was got.
    """
    if _is_plain(mutation, schema):
        return mutation
    version = _int64("version", mutation.version, least=1)
    if isinstance(mutation, RowChange):
        return _checked_rows(mutation, version, tables)
    item_id = _int64("item_id", mutation.item_id, least=0)
    if isinstance(mutation, Delete):
        if not isinstance(mutation.urgent, bool):
            raise MutationError("urgent", f"must be a bool, got {_described(mutation.urgent)}")
        return Delete(item_id, version, mutation.urgent)
    values = _Checker(schema).values(mutation.values)
    if isinstance(mutation, Patch):
        return Patch(item_id, version, values)
    if mutation.embedding is not None:
        raise MutationError(
            "embedding", "must not be given: the item tower makes it from the item's features"
        )
    expires = _int64("expires_unix_ms", mutation.expires_unix_ms, least=0)
    return Upsert(item_id, version, values, expires_unix_ms=expires)


def count_rare(values: ItemValues, planes: PlaneDictionary) -> int:
    """Return how many distinct values of the category attributes have no plane of their own."""
    rare = 0
    for name, given in values.attributes.items():
        if name not in planes.columns:
            own = planes.exact_planes.get(name, {})
            rare += len({value for value in given if str(value) not in own})
    return rare


def _check_rare(values: ItemValues, planes: PlaneDictionary) -> None:
    rare = count_rare(values, planes)
    if rare > planes.terms_width:
        raise MutationError(
            "attributes",
            f"must have at most terms_width={planes.terms_width} values without a plane of their "
            f"own, got {rare}; publish a new generation",
        )


def _is_plain(mutation: Mutation, schema: Schema) -> bool:
    """Return True for what the checks below would return as it is, and quickly so for most."""
    if isinstance(mutation, RowChange) or not _is_int(mutation.version, least=1):
        return False
    if not _is_int(mutation.item_id, least=0):
        return False
    if isinstance(mutation, Delete):
        return type(mutation.urgent) is bool
    if isinstance(mutation, Upsert) and (
        mutation.embedding is not None or not _is_int(mutation.expires_unix_ms, least=0)
    ):
        return False
    values = mutation.values
    return are_plain(values.attributes, values.signals, values.fields, values.features, schema)


def _is_int(value: object, least: int) -> bool:
    return type(value) is int and least <= value <= INT64_MAX


class _Checker:
    """Checks the values of one mutation and adds up their size."""

    def __init__(self, schema: Schema) -> None:
        self._schema = schema
        self._bytes = 0

    def values(self, given: ItemValues) -> ItemValues:
        schema = self._schema
        return ItemValues(
            attributes=self._attributes(given.attributes, schema),
            signals=self._signals(given.signals, schema),
            fields=self._fields(given.fields, schema),
            features=self._features(given.features, schema),
        )

    def _add(self, name: str, size: int) -> None:
        self._bytes += size
        if self._bytes > MAX_MUTATION_BYTES:
            raise MutationError(
                name, f"the mutation must hold at most {MAX_MUTATION_BYTES} bytes of values"
            )

    def _scalar(self, name: str, dtype: ValueType, value: object) -> Scalar:
        if dtype == "string":
            text, size = _text(name, value)
            self._add(name, size)
            return text
        self._add(name, _NUMBER_BYTES)
        return _int64(name, value) if dtype == "int" else _finite(name, value)

    def _list(self, name: str, dtype: ValueType, given: object) -> tuple[Scalar, ...]:
        if isinstance(given, str | bytes) or not isinstance(given, tuple | list | np.ndarray):
            raise MutationError(name, f"must be a list of values, got {_described(given)}")
        if len(given) * _NUMBER_BYTES > MAX_MUTATION_BYTES:
            raise MutationError(
                name, f"must have at most {MAX_MUTATION_BYTES // 8} values, got {len(given)}"
            )
        return tuple([self._scalar(name, dtype, one) for one in given])

    def _attributes(self, given: object, schema: Schema) -> dict[str, tuple[Scalar, ...]]:
        if type(given) is dict and not given:
            return {}
        declared = {one.name: one for one in schema.attributes}
        checked = {}
        for name, value in _named("attributes", given, declared):
            path, attribute = f"attributes.{name}", declared[name]
            values = checked[name] = self._list(path, attribute.dtype, value)
            if attribute.kind == "category":
                continue
            if len(values) > 1:
                raise MutationError(
                    path, f"must have one value, or none for null, got {len(values)}"
                )
            _no_null(path, values)
        return checked

    def _signals(self, given: object, schema: Schema) -> dict[str, float]:
        if type(given) is dict and not given:
            return {}
        pairs = _named("signals", given, schema.signals)
        checked = {name: _float32(f"signals.{name}", value) for name, value in pairs}
        self._add("signals", _NUMBER_BYTES * len(checked))
        return checked

    def _fields(self, given: object, schema: Schema) -> dict[str, Scalar | None]:
        checked: dict[str, Scalar | None] = {}
        if type(given) is dict and not given:
            return checked
        dtypes = {one.name: one.dtype for one in schema.fields}
        for name, value in _named("fields", given, dtypes):
            if value is None:
                checked[name] = "" if dtypes[name] == "string" else None
                continue
            scalar = self._scalar(f"fields.{name}", dtypes[name], value)
            _no_null(f"fields.{name}", (scalar,))
            checked[name] = scalar
        return checked

    def _features(self, given: object, schema: Schema) -> dict[str, tuple[Scalar, ...]]:
        if type(given) is dict and not given:
            return {}
        declared = {one.name: one for one in schema.item_features}
        pairs = _named("features", given, declared)
        return {name: self._feature(declared[name], value) for name, value in pairs}

    def _feature(self, feature: UserFeature, given: object) -> tuple[Scalar, ...]:
        path = f"features.{feature.name}"
        values = self._list(path, feature.dtype, given)
        if feature.kind == "ids" and len(values) > feature.max_length:
            raise MutationError(
                path, f"must have at most max_length={feature.max_length} ids, got {len(values)}"
            )
        if feature.kind == "numbers":
            if len(values) not in (0, feature.width):
                raise MutationError(
                    path, f"must have {feature.width} values or none, got {len(values)}"
                )
            return tuple([_float32(path, one) for one in values])
        return values


def _named(what: str, given: object, known: Collection[str]) -> Iterable[tuple[str, Any]]:
    """Return names and values, all of the names known."""
    if not isinstance(given, Mapping):
        raise MutationError(what, f"must be a mapping of names to values, got {_described(given)}")
    for name in given:
        if name not in known:
            raise MutationError(
                what,
                f"must name {what} of the schema ({', '.join(known) or 'none'}), "
                f"got {_described(name)}",
            )
    return given.items()


def _checked_rows(
    change: RowChange, version: int, tables: Mapping[str, tuple[int, int]]
) -> RowChange:
    if change.table not in tables:
        raise MutationError(
            "table",
            "must be a table that only the user tower reads, as those of items are frozen within "
            f"a generation ({', '.join(sorted(tables)) or 'none'}), got {_described(change.table)}",
        )
    num_rows, dim = tables[change.table]
    if not isinstance(change.rows, tuple | list | np.ndarray) or not len(change.rows):
        raise MutationError("rows", f"must be a list of rows, got {_described(change.rows)}")
    rows = tuple([_int64("rows", row, least=0) for row in change.rows])
    if max(rows) >= num_rows:
        raise MutationError("rows", f"must be below {num_rows} of {change.table}, got {max(rows)}")
    if len(set(rows)) != len(rows):
        raise MutationError("rows", "must be distinct, got one more than once")
    values = change.values
    if not isinstance(values, np.ndarray) or values.dtype.kind not in "fiu":
        raise MutationError("values", f"must be an array of numbers, got {_described(values)}")
    if values.shape != (len(rows), dim):
        raise MutationError("values", f"must be {(len(rows), dim)}, got {values.shape}")
    size = _NUMBER_BYTES * len(rows) + 4 * values.size
    if size > MAX_MUTATION_BYTES:
        raise MutationError(
            "values", f"rows and values must be at most {MAX_MUTATION_BYTES} bytes, got {size}"
        )
    if not (np.abs(values.astype(np.float64)) <= MAX_TABLE_VALUE).all():  # False where NaN
        raise MutationError("values", f"must be finite and within ±{MAX_TABLE_VALUE:g}")
    return RowChange(
        change.table, version, rows, np.ascontiguousarray(values.astype(np.float32, copy=False))
    )


def _int64(name: str, value: object, least: int = INT64_MIN) -> int:
    if isinstance(value, bool | np.bool) or not isinstance(value, int | np.integer):
        raise MutationError(name, f"must be an int, got {_described(value)}")
    if not least <= value <= INT64_MAX:
        raise MutationError(name, f"must be in [{least}, {INT64_MAX}], got {_described(value)}")
    return int(value)


def _finite(name: str, value: object) -> float:
    number = value.item() if isinstance(value, np.generic) else value
    if isinstance(number, bool) or not isinstance(number, int | float):
        raise MutationError(name, f"must be a number, got {_described(value)}")
    try:
        number = float(number)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise MutationError(name, f"must be finite, got {_described(value)}")
    return number


def _float32(name: str, value: object) -> float:
    number = _finite(name, value)
    if abs(number) > _MAX_FLOAT32:
        raise MutationError(
            name, f"must be within ±{_MAX_FLOAT32:.7g}, the range of float32, got {number}"
        )
    return float(np.float32(number))


def _no_null(name: str, values: tuple[Scalar, ...]) -> None:
    if any(type(one) is int and one == NULL_INT for one in values):
        raise MutationError(name, f"must not be {NULL_INT}, which marks null")


def _text(name: str, value: object) -> tuple[str, int]:
    """Return a string and its size in bytes."""
    if not isinstance(value, str):
        raise MutationError(name, f"must be a string, got {_described(value)}")
    if len(value) <= MAX_TEXT_BYTES:
        try:
            size = len(value.encode())
        except UnicodeEncodeError:
            raise MutationError(name, f"must be valid Unicode, got {_described(value)}") from None
        if size <= MAX_TEXT_BYTES:
            return str(value), size
    raise MutationError(name, f"must be at most {MAX_TEXT_BYTES} bytes, got {_described(value)}")


def _described(value: object) -> str:
    text = ascii(value)
    return f"{type(value).__name__} {text if len(text) <= _SHOWN else text[: _SHOWN - 3] + '...'}"

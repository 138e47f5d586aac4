"""Whether every shard of a generation can take a mutation, told from its message.

Nearly every mutation is plain: known names, and few values of the right kind. To see that in the
message takes a fraction of the time of making a ``Mutation`` of it and checking that. This is left
to all others, and alone words what is wrong.
"""

import sys
from collections.abc import Collection, Mapping
from typing import NamedTuple

from silvershard.cluster import retrieval_pb2
from silvershard.cluster.mutation_codec import mutation_from
from silvershard.cluster.update_log import NO_ITEM
from silvershard.model.catalogue import NULL_INT
from silvershard.model.dtypes import INT64_MAX, ValueType
from silvershard.model.planes import PlaneDictionary
from silvershard.model.schema import Attribute, UserFeature
from silvershard.model.spec import ServingSpec
from silvershard.shard.mutations import MAX_MUTATION_BYTES, MAX_TEXT_BYTES, check

_INTS = retrieval_pb2.Values.INTS_FIELD_NUMBER
_STRINGS = retrieval_pb2.Values.STRINGS_FIELD_NUMBER
_KINDS: Mapping[ValueType, tuple[int, ...]] = {
    "int": (_INTS,),
    "string": (_STRINGS,),
    "float": (retrieval_pb2.Values.FLOATS_FIELD_NUMBER, retrieval_pb2.Values.DOUBLES_FIELD_NUMBER),
}
# A value of one byte on the wire may count for eight, and a character may take four.
_PLAIN_BYTES = MAX_MUTATION_BYTES // 8
_PLAIN_CHARACTERS = MAX_TEXT_BYTES // 4
_MAX_FLOAT32 = (2 - 2**-23) * 2.0**127
_MAX_FLOAT64 = sys.float_info.max


class _Column(NamedTuple):
    """What is plain for a column, unless it is empty, which always is."""

    kinds: tuple[int, ...]
    """Fields of ``Values`` that may hold it."""
    least: int
    most: int
    """Number of values."""
    largest: float
    """Magnitude of a float."""
    has_null: bool
    """Whether one of the ints stands for null."""
    planes: Collection[str] | None = None
    """Values that have a plane of their own, where each of the others takes a slot for terms."""


class MutationCheck:
    """The check of one generation; any thread may use it."""

    def __init__(self, spec: ServingSpec, tables: Mapping[str, tuple[int, int]]) -> None:
        """Prepare the check.

        Args:
            spec: of the generation.
            tables: its ``updatable_tables``.
        """
        schema = spec.item_schema
        self._spec, self._tables = spec, tables
        self._terms_width = spec.planes.terms_width
        self._signals = frozenset(schema.signals)
        self._attributes = {
            one.name: _single(one.dtype) if one.kind == "number" else _category(one, spec.planes)
            for one in schema.attributes
        }
        self._fields = {one.name: _single(one.dtype) for one in schema.fields}
        self._features = {one.name: _feature(one) for one in schema.item_features}

    def __call__(self, message: retrieval_pb2.Mutation, op: str, size: int) -> int:
        """Return the item of a mutation that every shard can take, ``NO_ITEM`` for rows of a table.

        Args:
            message: its version, ttl and ``if_version`` are not looked at.
            op: which operation it is.
            size: bytes of it on the wire.

        Raises:
            MutationError: naming the field.
        """
        item_id = self._plain(message, op) if size <= _PLAIN_BYTES else None
        if item_id is None:
            # Any version stands for the one that the item will have.
            mutation = check(mutation_from(message, 1), self._spec, self._tables)
            item_id = getattr(mutation, "item_id", NO_ITEM)
        return item_id

    def _plain(self, message: retrieval_pb2.Mutation, op: str) -> int | None:
        """Return the item of a mutation that is plain."""
        item_id: int
        if op == "patch":
            patch = message.patch
            item_id, is_plain = patch.item_id, self._are_plain(patch)
        elif op == "upsert":
            upsert = message.upsert
            item_id = upsert.item_id
            is_plain = not upsert.HasField("embedding") and self._are_plain(upsert)
        elif op == "delete":
            item_id, is_plain = message.delete.item_id, True
        else:
            return None
        return item_id if is_plain and item_id <= INT64_MAX else None

    def _are_plain(self, values: retrieval_pb2.ItemUpsert | retrieval_pb2.ItemPatch) -> bool:
        signals = values.signals
        for name in signals:
            # Not so where it is NaN.
            if name not in self._signals or not abs(signals[name]) <= _MAX_FLOAT32:
                return False
        return (
            (
                not values.HasField("attributes")
                or _is_plain(values.attributes, self._attributes, self._terms_width)
            )
            and (not values.HasField("fields") or _is_plain(values.fields, self._fields))
            and (not values.HasField("features") or _is_plain(values.features, self._features))
        )


def _is_plain(
    message: retrieval_pb2.FeatureMap, columns: Mapping[str, _Column], terms_width: int = 0
) -> bool:
    """Return whether all columns are plain and take at most ``terms_width`` slots for terms."""
    rare = 0
    given = message.features
    for name in given:
        column = columns.get(name)
        if column is None:
            return False
        parts = given[name].ListFields()
        if not parts:
            continue
        kind, values = parts[0]
        if (
            len(parts) > 1
            or kind.number not in column.kinds
            or not column.least <= len(values) <= column.most
        ):
            return False
        if column.planes is not None:
            rare += sum([str(value) not in column.planes for value in values])
        if kind.number == _STRINGS:
            if any(len(text) > _PLAIN_CHARACTERS for text in values):
                return False
        elif kind.number == _INTS:
            if column.has_null and NULL_INT in values:
                return False
        elif not all(abs(number) <= column.largest for number in values):
            return False
    return rare <= terms_width


def _single(dtype: ValueType) -> _Column:
    """Return the column of an attribute or a field that has one value."""
    return _Column(_KINDS[dtype], 1, 1, _MAX_FLOAT64, has_null=dtype == "int")


def _category(attribute: Attribute, planes: PlaneDictionary) -> _Column:
    own = planes.exact_planes.get(attribute.name, {})
    return _Column(_KINDS[attribute.dtype], 1, MAX_MUTATION_BYTES, 0.0, False, own.keys())


def _feature(feature: UserFeature) -> _Column:
    """Return the column of a raw feature."""
    least, most = {
        "ids": (1, feature.max_length),
        "text": (1, MAX_MUTATION_BYTES),
        "numbers": (feature.width, feature.width),
    }[feature.kind]
    return _Column(_KINDS[feature.dtype], least, most, _MAX_FLOAT32, has_null=False)

"""How attribute values become filter planes, terms and columns, and the choice of both.

The dictionary is made once per generation from the whole catalogue and travels in its manifest, so
that every shard encodes its items, and every router compiles its filters, in the same way.

Shapes: n items, J planes, V columns, F term slots per item.
"""

import hashlib
import math
import struct
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple, Self

import numpy as np
import pydantic
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, model_validator
from torch import Tensor

from silvershard.kernels.filter_ops import PAD_TERM
from silvershard.model.bloom_width import LEAST_RATE, MAX_HASHES, choose_width
from silvershard.model.catalogue import NULL_INT, Catalogue, Ragged
from silvershard.model.dtypes import INT64_MAX, ValueType
from silvershard.model.schema import Schema, SchemaError

LIVE_PLANE = 0
FIRST_EXACT_PLANE = 1
TERM_SLOTS_MULTIPLE = 4
MAX_CATEGORIES = 127
"""Category attributes of a generation; every term key carries the number of its attribute."""
ATTRIBUTE_SHIFT = 56
"""A term key is ``number of the attribute << ATTRIBUTE_SHIFT | hash of the value``."""

TermValue = int | str
NumberValue = int | float


class PlaneReport(NamedTuple):
    """What a dictionary costs and how often its Bloom planes err."""

    num_planes: int
    """J: live plane, exact planes and Bloom planes."""
    num_exact_planes: int
    num_bloom_planes: int
    num_hashes: int
    terms_width: int
    num_columns: int
    plane_bits_per_item: int
    """Bits of one slot in all planes."""
    verify_bits_per_item: int
    """Bits of the terms and columns of one slot."""
    false_positive_rate: float
    """Expected share of items that one rare term passes wrongly before verification."""


class ItemBits(NamedTuple):
    """The filter data of items, not yet laid into pages."""

    exact: Tensor
    """``(n, num_exact_planes)`` bool; column j belongs to plane ``FIRST_EXACT_PLANE + j``."""
    terms: Tensor
    """``(n, F)`` int64 keys of the values without an exact plane, ascending, padded PAD_TERM."""
    columns: Tensor
    """``(n, V)`` int64 order keys of the number attributes."""


class PlaneDictionary(BaseModel):
    """Where a generation keeps every attribute value: plane 0 live, exact planes, Bloom planes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    dtypes: dict[str, ValueType] = pydantic.Field(
        description="type of the values of every attribute of the schema"
    )
    exact_planes: dict[str, dict[str, int]] = pydantic.Field(
        description="plane of every (category attribute, canonical value) that has its own"
    )
    first_bloom_plane: int = pydantic.Field(ge=1, description="first plane after the exact ones")
    num_bloom_planes: int = pydantic.Field(
        ge=0, description="width of the Bloom signature; 0: values without a plane are refused"
    )
    num_hashes: int = pydantic.Field(ge=1, le=MAX_HASHES, description="Bloom planes set per value")
    seed: int = pydantic.Field(ge=0, le=INT64_MAX, description="seed of term keys and positions")
    columns: dict[str, int] = pydantic.Field(description="column of every number attribute")
    terms_width: int = pydantic.Field(
        ge=0, description="term slots F per item, a multiple of 4; 0 without Bloom planes"
    )
    false_positive_rate: float = pydantic.Field(
        ge=0, le=1, description="expected share of items that one rare term passes wrongly"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        planes = sorted(plane for values in self.exact_planes.values() for plane in values.values())
        if planes != list(range(FIRST_EXACT_PLANE, self.first_bloom_plane)):
            raise ValueError(
                f"exact planes must be {FIRST_EXACT_PLANE}..{self.first_bloom_plane - 1}, "
                "each used once"
            )
        if sorted(self.columns.values()) != list(range(len(self.columns))):
            raise ValueError(f"columns must be 0..{len(self.columns) - 1}, each used once")
        if self.terms_width % TERM_SLOTS_MULTIPLE:
            raise ValueError(f"terms_width must be a multiple of 4, got {self.terms_width}")
        if (self.num_bloom_planes == 0) != (self.terms_width == 0):
            raise ValueError(
                "num_bloom_planes and terms_width must both be 0 or both be positive, "
                f"got {self.num_bloom_planes} and {self.terms_width}"
            )
        for name in (*self.exact_planes, *self.columns):
            if name not in self.dtypes:
                raise ValueError(f"attribute {name!r} has planes or a column but no dtype")
        if len(self.categories) > MAX_CATEGORIES:
            raise ValueError(
                f"a generation holds at most {MAX_CATEGORIES} category attributes, "
                f"got {len(self.categories)}"
            )
        return self

    @property
    def num_exact_planes(self) -> int:
        """Planes that belong to one value each."""
        return self.first_bloom_plane - FIRST_EXACT_PLANE

    @property
    def num_planes(self) -> int:
        """J: all planes, the live plane included."""
        return self.first_bloom_plane + self.num_bloom_planes

    @property
    def num_columns(self) -> int:
        """V: one column per number attribute."""
        return len(self.columns)

    @property
    def categories(self) -> list[str]:
        """The category attributes by their number, which is their rank by name.

        A manifest does not keep the order of a schema, so that the number cannot depend on it.
        """
        return sorted(self.dtypes.keys() - self.columns.keys())

    def term_key(self, attribute: str, value: TermValue) -> int:
        """The key of a value of a category attribute, in ``[0, PAD_TERM)``; stable everywhere."""
        self._require(attribute, value)
        return _term_key(self.seed, self.categories.index(attribute), attribute, value)

    def exact_plane(self, attribute: str, value: TermValue) -> int | None:
        """The plane that belongs to this value alone, or None."""
        self._require(attribute, value)
        return self.exact_planes.get(attribute, {}).get(str(value))

    def number_key(self, attribute: str, value: NumberValue) -> int:
        """The int64 that orders like the value among all values of a number attribute.

        Raises:
            ValueError: if the attribute has no column, or the value is not of its type, NaN, or
                the int that marks null.
        """
        if attribute not in self.columns:
            raise ValueError(f"attribute {attribute!r} has no column")
        if self.dtypes[attribute] == "int":
            if not isinstance(value, int) or not NULL_INT < value <= INT64_MAX:
                raise ValueError(f"attribute {attribute!r} orders 64-bit ints, got {value!r}")
            return value
        if math.isnan(value):
            raise ValueError(f"attribute {attribute!r} orders numbers, got nan")
        return float_key(float(value))

    def report(self) -> PlaneReport:
        """What the planes, terms and columns cost per item and what the Bloom planes promise."""
        return PlaneReport(
            num_planes=self.num_planes,
            num_exact_planes=self.num_exact_planes,
            num_bloom_planes=self.num_bloom_planes,
            num_hashes=self.num_hashes,
            terms_width=self.terms_width,
            num_columns=self.num_columns,
            plane_bits_per_item=self.num_planes,
            verify_bits_per_item=64 * (self.terms_width + self.num_columns),
            false_positive_rate=self.false_positive_rate,
        )

    def _require(self, attribute: str, value: TermValue) -> None:
        expected = str if self.dtypes.get(attribute) == "string" else int
        if attribute not in self.dtypes or attribute in self.columns:
            raise ValueError(f"{attribute!r} is not a category attribute")
        if not isinstance(value, expected):
            raise ValueError(f"values of {attribute!r} must be {expected.__name__}, got {value!r}")


def float_key(value: float) -> int:
    """The int64 that orders like the float64; both zeros share one key, NaN has the null key."""
    return int(float_keys(np.array([value], dtype=np.float64))[0])


def float_keys(values: NDArray[np.float64]) -> NDArray[np.int64]:
    """``float_key`` of every value, ``(n,)`` int64."""
    # Adding zero turns -0.0 into 0.0 and changes nothing else.
    bits = (values + 0.0).view(np.int64)
    keys = np.where(bits >= 0, bits, bits ^ np.int64(INT64_MAX))
    return np.where(np.isnan(values), np.int64(NULL_INT), keys)


def choose_planes(
    schema: Schema,
    catalogue: Catalogue,
    *,
    target_false_positive_rate: float = 0.001,
    max_exact_planes: int = 256,
    min_exact_share: float = 0.002,
    num_hashes: int = 5,
    max_bloom_planes: int = 4096,
    seed: int = 0,
    previous: Sequence[PlaneDictionary] = (),
) -> PlaneDictionary:
    """The dictionary of a catalogue; it depends on the set of items, never on their order.

    Values on at least ``min_exact_share`` of the items get exact planes, the most frequent first.
    All others share the fewest Bloom planes that meet the target, and no fewer than it takes when
    every item has one such value, because items to come may have what none has today.

    A slot holds a quarter more rare values than the widest item has, at least one more. The new
    dictionary holds every item that a ``previous`` one holds: their values keep exact planes, and
    slots are no narrower.

    Args:
        schema: what the catalogue holds.
        catalogue: all items of the generation, validated.
        target_false_positive_rate: largest expected share of items, over the whole catalogue, that
            a rare term may pass wrongly before verification; in (0, 1).
        max_exact_planes: most exact planes; the previous ones have more if they had more.
        min_exact_share: share of the items below which a value is rare, in [0, 1].
        num_hashes: Bloom planes set per value, 1 to 16.
        max_bloom_planes: most Bloom planes.
        seed: seed of term keys and Bloom positions.
        previous: of generations whose updates this one must take too.

    Raises:
        ValueError: if an argument is out of range, if the target needs more than
            ``max_bloom_planes``, if there are more than ``MAX_CATEGORIES`` category attributes, or
            if two values share a term key (another seed cures that).
    """
    if not LEAST_RATE <= target_false_positive_rate < 1:
        raise ValueError(
            f"target_false_positive_rate must be in [{LEAST_RATE:g}, 1), "
            f"got {target_false_positive_rate}"
        )
    if not 0 <= min_exact_share <= 1:
        raise ValueError(f"min_exact_share must be in [0, 1], got {min_exact_share}")
    if not 1 <= num_hashes <= MAX_HASHES:
        raise ValueError(f"num_hashes must be in [1, {MAX_HASHES}], got {num_hashes}")
    if max_exact_planes < 0 or max_bloom_planes < 1:
        raise ValueError(
            "max_exact_planes must be 0 or more and max_bloom_planes 1 or more, "
            f"got {max_exact_planes} and {max_bloom_planes}"
        )
    if len(schema.categories) > MAX_CATEGORIES:
        raise ValueError(
            f"attributes must hold at most {MAX_CATEGORIES} categories, "
            f"got {len(schema.categories)}"
        )
    held = _held_values(schema, catalogue)
    counts = {
        (name, value): count
        for name, one in held.items()
        for value, count in zip(one.values, np.bincount(one.codes).tolist(), strict=True)
    }
    numbers = {name: number for number, name in enumerate(sorted(held))}
    _refuse_collisions(seed, numbers, counts)
    frequent = sorted(
        (pair for pair, count in counts.items() if count >= min_exact_share * len(catalogue)),
        key=lambda pair: (-counts[pair], pair[0], str(pair[1])),
    )
    exact = {pair for one in previous for pair in _exact_values(one, schema)}
    fresh = [pair for pair in frequent if pair not in exact]
    exact |= set(fresh[: max(max_exact_planes - len(exact), 0)])
    exact_planes: dict[str, dict[str, int]] = {item.name: {} for item in schema.categories}
    for plane, (name, value) in enumerate(
        sorted(exact, key=lambda pair: (pair[0], str(pair[1]))), start=FIRST_EXACT_PLANE
    ):
        exact_planes[name][str(value)] = plane
    rare_terms = np.zeros(len(catalogue), dtype=np.int64)
    for name, one in held.items():
        is_rare = np.array([(name, value) not in exact for value in one.values], dtype=np.bool_)
        rare_terms += np.bincount(one.rows[is_rare[one.codes]], minlength=len(catalogue))
    items_by_terms = Counter(
        {terms: items for terms, items in enumerate(np.bincount(rare_terms).tolist()) if items}
    )
    num_bloom_planes, rate = choose_width(
        items_by_terms, num_hashes, target_false_positive_rate, max_bloom_planes
    )
    widest = int(rare_terms.max(initial=0))
    widest += max(-(-widest // 4), 1)
    terms_width = -(-widest // TERM_SLOTS_MULTIPLE) * TERM_SLOTS_MULTIPLE
    return PlaneDictionary(
        dtypes={attribute.name: attribute.dtype for attribute in schema.attributes},
        exact_planes=exact_planes,
        first_bloom_plane=FIRST_EXACT_PLANE + len(exact),
        num_bloom_planes=num_bloom_planes,
        num_hashes=num_hashes,
        seed=seed,
        columns={attribute.name: index for index, attribute in enumerate(schema.numbers)},
        terms_width=max([terms_width, *(one.terms_width for one in previous)]),
        false_positive_rate=rate,
    )


def shortfall(before: PlaneDictionary, after: PlaneDictionary) -> str:
    """What a dictionary lacks to hold every item that another one holds, empty if nothing.

    Attributes that only one of them has, or with values of another type, do not count.
    """
    lost = 0
    for name, values in before.exact_planes.items():
        if before.dtypes[name] == after.dtypes.get(name) and name in after.exact_planes:
            lost += len(values.keys() - after.exact_planes[name].keys())
    needed = before.terms_width + lost
    if after.terms_width >= needed:
        return ""
    return (
        f"terms_width must be at least {needed}, for {before.terms_width} rare values and {lost} "
        f"that lose their planes, got {after.terms_width}"
    )


def encode_items(dictionary: PlaneDictionary, schema: Schema, catalogue: Catalogue) -> ItemBits:
    """The exact bits, rare terms and order keys of every item, in catalogue order.

    The catalogue may hold values that the dictionary has never seen: they become rare terms.

    Raises:
        SchemaError: if an item has more rare values than ``terms_width``, or a rare value although
            the dictionary has no Bloom planes.
    """
    num_items = len(catalogue)
    exact = np.zeros((num_items, dictionary.num_exact_planes), dtype=np.bool_)
    rows_parts: list[NDArray[np.int64]] = []
    keys_parts: list[NDArray[np.int64]] = []
    numbers = {name: number for number, name in enumerate(dictionary.categories)}
    for name, one in _held_values(schema, catalogue).items():
        plane_of = np.array(
            [dictionary.exact_plane(name, value) or LIVE_PLANE for value in one.values],
            dtype=np.int64,
        )
        plane = plane_of[one.codes]
        rare = plane == LIVE_PLANE
        exact[one.rows[~rare], plane[~rare] - FIRST_EXACT_PLANE] = True
        rows, codes = one.rows[rare], one.codes[rare]
        if not len(rows):
            continue
        if not dictionary.num_bloom_planes:
            first = rows.argmin()
            raise SchemaError(
                name,
                f"value {one.values[codes[first]]!r} of item {catalogue.item_ids[rows[first]]} has "
                "no plane and this generation has no Bloom planes; publish a new generation",
            )
        key_of = np.array(
            [
                PAD_TERM if own else _term_key(dictionary.seed, numbers[name], name, value)
                for own, value in zip(plane_of.tolist(), one.values, strict=True)
            ],
            dtype=np.int64,
        )
        rows_parts.append(rows)
        keys_parts.append(key_of[codes])
    terms = np.full((num_items, dictionary.terms_width), PAD_TERM, dtype=np.int64)
    if rows_parts:
        item_rows, keys = np.concatenate(rows_parts), np.concatenate(keys_parts)
        order = np.lexsort((keys, item_rows))
        item_rows, keys = item_rows[order], keys[order]
        position = np.arange(len(keys)) - np.searchsorted(item_rows, item_rows)
        if position.max() >= dictionary.terms_width:
            row = item_rows[position.argmax()]
            raise SchemaError(
                "attributes",
                f"item {catalogue.item_ids[row]} has {position.max() + 1} rare values, this "
                f"generation holds {dictionary.terms_width}; publish a new generation",
            )
        terms[item_rows, position] = keys
    columns = np.zeros((num_items, dictionary.num_columns), dtype=np.int64)
    for name, column in dictionary.columns.items():
        values = catalogue.numbers[name]
        columns[:, column] = values if values.dtype == np.int64 else float_keys(values)
    return ItemBits(torch.from_numpy(exact), torch.from_numpy(terms), torch.from_numpy(columns))


def _term_key(seed: int, number: int, attribute: str, value: TermValue) -> int:
    tag = "s" if isinstance(value, str) else "i"
    text = f"{attribute}\0{tag}{value}".encode("utf-8", "surrogatepass")
    digest = hashlib.blake2b(text, digest_size=8, key=struct.pack("<q", seed)).digest()
    # The number is below 127, so that no key is PAD_TERM.
    return number << ATTRIBUTE_SHIFT | int.from_bytes(digest, "little") >> 64 - ATTRIBUTE_SHIFT


def _exact_values(dictionary: PlaneDictionary, schema: Schema) -> list[tuple[str, TermValue]]:
    """The values with exact planes of the attributes that a schema still has as they were."""
    return [
        (one.name, value if one.dtype == "string" else int(value))
        for one in schema.categories
        if dictionary.dtypes.get(one.name) == one.dtype
        for value in dictionary.exact_planes.get(one.name, {})
    ]


class _HeldValues(NamedTuple):
    """The distinct values of an attribute and the items that have them, m pairs."""

    values: list[TermValue]
    codes: NDArray[np.int64]
    """``(m,)`` which of ``values``, ascending."""
    rows: NDArray[np.int64]
    """``(m,)`` the item, ascending within a value; a list that repeats a value has it once."""


def _held_values(schema: Schema, catalogue: Catalogue) -> dict[str, _HeldValues]:
    """The values of every category attribute, without a step in Python per item."""
    found = {}
    for attribute in schema.categories:
        column = catalogue.categories[attribute.name]
        values, codes = _factorized(column)
        order = np.argsort(codes, kind="stable")
        codes, rows = codes[order], column.row_of[order]
        fresh = np.ones(len(codes), dtype=np.bool_)
        fresh[1:] = (codes[1:] != codes[:-1]) | (rows[1:] != rows[:-1])
        found[attribute.name] = _HeldValues(values, codes[fresh], rows[fresh])
    return found


def _factorized(column: Ragged) -> tuple[list[TermValue], NDArray[np.int64]]:
    """The distinct values of a column and the place of every entry among them."""
    if column.values.dtype != object:
        distinct, codes = np.unique(column.values, return_inverse=True)
        return distinct.tolist(), codes.astype(np.int64, copy=False)
    place = {value: code for code, value in enumerate(dict.fromkeys(column.values))}
    codes = np.fromiter(map(place.__getitem__, column.values), np.int64, len(column.values))
    return list(place), codes


def _refuse_collisions(
    seed: int, numbers: dict[str, int], counts: dict[tuple[str, TermValue], int]
) -> None:
    owners: dict[int, tuple[str, TermValue]] = {}
    for pair in counts:
        key = _term_key(seed, numbers[pair[0]], *pair)
        other = owners.setdefault(key, pair)
        if other != pair:
            first, second = sorted(f"{name}:{value!r}" for name, value in (other, pair))
            raise ValueError(f"{first} and {second} share the term key {key}; change seed={seed}")

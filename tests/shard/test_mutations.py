import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from silvershard.model.catalogue import NULL_INT
from silvershard.model.dtypes import INT64_MAX
from silvershard.model.encoder_config import HSTUEncoderConfig
from silvershard.model.spec import ServingSpec
from silvershard.model.two_tower_config import NumberFeature
from silvershard.shard.errors import MutationError
from silvershard.shard.mutations import (
    MAX_MUTATION_BYTES,
    MAX_TEXT_BYTES,
    Delete,
    ItemValues,
    Mutation,
    Patch,
    RowChange,
    Upsert,
    check,
    conform,
    count_rare,
    updatable_tables,
)
from silvershard.shard.snapshot import open_snapshot

TABLES = {"history": (10, 4)}


@pytest.fixture(scope="module")
def spec(generation) -> ServingSpec:
    return open_snapshot(generation.path).spec


@pytest.fixture(scope="module")
def full(generation) -> ItemValues:
    return ItemValues(
        attributes={"genre": ("Drama", "Western"), "maker": (3,), "year": (1999,), "price": (2,)},
        signals={"popularity": 0.1},
        fields={"title": "Ran", "year": None},
        features={"movie": (7,), "genres": ("Drama",)},
    )


def rows(**changes: Any) -> RowChange:
    whole = RowChange("history", 3, (1, 9), np.ones((2, 4), dtype=np.float32))
    return replace(whole, **changes)


def test_a_checked_mutation_has_plain_values_of_the_types_of_the_schema(
    spec: ServingSpec, full: ItemValues
) -> None:
    given = ItemValues(
        attributes={**full.attributes, "maker": np.array([3, 4]), "price": [np.int64(2)]},  # type: ignore[dict-item]
        signals={"popularity": np.float64(0.1)},
        fields={"title": None, "year": np.int32(7)},  # type: ignore[dict-item]
        features={"movie": (np.int64(7),), "genres": (np.str_("Drama"),)},  # type: ignore[dict-item]
    )
    found = check(Upsert(np.int64(5), 2, given, expires_unix_ms=9), spec)  # type: ignore[arg-type]
    assert found == Upsert(
        5,
        2,
        ItemValues(
            attributes={
                "genre": ("Drama", "Western"),
                "maker": (3, 4),
                "year": (1999,),
                "price": (2.0,),
            },
            signals={"popularity": float(np.float32(0.1))},
            fields={"title": "", "year": 7},
            features={"movie": (7,), "genres": ("Drama",)},
        ),
        expires_unix_ms=9,
    )
    assert isinstance(found, Upsert)
    assert type(found.item_id) is int
    assert [type(one) for one in found.values.attributes["maker"]] == [int, int]
    assert type(found.values.attributes["price"][0]) is float
    assert type(found.values.features["genres"][0]) is str


def test_what_was_checked_is_checked_again_without_a_change(
    spec: ServingSpec, full: ItemValues
) -> None:
    for one in (Upsert(1, 1, full), Patch(1, 1, full), Delete(1, 1, urgent=True)):
        once = check(one, spec)
        assert check(once, spec) == once


BAD_VALUES: list[tuple[dict[str, Any], str, str]] = [
    ({"attributes": {"colour": ("red",)}}, "attributes", "must name attributes of the schema"),
    ({"attributes": {3: ("red",)}}, "attributes", "got int 3"),
    ({"attributes": ["genre"]}, "attributes", "must be a mapping"),
    ({"attributes": {"genre": "Drama"}}, "attributes.genre", "must be a list of values, got str"),
    ({"attributes": {"genre": (1,)}}, "attributes.genre", "must be a string, got int 1"),
    ({"attributes": {"maker": ("1",)}}, "attributes.maker", "must be an int, got str '1'"),
    ({"attributes": {"maker": (True,)}}, "attributes.maker", "must be an int, got bool True"),
    ({"attributes": {"maker": (1.0,)}}, "attributes.maker", "must be an int, got float 1.0"),
    ({"attributes": {"maker": (2**63,)}}, "attributes.maker", f"{INT64_MAX}"),
    ({"attributes": {"year": (1, 2)}}, "attributes.year", "must have one value, or none for null"),
    ({"attributes": {"year": (NULL_INT,)}}, "attributes.year", "which marks null"),
    ({"attributes": {"price": (math.nan,)}}, "attributes.price", "must be finite, got float nan"),
    ({"attributes": {"price": (10**400,)}}, "attributes.price", "must be finite, got int 1000"),
    ({"attributes": {"price": (np.bool(1),)}}, "attributes.price", "must be a number"),
    ({"signals": {"clicks": 1.0}}, "signals", "must name signals of the schema"),
    ({"signals": {"popularity": math.inf}}, "signals.popularity", "must be finite"),
    ({"signals": {"popularity": 1e39}}, "signals.popularity", "the range of float32, got 1e+39"),
    ({"signals": {"popularity": "1"}}, "signals.popularity", "must be a number, got str '1'"),
    ({"signals": {"popularity": (1.0,)}}, "signals.popularity", "must be a number, got tuple"),
    ({"signals": {"popularity": None}}, "signals.popularity", "must be a number"),
    ({"fields": {"plot": "x"}}, "fields", "must name fields of the schema"),
    ({"fields": {"year": NULL_INT}}, "fields.year", "which marks null"),
    ({"fields": {"title": 3}}, "fields.title", "must be a string"),
    ({"fields": {"title": "\ud800"}}, "fields.title", "must be valid Unicode"),
    ({"fields": {"title": "é" * 40_000}}, "fields.title", f"at most {MAX_TEXT_BYTES} bytes"),
    ({"features": {"mood": (1,)}}, "features", "must name features of the schema"),
    ({"features": {"movie": (1, 2)}}, "features.movie", "at most max_length=1 ids, got 2"),
    ({"features": {"genres": ("a",) * 9}}, "features.genres", "at most max_length=8 ids, got 9"),
    ({"attributes": {"maker": tuple(range(300, 305))}}, "attributes", "terms_width=4"),
]


@pytest.mark.parametrize(("values", "field", "message"), BAD_VALUES)
@pytest.mark.parametrize("kind", [Upsert, Patch])
def test_a_bad_value_is_refused_and_named(
    spec: ServingSpec, kind: Any, values: dict[str, Any], field: str, message: str
) -> None:
    with pytest.raises(MutationError) as caught:
        check(kind(1, 1, ItemValues(**values)), spec)
    assert caught.value.field == field
    assert message in caught.value.message


@pytest.mark.parametrize(
    ("mutation", "field", "message"),
    [
        (Delete(-1, 1), "item_id", r"must be in \[0, "),
        (Delete(2**63, 1), "item_id", r"must be in \[0, "),
        (Delete(True, 1), "item_id", "must be an int, got bool"),
        (Delete("7", 1), "item_id", "must be an int, got str"),  # type: ignore[arg-type]
        (Delete(7, 0), "version", r"must be in \[1, "),
        (Delete(7, 2**63), "version", r"must be in \[1, "),
        (Delete(7, 1, urgent=1), "urgent", "must be a bool"),  # type: ignore[arg-type]
        (Upsert(1, 1, ItemValues(), embedding=(1.0,)), "embedding", "the item tower makes it"),
        (Upsert(1, 1, ItemValues(), expires_unix_ms=-1), "expires_unix_ms", r"in \[0, "),
        (rows(table="movie"), "table", r"frozen within a generation \(history\), got str 'movie'"),
        (rows(rows=()), "rows", "must be a list of rows, got tuple"),
        (rows(rows=(1, 10)), "rows", "must be below 10 of history, got 10"),
        (rows(rows=(-1, 2)), "rows", r"must be in \[0, "),
        (rows(rows=(2, 2)), "rows", "must be distinct"),
        (rows(rows=(1,)), "values", r"must be \(1, 4\), got \(2, 4\)"),
        (rows(values=[1.0]), "values", "must be an array of numbers, got list"),
        (rows(values=np.ones((2, 4), dtype=bool)), "values", "must be an array of numbers"),
        (rows(values=np.full((2, 4), np.nan)), "values", "must be finite and within ±65504"),
        (rows(values=np.full((2, 4), 1e5)), "values", "must be finite and within ±65504"),
    ],
)
def test_a_bad_mutation_is_refused_and_named(
    spec: ServingSpec, mutation: Mutation, field: str, message: str
) -> None:
    with pytest.raises(MutationError, match=message) as caught:
        check(mutation, spec, TABLES)
    assert caught.value.field == field


def test_rows_come_back_as_float32(spec: ServingSpec) -> None:
    found = check(rows(rows=[1, np.int64(9)], values=np.full((2, 4), 2)), spec, TABLES)
    assert isinstance(found, RowChange)
    assert found.rows == (1, 9)
    assert found.values.dtype == np.float32
    assert (found.values == 2).all()


def test_a_mutation_is_bounded_as_a_whole(spec: ServingSpec) -> None:
    text = "x" * MAX_TEXT_BYTES
    most = MAX_MUTATION_BYTES // MAX_TEXT_BYTES
    fits = ItemValues(attributes={"genre": (text,) * most})
    assert isinstance(check(Patch(1, 1, fits), spec), Patch)
    for values in (
        ItemValues(attributes={"genre": (text,) * (most + 1)}),
        ItemValues(attributes={"genre": (text,) * most}, signals={"popularity": 1.0}),
        ItemValues(attributes={"genre": (text,) * most}, fields={"year": 1}),
        ItemValues(attributes={"maker": (1,) * (MAX_MUTATION_BYTES // 8 + 1)}),
    ):
        with pytest.raises(MutationError, match=r"1048576 bytes|131072 values"):
            check(Patch(1, 1, values), spec)
    wide = {"history": (100_000, 4)}
    many = tuple(range(50_000))
    with pytest.raises(MutationError, match="at most 1048576 bytes, got 1200000"):
        check(rows(rows=many, values=np.zeros((50_000, 4), dtype=np.float32)), spec, wide)


def test_rare_values_are_those_without_a_plane_each_counted_once(spec: ServingSpec) -> None:
    values = ItemValues(
        attributes={"genre": ("Drama", "Western", "Western"), "maker": (300, 301), "year": (5,)}
    )
    assert count_rare(values, spec.planes) == 3


def test_a_generation_without_bloom_planes_takes_no_new_value(spec: ServingSpec) -> None:
    planes = spec.planes.model_copy(update={"num_bloom_planes": 0, "terms_width": 0})
    bare = spec.model_copy(update={"planes": planes})
    check(Patch(1, 1, ItemValues(attributes={"genre": ("Drama",)})), bare)
    new = Patch(1, 1, ItemValues(attributes={"genre": ("Western",)}))
    with pytest.raises(MutationError, match=r"terms_width=0 values .* publish a new generation"):
        check(new, bare)
    assert conform(new, bare.item_schema, {}) == new


def test_numbers_of_a_feature_are_all_there_or_none(publish_model) -> None:
    made = publish_model(item_numbers=(NumberFeature(name="size", width=2),))
    spec = open_snapshot(made.path).spec
    for good in ((), (1, 0.1)):
        found = check(Patch(1, 1, ItemValues(features={"size": good})), spec)
        assert isinstance(found, Patch)
        assert found.values.features["size"] == tuple(float(np.float32(one)) for one in good)
    with pytest.raises(MutationError, match="must have 2 values or none, got 3"):
        check(Patch(1, 1, ItemValues(features={"size": (1, 2, 3)})), spec)
    with pytest.raises(MutationError, match="the range of float32"):
        check(Patch(1, 1, ItemValues(features={"size": (1, 1e39)})), spec)


def test_only_tables_of_the_user_tower_can_be_updated(generation) -> None:
    config = generation.model.config.model_dump(mode="json")
    tables = updatable_tables("two_tower", config)
    assert tables == {"history": (301, 16), "recent": (301, 16), "history_genres": (6, 16)}
    assert not tables.keys() & generation.model.config.item_tables.keys()
    assert updatable_tables("text_tower", {}) == {}
    encoder = HSTUEncoderConfig(max_length=8).model_dump(mode="json")
    with_session = updatable_tables("two_tower", {**config, "encoder": encoder})
    assert with_session["session"] == (301, 16)


def test_a_patch_replaces_what_it_gives_and_nothing_else(full: ItemValues) -> None:
    patch = ItemValues(
        attributes={"genre": ()}, signals={"freshness": 1.0}, fields={"year": 3}, features={}
    )
    assert full.patched(patch) == ItemValues(
        attributes={**full.attributes, "genre": ()},
        signals={"popularity": 0.1, "freshness": 1.0},
        fields={"title": "Ran", "year": 3},
        features=full.features,
    )

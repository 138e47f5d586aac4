from typing import Any

import numpy as np
import pytest

from silvershard.model.catalogue import NULL_INT
from silvershard.model.schema import Attribute, Field, Schema, UserFeature
from silvershard.shard import mutations
from silvershard.shard.errors import MutationError
from silvershard.shard.mutations import ItemValues, Patch, Upsert, conform
from silvershard.shard.plain_values import are_plain


@pytest.fixture(scope="module")
def schema() -> Schema:
    return Schema(
        item_features=(
            UserFeature(name="words", max_length=3),
            UserFeature(name="size", kind="numbers", dtype="float"),
        ),
        attributes=(
            Attribute(name="genre", kind="category", dtype="string"),
            Attribute(name="year", kind="number", dtype="int"),
            Attribute(name="price", kind="number", dtype="float"),
        ),
        signals=("popularity", "trend"),
        fields=(Field(name="title", dtype="string"), Field(name="pages", dtype="int")),
    )


def is_plain(values: ItemValues, schema: Schema) -> bool:
    return are_plain(values.attributes, values.signals, values.fields, values.features, schema)


def test_what_comes_out_of_a_message_is_plain(schema: Schema) -> None:
    values = ItemValues(
        attributes={"genre": ("Drama", "Komödie"), "year": (1990,), "price": (2.5,)},
        signals={"popularity": 0.5, "trend": -1.25},
        fields={"title": "Ran", "pages": None},
        features={"words": (1, 2, 3)},
    )
    assert is_plain(values, schema)
    assert is_plain(ItemValues(), schema)
    patch = Patch(1, 1, values)
    assert conform(patch, schema, {}) is patch


SCALARS: list[Any] = [1, -1, NULL_INT, 1 << 63, True, 0.5, 0.1, 1e39, float("nan"), float("inf")]
SCALARS += ["a", "ä", "\ud800", "x" * 300, None, np.int64(3), np.float32(0.5), "", b"a"]


def test_it_says_yes_only_where_the_checks_change_nothing(
    schema: Schema, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = np.random.default_rng(0)
    names = {
        "attributes": ["genre", "year", "price", "colour"],
        "signals": ["popularity", "trend", "colour"],
        "fields": ["title", "pages", "colour"],
        "features": ["words", "size", "colour"],
    }
    made: list[ItemValues] = []
    for _ in range(4000):
        columns: dict[str, Any] = {}
        for part, known in names.items():
            chosen = draw.choice(known, int(draw.integers(0, 3)), p=None).tolist()
            columns[part] = {
                name: SCALARS[draw.integers(len(SCALARS))]
                if part in ("signals", "fields")
                else tuple(
                    SCALARS[at] for at in draw.integers(0, len(SCALARS), draw.integers(0, 5))
                )
                for name in chosen
            }
        made.append(ItemValues(**columns))
    plain = [is_plain(values, schema) for values in made]
    assert 40 < sum(plain) < 3000
    monkeypatch.setattr(mutations, "are_plain", lambda *_: False)
    for values, is_so in zip(made, plain, strict=True):
        if is_so:
            # repr tells -0.0 and the types apart.
            assert repr(conform(Upsert(1, 1, values), schema, {})) == repr(Upsert(1, 1, values))


@pytest.mark.parametrize(
    "values",
    [
        ItemValues(attributes={"year": (1, 2)}),
        ItemValues(attributes={"year": (NULL_INT,)}),
        ItemValues(features={"words": (1, 2, 3, 4)}),
        ItemValues(features={"words": [1]}),  # type: ignore[dict-item]
        ItemValues(signals={"popularity": 0.1}),
        ItemValues(signals={"popularity": 1}),
        ItemValues(fields={"title": None}),
        ItemValues(fields={"title": "x" * 257}),
        ItemValues(fields={"title": "ä" * 129}),
        ItemValues(fields={"title": "\ud800"}),
        ItemValues(attributes={"genre": ("x",) * 65}),
    ],
)
def test_what_is_converted_refused_or_long_is_left_to_the_checks(
    values: ItemValues, schema: Schema
) -> None:
    assert not is_plain(values, schema)


def test_the_schema_of_another_generation_is_told_apart() -> None:
    for number in range(40):
        schema = Schema(signals=(f"s{number}",))
        assert is_plain(ItemValues(signals={f"s{number}": 1.0}), schema)
        assert not is_plain(ItemValues(signals={"s99": 1.0}), schema)
        with pytest.raises(MutationError, match="signals: must name signals"):
            conform(Patch(1, 1, ItemValues(signals={"s99": 1.0})), schema, {})

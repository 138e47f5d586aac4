import numpy as np

from silvershard.model.catalogue import NULL_INT
from silvershard.shard.item_columns import to_catalogue, to_column, to_features, to_values
from silvershard.shard.mutations import ItemValues


def test_what_is_not_given_is_empty_null_or_zero(generation) -> None:
    full = ItemValues(
        attributes={"genre": ("Drama", "Horror"), "maker": (3,), "year": (1999,), "price": (2.5,)},
        signals={"freshness": 0.5},
        fields={"title": "Ran", "year": 1985},
        features={"movie": (7,), "genres": ("Drama",)},
    )
    made = to_catalogue([8, 5], [full, ItemValues()], generation.schema)
    made.validate(generation.schema)
    assert made.item_ids.tolist() == [8, 5]
    assert made.categories["genre"].row(0).tolist() == ["Drama", "Horror"]
    assert made.categories["maker"].lengths.tolist() == [1, 0]
    assert made.numbers["year"].tolist() == [1999, NULL_INT]
    assert made.numbers["price"][0] == 2.5
    assert np.isnan(made.numbers["price"][1])
    assert made.signals.tolist() == [[0, 0.5], [0, 0]]
    assert made.fields["title"].tolist() == ["Ran", ""]
    assert made.fields["year"].tolist() == [1985, NULL_INT]
    assert made.features["movie"].row(0).tolist() == [7]
    assert made.features["genres"].lengths.tolist() == [1, 0]


def test_no_items_make_an_empty_catalogue(generation) -> None:
    made = to_catalogue([], [], generation.schema)
    made.validate(generation.schema)
    assert len(made) == 0
    assert to_features([], generation.schema).keys() == {"movie", "genres"}
    assert to_values(made, generation.schema) == []


def test_values_of_a_catalogue_make_the_same_catalogue(generation) -> None:
    whole, schema = generation.catalogue, generation.schema
    values = to_values(whole, schema)
    made = to_catalogue(whole.item_ids.tolist(), values, schema)
    made.validate(schema)
    for mine, given in (
        (made.categories, whole.categories),
        (made.features, whole.features),
    ):
        for name, column in given.items():
            assert np.array_equal(mine[name].offsets, column.offsets)
            assert mine[name].values.tolist() == column.values.tolist()
    for name, numbers in whole.numbers.items():
        assert np.array_equal(made.numbers[name], numbers, equal_nan=numbers.dtype == np.float64)
    for name, field in whole.fields.items():
        assert made.fields[name].tolist() == field.tolist()
    assert np.array_equal(made.signals, whole.signals)
    assert any(one.attributes["year"] == () for one in values)


def test_a_column_has_the_null_of_its_type() -> None:
    assert to_column([1, None], "int").tolist() == [1, NULL_INT]
    assert np.isnan(to_column([1, None], "float")).tolist() == [False, True]
    assert to_column(["a", None], "string").tolist() == ["a", ""]

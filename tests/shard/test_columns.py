import numpy as np
import pytest
import torch

from silvershard.model.catalogue import NULL_INT, Catalogue, Ragged
from silvershard.model.schema import Attribute, Field, Schema, UserFeature
from silvershard.shard.columns import pack_catalogue, pack_column, unpack_catalogue, unpack_column

SCHEMA = Schema(
    item_features=(
        UserFeature(name="movie", dtype="int", max_length=1),
        UserFeature(name="words", dtype="string", max_length=9),
    ),
    attributes=(
        Attribute(name="genre", kind="category", dtype="string"),
        Attribute(name="seller", kind="category", dtype="int"),
        Attribute(name="year", kind="number", dtype="int"),
        Attribute(name="price", kind="number", dtype="float"),
    ),
    signals=("popularity", "age"),
    fields=(Field(name="title", dtype="string"), Field(name="length", dtype="float")),
)


def catalogue(count: int) -> Catalogue:
    texts = ["", "Comedy", "Sci-Fi", "Ünïcode ☃", "a" * 300]
    strings = np.empty(count, dtype=object)
    strings[:] = [texts[row % 5] for row in range(count)]
    return Catalogue(
        item_ids=np.arange(count, dtype=np.int64) * 7,
        categories={
            "genre": Ragged.from_rows([texts[: row % 4] for row in range(count)], dtype="string"),
            "seller": Ragged.from_rows([[row, -row] for row in range(count)], dtype="int"),
        },
        numbers={
            "year": np.array(
                [NULL_INT if row % 3 else row for row in range(count)], dtype=np.int64
            ),
            "price": np.array([np.nan if row % 2 else row / 3 for row in range(count)]),
        },
        signals=np.arange(2 * count, dtype=np.float32).reshape(count, 2),
        fields={"title": strings, "length": np.linspace(0, 1, count)},
        features={
            "movie": Ragged.from_rows([[row] for row in range(count)], dtype="int"),
            "words": Ragged.from_rows([texts[row % 5 :] for row in range(count)], dtype="string"),
        },
    )


def same_ragged(a: Ragged, b: Ragged) -> bool:
    return (
        a.values.dtype == b.values.dtype
        and np.array_equal(a.offsets, b.offsets)
        and list(a.values) == list(b.values)
    )


@pytest.mark.parametrize("count", [0, 1, 13])
def test_a_catalogue_survives_packing(count: int) -> None:
    before = catalogue(count)
    before.validate(SCHEMA)
    after = unpack_catalogue(pack_catalogue(before), SCHEMA)
    after.validate(SCHEMA)
    assert np.array_equal(before.item_ids, after.item_ids)
    assert np.array_equal(before.signals, after.signals)
    for name, ragged in before.categories.items():
        assert same_ragged(ragged, after.categories[name])
    for name, ragged in before.features.items():
        assert same_ragged(ragged, after.features[name])
    for name, column in before.numbers.items():
        assert np.array_equal(column, after.numbers[name], equal_nan=column.dtype.kind == "f")
    assert list(before.fields["title"]) == list(after.fields["title"])
    assert np.array_equal(before.fields["length"], after.fields["length"])


def test_a_missing_column_is_an_error() -> None:
    tensors = pack_catalogue(catalogue(4))
    del tensors["category/genre/offsets"]
    with pytest.raises(KeyError, match="offsets"):
        unpack_catalogue(tensors, SCHEMA)


def test_a_column_of_another_type_is_an_error() -> None:
    with pytest.raises(ValueError, match="expected float64"):
        unpack_column(pack_column(np.arange(3)), "float")


def test_string_offsets_that_do_not_fit_are_an_error() -> None:
    packed = pack_column(np.array(["ab", "c"], dtype=object))
    packed["ends"] = torch.tensor([1, 2])
    with pytest.raises(ValueError, match="string offsets"):
        unpack_column(packed, "string")

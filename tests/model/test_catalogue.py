from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from silvershard.model.catalogue import NULL_INT, Catalogue, Ragged, UserColumn, as_column
from silvershard.model.schema import Attribute, Field, Schema, SchemaError, UserFeature

SCHEMA = Schema(
    item_features=(UserFeature(name="words", dtype="string"),),
    attributes=(
        Attribute(name="genre", kind="category", dtype="string"),
        Attribute(name="code", kind="category", dtype="int"),
        Attribute(name="year", kind="number", dtype="int"),
        Attribute(name="rating", kind="number", dtype="float"),
    ),
    signals=("popularity",),
    fields=(Field(name="title", dtype="string"),),
)


@pytest.fixture
def catalogue() -> Catalogue:
    return Catalogue(
        item_ids=np.array([30, 10, 20]),
        categories={
            "genre": Ragged.from_rows([["a", "b"], [], ["c"]]),
            "code": Ragged.from_rows([[1], [2], [3, 4]]),
        },
        numbers={
            "year": np.array([1990, NULL_INT, 2000]),
            "rating": np.array([1.5, np.nan, -0.0]),
        },
        signals=np.array([[1], [2], [3]], dtype=np.float32),
        fields={"title": as_column(["x", "y", "z"], "string")},
        features={"words": Ragged.from_rows([["w"], ["v", "u"], []])},
    )


def test_rows_come_back_from_a_ragged_array() -> None:
    ragged = Ragged.from_rows([[1, 2], [], [3]])
    assert len(ragged) == 3
    assert [ragged.row(index).tolist() for index in range(3)] == [[1, 2], [], [3]]
    assert ragged.lengths.tolist() == [2, 0, 1]
    assert ragged.row_of.tolist() == [0, 0, 2]
    with pytest.raises(IndexError, match=r"row must be in \[0, 3\), got 3"):
        ragged.row(3)
    with pytest.raises(IndexError):
        ragged.row(-1)


def test_taking_rows_equals_taking_them_one_by_one() -> None:
    random = np.random.default_rng(5)
    rows = [list(range(start, start + random.integers(0, 4))) for start in range(50)]
    ragged = Ragged.from_rows(rows)
    chosen = random.integers(0, 50, size=200)
    taken = ragged.take(chosen)
    assert [taken.row(at).tolist() for at in range(200)] == [rows[row] for row in chosen]
    assert len(ragged.take(np.array([], dtype=np.int64))) == 0


def test_parts_of_a_ragged_array_join() -> None:
    joined = Ragged.concat([Ragged.from_rows([["a"], []]), Ragged.from_rows([["b", "c"]])])
    assert [joined.row(index).tolist() for index in range(3)] == [["a"], [], ["b", "c"]]


@pytest.mark.parametrize(
    ("rows", "dtype", "expected"),
    [
        ([[1]], None, np.int64),
        ([[1.5]], None, np.float64),
        ([["a"]], None, object),
        ([[]], None, np.int64),
        ([[]], "string", object),
        ([[1]], "float", np.float64),
    ],
)
def test_the_first_value_or_the_caller_decides_the_type(
    rows: list[list[Any]], dtype: Any, expected: Any
) -> None:
    assert Ragged.from_rows(rows, dtype=dtype).values.dtype == expected


@pytest.mark.parametrize("rows", [[[1, 2.5]], [[1, "a"]], [["a", 1]], [[True]], [["1"], [2]]])
def test_mixed_values_are_refused_and_never_rounded(rows: list[list[Any]]) -> None:
    with pytest.raises(ValueError, match="values must be"):
        Ragged.from_rows(rows, dtype="string" if isinstance(rows[0][0], str) else "int")


@pytest.mark.parametrize(
    ("values", "offsets", "message"),
    [
        (np.zeros(2, np.int32), np.array([0, 2]), "values must be"),
        (np.zeros(2, np.int64), np.array([0, 1]), "offsets must rise"),
        (np.zeros(2, np.int64), np.array([0, 2, 1, 2]), "offsets must rise"),
        (np.zeros(2, np.int64), np.array([1, 2]), "offsets must rise"),
        (np.zeros(0, np.int64), np.array([], dtype=np.int64), "offsets must be"),
        (np.zeros(2, np.int64), np.array([0, 2], dtype=np.int32), "offsets must be"),
    ],
)
def test_a_broken_ragged_array_is_refused(values: Any, offsets: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Ragged(values, offsets)


def test_a_catalogue_that_fits_its_schema_is_accepted(catalogue: Catalogue) -> None:
    catalogue.validate(SCHEMA)
    assert len(catalogue) == 3


def test_taking_items_takes_every_column(catalogue: Catalogue) -> None:
    taken = catalogue.take(np.array([2, 0]))
    taken.validate(SCHEMA)
    assert taken.item_ids.tolist() == [20, 30]
    assert taken.categories["code"].row(0).tolist() == [3, 4]
    assert taken.numbers["year"].tolist() == [2000, 1990]
    assert taken.signals.tolist() == [[3], [1]]
    assert taken.fields["title"].tolist() == ["z", "x"]
    assert taken.features["words"].row(1).tolist() == ["w"]


def test_joining_parts_gives_the_whole_back(catalogue: Catalogue) -> None:
    parts = [catalogue.take(np.array(rows, dtype=np.int64)) for rows in ([0], [], [1, 2])]
    joined = Catalogue.concat(parts)
    joined.validate(SCHEMA)
    assert joined.item_ids.tolist() == catalogue.item_ids.tolist()
    for name, column in catalogue.categories.items():
        assert joined.categories[name].offsets.tolist() == column.offsets.tolist()
        assert joined.categories[name].values.tolist() == column.values.tolist()
    assert joined.fields["title"].tolist() == ["x", "y", "z"]
    assert joined.signals.tolist() == catalogue.signals.tolist()


def test_an_empty_catalogue_is_valid(catalogue: Catalogue) -> None:
    catalogue.take(np.array([], dtype=np.int64)).validate(SCHEMA)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"item_ids": np.array([1, -2, 3])}, "item_ids: must be 0 or more, got -2"),
        ({"item_ids": np.array([1, 2, 1])}, "item_ids: must be unique, got 1 more than once"),
        ({"item_ids": np.array([1, 2, 3], np.int32)}, r"item_ids: must be \(N,\) int64"),
        ({"categories": {}}, "genre: is declared by the schema but missing from categories"),
        ({"numbers": {"year": np.zeros(3, np.int64)}}, "rating: is declared by the schema"),
        ({"fields": {"title": as_column(["x"], "string")}}, r"title: must have shape \(3,\)"),
        ({"fields": {"title": np.zeros(3, np.int64)}}, "title: must be object for dtype string"),
        ({"signals": np.zeros((3, 2), np.float32)}, r"signals: must be \(3, 1\) float32"),
        ({"signals": np.zeros((3, 1))}, r"signals: must be \(3, 1\) float32, got float64"),
        (
            {"signals": np.array([[0], [np.inf], [0]], np.float32)},
            "popularity: must be finite, got inf for item 10",
        ),
        ({"features": {"words": Ragged.from_rows([["w"]])}}, "words: must have 3 rows, got 1"),
        (
            {"features": {"words": Ragged.from_rows([[1], [], []])}},
            "words: must be object for dtype string, got int64",
        ),
        (
            {"features": {"words": Ragged(np.array([1, 2], object), np.array([0, 1, 2, 2]))}},
            "words: must hold str, got int 1",
        ),
    ],
)
def test_a_wrong_column_is_named(
    catalogue: Catalogue, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(SchemaError, match=message):
        replace(catalogue, **change).validate(SCHEMA)


def test_an_undeclared_column_is_named(catalogue: Catalogue) -> None:
    numbers = {**catalogue.numbers, "length": np.zeros(3, np.int64)}
    with pytest.raises(SchemaError, match="length: is in numbers but not declared"):
        replace(catalogue, numbers=numbers).validate(SCHEMA)


NUMBERS = UserFeature(name="sizes", kind="numbers", dtype="float", width=2)


def test_item_features_of_numbers_have_their_width_or_nothing(catalogue: Catalogue) -> None:
    schema = SCHEMA.model_copy(update={"item_features": (*SCHEMA.item_features, NUMBERS)})
    sizes = Ragged.from_rows([[1.0, 2.0], [], [3.0, -4.0]], dtype="float")
    replace(catalogue, features={**catalogue.features, "sizes": sizes}).validate(schema)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([[1.0, 2.0], [3.0], []], "sizes: must have 2 values or none, got 1 in row 10"),
        ([[], [], [1.0, np.nan]], "sizes: position 1 must be a finite float32, got nan in row 20"),
        ([[], [np.inf, 0.0], []], "sizes: position 0 must be a finite float32, got inf in row 10"),
        (
            [[-1e39, 0.0], [], []],
            r"sizes: position 0 must be a finite float32, got -1e\+39 in row 30",
        ),
    ],
)
def test_wrong_numbers_of_an_item_are_named(
    catalogue: Catalogue, rows: list[list[float]], message: str
) -> None:
    schema = SCHEMA.model_copy(update={"item_features": (*SCHEMA.item_features, NUMBERS)})
    sizes = Ragged.from_rows(rows, dtype="float")
    with pytest.raises(SchemaError, match=message):
        replace(catalogue, features={**catalogue.features, "sizes": sizes}).validate(schema)


def test_numbers_that_are_ints_are_refused(catalogue: Catalogue) -> None:
    with pytest.raises(SchemaError, match="sizes: must be float64 for dtype float, got int64"):
        UserColumn(Ragged.from_rows([[1, 2]])).validate(NUMBERS)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (np.ones(2, np.float32), r"weights must be \(3,\) float32, got float32 \(2,\)"),
        (np.ones(3), r"weights must be \(3,\) float32, got float64 \(3,\)"),
        (np.array([1, np.inf, 1], np.float32), "weights must be finite, got inf"),
    ],
)
def test_weights_of_a_user_column_go_with_its_ids(weights: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        UserColumn(Ragged.from_rows([[1, 2], [3]]), weights)


def test_a_user_column_is_checked_against_its_feature() -> None:
    words = UserFeature(name="words", dtype="string")
    texts = UserFeature(name="texts", kind="text", dtype="string")
    column = UserColumn(Ragged.from_rows([["a"], ["b"]]), np.ones(2, np.float32))
    column.validate(words)
    with pytest.raises(SchemaError, match=r"texts: must have no weights, .*, got text"):
        column.validate(texts)
    with pytest.raises(SchemaError, match="words: must be object for dtype string, got int64"):
        UserColumn(Ragged.from_rows([[1]])).validate(words)
    with pytest.raises(SchemaError, match="sizes: must have 2 values or none, got 1 in row 1"):
        UserColumn(Ragged.from_rows([[1.0, 2.0], [3.0]])).validate(NUMBERS)


def test_a_user_column_keeps_the_last_ids_whose_weights_are_not_zero() -> None:
    values = Ragged.from_rows([[1, 2, 3], [], [4, 5, 6, 7, 8], [9]])
    weights = np.array([0, 2, 3, 4, 5, 0, 7, 0, 0], dtype=np.float32)
    kept = UserColumn(values, weights).kept(2)
    assert [kept.values.row(row).tolist() for row in range(4)] == [[2, 3], [], [5, 7], []]
    assert kept.weights is not None
    assert kept.weights.tolist() == [2.0, 3.0, 5.0, 7.0]
    alike = UserColumn(values).kept(2)
    assert [alike.values.row(row).tolist() for row in range(4)] == [[2, 3], [], [7, 8], [9]]
    assert alike.weights is None


def test_an_item_with_more_ids_than_are_kept_is_refused(catalogue: Catalogue) -> None:
    words = UserFeature(name="words", dtype="string", max_length=1)
    with pytest.raises(
        SchemaError, match="words: must have at most max_length=1 ids, got 2 of item 10"
    ):
        catalogue.validate(SCHEMA.model_copy(update={"item_features": (words,)}))
    texts = words.model_copy(update={"kind": "text"})
    catalogue.validate(SCHEMA.model_copy(update={"item_features": (texts,)}))

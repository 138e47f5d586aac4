import numpy as np
import pytest
from pydantic import ValidationError

from silvershard.model.request import WeightedIds
from silvershard.model.schema import (
    Attribute,
    Field,
    Schema,
    SchemaError,
    UserFeature,
    check_model,
)

SCHEMA = Schema(
    user_features=(
        UserFeature(name="history", max_length=3),
        UserFeature(name="genres", dtype="string"),
    ),
    item_features=(UserFeature(name="genres", dtype="string"),),
    attributes=(
        Attribute(name="genre", kind="category", dtype="string"),
        Attribute(name="year", kind="number", dtype="int"),
        Attribute(name="lang", kind="category", dtype="int"),
        Attribute(name="rating", kind="number", dtype="float"),
    ),
    signals=("popularity",),
    fields=(Field(name="title", dtype="string"),),
    heads=("rated", "liked"),
    tasks=("rate", "like"),
    value="score + $l * like",
    weights={"l": 2.0},
)


def test_a_schema_survives_the_way_through_json() -> None:
    assert Schema.model_validate(SCHEMA.model_dump(mode="json")) == SCHEMA
    assert Schema.model_validate_json(SCHEMA.model_dump_json()) == SCHEMA


def test_every_setting_is_described() -> None:
    for model in (UserFeature, Attribute, Field, Schema):
        for name, info in model.model_fields.items():
            assert info.description, f"{model.__name__}.{name}"


def test_a_schema_cannot_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        SCHEMA.tasks = ()  # type: ignore[misc]


def test_attributes_are_found_by_name_and_kind() -> None:
    assert SCHEMA.attribute("year") == SCHEMA.attributes[1]
    assert SCHEMA.attribute("title") is None
    assert [item.name for item in SCHEMA.categories] == ["genre", "lang"]
    assert [item.name for item in SCHEMA.numbers] == ["year", "rating"]


def test_value_columns_are_score_then_tasks_then_signals() -> None:
    assert SCHEMA.value_columns == ("score", "rate", "like", "popularity")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tasks": ("1like",)}, "name must match"),
        ({"signals": ("",)}, "name must match"),
        ({"signals": ("like",)}, "value column 'like' is declared twice"),
        ({"tasks": ("score",)}, "value column 'score' is declared twice"),
        ({"signals": ("Where",)}, "value column 'Where' is a keyword"),
        ({"heads": ("a", "a")}, "head 'a' is declared twice"),
        ({"heads": ()}, "at least 1 item"),
        ({"weights": {"l": float("nan")}}, "weight 'l' must be finite"),
        ({"weights": {}}, r"unknown weight \$l"),
        ({"value": "score + nothing"}, "position 8: unknown name 'nothing'"),
        ({"surprise": 1}, "Extra inputs are not permitted"),
        ({"attributes": SCHEMA.attributes * 2}, "attribute 'genre' is declared twice"),
        ({"fields": SCHEMA.fields * 2}, "field 'title' is declared twice"),
        ({"user_features": SCHEMA.user_features * 2}, "user feature 'history' is declared twice"),
    ],
)
def test_a_contradictory_schema_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Schema.model_validate({**dict(SCHEMA), **change})


@pytest.mark.parametrize(
    ("attribute", "message"),
    [
        ({"name": "a", "kind": "category", "dtype": "float"}, "must be int or string, got float"),
        ({"name": "a", "kind": "number", "dtype": "string"}, "must be int or float, got string"),
        ({"name": "Not", "kind": "category", "dtype": "int"}, "'Not' is a keyword"),
        ({"name": "a b", "kind": "category", "dtype": "int"}, "name must match"),
    ],
)
def test_a_contradictory_attribute_is_refused(attribute: dict[str, str], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Attribute.model_validate(attribute)


def test_features_are_completed_and_long_lists_keep_their_end() -> None:
    checked = SCHEMA.check_features({"history": [1, np.int64(2), 3, 4]})
    assert checked == {"history": (2, 3, 4), "genres": ()}
    assert all(type(value) is int for value in checked["history"])
    assert SCHEMA.check_features({"history": np.arange(9)})["history"] == (6, 7, 8)


@pytest.mark.parametrize(
    ("features", "field", "message"),
    [
        ({"age": [1]}, "age", "unknown user feature; the schema has genres, history"),
        ({"history": ["1"]}, "history", "position 0 must be an int, got str '1'"),
        ({"history": [1, 2.0]}, "history", "position 1 must be an int, got float 2.0"),
        ({"history": [True]}, "history", "position 0 must be an int, got bool True"),
        ({"history": np.array([True])}, "history", "position 0 must be an int, got bool True"),
        ({"history": [2**63]}, "history", "position 0 must be a 64-bit signed int"),
        ({"history": 5}, "history", "must be a list of int ids, got int"),
        ({"history": b"abc"}, "history", "must be a list of int ids, got bytes"),
        ({"history": bytearray(b"a")}, "history", "must be a list of int ids, got bytearray"),
        ({"genres": "Comedy"}, "genres", "must be a list of string ids, got str"),
        ({"genres": [3]}, "genres", "position 0 must be a string, got int 3"),
        ({"history": [None]}, "history", "position 0 must be an int, got NoneType None"),
    ],
)
def test_a_wrong_feature_is_named(features: dict[str, object], field: str, message: str) -> None:
    with pytest.raises(SchemaError) as caught:
        SCHEMA.check_features(features)  # type: ignore[arg-type]
    assert caught.value.field == field
    assert message in caught.value.message


TEXTS = Schema(
    user_features=(
        UserFeature(name="query", kind="text", dtype="string", max_length=2, max_characters=9),
    )
)


def test_texts_pass_as_they_are_and_the_last_are_kept() -> None:
    checked = TEXTS.check_features({"query": ["first", "two\nlines", "übergrö"]})
    assert checked == {"query": ("two\nlines", "übergrö")}
    assert TEXTS.check_features({}) == {"query": ()}
    assert TEXTS.check_features({"query": np.array(["a", "b"])}) == {"query": ("a", "b")}


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ("a heist", "must be a list of texts, got str"),
        ([b"heist"], "position 0 must be a string, got bytes b'heist'"),
        (["heist", 3], "position 1 must be a string, got int 3"),
        ([""], "position 0 must be a text that is not blank, got str ''"),
        ([" \n\t"], r"position 0 must be a text that is not blank, got str ' \n\t'"),
        (["0123456789"], "position 0 must be a text of at most 9 characters, got 10"),
        (["a\ud83d"], r"position 0 must be a text of valid Unicode, got str 'a\ud83d'"),
    ],
)
def test_a_wrong_text_is_named(texts: object, message: str) -> None:
    with pytest.raises(SchemaError) as caught:
        TEXTS.check_features({"query": texts})  # type: ignore[dict-item]
    assert caught.value.field == "query"
    assert caught.value.message == message


def test_a_text_feature_of_ints_is_refused() -> None:
    with pytest.raises(ValidationError, match="feature 'query': dtype of a text must be string"):
        UserFeature(name="query", kind="text")


NUMBERS = Schema(
    user_features=(
        UserFeature(name="age", kind="numbers", dtype="float"),
        UserFeature(name="taste", kind="numbers", dtype="float", width=3),
    )
)


def test_numbers_pass_as_float32_and_may_be_absent() -> None:
    checked = NUMBERS.check_features({"age": [0.1], "taste": np.array([1, 2, 3])})
    assert checked == {"age": (float(np.float32(0.1)),), "taste": (1.0, 2.0, 3.0)}
    assert NUMBERS.check_features({"age": [np.float16(2.5)]}) == {"age": (2.5,), "taste": ()}
    assert NUMBERS.check_features({"taste": [1, True - 1, 2.5]})["taste"] == (1.0, 0.0, 2.5)


@pytest.mark.parametrize(
    ("features", "field", "message"),
    [
        ({"age": 37}, "age", "must be a list of one number, got int"),
        ({"taste": "123"}, "taste", "must be a list of 3 numbers, got str"),
        ({"age": [1, 2]}, "age", "must have 1 values or none, got 2"),
        ({"taste": [1.0, 2.0]}, "taste", "must have 3 values or none, got 2"),
        ({"taste": [1, "2", 3]}, "taste", "position 1 must be a number, got str '2'"),
        ({"taste": [1, 2, None]}, "taste", "position 2 must be a number, got NoneType None"),
        ({"age": [True]}, "age", "position 0 must be a number, got bool True"),
        ({"age": [float("nan")]}, "age", "position 0 must be a finite float32, got float nan"),
        ({"age": [float("-inf")]}, "age", "position 0 must be a finite float32, got float -inf"),
        ({"age": [1e39]}, "age", "position 0 must be a finite float32, got float 1e+39"),
        ({"age": [10**400]}, "age", "position 0 must be a finite float32, got int 1000"),
        (
            {"age": WeightedIds((3,), (1.0,))},
            "age",
            "must have no weights, which go with ids alone, got numbers",
        ),
    ],
)
def test_wrong_numbers_are_named(features: dict[str, object], field: str, message: str) -> None:
    with pytest.raises(SchemaError) as caught:
        NUMBERS.check_features(features)  # type: ignore[arg-type]
    assert caught.value.field == field
    assert caught.value.message.startswith(message)


@pytest.mark.parametrize(
    ("feature", "message"),
    [
        ({"kind": "numbers"}, "feature 'a': dtype of numbers must be float, got int"),
        ({"dtype": "float"}, "feature 'a': dtype of ids must be int or string, got float"),
        ({"width": 2}, "feature 'a': width of ids must be 1, got 2"),
        ({"kind": "numbers", "dtype": "float", "width": 0}, "greater than or equal to 1"),
        ({"kind": "numbers", "dtype": "float", "width": 1025}, "less than or equal to 1024"),
    ],
)
def test_a_contradictory_feature_is_refused(feature: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        UserFeature.model_validate({"name": "a", **feature})


def test_weights_go_with_their_ids_and_are_cut_with_them() -> None:
    given = WeightedIds([1, np.int64(2), 3, 4], np.array([9, -0.5, 3, 2]))  # type: ignore[arg-type]
    checked = SCHEMA.check_features({"history": given})["history"]
    assert checked == WeightedIds((2, 3, 4), (-0.5, 3.0, 2.0))
    words = SCHEMA.check_features({"genres": WeightedIds(["a", "b"], [0.1, 1])})["genres"]
    assert words == WeightedIds(("a", "b"), (float(np.float32(0.1)), 1.0))


def test_an_id_of_weight_zero_takes_no_place_in_a_list_that_is_cut() -> None:
    given = WeightedIds([1, 2, 3, 4, 5], [2.0, 3.0, 0.0, -0.0, 1e-60])
    assert SCHEMA.check_features({"history": given})["history"] == WeightedIds((1, 2), (2.0, 3.0))
    ones = WeightedIds([1, 2, 3, 4, 5], [1, 1, 0, 0, 0])
    assert SCHEMA.check_features({"history": ones})["history"] == (1, 2)
    assert SCHEMA.check_features({"history": WeightedIds([1], [0])})["history"] == ()


def test_weights_that_are_all_one_are_no_weights() -> None:
    checked = SCHEMA.check_features({"history": WeightedIds([1, 2, 3, 4], [5, 1, 1.0, 1])})
    assert checked["history"] == (2, 3, 4)
    assert type(checked["history"]) is tuple
    assert SCHEMA.check_features({"history": WeightedIds([], [])})["history"] == ()


@pytest.mark.parametrize(
    ("ids", "weights", "message"),
    [
        ([1, 2], [1.0], "must have as many weights as ids, 2, got 1"),
        ([1], [1.0, 2.0], "must have as many weights as ids, 1, got 2"),
        ([1], [float("nan")], "weight 0 must be a finite float32, got float nan"),
        ([1, 2], [0, float("inf")], "weight 1 must be a finite float32, got float inf"),
        ([1], [-1e39], "weight 0 must be a finite float32, got float -1e+39"),
        ([1], ["1"], "weight 0 must be a number, got str '1'"),
        ([1], [True], "weight 0 must be a number, got bool True"),
        ([1], 1.0, "weights must be a list of numbers, got float"),
        ([1], "1", "weights must be a list of numbers, got str"),
        (["1"], [1.0], "position 0 must be an int, got str '1'"),
        (5, [1.0], "must be a list of int ids, got int"),
        ([1, 2, 3, 4], [float("nan"), 1, 1, 1], "weight 0 must be a finite float32, got float nan"),
    ],
)
def test_a_wrong_weight_is_named(ids: object, weights: object, message: str) -> None:
    with pytest.raises(SchemaError) as caught:
        SCHEMA.check_features({"history": WeightedIds(ids, weights)})  # type: ignore[arg-type]
    assert (caught.value.field, caught.value.message) == ("history", message)


def test_a_text_has_no_weights() -> None:
    with pytest.raises(SchemaError, match=r"query: must have no weights, .* got text"):
        TEXTS.check_features({"query": WeightedIds(["a"], [2.0])})


def test_a_wrong_id_is_found_even_where_the_list_is_cut() -> None:
    with pytest.raises(SchemaError, match="position 0"):
        SCHEMA.check_features({"history": ["old", 1, 2, 3]})


def test_a_model_fits_the_schema_that_declares_what_it_reads() -> None:
    check_model(SCHEMA, {})
    check_model(
        NUMBERS,
        {
            "heads": ["user"],
            "tasks": [],
            "user_numbers": [{"name": "age", "width": 1}, {"name": "taste", "width": 3}],
        },
    )
    check_model(SCHEMA, {"user_ids": [{"name": "genres", "dtype": "string", "size": 9}]})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"heads": ["liked"]}, r"heads: the schema has .*, the model was made for \('liked',\)"),
        (
            {"user_ids": [{"name": "tags", "dtype": "string", "size": 3}]},
            "user_ids: the model reads ids tags of dtype string, the schema has none",
        ),
        (
            {"user_ids": [{"name": "genres", "dtype": "int", "size": 3}]},
            "user_ids: the model reads ids genres of dtype int, the schema has dtype string",
        ),
        (
            {"user_numbers": [{"name": "genres", "width": 1}]},
            "user_numbers: the model reads numbers genres of width 1, the schema has none",
        ),
        (
            {"item_numbers": [{"name": "price", "width": 2}]},
            "item_numbers: the model reads numbers price of width 2, the schema has none",
        ),
        (
            {"tables": [{"name": "price", "dtype": "int", "size": 3}]},
            "tables: the model reads ids price of dtype int, the schema has none",
        ),
        (
            {"history": "clicks", "item": "price", "tables": [{"name": "price", "dtype": "int"}]},
            "history: the model reads ids clicks of dtype int, the schema has none",
        ),
    ],
)
def test_a_model_that_reads_something_else_is_refused(
    config: dict[str, object], message: str
) -> None:
    with pytest.raises(SchemaError, match=message):
        check_model(SCHEMA, config)


def test_numbers_of_another_width_are_refused() -> None:
    with pytest.raises(SchemaError, match="of width 2, the schema has dtype float, width 3"):
        check_model(NUMBERS, {"user_numbers": [{"name": "taste", "width": 2}]})

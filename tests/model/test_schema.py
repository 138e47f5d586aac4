import numpy as np
import pytest
from pydantic import ValidationError

from silvershard.model.schema import Attribute, Field, Schema, SchemaError, UserFeature

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


def test_a_wrong_id_is_found_even_where_the_list_is_cut() -> None:
    with pytest.raises(SchemaError, match="position 0"):
        SCHEMA.check_features({"history": ["old", 1, 2, 3]})

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from silvershard.kernels import Relation
from silvershard.model.filter_expr import NO_ITEM, And, AnyItem, Compare, Expr, Not, Or, Term
from silvershard.model.filter_parser import (
    MAX_DEPTH,
    MAX_LEAVES,
    MAX_TEXT,
    FilterError,
    parse_filter,
)
from silvershard.model.schema import Attribute, Schema

SCHEMA = Schema(
    attributes=(
        Attribute(name="genre", kind="category", dtype="string"),
        Attribute(name="code", kind="category", dtype="int"),
        Attribute(name="year", kind="number", dtype="int"),
        Attribute(name="rating", kind="number", dtype="float"),
    )
)


def parse(text: str, **params: Any) -> Expr:
    return parse_filter(text, params, SCHEMA)


def genre(value: str) -> Term:
    return Term("genre", value)


COMEDY, HORROR = genre("Comedy"), genre("Horror")
NEW = Compare("year", Relation.GE, 1990)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", AnyItem()),
        (" \n\t ", AnyItem()),
        ("genre:Comedy", COMEDY),
        ("  genre : Comedy  ", COMEDY),
        ("((genre:Comedy))", COMEDY),
        ("genre:Comedy AND NOT genre:Horror AND year >= 1990", And((COMEDY, Not(HORROR), NEW))),
        ("genre:Comedy & !genre:Horror & year>=1990", And((COMEDY, Not(HORROR), NEW))),
        ("genre:Comedy and not genre:Horror And year >= 1990", And((COMEDY, Not(HORROR), NEW))),
        ("genre:Comedy OR genre:Horror AND year>=1990", Or((COMEDY, And((HORROR, NEW))))),
        ("genre:Comedy AND genre:Horror | year>=1990", Or((And((COMEDY, HORROR)), NEW))),
        ("NOT genre:Comedy AND year>=1990", And((Not(COMEDY), NEW))),
        ("NOT (genre:Comedy OR year>=1990)", Not(Or((COMEDY, NEW)))),
        ("!!genre:Comedy", Not(Not(COMEDY))),
        ("genre IN (Comedy, Horror)", Or((COMEDY, HORROR))),
        ("genre in (Comedy)", COMEDY),
        ('genre IN (Comedy, "Sci-Fi")', Or((COMEDY, genre("Sci-Fi")))),
        ("genre:Sci-Fi", genre("Sci-Fi")),
        ("genre:v1.2_x", genre("v1.2_x")),
        ("genre:Komödie", genre("Komödie")),
        ("genre:or OR genre:AND", Or((genre("or"), genre("AND")))),
        ("genre IN (in, not)", Or((genre("in"), genre("not")))),
        (r'genre:"a \"b\" \\ \n\t\r \u00e9"', genre('a "b" \\ \n\t\r é')),
        ('genre:""', genre("")),
        ('genre:"x) OR genre:y"', genre("x) OR genre:y")),
        ("code:5", Term("code", 5)),
        ("code:-5", Term("code", -5)),
        ("code IN (1, 2)", Or((Term("code", 1), Term("code", 2)))),
        ("year:1990", Compare("year", Relation.EQ, 1990)),
        ("year = 1990", Compare("year", Relation.EQ, 1990)),
        ("year == 1990.0", Compare("year", Relation.EQ, 1990)),
        ("year != 1990", Compare("year", Relation.NE, 1990)),
        ("year<-5", Compare("year", Relation.LE, -6)),
        ("year > 1989.5", NEW),
        ("year:1990.5", NO_ITEM),
        ("year IN (1990, 1991)", Or(tuple(Compare("year", Relation.EQ, y) for y in (1990, 1991)))),
        ("rating >= 4", Compare("rating", Relation.GE, 4.0)),
        ("rating < 2.5e-1", Compare("rating", Relation.LT, 0.25)),
    ],
)
def test_filters_mean_this(text: str, expected: Expr) -> None:
    assert parse(text) == expected


@pytest.mark.parametrize(
    ("text", "params", "expected"),
    [
        ("genre:$g", {"g": "Comedy"}, COMEDY),
        ("genre:$g", {"g": 'x" OR genre:"y'}, genre('x" OR genre:"y')),
        ("genre:$g", {"g": ["Comedy", "Horror"]}, Or((COMEDY, HORROR))),
        ("genre IN $g", {"g": ("Comedy", "Horror")}, Or((COMEDY, HORROR))),
        ("genre IN $g", {"g": "Comedy"}, COMEDY),
        ("genre IN (Comedy, $g)", {"g": ["Horror"]}, Or((COMEDY, HORROR))),
        ("genre IN ($g, Horror)", {"g": []}, HORROR),
        ("genre IN $g", {"g": []}, NO_ITEM),
        ("NOT genre:$g", {"g": []}, Not(NO_ITEM)),
        ("year >= $y", {"y": 1990}, NEW),
        ("year >= $y", {"y": [1990]}, NEW),
        ("year >= $y", {"y": np.int32(1990)}, NEW),
        ("year > $y", {"y": 1989.5}, NEW),
        ("code IN $c", {"c": np.array([1, 2])}, Or((Term("code", 1), Term("code", 2)))),
        ("code:$c", {"c": np.array(7)}, Term("code", 7)),
        ("year >= $y OR year >= $y", {"y": 1990}, Or((NEW, NEW))),
    ],
)
def test_parameters_are_bound_as_values(text: str, params: Any, expected: Expr) -> None:
    assert parse_filter(text, params, SCHEMA) == expected


@pytest.mark.parametrize(
    ("text", "params", "position", "message"),
    [
        ("gener:Comedy", {}, 0, "unknown attribute 'gener'; the schema has genre, code, year"),
        ("year>5 & gener:Comedy", {}, 9, "unknown attribute 'gener'"),
        ("genre < Comedy", {}, 6, "is a category and cannot be compared with '<'; use ':' or IN"),
        ("genre = Comedy", {}, 6, "cannot be compared with '='"),
        ("year:Comedy", {}, 5, "attribute 'year' holds numbers, got the string 'Comedy'"),
        ('year > "5"', {}, 7, "attribute 'year' holds numbers, got the string '5'"),
        ("code:x", {}, 5, "attribute 'code' holds ints, got the string 'x'"),
        ("code:1.5", {}, 5, "attribute 'code' holds ints, got the number 1.5"),
        ("code:9223372036854775808", {}, 5, "holds 64-bit ints, got 9223372036854775808"),
        ("genre:5", {}, 6, "holds strings, got the number 5; put it in double quotes"),
        ("genre:", {}, 6, "expected a value, got the end"),
        ("genre:)", {}, 6, "expected a value, got ')'"),
        ("genre", {}, 5, "expected ':', IN or a comparison after attribute 'genre', got the end"),
        ("genre Comedy", {}, 6, "expected ':', IN or a comparison after attribute 'genre'"),
        ("genre:a genre:b", {}, 8, "expected AND, OR or the end of the filter, got 'genre'"),
        ("(genre:a", {}, 8, "expected ')' for the '(' at position 0, got the end"),
        ("genre:a)", {}, 7, "expected AND, OR or the end of the filter, got ')'"),
        ("genre:a AND", {}, 11, "expected an attribute, NOT or '(', got the end"),
        ("AND genre:a", {}, 0, "expected an attribute, NOT or '(', got 'AND'"),
        ("genre:a OR OR genre:b", {}, 11, "expected an attribute, NOT or '('"),
        ("genre:a NOT genre:b", {}, 8, "expected AND, OR or the end of the filter, got 'NOT'"),
        ("()", {}, 1, "expected an attribute, NOT or '(', got ')'"),
        ('"genre":a', {}, 0, "expected an attribute, NOT or '('"),
        ("5 < year", {}, 0, "expected an attribute, NOT or '(', got 5"),
        ("genre IN Comedy", {}, 9, "expected '(' or a parameter after IN, got 'Comedy'"),
        ("genre IN ()", {}, 10, "expected a value, got ')'"),
        ("genre IN (a b)", {}, 12, "expected ',' or ')', got 'b'"),
        ("genre IN (a,", {}, 12, "expected a value, got the end"),
        ('genre:"abc', {}, 6, "string has no closing"),
        (r'genre:"a\x"', {}, 8, "unknown escape"),
        (r'genre:"\ud800"', {}, 7, "half of a character"),
        ("genre:a ; genre:b", {}, 8, "unexpected character ';'"),
        ("genre:3d", {}, 6, "malformed number; put text that begins with a digit in quotes"),
        ("year > 1.5.2", {}, 7, "malformed number"),
        ("year > .5", {}, 7, "unexpected character '.'"),
        ("year > 1e999", {}, 7, "number '1e999' is too large"),
        ("year > " + "9" * 401, {}, 7, "number must have at most 400 digits"),
        ("year > 1 < 3", {}, 9, "expected AND, OR or the end of the filter, got '<'"),
        ("year > $", {}, 7, "expected a name after '$'"),
        ("year > $y", {}, 7, "parameter 'y' has no value; given are none"),
        ("year > $y", {"x": 1, "z": 2}, 7, "parameter 'y' has no value; given are x, z"),
        ("year > 1", {"y": 1}, 8, "parameter 'y' is given but not used"),
        ("", {"y": 1}, 0, "parameter 'y' is given but not used"),
        ("$y > 1", {"y": 1}, 0, "expected an attribute, NOT or '(', got $y"),
        ("year > $y", {"y": True}, 7, "parameter 'y' must be ints, floats or strings, got bool"),
        ("year > $y", {"y": None}, 7, "must be ints, floats or strings, got NoneType"),
        ("year > $y", {"y": float("nan")}, 7, "parameter 'y' must be finite, got nan"),
        ("year > $y", {"y": float("inf")}, 7, "parameter 'y' must be finite, got inf"),
        ("year > $y", {"y": 10**5000}, 7, "parameter 'y' must have at most 400 digits"),
        ("year > $y", {"y": "x"}, 7, "attribute 'year' holds numbers, got the string 'x'"),
        ("year > $y", {"y": [1, 2]}, 5, "'>' needs one value, got a list of 2"),
        ("year > $y", {"y": []}, 5, "'>' needs one value, got a list of 0"),
        ("genre:$g", {"g": ["a", 5]}, 6, "holds strings, got the number 5"),
        ("genre:$g", {"g": b"a"}, 6, "must be ints, floats or strings, got bytes"),
        ("genre:$g", {"g": [["a"]]}, 6, "must be ints, floats or strings, got list"),
        ("genre:$g", {"g": np.array([["a"]])}, 6, "must be ints, floats or strings, got list"),
    ],
)
def test_errors_name_the_position_and_the_cause(
    text: str, params: Any, position: int, message: str
) -> None:
    with pytest.raises(FilterError) as caught:
        parse_filter(text, params, SCHEMA)
    assert caught.value.position == position
    assert message in caught.value.message


def test_the_text_of_an_error_points_at_the_position() -> None:
    with pytest.raises(FilterError) as caught:
        parse("genre:Comedy AND gener:Drama")
    first, line, caret = str(caught.value).splitlines()
    assert first.startswith("position 17: unknown attribute 'gener'")
    assert line.strip() == "genre:Comedy AND gener:Drama"
    assert line[caret.index("^") :] == "gener:Drama"


def test_an_error_far_into_a_long_text_shows_its_surroundings() -> None:
    text = "genre:a OR\n" * 1000 + "gener:b"
    with pytest.raises(FilterError) as caught:
        parse(text)
    _, line, caret = str(caught.value).splitlines()
    assert len(line) <= 62
    assert line[caret.index("^") :] == "gener:b"


def refused(text: str, **params: Any) -> FilterError:
    with pytest.raises(FilterError) as caught:
        parse(text, **params)
    return caught.value


def test_the_length_is_limited() -> None:
    parse('genre:"' + "x" * (MAX_TEXT - 8) + '"')
    error = refused('genre:"' + "x" * (MAX_TEXT - 7) + '"')
    assert error.message == "filter must be at most 65536 characters, got 65537"
    assert error.position == MAX_TEXT
    half = "x" * 40_000
    parse("genre:$a", a=half)
    assert "must be at most 65536 characters" in refused("genre IN $a", a=[half, half]).message


@pytest.mark.parametrize(("opening", "closing"), [("(", ")"), ("NOT ", ""), ("!(", ")")])
def test_the_depth_is_limited(opening: str, closing: str) -> None:
    levels = MAX_DEPTH // len(opening.replace("NOT ", "!"))
    parse(opening * levels + "genre:a" + closing * levels)
    deeper = levels + 1
    error = refused(opening * deeper + "genre:a" + closing * deeper)
    assert error.message.startswith("filter must be nested at most 64 deep")


def test_the_number_of_leaves_is_limited() -> None:
    values = [f"v{number}" for number in range(MAX_LEAVES)]
    parse(" OR ".join(f"genre:{value}" for value in values))
    parse("genre IN $v", v=values)
    one_more = "filter must have at most 1024 values and comparisons"
    assert one_more in refused(" OR ".join(f"genre:{v}" for v in [*values, "x"])).message
    assert one_more in refused("genre IN $v", v=[*values, "x"]).message
    assert one_more in refused("year > 5 AND genre IN $v", v=values).message
    assert one_more in refused("genre IN $v OR genre IN $v", v=values[:513]).message


@pytest.mark.parametrize(
    "text",
    [
        "(" * 65_000,
        "(" * 100_000,
        "!" * 65_000,
        "NOT " * 16_000,
        ")" * 65_000,
        '"' * 65_001,
        "\\" * 65_000,
        'genre:"' + "\\" * 65_001,
        "genre:" + "9" * 60_000,
        "year>" + "1e" * 30_000,
        "$" * 65_000,
        "genre:a AND " * 5_000,
        "genre IN (" + "a," * 30_000,
        "\0" * 65_000,
        "\ud800" * 65_000,
        "genre:a\u2028" * 7_000,
        " " * 65_536 + "x",
    ],
    ids=lambda text: ascii(text[:12]),
)
def test_long_garbage_is_an_error_and_nothing_worse(text: str) -> None:
    assert len(str(refused(text))) < 400


PIECES = st.sampled_from(
    [
        *("genre", "code", "year", "rating", "nothing", ":", "IN", "in", "(", ")", ",", "<", "<="),
        *("=", "==", "!=", ">=", ">", "AND", "OR", "NOT", "and", "&", "|", "!", "$p", "$list", "$"),
        *("5", "-5", "1.5", "1e9", "Comedy", '"a b"', '"', "\\", " ", "\n", "é", "😀", "\0", "-"),
    ]
)


def parsed_or_refused(text: str, params: Any) -> Expr | FilterError:
    try:
        return parse_filter(text, params, SCHEMA)
    except FilterError as error:
        return error


@settings(max_examples=1000, deadline=None)
@given(st.lists(PIECES, max_size=30), st.booleans())
def test_shuffled_pieces_parse_or_give_a_filter_error(pieces: list[str], spaced: bool) -> None:
    text = (" " if spaced else "").join(pieces)
    result = parsed_or_refused(text, {"p": 5, "list": ["a"]})
    if isinstance(result, FilterError):
        assert 0 <= result.position <= len(text)
        assert str(result)


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=80), st.dictionaries(st.text(max_size=3), st.none() | st.floats()))
def test_random_text_parses_or_gives_a_filter_error(text: str, params: Any) -> None:
    result = parsed_or_refused(text, params)
    if isinstance(result, FilterError):
        assert 0 <= result.position <= len(text)
        assert str(result)


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=20))
def test_every_string_can_be_bound(value: str) -> None:
    assert parse("genre:$v", v=value) == genre(value)

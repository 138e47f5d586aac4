import math
import pickle
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from silvershard.kernels import MAX_VALUE_STACK, ValueOp, value_program
from silvershard.model.value import (
    MAX_DEPTH,
    MAX_LEAVES,
    MAX_TEXT,
    VALUE_KEYWORDS,
    CompiledValue,
    ValueFormulaError,
    compile_value,
)

COLUMNS = ("score", "like", "share", "age_hours")
WEIGHTS = {"w": 2.5, "zero": 0.0, "unused": -1.0}
ROWS = np.array(
    [
        [0.5, 0.25, 0.0, 1.0],
        [-1.5, 0.75, 3.0, 30.0],
        [0.1, -0.0, 1e-3, 24.0],
        [7.0, 2.0, -2.0, -1.0],
        [1e30, -1e30, 3.0, 1e-30],
    ],
    dtype=np.float32,
)


def run(compiled: CompiledValue, rows: Any = ROWS) -> list[float]:
    columns = torch.from_numpy(np.asarray(rows, dtype=np.float32))
    request = torch.zeros(len(columns), dtype=torch.int64)
    return value_program(columns, request, compiled.ops[None], compiled.constants[None]).tolist()


def value_of(formula: str, *row: float) -> float:
    return run(compile_value(formula, COLUMNS, WEIGHTS), [row or (1.0, 2.0, 3.0, 4.0)])[0]


@pytest.mark.parametrize(
    ("formula", "expected"),
    [
        # The row is score 1, like 2, share 3, age_hours 4; $w is 2.5.
        ("score", 1.0),
        ("1.0*like + 4.0*share*where(age_hours < 24, 1.5, 1) - 20*score", 0.0),
        ("like + share * age_hours", 14.0),
        ("(like + share) * age_hours", 20.0),
        ("like - share - age_hours", -5.0),
        ("like - (share - age_hours)", 3.0),
        ("age_hours / like / like", 1.0),
        ("-like * share", -6.0),
        ("--like", 2.0),
        ("like - -share", 5.0),
        ("$w * like", 5.0),
        ("where(like > share, 10, 20)", 20.0),
        ("where(like < share, 10, 20)", 10.0),
        ("where(0, 1, like)", 2.0),
        ("min(like, share, score)", 1.0),
        ("max(like, share, score, age_hours)", 4.0),
        ("clip(like, 3, 5)", 3.0),
        ("clip(like, 0, 1.5)", 1.5),
        ("clip(like, 0, 5)", 2.0),
        ("abs(like - share)", 1.0),
        ("sqrt(age_hours)", 2.0),
        ("log(score)", 0.0),
        ("exp(score - 1)", 1.0),
        ("like < share", 1.0),
        ("like <= 2", 1.0),
        ("like > share", 0.0),
        ("like >= 2", 1.0),
        ("like == 2", 1.0),
        ("like != 2", 0.0),
        ("not like", 0.0),
        ("not like == 3", 1.0),
        ("not not like", 1.0),
        ("like and 0", 0.0),
        ("like or 0", 1.0),
        ("1 or 0 and 0", 1.0),
        ("(1 or 0) and 0", 0.0),
        ("not 0 and 0", 0.0),
        ("like + 1 == 3 AND Not share < like", 1.0),
        ("1 + (like > 1) * 5", 6.0),
        (".5 + 5. + 1e-1 + 2E+0", 7.6),
        ("where($zero > 0, score / $zero, like)", 2.0),
        ("where($zero == 0, 0, log($zero)) + like", 2.0),
        (" \n score \t", 1.0),
    ],
)
def test_formulas_mean_this(formula: str, expected: float) -> None:
    assert value_of(formula) == pytest.approx(expected, rel=1e-6)


def test_a_program_is_this_by_hand() -> None:
    compiled = compile_value("like * $w - clip(score, 0, 1)", COLUMNS, WEIGHTS)
    assert compiled.ops.tolist() == [
        [ValueOp.COLUMN, 1],
        [ValueOp.CONST, 0],
        [ValueOp.MUL, 0],
        [ValueOp.COLUMN, 0],
        [ValueOp.CONST, 0],
        [ValueOp.MAX, 0],
        [ValueOp.CONST, 0],
        [ValueOp.MIN, 0],
        [ValueOp.SUB, 0],
    ]
    assert compiled.constants.tolist() == [0, 2.5, 0, 0, 0, 0, 1, 0, 0]
    assert compiled.ops.dtype == torch.int32
    assert compiled.constants.dtype == torch.float32


@pytest.fixture(autouse=True)
def _quiet_numpy() -> Any:
    with np.errstate(all="ignore"):
        yield


F32 = np.float32


class Case(NamedTuple):
    text: str
    values: Any
    constant: bool
    refused: bool = False
    """Whether something depends on a part that is finite for no candidate."""
    fault: bool = False
    """Whether the whole is such a part."""


BINARY: dict[str, Callable[[Any, Any], Any]] = {
    "+": np.add,
    "-": np.subtract,
    "*": np.multiply,
    "/": np.divide,
    "<": lambda a, b: F32(1) * (a < b),
    "<=": lambda a, b: F32(1) * (a <= b),
    ">": lambda a, b: F32(1) * (a > b),
    ">=": lambda a, b: F32(1) * (a >= b),
    "==": lambda a, b: F32(1) * (a == b),
    "!=": lambda a, b: F32(1) * (a != b),
    "and": lambda a, b: F32(1) * ((a != 0) & (b != 0)),
    "or": lambda a, b: F32(1) * ((a != 0) | (b != 0)),
}


@st.composite
def atoms(draw: st.DrawFn) -> Case:
    kind = draw(st.sampled_from(["column", "number", "weight"]))
    if kind == "column":
        column = draw(st.integers(0, len(COLUMNS) - 1))
        return Case(COLUMNS[column], ROWS[:, column], constant=False)
    if kind == "weight":
        name = draw(st.sampled_from(sorted(WEIGHTS)))
        text, number = f"${name}", str(WEIGHTS[name])
    else:
        number = draw(st.sampled_from(["0", "1", "0.1", "3.5", "1e-3", "16777217", "2e10"]))
        text = number
    return Case(text, np.full(len(ROWS), float(number), F32), constant=True)


@st.composite
def compounds(draw: st.DrawFn, inner: st.SearchStrategy[Case]) -> Case:
    parts = [draw(inner), draw(inner), draw(inner)]
    (a, b, c), (x, y, z) = [part.text for part in parts], [part.values for part in parts]
    kind = draw(st.sampled_from(["binary", "binary", "binary", "-", "not", "call"]))
    calls = [
        (1, f"-({a})", lambda: -x),
        (1, f"not ({a})", lambda: F32(1) * (x == 0)),
        (1, f"abs({a})", lambda: np.abs(x)),
        (1, f"sqrt({a})", lambda: np.sqrt(x)),
        (2, f"min({a}, {b})", lambda: np.minimum(x, y)),
        (3, f"max({a}, {b}, {c})", lambda: np.maximum(np.maximum(x, y), z)),
        (3, f"clip({a}, {b}, {c})", lambda: np.minimum(np.maximum(x, y), z)),
        (3, f"where({a}, {b}, {c})", lambda: np.where(x != 0, y, z)),
    ]
    zero = False
    if kind == "binary":
        symbol = draw(st.sampled_from(sorted(BINARY)))
        used, text, values = 2, f"({a}) {symbol} ({b})", BINARY[symbol](x, y)
        zero = symbol == "/" and parts[1].constant and bool((y == 0).all())
    else:
        used, text, make = {"-": calls[0], "not": calls[1]}.get(kind) or draw(
            st.sampled_from(calls[2:])
        )
        values = make()
    refused = any(part.refused for part in parts[:used])
    if text.startswith("where") and parts[0].constant and not parts[0].fault:
        chosen = parts[1] if x[0] != 0 else parts[2]
        return Case(text, values, chosen.constant, refused, chosen.fault)
    refused |= any(part.fault for part in parts[:used])
    constant = not zero and all(part.constant for part in parts[:used])
    fault = zero or (constant and not np.isfinite(values).all())
    return Case(text, values, constant and not fault, refused, fault)


@settings(max_examples=300, deadline=None)
@given(st.recursive(atoms(), compounds, max_leaves=15))
def test_random_formulas_equal_numpy_in_float32(case: Case) -> None:
    formula, expected = case.text, case.values
    if case.refused or case.fault:
        with pytest.raises(ValueFormulaError, match=r"divides by zero|is not finite"):
            compile_value(formula, COLUMNS, WEIGHTS)
        return
    with np.errstate(all="ignore"):
        wanted = np.where(np.isnan(expected), -np.inf, expected).astype(F32)
    got = np.array(run(compile_value(formula, COLUMNS, WEIGHTS)), dtype=F32)
    assert got.tolist() == wanted.tolist(), formula


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from([*"+-*/"]), st.sampled_from(["", "-"]), st.integers(0, 3)),
        min_size=1,
        max_size=12,
    )
)
def test_precedence_and_grouping_are_those_of_python(parts: list[tuple[str, str, int]]) -> None:
    row = [1.5, 2.0, 0.75, 3.0]
    formula = "score" + "".join(
        f" {symbol} {sign}{COLUMNS[column]}" for symbol, sign, column in parts
    )
    names = {name: F32(number) for name, number in zip(COLUMNS, row, strict=True)}
    expected = eval(formula, {"__builtins__": {}}, names)
    assert value_of(formula, *row) == float(expected)


@pytest.mark.parametrize(
    ("formula", "position", "message"),
    [
        ("", 0, "expected a number, a name, a $weight or '(', got the end"),
        ("likes", 0, "unknown name 'likes'; the columns are score, like, share, age_hours"),
        ("like + abs", 7, "unknown name 'abs'; the columns are"),
        ("like + abs", 7, "abs is a function"),
        ("2 * $q", 4, "unknown weight $q; the weights are $w, $zero, $unused"),
        ("pow(like, 2)", 0, "unknown function 'pow'; there are abs, clip, exp, log, max, min"),
        ("__import__('os')", 0, "unknown function '__import__'"),
        ("like.real", 4, "unexpected character '.'"),
        ("like + .5.5", 7, "malformed number"),
        ("like[0]", 4, "unexpected character '['"),
        ("like ** 2", 6, "expected a number, a name, a $weight or '(', got '*'"),
        ("like = 2", 5, "unexpected character '='"),
        ("like +", 6, "got the end"),
        ("like 2", 5, "expected an operator or the end of the formula, got '2'"),
        ("(like", 5, "expected ')' for the '(' at position 0, got the end"),
        ("like)", 4, "expected an operator or the end of the formula, got ')'"),
        ("()", 1, "expected a number"),
        ("min()", 4, "expected a number"),
        ("min(like)", 0, "min takes at least 2 arguments, got 1"),
        ("abs(like, like)", 0, "abs takes 1 argument, got more"),
        ("where(like, 1)", 0, "where takes 3 arguments, got 2"),
        ("clip(like, 1, 2, 3)", 0, "clip takes 3 arguments, got more"),
        ("abs(like", 8, "expected ')' after the arguments of abs, got the end"),
        ("1 < 2 < 3", 6, "comparisons do not chain"),
        ("like == 2 != 3", 10, "comparisons do not chain"),
        ("like + not share", 7, "expected a number, a name, a $weight or '(', got 'not'"),
        ("and like", 0, "expected a number"),
        ("1e39", 0, "1e39 must be finite in float32"),
        ("score / 0", 6, "formula divides by zero"),
        ("like + score / (1 - 1)", 13, "formula divides by zero"),
        ("score / $zero", 6, "formula divides by zero"),
        ("where(share > 0, score / 0, 1)", 23, "formula divides by zero"),
        ("where(1, score / $zero, 1)", 15, "formula divides by zero"),
        ("like * exp(1000)", 7, "this part of the formula is not finite, whatever the candidate"),
        ("like * log(0)", 7, "this part of the formula is not finite, whatever the candidate"),
        ("like + 3e38 * 2", 12, "this part of the formula is not finite, whatever the candidate"),
        ("1e999", 0, "1e999 must be finite in float32"),
        ("1e-60", 0, "1e-60 is too small for float32"),
        ("1.2.3", 0, "malformed number"),
        ("3d", 0, "malformed number"),
        ("nan", 0, "unknown name 'nan'"),
        ("$", 0, "expected a name after '$'"),
        ("like @ 2", 5, "unexpected character '@'"),
        ("līke", 1, "unexpected character 'ī'"),
    ],
)
def test_errors_name_the_position_and_the_cause(formula: str, position: int, message: str) -> None:
    with pytest.raises(ValueFormulaError) as caught:
        compile_value(formula, COLUMNS, WEIGHTS)
    assert caught.value.position == position
    assert message in caught.value.message


def test_the_text_of_an_error_points_at_the_position() -> None:
    with pytest.raises(ValueFormulaError) as caught:
        compile_value("like + likes", COLUMNS, WEIGHTS)
    first, line, caret = str(caught.value).splitlines()
    assert first.startswith("position 7: unknown name 'likes'")
    assert line[caret.index("^") :] == "likes"
    copy = pickle.loads(pickle.dumps(caught.value))
    assert str(copy) == str(caught.value)


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (math.nan, "must be finite"),
        (math.inf, "must be finite"),
        (1e300, "must be finite in float32"),
        (10**400, "must be finite in float32"),
        (1e-300, "is too small for float32"),
        (True, "must be a number, got bool"),
        ("2", "must be a number, got str"),
    ],
)
def test_a_weight_that_float32_cannot_hold_is_refused(weight: Any, message: str) -> None:
    with pytest.raises(ValueFormulaError, match=r"\$w " + message) as caught:
        compile_value("like * $w", COLUMNS, {"w": weight})
    assert caught.value.position == 7


def test_numpy_weights_and_negative_zero_are_numbers() -> None:
    assert run(compile_value("$w", (), {"w": np.float64(1.5)}), [[]]) == [1.5]
    assert run(compile_value("$w", (), {"w": np.int64(-3)}), [[]]) == [-3.0]
    assert run(compile_value("$w", (), {"w": -0.0}), [[]]) == [0.0]


def refused(formula: str) -> ValueFormulaError:
    with pytest.raises(ValueFormulaError) as caught:
        compile_value(formula, COLUMNS, WEIGHTS)
    return caught.value


def test_the_length_is_limited() -> None:
    compile_value("score" + " " * (MAX_TEXT - 5), COLUMNS, WEIGHTS)
    error = refused("score" + " " * (MAX_TEXT - 4))
    assert "formula must be at most 65536 characters, got 65537" in str(error)


@pytest.mark.parametrize(
    ("opening", "closing"), [("(", ")"), ("-", ""), ("not ", ""), ("abs(", ")")]
)
def test_the_depth_is_limited(opening: str, closing: str) -> None:
    compile_value(opening * MAX_DEPTH + "1" + closing * MAX_DEPTH, COLUMNS, WEIGHTS)
    error = refused(opening * (MAX_DEPTH + 1) + "1" + closing * (MAX_DEPTH + 1))
    assert "formula must be nested at most 64 deep" in str(error)


def test_the_stack_is_limited_where_the_operator_would_overflow_it() -> None:
    fits = "1 + (" * (MAX_VALUE_STACK - 1) + "1" + ")" * (MAX_VALUE_STACK - 1)
    assert value_of(fits) == MAX_VALUE_STACK
    error = refused("1 + (" * MAX_VALUE_STACK + "1" + ")" * MAX_VALUE_STACK)
    assert "keeps more than 32 values waiting here" in str(error)
    assert error.position == 5 * MAX_VALUE_STACK
    mirrored = "(" * 63 + "1" + " + 1)" * 63
    assert value_of(mirrored) == 64


def test_the_number_of_leaves_is_limited() -> None:
    assert value_of(" + ".join(["score"] * MAX_LEAVES)) == MAX_LEAVES
    assert "at most 1024 numbers and names" in str(refused(" + ".join(["1"] * (MAX_LEAVES + 1))))


@pytest.mark.parametrize(
    "formula",
    [
        "(" * 65_000,
        "-" * 65_000,
        "not " * 16_000,
        "abs(" * 16_000,
        "max(" * 16_000,
        "9" * 65_000,
        "1e" * 30_000,
        "." * 65_000,
        "1," * 30_000,
        "$" * 65_000,
        "\0" * 65_000,
        "\ud800" * 65_000,
        "1 <" * 20_000,
        "x" * 100_000,
    ],
    ids=lambda formula: ascii(formula[:6]),
)
def test_long_garbage_is_an_error_and_nothing_worse(formula: str) -> None:
    assert len(str(refused(formula))) < 400


PIECES = st.sampled_from(
    [
        *("score", "like", "$w", "$q", "$", "1", "2.5", "1e9", ".", "(", ")", ",", "+", "-", "*"),
        *("/", "<", "<=", "==", "!=", ">", ">=", "=", "and", "or", "not", "where", "min", "clip"),
        *("abs", "log", "é", "\n", "'", "_", "lambda", "[", "0x1"),
    ]
)


def compiled_or_refused(formula: str) -> CompiledValue | ValueFormulaError:
    try:
        return compile_value(formula, COLUMNS, WEIGHTS)
    except ValueFormulaError as error:
        return error


@settings(max_examples=1000, deadline=None)
@given(st.lists(PIECES, max_size=25), st.booleans())
def test_shuffled_pieces_compile_or_give_a_formula_error(pieces: list[str], spaced: bool) -> None:
    formula = (" " if spaced else "").join(pieces)
    result = compiled_or_refused(formula)
    if isinstance(result, CompiledValue):
        assert all(not math.isnan(value) for value in run(result))
    else:
        assert 0 <= result.position <= len(formula)


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=60))
def test_random_text_compiles_or_gives_a_formula_error(formula: str) -> None:
    result = compiled_or_refused(formula)
    if isinstance(result, ValueFormulaError):
        assert 0 <= result.position <= len(formula)
        assert str(result)


def test_every_function_and_word_operator_is_a_keyword() -> None:
    assert sorted(VALUE_KEYWORDS) == [
        *("abs", "and", "clip", "exp", "log", "max", "min", "not", "or", "sqrt", "where")
    ]

import math
import operator
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from silvershard.kernels import Relation
from silvershard.model.dtypes import INT64_MAX, INT64_MIN
from silvershard.model.filter_expr import (
    NO_ITEM,
    And,
    AnyItem,
    Compare,
    Expr,
    Not,
    Or,
    Term,
    canonical,
    normalise,
    typed_comparison,
)

A, B, C = Term("genre", "a"), Term("genre", "b"), Term("genre", "c")
YEAR = Compare("year", Relation.GE, 1990)

LEAVES: list[Expr] = [A, B, C, YEAR, Term("code", 5), Term("genre", "5"), AnyItem()]
EXPRESSIONS = st.recursive(
    st.sampled_from(LEAVES),
    lambda inner: st.one_of(
        st.builds(Not, inner),
        st.lists(inner, min_size=2, max_size=3).map(lambda members: And(tuple(members))),
        st.lists(inner, min_size=2, max_size=3).map(lambda members: Or(tuple(members))),
    ),
    max_leaves=12,
)
# Every combination of truth of the six leaves that can differ.
WORLDS = [
    {leaf: bool(bits >> number & 1) for number, leaf in enumerate(LEAVES[:6])} for bits in range(64)
]


def holds(expr: Expr, world: dict[Expr, bool]) -> bool:
    if isinstance(expr, AnyItem):
        return True
    if isinstance(expr, Not):
        return not holds(expr.operand, world)
    if isinstance(expr, And):
        return all(holds(operand, world) for operand in expr.operands)
    if isinstance(expr, Or):
        return any(holds(operand, world) for operand in expr.operands)
    return world[expr]


def meaning(expr: Expr) -> tuple[bool, ...]:
    return tuple(holds(expr, world) for world in WORLDS)


@settings(max_examples=300, deadline=None)
@given(EXPRESSIONS)
def test_normalising_keeps_the_meaning(expr: Expr) -> None:
    assert meaning(normalise(expr)) == meaning(expr)


@settings(max_examples=300, deadline=None)
@given(EXPRESSIONS)
def test_a_normal_form_is_normal(expr: Expr) -> None:
    def check(normal: Expr) -> None:
        if isinstance(normal, Not):
            assert isinstance(normal.operand, Term | Compare)
        elif isinstance(normal, And | Or):
            assert len(set(normal.operands)) == len(normal.operands) >= 2
            for operand in normal.operands:
                assert not isinstance(operand, type(normal) | AnyItem)
                assert operand != NO_ITEM
                check(operand)

    normal = normalise(expr)
    assert normalise(normal) == normal
    assert canonical(normal) == canonical(expr)
    if normal != NO_ITEM:
        check(normal)


@settings(max_examples=300, deadline=None)
@given(EXPRESSIONS, EXPRESSIONS)
def test_equal_canonical_texts_mean_the_same(left: Expr, right: Expr) -> None:
    if canonical(left) == canonical(right):
        assert meaning(left) == meaning(right)
    assert (canonical(left) == canonical(right)) == (normalise(left) == normalise(right))


@settings(max_examples=200, deadline=None)
@given(EXPRESSIONS, EXPRESSIONS, EXPRESSIONS)
def test_trivially_equal_filters_have_one_canonical_text(x: Expr, y: Expr, z: Expr) -> None:
    for join in (And, Or):
        dual = Or if join is And else And
        assert canonical(join((x, y))) == canonical(join((y, x)))
        assert canonical(join((x, y, x))) == canonical(join((x, y)))
        assert canonical(join((x, join((y, z))))) == canonical(join((join((x, y)), z)))
        assert canonical(Not(join((x, y)))) == canonical(dual((Not(x), Not(y))))
        assert canonical(join((x, x))) == canonical(x)
    assert canonical(Not(Not(x))) == canonical(x)
    assert canonical(And((x, AnyItem()))) == canonical(x)
    assert canonical(Or((x, NO_ITEM))) == canonical(x)
    assert canonical(And((x, NO_ITEM))) == canonical(NO_ITEM)
    assert canonical(Or((x, AnyItem()))) == ""


@pytest.mark.parametrize(
    ("expr", "text"),
    [
        (AnyItem(), ""),
        (NO_ITEM, "NOT *"),
        (A, 'genre:"a"'),
        (Term("code", 5), "code:5"),
        (Not(YEAR), "NOT year>=1990"),
        (Or((C, And((B, A)))), '((genre:"a" AND genre:"b") OR genre:"c")'),
    ],
)
def test_canonical_texts_are_these(expr: Expr, text: str) -> None:
    assert canonical(expr) == text


def test_values_that_look_alike_keep_different_texts() -> None:
    exprs: list[Expr] = [
        Term("genre", "5"),
        Term("genre", 5),
        Term("genre", '5" AND genre:"6'),
        And((Term("genre", "5"), Term("genre", "6"))),
        Term("genre", "é"),
        Term("genre", "\\u00e9"),
        Compare("genre", Relation.EQ, 5),
        Compare("genre", Relation.EQ, 5.0),
    ]
    assert len({canonical(expr) for expr in exprs}) == len(exprs)


RELATIONS: dict[Relation, Callable[[Any, Any], bool]] = {
    Relation.LT: operator.lt,
    Relation.LE: operator.le,
    Relation.EQ: operator.eq,
    Relation.NE: operator.ne,
    Relation.GE: operator.ge,
    Relation.GT: operator.gt,
}
INTS = [INT64_MIN + 1, -(2**53) - 1, -1, 0, 1, 2**53, 2**53 + 1, INT64_MAX - 1, INT64_MAX]
FLOATS = [
    *(-math.inf, -1.5, -1.0, -5e-324, 0.0, 5e-324, 0.1, 0.30000000000000004, 1.0, 1.5),
    *(2.0**53, 2.0**53 + 2, 2.0**63, 1.7976931348623157e308, math.inf),
]
LITERALS: list[int | float] = [
    *INTS,
    *(value for value in FLOATS if math.isfinite(value)),
    *(INT64_MIN, INT64_MIN - 1, INT64_MAX + 1, 10**400, -(10**400), 0.5, -0.5, -0.0, 2**53 + 3),
]


def passes(expr: Expr, value: int | float) -> bool:
    if isinstance(expr, Not):
        return not passes(expr.operand, value)
    if isinstance(expr, AnyItem):
        return True
    assert isinstance(expr, Compare)
    return RELATIONS[expr.relation](value, expr.value)


@pytest.mark.parametrize("relation", list(Relation))
@pytest.mark.parametrize(("dtype", "values"), [("int", INTS), ("float", FLOATS)])
def test_a_comparison_of_any_types_is_exact(
    relation: Relation, dtype: str, values: list[int | float]
) -> None:
    # Python compares ints and floats of any size exactly.
    for literal in LITERALS:
        expr = typed_comparison("x", dtype, relation, literal)
        if isinstance(expr, Compare):
            assert type(expr.value) is {"int": int, "float": float}[dtype]
            assert dtype == "float" or INT64_MIN < expr.value <= INT64_MAX
        for value in values:
            assert passes(expr, value) == RELATIONS[relation](value, literal), (value, expr)


def test_comparisons_that_mean_the_same_on_ints_are_written_the_same() -> None:
    for relation, literal in ((Relation.GT, 1989), (Relation.GT, 1989.5), (Relation.GE, 1989.5)):
        assert typed_comparison("year", "int", relation, literal) == YEAR


def test_both_zeros_are_one_number() -> None:
    assert canonical(typed_comparison("x", "float", Relation.EQ, -0.0)) == canonical(
        typed_comparison("x", "float", Relation.EQ, 0)
    )

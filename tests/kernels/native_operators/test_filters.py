"""Filter programs against Python sets: nothing ineligible is returned, nothing eligible is lost."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from silvershard.kernels import (
    MAX_STACK,
    NULL_KEY,
    PAD_TERM,
    FilterOp,
    Relation,
    bloom_build,
    bloom_positions,
    count_eligible,
    eligibility,
    unpack_bits,
)

pytestmark = pytest.mark.usefixtures("implementation")

PoolOf = Callable[..., Any]
ProgramsOf = Callable[..., Tensor]
Rows = list[list[int]]
Expression = tuple[Any, ...]

PAGE = 64
HASHING = {"num_planes": 11, "num_hashes": 2, "seed": 1}
FIRST_BLOOM_PLANE = 3

KEYS = st.integers(-3, 3) | st.sampled_from([NULL_KEY, NULL_KEY + 1, (1 << 63) - 1, 1 << 40])
LEAVES = st.one_of(
    st.tuples(st.just("plane"), st.integers(0, FIRST_BLOOM_PLANE - 1)),
    st.tuples(st.just("term"), st.integers(0, 6)),
    st.tuples(st.just("compare"), st.integers(0, 1), st.sampled_from(list(Relation)), KEYS),
    st.tuples(st.booleans()),
)
EXPRESSIONS: st.SearchStrategy[Expression] = st.recursive(
    LEAVES,
    lambda parts: st.one_of(
        st.tuples(st.just("not"), parts),
        st.tuples(st.sampled_from(["and", "or"]), parts, parts),
    ),
    max_leaves=20,
)
EXAMPLES = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    # The fixtures hold functions and the choice of an implementation, which no example changes.
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def filters(pool: Any) -> tuple[Tensor, Tensor, Tensor]:
    return pool.planes, pool.columns, pool.terms


def meaning(expression: Expression, pool: Any) -> set[int]:
    """The slots that an expression accepts, dead ones too."""
    everything = set(range(pool.num_slots))
    match expression:
        case (bool() as constant,):
            return everything if constant else set()
        case ("plane", plane):
            return {slot for slot in everything if pool.bit(plane, slot)}
        case ("term", key):
            has = (pool.terms.view(pool.num_slots, -1) == key).any(dim=1)
            return set(has.nonzero().flatten().tolist())
        case ("compare", column, relation, bound):
            keys = pool.columns[column].flatten().tolist()
            truth: dict[Relation, Callable[[int], bool]] = {
                Relation.LT: lambda key: key < bound,
                Relation.LE: lambda key: key <= bound,
                Relation.EQ: lambda key: key == bound,
                Relation.NE: lambda key: key != bound,
                Relation.GE: lambda key: key >= bound,
                Relation.GT: lambda key: key > bound,
            }
            return {
                slot
                for slot in everything
                if keys[slot] != NULL_KEY and truth[relation](keys[slot])
            }
        case ("not", part):
            return everything - meaning(part, pool)
        case ("and", left, right):
            return meaning(left, pool) & meaning(right, pool)
        case (_, left, right):
            return meaning(left, pool) | meaning(right, pool)
    raise AssertionError(expression)


def exact_rows(expression: Expression) -> Rows:
    match expression:
        case (bool() as constant,):
            return [[FilterOp.TRUE if constant else FilterOp.FALSE, 0, 0, 0]]
        case ("plane", plane):
            return [[FilterOp.PLANE, plane, 0, 0]]
        case ("term", key):
            return [[FilterOp.TERM, 0, 0, key]]
        case ("compare", column, relation, bound):
            return [[FilterOp.COMPARE, column, relation, bound]]
        case ("not", part):
            return [*exact_rows(part), [FilterOp.NOT, 0, 0, 0]]
        case (name, left, right):
            op = FilterOp.AND if name == "and" else FilterOp.OR
            return [*exact_rows(left), *exact_rows(right), [op, 0, 0, 0]]
    raise AssertionError(expression)


def loose_rows(expression: Expression, *, negated: bool = False) -> Rows:
    """The same with Bloom planes for terms: accepts at least what the expression accepts."""
    match expression:
        case ("term", key):
            if negated:
                return [[FilterOp.TRUE, 0, 0, 0]]
            first, *others = (bloom_positions(torch.tensor(key), **HASHING) + 3).tolist()
            rows = [[FilterOp.PLANE, first, 0, 0]]
            for plane in others:
                rows += [[FilterOp.PLANE, plane, 0, 0], [FilterOp.AND, 0, 0, 0]]
            return rows
        case ("not", part):
            return loose_rows(part, negated=not negated)
        case ("and" | "or" as name, left, right):
            op = FilterOp.AND if (name == "and") != negated else FilterOp.OR
            sides = (loose_rows(part, negated=negated) for part in (left, right))
            return [row for side in sides for row in side] + [[op, 0, 0, 0]]
    rows = exact_rows(expression)
    return [*rows, [FilterOp.NOT, 0, 0, 0]] if negated else rows


@pytest.fixture
def pool(pool_of: PoolOf) -> Any:
    pool = pool_of(
        1, num_pages=8, num_planes=FIRST_BLOOM_PLANE + 11, dim=3, num_clusters=4, live=0.8
    )
    pool.columns[0, 0, :4] = torch.tensor([NULL_KEY + 1, (1 << 63) - 1, 1 << 40, NULL_KEY])
    slots = torch.arange(pool.num_slots)
    terms = pool.terms.view(pool.num_slots, -1)
    bloom_build(pool.planes, slots, terms, first_plane=FIRST_BLOOM_PLANE, **HASHING)
    return pool


@EXAMPLES
@given(expressions=st.lists(EXPRESSIONS, min_size=1, max_size=3))
def test_eligible_slots_are_those_of_the_set(
    expressions: list[Expression], pool: Any, programs_of: ProgramsOf
) -> None:
    live = meaning(("plane", 0), pool)
    expected = [meaning(expression, pool) & live for expression in expressions]
    programs = programs_of([exact_rows(expression) for expression in expressions])
    pages = torch.arange(8, dtype=torch.int32).repeat(len(expressions), 1)
    none = torch.empty((len(expressions), 0), dtype=torch.int64)
    words = eligibility(*filters(pool), programs, pages, none)
    for query, slots in enumerate(expected):
        assert set(unpack_bits(words[query]).flatten().nonzero().flatten().tolist()) == slots
    counts = count_eligible(*filters(pool), programs)
    assert counts.tolist() == [len(slots) for slots in expected]


@EXAMPLES
@given(
    expressions=st.lists(EXPRESSIONS, min_size=1, max_size=3),
    excluded=st.lists(st.integers(-1, 8 * PAGE - 1), max_size=9),
    clusters=st.lists(st.integers(-1, 3), min_size=1, max_size=5),
)
def test_a_scan_returns_every_eligible_slot_and_no_other(
    expressions: list[Expression],
    excluded: list[int],
    clusters: list[int],
    pool: Any,
    programs_of: ProgramsOf,
) -> None:
    num_queries = len(expressions)
    exact = programs_of([exact_rows(expression) for expression in expressions])
    loose = programs_of([loose_rows(expression) for expression in expressions])
    probed = {
        page * PAGE + offset
        for cluster in clusters
        if cluster >= 0
        for page in pool.page_table[cluster].tolist()
        if page >= 0
        for offset in range(PAGE)
    }
    candidates = meaning(("plane", 0), pool) & probed - set(excluded)
    queries = pool.queries(0, num_queries)._replace(
        clusters=torch.tensor([clusters] * num_queries, dtype=torch.int32),
        excluded=torch.tensor([excluded] * num_queries, dtype=torch.int64).view(num_queries, -1),
    )
    for programs, verify in ((exact, exact[:, :0]), (loose, exact), (exact[:, :0], exact)):
        result = pool.scan(queries._replace(programs=programs, verify=verify), pool.num_slots)
        for query, expression in enumerate(expressions):
            found = result.slots[query][result.slots[query] >= 0].tolist()
            assert len(found) == len(set(found))
            assert set(found) == meaning(expression, pool) & candidates


@pytest.mark.parametrize("op", [FilterOp.AND, FilterOp.OR])
def test_a_stack_of_the_full_depth_is_allowed_and_no_deeper(
    op: FilterOp, pool: Any, programs_of: ProgramsOf
) -> None:
    leaves = [[FilterOp.COMPARE, at % 2, Relation.NE, at // 2 - 8] for at in range(MAX_STACK)]
    # Every second value is negated, so that no leaf merges with the operation behind it.
    rows = [row for leaf in leaves for row in (leaf, [FilterOp.NOT, 0, 0, 0])]
    rows += [[op, 0, 0, 0]] * (MAX_STACK - 1)
    for program in (rows, leaves + [[op, 0, 0, 0]] * (MAX_STACK - 1)):
        counts = count_eligible(*filters(pool), programs_of([program]))
        accepted = [pool.bit(0, slot) and pool.accepts(program, slot) for slot in range(8 * PAGE)]
        assert counts.tolist() == [sum(accepted)]
        queries = pool.everywhere(0, 1)._replace(verify=programs_of([program]))
        found = pool.scan(queries, 600).slots[0]
        everywhere = 7 * PAGE
        assert int((found >= 0).sum()) == sum(accepted[:everywhere])
    deeper = [[FilterOp.TRUE, 0, 0, 0], *rows, [FilterOp.AND, 0, 0, 0]]
    with pytest.raises(ValueError, match="stack must be at most 32 deep"):
        count_eligible(*filters(pool), programs_of([deeper]))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([[9, 0, 0, 0]], "row 0: unknown opcode 9"),
        ([[-1, 0, 0, 0]], "row 0: unknown opcode -1"),
        ([[1 << 40, 0, 0, 0]], "row 0: unknown opcode 1099511627776"),
        ([[FilterOp.PLANE, 14, 0, 0]], r"row 0: plane must be in \[0, 14\), got 14"),
        ([[FilterOp.PLANE, -1, 0, 0]], r"row 0: plane must be in \[0, 14\), got -1"),
        ([[FilterOp.COMPARE, 2, 0, 0]], r"row 0: column must be in \[0, 2\), got 2"),
        ([[FilterOp.COMPARE, -1, 0, 0]], r"row 0: column must be in \[0, 2\), got -1"),
        ([[FilterOp.COMPARE, 0, 6, 0]], r"row 0: relation must be in \[0, 6\), got 6"),
        ([[FilterOp.COMPARE, 0, -1, 0]], r"row 0: relation must be in \[0, 6\), got -1"),
        ([[FilterOp.TERM, 0, 0, -1]], "row 0: term must be in .*, got -1"),
        ([[FilterOp.TERM, 0, 0, PAD_TERM]], "row 0: term must be in .*, got 9223372036854775807"),
        ([[0, 0, 0, 0], [FilterOp.NOT, 0, 0, 0]], "row 1: NOT needs 1 values .*, got 0"),
        ([[1, 0, 0, 0], [FilterOp.AND, 0, 0, 0]], "row 1: AND needs 2 values .*, got 1"),
        ([[FilterOp.OR, 0, 0, 0]], "row 0: OR needs 2 values on the stack, got 0"),
        ([[1, 0, 0, 0]] * 2, "must leave one value on the stack, got 2"),
    ],
)
@pytest.mark.parametrize("num_queries", [1, 9])
def test_malformed_programs_are_refused(
    rows: Rows, message: str, num_queries: int, pool: Any, programs_of: ProgramsOf
) -> None:
    # The last query alone is wrong.
    programs = programs_of([[[0, 0, 0, 0]] * len(rows)] * (num_queries - 1) + [rows])
    queries = pool.everywhere(0, num_queries)
    pages = torch.zeros((num_queries, 1), dtype=torch.int32)
    for refused in (
        lambda: count_eligible(*filters(pool), programs),
        lambda: eligibility(*filters(pool), programs, pages, queries.excluded),
        lambda: pool.scan(queries._replace(programs=programs), 3),
        lambda: pool.scan(queries._replace(verify=programs), 3),
    ):
        with pytest.raises(ValueError, match=message):
            refused()


def test_a_term_without_term_slots_is_refused(pool_of: PoolOf, programs_of: ProgramsOf) -> None:
    pool = pool_of(0, num_terms=0)
    programs = programs_of([[[FilterOp.TERM, 0, 0, 5]]])
    with pytest.raises(ValueError, match="row 0: TERM needs term slots, got none per item"):
        count_eligible(*filters(pool), programs)
    with pytest.raises(ValueError, match="row 0: TERM needs term slots, got none per item"):
        pool.scan(pool.everywhere(0, 1)._replace(verify=programs), 3)

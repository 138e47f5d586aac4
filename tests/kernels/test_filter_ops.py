import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from silvershard.kernels import MAX_STACK, NULL_KEY, PAD_TERM, FilterOp, Relation, unpack_bits
from silvershard.kernels.filter_ops import (
    PageLeaves,
    SlotLeaves,
    compare_keys,
    evaluate,
    parse_program,
    parse_programs,
)

NOP = [0, 0, 0, 0]
TRUE = [FilterOp.TRUE, 0, 0, 0]
AND = [FilterOp.AND, 0, 0, 0]
OR = [FilterOp.OR, 0, 0, 0]
NOT = [FilterOp.NOT, 0, 0, 0]


def parse(rows: Sequence[Sequence[int]]) -> tuple[tuple[int, int, int, int], ...]:
    return parse_program(rows, num_planes=4, num_columns=2, num_terms=1)


def test_the_numbers_of_opcodes_and_relations_are_fixed() -> None:
    assert [op.name for op in FilterOp] == [
        "NOP", "TRUE", "FALSE", "PLANE", "COMPARE", "AND", "OR", "NOT", "TERM",
    ]  # fmt: skip
    assert [op.value for op in FilterOp] == list(range(9))
    assert [relation.name for relation in Relation] == ["LT", "LE", "EQ", "NE", "GE", "GT"]
    assert [relation.value for relation in Relation] == list(range(6))


def test_padding_is_dropped_wherever_it_stands() -> None:
    assert parse([]) == parse([NOP, NOP]) == ()
    assert parse([NOP, TRUE, NOP, NOT]) == ((1, 0, 0, 0), (7, 0, 0, 0))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([[9, 0, 0, 0]], "row 0: unknown opcode 9"),
        ([[-1, 0, 0, 0]], "row 0: unknown opcode -1"),
        ([TRUE, NOP, AND], "row 2: AND needs 2 values on the stack, got 1"),
        ([OR], "row 0: OR needs 2 values on the stack, got 0"),
        ([NOT], "row 0: NOT needs 1 values on the stack, got 0"),
        ([TRUE, TRUE], "must leave one value on the stack, got 2"),
        ([TRUE] * (MAX_STACK + 1), f"row {MAX_STACK}: stack must be at most {MAX_STACK} deep"),
        ([[FilterOp.PLANE, 4, 0, 0]], r"row 0: plane must be in \[0, 4\), got 4"),
        ([[FilterOp.PLANE, -1, 0, 0]], r"row 0: plane must be in \[0, 4\), got -1"),
        ([[FilterOp.COMPARE, 2, 0, 0]], r"row 0: column must be in \[0, 2\), got 2"),
        ([[FilterOp.COMPARE, 0, 6, 0]], r"row 0: relation must be in \[0, 6\), got 6"),
        ([[FilterOp.COMPARE, 0, -1, 0]], r"row 0: relation must be in \[0, 6\), got -1"),
        ([[FilterOp.TERM, 0, 0, -1]], "row 0: term must be in"),
        ([[FilterOp.TERM, 0, 0, PAD_TERM]], "row 0: term must be in"),
    ],
)
def test_malformed_programs_are_refused(rows: list[list[int]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse(rows)


def test_a_term_needs_term_slots() -> None:
    with pytest.raises(ValueError, match="TERM needs term slots, got none per item"):
        parse_program([[FilterOp.TERM, 0, 0, 1]], num_planes=1, num_columns=0, num_terms=0)


def test_a_stack_of_the_full_depth_is_allowed() -> None:
    assert len(parse([TRUE] * MAX_STACK + [AND] * (MAX_STACK - 1))) == 2 * MAX_STACK - 1


def test_equal_programs_are_found_once(
    pool_of: Callable[..., Any], programs_of: Callable[..., Tensor]
) -> None:
    pool = pool_of(0)
    programs = programs_of([[TRUE], [TRUE, NOT], [NOP, TRUE], [], [TRUE, NOT]])
    distinct, numbers = parse_programs(programs, pool.planes, pool.columns, pool.terms)
    assert distinct == [((1, 0, 0, 0),), ((1, 0, 0, 0), (7, 0, 0, 0)), ()]
    assert numbers == [0, 1, 0, 2, 1]
    empty = torch.empty((3, 0, 4), dtype=torch.int64)
    assert parse_programs(empty, pool.planes, pool.columns, pool.terms) == ([()], [0, 0, 0])


@pytest.mark.parametrize(
    ("relation", "expected"),
    [
        (Relation.LT, [False, True, False, False, False]),
        (Relation.LE, [False, True, True, False, False]),
        (Relation.EQ, [False, False, True, False, False]),
        (Relation.NE, [False, True, False, True, True]),
        (Relation.GE, [False, False, True, True, True]),
        (Relation.GT, [False, False, False, True, True]),
    ],
)
def test_the_null_key_fails_every_relation(relation: Relation, expected: list[bool]) -> None:
    keys = torch.tensor([NULL_KEY, -5, 2, 3, (1 << 63) - 1])
    assert compare_keys(keys, relation, 2).tolist() == expected
    assert not bool(compare_keys(keys, relation, NULL_KEY)[0])


@pytest.mark.parametrize("page_size", [64, 128])
def test_pages_and_slots_agree_with_one_slot_at_a_time(
    page_size: int, pool_of: Callable[..., Any], rows_of: Callable[..., list[list[int]]]
) -> None:
    rng = random.Random(page_size)
    pool = pool_of(1, page_size=page_size, num_pages=5)
    pages = torch.tensor([3, 0, 3, 4])
    slots = torch.tensor([rng.randrange(pool.num_slots) for _ in range(70)])
    by_page = PageLeaves(pool.planes, pool.columns, pool.terms, pages)
    by_slice = PageLeaves(pool.planes, pool.columns, pool.terms, slice(1, 3))
    by_slot = SlotLeaves(pool.planes, pool.columns, pool.terms, slots)
    for _ in range(60):
        rows = rows_of(rng, pool, 5, with_terms=True)
        program = parse_program(
            rows,
            num_planes=pool.planes.shape[0],
            num_columns=pool.columns.shape[0],
            num_terms=pool.terms.shape[2],
        )
        truth = [pool.accepts(rows, slot) for slot in range(pool.num_slots)]
        table = torch.tensor(truth).view(5, page_size)
        assert torch.equal(unpack_bits(evaluate(program, by_page)), table[pages])
        assert torch.equal(unpack_bits(evaluate(program, by_slice)), table[1:3])
        assert evaluate(program, by_slot).tolist() == [truth[slot] for slot in slots.tolist()]


def test_evaluation_does_not_change_what_the_leaves_keep(pool_of: Callable[..., Any]) -> None:
    pool = pool_of(2)
    leaves = PageLeaves(pool.planes, pool.columns, pool.terms, slice(0, 4))
    before = leaves.plane(1).clone()
    evaluate(((3, 1, 0, 0), (7, 0, 0, 0), (3, 1, 0, 0), (6, 0, 0, 0)), leaves)
    assert torch.equal(leaves.plane(1), before)
    assert torch.equal(pool.planes[1, :4], before)

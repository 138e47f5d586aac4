"""Filter programs: their instructions, their limits and the one evaluator that all operators share.

A program is a list of rows ``[op, a, b, c]`` for a stack machine. It is evaluated either on whole
pages, where a truth value is a word of 64 slots, or on single slots, where it is a boolean.

Shapes: J planes, N pages, G slots per page, W = G / 64 words, V columns, F term slots per item,
M pages in question, n slots in question.

Source: SilverTorch, arXiv 2511.14881, SIGIR 2026, section 4.1 (operation array and stack).
"""

from collections.abc import Iterable, Sequence
from enum import IntEnum
from typing import Protocol

import torch
from torch import Tensor

from silvershard.kernels.bits import pack_bits_reference

MAX_STACK = 32
NULL_KEY = -(1 << 63)
PAD_TERM = (1 << 63) - 1

Instruction = tuple[int, int, int, int]
Program = tuple[Instruction, ...]


class FilterOp(IntEnum):
    """First number of an instruction: what it does to the stack."""

    NOP = 0
    TRUE = 1
    FALSE = 2
    PLANE = 3
    COMPARE = 4
    AND = 5
    OR = 6
    NOT = 7
    TERM = 8


class Relation(IntEnum):
    """Third number of a COMPARE instruction: ``column <relation> key``."""

    LT = 0
    LE = 1
    EQ = 2
    NE = 3
    GE = 4
    GT = 5


class Leaves(Protocol):
    """Truth values of the leaf instructions over some domain of slots.

    The values combine with ``&``, ``|`` and ``~``, so int64 words and booleans both serve.
    """

    def constant(self, value: bool, /) -> Tensor: ...

    def plane(self, plane: int, /) -> Tensor: ...

    def compare(self, column: int, relation: Relation, key: int, /) -> Tensor: ...

    def term(self, key: int, /) -> Tensor: ...


def parse_program(
    rows: Iterable[Sequence[int]], *, num_planes: int, num_columns: int, num_terms: int
) -> Program:
    """Check one program and drop its padding.

    Args:
        rows: instructions ``[op, a, b, c]``; NOP rows are padding wherever they stand.
        num_planes: J, the bound of a PLANE operand.
        num_columns: V, the bound of a COMPARE operand.
        num_terms: F; a program with a TERM needs at least one term slot per item.

    Returns:
        The instructions without NOP. Empty means TRUE.

    Raises:
        ValueError: if an opcode, an operand or the stack discipline is wrong; names the row.
    """
    program: list[Instruction] = []
    depth = 0
    for row, (op, a, b, c) in enumerate(rows):
        if op == FilterOp.NOP:
            continue
        if op in (FilterOp.AND, FilterOp.OR, FilterOp.NOT):
            needed = 1 if op == FilterOp.NOT else 2
            if depth < needed:
                raise ValueError(
                    f"program row {row}: {FilterOp(op).name} needs {needed} values on the stack, "
                    f"got {depth}"
                )
            depth -= needed - 1
        else:
            _check_leaf(row, op, a, b, c, num_planes, num_columns, num_terms)
            depth += 1
            if depth > MAX_STACK:
                raise ValueError(f"program row {row}: stack must be at most {MAX_STACK} deep")
        program.append((op, a, b, c))
    if program and depth != 1:
        raise ValueError(f"program must leave one value on the stack, got {depth}")
    return tuple(program)


def _check_leaf(
    row: int, op: int, a: int, b: int, c: int, num_planes: int, num_columns: int, num_terms: int
) -> None:
    if op == FilterOp.PLANE:
        if not 0 <= a < num_planes:
            raise ValueError(f"program row {row}: plane must be in [0, {num_planes}), got {a}")
    elif op == FilterOp.COMPARE:
        if not 0 <= a < num_columns:
            raise ValueError(f"program row {row}: column must be in [0, {num_columns}), got {a}")
        if not Relation.LT <= b <= Relation.GT:
            raise ValueError(f"program row {row}: relation must be in [0, 6), got {b}")
    elif op == FilterOp.TERM:
        if not 0 <= c < PAD_TERM:
            raise ValueError(f"program row {row}: term must be in [0, {PAD_TERM}), got {c}")
        if num_terms == 0:
            raise ValueError(f"program row {row}: TERM needs term slots, got none per item")
    elif op not in (FilterOp.TRUE, FilterOp.FALSE):
        raise ValueError(f"program row {row}: unknown opcode {op}")


def parse_programs(
    programs: Tensor, planes: Tensor, columns: Tensor, terms: Tensor
) -> tuple[list[Program], list[int]]:
    """Check a batch of programs and find the distinct ones.

    Args:
        programs: ``(Q, L, 4)`` int64.
        planes: ``(J, N, W)`` int64, for its J.
        columns: ``(V, N, G)`` int64, for its V.
        terms: ``(N, G, F)`` int64, for its F.

    Returns:
        The distinct programs in order of first appearance, and for each of the Q queries its index
        among them.

    Raises:
        ValueError: if a program is malformed.
    """
    order: dict[Program, int] = {}
    numbers: list[int] = []
    if programs.shape[1] == 0:
        return [()], [0] * programs.shape[0]
    for rows in programs.tolist():
        program = parse_program(
            rows,
            num_planes=planes.shape[0],
            num_columns=columns.shape[0],
            num_terms=terms.shape[2],
        )
        numbers.append(order.setdefault(program, len(order)))
    return list(order) or [()], numbers


def evaluate(program: Program, leaves: Leaves) -> Tensor:
    """Run one checked program over a domain of slots.

    Args:
        program: as ``parse_program`` returned it.
        leaves: the domain, ``PageLeaves`` or ``SlotLeaves``.

    Returns:
        The truth values in the form of the domain. May be a tensor that ``leaves`` keeps: read
        only.
    """
    if not program:
        return leaves.constant(True)
    stack: list[Tensor] = []
    for op, a, b, c in program:
        if op == FilterOp.AND:
            right = stack.pop()
            stack.append(stack.pop() & right)
        elif op == FilterOp.OR:
            right = stack.pop()
            stack.append(stack.pop() | right)
        elif op == FilterOp.NOT:
            stack.append(~stack.pop())
        elif op == FilterOp.PLANE:
            stack.append(leaves.plane(a))
        elif op == FilterOp.COMPARE:
            stack.append(leaves.compare(a, Relation(b), c))
        elif op == FilterOp.TERM:
            stack.append(leaves.term(c))
        else:
            stack.append(leaves.constant(op == FilterOp.TRUE))
    return stack.pop()


def compare_keys(keys: Tensor, relation: Relation, key: int) -> Tensor:
    """Compare order keys with a constant; the null key fails every relation.

    Args:
        keys: any shape, int64.
        relation: how ``keys`` must stand to ``key``.
        key: the constant, an int64.

    Returns:
        Same shape, bool.
    """
    present = keys != NULL_KEY
    if relation == Relation.LT:
        return (keys < key) & present
    if relation == Relation.LE:
        return (keys <= key) & present
    if relation == Relation.EQ:
        return (keys == key) & present
    if relation == Relation.NE:
        return (keys != key) & present
    if relation == Relation.GE:
        return (keys >= key) & present
    return (keys > key) & present


class PageLeaves:
    """Leaves over whole pages: ``(M, W)`` int64 words, each computed once.

    Args:
        planes: ``(J, N, W)`` int64.
        columns: ``(V, N, G)`` int64.
        terms: ``(N, G, F)`` int64.
        pages: ``(M,)`` int64 in [0, N), or a slice of the pool.
    """

    def __init__(
        self, planes: Tensor, columns: Tensor, terms: Tensor, pages: Tensor | slice
    ) -> None:
        self._planes = planes
        self._columns = columns
        self._terms = terms
        self._pages = pages
        self._known: dict[tuple[int, ...], Tensor] = {}

    def constant(self, value: bool, /) -> Tensor:
        known = self._known.get((FilterOp.TRUE, value))
        if known is None:
            known = torch.full_like(self.plane(0), -1 if value else 0)
            self._known[FilterOp.TRUE, value] = known
        return known

    def plane(self, plane: int, /) -> Tensor:
        known = self._known.get((FilterOp.PLANE, plane))
        if known is None:
            known = self._of_pages(self._planes[plane])
            self._known[FilterOp.PLANE, plane] = known
        return known

    def compare(self, column: int, relation: Relation, key: int, /) -> Tensor:
        name = (FilterOp.COMPARE, column, relation, key)
        known = self._known.get(name)
        if known is None:
            keys = self._of_pages(self._columns[column])  # (M, G)
            known = pack_bits_reference(compare_keys(keys, relation, key))
            self._known[name] = known
        return known

    def term(self, key: int, /) -> Tensor:
        known = self._known.get((FilterOp.TERM, key))
        if known is None:
            known = pack_bits_reference((self._of_pages(self._terms) == key).any(dim=-1))
            self._known[FilterOp.TERM, key] = known
        return known

    def _of_pages(self, pool: Tensor) -> Tensor:
        if isinstance(self._pages, slice):
            return pool[self._pages]
        return pool.index_select(0, self._pages)


class SlotLeaves:
    """Leaves over single slots: ``(n,)`` booleans.

    Args:
        planes: ``(J, N, W)`` int64, contiguous.
        columns: ``(V, N, G)`` int64, contiguous.
        terms: ``(N, G, F)`` int64, contiguous.
        slots: ``(n,)`` int64 in [0, N * G).
    """

    def __init__(self, planes: Tensor, columns: Tensor, terms: Tensor, slots: Tensor) -> None:
        self._planes = planes.flatten(1)  # (J, N * W)
        self._columns = columns.flatten(1)  # (V, N * G)
        self._terms = terms.flatten(0, 1)  # (N * G, F)
        self._slots = slots

    def constant(self, value: bool, /) -> Tensor:
        return torch.full_like(self._slots, value, dtype=torch.bool)

    def plane(self, plane: int, /) -> Tensor:
        words = self._planes[plane].index_select(0, self._slots >> 6)
        return ((words >> (self._slots & 63)) & 1).to(torch.bool)

    def compare(self, column: int, relation: Relation, key: int, /) -> Tensor:
        return compare_keys(self._columns[column].index_select(0, self._slots), relation, key)

    def term(self, key: int, /) -> Tensor:
        return (self._terms.index_select(0, self._slots) == key).any(dim=-1)

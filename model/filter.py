"""Filters as programs for the eligibility operators.

The scan program runs on whole planes and passes every eligible item, and perhaps others; the verify
program then states the whole filter exactly. Both share one instruction set, ``FilterOp``.

Shapes: L and Lv program lengths.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from silvershard.kernels.bloom_build import bloom_positions
from silvershard.kernels.filter_ops import MAX_STACK, FilterOp
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
)
from silvershard.model.filter_parser import FilterError, parse_filter
from silvershard.model.planes import PlaneDictionary
from silvershard.model.request import FilterMode
from silvershard.model.schema import Schema

__all__ = [
    "And",
    "AnyItem",
    "Compare",
    "CompiledFilter",
    "Expr",
    "FilterError",
    "Not",
    "Or",
    "Term",
    "canonical",
    "compile_filter",
    "parse_filter",
]


class CompiledFilter(NamedTuple):
    """A filter as programs of rows ``[op, a, b, c]``; an empty program passes every item."""

    scan: Tensor
    """``(L, 4)`` int64: passes every eligible item, for the planes and columns alone."""
    verify: Tensor
    """``(Lv, 4)`` int64: the whole filter exactly; empty where ``scan`` is exact already."""
    upper_bound: bool
    """Whether ``scan`` may pass items that are not eligible, so that its count is a bound."""


_Row = tuple[int, int, int, int]
_TermRows = dict[Term, list[_Row]]


def compile_filter(
    expr: Expr, dictionary: PlaneDictionary, schema: Schema, mode: FilterMode
) -> CompiledFilter:
    """The programs of a filter for the items that the dictionary encodes.

    Equal ``canonical`` texts give equal programs.

    Args:
        expr: a parsed filter.
        dictionary: planes and columns of the generation.
        schema: the schema that the dictionary was made for.
        mode: whether to verify.

    Raises:
        ValueError: if the dictionary belongs to another schema, or the expression names what
            neither has.
        FilterError: if the expression needs a stack deeper than ``MAX_STACK``.
    """
    if {attribute.name: attribute.dtype for attribute in schema.attributes} != dictionary.dtypes:
        raise ValueError("dictionary and schema must have the same attributes")
    exact = normalise(_without_impossible(expr, dictionary))
    bloom_terms = [term for term in _terms(exact) if _is_bloom_term(term, dictionary)]
    planes = _plane_rows(bloom_terms, dictionary)
    if not bloom_terms:
        return CompiledFilter(_program(exact, dictionary, planes), _tensor([]), False)
    scan = _program(normalise(_scannable(exact, dictionary)), dictionary, planes)
    if mode == FilterMode.BLOOM:
        return CompiledFilter(scan, _tensor([]), True)
    lists = _term_rows(bloom_terms, dictionary)
    return CompiledFilter(scan, _program(exact, dictionary, lists), True)


def _terms(expr: Expr) -> Iterator[Term]:
    if isinstance(expr, And | Or):
        for operand in expr.operands:
            yield from _terms(operand)
    elif isinstance(expr, Not):
        yield from _terms(expr.operand)
    elif isinstance(expr, Term):
        yield expr


def _is_bloom_term(expr: Expr, dictionary: PlaneDictionary) -> bool:
    return isinstance(expr, Term) and dictionary.exact_plane(expr.attribute, expr.value) is None


def _without_impossible(expr: Expr, dictionary: PlaneDictionary) -> Expr:
    """The expression with terms that no item can have replaced by ``NO_ITEM``."""
    if isinstance(expr, And | Or):
        return type(expr)(tuple(_without_impossible(each, dictionary) for each in expr.operands))
    if isinstance(expr, Not):
        return Not(_without_impossible(expr.operand, dictionary))
    # Without Bloom planes no item can ever hold a value that has no exact plane. With them it can,
    # through an update, even where the attribute had no rare value when the planes were chosen.
    if not dictionary.num_bloom_planes and _is_bloom_term(expr, dictionary):
        return NO_ITEM
    return expr


def _scannable(expr: Expr, dictionary: PlaneDictionary) -> Expr:
    """The normalised expression with every Bloom term under NOT replaced by ``AnyItem``.

    A Bloom hit does not prove the value, so its absence cannot be concluded from the planes.
    """
    if isinstance(expr, And | Or):
        return type(expr)(tuple(_scannable(each, dictionary) for each in expr.operands))
    if isinstance(expr, Not) and _is_bloom_term(expr.operand, dictionary):
        return AnyItem()
    return expr


def _plane_rows(bloom_terms: Sequence[Term], dictionary: PlaneDictionary) -> _TermRows:
    """Rows that test each Bloom term on all of its planes."""
    if not bloom_terms:
        return {}
    keys = [dictionary.term_key(term.attribute, term.value) for term in bloom_terms]
    positions = bloom_positions(
        torch.tensor(keys, dtype=torch.int64),
        num_planes=dictionary.num_bloom_planes,
        num_hashes=dictionary.num_hashes,
        seed=dictionary.seed,
    )
    found: _TermRows = {}
    for term, own in zip(bloom_terms, positions.tolist(), strict=True):
        rows: list[_Row] = []
        for position in sorted(set(own)):
            rows.append((FilterOp.PLANE, dictionary.first_bloom_plane + position, 0, 0))
            if len(rows) > 1:
                rows.append((FilterOp.AND, 0, 0, 0))
        found[term] = rows
    return found


def _term_rows(bloom_terms: Sequence[Term], dictionary: PlaneDictionary) -> _TermRows:
    """Rows that test each Bloom term on the item's own list of terms."""
    return {
        term: [(FilterOp.TERM, 0, 0, dictionary.term_key(term.attribute, term.value))]
        for term in bloom_terms
    }


class _Code(NamedTuple):
    rows: list[_Row]
    stack: int
    """Values on the stack at the deepest point."""


def _program(expr: Expr, dictionary: PlaneDictionary, term_rows: _TermRows) -> Tensor:
    if expr == AnyItem():
        return _tensor([])
    code = _emit(expr, dictionary, term_rows)
    if code.stack > MAX_STACK:
        raise FilterError(f"filter needs a stack of {code.stack} values, the limit is {MAX_STACK}")
    return _tensor(code.rows)


def _emit(expr: Expr, dictionary: PlaneDictionary, term_rows: _TermRows) -> _Code:
    if isinstance(expr, And | Or):
        op = FilterOp.AND if isinstance(expr, And) else FilterOp.OR
        # The deepest operand goes first, while nothing else is on the stack; the stack then grows
        # only with the logarithm of the number of leaves.
        operands = sorted(
            (_emit(operand, dictionary, term_rows) for operand in expr.operands),
            key=lambda code: -code.stack,
        )
        rows = list(operands[0].rows)
        for operand in operands[1:]:
            rows += operand.rows
            rows.append((op, 0, 0, 0))
        return _Code(rows, max(operands[0].stack, 1 + operands[1].stack))
    if isinstance(expr, Not):
        if expr == NO_ITEM:
            return _Code([(FilterOp.FALSE, 0, 0, 0)], 1)
        code = _emit(expr.operand, dictionary, term_rows)
        return _Code([*code.rows, (FilterOp.NOT, 0, 0, 0)], code.stack)
    if isinstance(expr, Term):
        plane = dictionary.exact_plane(expr.attribute, expr.value)
        rows = term_rows[expr] if plane is None else [(FilterOp.PLANE, plane, 0, 0)]
        return _Code(rows, min(len(rows), 2))
    if isinstance(expr, Compare):
        column = dictionary.columns[expr.attribute]
        key = dictionary.number_key(expr.attribute, expr.value)
        return _Code([(FilterOp.COMPARE, column, expr.relation, key)], 1)
    return _Code([(FilterOp.TRUE, 0, 0, 0)], 1)


def _tensor(rows: list[_Row]) -> Tensor:
    return torch.tensor(rows, dtype=torch.int64).reshape(-1, 4)

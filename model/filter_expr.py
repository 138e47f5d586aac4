"""Filter expressions: what a parsed filter means, and one form for all that mean the same.

Two-valued logic: an item without a value fails every term and every comparison on it.
"""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from silvershard.kernels.filter_ops import Relation
from silvershard.model.dtypes import INT64_MAX, INT64_MIN


@dataclass(frozen=True)
class AnyItem:
    """Every item."""


@dataclass(frozen=True)
class Term:
    """Items that have this value of a category attribute."""

    attribute: str
    value: int | str


@dataclass(frozen=True)
class Compare:
    """Items whose number attribute has a value in this relation to the literal.

    The literal is of the attribute's type: an int for an int attribute, else a float.
    """

    attribute: str
    relation: Relation
    value: int | float


@dataclass(frozen=True)
class Not:
    """Items that the operand does not hold for."""

    operand: "Expr"


@dataclass(frozen=True)
class And:
    """Items that every operand holds for; at least two operands."""

    operands: tuple["Expr", ...]


@dataclass(frozen=True)
class Or:
    """Items that some operand holds for; at least two operands."""

    operands: tuple["Expr", ...]


Expr = AnyItem | Term | Compare | Not | And | Or

NO_ITEM = Not(AnyItem())
"""Holds for no item."""


def canonical(expr: Expr) -> str:
    """A text that is equal for filters that are trivially equal, and different for all that differ.

    It does not depend on the order of operands, on repetition, nesting, double negation, De
    Morgan's laws, IN against OR, or on how a value came in. Empty for the filter that holds for
    every item. Meant as a cache key: it is not itself a filter.
    """
    text = _normal(expr, negated=False).text
    return "" if text == _ANY else text


def normalise(expr: Expr) -> Expr:
    """The equivalent expression whose NOTs stand on leaves only, one for each ``canonical`` text.

    Operands of And and Or are distinct, sorted, and neither constants nor of the same kind as
    their parent; the constants are ``AnyItem()`` and ``NO_ITEM``.
    """
    return _normal(expr, negated=False).expr


class _Normal(NamedTuple):
    expr: Expr
    text: str
    members: Mapping[str, "_Normal"]
    """Operands of an And or Or by their text, sorted; empty for a leaf or a constant."""


_ANY = "*"
_NONE = "NOT *"
_SYMBOLS = {
    Relation.LT: "<",
    Relation.LE: "<=",
    Relation.EQ: "=",
    Relation.NE: "!=",
    Relation.GE: ">=",
    Relation.GT: ">",
}


def _normal(expr: Expr, *, negated: bool) -> _Normal:
    if isinstance(expr, Not):
        return _normal(expr.operand, negated=not negated)
    if isinstance(expr, And | Or):
        operands = [_normal(operand, negated=negated) for operand in expr.operands]
        return _joined(operands, And if isinstance(expr, And) != negated else Or)
    if isinstance(expr, AnyItem):
        text = _ANY
    elif isinstance(expr, Term):
        text = f"{expr.attribute}:{json.dumps(expr.value)}"
    else:
        text = f"{expr.attribute}{_SYMBOLS[expr.relation]}{expr.value!r}"
    return _Normal(Not(expr), f"NOT {text}", {}) if negated else _Normal(expr, text, {})


def _joined(operands: Iterable[_Normal], kind: type[And] | type[Or]) -> _Normal:
    neutral, absorbing = (_ANY, _NONE) if kind is And else (_NONE, _ANY)
    members: dict[str, _Normal] = {}
    for operand in operands:
        if isinstance(operand.expr, kind):
            members.update(operand.members)
        elif operand.text != neutral:
            members[operand.text] = operand
    if absorbing in members:
        return members[absorbing]
    if not members:
        return _Normal(AnyItem() if kind is And else NO_ITEM, neutral, {})
    texts = sorted(members)
    if len(texts) == 1:
        return members[texts[0]]
    ordered = {text: members[text] for text in texts}
    word = " AND " if kind is And else " OR "
    expr = kind(tuple(member.expr for member in ordered.values()))
    return _Normal(expr, f"({word.join(texts)})", ordered)


def typed_comparison(attribute: str, dtype: str, relation: Relation, literal: int | float) -> Expr:
    """The comparison with a literal of the attribute's type that holds for the same items.

    Args:
        attribute: a number attribute.
        dtype: ``int`` or ``float``, the type of the attribute.
        relation: how a value must relate to the literal.
        literal: a finite int or float of any size.
    """
    if dtype == "int":
        return _int_comparison(attribute, relation, literal)
    return _float_comparison(attribute, relation, literal)


def _int_comparison(attribute: str, relation: Relation, literal: int | float) -> Expr:
    floor, ceiling = math.floor(literal), math.ceil(literal)
    if relation in (Relation.EQ, Relation.NE) and (
        floor != ceiling or not INT64_MIN < floor <= INT64_MAX
    ):
        return NO_ITEM if relation == Relation.EQ else _has_value(attribute, "int")
    if relation in (Relation.LT, Relation.LE):
        bound = ceiling - 1 if relation == Relation.LT else floor
        if bound <= INT64_MIN:
            return NO_ITEM
        if bound >= INT64_MAX:
            return _has_value(attribute, "int")
        return Compare(attribute, Relation.LE, bound)
    if relation in (Relation.GT, Relation.GE):
        bound = floor + 1 if relation == Relation.GT else ceiling
        if bound > INT64_MAX:
            return NO_ITEM
        return Compare(attribute, Relation.GE, max(bound, INT64_MIN + 1))
    return Compare(attribute, relation, floor)


def _float_comparison(attribute: str, relation: Relation, literal: int | float) -> Expr:
    try:
        nearest = float(literal)
    except OverflowError:
        nearest = math.inf if literal > 0 else -math.inf
    # No float lies between the literal and its nearest float, so the relation can be restated.
    if nearest == literal:
        restated = relation
    elif relation == Relation.EQ:
        return NO_ITEM
    elif relation == Relation.NE:
        return _has_value(attribute, "float")
    elif relation in (Relation.LT, Relation.LE):
        restated = Relation.LT if nearest > literal else Relation.LE
    else:
        restated = Relation.GE if nearest > literal else Relation.GT
    return Compare(attribute, restated, nearest + 0.0)


def _has_value(attribute: str, dtype: str) -> Compare:
    return Compare(attribute, Relation.GE, INT64_MIN + 1 if dtype == "int" else -math.inf)

"""The filter language: text and parameters in, a checked expression out.

The grammar and its meaning are in ``docs/filters.md``.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple, NoReturn

import numpy as np

from silvershard.kernels.filter_ops import Relation
from silvershard.model.dtypes import INT64_MAX, INT64_MIN
from silvershard.model.errors import TextError
from silvershard.model.filter_expr import (
    NO_ITEM,
    And,
    AnyItem,
    Expr,
    Not,
    Or,
    Term,
    typed_comparison,
)
from silvershard.model.schema import (
    FILTER_KEYWORDS,
    Attribute,
    Schema,
)

MAX_TEXT = 65_536
"""Characters of a filter, its bound strings included."""
MAX_DEPTH = 64
"""Parentheses and NOTs inside each other."""
MAX_LEAVES = 1_024
"""Values and comparisons of one filter, after lists are bound."""

Scalar = int | float | str
Param = Scalar | Sequence[Scalar]


class FilterError(TextError):
    """A filter that cannot be parsed, or that the schema does not allow."""


def parse_filter(text: str, params: Mapping[str, Param], schema: Schema) -> Expr:
    """The expression that a filter text states, with its parameters bound and its types checked.

    Comparisons are brought to literals of the attribute's type without changing their meaning, so
    ``year >= 1990.5`` on an int attribute becomes ``year >= 1991``.

    Args:
        text: the filter; blank text holds for every item.
        params: a value, or a list of values, for every ``$name`` of the text.
        schema: declares the attributes.

    Raises:
        FilterError: with the position, if the text is malformed, too long, too deep or too wide,
            names what does not exist, or mixes types.
    """
    return _Parser(text, params, schema).parse()


class _Token(NamedTuple):
    kind: str
    """word, number, string, param, end, or the operator itself."""
    value: Scalar
    position: int


_RELATIONS: Mapping[str, Relation] = {
    "<": Relation.LT,
    "<=": Relation.LE,
    "=": Relation.EQ,
    "==": Relation.EQ,
    "!=": Relation.NE,
    ">=": Relation.GE,
    ">": Relation.GT,
}

_TOKEN = re.compile(
    r"""
    (?P<space>\s+)
    | (?P<word>[^\W\d][\w.-]*)
    | (?P<number>-?[0-9]+(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?(?![\w.]))
    | \$(?P<param>[A-Za-z_][A-Za-z0-9_]*)
    | (?P<string>"(?:[^"\\]|\\.)*+")
    | (?P<operator><=|>=|==|!=|[<>=!&|():,])
    """,
    re.VERBOSE | re.DOTALL,
)
_ESCAPE = re.compile(r"\\(u[0-9a-fA-F]{4}|.)", re.DOTALL)
_ESCAPES = {'"': '"', "\\": "\\", "n": "\n", "r": "\r", "t": "\t"}
_SYMBOLS = {"&": "and", "|": "or", "!": "not"}
_MAX_DIGITS = 400


class _Parser:
    def __init__(self, text: str, params: Mapping[str, Param], schema: Schema) -> None:
        self._text = text
        self._params = params
        self._schema = schema
        self._used: set[str] = set()
        self._bound_text = 0
        self._num_leaves = 0
        if len(text) > MAX_TEXT:
            self._fail(f"filter must be at most {MAX_TEXT} characters, got {len(text)}", MAX_TEXT)
        self._next_position = 0
        self._token = self._scan()

    def parse(self) -> Expr:
        expr: Expr = AnyItem()
        if self._token.kind != "end":
            expr = self._disjunction(0)
            if self._token.kind != "end":
                self._fail_here("expected AND, OR or the end of the filter")
        unused = sorted(str(name) for name in self._params if name not in self._used)
        if unused:
            self._fail(f"parameter {unused[0]!r} is given but not used", len(self._text))
        return expr

    def _disjunction(self, depth: int) -> Expr:
        operands = [self._conjunction(depth)]
        while self._keyword() == "or":
            self._advance()
            operands.append(self._conjunction(depth))
        return operands[0] if len(operands) == 1 else Or(tuple(operands))

    def _conjunction(self, depth: int) -> Expr:
        operands = [self._negation(depth)]
        while self._keyword() == "and":
            self._advance()
            operands.append(self._negation(depth))
        return operands[0] if len(operands) == 1 else And(tuple(operands))

    def _negation(self, depth: int) -> Expr:
        if depth > MAX_DEPTH:
            self._fail_here(f"filter must be nested at most {MAX_DEPTH} deep")
        if self._keyword() == "not":
            self._advance()
            return Not(self._negation(depth + 1))
        if self._token.kind == "(":
            opened = self._token.position
            self._advance()
            inner = self._disjunction(depth + 1)
            if self._token.kind != ")":
                self._fail_here(f"expected ')' for the '(' at position {opened}")
            self._advance()
            return inner
        return self._condition()

    def _condition(self) -> Expr:
        token = self._token
        if token.kind != "word" or self._keyword():
            self._fail_here("expected an attribute, NOT or '('")
        attribute = self._schema.attribute(str(token.value))
        if attribute is None:
            known = ", ".join(item.name for item in self._schema.attributes[:20]) or "none"
            self._fail(f"unknown attribute {token.value!r}; the schema has {known}", token.position)
        self._advance()
        operator = self._token
        if operator.kind == ":":
            self._advance()
            return self._any_of(attribute, self._values(), operator.position)
        if operator.kind in _RELATIONS:
            self._advance()
            return self._comparison(attribute, operator)
        if self._keyword() == "in":
            self._advance()
            return self._any_of(attribute, self._list(), operator.position)
        self._fail_here(f"expected ':', IN or a comparison after attribute {attribute.name!r}")

    def _comparison(self, attribute: Attribute, operator: _Token) -> Expr:
        if attribute.kind == "category":
            self._fail(
                f"attribute {attribute.name!r} is a category and cannot be compared with "
                f"{operator.kind!r}; use ':' or IN",
                operator.position,
            )
        values = self._values()
        if len(values) != 1:
            self._fail(
                f"{operator.kind!r} needs one value, got a list of {len(values)}",
                operator.position,
            )
        return self._compare(attribute, _RELATIONS[operator.kind], values[0])

    def _any_of(self, attribute: Attribute, values: Sequence[_Token], position: int) -> Expr:
        operands: list[Expr] = []
        for value in values:
            if attribute.kind == "number":
                operands.append(self._compare(attribute, Relation.EQ, value))
            else:
                self._count_leaf(value.position)
                operands.append(Term(attribute.name, self._category_value(attribute, value)))
        if not operands:
            self._count_leaf(position)
            return NO_ITEM
        return operands[0] if len(operands) == 1 else Or(tuple(operands))

    def _compare(self, attribute: Attribute, relation: Relation, value: _Token) -> Expr:
        self._count_leaf(value.position)
        literal = value.value
        if isinstance(literal, str):
            self._fail(
                f"attribute {attribute.name!r} holds numbers, got the string {_short(literal)}",
                value.position,
            )
        return typed_comparison(attribute.name, attribute.dtype, relation, literal)

    def _category_value(self, attribute: Attribute, value: _Token) -> int | str:
        literal = value.value
        if attribute.dtype == "string":
            if not isinstance(literal, str):
                self._fail(
                    f"attribute {attribute.name!r} holds strings, got the number {literal}; "
                    "put it in double quotes",
                    value.position,
                )
            return literal
        if not isinstance(literal, int):
            what = "string" if isinstance(literal, str) else "number"
            self._fail(
                f"attribute {attribute.name!r} holds ints, got the {what} {_short(literal)}",
                value.position,
            )
        if not INT64_MIN <= literal <= INT64_MAX:
            self._fail(
                f"attribute {attribute.name!r} holds 64-bit ints, got {_short(literal)}",
                value.position,
            )
        return literal

    def _count_leaf(self, position: int) -> None:
        self._num_leaves += 1
        if self._num_leaves > MAX_LEAVES:
            self._fail(f"filter must have at most {MAX_LEAVES} values and comparisons", position)

    def _list(self) -> list[_Token]:
        if self._token.kind == "param":
            return self._values()
        if self._token.kind != "(":
            self._fail_here("expected '(' or a parameter after IN")
        self._advance()
        values = self._values()
        while self._token.kind == ",":
            self._advance()
            values += self._values()
        if self._token.kind != ")":
            self._fail_here("expected ',' or ')'")
        self._advance()
        return values

    def _values(self) -> list[_Token]:
        """The value at the current token; any number of values if it is a parameter."""
        token = self._token
        if token.kind == "param":
            self._advance()
            return self._bind(str(token.value), token.position)
        if token.kind not in ("word", "number", "string"):
            self._fail_here("expected a value")
        self._advance()
        return [token._replace(kind="value")]

    def _bind(self, name: str, position: int) -> list[_Token]:
        if name not in self._params:
            given = ", ".join(sorted(str(key) for key in self._params)[:20]) or "none"
            self._fail(f"parameter {name!r} has no value; given are {given}", position)
        self._used.add(name)
        param = self._params[name]
        values: Sequence[object] = [param]
        if isinstance(param, np.ndarray):
            values = np.atleast_1d(param).tolist()
        elif isinstance(param, Sequence) and not isinstance(param, str | bytes):
            values = param
        room = MAX_LEAVES - self._num_leaves
        if len(values) > room:
            self._fail(f"filter must have at most {MAX_LEAVES} values and comparisons", position)
        return [_Token("value", self._scalar(name, value, position), position) for value in values]

    def _scalar(self, name: str, value: object, position: int) -> Scalar:
        if isinstance(value, np.generic):
            value = value.item()
        if isinstance(value, str):
            self._bound_text += len(value)
            if len(self._text) + self._bound_text > MAX_TEXT:
                self._fail(
                    f"filter and bound strings must be at most {MAX_TEXT} characters", position
                )
            return value
        if isinstance(value, bool) or not isinstance(value, int | float):
            self._fail(
                f"parameter {name!r} must be ints, floats or strings, got {type(value).__name__}",
                position,
            )
        if isinstance(value, float) and not math.isfinite(value):
            self._fail(f"parameter {name!r} must be finite, got {value}", position)
        if abs(value) >= 10**_MAX_DIGITS:
            self._fail(f"parameter {name!r} must have at most {_MAX_DIGITS} digits", position)
        return value

    def _keyword(self) -> str | None:
        kind = self._token.kind
        if kind in _SYMBOLS:
            return _SYMBOLS[kind]
        word = str(self._token.value).lower() if kind == "word" else ""
        return word if word in FILTER_KEYWORDS else None

    def _advance(self) -> None:
        self._token = self._scan()

    def _scan(self) -> _Token:
        match = _TOKEN.match(self._text, self._next_position)
        if match is not None and match.lastgroup == "space":
            self._next_position = match.end()
            match = _TOKEN.match(self._text, self._next_position)
        start = self._next_position
        if start == len(self._text):
            return _Token("end", "", start)
        if match is None:
            self._refuse_character(start)
        self._next_position = match.end()
        kind = str(match.lastgroup)
        found = match[kind]
        if kind == "operator":
            return _Token(found, found, start)
        if kind == "number":
            return _Token("number", self._number(found, start), start)
        if kind == "string":
            return _Token("string", self._unescape(found[1:-1], start + 1), start)
        return _Token(kind, found, start)

    def _refuse_character(self, start: int) -> NoReturn:
        letter = self._text[start]
        if letter == '"':
            self._fail("string has no closing '\"'", start)
        if letter == "$":
            self._fail("expected a name after '$'", start)
        if letter.isdigit() or letter == "-":
            self._fail("malformed number; put text that begins with a digit in quotes", start)
        self._fail(f"unexpected character {letter!r}", start)

    def _number(self, digits: str, start: int) -> int | float:
        if len(digits) > _MAX_DIGITS:
            self._fail(f"number must have at most {_MAX_DIGITS} digits", start)
        if digits.lstrip("-").isdigit():
            return int(digits)
        number = float(digits)
        if not math.isfinite(number):
            self._fail(f"number {_short(digits)} is too large", start)
        return number

    def _unescape(self, body: str, start: int) -> str:
        def replace(match: re.Match[str]) -> str:
            escape = match[1]
            if len(escape) == 5:
                letter = chr(int(escape[1:], 16))
                if "\ud800" <= letter <= "\udfff":
                    self._fail(f"\\{escape} is half of a character", start + match.start())
                return letter
            if escape not in _ESCAPES:
                self._fail(
                    f'unknown escape {match[0]!r}; there are \\" \\\\ \\n \\r \\t \\uXXXX',
                    start + match.start(),
                )
            return _ESCAPES[escape]

        return _ESCAPE.sub(replace, body)

    def _fail_here(self, message: str) -> NoReturn:
        token = self._token
        if token.kind == "end":
            got = "the end"
        elif token.kind == "param":
            got = f"${token.value}"
        else:
            got = _short(token.value)
        self._fail(f"{message}, got {got}", token.position)

    def _fail(self, message: str, position: int) -> NoReturn:
        raise FilterError(message, position, self._text)


def _short(value: Scalar) -> str:
    text = repr(value) if isinstance(value, str) else str(value)
    return text if len(text) <= 40 else text[:37] + "..."

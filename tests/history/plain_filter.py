"""Filters in plain Python: what ``docs/filters.md`` says, item by item, without any other code.

An item is a mapping of attributes to a value, several values or none.
"""

import operator
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Holds = Callable[[Mapping[str, Any]], bool]

_TOKEN = re.compile(
    r"""\s*(?:
    (?P<number>-?[0-9]+(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?(?![\w.]))
    | (?P<word>[^\W\d][\w.-]*)
    | \$(?P<param>[A-Za-z_]\w*)
    | "(?P<string>(?:[^"\\]|\\.)*)"
    | (?P<operator><=|>=|==|!=|[<>=!&|():,])
    )""",
    re.VERBOSE | re.DOTALL,
)
_ESCAPE = re.compile(r"\\(u[0-9a-fA-F]{4}|.)", re.DOTALL)
_RELATIONS: Mapping[str, Callable[[Any, Any], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    "=": operator.eq,
    "==": operator.eq,
    "!=": operator.ne,
    ">=": operator.ge,
    ">": operator.gt,
}
_WORDS = {"and": "&", "or": "|", "not": "!", "in": "in"}


def compiled(text: str, params: Mapping[str, Any] | None = None) -> Holds:
    """Return the function that tells whether a filter holds for an item.

    Raises:
        ValueError: if the text is no filter.
    """
    parser = _Parser(text, params or {})
    if parser.peek() is None:
        return lambda item: True
    holds = parser.disjunction()
    if parser.peek() is not None:
        raise ValueError(f"expected the end of the filter {text!r}, got {parser.peek()}")
    return holds


class _Parser:
    def __init__(self, text: str, params: Mapping[str, Any]) -> None:
        self._params = params
        self._tokens: list[tuple[str, str]] = []
        at, end = 0, len(text.rstrip())
        while at < end:
            found = _TOKEN.match(text, at)
            if found is None:
                raise ValueError(f"no token at position {at} of {text!r}")
            kind = found.lastgroup or ""
            self._tokens.append((kind, found[kind]))
            at = found.end()
        self._next = 0

    def peek(self) -> str | None:
        """Return the operator that comes next, ``value`` for anything else, None at the end."""
        if self._next == len(self._tokens):
            return None
        kind, text = self._tokens[self._next]
        if kind == "word":
            return _WORDS.get(text.lower(), "value")
        return text if kind == "operator" else "value"

    def _take(self) -> tuple[str, str]:
        if self._next == len(self._tokens):
            raise ValueError("the filter ends too early")
        self._next += 1
        return self._tokens[self._next - 1]

    def _expect(self, symbol: str) -> None:
        if self.peek() != symbol:
            raise ValueError(f"expected {symbol}, got {self.peek()}")
        self._take()

    def disjunction(self) -> Holds:
        operands = [self._conjunction()]
        while self.peek() == "|":
            self._take()
            operands.append(self._conjunction())
        return lambda item: any(one(item) for one in operands)

    def _conjunction(self) -> Holds:
        operands = [self._negation()]
        while self.peek() == "&":
            self._take()
            operands.append(self._negation())
        return lambda item: all(one(item) for one in operands)

    def _negation(self) -> Holds:
        if self.peek() == "!":
            self._take()
            operand = self._negation()
            return lambda item: not operand(item)
        if self.peek() == "(":
            self._take()
            inner = self.disjunction()
            self._expect(")")
            return inner
        return self._condition()

    def _condition(self) -> Holds:
        kind, name = self._take()
        if kind != "word":
            raise ValueError(f"expected an attribute, got {name!r}")
        relation = self.peek()
        self._take()
        if relation == ":":
            return _any_of(name, self._value())
        if relation == "in":
            wanted: list[Any] = []
            if self.peek() == "(":
                while self.peek() != ")":
                    self._take()
                    wanted += self._value()
                self._take()
            else:
                wanted = self._value()
            return _any_of(name, wanted)
        if relation not in _RELATIONS:
            raise ValueError(f"expected a relation after {name!r}, got {relation}")
        compare = _RELATIONS[relation]
        (literal,) = self._value()
        return lambda item: any(compare(one, literal) for one in _values(item, name))

    def _value(self) -> list[Any]:
        kind, text = self._take()
        if kind == "param":
            bound = self._params[text]
            return list(bound) if _is_list(bound) else [bound]
        if kind == "number":
            return [float(text) if set(text) & set(".eE") else int(text)]
        if kind == "string":
            return [_ESCAPE.sub(_unescaped, text)]
        if kind == "word":
            return [text]
        raise ValueError(f"expected a value, got {text!r}")


def _unescaped(found: re.Match[str]) -> str:
    what = found[1]
    return (
        chr(int(what[1:], 16))
        if len(what) == 5
        else {"n": "\n", "r": "\r", "t": "\t"}.get(what, what)
    )


def _any_of(name: str, wanted: Sequence[Any]) -> Holds:
    kept = tuple(wanted)
    return lambda item: any(one in kept for one in _values(item, name))


def _values(item: Mapping[str, Any], name: str) -> Sequence[Any]:
    value = item.get(name)
    if value is None:
        return ()
    return value if _is_list(value) else (value,)


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)

"""The value language: a formula over the columns of a candidate, compiled to a tensor program.

The parser below is the only thing that reads a formula: no text reaches Python's own. The grammar
and its meaning are in ``docs/values.md``.

Shapes: L program length.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch
from torch import Tensor

from silvershard.kernels.value_program import MAX_VALUE_STACK, ValueOp
from silvershard.model.errors import TextError

MAX_TEXT = 65_536
"""Characters of a formula."""
MAX_DEPTH = 64
"""Parentheses, calls, NOTs and minus signs inside each other."""
MAX_LEAVES = 1_024
"""Numbers, names and weights of one formula."""


class ValueFormulaError(TextError):
    """A formula that cannot be parsed, or that names what does not exist."""


class CompiledValue(NamedTuple):
    """A formula as a program of the ``value_program`` operator."""

    ops: Tensor
    """``(L, 2)`` int32 rows ``[op, arg]``; arg is the column of a COLUMN, else 0."""
    constants: Tensor
    """``(L,)`` float32; the constant of a CONST at its own index, else 0."""


def compile_value(
    formula: str, columns: Sequence[str], weights: Mapping[str, float]
) -> CompiledValue:
    """The program of a value formula.

    Args:
        formula: text in the value language.
        columns: names of the columns, in the order of the tensor that the program will read.
        weights: a finite number for every ``$name``; names that the formula does not use are fine.

    Raises:
        ValueFormulaError: with the position, if the formula is malformed, too long, too deep or too
            wide, names an unknown column, weight or function, holds a number that float32 cannot,
            or has a part without columns that is not finite, such as a division by zero.
    """
    return _Compiler(formula, columns, weights).compile()


class _Function(NamedTuple):
    fewest: int
    most: int | None
    between: tuple[ValueOp, ...] = ()
    """Operations after the second argument, the third, and so on; the last one repeats."""
    last: ValueOp | None = None
    """Operation after all arguments."""


class _Token(NamedTuple):
    kind: str
    """name, number, weight, end, or the operator or keyword itself."""
    text: str
    position: int


_TOKEN = re.compile(
    r"""
    (?P<space>\s+)
    | (?P<name>[A-Za-z_][A-Za-z0-9_]*)
    | (?P<number>(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?(?![\w.]))
    | \$(?P<weight>[A-Za-z_][A-Za-z0-9_]*)
    | (?P<operator><=|>=|==|!=|[-+*/<>(),])
    """,
    re.VERBOSE,
)
_KEYWORDS = frozenset({"and", "or", "not"})
_NOT_BINDS = 3
_COMPARISON_BINDS = 4
_MINUS_BINDS = 7
_BINARY: Mapping[str, tuple[int, ValueOp]] = {
    "or": (1, ValueOp.OR),
    "and": (2, ValueOp.AND),
    "<": (_COMPARISON_BINDS, ValueOp.LT),
    "<=": (_COMPARISON_BINDS, ValueOp.LE),
    ">": (_COMPARISON_BINDS, ValueOp.GT),
    ">=": (_COMPARISON_BINDS, ValueOp.GE),
    "==": (_COMPARISON_BINDS, ValueOp.EQ),
    "!=": (_COMPARISON_BINDS, ValueOp.NE),
    "+": (5, ValueOp.ADD),
    "-": (5, ValueOp.SUB),
    "*": (6, ValueOp.MUL),
    "/": (6, ValueOp.DIV),
}
"""How tightly each operator binds, and what it does; all group from the left."""
_FUNCTIONS: Mapping[str, _Function] = {
    "abs": _Function(1, 1, last=ValueOp.ABS),
    "clip": _Function(3, 3, between=(ValueOp.MAX, ValueOp.MIN)),
    "exp": _Function(1, 1, last=ValueOp.EXP),
    "log": _Function(1, 1, last=ValueOp.LOG),
    "max": _Function(2, None, between=(ValueOp.MAX,)),
    "min": _Function(2, None, between=(ValueOp.MIN,)),
    "sqrt": _Function(1, 1, last=ValueOp.SQRT),
    "where": _Function(3, 3, last=ValueOp.WHERE),
}
_POPPED: Mapping[ValueOp, int] = {
    ValueOp.NEG: 1,
    ValueOp.NOT: 1,
    ValueOp.ABS: 1,
    ValueOp.EXP: 1,
    ValueOp.LOG: 1,
    ValueOp.SQRT: 1,
    ValueOp.WHERE: 3,
    ValueOp.COLUMN: 0,
    ValueOp.CONST: 0,
}

_VALUES: Mapping[ValueOp, Callable[..., np.floating[Any] | np.bool_]] = {
    ValueOp.ADD: np.add,
    ValueOp.SUB: np.subtract,
    ValueOp.MUL: np.multiply,
    ValueOp.DIV: np.divide,
    ValueOp.NEG: np.negative,
    ValueOp.MIN: np.minimum,
    ValueOp.MAX: np.maximum,
    ValueOp.WHERE: lambda chosen, a, b: a if chosen else b,
    ValueOp.LT: np.less,
    ValueOp.LE: np.less_equal,
    ValueOp.GT: np.greater,
    ValueOp.GE: np.greater_equal,
    ValueOp.EQ: np.equal,
    ValueOp.NE: np.not_equal,
    ValueOp.AND: np.logical_and,
    ValueOp.OR: np.logical_or,
    ValueOp.NOT: np.logical_not,
    ValueOp.LOG: np.log,
    ValueOp.EXP: np.exp,
    ValueOp.ABS: np.abs,
    ValueOp.SQRT: np.sqrt,
}
"""What an operation gives for numbers; only to find parts that no candidate can make finite."""

VALUE_KEYWORDS = _KEYWORDS | _FUNCTIONS.keys()
"""Names that no column may have."""


class _Waiting(NamedTuple):
    """What the compiler knows of a value on the stack."""

    value: np.float32 | None = None
    """The value, where it is the same for every candidate."""
    fault: tuple[str, int] | None = None
    """Why it can be finite for no candidate, and where; refused once something depends on it."""


class _Compiler:
    """Parses by recursive descent and emits each operation as soon as its operands are out."""

    def __init__(self, formula: str, columns: Sequence[str], weights: Mapping[str, float]) -> None:
        self._text = formula
        self._columns = {name: index for index, name in enumerate(columns)}
        self._weights = weights
        self._ops: list[tuple[int, int]] = []
        self._constants: list[float] = []
        self._stack: list[_Waiting] = []
        self._num_leaves = 0
        if len(formula) > MAX_TEXT:
            self._fail(
                f"formula must be at most {MAX_TEXT} characters, got {len(formula)}", MAX_TEXT
            )
        self._next_position = 0
        self._token = self._scan()

    def compile(self) -> CompiledValue:
        self._expression(0, 1)
        if self._token.kind != "end":
            self._fail_here("expected an operator or the end of the formula")
        self._refuse_fault(self._stack[-1])
        return CompiledValue(
            torch.tensor(self._ops, dtype=torch.int32).reshape(-1, 2),
            torch.tensor(self._constants, dtype=torch.float32),
        )

    def _expression(self, depth: int, loosest: int) -> None:
        """Compile operands joined by operators that bind as tightly as ``loosest`` or tighter."""
        self._operand(depth, loosest)
        while (binary := _BINARY.get(self._token.kind)) is not None and binary[0] >= loosest:
            binds, op = binary
            position = self._token.position
            self._advance()
            self._expression(depth, binds + 1)
            self._emit(op, position=position)
            following = _BINARY.get(self._token.kind, (0, op))[0]
            if binds == following == _COMPARISON_BINDS:
                self._fail_here("comparisons do not chain; join them with 'and'")

    def _operand(self, depth: int, loosest: int) -> None:
        if depth > MAX_DEPTH:
            self._fail_here(f"formula must be nested at most {MAX_DEPTH} deep")
        if self._token.kind == "not" and loosest <= _NOT_BINDS:
            self._advance()
            self._expression(depth + 1, _NOT_BINDS)
            self._emit(ValueOp.NOT)
        elif self._accept("-"):
            self._operand(depth + 1, _MINUS_BINDS)
            self._emit(ValueOp.NEG)
        else:
            self._primary(depth)

    def _primary(self, depth: int) -> None:
        token = self._token
        if token.kind == "(":
            self._advance()
            self._expression(depth + 1, 1)
            self._expect(")", f"for the '(' at position {token.position}")
        elif token.kind == "number":
            self._advance()
            self._emit_constant(float(token.text), token)
        elif token.kind == "weight":
            self._advance()
            self._weight(token)
        elif token.kind == "name":
            self._advance()
            if self._token.kind == "(":
                self._call(token, depth)
            else:
                self._column(token)
        else:
            self._fail_here("expected a number, a name, a $weight or '('")

    def _call(self, name: _Token, depth: int) -> None:
        function = _FUNCTIONS.get(name.text)
        if function is None:
            self._fail(
                f"unknown function {name.text!r}; there are {', '.join(sorted(_FUNCTIONS))}",
                name.position,
            )
        count = 0
        while count == 0 or self._token.kind == ",":
            self._advance()
            self._expression(depth + 1, 1)
            count += 1
            if count > (function.most or count):
                self._fail(f"{name.text} takes {_arguments(function)}, got more", name.position)
            if function.between and count > 1:
                between = function.between[min(count - 2, len(function.between) - 1)]
                self._emit(between, position=name.position)
        self._expect(")", f"after the arguments of {name.text}")
        if count < function.fewest:
            self._fail(f"{name.text} takes {_arguments(function)}, got {count}", name.position)
        if function.last is not None:
            self._emit(function.last, position=name.position)

    def _column(self, name: _Token) -> None:
        column = self._columns.get(name.text)
        if column is None:
            hint = f"; {name.text} is a function" if name.text in _FUNCTIONS else ""
            known = ", ".join(self._columns) or "none"
            self._fail(f"unknown name {name.text!r}; the columns are {known}{hint}", name.position)
        self._leaf(name, ValueOp.COLUMN, column, 0.0)

    def _weight(self, name: _Token) -> None:
        if name.text not in self._weights:
            known = ", ".join(f"${weight}" for weight in self._weights) or "none"
            self._fail(f"unknown weight ${name.text}; the weights are {known}", name.position)
        value = self._weights[name.text]
        if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating):
            self._fail(
                f"weight ${name.text} must be a number, got {type(value).__name__}", name.position
            )
        self._emit_constant(value, name)

    def _emit_constant(self, value: float, token: _Token) -> None:
        try:
            with np.errstate(over="ignore"):
                rounded = float(np.float32(value))
        except OverflowError:
            rounded = math.inf
        what = f"${token.text}" if token.kind == "weight" else token.text[:40]
        if not math.isfinite(rounded):
            self._fail(f"{what} must be finite in float32", token.position)
        if rounded == 0 and value != 0:
            self._fail(f"{what} is too small for float32", token.position)
        self._leaf(token, ValueOp.CONST, 0, rounded)

    def _leaf(self, token: _Token, op: ValueOp, argument: int, constant: float) -> None:
        self._num_leaves += 1
        if self._num_leaves > MAX_LEAVES:
            self._fail(f"formula must have at most {MAX_LEAVES} numbers and names", token.position)
        self._emit(op, argument, constant, token.position)

    def _emit(
        self, op: ValueOp, argument: int = 0, constant: float = 0.0, position: int | None = None
    ) -> None:
        self._ops.append((op, argument))
        self._constants.append(constant)
        popped = _POPPED.get(op, 2)
        operands = self._stack[len(self._stack) - popped :]
        del self._stack[len(self._stack) - popped :]
        at = self._token.position if position is None else position
        self._stack.append(self._outcome(op, operands, constant, at))
        if len(self._stack) > MAX_VALUE_STACK:
            self._fail(
                f"formula keeps more than {MAX_VALUE_STACK} values waiting here; "
                "put the nested part first",
                at,
            )

    def _outcome(
        self, op: ValueOp, operands: Sequence[_Waiting], constant: float, position: int
    ) -> _Waiting:
        """What is known of the result of an operation."""
        if op == ValueOp.CONST:
            return _Waiting(np.float32(constant))
        if op == ValueOp.COLUMN:
            return _Waiting()
        if op == ValueOp.WHERE and operands[0].value is not None and not operands[0].fault:
            # The other branch may be whatever it is: no candidate takes it.
            return operands[1] if operands[0].value else operands[2]
        for operand in operands:
            self._refuse_fault(operand)
        if op == ValueOp.DIV and operands[1].value == 0:
            return _Waiting(fault=("formula divides by zero", position))
        known = [operand.value for operand in operands if operand.value is not None]
        if len(known) < len(operands):
            return _Waiting()
        with np.errstate(all="ignore"):
            value = np.float32(_VALUES[op](*known))
        if np.isfinite(value):
            return _Waiting(value)
        fault = "this part of the formula is not finite, whatever the candidate"
        return _Waiting(fault=(fault, position))

    def _refuse_fault(self, waiting: _Waiting) -> None:
        if waiting.fault is not None:
            self._fail(*waiting.fault)

    def _accept(self, kind: str) -> bool:
        if self._token.kind != kind:
            return False
        self._advance()
        return True

    def _expect(self, kind: str, reason: str) -> None:
        if not self._accept(kind):
            self._fail_here(f"expected {kind!r} {reason}")

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
            letter = self._text[start]
            if letter == "$":
                self._fail("expected a name after '$'", start)
            if self._text[start : start + 2].lstrip(".")[:1].isdigit():
                self._fail("malformed number", start)
            self._fail(f"unexpected character {letter!r}", start)
        self._next_position = match.end()
        kind = str(match.lastgroup)
        found = match[kind]
        if kind == "operator" or (kind == "name" and found.lower() in _KEYWORDS):
            return _Token(found.lower(), found, start)
        return _Token(kind, found, start)

    def _fail_here(self, message: str) -> NoReturn:
        token = self._token
        got = "the end" if token.kind == "end" else repr(token.text[:40])
        self._fail(f"{message}, got {got}", token.position)

    def _fail(self, message: str, position: int) -> NoReturn:
        raise ValueFormulaError(message, position, self._text)


def _arguments(function: _Function) -> str:
    plural = "" if function.fewest == 1 else "s"
    return f"{'' if function.most else 'at least '}{function.fewest} argument{plural}"

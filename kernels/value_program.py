"""Value-model programs over the columns of candidates, one program per request.

Shapes: n candidates, V columns, B requests, L program length.
"""

from collections.abc import Callable
from enum import IntEnum

import torch
from torch import Tensor

from silvershard.kernels.contract import (
    check_devices,
    check_not_nan,
    check_range,
    check_tensor,
)
from silvershard.kernels.fixed_math import (
    fixed_exp_reference,
    fixed_log_reference,
    fixed_sqrt_reference,
)
from silvershard.kernels.native_library import is_plain_cpu, run_on_cpu
from silvershard.kernels.native_operators import value_program_native

MAX_VALUE_STACK = 32

ValueInstruction = tuple[int, int, int]


class ValueOp(IntEnum):
    """First number of an instruction: what it does to the stack."""

    NOP = 0
    COLUMN = 1
    CONST = 2
    ADD = 3
    SUB = 4
    MUL = 5
    DIV = 6
    NEG = 7
    MIN = 8
    MAX = 9
    WHERE = 10
    LT = 11
    LE = 12
    GT = 13
    GE = 14
    EQ = 15
    NE = 16
    AND = 17
    OR = 18
    NOT = 19
    LOG = 20
    EXP = 21
    ABS = 22
    SQRT = 23


_UNARY_OPS = frozenset(
    (ValueOp.NEG, ValueOp.NOT, ValueOp.LOG, ValueOp.EXP, ValueOp.ABS, ValueOp.SQRT)
)
_NUM_OPERANDS = {
    op: 1 if op in _UNARY_OPS else 3 if op == ValueOp.WHERE else 2
    for op in ValueOp
    if op > ValueOp.CONST
}


def value_program(columns: Tensor, request: Tensor, programs: Tensor, constants: Tensor) -> Tensor:
    """Compute the value of every candidate with the program of its request.

    A program is a list of rows ``[op, arg]`` for a stack machine in float32, each operation rounded
    by itself. COLUMN pushes column ``arg``, CONST pushes the constant at the instruction's own
    place. WHERE takes ``condition, a, b``. Non-zero is true, NaN included; truth values are 1.0 and
    0.0.

    Args:
        columns: ``(n, V)`` float32; NaN and infinities follow IEEE arithmetic.
        request: ``(n,)`` int64 in [0, B).
        programs: ``(B, L, 2)`` int32, see ``ValueOp``; NOP rows are padding.
        constants: ``(B, L)`` float32, no NaN.

    Returns:
        ``(n,)`` float32; a NaN result becomes ``-inf``.

    Raises:
        ValueError: if shapes, dtypes, devices or ranges disagree, or a program is malformed:
            unknown opcode, stack below 0 or above 32, other than one value left.
    """
    check_tensor("columns", columns, torch.float32, ("n", "V"))
    check_tensor("request", request, torch.int64, (columns.shape[0],))
    check_tensor("programs", programs, torch.int32, ("B", "L", 2))
    check_tensor("constants", constants, torch.float32, tuple(programs.shape[:2]))
    check_devices(columns=columns, request=request, programs=programs, constants=constants)
    run = _value_program_cpu if is_plain_cpu(columns, constants) else _value_program
    answer: Tensor = run(columns, request, programs, constants)
    return answer


def value_program_reference(
    columns: Tensor, request: Tensor, programs: Tensor, constants: Tensor
) -> Tensor:
    """The definition of ``value_program``; same contract, plain PyTorch, no validation."""
    order: dict[tuple[ValueInstruction, ...], int] = {}
    numbers = [
        order.setdefault(_parse(rows, columns.shape[1]), len(order)) for rows in programs.tolist()
    ]
    values = columns.new_empty(columns.shape[0])
    if len(order) == 1:
        values[:] = _run(next(iter(order)), columns, request, constants)
    elif order:
        which = torch.tensor(numbers, dtype=torch.int64, device=columns.device)[request]  # (n,)
        for program, number in order.items():
            rows = (which == number).nonzero().squeeze(1)
            values[rows] = _run(program, columns[rows], request[rows], constants)
    return torch.where(values.isnan(), -torch.inf, values)


def _parse(rows: list[list[int]], num_columns: int) -> tuple[ValueInstruction, ...]:
    """Check one program; its instructions with their places, without NOP."""
    program: list[ValueInstruction] = []
    depth = 0
    for place, (op, arg) in enumerate(rows):
        if op == ValueOp.NOP:
            continue
        if op == ValueOp.COLUMN and not 0 <= arg < num_columns:
            raise ValueError(
                f"program row {place}: column must be in [0, {num_columns}), got {arg}"
            )
        if op in (ValueOp.COLUMN, ValueOp.CONST):
            depth += 1
            if depth > MAX_VALUE_STACK:
                raise ValueError(
                    f"program row {place}: stack must be at most {MAX_VALUE_STACK} deep"
                )
        elif op in _NUM_OPERANDS:
            needed = _NUM_OPERANDS[ValueOp(op)]
            if depth < needed:
                raise ValueError(
                    f"program row {place}: {ValueOp(op).name} needs {needed} values on the stack, "
                    f"got {depth}"
                )
            depth -= needed - 1
        else:
            raise ValueError(f"program row {place}: unknown opcode {op}")
        program.append((op, arg, place))
    if depth != 1:
        raise ValueError(f"program must leave one value on the stack, got {depth}")
    return tuple(program)


def _run(
    program: tuple[ValueInstruction, ...], columns: Tensor, request: Tensor, constants: Tensor
) -> Tensor:
    stack: list[Tensor] = []
    for op, arg, place in program:
        if op == ValueOp.COLUMN:
            stack.append(columns[:, arg])
        elif op == ValueOp.CONST:
            stack.append(constants[:, place][request])
        else:
            needed = _NUM_OPERANDS[ValueOp(op)]
            operands = stack[-needed:]
            del stack[-needed:]
            stack.append(_apply(ValueOp(op), operands))
    return stack.pop()


def _apply(op: ValueOp, operands: list[Tensor]) -> Tensor:
    a = operands[0]
    if op == ValueOp.WHERE:
        return torch.where(a != 0.0, operands[1], operands[2])
    if op in _UNARY:
        return _UNARY[op](a)
    if op in _COMPARISONS:
        return _COMPARISONS[op](a, operands[1]).float()
    return _ARITHMETIC[op](a, operands[1])


_UNARY: dict[ValueOp, Callable[[Tensor], Tensor]] = {
    ValueOp.NEG: torch.neg,
    ValueOp.NOT: lambda a: (a == 0.0).float(),
    ValueOp.LOG: fixed_log_reference,
    ValueOp.EXP: fixed_exp_reference,
    ValueOp.ABS: torch.abs,
    ValueOp.SQRT: fixed_sqrt_reference,
}
# MIN and MAX by comparison: torch.minimum may answer either zero of -0.0 and 0.0.
_ARITHMETIC: dict[ValueOp, Callable[[Tensor, Tensor], Tensor]] = {
    ValueOp.ADD: torch.add,
    ValueOp.SUB: torch.sub,
    ValueOp.MUL: torch.mul,
    ValueOp.DIV: torch.div,
    ValueOp.MIN: lambda a, b: torch.where((a <= b) | a.isnan(), a, b),
    ValueOp.MAX: lambda a, b: torch.where((a >= b) | a.isnan(), a, b),
}
_COMPARISONS: dict[ValueOp, Callable[[Tensor, Tensor], Tensor]] = {
    ValueOp.LT: torch.lt,
    ValueOp.LE: torch.le,
    ValueOp.GT: torch.gt,
    ValueOp.GE: torch.ge,
    ValueOp.EQ: torch.eq,
    ValueOp.NE: torch.ne,
    ValueOp.AND: lambda a, b: (a != 0.0) & (b != 0.0),
    ValueOp.OR: lambda a, b: (a != 0.0) | (b != 0.0),
}


def _checked_value_program(
    columns: Tensor, request: Tensor, programs: Tensor, constants: Tensor
) -> Tensor:
    check_range("request", request, 0, programs.shape[0])
    check_not_nan("constants", constants)
    return value_program_reference(columns, request, programs, constants)


_value_program = torch.library.custom_op(
    "silvershard::value_program", value_program_reference, mutates_args=()
)
_value_program_cpu = run_on_cpu(value_program_native, _checked_value_program)
_value_program.register_kernel("cpu")(_value_program_cpu)


@_value_program.register_kernel("cuda")
def _(columns: Tensor, request: Tensor, programs: Tensor, constants: Tensor) -> Tensor:
    from silvershard.kernels.value_program_triton import value_program_triton

    return value_program_triton(columns, request, programs, constants)


@_value_program.register_fake
def _(columns: Tensor, request: Tensor, programs: Tensor, constants: Tensor) -> Tensor:
    return columns.new_empty(columns.shape[:1])

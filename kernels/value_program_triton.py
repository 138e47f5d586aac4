"""Value programs on CUDA: one program evaluates a block of candidates, one request at a time.

A lane is a candidate. The requests that occur in the block are taken in turn, so that the branches
on the opcode are uniform; candidates of one request usually stand together, and then there is one
turn. The two upper levels of the stack live in registers, the rest in a tile of int32 that holds
their bits.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

from silvershard.kernels.device_guard import on_device_of_operands
from silvershard.kernels.fixed_math_triton import fixed_exp, fixed_log
from silvershard.kernels.value_program import MAX_VALUE_STACK, ValueOp

BLOCK = 128
_COLUMN = tl.constexpr(int(ValueOp.COLUMN))
_CONST = tl.constexpr(int(ValueOp.CONST))
_ADD = tl.constexpr(int(ValueOp.ADD))
_SUB = tl.constexpr(int(ValueOp.SUB))
_MUL = tl.constexpr(int(ValueOp.MUL))
_DIV = tl.constexpr(int(ValueOp.DIV))
_NEG = tl.constexpr(int(ValueOp.NEG))
_MIN = tl.constexpr(int(ValueOp.MIN))
_MAX = tl.constexpr(int(ValueOp.MAX))
_WHERE = tl.constexpr(int(ValueOp.WHERE))
_LT = tl.constexpr(int(ValueOp.LT))
_LE = tl.constexpr(int(ValueOp.LE))
_GT = tl.constexpr(int(ValueOp.GT))
_GE = tl.constexpr(int(ValueOp.GE))
_EQ = tl.constexpr(int(ValueOp.EQ))
_NE = tl.constexpr(int(ValueOp.NE))
_AND = tl.constexpr(int(ValueOp.AND))
_OR = tl.constexpr(int(ValueOp.OR))
_NOT = tl.constexpr(int(ValueOp.NOT))
_LOG = tl.constexpr(int(ValueOp.LOG))
_EXP = tl.constexpr(int(ValueOp.EXP))
_ABS = tl.constexpr(int(ValueOp.ABS))
_SQRT = tl.constexpr(int(ValueOp.SQRT))


def deep_levels(length: int) -> int:
    """Stack levels below the two in registers: a power of two.

    A program of n leaves that leaves one value has at least (n - 1) / 2 operators.
    """
    depth = min(MAX_VALUE_STACK, (2 * length + 1) // 3)
    return 1 << max(0, depth - 3).bit_length()


@triton.jit
def _unary(op, a):
    bits = a.to(tl.int32, bitcast=True)
    result = a
    if op == _NEG:
        result = (bits ^ -2147483648).to(tl.float32, bitcast=True)
    elif op == _NOT:
        result = (a == 0.0).to(tl.float32)
    elif op == _LOG:
        result = fixed_log(a)
    elif op == _EXP:
        result = fixed_exp(a)
    elif op == _ABS:
        result = (bits & 0x7FFFFFFF).to(tl.float32, bitcast=True)
    elif op == _SQRT:
        result = tl.sqrt_rn(a)
    return result


@triton.jit
def _binary(op, a, b):
    result = a
    if op == _ADD:
        result = a + b
    elif op == _SUB:
        result = a - b
    elif op == _MUL:
        result = a * b
    elif op == _DIV:
        result = tl.div_rn(a, b)
    elif op == _MIN:
        result = tl.where((a <= b) | (a != a), a, b)
    elif op == _MAX:
        result = tl.where((a >= b) | (a != a), a, b)
    elif op == _LT:
        result = (a < b).to(tl.float32)
    elif op == _LE:
        result = (a <= b).to(tl.float32)
    elif op == _GT:
        result = (a > b).to(tl.float32)
    elif op == _GE:
        result = (a >= b).to(tl.float32)
    elif op == _EQ:
        result = (a == b).to(tl.float32)
    elif op == _NE:
        result = (a != b).to(tl.float32)
    elif op == _AND:
        result = ((a != 0.0) & (b != 0.0)).to(tl.float32)
    elif op == _OR:
        result = ((a != 0.0) | (b != 0.0)).to(tl.float32)
    return result


@triton.jit
def _at_level(deep, level, wanted):
    """The values that lie ``wanted`` levels from the bottom."""
    return tl.sum(tl.where(level == wanted, deep, 0), axis=1).to(tl.float32, bitcast=True)


@triton.jit
def _value_program_kernel(
    values_ptr,
    columns_ptr,
    request_ptr,
    programs_ptr,
    constants_ptr,
    num_candidates,
    num_columns,
    num_requests,
    length,
    DEEP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    candidate = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = candidate < num_candidates
    request = tl.load(request_ptr + candidate, mask=inside, other=-1)
    known = inside & (request >= 0) & (request < num_requests)
    lowest = tl.min(tl.where(known, request, num_requests))
    highest = tl.max(tl.where(known, request, -1))
    values = tl.full([BLOCK], float("-inf"), tl.float32)
    level = tl.arange(0, DEEP)[None, :]
    current = lowest
    while current <= highest:
        mine = known & (request == current)
        if tl.max(mine.to(tl.int32)) > 0:
            top = tl.zeros([BLOCK], tl.float32)
            second = tl.zeros([BLOCK], tl.float32)
            deep = tl.zeros([BLOCK, DEEP], tl.int32)
            depth = tl.full([], 0, tl.int32)
            row = tl.full([], 0, tl.int32)
            while row < length:
                op = tl.load(programs_ptr + (current * length + row) * 2)
                arg = tl.load(programs_ptr + (current * length + row) * 2 + 1)
                if (op == _COLUMN) | (op == _CONST):
                    if depth >= 2:
                        bits = second.to(tl.int32, bitcast=True)[:, None]
                        deep = tl.where(level == depth - 2, bits, deep)
                    second = top
                    if op == _COLUMN:
                        column = tl.zeros([BLOCK], tl.int32) + arg
                        there = mine & (column >= 0) & (column < num_columns)
                        top = tl.load(
                            columns_ptr + candidate * num_columns + column, mask=there, other=0.0
                        )
                    else:
                        constant = tl.load(constants_ptr + current * length + row)
                        top = tl.zeros([BLOCK], tl.float32) + constant
                    depth += 1
                elif op == _WHERE:
                    top = tl.where(_at_level(deep, level, depth - 3) != 0.0, second, top)
                    if depth >= 4:
                        second = _at_level(deep, level, depth - 4)
                    depth -= 2
                elif (op == _NEG) | (op == _NOT) | ((op >= _LOG) & (op <= _SQRT)):
                    top = _unary(op, top)
                elif (op >= _ADD) & (op <= _OR):
                    top = _binary(op, second, top)
                    if depth >= 3:
                        second = _at_level(deep, level, depth - 3)
                    depth -= 1
                row += 1
            values = tl.where(mine & (top == top), top, values)
        current += 1
    tl.store(values_ptr + candidate, values, mask=inside)


@on_device_of_operands
def value_program_triton(
    columns: Tensor, request: Tensor, programs: Tensor, constants: Tensor
) -> Tensor:
    """The CUDA implementation of ``value_program``; same contract, no validation."""
    num_candidates, num_columns = columns.shape
    num_requests, length = programs.shape[:2]
    values = torch.empty(num_candidates, dtype=torch.float32, device=columns.device)
    if num_candidates == 0:
        return values
    _value_program_kernel[triton.cdiv(num_candidates, BLOCK),](
        values,
        columns.contiguous(),
        request.contiguous(),
        programs.contiguous(),
        constants.contiguous(),
        num_candidates,
        num_columns,
        num_requests,
        length,
        DEEP=deep_levels(length),
        BLOCK=BLOCK,
        enable_fp_fusion=False,
    )
    return values

import math
import random
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from silvershard.kernels import (
    MAX_VALUE_STACK,
    ValueOp,
    fixed_exp,
    fixed_log,
    value_program,
)

pytestmark = pytest.mark.usefixtures("implementation")

Rows = list[tuple[int, int]]
Scalar = np.float32
NAN = Scalar(math.nan)
UNARY: dict[ValueOp, Callable[[Scalar], Scalar]] = {
    ValueOp.NEG: lambda a: -a,
    ValueOp.NOT: lambda a: Scalar(a == 0),
    ValueOp.LOG: lambda a: Scalar(fixed_log(torch.tensor([a])).item()),
    ValueOp.EXP: lambda a: Scalar(fixed_exp(torch.tensor([a])).item()),
    ValueOp.ABS: abs,
    ValueOp.SQRT: np.sqrt,
}
BINARY: dict[ValueOp, Callable[[Scalar, Scalar], Scalar]] = {
    ValueOp.ADD: lambda a, b: a + b,
    ValueOp.SUB: lambda a, b: a - b,
    ValueOp.MUL: lambda a, b: a * b,
    ValueOp.DIV: np.divide,
    ValueOp.MIN: lambda a, b: NAN if np.isnan(a) or np.isnan(b) else min(a, b),
    ValueOp.MAX: lambda a, b: NAN if np.isnan(a) or np.isnan(b) else max(a, b),
    ValueOp.LT: lambda a, b: Scalar(a < b),
    ValueOp.LE: lambda a, b: Scalar(a <= b),
    ValueOp.GT: lambda a, b: Scalar(a > b),
    ValueOp.GE: lambda a, b: Scalar(a >= b),
    ValueOp.EQ: lambda a, b: Scalar(a == b),
    ValueOp.NE: lambda a, b: Scalar(a != b),
    ValueOp.AND: lambda a, b: Scalar(a != 0 and b != 0),
    ValueOp.OR: lambda a, b: Scalar(a != 0 or b != 0),
}


def tensors(programs: Sequence[tuple[Rows, list[float]]]) -> tuple[Tensor, Tensor]:
    length = max(len(rows) for rows, _ in programs)
    padded = [list(rows) + [(0, 0)] * (length - len(rows)) for rows, _ in programs]
    constants = [list(values) + [0.0] * (length - len(values)) for _, values in programs]
    return (
        torch.tensor(padded, dtype=torch.int32).view(len(programs), length, 2),
        torch.tensor(constants, dtype=torch.float32).view(len(programs), length),
    )


def run(columns: list[list[float]], rows: Rows, constants: Sequence[float] = ()) -> list[float]:
    programs, values = tensors([(rows, list(constants))])
    request = torch.zeros(len(columns), dtype=torch.int64)
    answer: list[float] = value_program(torch.tensor(columns), request, programs, values).tolist()
    return answer


def slow(row: list[float], rows: Rows, constants: list[float]) -> float:
    """The same stack machine on one row of numpy scalars."""
    stack: list[Scalar] = []
    with np.errstate(all="ignore"):
        for place, (op, arg) in enumerate(rows):
            if op == ValueOp.COLUMN:
                stack.append(Scalar(row[arg]))
            elif op == ValueOp.CONST:
                stack.append(Scalar(constants[place]))
            elif op == ValueOp.WHERE:
                b, a, condition = stack.pop(), stack.pop(), stack.pop()
                stack.append(a if condition != 0 else b)
            elif op in UNARY:
                stack.append(UNARY[ValueOp(op)](stack.pop()))
            elif op in BINARY:
                b, a = stack.pop(), stack.pop()
                stack.append(BINARY[ValueOp(op)](a, b))
    value = float(stack.pop())
    return -math.inf if math.isnan(value) else value


def random_program(rng: random.Random, depth: int) -> tuple[Rows, list[float]]:
    def grow(depth: int) -> Rows:
        if depth == 0 or rng.random() < 0.15:
            return [(rng.choice([ValueOp.COLUMN, ValueOp.CONST]), rng.randrange(3))]
        kind = rng.random()
        if kind < 0.3:
            return [*grow(depth - 1), (rng.choice(list(UNARY)), 0)]
        if kind < 0.4:
            return [*grow(depth - 1), *grow(depth - 1), *grow(depth - 1), (ValueOp.WHERE, 0)]
        return [*grow(depth - 1), *grow(depth - 1), (rng.choice(list(BINARY)), 0)]

    rows = grow(depth)
    if rng.random() < 0.3:
        rows.insert(rng.randrange(len(rows) + 1), (ValueOp.NOP, 0))
    return rows, [rng.choice([0.0, 1.0, -2.5, 0.125, 7.0, 1e30]) for _ in rows]


def test_the_numbers_of_opcodes_are_fixed() -> None:
    assert [op.name for op in ValueOp] == [
        "NOP", "COLUMN", "CONST", "ADD", "SUB", "MUL", "DIV", "NEG", "MIN", "MAX", "WHERE", "LT",
        "LE", "GT", "GE", "EQ", "NE", "AND", "OR", "NOT", "LOG", "EXP", "ABS", "SQRT",
    ]  # fmt: skip
    assert [op.value for op in ValueOp] == list(range(24))


def test_hand_computed_formula() -> None:
    # 4 * share * where(age < 24, 1.5, 1) - report
    rows: Rows = [
        (ValueOp.CONST, 0), (ValueOp.COLUMN, 0), (ValueOp.MUL, 0), (ValueOp.COLUMN, 1),
        (ValueOp.CONST, 0), (ValueOp.LT, 0), (ValueOp.CONST, 0), (ValueOp.CONST, 0),
        (ValueOp.WHERE, 0), (ValueOp.MUL, 0), (ValueOp.COLUMN, 2), (ValueOp.SUB, 0),
    ]  # fmt: skip
    constants = [4.0, 0.0, 0.0, 0.0, 24.0, 0.0, 1.5, 1.0]
    columns = [[0.5, 23.0, 0.25], [0.5, 24.0, 0.25]]
    assert run(columns, rows, constants) == [2.75, 1.75]


def test_a_nan_result_is_minus_infinity() -> None:
    assert run([[-1.0]], [(ValueOp.COLUMN, 0), (ValueOp.SQRT, 0)]) == [-math.inf]
    assert run([[math.nan], [2.0]], [(ValueOp.COLUMN, 0)]) == [-math.inf, 2.0]
    division: Rows = [(ValueOp.COLUMN, 0), (ValueOp.COLUMN, 1), (ValueOp.DIV, 0)]
    assert run([[0.0, 0.0], [1.0, 0.0], [-1.0, 0.0]], division) == [-math.inf, math.inf, -math.inf]


@pytest.mark.parametrize("op", [ValueOp.MIN, ValueOp.MAX])
def test_minimum_and_maximum_of_two_zeros_do_not_depend_on_position(op: ValueOp) -> None:
    rows: Rows = [(ValueOp.COLUMN, 0), (ValueOp.COLUMN, 1), (op, 0)]
    programs, constants = tensors([(rows, [])])
    for size in range(1, 70):
        columns = torch.tensor([[0.0, -0.0]]).repeat(size, 1)
        request = torch.zeros(size, dtype=torch.int64)
        value = value_program(columns, request, programs, constants)
        assert not value.signbit().any()


@pytest.mark.parametrize("seed", range(8))
def test_random_programs_equal_a_stack_machine_in_numpy(seed: int) -> None:
    rng = random.Random(seed)
    batch = [random_program(rng, 4) for _ in range(12)]
    numbers = [0.0, -0.0, 1.0, -1.5, 3.0, 1e-3, 1e38, math.inf, math.nan, 100.0]
    columns = [[rng.choice(numbers) for _ in range(3)] for _ in range(97)]
    request = [rng.randrange(12) for _ in range(97)]
    programs, constants = tensors(batch)
    got = value_program(torch.tensor(columns), torch.tensor(request), programs, constants)
    expected = [slow(row, *batch[number]) for row, number in zip(columns, request, strict=True)]
    assert got.tolist() == expected


def test_candidates_do_not_influence_each_other() -> None:
    rng = random.Random(3)
    batch = [random_program(rng, 4) for _ in range(5)]
    programs, constants = tensors(batch)
    columns = torch.randn((200, 3), generator=torch.Generator().manual_seed(1))
    request = torch.arange(200) % 5
    whole = value_program(columns, request, programs, constants)
    for place in range(0, 200, 11):
        row = slice(place, place + 1)
        number = int(request[place])
        one = slice(number, number + 1)
        alone = value_program(columns[row], request[row] * 0, programs[one], constants[one])
        assert torch.equal(alone.view(torch.int32), whole[row].view(torch.int32))


def test_requests_share_a_program_but_not_its_constants() -> None:
    rows: Rows = [(ValueOp.CONST, 0)]
    programs, constants = tensors([(rows, [1.0]), (rows, [2.0]), (rows, [3.0])])
    got = value_program(torch.empty(4, 0), torch.tensor([2, 0, 1, 2]), programs, constants)
    assert got.tolist() == [3.0, 1.0, 2.0, 3.0]


def test_no_candidates_give_no_values() -> None:
    programs, constants = tensors([([(ValueOp.COLUMN, 0)], [])])
    none = torch.empty(0, dtype=torch.int64)
    assert value_program(torch.empty(0, 1), none, programs, constants).shape == (0,)
    assert value_program(torch.empty(0, 1), none, programs[:0], constants[:0]).shape == (0,)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([(24, 0)], "row 0: unknown opcode 24"),
        ([(-1, 0)], "row 0: unknown opcode -1"),
        ([], "must leave one value on the stack, got 0"),
        ([(0, 0)], "must leave one value on the stack, got 0"),
        ([(1, 0), (2, 0)], "must leave one value on the stack, got 2"),
        ([(1, 0), (ValueOp.ADD, 0)], "row 1: ADD needs 2 values on the stack, got 1"),
        ([(ValueOp.EXP, 0)], "row 0: EXP needs 1 values on the stack, got 0"),
        ([(1, 0), (1, 0), (ValueOp.WHERE, 0)], "row 2: WHERE needs 3 values on the stack, got 2"),
        ([(1, 3)], r"row 0: column must be in \[0, 3\), got 3"),
        ([(1, -1)], r"row 0: column must be in \[0, 3\), got -1"),
        ([(2, 0)] * (MAX_VALUE_STACK + 1), f"stack must be at most {MAX_VALUE_STACK} deep"),
    ],
)
def test_malformed_programs_are_refused(rows: Rows, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run([[1.0, 2.0, 3.0]], rows)


def test_a_malformed_program_is_refused_though_nobody_uses_it() -> None:
    programs, constants = tensors([([(1, 0)], []), ([(24, 0)], [])])
    with pytest.raises(ValueError, match="unknown opcode 24"):
        value_program(torch.ones(1, 1), torch.tensor([0]), programs, constants)


def test_a_stack_of_the_full_depth_is_allowed() -> None:
    rows: Rows = [(1, 0)] * MAX_VALUE_STACK + [(ValueOp.ADD, 0)] * (MAX_VALUE_STACK - 1)
    assert run([[1.0]], rows) == [float(MAX_VALUE_STACK)]


def test_bad_tensors_are_refused() -> None:
    columns = torch.ones(2, 1)
    request = torch.tensor([0, 0])
    programs, constants = tensors([([(1, 0)], [])])

    def refuses(
        message: str,
        columns: Tensor = columns,
        request: Tensor = request,
        programs: Tensor = programs,
        constants: Tensor = constants,
    ) -> None:
        with pytest.raises(ValueError, match=message):
            value_program(columns, request, programs, constants)

    refuses("columns must be torch.float32", columns=columns.double())
    refuses("columns must have shape", columns=columns[0])
    refuses("request must be torch.int64", request=request.int())
    refuses(r"request must have shape \(2\)", request=request[:1])
    refuses(r"request must be in \[0, 1\), got 1", request=request + 1)
    refuses(r"request must be in \[0, 1\), got -1", request=request - 1)
    refuses("programs must be torch.int32", programs=programs.long())
    refuses(r"programs must have shape \(B, L, 2\)", programs=programs[0])
    refuses("constants must be torch.float32", constants=constants.double())
    refuses(r"constants must have shape \(1, 1\)", constants=constants[:0])
    refuses("constants must not be NaN", constants=constants * torch.nan)
    refuses("constants must be on the device", constants=constants.to("meta"))

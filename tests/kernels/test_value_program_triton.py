import math
import random

import pytest
import torch
from torch import Tensor

from silvershard.kernels import MAX_VALUE_STACK, ValueOp
from silvershard.kernels.value_program import value_program_reference
from silvershard.kernels.value_program_triton import value_program_triton

# The interpreter computes with numpy, which warns of infinities and NaN.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")

Rows = list[tuple[int, int]]
UNARY = (ValueOp.NEG, ValueOp.NOT, ValueOp.LOG, ValueOp.EXP, ValueOp.ABS, ValueOp.SQRT)
NUMBERS = [0.0, -0.0, 1.0, -1.5, 3.0, 1e-3, 1e38, math.inf, math.nan, 100.0, 1e-40, 0.1]


def grown(rng: random.Random, depth: int) -> Rows:
    if depth == 0 or rng.random() < 0.15:
        return [(rng.choice([ValueOp.COLUMN, ValueOp.CONST]), rng.randrange(3))]
    kind = rng.random()
    if kind < 0.3:
        return [*grown(rng, depth - 1), (rng.choice(UNARY), 0)]
    if kind < 0.45:
        parts = [row for _ in range(3) for row in grown(rng, depth - 1)]
        return [*parts, (ValueOp.WHERE, 0)]
    binary = [op for op in ValueOp if op > ValueOp.CONST and op not in (*UNARY, ValueOp.WHERE)]
    parts = [*grown(rng, depth - 1), *grown(rng, depth - 1)]
    return [*parts, (rng.choice(binary), 0), (ValueOp.NOP, 0)]


def padded(programs: list[Rows], rng: random.Random) -> tuple[Tensor, Tensor]:
    length = max(len(rows) for rows in programs)
    table = [rows + [(0, 0)] * (length - len(rows)) for rows in programs]
    constants = [[rng.choice([0.0, 1.0, -2.5, 7.0, 0.3, 1e30]) for _ in rows] for rows in table]
    return torch.tensor(table, dtype=torch.int32), torch.tensor(constants)


def assert_equals_reference(
    columns: Tensor, request: Tensor, programs: Tensor, constants: Tensor, device: torch.device
) -> None:
    arguments = (columns, request, programs, constants)
    got = value_program_triton(*(part.to(device) for part in arguments))
    expected = value_program_reference(*arguments)
    assert torch.equal(got.cpu().view(torch.int32), expected.view(torch.int32))


@pytest.mark.parametrize("op", [op for op in ValueOp if op > ValueOp.CONST])
def test_every_operation_has_the_bits_of_the_reference(op: ValueOp, device: torch.device) -> None:
    rng = random.Random(op)
    columns = torch.tensor([[a, b, c] for a in NUMBERS for b in NUMBERS for c in (0.0, math.nan)])
    num_operands = 1 if op in UNARY else 3 if op == ValueOp.WHERE else 2
    rows: Rows = [(ValueOp.COLUMN, number) for number in range(num_operands)]
    if op == ValueOp.WHERE:
        rows.reverse()
    programs, constants = padded([[*rows, (op, 0)]], rng)
    request = torch.zeros(len(columns), dtype=torch.int64)
    assert_equals_reference(columns, request, programs, constants, device)


@pytest.mark.parametrize("seed", range(4))
def test_random_programs_of_mixed_requests_equal_the_reference(
    seed: int, device: torch.device
) -> None:
    rng = random.Random(seed)
    programs, constants = padded([grown(rng, 4) for _ in range(4)], rng)
    columns = torch.tensor([[rng.choice(NUMBERS) for _ in range(3)] for _ in range(150)])
    request = torch.tensor([rng.choice([0, 1, 3]) for _ in range(150)])
    assert_equals_reference(columns, request, programs, constants, device)
    assert_equals_reference(columns, request.sort().values, programs, constants, device)


@pytest.mark.parametrize("depth", [1, 2, 3, 5, MAX_VALUE_STACK])
def test_a_stack_of_every_depth_is_kept(depth: int, device: torch.device) -> None:
    rng = random.Random(depth)
    columns = torch.randn((9, depth), generator=torch.Generator().manual_seed(depth))
    rows: Rows = [(ValueOp.COLUMN, number) for number in range(depth)]
    rows += [(rng.choice([ValueOp.SUB, ValueOp.MAX]), 0) for _ in range(depth - 1)]
    programs, constants = padded([rows], rng)
    assert_equals_reference(columns, torch.zeros(9).long(), programs, constants, device)


def test_a_malformed_program_or_request_changes_no_other(device: torch.device) -> None:
    rows = [[(1, 0), (0, 0), (0, 0)], [(1, 1 << 30), (1, -9), (10, 5)], [(99, 1), (3, 3), (-7, 0)]]
    programs = torch.tensor(rows, dtype=torch.int32)
    columns = torch.arange(6.0).view(6, 1)
    request = torch.tensor([0, 1, 2, 0, -5, 77])
    constants = torch.zeros((3, 3))
    got = value_program_triton(
        *(part.to(device) for part in (columns, request, programs, constants))
    )
    assert got[[0, 3]].tolist() == [0.0, 3.0]


def test_no_candidates_give_no_values(device: torch.device) -> None:
    programs = torch.tensor([[[1, 0]]], dtype=torch.int32, device=device)
    none = torch.empty(0, dtype=torch.int64, device=device)
    columns, constants = torch.empty((0, 1), device=device), torch.zeros((1, 1), device=device)
    assert value_program_triton(columns, none, programs, constants).shape == (0,)

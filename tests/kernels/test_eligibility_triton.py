import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from silvershard.kernels import FilterOp, unpack_bits
from silvershard.kernels.eligibility import count_eligible_reference, eligibility_reference
from silvershard.kernels.eligibility_triton import count_eligible_triton, eligibility_triton

PoolOf = Callable[..., Any]
RowsOf = Callable[..., list[list[int]]]
ProgramsOf = Callable[..., Tensor]


def assert_equals_reference(
    pool: Any, programs: Tensor, pages: Tensor, excluded: Tensor, device: torch.device
) -> Tensor:
    filters = (pool.planes, pool.columns, pool.terms, programs)
    there = [tensor.to(device) for tensor in (*filters, pages, excluded)]
    words = eligibility_triton(*there)
    assert torch.equal(words.cpu(), eligibility_reference(*filters, pages, excluded))
    counts = count_eligible_triton(*there[:4])
    assert torch.equal(counts.cpu(), count_eligible_reference(*filters))
    return words


@pytest.mark.slow
@pytest.mark.parametrize("page_size", [64, 128])
@pytest.mark.parametrize("num_queries", [1, 3])
@pytest.mark.parametrize("depth", [0, 2, 5])
def test_random_programs_equal_the_reference(
    page_size: int,
    num_queries: int,
    depth: int,
    pool_of: PoolOf,
    rows_of: RowsOf,
    programs_of: ProgramsOf,
    device: torch.device,
) -> None:
    rng = random.Random(depth)
    pool = pool_of(depth, page_size=page_size)
    for _ in range(2):
        rows = [rows_of(rng, pool, depth, with_terms=True) for _ in range(num_queries)]
        pages = torch.tensor([[rng.randrange(-1, 9) for _ in range(7)] for _ in rows]).int()
        excluded = torch.tensor(
            [[rng.randrange(-1, pool.num_slots) for _ in range(90)]] * len(rows)
        )
        assert_equals_reference(pool, programs_of(rows), pages, excluded, device)


@pytest.mark.parametrize("depth", [2, 3, 4, 17, 32])
def test_a_stack_of_every_depth_is_kept(
    depth: int, pool_of: PoolOf, programs_of: ProgramsOf, device: torch.device
) -> None:
    pool = pool_of(depth, num_planes=depth + 1, live=1.0)
    rows = [[FilterOp.PLANE, plane + 1, 0, 0] for plane in range(depth)]
    # The last operator sees the first leaf, so that a level lost or swapped shows in the result.
    for number in range(depth - 1):
        rows.append([FilterOp.AND if number % 2 == depth % 2 else FilterOp.OR, 0, 0, 0])
    pages = torch.arange(9, dtype=torch.int32)[None]
    nothing = torch.empty((1, 0), dtype=torch.int64)
    words = assert_equals_reference(pool, programs_of([rows]), pages, nothing, device)
    assert 0 < int(unpack_bits(words.cpu()).sum()) < 9 * 64


def test_excluded_slots_are_cleared_at_the_ends_of_words_and_of_the_pool(
    pool_of: PoolOf, device: torch.device
) -> None:
    pool = pool_of(0, live=1.0, page_size=128)
    pages = torch.tensor([[8, 0, -1, 8]], dtype=torch.int32)
    program = torch.empty((1, 0, 4), dtype=torch.int64)
    edges = [0, 63, 64, 127, 8 * 128, 9 * 128 - 1, 500, -1, 0, 0]
    for excluded in (edges, edges[:1], list(range(9 * 128)), [-1]):
        assert_equals_reference(pool, program, pages, torch.tensor([excluded]), device)


def test_an_empty_pool_or_no_page_or_no_query_gives_nothing(
    pool_of: PoolOf, device: torch.device
) -> None:
    pool = pool_of(0, num_pages=2)
    for num_queries, num_pages in ((2, 0), (0, 3), (0, 0)):
        programs = torch.zeros((num_queries, 2, 4), dtype=torch.int64)
        pages = torch.zeros((num_queries, num_pages), dtype=torch.int32)
        excluded = torch.empty((num_queries, 0), dtype=torch.int64)
        assert_equals_reference(pool, programs, pages, excluded, device)
    pool.planes, pool.columns = pool.planes[:, :0].contiguous(), pool.columns[:, :0].contiguous()
    pool.terms = pool.terms[:0]
    pages = torch.full((2, 3), -1, dtype=torch.int32)
    programs = torch.zeros((2, 2, 4), dtype=torch.int64)
    assert_equals_reference(pool, programs, pages, torch.empty((2, 0)).long(), device)


def test_a_pool_without_columns_and_terms_is_filtered(
    pool_of: PoolOf, programs_of: ProgramsOf, device: torch.device
) -> None:
    pool = pool_of(3, num_columns=0, num_terms=0)
    pages = torch.arange(9, dtype=torch.int32)[None]
    programs = programs_of([[[FilterOp.PLANE, 2, 0, 0], [FilterOp.NOT, 0, 0, 0]]])
    assert_equals_reference(pool, programs, pages, torch.tensor([[70]]), device)


@pytest.mark.slow
@pytest.mark.parametrize("op", [-5, 3, 4, 5, 6, 7, 8, 99])
def test_a_malformed_program_changes_no_other_query(
    op: int, pool_of: PoolOf, programs_of: ProgramsOf, device: torch.device
) -> None:
    pool = pool_of(1)
    good = [[FilterOp.PLANE, 1, 0, 0]]
    bad = [[op, 1 << 40, -9, 1 << 62], [op, -(1 << 40), 77, -4]] * 40
    programs = programs_of([good, bad, good])
    pages = torch.arange(9, dtype=torch.int32).repeat(3, 1)
    nothing = torch.empty((3, 0), dtype=torch.int64)
    filters = (pool.planes, pool.columns, pool.terms)
    words = eligibility_triton(
        *(tensor.to(device) for tensor in (*filters, programs, pages, nothing))
    )
    expected = eligibility_reference(*filters, programs_of([good]), pages[:1], nothing[:1])
    for query in (0, 2):
        assert torch.equal(words[query].cpu(), expected[0])

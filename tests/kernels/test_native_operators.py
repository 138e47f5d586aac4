import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from silvershard.kernels import (
    PAD_TERM,
    FilterOp,
    ValueOp,
    bloom_build,
    coarse_probe,
    count_eligible,
    eligibility,
    gather_linear,
    merge_topk,
    native_library,
    quantize_rows,
    refine,
    select_topk,
    value_program,
)
from silvershard.kernels.bloom_build import bloom_build_reference
from silvershard.kernels.coarse_probe import coarse_probe_reference
from silvershard.kernels.eligibility import count_eligible_reference, eligibility_reference
from silvershard.kernels.merge_topk import merge_topk_reference
from silvershard.kernels.quantize import quantize_rows_reference
from silvershard.kernels.refine import refine_reference
from silvershard.kernels.select_topk import select_topk_reference
from silvershard.kernels.value_program import value_program_reference

NATIVE = ["scalar", "avx2", "avx512"]
DIMS = [1, 16, 31, 33, 64, 96, 100, 128, 200, 1024]

pytestmark = [
    pytest.mark.usefixtures("implementation"),
    pytest.mark.parametrize("implementation", NATIVE, indirect=True),
]

PoolOf = Callable[..., Any]
RowsOf = Callable[..., list[list[int]]]
ProgramsOf = Callable[..., Tensor]
AssertSame = Callable[..., None]


def generator_of(*numbers: int) -> torch.Generator:
    return torch.Generator().manual_seed(hash(numbers))


def random_scores(kind: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    if kind == "distinct":
        return torch.randn(shape, generator=generator)
    if kind == "equal":
        return torch.full(shape, -0.5)
    if kind == "zeros":
        return torch.randint(0, 2, shape, generator=generator).float() * 0.0 * torch.tensor(-1.0)
    if kind == "close":
        # Neighbouring floats around zero, of both signs, subnormal ones too.
        bits = torch.randint(0, 40, shape, generator=generator, dtype=torch.int32)
        signs = torch.randint(0, 2, shape, generator=generator) * 2 - 1
        return bits.view(torch.float32) * signs
    if kind == "wide":
        exponents = torch.randint(-120, 120, shape, generator=generator).float()
        return torch.randn(shape, generator=generator) * torch.exp2(exponents)
    scores = torch.randint(-3, 4, shape, generator=generator).float()
    scores[torch.rand(shape, generator=generator) < 0.3] = -torch.inf
    scores[torch.rand(shape, generator=generator) < 0.01] = torch.inf
    return scores


@pytest.mark.parametrize("kind", ["distinct", "equal", "zeros", "close", "wide", "tied"])
@pytest.mark.parametrize(
    ("length", "k"),
    [
        *((1, 1), (15, 16), (17, 1), (63, 64), (64, 1), (65, 10), (66, 65), (1000, 999)),
        *((600, 10), (1100, 10), (1500, 511), (1500, 512), (1500, 513), (5000, 2048)),
        *((20_000, 1), (20_000, 9000), (3000, 100_000)),
    ],
)
def test_selections_equal_the_reference(
    kind: str, length: int, k: int, assert_same: AssertSame
) -> None:
    generator = generator_of(length, k)
    scores = random_scores(kind, (3, length), generator)
    item_ids = torch.stack([torch.randperm(length, generator=generator) for _ in range(3)])
    item_ids[1, torch.rand(length, generator=generator) < 0.2] = -1
    # Ids of a lower rank than their position, so that position and id order differ.
    item_ids[2] = (item_ids[2] // 2) << 40
    assert_same(select_topk(scores, item_ids, k), select_topk_reference(scores, item_ids, k))


@pytest.mark.parametrize("order", ["ascending", "descending", "steps"])
@pytest.mark.parametrize("k", [1, 64, 700])
def test_selections_of_sorted_scores_equal_the_reference(
    order: str, k: int, assert_same: AssertSame
) -> None:
    scores = torch.arange(10_000.0)[None]
    if order == "descending":
        scores = scores.flip(1)
    elif order == "steps":
        scores = scores // 700
    item_ids = torch.arange(10_000).flip(0)[None]
    assert_same(select_topk(scores, item_ids, k), select_topk_reference(scores, item_ids, k))


@pytest.mark.parametrize("kind", ["distinct", "equal", "tied"])
@pytest.mark.parametrize(
    ("num_lists", "length", "k"),
    [(1, 100, 30), (3, 1, 2), (7, 33, 50), (2, 2000, 512), (8, 513, 100_000), (3, 0, 2)],
)
def test_merges_equal_the_reference(
    kind: str, num_lists: int, length: int, k: int, assert_same: AssertSame
) -> None:
    generator = generator_of(num_lists, length, k)
    shape = (num_lists, 5, length)
    scores = random_scores(kind, shape, generator)
    item_ids = torch.randperm(scores.numel(), generator=generator).view(shape)
    assert_same(merge_topk(scores, item_ids, k), merge_topk_reference(scores, item_ids, k))


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize(
    ("num_queries", "num_clusters", "probes"),
    [(1, 40, 1), (5, 129, 16), (9, 63, 63), (2, 1000, 900), (3, 70, 40)],
)
@pytest.mark.parametrize("levels", [1, 10_000])
def test_probes_equal_the_reference(
    dim: int, num_queries: int, num_clusters: int, probes: int, levels: int
) -> None:
    generator = generator_of(dim, num_queries, num_clusters)

    def random_rows(rows: int) -> Tensor:
        shape = (rows, dim)
        return torch.randint(-levels, levels + 1, shape, generator=generator).float() / 3

    query, centroids = random_rows(num_queries), random_rows(num_clusters)
    arguments = (query, *quantize_rows(query), centroids, *quantize_rows(centroids), probes)
    assert torch.equal(coarse_probe(*arguments), coarse_probe_reference(*arguments))


def test_the_shortlist_is_cut_where_its_buffer_was_full(assert_same: AssertSame) -> None:
    # More clusters than a buffer of 2 * (P + 16) or 512 more holds, the best ones last.
    centroids = torch.ones(5000, 3) * torch.arange(5000.0)[:, None] / 5000
    query = torch.tensor([[1.0, 2.0, 3.0], [-1.0, -2.0, -3.0], [0.0, 0.0, 0.0]])
    for probes in (1, 100, 4980):
        arguments = (query, *quantize_rows(query), centroids, *quantize_rows(centroids), probes)
        assert torch.equal(coarse_probe(*arguments), coarse_probe_reference(*arguments))


@pytest.mark.parametrize("dim", [2, 3, 32, *DIMS])
@pytest.mark.parametrize(
    ("batch", "heads", "candidates"), [(1, 1, 1), (3, 2, 257), (1, 5, 600), (2, 1, 0)]
)
def test_refined_scores_equal_the_reference_in_every_bit(
    dim: int, batch: int, heads: int, candidates: int, assert_same: AssertSame
) -> None:
    generator = generator_of(dim, batch, heads, candidates)
    query = torch.randn((batch, heads, dim), generator=generator)
    query[torch.rand(query.shape, generator=generator) < 0.2] = -0.0
    cache = (torch.randn((2, 64, dim), generator=generator) * 100).half()
    # Zeros of both signs and subnormal halves.
    cache[0] *= 2.0**-24
    slots = torch.randint(-1, 128, (batch, candidates), generator=generator)
    assert_same([refine(query, cache, slots)], [refine_reference(query, cache, slots)])


def test_every_half_is_converted_exactly(assert_same: AssertSame) -> None:
    every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16)
    halves = every.view(torch.float16)
    cache = halves[halves.isfinite()].view(-1, 64, 1)
    slots = torch.arange(cache.numel())[None]
    scores = refine(torch.ones(1, 1, 1), cache, slots)
    # Doubling a subnormal half is exact, and 0.0 is added to no product.
    assert_same([scores.flatten()], [cache.flatten().float()])
    wide = halves.view(-1, 64, 64)
    slots = torch.arange(wide.shape[0] * 64)[None]
    unit = torch.eye(64)[None]
    out = gather_linear(wide, slots, unit, torch.zeros(1, 64))
    finite = wide.view(-1, 64).isfinite().all(dim=1)
    assert torch.equal(out[0, finite], wide.view(-1, 64)[finite].float())


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("num_outputs", [1, 7, 8, 15, 16, 63, 64, 65, 136])
def test_instruction_sets_agree_on_gathered_outputs_in_every_bit(
    dim: int, num_outputs: int, assert_same: AssertSame
) -> None:
    generator = generator_of(dim, num_outputs)
    cache = torch.randn((2, 64, dim), generator=generator).half()
    slots = torch.randint(-1, 128, (2, 9), generator=generator)
    weight = torch.randn((2, dim, num_outputs), generator=generator)
    bias = torch.randn((2, num_outputs), generator=generator)
    out = gather_linear(cache, slots, weight, bias)
    with native_library.use("scalar"):
        assert_same([out], [gather_linear(cache, slots, weight, bias)])


@pytest.mark.parametrize("dim", DIMS)
def test_codes_equal_the_reference(dim: int, assert_same: AssertSame) -> None:
    generator = generator_of(dim)
    exponents = torch.randint(-149, 120, (1030, 1), generator=generator).float()
    x = torch.randn((1030, dim), generator=generator) * torch.exp2(exponents)
    x[::7] = torch.randint(-127, 128, x[::7].shape, generator=generator) / 2
    x[::7, 0] = 127.0
    x[5] = 0.0
    x[6] = -0.0
    assert_same(quantize_rows(x), quantize_rows_reference(x))


def random_value_program(rng: random.Random, length: int) -> list[tuple[int, int]]:
    """A valid program of about the given length that uses every opcode in the long run."""
    rows: list[tuple[int, int]] = []
    depth = 0
    operands = {op: 2 for op in ValueOp if op > ValueOp.CONST} | {ValueOp.WHERE: 3}
    operands |= dict.fromkeys(
        (ValueOp.NEG, ValueOp.NOT, ValueOp.LOG, ValueOp.EXP, ValueOp.ABS, ValueOp.SQRT), 1
    )
    while len(rows) < length or depth != 1:
        choices = [op for op, count in operands.items() if count <= depth]
        if len(rows) >= length and depth > 1:
            choices = [op for op in choices if operands[op] == 2]
            op = rng.choice(choices)
        elif not choices or (depth < 32 and rng.random() < 0.45):
            op = rng.choice([ValueOp.COLUMN, ValueOp.CONST])
        else:
            op = rng.choice(choices)
        if rng.random() < 0.05:
            rows.append((ValueOp.NOP, 99))
        rows.append((op, rng.randrange(4)))
        depth += 1 - operands.get(op, 0)
    return rows


@pytest.mark.parametrize("seed", range(12))
def test_values_equal_the_reference_in_every_bit(seed: int, assert_same: AssertSame) -> None:
    rng = random.Random(seed)
    generator = generator_of(seed)
    num_requests = rng.choice([1, 3, 40])
    num_rows = rng.choice([1, 255, 256, 257, 5000])
    programs = [random_value_program(rng, rng.choice([1, 5, 30, 120])) for _ in range(num_requests)]
    length = max(map(len, programs))
    table = torch.zeros((num_requests, length, 2), dtype=torch.int32)
    for number, rows in enumerate(programs):
        table[number, : len(rows)] = torch.tensor(rows, dtype=torch.int32)
    special = torch.tensor([0.0, -0.0, 1.0, -1.0, torch.inf, -torch.inf, 1e-42, 88.7, -103.9])
    constants = special[torch.randint(0, 9, (num_requests, length), generator=generator)]
    exponents = torch.randint(-30, 30, (num_rows, 4), generator=generator).float()
    columns = torch.randn((num_rows, 4), generator=generator) * torch.exp2(exponents)
    columns[torch.rand(columns.shape, generator=generator) < 0.05] = torch.nan
    columns[torch.rand(columns.shape, generator=generator) < 0.05] = 0.0
    request = torch.randint(0, num_requests, (num_rows,), generator=generator)
    if seed % 2:
        request = request.sort().values
    arguments = (columns, request, table, constants)
    assert_same([value_program(*arguments)], [value_program_reference(*arguments)])


@pytest.mark.parametrize("op", [ValueOp.EXP, ValueOp.LOG, ValueOp.SQRT])
def test_functions_equal_the_reference_over_all_exponents(
    op: ValueOp, assert_same: AssertSame
) -> None:
    # Every 4,099th float, of both signs, NaN and infinities among them, and the ends of exp.
    bits = torch.arange(-(1 << 31), 1 << 31, 4099, dtype=torch.int64).to(torch.int32)
    ends = torch.arange(-2000, 2000) / 16.0
    columns = torch.cat([bits.view(torch.float32), ends])[:, None]
    programs = torch.tensor([[[ValueOp.COLUMN, 0], [op, 0]]], dtype=torch.int32)
    request = torch.zeros(columns.shape[0], dtype=torch.int64)
    arguments = (columns, request, programs, torch.zeros(1, 2))
    assert_same([value_program(*arguments)], [value_program_reference(*arguments)])


@pytest.mark.parametrize("num_words", [1, 2])
@pytest.mark.parametrize(("num_slots", "num_terms"), [(0, 3), (1, 1), (70, 0), (500, 9)])
def test_planes_equal_the_reference(num_words: int, num_slots: int, num_terms: int) -> None:
    generator = generator_of(num_words, num_slots, num_terms)
    planes = torch.randint(-(1 << 62), 1 << 62, (40, 9, num_words), generator=generator)
    slots = torch.randperm(9 * 64 * num_words, generator=generator)[:num_slots]
    terms = torch.randint(0, 1 << 62, (num_slots, num_terms), generator=generator)
    terms[torch.rand(terms.shape, generator=generator) < 0.3] = PAD_TERM
    for first_plane, num_planes, num_hashes in ((1, 39, 3), (7, 1, 1), (39, 1, 5), (3, 30, 64)):
        expected = planes.clone()
        bloom_build_reference(expected, slots, terms, first_plane, num_planes, num_hashes, 9)
        got = planes.clone()
        bloom_build(
            got,
            slots,
            terms,
            first_plane=first_plane,
            num_planes=num_planes,
            num_hashes=num_hashes,
            seed=9,
        )
        assert torch.equal(got, expected)


@pytest.mark.parametrize("page_size", [64, 128])
@pytest.mark.parametrize(
    ("num_queries", "pages_per_query"), [(1, 1), (1, 300), (7, 40), (64, 3), (3, 1500)]
)
def test_eligible_words_equal_the_reference(
    page_size: int,
    num_queries: int,
    pages_per_query: int,
    pool_of: PoolOf,
    rows_of: RowsOf,
    programs_of: ProgramsOf,
) -> None:
    rng = random.Random(num_queries)
    generator = generator_of(num_queries, pages_per_query)
    pool = pool_of(page_size, page_size=page_size, num_pages=1100, num_planes=4, dim=1)
    programs = [rows_of(rng, pool, 5, with_terms=True) for _ in range(num_queries)]
    shape = (num_queries, pages_per_query)
    pages = torch.randint(-1, 1100, shape, generator=generator, dtype=torch.int32)
    if num_queries == 1:
        # Consecutive pages are read as a stream, here with a gap and a repetition.
        pages = torch.arange(pages_per_query, dtype=torch.int32)[None] + 5
        pages[0, pages_per_query // 2 :] -= 2
    excluded = torch.randint(-1, pool.num_slots, (num_queries, 200), generator=generator)
    arguments = (*pool.filters(), programs_of(programs), pages, excluded)
    assert torch.equal(eligibility(*arguments), eligibility_reference(*arguments))
    counting = (*pool.filters(), programs_of(programs))
    assert torch.equal(count_eligible(*counting), count_eligible_reference(*counting))


def test_more_words_than_one_pass_holds_are_evaluated_alike(
    pool_of: PoolOf, programs_of: ProgramsOf
) -> None:
    # A pass is 1,024 words.
    pool = pool_of(3, num_pages=2060, dim=1)
    program = programs_of([[[3, 1, 0, 0], [4, 0, 1, 0], [7, 0, 0, 0], [6, 0, 0, 0]]])
    none = torch.empty((1, 0), dtype=torch.int64)
    for count in (1023, 1024, 1025, 2049):
        for step in (1, 2):
            pages = torch.arange(0, step * count, step, dtype=torch.int32)[None] % 2060
            arguments = (*pool.filters(), program, pages, none)
            assert torch.equal(eligibility(*arguments), eligibility_reference(*arguments))


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 8, 9])
@pytest.mark.parametrize("negated", [False, True])
def test_chains_of_planes_equal_the_reference(
    length: int, negated: bool, pool_of: PoolOf, programs_of: ProgramsOf
) -> None:
    # Planes that are combined with AND one after the other are read four at a time.
    pool = pool_of(4, num_pages=40, num_planes=12, dim=1)
    pool.planes[1:] |= pool.planes[1:].roll(1, 2) | pool.planes[1:].roll(1, 1)
    rows = [[[FilterOp.PLANE, 1, 0, 0]] + [[FilterOp.NOT, 0, 0, 0]] * negated]
    for broken in range(length):
        chain = list(rows[0])
        for at in range(length):
            op = FilterOp.OR if at == broken else FilterOp.AND
            chain += [[FilterOp.PLANE, 2 + at, 0, 0], [op, 0, 0, 0]]
        rows.append(chain)
    whole = list(rows[0])
    for at in range(length):
        whole += [[FilterOp.PLANE, 2 + at, 0, 0], [FilterOp.AND, 0, 0, 0]]
    twice = [*whole, *whole, [FilterOp.OR, 0, 0, 0]]
    programs = programs_of([*rows, whole, twice])
    none = torch.empty((len(programs), 0), dtype=torch.int64)
    for pages in (torch.arange(40), torch.arange(0, 40, 3)):
        asked = pages.int().repeat(len(programs), 1)
        arguments = (*pool.filters(), programs, asked, none)
        assert torch.equal(eligibility(*arguments), eligibility_reference(*arguments))


@pytest.mark.parametrize("num_terms", [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17])
def test_a_term_is_found_in_any_of_its_slots(
    num_terms: int, pool_of: PoolOf, programs_of: ProgramsOf
) -> None:
    pool = pool_of(5, num_pages=1, num_terms=num_terms, dim=1, live=1.0)
    pool.page_table[0, 0] = 0
    pool.terms[:] = PAD_TERM
    for place in range(num_terms):
        pool.terms[0, place * 3, place] = 1 << 40 | place
    programs = programs_of([[[FilterOp.TERM, 0, 0, 1 << 40 | at]] for at in range(num_terms + 1)])
    expected = [[3 * at, -1] for at in range(num_terms)] + [[-1, -1]]
    queries = pool.everywhere(0, num_terms + 1)
    assert pool.scan(queries._replace(programs=programs), 2).slots.tolist() == expected
    assert pool.scan(queries._replace(verify=programs), 2).slots.tolist() == expected

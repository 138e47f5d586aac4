"""Every instruction set of ``ivf_scan`` against the reference, over what its code decides by.

Fewer than 8 queries, those that share few clusters and those whose filter lets few items pass are
scanned one by one; all others share pages.
"""

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from silvershard.kernels import FilterOp, Relation, pack_bits, unpack_bits

pytestmark = [
    pytest.mark.usefixtures("implementation"),
    pytest.mark.parametrize("implementation", ["scalar", "avx2", "avx512"], indirect=True),
]

PoolOf = Callable[..., Any]
RowsOf = Callable[..., list[list[int]]]
ProgramsOf = Callable[..., Tensor]
AssertSame = Callable[..., None]

KINDS = ["distinct", "tied", "equal", "zero", "negative"]


@pytest.fixture
def check(assert_same: AssertSame) -> Callable[..., Any]:
    """``check(pool, queries, num_results)`` compares with the reference and returns the result."""

    def check(pool: Any, queries: Any, num_results: int) -> Any:
        result = pool.scan(queries, num_results)
        assert_same(result, pool.reference(queries, num_results))
        return result

    return check


def shape_scores(kind: str, pool: Any, queries: Any) -> None:
    """Make scores distinct in general, often equal, all equal, all zero or all negative."""
    if kind == "tied":
        queries.codes.clamp_(-1, 1)
        queries.scales[:] = 1.0
        pool.codes.clamp_(-1, 1)
        pool.scales[:] = 1.0
    elif kind == "equal":
        pool.codes[:] = 1
        pool.scales[:] = 1.0
    elif kind == "zero":
        # Zeros of both signs before they are made plain.
        pool.scales[:] = 0.0
    elif kind == "negative":
        pool.codes.abs_()
        queries.codes.abs_().neg_()


def checked_programs(programs_of: ProgramsOf, num_queries: int, percent: int) -> Tensor:
    """Programs that accept column 0 below a bound: all of the keys in [0, 100), or some."""
    return programs_of([[[FilterOp.COMPARE, 0, Relation.LT, percent]]] * num_queries)


@pytest.mark.parametrize("dim", [1, 16, 31, 33, 64, 96, 100, 128, 200, 1024])
@pytest.mark.parametrize("page_size", [64, 128])
@pytest.mark.parametrize("num_queries", [3, 9])
def test_any_dimension(
    dim: int, page_size: int, num_queries: int, pool_of: PoolOf, check: Callable[..., Any]
) -> None:
    pool = pool_of(dim, dim=dim, page_size=page_size, num_pages=12, distinct_scores=True)
    # The last row of the pool is read too: what lies behind it must not count.
    pool.page_table[4, 0] = 11
    queries = pool.everywhere(dim, num_queries)
    check(pool, queries, 40)
    check(pool, queries, 2000)


@pytest.mark.parametrize("num_queries", [1, 2, 7, 8, 9, 64, 1024])
@pytest.mark.parametrize("probes", [1, 2, 20])
@pytest.mark.parametrize("kind", ["distinct", "tied"])
def test_any_number_of_queries(
    num_queries: int, probes: int, kind: str, pool_of: PoolOf, check: Callable[..., Any]
) -> None:
    pool = pool_of(num_queries, num_pages=24, num_clusters=20, distinct_scores=True)
    queries = pool.queries(probes, num_queries, probes=probes)
    shape_scores(kind, pool, queries)
    for num_results in (1, 10, 70):
        check(pool, queries, num_results)


@pytest.mark.parametrize("num_results", [1, 10, 511, 512, 513, 2048, 100_000])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_queries", [1, 9])
def test_any_number_of_results(
    num_results: int, kind: str, num_queries: int, pool_of: PoolOf, check: Callable[..., Any]
) -> None:
    # Some 6,000 slots: even the buffer for 2,048 results is filled more than once.
    pool = pool_of(num_results, num_pages=100, page_size=128, live=0.5, distinct_scores=True)
    queries = pool.everywhere(num_results, num_queries)
    shape_scores(kind, pool, queries)
    result = check(pool, queries, num_results)
    assert int(result.eligible.min()) > 5000


@pytest.mark.parametrize("order", ["ascending", "descending", "by_page"])
@pytest.mark.parametrize("num_queries", [1, 8])
def test_scores_that_only_rise_or_fall_along_the_pool(
    order: str, num_queries: int, pool_of: PoolOf, check: Callable[..., Any]
) -> None:
    pool = pool_of(0, num_pages=60, num_clusters=3, live=1.0)
    rank = torch.arange(60 * 64.0).view(60, 64)
    scale = {"ascending": rank + 1, "descending": 5000 - rank, "by_page": rank // 64 + 1}
    pool.codes[:] = 1
    pool.scales[:] = scale[order]
    pool.item_ids = pool.item_ids.flatten().sort(descending=True).values.view(60, 64)
    queries = pool.everywhere(0, num_queries)
    queries.codes.abs_()
    queries.codes[-1].neg_()
    for num_results in (1, 64, 100, 700):
        check(pool, queries, num_results)


@pytest.mark.parametrize("seed", range(60))
def test_random_scans(
    seed: int,
    pool_of: PoolOf,
    rows_of: RowsOf,
    programs_of: ProgramsOf,
    check: Callable[..., Any],
) -> None:
    rng = random.Random(seed)
    num_clusters = rng.choice([1, 2, 5, 30])
    pool = pool_of(
        seed,
        dim=rng.choice([1, 16, 31, 33, 64, 96, 100, 128, 200]),
        page_size=rng.choice([64, 128]),
        num_pages=rng.choice([1, 2, 9, 40, 150]),
        num_clusters=num_clusters,
        live=rng.choice([0.0, 0.02, 0.3, 0.7, 1.0]),
        distinct_scores=True,
    )
    num_queries = rng.choice([1, 2, 7, 8, 9, 33])
    queries = pool.queries(
        seed,
        num_queries,
        probes=rng.choice([1, 3, 30]),
        exclusions=rng.choice([0, 0, 1, 50]),
    )
    shape_scores(rng.choice(KINDS), pool, queries)
    share = rng.choice([0.0, 0.2, 1.0])

    def some_programs(*, with_terms: bool) -> Tensor:
        chosen = [rng.random() < share for _ in range(num_queries)]
        return programs_of(
            [rows_of(rng, pool, 4, with_terms=with_terms) if yes else [] for yes in chosen]
        )

    queries = queries._replace(programs=some_programs(with_terms=False))
    if rng.random() < 0.5:
        queries = queries._replace(verify=some_programs(with_terms=True))
    check(pool, queries, rng.choice([1, 7, 64, 511, 1000, 30_000]))


@pytest.mark.parametrize("num_queries", [2, 9])
def test_holes_in_the_page_table_are_no_pages(
    num_queries: int, pool_of: PoolOf, check: Callable[..., Any], assert_same: AssertSame
) -> None:
    pool = pool_of(5, num_pages=20, distinct_scores=True)
    queries = pool.everywhere(5, num_queries)
    expected = check(pool, queries, 300)
    table = pool.page_table
    # Rows are skipped eight entries at a time where all of them are empty.
    for width, first, step in (
        (60, 1, 3),
        (20, 0, 1),
        (29, 9, 1),
        (36, 16, 1),
        (180, 8, 9),
        (170, 7, 8),
    ):
        pool.page_table = torch.full((5, width), -1, dtype=torch.int32)
        pool.page_table[:, first : first + 20 * step : step] = table
        assert_same(check(pool, queries, 300), expected)


@pytest.mark.parametrize("num_queries", [1, 8, 64])
def test_repeated_and_absent_clusters_count_once(
    num_queries: int, pool_of: PoolOf, check: Callable[..., Any], assert_same: AssertSame
) -> None:
    pool = pool_of(6, num_pages=20, distinct_scores=True)
    queries = pool.everywhere(6, num_queries)
    once = check(pool, queries, 400)
    order = torch.tensor([3, -1, 0, 0, 4, 1, 3, 2, 2, 2, -1, 1], dtype=torch.int32)
    often = queries._replace(clusters=order.repeat(num_queries, 1))
    assert_same(check(pool, often, 400), once)


@pytest.mark.parametrize("num_queries", [1, 9])
def test_a_full_pool_is_scanned_to_its_last_slot(
    num_queries: int, pool_of: PoolOf, check: Callable[..., Any]
) -> None:
    pool = pool_of(7, num_pages=33, num_clusters=4, live=1.0, distinct_scores=True)
    pool.page_table[3, 0] = 32
    pool.codes[-1, -1] = 127
    pool.scales[-1, -1] = 100.0
    queries = pool.everywhere(7, num_queries)
    queries.codes.abs_()
    assert (check(pool, queries, 5).slots[:, 0] == pool.num_slots - 1).all()
    assert (check(pool, queries, 33 * 64).slots >= 0).all()
    assert (check(pool, queries, 33 * 64 + 1).slots[:, -1] == -1).all()


@pytest.mark.parametrize("live_slots", [[], [0], [15], [16], [63], [64], [100, 127], [39, 40]])
@pytest.mark.parametrize("num_queries", [1, 8])
def test_a_few_live_slots_are_found_wherever_they_stand(
    live_slots: list[int], num_queries: int, pool_of: PoolOf, check: Callable[..., Any]
) -> None:
    pool = pool_of(8, num_pages=3, page_size=128, distinct_scores=True)
    alive = torch.zeros((3, 128), dtype=torch.bool)
    alive[1, live_slots] = True
    pool.planes[0] = pack_bits(alive.view(3, 2, 64)).view(3, 2)
    result = check(pool, pool.everywhere(8, num_queries), 3)
    for row in result.slots.tolist():
        assert sorted(row) == [-1] * (3 - len(live_slots)) + [128 + at for at in live_slots]


@pytest.mark.parametrize("count", [1, 8, *range(16, 48, 3), 63, 64])
def test_nearly_full_and_nearly_empty_words_are_scanned_alike(
    count: int, pool_of: PoolOf, check: Callable[..., Any]
) -> None:
    # Full words are scanned as blocks; the slots of others are gathered in a list of 2,048.
    pool = pool_of(count, num_pages=140, num_clusters=2, distinct_scores=True)
    generator = torch.Generator().manual_seed(count)
    places = torch.rand((140, 64), generator=generator).argsort(dim=1)
    pool.planes[0] = pack_bits(places < count)
    pool.planes[0, ::5] &= 0xFF
    for num_results in (5, 300, 9000):
        check(pool, pool.everywhere(count, 2), num_results)


@pytest.mark.parametrize("rejected", [0, 10, 95, 100])
@pytest.mark.parametrize("kind", ["distinct", "tied", "equal"])
def test_results_are_exact_whatever_verification_rejects(
    rejected: int,
    kind: str,
    pool_of: PoolOf,
    programs_of: ProgramsOf,
    check: Callable[..., Any],
) -> None:
    pool = pool_of(rejected, num_pages=80, distinct_scores=True)
    generator = torch.Generator().manual_seed(rejected)
    pool.columns[0] = torch.randint(0, 100, pool.columns[0].shape, generator=generator)
    queries = pool.everywhere(rejected, 9)
    shape_scores(kind, pool, queries)
    verify = checked_programs(programs_of, 9, 100 - rejected)
    # Some queries of the batch need no verification and share pages.
    verify[:4] = 0
    queries = queries._replace(verify=verify)
    for num_results in (1, 50, 600, 3000):
        result = check(pool, queries, num_results)
        assert (result.slots[4:] == -1).all() == (rejected == 100)


def test_verification_that_the_best_fail_looks_behind_them(
    pool_of: PoolOf, programs_of: ProgramsOf, check: Callable[..., Any]
) -> None:
    pool = pool_of(9, num_pages=100, live=1.0)
    pool.codes[:] = 1
    pool.scales[:] = torch.arange(pool.num_slots).view(100, 64).flip(0)
    # Only the 300 worst pass; the buffer is full of better ones again and again.
    pool.columns[0] = pool.scales.long()
    queries = pool.everywhere(9, 2)
    queries.codes.abs_()
    worst = int(pool.scales[:99].min()) + 300
    queries = queries._replace(verify=checked_programs(programs_of, 2, worst))
    for num_results in (1, 20, 299, 300, 301):
        result = check(pool, queries, num_results)
        assert ((result.slots >= 0).sum(dim=1) == min(num_results, 300)).all()


@pytest.mark.parametrize("num_queries", [1, 9])
def test_exclusions_of_any_kind(
    num_queries: int, pool_of: PoolOf, check: Callable[..., Any]
) -> None:
    pool = pool_of(10, page_size=128, num_pages=12, distinct_scores=True)
    queries = pool.everywhere(10, num_queries)
    best = pool.reference(queries, 40).slots
    lots = torch.arange(pool.num_slots).repeat(num_queries, 1)
    unprobed = torch.full_like(best, 11 * 128) + torch.arange(40)
    for excluded in (
        best[:, :1],
        best[:, ::2].repeat(1, 3),
        torch.cat((torch.full_like(best, -1), best.flip(1)), dim=1),
        torch.cat((unprobed, best), dim=1),
        torch.full_like(best, -1),
        lots[:, ::2],
        lots[:, 1:],
        lots,
    ):
        result = check(pool, queries._replace(excluded=excluded), 60)
        barred = result.slots[:, :, None] == excluded[:, None]
        assert not barred.any(dim=2)[result.slots >= 0].any()


@pytest.mark.parametrize("verified", [False, True])
def test_queries_of_one_batch_share_pages_whatever_their_filters_let_pass(
    verified: bool, pool_of: PoolOf, programs_of: ProgramsOf, check: Callable[..., Any]
) -> None:
    pool = pool_of(11, num_pages=60, num_clusters=6, distinct_scores=True)
    generator = torch.Generator().manual_seed(11)
    pool.columns[0] = torch.randint(0, 100, pool.columns[0].shape, generator=generator)
    queries = pool.everywhere(11, 36, exclusions=3)
    queries.excluded[::2] = -1
    # An eighth of the items is where queries stop to share pages.
    shares = [0, 1, 6, 11, 12, 13, 14, 50, 100] * 4
    programs = programs_of([[[FilterOp.COMPARE, 0, Relation.LT, share]] for share in shares])
    programs[8::9] = 0
    verify = programs_of([[[FilterOp.PLANE, 1, 0, 0]]] * 36) if verified else programs[:, :0]
    queries = queries._replace(programs=programs, verify=verify)
    for num_results in (1, 100, 3000):
        result = check(pool, queries, num_results)
        assert not result.eligible[::9].any()
        assert (result.eligible[8::18] == result.probed[8::18]).all()
    nowhere = queries._replace(clusters=torch.full_like(queries.clusters, -1))
    check(pool, nowhere, 10)


def test_more_queries_than_one_group_holds(
    pool_of: PoolOf, programs_of: ProgramsOf, check: Callable[..., Any]
) -> None:
    # Groups share 256 MiB: with this pool and one thread that is some 500 queries.
    pool = pool_of(13, num_pages=1100, num_clusters=90, dim=1, live=1.0, distinct_scores=True)
    queries = pool.queries(13, 530, probes=2)
    queries = queries._replace(verify=checked_programs(programs_of, 530, 2))
    check(pool, queries, 5)


@pytest.mark.parametrize("kind", ["distinct", "equal"])
@pytest.mark.parametrize("num_queries", [1, 9])
def test_more_candidates_than_are_kept_before_verification(
    kind: str,
    num_queries: int,
    pool_of: PoolOf,
    programs_of: ProgramsOf,
    check: Callable[..., Any],
) -> None:
    # At least 32,768 candidates wait; twice as many fill the buffer.
    pool = pool_of(14, num_pages=620, page_size=128, dim=1, live=1.0, distinct_scores=True)
    queries = pool.everywhere(14, num_queries)
    shape_scores(kind, pool, queries)
    for bound in (-2, 3):
        verify = checked_programs(programs_of, num_queries, bound)
        for num_results in (7, 33_000):
            check(pool, queries._replace(verify=verify), num_results)


@pytest.mark.parametrize("live", [0.05, 1.0])
def test_items_that_leave_between_calls_are_not_found(
    live: float, pool_of: PoolOf, check: Callable[..., Any]
) -> None:
    pool = pool_of(12, num_pages=20, live=live, distinct_scores=True)
    queries = pool.everywhere(12, 9)
    for _ in range(3):
        found = check(pool, queries, 20).slots
        bits = unpack_bits(pool.planes[0]).flatten()
        bits[found[found >= 0]] = False
        pool.planes[0] = pack_bits(bits.view(20, 1, 64)).view(20, 1)

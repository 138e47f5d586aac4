"""What one call of a native operator must not leave to the next or to its neighbours."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import permutations
from typing import Any

import pytest
import torch
from torch import Tensor

from silvershard.kernels import (
    FilterOp,
    Relation,
    ValueOp,
    bloom_build,
    coarse_probe,
    count_eligible,
    eligibility,
    gather_linear,
    merge_topk,
    quantize_rows,
    refine,
    select_topk,
    value_program,
)

pytestmark = [
    pytest.mark.usefixtures("implementation"),
    pytest.mark.parametrize("implementation", ["scalar", "avx2", "avx512"], indirect=True),
]

PoolOf = Callable[..., Any]
ProgramsOf = Callable[..., Tensor]
AssertSame = Callable[..., None]
RunPython = Callable[..., str]
Call = Callable[[], tuple[Tensor, ...]]


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """``threads(n)`` sets the number of threads that torch uses until the test ends."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def scan_calls(
    pool_of: PoolOf, programs_of: ProgramsOf, num_pages: int, num_queries: int, num_results: int
) -> dict[str, Call]:
    """Scans of one size: one by one, with shared pages, filtered, verified, with many ties."""
    pool = pool_of(num_pages, num_pages=num_pages, dim=33, live=0.8, distinct_scores=True)
    tied = pool_of(num_pages, num_pages=num_pages, dim=16, num_clusters=3)
    tied.codes[:] = 1
    queries = pool.everywhere(1, num_queries)
    half = programs_of([[[FilterOp.COMPARE, 0, Relation.LT, 0]]] * num_queries)
    return {
        "scan": lambda: pool.scan(queries, num_results),
        "one query": lambda: pool.scan(queries.rows(slice(1)), num_results),
        "tied": lambda: tied.scan(tied.everywhere(2, num_queries), num_results),
        "filtered": lambda: pool.scan(queries._replace(programs=half), num_results),
        "verified": lambda: pool.scan(queries._replace(verify=half), num_results),
        "excluded": lambda: pool.scan(
            pool.queries(3, num_queries, exclusions=num_results), num_results
        ),
    }


def row_calls(size: int) -> dict[str, Call]:
    """All other operators on inputs of about one size."""
    generator = torch.Generator().manual_seed(size)

    def floats(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    def integers(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator)

    dim = 1 + size % 70
    query, centroids = floats(9, dim), floats(size, dim)
    cache, slots = floats(4, 64, dim).half(), integers(-1, 256, 2, size)
    weight, bias = floats(2, dim, 19), floats(2, 19)
    scores, item_ids = integers(0, 50, 3, 4, size).float(), integers(0, 1 << 40, 3, 4, size)
    planes, columns = integers(-9, 9, 5, size, 1), integers(-9, 9, 1, size, 64)
    terms = integers(0, 5, size, 64, 2)
    program = torch.tensor([[[FilterOp.COMPARE, 0, Relation.GT, 0]]] * 3)
    pages, excluded = integers(-1, size, 3, size).int(), integers(-1, size * 64, 3, 5)
    values = torch.tensor([[[ValueOp.COLUMN, 0], [ValueOp.EXP, 0]]] * 2, dtype=torch.int32)
    request, constants = integers(0, 2, size), torch.zeros(2, 2)
    coarse = (query, *quantize_rows(query), centroids, *quantize_rows(centroids))

    def build() -> tuple[Tensor, ...]:
        target = planes.clone()
        places = torch.arange(0, size * 64, 7)
        bloom_build(
            target,
            places,
            terms.view(-1, 2)[places],
            first_plane=1,
            num_planes=4,
            num_hashes=2,
            seed=0,
        )
        return (target,)

    return {
        "quantize": lambda: quantize_rows(centroids),
        "probe": lambda: (coarse_probe(*coarse, min(size, 5)),),
        "refine": lambda: (refine(query[:2, None], cache, slots),),
        "gather": lambda: (gather_linear(cache, slots, weight, bias),),
        "select": lambda: select_topk(scores[0], item_ids[0], 1 + size // 3),
        "merge": lambda: merge_topk(scores, item_ids, 1 + size // 3),
        "eligibility": lambda: (eligibility(planes, columns, terms, program, pages, excluded),),
        "count": lambda: (count_eligible(planes, columns, terms, program),),
        "value": lambda: (value_program(centroids, request, values, constants),),
        "bloom": build,
    }


@pytest.mark.parametrize("num_results", [1, 10, 600, 100_000])
def test_the_number_of_threads_changes_no_bit_of_a_scan(
    num_results: int,
    pool_of: PoolOf,
    programs_of: ProgramsOf,
    threads: Callable[[int], None],
    assert_same: AssertSame,
) -> None:
    # A task is 64 words, so 200 pages are work for three threads.
    for num_queries in (1, 2, 9):
        calls = scan_calls(pool_of, programs_of, 200, num_queries, num_results)
        threads(1)
        expected = {name: call() for name, call in calls.items()}
        for count in (2, 3, 2):
            threads(count)
            for name, call in calls.items():
                assert_same(call(), expected[name])


def test_the_number_of_threads_changes_no_bit_of_other_operators(
    threads: Callable[[int], None], assert_same: AssertSame
) -> None:
    calls = row_calls(2500)
    threads(1)
    expected = {name: call() for name, call in calls.items()}
    for count in (2, 3):
        threads(count)
        for name, call in calls.items():
            assert_same(call(), expected[name])


def test_scratch_of_a_call_does_not_show_in_the_next(
    pool_of: PoolOf, programs_of: ProgramsOf, assert_same: AssertSame
) -> None:
    sizes = [
        scan_calls(pool_of, programs_of, num_pages, num_queries, num_results) | row_calls(rows)
        for num_pages, num_queries, num_results, rows in (
            (2, 1, 3, 1),
            (60, 9, 700, 150),
            (20, 33, 10, 64),
        )
    ]
    expected = [{name: call() for name, call in calls.items()} for calls in sizes]
    for order in permutations(range(3)):
        for at in order:
            for name, call in sizes[at].items():
                assert_same(call(), expected[at][name])


def test_calls_from_several_threads_do_not_meet(
    pool_of: PoolOf,
    programs_of: ProgramsOf,
    threads: Callable[[int], None],
    assert_same: AssertSame,
) -> None:
    calls = scan_calls(pool_of, programs_of, 130, 9, 50) | row_calls(300)
    expected = {name: call() for name, call in calls.items()}
    for count in (1, 2):
        threads(count)
        with ThreadPoolExecutor(4) as executor:
            running = [
                (name, executor.submit(call)) for _ in range(8) for name, call in calls.items()
            ]
            for name, result in running:
                assert_same(result.result(), expected[name])


ONE_THREAD = """
import os
import torch
from silvershard.kernels import ivf_scan, quantize_rows, select_topk

def threads():
    return len(os.listdir("/proc/self/task"))

def none(*shape):
    return torch.empty(shape, dtype=torch.int64)

torch.set_num_threads(1)
name, = sys.argv[1:]
num_pages = 300
scan = (
    torch.ones((16, 16), dtype=torch.int8), torch.ones(16),
    torch.zeros((16, 1), dtype=torch.int32),
    torch.arange(num_pages, dtype=torch.int32)[None],
    torch.ones((num_pages, 64, 16), dtype=torch.int8), torch.ones(num_pages, 64),
    torch.arange(num_pages * 64).view(num_pages, 64), torch.full((1, num_pages, 1), -1),
    none(0, num_pages, 64), none(num_pages, 64, 0), none(16, 0, 4), none(16, 0, 4), none(16, 0), 9,
)
one = tuple(
    tensor[:1] if at < 3 or 9 < at < 13 else tensor for at, tensor in enumerate(scan)
)
rows, scores, ids = torch.ones(5000, 64), torch.ones(8, 999), torch.ones(8, 999).long()

def work():
    ivf_scan(*scan)
    ivf_scan(*one)
    quantize_rows(rows)
    select_topk(scores, ids, 7)

with native_library.use(name):
    before = threads()
    work()
    print(threads() - before)
    torch.set_num_threads(2)
    work()
    print(threads() - before)
"""


def test_one_thread_never_starts_a_pool(implementation: str, run_python: RunPython) -> None:
    assert run_python(ONE_THREAD, implementation).split() == ["0", "1"]


@pytest.mark.parametrize("num_queries", [1, 9])
def test_a_scan_sees_what_was_changed_in_place(
    num_queries: int, pool_of: PoolOf, programs_of: ProgramsOf, assert_same: AssertSame
) -> None:
    pool = pool_of(1, num_pages=12, distinct_scores=True)
    queries = pool.everywhere(1, num_queries)
    program = programs_of([[[FilterOp.PLANE, 1, 0, 0]]] * num_queries)
    filtered = queries._replace(programs=program)
    seen = [pool.scan(queries, 30).scores]

    def check() -> None:
        result = pool.scan(queries, 30)
        assert_same(result, pool.reference(queries, 30))
        assert not any(torch.equal(result.scores, scores) for scores in seen)
        seen.append(result.scores)
        assert_same(pool.scan(filtered, 30), pool.reference(filtered, 30))

    best = pool.scan(queries, 30).slots[0]
    pool.codes.view(-1, 16)[best[0]] *= -1
    check()
    pool.scales.view(-1)[best[1]] = 0.0
    check()
    pool.planes[0, best[2] // 64] = 0
    check()
    pool.planes[1] = ~pool.planes[1]
    pool.page_table[0] = -1
    check()
    pool.page_table[4, 3] = 11
    check()


def test_queries_refuse_a_bad_one_without_harm_to_the_next_call(
    pool_of: PoolOf, assert_same: AssertSame
) -> None:
    pool = pool_of(2, num_pages=12, distinct_scores=True)
    for num_queries in (1, 9):
        queries = pool.everywhere(2, num_queries)
        expected = pool.scan(queries, 30)
        bad = queries._replace(clusters=queries.clusters.clone())
        bad.clusters[-1, 2] = 5
        with pytest.raises(ValueError, match=r"clusters must be in \[-1, 5\), got 5"):
            pool.scan(bad, 30)
        assert_same(pool.scan(queries, 30), expected)

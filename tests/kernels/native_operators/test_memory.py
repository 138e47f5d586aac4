"""Memory that a native operator reads: where tensors end, strides, and values that it refuses."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from silvershard.kernels import (
    FilterOp,
    Relation,
    coarse_probe,
    eligibility,
    ivf_scan,
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

GUARDED = """
import ctypes
import mmap
import torch
from silvershard.kernels import (
    coarse_probe, count_eligible, eligibility, gather_linear, ivf_scan, merge_topk, quantize_rows,
    refine, select_topk, value_program,
)

libc = ctypes.CDLL(None, use_errno=True)
kept = []

def guarded(tensor):
    "A copy whose last byte is the last one of a page, and the next page must not be read."
    tensor = tensor.contiguous()
    size = tensor.numel() * tensor.element_size()
    if size == 0:
        return tensor
    whole = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, whole + mmap.PAGESIZE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert libc.mprotect(ctypes.c_void_p(address + whole), mmap.PAGESIZE, 0) == 0
    kept.append(memory)
    copy = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=whole - size)
    return copy.view(tensor.shape).copy_(tensor)

def check(operator, *arguments):
    expected = operator(*arguments)
    got = operator(*(guarded(one) if isinstance(one, torch.Tensor) else one for one in arguments))
    expected = expected if isinstance(expected, tuple) else (expected,)
    for mine, other in zip(got if isinstance(got, tuple) else (got,), expected, strict=True):
        assert torch.equal(mine, other), operator.__name__

def integers(low, high, *shape):
    return torch.randint(low, high, shape, dtype=torch.int64)

name, number_of_outputs = sys.argv[1], int(sys.argv[2])
torch.manual_seed(0)
with native_library.use(name):
    for dim in (1, 16, 31, 33, 64, 96, 100, 128, 200, 1023):
        for page_size, queries in ((64, 1), (64, 9), (128, 2)):
            pages = 3
            pool = (
                integers(-1 << 62, 1 << 62, 4, pages, page_size // 64),
                integers(-3, 3, 2, pages, page_size), integers(0, 5, pages, page_size, 3),
            )
            pool[0][0] = -1
            rows = (integers(-127, 128, pages, page_size, dim).to(torch.int8),
                    torch.rand(pages, page_size), torch.arange(pages * page_size).view(pages, -1))
            codes = integers(-127, 128, queries, dim).to(torch.int8)
            clusters = torch.zeros((queries, 1), dtype=torch.int32)
            table = torch.arange(pages, dtype=torch.int32)[None]
            program = torch.tensor([[[3, 3, 0, 0], [4, 1, 0, 1], [8, 0, 0, 2], [6] + [0] * 3,
                                     [5] + [0] * 3]]).repeat(queries, 1, 1)
            none = program[:, :0]
            excluded = integers(0, pages * page_size, queries, 5)
            for filters in ((none, none, excluded[:, :0]), (program, program, excluded),
                            (none, program, excluded[:, :0])):
                for results in (1, 700):
                    check(ivf_scan, codes, torch.rand(queries), clusters, table, *rows, *pool,
                          *filters, results)
            check(eligibility, *pool, program, table.repeat(queries, 1), excluded)
            check(count_eligible, *pool, program)
        query, centroids = torch.randn(3, dim), torch.randn(70, dim)
        check(quantize_rows, query)
        check(coarse_probe, query, *quantize_rows(query), centroids, *quantize_rows(centroids), 5)
        cache, slots = torch.randn(2, 64, dim).half(), integers(-1, 128, 3, 17)
        slots[0, 0] = 127
        check(refine, query[:, None], cache, slots)
        for outputs in (1, 7, 8, 17, number_of_outputs):
            weight, bias = torch.randn(3, dim, outputs), torch.randn(3, outputs)
            check(gather_linear, cache, slots, weight, bias)
        columns = torch.randn(dim, 3)
        value = torch.tensor([[[1, 2], [2, 0], [3, 0]]], dtype=torch.int32)
        check(value_program, columns, torch.zeros(dim).long(), value, torch.ones(1, 3))
        check(select_topk, torch.randn(3, dim), integers(-1, 99, 3, dim), 5)
        check(merge_topk, torch.randn(2, 3, dim), integers(-1, 99, 2, 3, dim), 5)
print("done", len(kept))
"""


def test_nothing_is_read_behind_the_end_of_a_tensor(
    implementation: str, run_python: RunPython
) -> None:
    assert run_python(GUARDED, implementation, "65").startswith("done")


def strided(tensor: Tensor) -> Tensor:
    """The same values with other strides."""
    if tensor.dim() == 1:
        return torch.stack((tensor, tensor), dim=1)[:, 0]
    return tensor.transpose(0, -1).contiguous().transpose(0, -1)


def check_strides(
    operator: Callable[..., Any], arguments: Mapping[str, Any], free: tuple[str, ...]
) -> None:
    expected = operator(**arguments)
    for name in free:
        changed = dict(arguments) | {name: strided(arguments[name])}
        assert not changed[name].is_contiguous(), name
        got = operator(**changed)
        pairs = zip(got, expected, strict=True) if isinstance(got, tuple) else [(got, expected)]
        for mine, other in pairs:
            assert torch.equal(mine, other), name


def scan_arguments(pool: Any, queries: Any, num_results: int) -> dict[str, Any]:
    names = ["query_codes", "query_scales", "clusters", "page_table", "codes", "scales"]
    names += ["item_ids", "planes", "columns", "terms", "programs", "verify", "excluded"]
    arguments = dict(zip(names, pool.arguments(queries), strict=True))
    return arguments | {"num_results": num_results}


def test_inputs_other_than_the_index_may_have_any_strides(
    pool_of: PoolOf, programs_of: ProgramsOf
) -> None:
    pool = pool_of(1, distinct_scores=True)
    queries = pool.everywhere(1, 9, exclusions=4)
    program = programs_of([[[FilterOp.COMPARE, 0, Relation.LT, 2]] * 2 + [[5, 0, 0, 0]]] * 9)
    scan = scan_arguments(pool, queries._replace(programs=program, verify=program), 20)
    free = ("query_codes", "query_scales", "clusters", "page_table", "programs", "verify")
    check_strides(ivf_scan, scan, (*free, "excluded"))
    of_pages = ("planes", "columns", "terms", "programs", "pages", "excluded")
    pages = torch.arange(9, dtype=torch.int32).repeat(9, 1)
    values = (*pool.filters(), program, pages, queries.excluded)
    check_strides(eligibility, dict(zip(of_pages, values, strict=True)), of_pages[3:])
    generator = torch.Generator().manual_seed(0)
    query, centroids = torch.randn((2, 5, 8), generator=generator)
    queries, clusters = quantize_rows(query), quantize_rows(centroids)
    coarse = {
        "query": query,
        "query_codes": queries.codes,
        "query_scales": queries.scales,
        "centroids": centroids,
        "centroid_codes": clusters.codes,
        "centroid_scales": clusters.scales,
    }
    check_strides(coarse_probe, coarse | {"probes": 3}, tuple(coarse))
    check_strides(quantize_rows, {"x": query}, ("x",))
    scores = {"scores": torch.randn((3, 4, 5), generator=generator), "k": 7}
    scores["item_ids"] = torch.arange(60).view(3, 4, 5)
    check_strides(merge_topk, scores, ("scores", "item_ids"))
    one = {"scores": query, "item_ids": torch.arange(40).view(5, 8), "k": 3}
    check_strides(select_topk, one, ("scores", "item_ids"))
    refined = {
        "query": torch.randn((2, 3, 8), generator=generator),
        "cache": torch.randn((2, 64, 8), generator=generator).half(),
        "slots": torch.tensor([[1, 2, -1], [127, 0, 5]]),
    }
    check_strides(refine, refined, ("query", "slots"))
    value = torch.tensor([[[1, 0], [2, 0], [3, 0]], [[1, 1], [2, 0], [4, 0]]], dtype=torch.int32)
    valued = {
        "columns": query,
        "request": torch.tensor([0, 1, 1, 0, 1]),
        "programs": value,
        "constants": torch.randn((2, 3), generator=generator),
    }
    check_strides(value_program, valued, tuple(valued))


def test_a_page_that_clusters_share_is_no_danger_to_memory(pool_of: PoolOf) -> None:
    """The contract forbids it, and values of the index are not searched for it at every call."""
    pool = pool_of(3, num_pages=10, live=1.0, distinct_scores=True)
    pool.page_table[:, :9] = torch.arange(9, dtype=torch.int32)
    for num_queries in (1, 9, 64):
        queries = pool.everywhere(3, num_queries)
        for num_results in (1, 100, 700, 5000):
            try:
                slots = pool.scan(queries, num_results).slots
            except ValueError as error:
                assert "page_table must hold each page once" in str(error)  # noqa: PT017
            else:
                assert int(slots.min()) >= -1
                assert int(slots.max()) < pool.num_slots

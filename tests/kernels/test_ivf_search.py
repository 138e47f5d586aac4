"""A search in one step is the three steps one after the other, whatever runs them."""

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from silvershard.kernels import IvfIndex, ScanResult, coarse_probe, ivf_scan, quantize_rows

PoolOf = Callable[..., Any]
RowsOf = Callable[..., Any]
ProgramsOf = Callable[..., Tensor]


def centroids_of(seed: int, num_clusters: int, dim: int) -> dict[str, Tensor]:
    centroids = torch.randn(num_clusters, dim, generator=torch.Generator().manual_seed(seed))
    codes, scales = quantize_rows(centroids)
    return {"centroids": centroids, "centroid_codes": codes, "centroid_scales": scales}


def lists_of(pool: Any) -> dict[str, Tensor]:
    names = ["page_table", "codes", "scales", "item_ids", "planes", "columns", "terms"]
    return dict(zip(names, pool.scan_arguments(), strict=True))


def in_steps(
    centroids: dict[str, Tensor], pool: Any, query: Tensor, filters: tuple[Tensor, ...],
    probes: int, num_results: int,
) -> ScanResult:  # fmt: skip
    codes, scales = quantize_rows(query)
    if probes == len(centroids["centroids"]):
        clusters = torch.arange(probes, dtype=torch.int32).repeat(len(query), 1)
    else:
        clusters = coarse_probe(query, codes, scales, *centroids.values(), probes)
    return ivf_scan(codes, scales, clusters, *pool.scan_arguments(), *filters, num_results)


@pytest.mark.parametrize(
    ("dim", "num_queries", "num_clusters"), [(1, 1, 3), (16, 5, 40), (33, 3, 5), (64, 70, 40)]
)
@pytest.mark.usefixtures("implementation")
def test_a_search_equals_its_three_steps(
    dim: int,
    num_queries: int,
    num_clusters: int,
    pool_of: PoolOf,
    rows_of: RowsOf,
    programs_of: ProgramsOf,
) -> None:
    rng = random.Random(dim)
    pool = pool_of(dim, num_pages=30, num_clusters=num_clusters, dim=dim, distinct_scores=True)
    centroids = centroids_of(dim, num_clusters, dim)
    index = IvfIndex(**centroids, **lists_of(pool))
    query = torch.randn(num_queries, dim, generator=torch.Generator().manual_seed(1))
    scan = programs_of([rows_of(rng, pool, 2, with_terms=False) for _ in range(num_queries)])
    verify = programs_of([rows_of(rng, pool, 2, with_terms=True) for _ in range(num_queries)])
    excluded = pool.queries(dim, num_queries, exclusions=20).excluded
    for probes in (1, num_clusters // 2, num_clusters):
        for filters in ((scan, verify, excluded), (scan[:, :0], verify[:, :0], excluded[:, :0])):
            for num_results in (1, 9, 3000):
                got = index.search(query, *filters, probes, num_results)
                expected = in_steps(centroids, pool, query, filters, probes, num_results)
                for mine, other in zip(got, expected, strict=True):
                    assert torch.equal(mine, other)
                assert (got.item_ids >= 0).any() or not expected.eligible.any()


@pytest.mark.usefixtures("implementation")
def test_values_may_change_between_searches(pool_of: PoolOf) -> None:
    pool = pool_of(3, num_clusters=4)
    centroids = centroids_of(3, 4, 16)
    index = IvfIndex(**centroids, **lists_of(pool))
    query = torch.randn(2, 16, generator=torch.Generator().manual_seed(2))
    none = torch.empty(2, 0, 4, dtype=torch.int64), torch.empty(2, 0, 4, dtype=torch.int64)
    nothing = torch.empty(2, 0, dtype=torch.int64)
    before = index.search(query, *none, nothing, 4, 5)
    pool.planes[0].bitwise_and_(torch.tensor(0x5555555555555555))
    pool.codes.neg_()
    after = index.search(query, *none, nothing, 4, 5)
    expected = in_steps(centroids, pool, query, (*none, nothing), 4, 5)
    assert torch.equal(after.item_ids, expected.item_ids)
    assert not torch.equal(after.item_ids, before.item_ids)


def test_originals_that_are_replaced_leave_the_index_whole(pool_of: PoolOf) -> None:
    pool = pool_of(5, num_clusters=4)
    index = IvfIndex(**centroids_of(5, 4, 16), **lists_of(pool))
    query = torch.ones(1, 16)
    none = torch.empty(1, 0, 4, dtype=torch.int64), torch.empty(1, 0, 4, dtype=torch.int64)
    nothing = torch.empty(1, 0, dtype=torch.int64)
    before = index.search(query, *none, nothing, 4, 5)
    pool.codes.data = torch.zeros(1, 1, 16, dtype=torch.int8)
    pool.scales.resize_(0)
    assert torch.equal(index.search(query, *none, nothing, 4, 5).item_ids, before.item_ids)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("centroids", lambda t: t.double(), "centroids must be torch.float32"),
        ("centroids", lambda t: t[:, :0], r"centroids must have D in \[1, 1024\], got 0"),
        ("centroid_codes", lambda t: t[:3], r"centroid_codes must have shape \(4, 16\)"),
        ("centroid_scales", lambda t: t.double(), "centroid_scales must be torch.float32"),
        ("page_table", lambda t: t[:3], r"page_table must have shape \(4, X\)"),
        ("codes", lambda t: t[:, :, :8], r"codes must have shape \(9, 64, 16\)"),
        ("codes", lambda t: t.mT.contiguous().mT, "codes must be contiguous"),
        ("scales", lambda t: t.double(), "scales must be torch.float32"),
        ("item_ids", lambda t: t.int(), "item_ids must be torch.int64"),
        ("planes", lambda t: t[:0], "planes must hold the live plane"),
        ("terms", lambda t: t.int(), "terms must be torch.int64"),
    ],
)
def test_an_index_whose_tensors_do_not_fit_is_refused(
    name: str, change: Callable[[Tensor], Tensor], message: str, pool_of: PoolOf
) -> None:
    good = {**centroids_of(0, 4, 16), **lists_of(pool_of(0, num_clusters=4))}
    IvfIndex(**good)
    with pytest.raises(ValueError, match=message):
        IvfIndex(**good | {name: change(good[name])})


@pytest.mark.usefixtures("implementation")
def test_a_bad_search_is_refused(pool_of: PoolOf) -> None:
    pool = pool_of(0, num_clusters=4)
    index = IvfIndex(**centroids_of(0, 4, 16), **lists_of(pool))
    empty = torch.zeros(2, 0, 4, dtype=torch.int64)
    good = {
        "query": torch.ones(2, 16),
        "programs": empty,
        "verify": empty,
        "excluded": torch.empty(2, 0, dtype=torch.int64),
        "probes": 2,
        "num_results": 3,
    }
    index.search(**good)
    malformed = torch.full((2, 1, 4), 99)
    for changes, message in [
        ({"query": torch.ones(2, 15)}, r"query must have shape \(Q, 16\)"),
        ({"query": torch.ones(2, 16) * torch.nan}, "x must be finite"),
        ({"programs": empty[:1]}, r"programs must have shape \(2, L, 4\)"),
        ({"programs": malformed}, "program"),
        ({"verify": empty.int()}, "verify must be torch.int64"),
        ({"verify": malformed}, "program"),
        ({"excluded": torch.full((2, 1), 9 * 64)}, "excluded must be in"),
        ({"probes": 0}, r"probes must be in \[1, 4\], got 0"),
        ({"probes": 5}, r"probes must be in \[1, 4\], got 5"),
        ({"num_results": 0}, "num_results must be at least 1, got 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            index.search(**good | changes)
    pool.page_table.fill_(9)
    with pytest.raises(ValueError, match="page_table must be in"):
        index.search(**good)


def test_a_search_compiles_and_exports(pool_of: PoolOf) -> None:
    class Search(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.index = IvfIndex(**centroids_of(0, 4, 16), **lists_of(pool_of(0, num_clusters=4)))

        def forward(self, query: Tensor) -> tuple[Tensor, ...]:
            empty = torch.zeros(query.shape[0], 0, 4, dtype=torch.int64)
            return self.index.search(query, empty, empty, empty[:, :, 0], 2, 7)

    search, query = Search(), torch.ones(3, 16)
    expected = search(query)
    compiled = torch.compile(search, fullgraph=True, backend="eager")(query)
    exported = torch.export.export(search, (query,)).module()(query)
    for mine, other, third in zip(expected, compiled, exported, strict=True):
        assert torch.equal(mine, other)
        assert torch.equal(mine, third)

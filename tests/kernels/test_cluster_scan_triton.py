from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
import torch

from silvershard.kernels import unpack_bits
from silvershard.kernels.cluster_scan_triton import shares_enough, surviving_words
from silvershard.kernels.ivf_scan import ivf_scan_reference
from silvershard.kernels.ivf_scan_triton import ivf_scan_triton
from silvershard.kernels.page_lists_triton import list_pages

PoolOf = Callable[..., Any]

SCAN = import_module("silvershard.kernels.ivf_scan_triton")
CLUSTER_SCAN = import_module("silvershard.kernels.cluster_scan_triton")


def order_of(scores: torch.Tensor) -> torch.Tensor:
    bits = scores.view(torch.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@pytest.mark.parametrize(
    ("dim", "page_size", "num_queries"), [(32, 64, 3), (64, 128, 21), (96, 64, 17), (256, 128, 2)]
)
def test_survivors_are_the_eligible_slots_that_reach_the_cut(
    dim: int, page_size: int, num_queries: int, pool_of: PoolOf, device: torch.device
) -> None:
    pool = pool_of(dim, dim=dim, page_size=page_size, num_clusters=4, distinct_scores=True)
    pool.codes[0, :2] = -128
    generator = torch.Generator().manual_seed(dim)
    shape = (num_queries, dim)
    query_codes = torch.randint(-127, 128, shape, generator=generator).to(torch.int8)
    query_codes[0] = -128
    query_scales = torch.rand(num_queries, generator=generator)
    clusters = torch.randint(-1, 4, (num_queries, 4), generator=generator).int()
    scores = (pool.codes.view(-1, dim).float() @ query_codes.float().T).T
    scores = scores * pool.scales.view(-1) * query_scales[:, None]  # (Q, N G)
    cut_scores = scores.quantile(0.9, dim=1)
    cut_scores[1] = scores[1, 70]
    heads = (~order_of(cut_scores)).long() << 32
    cuts = torch.stack((heads, torch.zeros_like(heads)), dim=1)
    cuts[-1] = (1 << 63) - 1  # everything passes
    program = torch.empty((num_queries, 0, 4), dtype=torch.int64)
    excluded = torch.randint(-1, pool.num_slots, (num_queries, 30), generator=generator)
    there = [part.to(device) for part in (pool.planes, pool.columns, pool.terms)]
    lists = list_pages(
        clusters.to(device),
        pool.page_table.to(device),
        *there,
        program.to(device),
        excluded.to(device),
    )
    survivors = surviving_words(
        lists,
        cuts.to(device),
        query_codes.to(device),
        query_scales.to(device),
        pool.codes.to(device),
        pool.scales.to(device),
        4,
    )
    num_words = page_size // 64
    for query in range(num_queries):
        count = int(lists.num_pages[query])
        pages = lists.pages[query, :count].long().cpu()
        eligible = unpack_bits(lists.words[query, : count * num_words].cpu()).view(count, page_size)
        mine = scores[query].view(-1, page_size)[pages]
        reaches = mine >= (cut_scores[query] if query + 1 < num_queries else -torch.inf)
        words = survivors[query, : count * num_words].cpu()
        got = unpack_bits(words).view(count, page_size)
        assert torch.equal(got, eligible & reaches)


@pytest.mark.slow
@pytest.mark.parametrize("distinct_scores", [False, True])
def test_a_large_batch_equals_the_reference(
    distinct_scores: bool, pool_of: PoolOf, monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    monkeypatch.setattr(SCAN, "SAMPLES", 64)
    monkeypatch.setattr(SCAN, "list_capacity", lambda k, *_: k + 120)
    monkeypatch.setattr(CLUSTER_SCAN, "LEAST_SHARING", 2)
    pool = pool_of(5, dim=32, num_clusters=4, live=0.9, distinct_scores=distinct_scores)
    generator = torch.Generator().manual_seed(3)
    arguments = [
        torch.randint(-127, 128, (6, 32), generator=generator).to(torch.int8),
        torch.rand(6, generator=generator),
        torch.tensor([[0, 1, 2], [2, 1, 0], [1, 1, 2], [-1, 0, 0], [3, 2, 1], [0, 2, 1]]).int(),
        *pool.scan_arguments(),
        torch.empty((6, 0, 4), dtype=torch.int64),
        torch.empty((6, 0, 4), dtype=torch.int64),
        torch.randint(-1, pool.num_slots, (6, 11), generator=generator),
    ]
    called = []
    monkeypatch.setattr(
        SCAN, "surviving_words", lambda *given: called.append(1) or surviving_words(*given)
    )
    for num_results in (3, 40):
        got = ivf_scan_triton(*(part.to(device) for part in arguments), num_results)
        for mine, other in zip(got, ivf_scan_reference(*arguments, num_results), strict=True):
            assert torch.equal(mine.cpu(), other)
    assert len(called) == 2


def test_the_prefilter_serves_shared_clusters_and_whole_tensor_core_tiles_only() -> None:
    assert shares_enough(1024, 64, 4096, 64)
    assert not shares_enough(128, 64, 4096, 64)
    assert not shares_enough(1024, 64, 4096, 48)
    assert not shares_enough(1024, 64, 4096, 512)

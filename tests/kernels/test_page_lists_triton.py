import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from silvershard.kernels import popcount
from silvershard.kernels.eligibility import eligibility_reference
from silvershard.kernels.page_lists_triton import BLOCK_WORDS, list_pages

PoolOf = Callable[..., Any]
RowsOf = Callable[..., list[list[int]]]
ProgramsOf = Callable[..., Tensor]


@pytest.mark.parametrize("page_size", [64, 128])
@pytest.mark.parametrize("num_queries", [1, 6])
def test_lists_hold_each_probed_page_once_and_its_eligible_slots(
    page_size: int,
    num_queries: int,
    pool_of: PoolOf,
    rows_of: RowsOf,
    programs_of: ProgramsOf,
    device: torch.device,
) -> None:
    rng = random.Random(num_queries)
    pool = pool_of(num_queries, num_pages=150, num_clusters=5, page_size=page_size)
    pool.page_table[:, 3::7] = -1
    clusters = torch.tensor([[rng.randrange(-1, 5) for _ in range(4)] for _ in range(num_queries)])
    clusters = clusters.int()
    programs = programs_of([rows_of(rng, pool, 2, with_terms=True) for _ in range(num_queries)])
    excluded = torch.tensor([[rng.randrange(-1, pool.num_slots) for _ in range(50)]] * num_queries)
    filters = (pool.planes, pool.columns, pool.terms, programs)
    lists = list_pages(
        *(part.to(device) for part in (clusters, pool.page_table, *filters, excluded))
    )
    num_words = page_size // 64
    for query in range(num_queries):
        probed = {
            page
            for cluster in clusters[query].tolist()
            if cluster >= 0
            for page in pool.page_table[cluster].tolist()
            if page >= 0
        }
        count = int(lists.num_pages[query])
        pages = lists.pages[query, :count].cpu()
        assert sorted(pages.tolist()) == sorted(probed)
        mine = slice(query, query + 1)
        words = eligibility_reference(
            *filters[:3], programs[mine], pages[None], excluded[mine]
        ).flatten()
        assert torch.equal(lists.words[query, : count * num_words].cpu(), words)
        counts = popcount(words)
        assert int(lists.eligible[query]) == int(counts.sum())
        assert int(lists.probed[query]) == int(popcount(pool.planes[0][pages.long()]).sum())
        for block in range(lists.block_counts.shape[1]):
            part = counts[block * BLOCK_WORDS : (block + 1) * BLOCK_WORDS]
            start = block * BLOCK_WORDS
            prefixes = lists.prefixes[query, start : start + len(part)].cpu()
            assert int(lists.block_counts[query, block]) == int(part.sum())
            assert torch.equal(prefixes.long(), part.cumsum(0) - part)

"""Tensor-core prefilter of a large batch, cluster by cluster, on CUDA.

One program takes a cluster and up to BLOCK_Q of the queries that probe it. It multiplies every page
of the cluster with all of them at once, so that a page is read once per BLOCK_Q queries, compares
the scores with the queries' cuts and stores one bit per score: the eligible slots that can still
pass. Scores are not stored; the scan computes those of the few survivors again.

Items are the M side of the product, because a tensor-core tile has 64 of them at least, while 16
queries are enough for the N side.

Shapes: Q query rows, P probes, C clusters, W words per page, D embedding dimension.

Source: CABANA (queries grouped by cluster into one product), IEEE CAL 2025.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

from silvershard.kernels.page_lists_triton import PageLists

# Queries per cluster above which sharing a page pays for computing survivors twice.
LEAST_SHARING = 8
_MOST_DIM = 256
_PAGE_SPLITS = 4
_ITEMS = 128
_BIAS = tl.constexpr(12582912.0)
_BIASED = tl.constexpr(0x4B400000)


def shares_enough(num_queries: int, num_probes: int, num_clusters: int, dim: int) -> bool:
    """Whether a cluster is probed by so many queries that the prefilter pays."""
    sharing = num_queries * num_probes >= LEAST_SHARING * num_clusters
    return sharing and dim % 32 == 0 and dim <= _MOST_DIM


@triton.jit
def _cluster_scan_kernel(
    survivors_ptr,
    words_ptr,
    cuts_ptr,
    pairs_ptr,
    starts_ptr,
    tile_ends_ptr,
    tile_clusters_ptr,
    bases_ptr,
    pages_ptr,
    num_pages_ptr,
    query_codes_ptr,
    query_scales_ptr,
    codes_ptr,
    scales_ptr,
    num_clusters,
    num_probes,
    list_length,
    num_splits,
    pool_pages,
    NUM_WORDS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    ITEMS: tl.constexpr,
):
    tile = tl.program_id(0)
    cluster = tl.load(tile_clusters_ptr + tile)
    if cluster < num_clusters:
        first_tile = tl.load(tile_ends_ptr + cluster - 1, mask=cluster > 0, other=0)
        start = tl.load(starts_ptr + cluster) + (tile - first_tile) * BLOCK_Q
        member = start + tl.arange(0, BLOCK_Q)
        there = member < tl.load(starts_ptr + cluster + 1)
        pair = tl.load(pairs_ptr + member, mask=there, other=0)
        query = pair // num_probes
        base = tl.load(bases_ptr + pair, mask=there, other=0).to(tl.int64)
        # Every query of the cluster lists the same pages; those of the first one are read.
        lead = tl.load(pairs_ptr + start)
        lead_base = tl.load(bases_ptr + lead)
        lead_query = lead // num_probes
        ends_list = lead % num_probes == num_probes - 1
        end = tl.load(num_pages_ptr + lead_query)
        if not ends_list:
            end = tl.load(bases_ptr + lead + 1)
        size = end - lead_base
        lead_pages_ptr = pages_ptr + lead_query * list_length + lead_base

        cut = tl.load(cuts_ptr + 2 * query, mask=there, other=0)
        order = ~(cut >> 32).to(tl.int32)
        cut_scores = (order ^ ((order >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
        cut_scores = tl.where(cut_scores == cut_scores, cut_scores, float("-inf"))
        query_scales = tl.load(query_scales_ptr + query, mask=there, other=0.0)

        item = tl.arange(0, ITEMS)
        half_words: tl.constexpr = ITEMS // 32
        per_page: tl.constexpr = NUM_WORDS * 2
        pages_per_tile: tl.constexpr = ITEMS // (64 * NUM_WORDS)
        half = tl.arange(0, half_words)
        bit = (tl.full([ITEMS], 1, tl.int32) << (item % 32))[:, None]
        for block in range(tl.program_id(1), tl.cdiv(size, pages_per_tile), num_splits):
            first_page = block * pages_per_tile
            half_page = first_page + half // per_page
            inside = (half_page < size)[:, None] & there[None, :]
            half_place = (base[None, :] + half_page[:, None]) * per_page + (half % per_page)[
                :, None
            ]
            half_place += query[None, :] * list_length * per_page
            eligible = tl.load(words_ptr + half_place, mask=inside, other=0)
            survivors = tl.zeros([half_words, BLOCK_Q], tl.int32)
            if tl.max((eligible != 0).to(tl.int32)) > 0:
                item_page = first_page + item // (64 * NUM_WORDS)
                page = tl.load(lead_pages_ptr + item_page, mask=item_page < size, other=0)
                page = tl.where((page >= 0) & (page < pool_pages), page, 0)
                slot = page.to(tl.int64) * (64 * NUM_WORDS) + item % (64 * NUM_WORDS)
                dots = tl.zeros([ITEMS, BLOCK_Q], tl.int32)
                for first in tl.static_range(0, DIM, BLOCK_K):
                    column = first + tl.arange(0, BLOCK_K)
                    items = tl.load(codes_ptr + slot[:, None] * DIM + column[None, :])
                    queries = tl.load(
                        query_codes_ptr + query[:, None] * DIM + column[None, :],
                        mask=there[:, None],
                        other=0,
                    )
                    dots = tl.dot(items, tl.trans(queries), dots, out_dtype=tl.int32)
                scales = tl.load(scales_ptr + slot)
                # A product is at most 2**22, so it fits the mantissa of 1.5 * 2**23; the conversion
                # of an integer would run at a quarter of the rate of these two additions.
                exact = (dots + _BIASED).to(tl.float32, bitcast=True) - _BIAS
                scores = exact * scales[:, None] * query_scales[None, :]
                marks = tl.where(scores >= cut_scores[None, :], bit, 0)
                passed = tl.sum(tl.reshape(marks, [half_words, 32, BLOCK_Q]), axis=1)
                survivors = eligible & passed
            tl.store(survivors_ptr + half_place, survivors, mask=inside)


def surviving_words(
    lists: PageLists,
    cuts: Tensor,
    query_codes: Tensor,
    query_scales: Tensor,
    codes: Tensor,
    scales: Tensor,
    num_clusters: int,
) -> Tensor:
    """The eligible slots of every query whose score alone reaches the query's cut.

    Args:
        lists: the probed pages, see ``list_pages``.
        cuts: ``(Q, 2)`` int64: head and tail of each query's cut.
        query_codes: ``(Q, D)`` int8, contiguous.
        query_scales: ``(Q,)`` float32, contiguous.
        codes: ``(N, G, D)`` int8, contiguous.
        scales: ``(N, G)`` float32, contiguous.
        num_clusters: C.

    Returns:
        ``(Q, M W)`` int64, the words of ``lists`` less the slots that cannot pass.
    """
    num_queries, num_probes = lists.clusters.shape
    num_pages, page_size, dim = codes.shape
    num_pairs = num_queries * num_probes
    sharing = num_pairs // num_clusters
    block_q = 16 if sharing < 24 else 32 if sharing < 48 else 64
    # Only the first of equal clusters of a query has pages; absent ones sort behind all others.
    clusters = lists.clusters.clone()
    repeated = lists.clusters[:, 1:] == lists.clusters[:, :-1]
    clusters[:, 1:].masked_fill_(repeated, num_clusters)
    clusters.masked_fill_((clusters < 0) | (clusters > num_clusters), num_clusters)
    ordered, pairs = clusters.flatten().sort()
    every_cluster = torch.arange(num_clusters + 1, dtype=torch.int32, device=codes.device)
    starts = torch.searchsorted(ordered, every_cluster, out_int32=True)  # (C + 1,)
    num_tiles = (starts[1:] - starts[:-1] + (block_q - 1)) // block_q
    tile_ends = num_tiles.cumsum(dim=0, dtype=torch.int32)
    most_tiles = min(num_clusters, num_pairs) + num_pairs // block_q
    every_tile = torch.arange(most_tiles, dtype=torch.int32, device=codes.device)
    tile_clusters = torch.searchsorted(tile_ends, every_tile, right=True, out_int32=True)
    survivors = torch.empty_like(lists.words)
    _cluster_scan_kernel[most_tiles, _PAGE_SPLITS](
        survivors.view(torch.int32),
        lists.words.view(torch.int32),
        cuts,
        pairs,
        starts,
        tile_ends,
        tile_clusters,
        lists.bases,
        lists.pages,
        lists.num_pages,
        query_codes,
        query_scales,
        codes,
        scales,
        num_clusters,
        num_probes,
        lists.pages.shape[1],
        _PAGE_SPLITS,
        num_pages,
        NUM_WORDS=page_size // 64,
        DIM=dim,
        BLOCK_K=min(128, dim & -dim),
        BLOCK_Q=block_q,
        ITEMS=_ITEMS,
        enable_fp_fusion=False,
    )
    return survivors

"""Pages that each query probes, and their eligible slots, on CUDA.

Three kernels. One program counts the pages of one cluster (or of one probe, where those are fewer).
One program writes the pages of one probe to the list of its query; the lists are dense and keep
the order of the clusters and of the page table. One program filters a block of 128 words of a list
and keeps count, so that the n-th eligible slot of a query can be found by binary search.

Shapes: Q query rows, P probes, C clusters, X pages a cluster may own, M pages a list can hold,
W words per page, K blocks of words per list.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from typing import NamedTuple

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

from silvershard.kernels.eligibility_triton import clear_excluded, sorted_exclusions
from silvershard.kernels.filter_ops_triton import deep_levels, popcount_words, truth_words

BLOCK_WORDS = 128
_BLOCK_PROBES = 512


class PageLists(NamedTuple):
    """Probed pages and eligible slots of every query; what lies behind the pages is undefined.

    Args:
        clusters: ``(Q, P)`` int32 ascending; all but the first of equal ones have no pages.
        bases: ``(Q, P)`` int32: where the pages of a probe begin in the list.
        pages: ``(Q, M)`` int32.
        num_pages: ``(Q,)`` int32.
        words: ``(Q, M W)`` int64: eligible slots.
        prefixes: ``(Q, M W)`` int32: eligible slots before a word in its block.
        block_counts: ``(Q, K)`` int32: eligible slots of each block of 128 words.
        probed: ``(Q,)`` int64: live slots of the pages.
        eligible: ``(Q,)`` int64: eligible slots of the pages.
    """

    clusters: Tensor
    bases: Tensor
    pages: Tensor
    num_pages: Tensor
    words: Tensor
    prefixes: Tensor
    block_counts: Tensor
    probed: Tensor
    eligible: Tensor


@triton.jit
def _page_counts_kernel(
    sizes_ptr,
    clusters_ptr,
    page_table_ptr,
    num_clusters,
    width,
    BY_PROBE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    cluster = row
    if BY_PROBE:
        cluster = tl.load(clusters_ptr + row).to(tl.int64)
    there = (cluster >= 0) & (cluster < num_clusters)
    size = tl.full([], 0, tl.int32)
    if there:
        for start in range(0, width, BLOCK):
            offset = start + tl.arange(0, BLOCK)
            pages = tl.load(
                page_table_ptr + cluster * width + offset, mask=offset < width, other=-1
            )
            size += tl.sum((pages >= 0).to(tl.int32))
    tl.store(sizes_ptr + row, size)


@triton.jit
def _list_pages_kernel(
    pages_ptr,
    num_pages_ptr,
    bases_ptr,
    sizes_ptr,
    clusters_ptr,
    page_table_ptr,
    num_clusters,
    width,
    num_probes,
    list_length,
    BY_PROBE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_PROBES: tl.constexpr,
):
    probe = tl.program_id(0)
    query = tl.program_id(1).to(tl.int64)
    clusters_ptr += query * num_probes
    # Pages of the earlier probes; equal clusters are neighbours, and the first of them counts.
    base = tl.full([], 0, tl.int32)
    for start in range(0, probe, BLOCK_PROBES):
        earlier = start + tl.arange(0, BLOCK_PROBES)
        before = earlier < probe
        clusters = tl.load(clusters_ptr + earlier, mask=before, other=-1)
        previous = tl.load(clusters_ptr + earlier - 1, mask=before & (earlier > 0), other=-1)
        counted = before & (clusters >= 0) & (clusters < num_clusters) & (clusters != previous)
        if BY_PROBE:
            sizes = tl.load(sizes_ptr + query * num_probes + earlier, mask=counted, other=0)
        else:
            sizes = tl.load(sizes_ptr + clusters, mask=counted, other=0)
        base += tl.sum(sizes)
    tl.store(bases_ptr + query * num_probes + probe, base)
    cluster = tl.load(clusters_ptr + probe).to(tl.int64)
    first = tl.load(clusters_ptr + tl.maximum(probe - 1, 0)) != cluster
    there = (cluster >= 0) & (cluster < num_clusters) & (first | (probe == 0))
    if there:
        for start in range(0, width, BLOCK):
            offset = start + tl.arange(0, BLOCK)
            pages = tl.load(
                page_table_ptr + cluster * width + offset, mask=offset < width, other=-1
            )
            present = pages >= 0
            place = base + tl.cumsum(present.to(tl.int32), 0) - 1
            tl.store(
                pages_ptr + query * list_length + place, pages, mask=present & (place < list_length)
            )
            base += tl.sum(present.to(tl.int32))
    if probe == num_probes - 1:
        tl.store(num_pages_ptr + query, tl.minimum(base, list_length))


@triton.jit
def _filter_lists_kernel(
    words_ptr,
    prefixes_ptr,
    block_counts_ptr,
    probed_ptr,
    eligible_ptr,
    planes_ptr,
    columns_ptr,
    terms_ptr,
    programs_ptr,
    pages_ptr,
    num_pages_ptr,
    excluded_ptr,
    length,
    list_length,
    num_excluded,
    num_pages,
    num_planes,
    num_columns,
    num_terms,
    NUM_WORDS: tl.constexpr,
    DEEP: tl.constexpr,
    SEARCH_STEPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    query = tl.program_id(1).to(tl.int64)
    position = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # of M W words
    inside = position < tl.load(num_pages_ptr + query) * NUM_WORDS
    total = tl.full([], 0, tl.int32)
    if tl.max(inside.to(tl.int32)) > 0:
        place = position // NUM_WORDS
        page = tl.load(pages_ptr + query * list_length + place, mask=inside, other=-1)
        page = page.to(tl.int64)
        word = position % NUM_WORDS
        active = inside & (page >= 0) & (page < num_pages)
        page = tl.where(active, page, 0)
        live = tl.load(planes_ptr + page * NUM_WORDS + word, mask=active, other=0)
        words = live & truth_words(
            programs_ptr + query * length * 4,
            length,
            planes_ptr,
            columns_ptr,
            terms_ptr,
            page,
            word,
            active,
            num_pages,
            num_planes,
            num_columns,
            num_terms,
            NUM_WORDS,
            DEEP,
            BLOCK,
        )
        if SEARCH_STEPS > 0:
            words = clear_excluded(
                words,
                (page * NUM_WORDS + word) * 64,
                active,
                excluded_ptr + query * num_excluded,
                num_excluded,
                SEARCH_STEPS,
            )
        counts = popcount_words(words).to(tl.int32)
        total = tl.sum(counts)
        position += query * list_length * NUM_WORDS
        tl.store(words_ptr + position, words, mask=inside)
        tl.store(prefixes_ptr + position, tl.cumsum(counts, 0) - counts, mask=inside)
        tl.atomic_add(probed_ptr + query, tl.sum(popcount_words(live)))
        tl.atomic_add(eligible_ptr + query, total.to(tl.int64))
    tl.store(block_counts_ptr + query * tl.num_programs(0) + tl.program_id(0), total)


def list_pages(
    clusters: Tensor,
    page_table: Tensor,
    planes: Tensor,
    columns: Tensor,
    terms: Tensor,
    programs: Tensor,
    excluded: Tensor,
) -> PageLists:
    """List the pages of the probed clusters and filter them; operands as of ``ivf_scan``."""
    num_queries, num_probes = clusters.shape
    num_clusters, width = page_table.shape
    num_planes, num_pages, num_words = planes.shape
    device = planes.device
    clusters = clusters.sort(dim=1).values.contiguous()
    page_table = page_table.contiguous()
    by_probe = num_queries * num_probes < num_clusters
    list_length = min(num_probes * width, num_pages)
    block = min(1024, triton.next_power_of_2(width))
    sizes = torch.empty(
        num_queries * num_probes if by_probe else num_clusters, dtype=torch.int32, device=device
    )
    _page_counts_kernel[sizes.shape[0],](
        sizes,
        clusters,
        page_table,
        num_clusters,
        width,
        BY_PROBE=by_probe,
        BLOCK=block,
        enable_fp_fusion=False,
    )
    bases = torch.empty_like(clusters)
    pages = torch.empty((num_queries, list_length), dtype=torch.int32, device=device)
    counts = torch.empty(num_queries, dtype=torch.int32, device=device)
    _list_pages_kernel[num_probes, num_queries](
        pages,
        counts,
        bases,
        sizes,
        clusters,
        page_table,
        num_clusters,
        width,
        num_probes,
        list_length,
        BY_PROBE=by_probe,
        BLOCK=block,
        BLOCK_PROBES=min(_BLOCK_PROBES, triton.next_power_of_2(num_probes)),
        enable_fp_fusion=False,
    )
    num_positions = list_length * num_words
    words = torch.empty((num_queries, num_positions), dtype=torch.int64, device=device)
    prefixes = torch.empty((num_queries, num_positions), dtype=torch.int32, device=device)
    num_blocks = triton.cdiv(num_positions, BLOCK_WORDS)
    block_counts = torch.empty((num_queries, num_blocks), dtype=torch.int32, device=device)
    probed = torch.zeros(num_queries, dtype=torch.int64, device=device)
    eligible = torch.zeros_like(probed)
    num_excluded = excluded.shape[1]
    _filter_lists_kernel[num_blocks, num_queries](
        words,
        prefixes,
        block_counts,
        probed,
        eligible,
        planes,
        columns,
        terms,
        programs.contiguous(),
        pages,
        counts,
        sorted_exclusions(excluded),
        programs.shape[1],
        list_length,
        num_excluded,
        num_pages,
        num_planes,
        columns.shape[0],
        terms.shape[2],
        NUM_WORDS=num_words,
        DEEP=deep_levels(programs.shape[1]),
        SEARCH_STEPS=num_excluded.bit_length(),
        BLOCK=BLOCK_WORDS,
        enable_fp_fusion=False,
    )
    return PageLists(
        clusters, bases, pages, counts, words, prefixes, block_counts, probed, eligible
    )

"""The probe-then-filter scan on CUDA.

The pages of a query are listed and filtered (``page_lists_triton``), and a sample of the slots sets
a cut that more than R of them are all but sure to pass (``sampled_cuts_triton``). One program then
scans a block of words of one query: it scores the eligible slots, verifies what passes the cut and
appends it to the list of the query. A list that came out too short or too long is made again,
exactly, by one program; the lists are sorted. Large batches first clear the bits of slots that
cannot pass with tensor cores, cluster by cluster (``cluster_scan_triton``), so that the scan meets
few slots.

Every size follows from shapes, nothing waits for the device.

Shapes: Q query rows, P probes, M pages a list can hold, W words per page, G = 64 W slots per page,
D embedding dimension, R results, A candidates that a list can hold.

Source: SilverTorch, arXiv 2511.14881, SIGIR 2026, section 4.3 (probe, then filter).
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from typing import Any

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

from silvershard.kernels.cluster_scan_triton import shares_enough, surviving_words
from silvershard.kernels.device_guard import on_device_of_operands
from silvershard.kernels.filter_ops_triton import popcount_words
from silvershard.kernels.page_lists_triton import list_pages
from silvershard.kernels.ranking_triton import append, list_capacity, new_lists, ranked_lists
from silvershard.kernels.row_scores_triton import (
    USE_ASSEMBLY,
    candidate_keys,
    nth_set_bit,
    row_tile,
)
from silvershard.kernels.sampled_cuts_triton import set_cuts

SAMPLES = 4096
# Queries up to which programs are kept short, because there are too few of them for the device.
_FEW_QUERIES = 4
_LOWEST = tl.constexpr(-(1 << 63))
_HIGHEST = tl.constexpr((1 << 63) - 1)


@triton.jit
def _scan_kernel(
    head_ptr,
    tail_ptr,
    counts_ptr,
    cuts_ptr,
    words_ptr,
    pages_ptr,
    num_pages_ptr,
    query_codes_ptr,
    query_scales_ptr,
    codes_ptr,
    scales_ptr,
    ids_ptr,
    verify_ptr,
    planes_ptr,
    columns_ptr,
    terms_ptr,
    capacity,
    list_length,
    verify_length,
    num_slots,
    num_planes,
    num_columns,
    num_terms,
    NUM_WORDS: tl.constexpr,
    DIM: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    WORDS: tl.constexpr,
    VERIFY: tl.constexpr,
    ASSEMBLY: tl.constexpr,
):
    query = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0) * WORDS
    num_filled = tl.load(num_pages_ptr + query) * NUM_WORDS
    if first < num_filled:
        words_ptr += query * list_length * NUM_WORDS
        pages_ptr += query * list_length
        place = first + tl.arange(0, WORDS)
        words = tl.load(words_ptr + place, mask=place < num_filled, other=0)
        inclusive = tl.cumsum(popcount_words(words).to(tl.int32), 0)
        total = tl.max(inclusive)
        # Where most slots count they are taken in turn, so that the rows of a page are read as one
        # run; elsewhere each lane looks for its slot, so that no lane is idle.
        dense = total * 4 >= 3 * 64 * WORDS
        span = tl.where(dense, 64 * WORDS, total)
        cut_head = tl.load(cuts_ptr + 2 * query)
        cut_tail = tl.load(cuts_ptr + 2 * query + 1)
        query_scale = tl.load(query_scales_ptr + query)
        for start in range(0, span, ROWS):
            lane = start + tl.arange(0, ROWS)
            active = lane < span
            if dense:
                position = first + lane // 64
                bit = lane % 64
                active &= position < num_filled
                mine = tl.load(words_ptr + position, mask=active, other=0)
                active &= ((mine >> bit) & 1) != 0
            else:
                # How many words end at or before the lane's number, by bisection.
                passed = tl.zeros([ROWS], tl.int32)
                for step in tl.static_range(WORDS.bit_length() - 1):
                    trial = passed + ((WORDS >> (step + 1)) - 1)
                    ends_before = tl.gather(inclusive, trial, 0) <= lane
                    passed = tl.where(ends_before, trial + 1, passed)
                behind = tl.gather(inclusive, tl.maximum(passed - 1, 0), 0)
                behind = tl.where(passed > 0, behind, 0)
                position = first + passed
                mine = tl.load(words_ptr + position, mask=active, other=0)
                bit = nth_set_bit(mine, lane - behind)
            page = tl.load(pages_ptr + position // NUM_WORDS, mask=active, other=0)
            slots = (page.to(tl.int64) * NUM_WORDS + position % NUM_WORDS) * 64 + bit
            head, tail, hits = candidate_keys(
                codes_ptr,
                scales_ptr,
                ids_ptr,
                query_codes_ptr + query * DIM,
                query_scale,
                verify_ptr + query * verify_length * 4,
                verify_length,
                planes_ptr,
                columns_ptr,
                terms_ptr,
                slots,
                active,
                cut_head,
                cut_tail,
                num_slots,
                num_planes,
                num_columns,
                num_terms,
                DIM,
                CHUNK,
                ROWS,
                VERIFY,
                ASSEMBLY,
            )
            append(
                head_ptr + query * capacity,
                tail_ptr + query * capacity,
                counts_ptr + query,
                head,
                tail,
                hits,
                capacity,
            )


@triton.jit
def _rescan_kernel(
    head_ptr,
    tail_ptr,
    counts_ptr,
    cuts_ptr,
    words_ptr,
    pages_ptr,
    num_pages_ptr,
    query_codes_ptr,
    query_scales_ptr,
    codes_ptr,
    scales_ptr,
    ids_ptr,
    verify_ptr,
    planes_ptr,
    columns_ptr,
    terms_ptr,
    capacity,
    num_results,
    list_length,
    verify_length,
    num_slots,
    num_planes,
    num_columns,
    num_terms,
    NUM_WORDS: tl.constexpr,
    DIM: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    VERIFY: tl.constexpr,
    ASSEMBLY: tl.constexpr,
):
    """Exactly cut a query whose sampled cut let too few or too many slots pass.

    Sixteen passes find the cut, eight bits at a time: first its head, then its tail; one collects.
    """
    query = tl.program_id(0).to(tl.int64)
    count = tl.load(counts_ptr + query)
    sampled = tl.load(cuts_ptr + 2 * query) != _HIGHEST
    if (count > capacity) | ((count < num_results) & sampled):
        words_ptr += query * list_length * NUM_WORDS
        pages_ptr += query * list_length
        span = tl.load(num_pages_ptr + query) * NUM_WORDS * 64
        query_scale = tl.load(query_scales_ptr + query)
        cut_head = tl.full([], 0, tl.int64)
        cut_tail = tl.full([], 0, tl.int64)
        rank = tl.full([], 0, tl.int32) + num_results
        kept = tl.full([], 0, tl.int32)
        for turn in range(17):
            shift = tl.full([], 56, tl.int64) - 8 * (turn % 8)
            above = (tl.full([], -1, tl.int64) << shift) << 8
            tally = tl.zeros([256], tl.int32)
            for start in range(0, span, ROWS):
                lane = start + tl.arange(0, ROWS)
                position = lane // 64
                active = lane < span
                mine = tl.load(words_ptr + position, mask=active, other=0)
                active &= ((mine >> (lane % 64)) & 1) != 0
                page = tl.load(pages_ptr + position // NUM_WORDS, mask=active, other=0)
                slots = (page.to(tl.int64) * NUM_WORDS + position % NUM_WORDS) * 64 + lane % 64
                head, tail, hits = candidate_keys(
                    codes_ptr,
                    scales_ptr,
                    ids_ptr,
                    query_codes_ptr + query * DIM,
                    query_scale,
                    verify_ptr + query * verify_length * 4,
                    verify_length,
                    planes_ptr,
                    columns_ptr,
                    terms_ptr,
                    slots,
                    active,
                    _HIGHEST,
                    _HIGHEST,
                    num_slots,
                    num_planes,
                    num_columns,
                    num_terms,
                    DIM,
                    CHUNK,
                    ROWS,
                    VERIFY,
                    ASSEMBLY,
                )
                # With the sign bit turned, the bits of the head sort as an unsigned number.
                unsigned = head ^ _LOWEST
                if turn < 16:
                    value = tl.where(turn < 8, unsigned, tail)
                    fixed = tl.where(turn < 8, cut_head, cut_tail)
                    alike = hits & (((value ^ fixed) & above) == 0)
                    alike &= (unsigned == cut_head) | (tl.zeros_like(lane) + turn < 8)
                    tally += tl.histogram(((value >> shift) & 255).to(tl.int32), 256, mask=alike)
                else:
                    tied = (unsigned == cut_head) & (tail <= cut_tail)
                    hits &= (head < (cut_head ^ _LOWEST)) | tied
                    place = query * capacity + kept + tl.cumsum(hits.to(tl.int32), 0) - 1
                    tl.store(head_ptr + place, head, mask=hits)
                    tl.store(tail_ptr + place, tail, mask=hits)
                    kept += tl.sum(hits.to(tl.int32))
            if turn < 16:
                upto = tl.cumsum(tally, 0)
                digit = tl.minimum(tl.sum((upto < rank).to(tl.int32)), 255).to(tl.int64)
                rank -= tl.max(tl.where(upto < rank, upto, 0))
                if turn < 8:
                    cut_head |= digit << shift
                else:
                    cut_tail |= digit << shift
        tl.store(counts_ptr + query, kept)


@on_device_of_operands
def ivf_scan_triton(
    query_codes: Tensor,
    query_scales: Tensor,
    clusters: Tensor,
    page_table: Tensor,
    codes: Tensor,
    scales: Tensor,
    item_ids: Tensor,
    planes: Tensor,
    columns: Tensor,
    terms: Tensor,
    programs: Tensor,
    verify: Tensor,
    excluded: Tensor,
    num_results: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The CUDA implementation of ``ivf_scan``; same contract, no validation."""
    num_queries, dim = query_codes.shape
    num_pages, page_size = scales.shape
    population = min(clusters.shape[1] * page_table.shape[1], num_pages) * page_size
    if num_queries * page_table.shape[0] * population == 0:
        shape = (num_queries, num_results)
        slots = item_ids.new_full(shape, -1)
        nothing = item_ids.new_zeros(num_queries)
        best = scales.new_full(shape, -torch.inf)
        return best, slots, slots.clone(), nothing, nothing.clone()
    query_codes, query_scales = query_codes.contiguous(), query_scales.contiguous()
    verify = verify.contiguous()
    lists = list_pages(clusters, page_table, planes, columns, terms, programs, excluded)
    capacity = list_capacity(num_results, SAMPLES, population)
    sampled = capacity < population
    cuts = torch.full((num_queries, 2), (1 << 63) - 1, dtype=torch.int64, device=codes.device)
    pool = (codes, scales, item_ids, verify, planes, columns, terms)
    limits = (
        lists.pages.shape[1],
        verify.shape[1],
        num_pages * page_size,
        planes.shape[0],
        columns.shape[0],
        terms.shape[2],
    )
    chunk, rows = row_tile(dim)
    options: dict[str, Any] = {
        "NUM_WORDS": page_size // 64,
        "DIM": dim,
        "CHUNK": chunk,
        "ROWS": rows,
        "VERIFY": verify.shape[1] > 0,
        "ASSEMBLY": USE_ASSEMBLY,
        "enable_fp_fusion": False,
    }
    queries = (query_codes, query_scales)
    if sampled:
        set_cuts(cuts, lists, queries, pool, limits, options, SAMPLES, capacity, num_results)
    words, words_per_program = lists.words, 4 if num_queries <= _FEW_QUERIES else 16
    tile = options
    if sampled and shares_enough(num_queries, clusters.shape[1], page_table.shape[0], dim):
        words = surviving_words(lists, cuts, *queries, codes, scales, page_table.shape[0])
        # Few bits are left: more words per program, and fewer lanes for them.
        words_per_program, tile = 128, options | {"ROWS": min(rows, 128)}
    heads, tails = new_lists(num_queries, capacity, codes.device)
    counts = torch.zeros(num_queries, dtype=torch.int32, device=codes.device)
    _scan_kernel[triton.cdiv(words.shape[1], words_per_program), num_queries](
        heads,
        tails,
        counts,
        cuts,
        words,
        lists.pages,
        lists.num_pages,
        *queries,
        *pool,
        capacity,
        *limits,
        WORDS=words_per_program,
        **tile,
    )
    if sampled:
        _rescan_kernel[num_queries,](
            heads,
            tails,
            counts,
            cuts,
            lists.words,
            lists.pages,
            lists.num_pages,
            *queries,
            *pool,
            capacity,
            num_results,
            *limits,
            **options,
        )
    best, ids, slots = ranked_lists(heads, tails, counts, num_results)
    return best, ids, slots, lists.probed, lists.eligible

"""Cuts of lists too long to keep, from samples of their scored slots, on CUDA.

One program scores a few hundred of the eligible slots of a query, evenly spaced in its list and
verified; it finds the n-th eligible slot by binary search in the counts that the filter kept. One
program per query then sets a cut that more than R slots are all but sure to pass.

Shapes: Q query rows, M pages a list can hold, W words per page, D embedding dimension, S samples
per query, A candidates that a list can hold.

Source: Zhang et al., Dr. Top-k, SC 2021 (work cut by a threshold known beforehand).
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from typing import Any

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

from silvershard.kernels.page_lists_triton import BLOCK_WORDS, PageLists
from silvershard.kernels.ranking_triton import cut_at
from silvershard.kernels.row_scores_triton import candidate_keys, nth_set_bit

_HIGHEST = tl.constexpr((1 << 63) - 1)


@triton.jit
def _sample_kernel(
    sample_heads_ptr,
    sample_tails_ptr,
    eligible_ptr,
    ends_ptr,
    words_ptr,
    prefixes_ptr,
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
    num_samples,
    capacity,
    num_blocks,
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
    BLOCK: tl.constexpr,
    SEARCH_STEPS: tl.constexpr,
    VERIFY: tl.constexpr,
    ASSEMBLY: tl.constexpr,
):
    query = tl.program_id(1).to(tl.int64)
    sample = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    eligible = tl.load(eligible_ptr + query)
    taken = tl.minimum(eligible, num_samples)
    if eligible > capacity:
        active = sample < taken
        first = sample * eligible // taken
        width = tl.maximum((sample + 1) * eligible // taken - first, 1)
        mixed = ((sample + query * num_samples) * 0x9E3779B1) & 0xFFFFFFFF
        mixed = (mixed ^ (mixed >> 15)) * 0x2C1B3C6D & 0x7FFFFFFF
        number = first + (mixed >> 5) % width  # of the eligible slots in the list
        # The block: the first whose end lies above the number.
        low = tl.zeros([ROWS], tl.int32)
        high = low + (num_blocks - 1)
        for _ in range(SEARCH_STEPS):
            middle = (low + high) >> 1
            above = tl.load(ends_ptr + query * num_blocks + middle, mask=active, other=0) > number
            high = tl.where(above, middle, high)
            low = tl.where(above, low, tl.minimum(middle + 1, high))
        before = tl.load(ends_ptr + query * num_blocks + low - 1, mask=active & (low > 0), other=0)
        number = number.to(tl.int32) - before
        # The word: the last one that no more than this number of slots precede.
        start = low * BLOCK
        position = tl.zeros([ROWS], tl.int32)
        list_words = list_length * NUM_WORDS
        num_filled = tl.load(num_pages_ptr + query) * NUM_WORDS
        step = tl.full([], BLOCK // 2, tl.int32)
        while step > 0:
            trial = start + position + step
            inside = active & (trial < num_filled)
            behind = tl.load(
                prefixes_ptr + query * list_words + trial, mask=inside, other=2147483647
            )
            position = tl.where(behind <= number, position + step, position)
            step = step // 2
        position = (start + position).to(tl.int64)
        behind = tl.load(prefixes_ptr + query * list_words + position, mask=active, other=0)
        words = tl.load(words_ptr + query * list_words + position, mask=active, other=0)
        page = tl.load(
            pages_ptr + query * list_length + position // NUM_WORDS, mask=active, other=0
        )
        bit = nth_set_bit(words, number - behind)
        slots = (page.to(tl.int64) * NUM_WORDS + position % NUM_WORDS) * 64 + bit
        head, tail, hits = candidate_keys(
            codes_ptr,
            scales_ptr,
            ids_ptr,
            query_codes_ptr + query * DIM,
            tl.load(query_scales_ptr + query),
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
        place = query * num_samples + sample
        within = sample < num_samples
        tl.store(sample_heads_ptr + place, tl.where(hits, head, _HIGHEST), mask=within)
        tl.store(sample_tails_ptr + place, tl.where(hits, tail, _HIGHEST), mask=within)


@triton.jit
def _cut_kernel(
    cuts_ptr,
    sample_heads_ptr,
    sample_tails_ptr,
    eligible_ptr,
    capacity,
    num_results,
    S: tl.constexpr,
):
    query = tl.program_id(0).to(tl.int64)
    eligible = tl.load(eligible_ptr + query)
    cut_head = tl.full([], _HIGHEST, tl.int64)
    cut_tail = tl.full([], _HIGHEST, tl.int64)
    if eligible > capacity:
        taken = tl.minimum(eligible, S)
        expected = 1.0 * num_results * taken.to(tl.float32) / eligible.to(tl.float32)
        rank = (expected + 4.0 * tl.sqrt(expected) + 5.0).to(tl.int32)
        if rank < taken:
            sample = tl.arange(0, S)
            head = tl.load(sample_heads_ptr + query * S + sample)
            tail = tl.load(sample_tails_ptr + query * S + sample)
            cut_head, cut_tail = cut_at(head, tail, rank)
    tl.store(cuts_ptr + 2 * query, cut_head)
    tl.store(cuts_ptr + 2 * query + 1, cut_tail)


def set_cuts(
    cuts: Tensor,
    lists: PageLists,
    queries: tuple[Tensor, Tensor],
    pool: tuple[Tensor, ...],
    limits: tuple[int, ...],
    options: dict[str, Any],
    num_samples: int,
    capacity: int,
    num_results: int,
) -> None:
    """Set the cut of every query that has more eligible slots than its list can hold.

    Args:
        cuts: ``(Q, 2)`` int64: head and tail, the highest numbers where there is no cut.
        lists: the probed pages and eligible slots.
        queries: codes ``(Q, D)`` int8 and scales ``(Q,)`` float32, contiguous.
        pool: codes, scales, item ids, verify programs, planes, columns and terms.
        limits: list length, verify length, slots, planes, columns and terms per item.
        options: constants of the kernels and launch options.
        num_samples: S, a power of two.
        capacity: A.
        num_results: R.
    """
    num_queries, num_blocks = lists.block_counts.shape
    samples = torch.empty((2, num_queries, num_samples), dtype=torch.int64, device=cuts.device)
    ends = lists.block_counts.cumsum(dim=1, dtype=torch.int32)
    _sample_kernel[triton.cdiv(num_samples, options["ROWS"]), num_queries](
        samples[0],
        samples[1],
        lists.eligible,
        ends,
        lists.words,
        lists.prefixes,
        lists.pages,
        lists.num_pages,
        *queries,
        *pool,
        num_samples,
        capacity,
        num_blocks,
        *limits,
        BLOCK=BLOCK_WORDS,
        SEARCH_STEPS=num_blocks.bit_length(),
        **options,
    )
    _cut_kernel[num_queries,](
        cuts,
        samples[0],
        samples[1],
        lists.eligible,
        capacity,
        num_results,
        S=num_samples,
        num_warps=8,
        enable_fp_fusion=False,
    )

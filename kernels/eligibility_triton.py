"""Eligibility on CUDA: one program decides a block of words, 64 slots each, of one query.

A lane holds one word. The program runs the filter of its query on its lanes, takes the live plane
and clears excluded slots, which it finds by binary search in the sorted exclusions of the query.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

from silvershard.kernels.device_guard import on_device_of_operands
from silvershard.kernels.filter_ops_triton import deep_levels, popcount_words, truth_words

BLOCK_WORDS = 128


@triton.jit
def clear_excluded(
    words, first_slot, active, excluded_ptr, num_excluded, SEARCH_STEPS: tl.constexpr
):
    """Clear the bits of ascending excluded slots in words that begin at ``first_slot``."""
    low = tl.zeros_like(first_slot)
    high = low + num_excluded
    for _ in range(SEARCH_STEPS):
        middle = (low + high) >> 1
        searching = active & (low < high)
        before = tl.load(excluded_ptr + middle, mask=searching, other=0) < first_slot
        low = tl.where(searching & before, middle + 1, low)
        high = tl.where(searching & (before == 0), middle, high)
    inside = active & (low < num_excluded)
    slot = tl.load(excluded_ptr + low, mask=inside, other=0)
    inside &= slot < first_slot + 64
    while tl.max(inside.to(tl.int32)) > 0:
        bit = tl.full([1], 1, tl.int64) << tl.where(inside, slot - first_slot, 0)
        words = tl.where(inside, words & ~bit, words)
        low += 1
        inside &= low < num_excluded
        slot = tl.load(excluded_ptr + low, mask=inside, other=0)
        inside &= slot < first_slot + 64
    return words


@triton.jit
def _eligibility_kernel(
    words_ptr,
    planes_ptr,
    columns_ptr,
    terms_ptr,
    programs_ptr,
    pages_ptr,
    excluded_ptr,
    length,
    num_positions,
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
    inside = position < num_positions
    pages_ptr += query * (num_positions // NUM_WORDS)
    page = tl.load(pages_ptr + position // NUM_WORDS, mask=inside, other=-1).to(tl.int64)
    word = position % NUM_WORDS
    active = inside & (page >= 0) & (page < num_pages)
    page = tl.where(active, page, 0)
    words = tl.load(planes_ptr + page * NUM_WORDS + word, mask=active, other=0)
    words &= truth_words(
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
    tl.store(words_ptr + query * num_positions + position, words, mask=inside)


@triton.jit
def _count_eligible_kernel(
    counts_ptr,
    planes_ptr,
    columns_ptr,
    terms_ptr,
    programs_ptr,
    length,
    num_pages,
    num_planes,
    num_columns,
    num_terms,
    NUM_WORDS: tl.constexpr,
    DEEP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    query = tl.program_id(1).to(tl.int64)
    position = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # of N W words
    active = position // NUM_WORDS < num_pages
    words = tl.load(planes_ptr + position, mask=active, other=0)
    words &= truth_words(
        programs_ptr + query * length * 4,
        length,
        planes_ptr,
        columns_ptr,
        terms_ptr,
        position // NUM_WORDS,
        position % NUM_WORDS,
        active,
        num_pages,
        num_planes,
        num_columns,
        num_terms,
        NUM_WORDS,
        DEEP,
        BLOCK,
    )
    tl.atomic_add(counts_ptr + query, tl.sum(popcount_words(words)))


@on_device_of_operands
def eligibility_triton(
    planes: Tensor,
    columns: Tensor,
    terms: Tensor,
    programs: Tensor,
    pages: Tensor,
    excluded: Tensor,
) -> Tensor:
    """The CUDA implementation of ``eligibility``; same contract, no validation."""
    num_queries, num_slots = pages.shape
    num_planes, num_pages, num_words = planes.shape
    words = planes.new_empty((num_queries, num_slots, num_words))
    num_positions = num_slots * num_words
    if words.numel() == 0:
        return words
    num_excluded = excluded.shape[1]
    _eligibility_kernel[triton.cdiv(num_positions, BLOCK_WORDS), num_queries](
        words,
        planes,
        columns,
        terms,
        programs.contiguous(),
        pages.contiguous(),
        sorted_exclusions(excluded),
        programs.shape[1],
        num_positions,
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
    return words


def sorted_exclusions(excluded: Tensor) -> Tensor:
    """The exclusions of every query in ascending order, contiguous."""
    return (
        excluded.sort(dim=1).values.contiguous() if excluded.shape[1] > 1 else excluded.contiguous()
    )


@on_device_of_operands
def count_eligible_triton(
    planes: Tensor, columns: Tensor, terms: Tensor, programs: Tensor
) -> Tensor:
    """The CUDA implementation of ``count_eligible``; same contract, no validation."""
    num_queries, length = programs.shape[:2]
    num_planes, num_pages, num_words = planes.shape
    counts = torch.zeros(num_queries, dtype=torch.int64, device=planes.device)
    if num_queries * num_pages == 0:
        return counts
    _count_eligible_kernel[triton.cdiv(num_pages * num_words, BLOCK_WORDS), num_queries](
        counts,
        planes,
        columns,
        terms,
        programs.contiguous(),
        length,
        num_pages,
        num_planes,
        columns.shape[0],
        terms.shape[2],
        NUM_WORDS=num_words,
        DEEP=deep_levels(length),
        BLOCK=BLOCK_WORDS,
        enable_fp_fusion=False,
    )
    return counts

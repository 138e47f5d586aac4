"""Exact large-k selection on CUDA.

Short rows: one program holds a row in registers, finds the exact cut by bisection, compacts what
passes and sorts it. Long rows: one program per row draws a sample and sets a cut that more than k
candidates are all but sure to pass; blocks of the row append what passes to a list; a row whose
list is too short or too long is cut again exactly by one program (no other row pays for it); the
lists are sorted.

Shapes: Q query rows, M candidates per row, k results, A candidates that a list can hold.

Source: Li et al., RadiK, ICS 2024 (threshold, compact, finish on the survivors).
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

import math

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

from silvershard.kernels.device_guard import on_device_of_operands
from silvershard.kernels.ranking_triton import (
    append,
    cut_at,
    emit,
    list_capacity,
    new_lists,
    rank_keys,
    ranked_lists,
    sample_rank,
    sort_tile,
)

# Candidates of a row that one program holds in registers.
SHORT_ROW = 8192
SAMPLES = 4096
BLOCK = 1024
_LOWEST = tl.constexpr(-(1 << 63))
_HIGHEST = tl.constexpr((1 << 63) - 1)


@triton.jit
def _load_keys(scores_ptr, ids_ptr, position, inside):
    """Keys of candidates of one row; padding and places outside have the worst key."""
    scores = tl.load(scores_ptr + position, mask=inside, other=float("-inf"))
    item_ids = tl.load(ids_ptr + position, mask=inside, other=-1)
    valid = inside & (item_ids >= 0) & (scores > float("-inf"))
    head, tail = rank_keys(scores, item_ids, position.to(tl.int64))
    return tl.where(valid, head, _HIGHEST), tl.where(valid, tail, _HIGHEST), valid


@triton.jit
def _select_row_kernel(
    out_scores_ptr,
    out_ids_ptr,
    out_positions_ptr,
    head_ptr,
    tail_ptr,
    scores_ptr,
    ids_ptr,
    scores_stride,
    ids_stride,
    num_candidates,
    num_results,
    other_offset,
    M: tl.constexpr,
    TILE: tl.constexpr,
    ROUNDS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    position = tl.arange(0, M)
    head, tail, valid = _load_keys(
        scores_ptr + row * scores_stride,
        ids_ptr + row * ids_stride,
        position,
        position < num_candidates,
    )
    num_valid = tl.sum(valid.to(tl.int32))
    kept = tl.minimum(num_results, num_valid)
    if kept < num_valid:
        cut_head, cut_tail = cut_at(head, tail, kept)
        valid &= (head < cut_head) | ((head == cut_head) & (tail <= cut_tail))
    head_ptr += row * TILE
    tail_ptr += row * TILE
    place = tl.cumsum(valid.to(tl.int32), 0) - 1
    tl.store(head_ptr + place, head, mask=valid)
    tl.store(tail_ptr + place, tail, mask=valid)
    tl.debug_barrier()
    sort_tile(head_ptr, tail_ptr, other_offset, kept, TILE, ROUNDS)
    head_ptr += (ROUNDS & 1) * other_offset
    tail_ptr += (ROUNDS & 1) * other_offset
    for start in range(0, num_results, TILE):
        rank = start + tl.arange(0, TILE)
        found = rank < kept
        emit(
            out_scores_ptr,
            out_ids_ptr,
            out_positions_ptr,
            tl.load(head_ptr + rank, mask=found, other=0),
            tl.load(tail_ptr + rank, mask=found, other=0),
            row * num_results + rank,
            rank < num_results,
            found,
        )


@triton.jit
def _sample_cut_kernel(
    cuts_ptr,
    scores_ptr,
    ids_ptr,
    scores_stride,
    ids_stride,
    num_candidates,
    rank,
    S: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    sample = tl.arange(0, S).to(tl.int64)
    # One candidate out of each of S equal parts, at a hashed place, so that no pattern of the data
    # meets a pattern of the sample.
    first = sample * num_candidates // S
    width = (sample + 1) * num_candidates // S - first
    mixed = ((sample + row * S) * 0x9E3779B1) & 0xFFFFFFFF
    mixed = (mixed ^ (mixed >> 15)) * 0x2C1B3C6D & 0x7FFFFFFF
    position = first + (mixed >> 5) % tl.maximum(width, 1)
    head, tail, _ = _load_keys(
        scores_ptr + row * scores_stride,
        ids_ptr + row * ids_stride,
        position,
        position < num_candidates,
    )
    cut_head, cut_tail = cut_at(head, tail, rank)
    tl.store(cuts_ptr + 2 * row, cut_head)
    tl.store(cuts_ptr + 2 * row + 1, cut_tail)


@triton.jit
def _compact_kernel(
    head_ptr,
    tail_ptr,
    counts_ptr,
    valid_ptr,
    cuts_ptr,
    scores_ptr,
    ids_ptr,
    scores_stride,
    ids_stride,
    num_candidates,
    capacity,
    SAMPLED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(1).to(tl.int64)
    position = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    head, tail, hits = _load_keys(
        scores_ptr + row * scores_stride,
        ids_ptr + row * ids_stride,
        position,
        position < num_candidates,
    )
    if SAMPLED:
        tl.atomic_add(valid_ptr + row, tl.sum(hits.to(tl.int32)))
        cut_head = tl.load(cuts_ptr + 2 * row)
        cut_tail = tl.load(cuts_ptr + 2 * row + 1)
        hits &= (head < cut_head) | ((head == cut_head) & (tail <= cut_tail))
    append(
        head_ptr + row * capacity,
        tail_ptr + row * capacity,
        counts_ptr + row,
        head,
        tail,
        hits,
        capacity,
    )


@triton.jit
def _recut_kernel(
    head_ptr,
    tail_ptr,
    counts_ptr,
    valid_ptr,
    scores_ptr,
    ids_ptr,
    scores_stride,
    ids_stride,
    num_candidates,
    capacity,
    num_results,
    BLOCK: tl.constexpr,
):
    """Exactly cut a row whose sampled cut let too few or too many candidates pass."""
    row = tl.program_id(0).to(tl.int64)
    count = tl.load(counts_ptr + row)
    num_valid = tl.load(valid_ptr + row)
    if (count > capacity) | ((count < num_results) & (count < num_valid)):
        scores_ptr += row * scores_stride
        ids_ptr += row * ids_stride
        rank = tl.minimum(num_results, num_valid)
        cut_head = tl.full([], _HIGHEST, tl.int64)
        cut_tail = tl.full([], _HIGHEST, tl.int64)
        # The head of the cut first, then its tail among the candidates with that head.
        for half in range(2):
            low = tl.where(half == 0, _LOWEST, 0).to(tl.int64)
            high = tl.full([], _HIGHEST, tl.int64)
            while low < high:
                middle = (low & high) + ((low ^ high) >> 1)
                passing = tl.full([], 0, tl.int32)
                for start in range(0, num_candidates, BLOCK):
                    position = start + tl.arange(0, BLOCK)
                    head, tail, valid = _load_keys(
                        scores_ptr, ids_ptr, position, position < num_candidates
                    )
                    tied = (head == cut_head) & (tail <= middle)
                    within = tl.where(half == 0, head <= middle, (head < cut_head) | tied)
                    passing += tl.sum((valid & within).to(tl.int32))
                enough = passing >= rank
                high = tl.where(enough, middle, high)
                low = tl.where(enough, low, middle + 1)
            cut_head = tl.where(half == 0, low, cut_head)
            cut_tail = low
        kept = tl.full([], 0, tl.int32)
        for start in range(0, num_candidates, BLOCK):
            position = start + tl.arange(0, BLOCK)
            head, tail, valid = _load_keys(scores_ptr, ids_ptr, position, position < num_candidates)
            hits = valid & ((head < cut_head) | ((head == cut_head) & (tail <= cut_tail)))
            place = row * capacity + kept + tl.cumsum(hits.to(tl.int32), 0) - 1
            tl.store(head_ptr + place, head, mask=hits)
            tl.store(tail_ptr + place, tail, mask=hits)
            kept += tl.sum(hits.to(tl.int32))
        tl.store(counts_ptr + row, kept)


@on_device_of_operands
def select_topk_triton(scores: Tensor, item_ids: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The CUDA implementation of ``select_topk``; same contract, no validation."""
    num_rows, num_candidates = scores.shape
    if num_rows * num_candidates == 0:
        shape = (num_rows, k)
        nothing = item_ids.new_full(shape, -1)
        return scores.new_full(shape, -torch.inf), nothing, nothing.clone()
    scores = scores if scores.stride(1) == 1 else scores.contiguous()
    item_ids = item_ids if item_ids.stride(1) == 1 else item_ids.contiguous()
    if num_candidates <= SHORT_ROW:
        return _select_short_rows(scores, item_ids, k)
    capacity = list_capacity(k, SAMPLES, num_candidates)
    heads, tails = new_lists(num_rows, capacity, scores.device)
    # Rows: candidates in the list, valid candidates.
    counts = torch.zeros((2, num_rows), dtype=torch.int32, device=scores.device)
    cuts = torch.empty((num_rows, 2), dtype=torch.int64, device=scores.device)
    source = (scores, item_ids, scores.stride(0), item_ids.stride(0), num_candidates)
    sampled = capacity < num_candidates
    if sampled:
        rank = min(SAMPLES, math.ceil(sample_rank(k, SAMPLES, num_candidates)))
        _sample_cut_kernel[num_rows,](
            cuts, *source, rank, S=SAMPLES, num_warps=8, enable_fp_fusion=False
        )
    _compact_kernel[triton.cdiv(num_candidates, BLOCK), num_rows](
        heads,
        tails,
        counts[0],
        counts[1],
        cuts,
        *source,
        capacity,
        SAMPLED=sampled,
        BLOCK=BLOCK,
        enable_fp_fusion=False,
    )
    if sampled:
        _recut_kernel[num_rows,](
            heads,
            tails,
            counts[0],
            counts[1],
            *source,
            capacity,
            k,
            BLOCK=BLOCK,
            num_warps=8,
            enable_fp_fusion=False,
        )
    return ranked_lists(heads, tails, counts[0], k)


def _select_short_rows(scores: Tensor, item_ids: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    num_rows, num_candidates = scores.shape
    width = max(16, triton.next_power_of_2(num_candidates))
    tile = triton.next_power_of_2(min(k, num_candidates))
    heads, tails = new_lists(num_rows, tile, scores.device)
    shape = (num_rows, k)
    best = torch.empty(shape, dtype=torch.float32, device=scores.device)
    best_ids = torch.empty(shape, dtype=torch.int64, device=scores.device)
    positions = torch.empty_like(best_ids)
    _select_row_kernel[num_rows,](
        best,
        best_ids,
        positions,
        heads,
        tails,
        scores,
        item_ids,
        scores.stride(0),
        item_ids.stride(0),
        num_candidates,
        k,
        num_rows * tile,
        M=width,
        TILE=tile,
        ROUNDS=tile.bit_length() - 1,
        num_warps=max(1, min(16, width // 256)),
        enable_fp_fusion=False,
    )
    return best, best_ids, positions

"""Exact ranking on CUDA: 126-bit rank keys, sampled cuts and a merge sort of short lists.

A candidate is two int64, ``head`` and ``tail``, whose lexicographic order is the ranking: score
descending, then item id, then position, both ascending. The keys of a row are distinct, so a cut
between two of them is exact whatever scores tie, and the order of arrival does not matter.

    head = 32 bits inverted score | upper 32 bits of the id
    tail = lower 31 bits of the id | 32 bits of the position

A list of candidates is sorted by merging runs: an element finds by binary search how many elements
of the sibling run precede it. Source: Cole, Parallel merge sort, SIAM J. Comput. 1988 (ranking).

Shapes: Q rows, A candidates that a list can hold, S sampled candidates of a row.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

import math

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

# Elements that one program sorts; one launch per doubling beyond that.
SORT_TILE = 4096
_EMIT_BLOCK = 1024
_LOWEST = tl.constexpr(-(1 << 63))
_HIGHEST = tl.constexpr((1 << 63) - 1)


def sample_rank(num_results: int, num_sampled: int, population: int) -> float:
    """Rank in a sample above which a row holds ``num_results``, but for about 1 row in 30,000."""
    expected = num_results * num_sampled / population
    return expected + 4.0 * math.sqrt(expected) + 4.0


def list_capacity(num_results: int, num_sampled: int, population: int) -> int:
    """Candidates that pass a sampled cut, but for about one row in a million."""
    num_sampled = min(num_sampled, population)
    rank = sample_rank(num_results, num_sampled, population)
    upper = (rank + 5.0 * math.sqrt(rank) + 10.0) * population / num_sampled
    return min(population, max(num_results, math.ceil(upper)))


@triton.jit
def rank_keys(scores, item_ids, positions):
    """Head and tail of candidates; a better candidate has the smaller pair."""
    scores = tl.where(scores == 0.0, 0.0, scores)
    bits = scores.to(tl.int32, bitcast=True)
    order = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    head = ((~order).to(tl.int64) << 32) | (item_ids >> 31)
    tail = ((item_ids & 0x7FFFFFFF) << 32) | positions
    return head, tail


@triton.jit
def cut_at(head, tail, rank):
    """The rank-th smallest pair, counted from 1; needs ``1 <= rank <= number of elements``."""
    low = tl.full([], _LOWEST, tl.int64)
    high = tl.full([], _HIGHEST, tl.int64)
    while low < high:
        middle = (low & high) + ((low ^ high) >> 1)
        enough = tl.sum((head <= middle).to(tl.int32)) >= rank
        high = tl.where(enough, middle, high)
        low = tl.where(enough, low, middle + 1)
    rank -= tl.sum((head < low).to(tl.int32))
    first = tl.full([], 0, tl.int64)
    last = tl.max(tl.where(head == low, tail, 0))
    if tl.sum((head == low).to(tl.int32)) > 1:
        while first < last:
            middle = first + ((last - first) >> 1)
            enough = tl.sum(((head == low) & (tail <= middle)).to(tl.int32)) >= rank
            last = tl.where(enough, middle, last)
            first = tl.where(enough, first, middle + 1)
    return low, last


@triton.jit
def append(head_ptr, tail_ptr, count_ptr, head, tail, hits, capacity):
    """Append candidates to a list; the count goes on beyond the capacity, the list does not."""
    total = tl.sum(hits.to(tl.int32))
    if total > 0:
        place = tl.atomic_add(count_ptr, total) + tl.cumsum(hits.to(tl.int32), 0) - 1
        inside = hits & (place < capacity)
        tl.store(head_ptr + place, head, mask=inside)
        tl.store(tail_ptr + place, tail, mask=inside)


@triton.jit
def merged_place(head_ptr, tail_ptr, head, tail, index, active, count, run, num_steps):
    """Where elements of sorted runs stand once each pair of neighbouring runs is merged."""
    sibling = ((index // run) ^ 1) * run
    low = tl.zeros_like(index)
    high = tl.minimum(tl.maximum(count - sibling, 0), run)
    for _ in range(num_steps):
        middle = (low + high) >> 1
        searching = active & (low < high)
        other = tl.load(head_ptr + sibling + middle, mask=searching, other=0)
        tied = searching & (other == head)
        other_tail = tl.load(tail_ptr + sibling + middle, mask=tied, other=0)
        before = (other < head) | (tied & (other_tail < tail))
        low = tl.where(searching & before, middle + 1, low)
        high = tl.where(searching & ~before, middle, high)
    return index // (2 * run) * (2 * run) + index % run + low


@triton.jit
def sort_tile(head_ptr, tail_ptr, other_offset, count, TILE: tl.constexpr, ROUNDS: tl.constexpr):
    """Sort up to TILE = 2**ROUNDS elements of one list inside one program.

    The elements move between the list and its twin ``other_offset`` further on, once per round.
    """
    index = tl.arange(0, TILE)
    active = index < count
    for turn in range(ROUNDS):
        source = (turn & 1) * other_offset
        head = tl.load(head_ptr + source + index, mask=active, other=0)
        tail = tl.load(tail_ptr + source + index, mask=active, other=0)
        place = merged_place(
            head_ptr + source,
            tail_ptr + source,
            head,
            tail,
            index,
            active,
            count,
            1 << turn,
            turn + 1,
        )
        target = other_offset - source
        tl.store(head_ptr + target + place, head, mask=active)
        tl.store(tail_ptr + target + place, tail, mask=active)
        tl.debug_barrier()


@triton.jit
def emit(scores_ptr, ids_ptr, positions_ptr, head, tail, place, inside, found):
    """Store ranked candidates, or padding where none was found."""
    order = ~(head >> 32).to(tl.int32)
    bits = order ^ ((order >> 31) & 0x7FFFFFFF)
    scores = tl.where(found, bits.to(tl.float32, bitcast=True), float("-inf"))
    item_ids = ((head & 0xFFFFFFFF) << 31) | (tail >> 32)
    tl.store(scores_ptr + place, scores, mask=inside)
    tl.store(ids_ptr + place, tl.where(found, item_ids, -1), mask=inside)
    tl.store(positions_ptr + place, tl.where(found, tail & 0xFFFFFFFF, -1), mask=inside)


@triton.jit
def _sort_tiles_kernel(
    head_ptr,
    tail_ptr,
    counts_ptr,
    capacity,
    other_offset,
    TILE: tl.constexpr,
    ROUNDS: tl.constexpr,
):
    row = tl.program_id(1).to(tl.int64)
    start = tl.program_id(0).to(tl.int64) * TILE
    count = tl.minimum(tl.load(counts_ptr + row), capacity) - start.to(tl.int32)
    if count > 0:
        first = row * capacity + start
        sort_tile(
            head_ptr + first,
            tail_ptr + first,
            other_offset,
            tl.minimum(count, TILE),
            TILE,
            ROUNDS,
        )


@triton.jit
def _merge_runs_kernel(
    head_ptr,
    tail_ptr,
    counts_ptr,
    capacity,
    run,
    num_steps,
    source,
    target,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(1).to(tl.int64)
    count = tl.minimum(tl.load(counts_ptr + row), capacity)
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    active = index < count
    head_ptr += row * capacity
    tail_ptr += row * capacity
    head = tl.load(head_ptr + source + index, mask=active, other=0)
    tail = tl.load(tail_ptr + source + index, mask=active, other=0)
    place = merged_place(
        head_ptr + source,
        tail_ptr + source,
        head,
        tail,
        index,
        active,
        count,
        run,
        num_steps,
    )
    tl.store(head_ptr + target + place, head, mask=active)
    tl.store(tail_ptr + target + place, tail, mask=active)


@triton.jit
def _emit_kernel(
    scores_ptr,
    ids_ptr,
    positions_ptr,
    head_ptr,
    tail_ptr,
    counts_ptr,
    capacity,
    num_results,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(1).to(tl.int64)
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = place < num_results
    found = inside & (place < tl.minimum(tl.load(counts_ptr + row), capacity))
    head = tl.load(head_ptr + row * capacity + place, mask=found, other=0)
    tail = tl.load(tail_ptr + row * capacity + place, mask=found, other=0)
    emit(
        scores_ptr,
        ids_ptr,
        positions_ptr,
        head,
        tail,
        row * num_results + place,
        inside,
        found,
    )


def new_lists(num_rows: int, capacity: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Heads and tails ``(2, Q, A)`` int64, uninitialised; the second half is the sort's scratch."""
    shape = (2, num_rows, capacity)
    heads = torch.empty(shape, dtype=torch.int64, device=device)
    return heads, torch.empty_like(heads)


def ranked_lists(
    heads: Tensor, tails: Tensor, counts: Tensor, num_results: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Sort the lists and decode their best elements.

    Args:
        heads: ``(2, Q, A)`` int64 from ``new_lists``; overwritten.
        tails: ``(2, Q, A)`` int64; overwritten.
        counts: ``(Q,)`` int32: elements of each list; what exceeds A was never stored.
        num_results: elements wanted per row.

    Returns:
        Scores float32, ids and positions int64, each ``(Q, num_results)``.
    """
    _, num_rows, capacity = heads.shape
    tile = min(SORT_TILE, triton.next_power_of_2(capacity))
    rounds = tile.bit_length() - 1
    other_offset = num_rows * capacity
    _sort_tiles_kernel[triton.cdiv(capacity, tile), num_rows](
        heads,
        tails,
        counts,
        capacity,
        other_offset,
        TILE=tile,
        ROUNDS=rounds,
        num_warps=max(1, min(16, tile // 256)),
        enable_fp_fusion=False,
    )
    side, run = rounds & 1, tile
    while run < capacity:
        _merge_runs_kernel[triton.cdiv(capacity, 512), num_rows](
            heads,
            tails,
            counts,
            capacity,
            run,
            run.bit_length(),
            side * other_offset,
            (1 - side) * other_offset,
            BLOCK=512,
            enable_fp_fusion=False,
        )
        side, run = 1 - side, 2 * run
    shape = (num_rows, num_results)
    scores = torch.empty(shape, dtype=torch.float32, device=heads.device)
    item_ids = torch.empty(shape, dtype=torch.int64, device=heads.device)
    positions = torch.empty_like(item_ids)
    _emit_kernel[triton.cdiv(num_results, _EMIT_BLOCK), num_rows](
        scores,
        item_ids,
        positions,
        heads[side],
        tails[side],
        counts,
        capacity,
        num_results,
        BLOCK=_EMIT_BLOCK,
        enable_fp_fusion=False,
    )
    return scores, item_ids, positions

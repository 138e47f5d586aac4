"""Candidate scores from the half-precision cache on CUDA.

One program scores a block of candidates of one request for every head. A thread reads 16 bytes of
a cached row at a time, keeps them while the heads take turns and folds the products in the order of
``fixed_dot``.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

from silvershard.kernels.device_guard import on_device_of_operands
from silvershard.kernels.fixed_math_triton import fixed_dots, slice_width

# Candidates x columns of a slice that a program holds: eight for each of its threads.
_TILE = 1024


@triton.jit
def _refine_kernel(
    scores_ptr,
    query_ptr,
    cache_ptr,
    slots_ptr,
    num_candidates,
    num_heads,
    num_slots,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    SLICE: tl.constexpr,
    ROWS: tl.constexpr,
):
    request = tl.program_id(1).to(tl.int64)
    candidate = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = candidate < num_candidates
    slots = tl.load(slots_ptr + request * num_candidates + candidate, mask=inside, other=-1)
    active = (slots >= 0) & (slots < num_slots)
    offsets = tl.where(active, slots, 0) * DIM
    scores_ptr += (request * num_candidates + candidate) * num_heads
    query_ptr += request * num_heads * DIM
    for head in range(num_heads):
        found = fixed_dots(
            query_ptr + head * DIM, cache_ptr, offsets, active, DIM, WIDTH, SLICE, ROWS
        )
        tl.store(scores_ptr + head, tl.where(active, found, float("-inf")), mask=inside)


@on_device_of_operands
def refine_triton(query: Tensor, cache: Tensor, slots: Tensor) -> Tensor:
    """The CUDA implementation of ``refine``; same contract, no validation."""
    num_requests, num_heads, dim = query.shape
    num_candidates = slots.shape[1]
    scores = torch.empty(
        (num_requests, num_candidates, num_heads), dtype=torch.float32, device=query.device
    )
    if scores.numel() == 0:
        return scores
    width, slice_columns = slice_width(dim)
    rows = min(128, _TILE // slice_columns)
    _refine_kernel[triton.cdiv(num_candidates, rows), num_requests](
        scores,
        query.contiguous(),
        cache,
        slots.contiguous(),
        num_candidates,
        num_heads,
        cache.shape[0] * cache.shape[1],
        DIM=dim,
        WIDTH=width,
        SLICE=slice_columns,
        ROWS=rows,
        enable_fp_fusion=False,
    )
    return scores

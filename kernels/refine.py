"""Exact scores of a few candidates from the half-precision item cache.

Shapes: B requests, H heads, U candidates, N pages in the pool, G slots per page, D embedding
dimension.
"""

import torch
from torch import Tensor

from silvershard.kernels.contract import (
    check_contiguous,
    check_devices,
    check_finite,
    check_range,
    check_tensor,
)
from silvershard.kernels.fixed_math import fixed_dot_reference
from silvershard.kernels.native_library import is_plain_cpu, run_on_cpu
from silvershard.kernels.native_operators import refine_native

# Products held at a time, which bounds the scratch memory.
_CHUNK_ELEMENTS = 1 << 19


def refine(query: Tensor, cache: Tensor, slots: Tensor) -> Tensor:
    """Score every candidate for every head in float32, in a fixed order of summation.

    A score is ``fixed_dot`` of the query and the cached row, so its bits depend on nothing else.

    Args:
        query: ``(B, H, D)`` float32, finite, D >= 1.
        cache: ``(N, G, D)`` float16, contiguous; finite at every slot that is asked for.
        slots: ``(B, U)`` int64 in [-1, N G); -1 is padding.

    Returns:
        ``(B, U, H)`` float32; ``-inf`` at padding.

    Raises:
        ValueError: if shapes, dtypes, devices or ranges disagree, or a value is not finite.
    """
    check_tensor("query", query, torch.float32, ("B", "H", "D"))
    if query.shape[2] == 0:
        raise ValueError(f"query must have D >= 1, got {tuple(query.shape)}")
    check_tensor("cache", cache, torch.float16, ("N", "G", query.shape[2]))
    check_tensor("slots", slots, torch.int64, (query.shape[0], "U"))
    check_devices(query=query, cache=cache, slots=slots)
    check_contiguous(cache=cache)
    score = _refine_cpu if is_plain_cpu(query) else _refine
    scores: Tensor = score(query, cache, slots)
    return scores


def refine_reference(query: Tensor, cache: Tensor, slots: Tensor) -> Tensor:
    """The definition of ``refine``; same contract, plain PyTorch, no validation."""
    num_requests, num_heads, dim = query.shape
    num_candidates = slots.shape[1]
    scores = query.new_full((num_requests, num_candidates, num_heads), -torch.inf)
    rows = cache.view(-1, dim)  # (N * G, D)
    if not rows.shape[0]:
        return scores
    step = max(1, _CHUNK_ELEMENTS // max(1, num_requests * num_heads * dim))
    for start in range(0, num_candidates, step):
        part = slots[:, start : start + step]  # (B, U)
        items = rows.index_select(0, part.clamp_min(0).flatten()).float()
        items = items.view(num_requests, part.shape[1], 1, dim)  # (B, U, 1, D)
        found = fixed_dot_reference(query[:, None], items)  # (B, U, H)
        scores[:, start : start + step] = torch.where(part[:, :, None] >= 0, found, -torch.inf)
    return scores


def _checked_refine(query: Tensor, cache: Tensor, slots: Tensor) -> Tensor:
    check_finite("query", query)
    check_range("slots", slots, -1, cache.shape[0] * cache.shape[1])
    scores = refine_reference(query, cache, slots)
    if not bool(scores[slots >= 0].isfinite().all()):
        raise ValueError("cache must be finite at the slots asked for, got a NaN or infinite score")
    return scores


_refine = torch.library.custom_op("silvershard::refine", refine_reference, mutates_args=())
_refine_cpu = run_on_cpu(refine_native, _checked_refine)
_refine.register_kernel("cpu")(_refine_cpu)


@_refine.register_kernel("cuda")
def _(query: Tensor, cache: Tensor, slots: Tensor) -> Tensor:
    from silvershard.kernels.refine_triton import refine_triton

    return refine_triton(query, cache, slots)


@_refine.register_fake
def _(query: Tensor, cache: Tensor, slots: Tensor) -> Tensor:
    return query.new_empty((*slots.shape, query.shape[1]))

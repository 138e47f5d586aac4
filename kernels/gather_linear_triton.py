"""A linear layer over gathered rows on CUDA.

One program multiplies a block of candidates of one request with a block of the request's outputs.
Float16 rows are exact in TF32; the weights are split into three parts, so that the products keep
float32 precision on tensor cores.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

from silvershard.kernels.device_guard import on_device_of_operands

_BLOCK_ROWS = 128
_BLOCK_K = 32


@triton.jit
def _gather_linear_kernel(
    out_ptr,
    cache_ptr,
    slots_ptr,
    weight_ptr,
    bias_ptr,
    num_candidates,
    num_slots,
    DIM: tl.constexpr,
    OUTPUTS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    request = tl.program_id(2).to(tl.int64)
    candidate = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    inside = candidate < num_candidates
    slots = tl.load(slots_ptr + request * num_candidates + candidate, mask=inside, other=-1)
    active = (slots >= 0) & (slots < num_slots)
    output = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    exists = output < OUTPUTS
    weight_ptr += request * DIM * OUTPUTS
    total = tl.zeros([BLOCK_ROWS, BLOCK_O], tl.float32)
    for first in range(0, DIM, BLOCK_K):
        column = first + tl.arange(0, BLOCK_K)
        rows = tl.load(
            cache_ptr + slots[:, None] * DIM + column[None, :],
            mask=active[:, None] & (column < DIM)[None, :],
            other=0.0,
        ).to(tl.float32)
        weights = tl.load(
            weight_ptr + column[:, None] * OUTPUTS + output[None, :],
            mask=(column < DIM)[:, None] & exists[None, :],
            other=0.0,
        )
        total = tl.dot(rows, weights, total, input_precision="tf32x3")
    total += tl.load(bias_ptr + request * OUTPUTS + output, mask=exists, other=0.0)[None, :]
    tl.store(
        out_ptr + (request * num_candidates + candidate)[:, None] * OUTPUTS + output[None, :],
        tl.where(active[:, None], total, 0.0),
        mask=inside[:, None] & exists[None, :],
    )


@on_device_of_operands
def gather_linear_triton(cache: Tensor, slots: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The CUDA implementation of ``gather_linear``; same contract, no validation."""
    num_requests, num_candidates = slots.shape
    dim, num_outputs = weight.shape[1:]
    out = torch.empty(
        (num_requests, num_candidates, num_outputs), dtype=torch.float32, device=weight.device
    )
    if out.numel() == 0:
        return out
    block_o = max(16, min(64, triton.next_power_of_2(num_outputs)))
    grid = (
        triton.cdiv(num_candidates, _BLOCK_ROWS),
        triton.cdiv(num_outputs, block_o),
        num_requests,
    )
    _gather_linear_kernel[grid](
        out,
        cache,
        slots.contiguous(),
        weight.contiguous(),
        bias.contiguous(),
        num_candidates,
        cache.shape[0] * cache.shape[1],
        DIM=dim,
        OUTPUTS=num_outputs,
        BLOCK_ROWS=_BLOCK_ROWS,
        BLOCK_K=_BLOCK_K,
        BLOCK_O=block_o,
        enable_fp_fusion=False,
    )
    return out

"""Int8 rows on CUDA: one program reads a few rows once, finds their scales and rounds them."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

from silvershard.kernels.device_guard import on_device_of_operands
from silvershard.kernels.quantize import MAX_CODE

_TILE = 4096
_MAX_CODE = tl.constexpr(float(MAX_CODE))
# Adding and subtracting 1.5 * 2**23 rounds a small float32 to an integer, half to even.
_ROUNDER = tl.constexpr(12582912.0)


@triton.jit
def _quantize_rows_kernel(
    codes_ptr,
    scales_ptr,
    x_ptr,
    num_rows,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK_D)
    inside = (row < num_rows)[:, None] & (column < DIM)[None, :]
    place = row[:, None] * DIM + column[None, :]
    x = tl.load(x_ptr + place, mask=inside, other=0.0)
    largest = tl.max(tl.abs(x), axis=1)
    scales = tl.div_rn(largest, tl.full([ROWS], _MAX_CODE, tl.float32))
    divisor = tl.where(scales == 0.0, 1.0, scales)
    quotient = tl.div_rn(x, tl.broadcast_to(divisor[:, None], [ROWS, BLOCK_D]))
    codes = (quotient + _ROUNDER) - _ROUNDER
    codes = tl.minimum(tl.maximum(codes, -_MAX_CODE), _MAX_CODE)
    codes = tl.where((scales == 0.0)[:, None], 0.0, codes)
    tl.store(codes_ptr + place, codes.to(tl.int8), mask=inside)
    tl.store(scales_ptr + row, scales, mask=row < num_rows)


@on_device_of_operands
def quantize_rows_triton(x: Tensor) -> tuple[Tensor, Tensor]:
    """The CUDA implementation of ``quantize_rows``; same contract, no validation."""
    num_rows, dim = x.shape
    codes = torch.empty((num_rows, dim), dtype=torch.int8, device=x.device)
    scales = torch.empty(num_rows, dtype=torch.float32, device=x.device)
    if num_rows == 0:
        return codes, scales
    block_d = triton.next_power_of_2(dim)
    rows = max(1, min(64, _TILE // block_d))
    _quantize_rows_kernel[triton.cdiv(num_rows, rows),](
        codes,
        scales,
        x.contiguous(),
        num_rows,
        DIM=dim,
        ROWS=rows,
        BLOCK_D=block_d,
        enable_fp_fusion=False,
    )
    return codes, scales

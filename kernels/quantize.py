"""Symmetric int8 codes of float rows, with one scale per row.

Shapes: n rows, D embedding dimension.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from silvershard.kernels.contract import check_finite, check_tensor
from silvershard.kernels.native_library import is_plain_cpu, run_on_cpu
from silvershard.kernels.native_operators import quantize_rows_native

MAX_CODE = 127


class QuantizedRows(NamedTuple):
    """Int8 rows; ``codes * scales[:, None]`` approximates the original."""

    codes: Tensor
    scales: Tensor


def quantize_rows(x: Tensor) -> QuantizedRows:
    """Round every row to int8 codes in [-127, 127] times its own scale.

    The scale is the largest magnitude of the row divided by 127, and a code is ``x / scale``
    rounded half to even. Where that division rounds to 0 (a row of zeros, or of magnitudes of at
    most 63 times the smallest subnormal) scale and codes are 0.

    Args:
        x: ``(n, D)`` float32, finite, D >= 1.

    Returns:
        Codes ``(n, D)`` int8 and scales ``(n,)`` float32.

    Raises:
        ValueError: if the shape or dtype is wrong or a value is not finite.
    """
    check_tensor("x", x, torch.float32, ("n", "D"))
    if x.shape[1] == 0:
        raise ValueError(f"x must have D >= 1, got {tuple(x.shape)}")
    quantize = _quantize_rows_cpu if is_plain_cpu(x) else _quantize_rows
    return QuantizedRows(*quantize(x))


def quantize_rows_reference(x: Tensor) -> tuple[Tensor, Tensor]:
    """The definition of ``quantize_rows``; same contract, plain PyTorch, no validation."""
    scales = x.abs().amax(dim=1) / MAX_CODE  # (n,)
    empty = scales == 0.0
    divisor = torch.where(empty, 1.0, scales)[:, None]
    # The clamp acts only where the scale is so small that the division above was not exact.
    codes = torch.round(x / divisor).clamp(-MAX_CODE, MAX_CODE)
    return torch.where(empty[:, None], 0.0, codes).to(torch.int8).contiguous(), scales


def _checked_quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    check_finite("x", x)
    return quantize_rows_reference(x)


_quantize_rows = torch.library.custom_op(
    "silvershard::quantize_rows", quantize_rows_reference, mutates_args=()
)
_quantize_rows_cpu = run_on_cpu(quantize_rows_native, _checked_quantize_rows)
_quantize_rows.register_kernel("cpu")(_quantize_rows_cpu)


@_quantize_rows.register_kernel("cuda")
def _(x: Tensor) -> tuple[Tensor, Tensor]:
    from silvershard.kernels.quantize_triton import quantize_rows_triton

    return quantize_rows_triton(x)


@_quantize_rows.register_fake
def _(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty(x.shape[:1])

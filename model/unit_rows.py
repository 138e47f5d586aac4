"""Rows of unit length, with the same bits in every batch and with a gradient.

Shapes: D embedding dimension.
"""

import torch
from torch import Tensor

from silvershard.kernels import fixed_dot, fixed_sqrt
from silvershard.kernels.fixed_math import fixed_dot_reference

_SMALLEST_SQUARE = 1e-24


def unit_rows(x: Tensor) -> Tensor:
    """Rows ``(..., D)`` divided by their length; a row of zeros stays."""
    if not x.requires_grad:
        return x / fixed_sqrt(fixed_dot(x, x).clamp(min=_SMALLEST_SQUARE))[..., None]
    # The operators have no gradient: torch's square root, an ulp off at times, gives it. Adding the
    # difference is exact, so the values have the same bits.
    square = fixed_dot_reference(x, x).clamp(min=_SMALLEST_SQUARE)
    norm = torch.sqrt(square)
    norm = norm + (fixed_sqrt(square.detach()) - norm.detach())
    return x / norm[..., None]

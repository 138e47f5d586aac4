"""Float steps of rerankers whose bits depend on nothing but the row: norms, softmax, products.

Where gradients are wanted, torch's own operators compute the same to float32 precision.

Shapes: B requests, U candidates, n rows, I inputs, O outputs, D embedding dimension.
"""

import torch
from torch import Tensor

from silvershard.kernels import fixed_sqrt
from silvershard.model.dense import PaddedLinear, padded, padded_product

_SMALLEST_SQUARE = 1e-24
_MEAN_SQUARE_FLOOR = 1e-6
_LOWEST_POWER = -126.0
_SMALLEST_NORMAL = 2.0**-126
# Adding it to a float32 of moderate size leaves the nearest integer in the lowest bits.
_ROUNDER = 1.5 * 2.0**23
_EXPONENT_SHIFT = 23
_EXPONENT_OF_ONE = 127 << _EXPONENT_SHIFT
# Minimax fit of (2**r - 1) / r on [-1/2, 1/2], weighted by the relative error: below 1e-7.
_EXP2_COEFFICIENTS = (
    0.001326472730307149,
    0.009671512991189957,
    0.05550733581185341,
    0.24022242426872253,
    0.6931470036506653,
)


def fixed_exp2(x: Tensor) -> Tensor:
    """Two to the power of non-positive numbers, within 2e-7 relative.

    Softmax needs nothing else. Built from single float32 additions, multiplications and bit
    operations: 3 ns per element on one core, where the float64 ``kernels.fixed_exp`` takes 40 to
    90 ns and would be most of a reranker's time.

    Args:
        x: any shape, float32, at most 0.

    Returns:
        Same shape, float32. 0 at and below -126, so no result is subnormal; NaN stays NaN.
    """
    return torch.exp2(x) if x.requires_grad else _exp2_of(x.clone())


def softmax_powers(x: Tensor) -> Tensor:
    """Two to the power of what each number has more than the largest of its row, in [0, 1].

    Args:
        x: ``(..., M)`` float32; ``-inf`` gives 0. Each row has a finite number.

    Returns:
        Same shape, float32; divided by its sum a row is a softmax in units of log 2.
    """
    # A softmax does not depend on what is subtracted, so no gradient passes through it.
    power = x - x.detach().amax(-1, keepdim=True)
    return torch.exp2(power) if power.requires_grad else _exp2_of(power)


def _exp2_of(power: Tensor) -> Tensor:
    """Two to the power of numbers, which are overwritten."""
    power.clamp_(min=_LOWEST_POWER)
    scale = power + _ROUNDER
    rest = power.sub_(scale - _ROUNDER)
    bits = scale.view(torch.int32)
    bits.bitwise_left_shift_(_EXPONENT_SHIFT).add_(_EXPONENT_OF_ONE)
    result = rest * _EXP2_COEFFICIENTS[0]
    for coefficient in _EXP2_COEFFICIENTS[1:]:
        result.add_(coefficient).mul_(rest)
    result.add_(1.0).mul_(scale)
    return torch.nn.functional.threshold(result, _SMALLEST_NORMAL, 0.0, inplace=True)


def product(x: Tensor, weight: Tensor) -> Tensor:
    """Return ``x @ weight`` as ``padded_product`` does, without its copy where none is needed.

    Args:
        x: ``(n, I)`` float32 that an operator has allocated, so that it is aligned; a row has the
            same bits whatever surrounds it.
        weight: ``(I, O)`` float32, or both dimensions padded with zeros.

    Returns:
        ``(n, O)`` float32, contiguous.
    """
    sizes = (*x.shape, *weight.shape)
    whole = x.is_contiguous() and x.storage_offset() == 0 and x.shape[1] == weight.shape[0]
    if whole and all(size == padded(size) for size in sizes):
        return x @ weight
    return padded_product(x, weight)


def linear(layer: PaddedLinear, x: Tensor) -> Tensor:
    """Return what the layer makes of rows, as ``layer(x)`` does, without needless copies.

    Args:
        layer: of I inputs and O outputs.
        x: ``(n, I)`` float32, or padded with zeros, that an operator has allocated.

    Returns:
        ``(n, O)`` float32, contiguous, that no one else holds.
    """
    out = product(x, layer.weight)[:, : layer.out_features].contiguous()
    return out + layer.bias if out.requires_grad else out.add_(layer.bias)


def joined(*parts: Tensor) -> Tensor:
    """Return the columns of several tensors ``(B, U, .)`` as rows ``(B * U, I)``, I padded."""
    width = sum(part.shape[2] for part in parts)
    zeros = parts[0].new_zeros(*parts[0].shape[:2], padded(width) - width)
    return torch.cat([*parts, zeros], 2).flatten(0, 1)


def group_indicator(groups: int, size: int) -> Tensor:
    """Return the matrix whose product sums groups of neighbouring columns.

    Returns:
        ``(groups * size, padded(groups))`` float32 of ones and zeros.
    """
    sums = torch.eye(groups, padded(groups))
    return sums.repeat_interleave(size, 0)


def group_lengths(x: Tensor, indicator: Tensor, groups: int) -> Tensor:
    """Return the Euclidean length of each group of columns, at least 1e-12.

    Args:
        x: ``(n, groups * size)`` float32.
        indicator: what ``group_indicator`` returns.
        groups: their number.

    Returns:
        ``(n, groups)`` float32.
    """
    square = product(x * x, indicator)[:, :groups]
    return _root(square.clamp(min=_SMALLEST_SQUARE))


def normed_rows(x: Tensor) -> Tensor:
    """Return rows ``(n, D)`` float32 divided by the root of their mean square.

    Source: Zhang and Sennrich, "Root Mean Square Layer Normalization", NeurIPS 2019, section 4;
    the gain is left to the layer that follows.
    """
    dim = x.shape[1]
    square = product(x * x, x.new_ones(dim, padded(1)))[:, :1]
    return x / _root(square / dim + _MEAN_SQUARE_FLOOR)


def request_product(x: Tensor, weight: Tensor) -> Tensor:
    """Return the rows of each request times the matrix of that request.

    A row has the same bits whatever other rows and requests there are.

    Args:
        x: ``(B, U, I)`` float32 that an operator has allocated, B >= 1.
        weight: ``(B, I, O)`` float32.

    Returns:
        ``(B, U, O)`` float32.
    """
    if x.requires_grad or weight.requires_grad:
        return torch.bmm(x, weight)
    if x.shape[0] == 1:
        return product(x[0], weight[0])[None]
    return torch.stack(
        [padded_product(rows, matrix) for rows, matrix in zip(x, weight, strict=True)]
    )


def _root(x: Tensor) -> Tensor:
    return torch.sqrt(x) if x.requires_grad else fixed_sqrt(x)

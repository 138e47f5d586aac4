"""A linear layer over cached item rows, with weights of each request's own.

The first layer of a reranker that sees an item x, a user u and the products u * x is linear in x
once the user is known: ``Wx x + Wp (u * x) + Wu u + b = (Wx + Wp diag(u)) x + (Wu u + b)``. So the
user's side is folded into the weights once per request, and an item costs a third of the work.

Shapes: B requests, U candidates, N pages in the pool, G slots per page, D embedding dimension, O
outputs.
"""

import torch
from torch import Tensor

from silvershard.kernels.contract import (
    check_contiguous,
    check_devices,
    check_range,
    check_tensor,
)
from silvershard.kernels.native_library import is_plain_cpu, run_on_cpu
from silvershard.kernels.native_operators import gather_linear_native

# Shapes whose matrix product gives a row the same bits whatever the other rows are.
_PAD = 16


def gather_linear(cache: Tensor, slots: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Gather the rows of candidates and multiply them with the weights of their request.

    An output depends, bit for bit, on its own row, weights and bias only. Native implementations
    start at the bias and add the products of ascending d, each step rounded once, and so agree bit
    for bit; the reference sums in the order of a matrix product and agrees to float32 precision.

    Args:
        cache: ``(N, G, D)`` float16, contiguous, D >= 1.
        slots: ``(B, U)`` int64 in [-1, N G); -1 is padding.
        weight: ``(B, D, O)`` float32, O >= 1.
        bias: ``(B, O)`` float32.

    Returns:
        ``(B, U, O)`` float32; zeros at padding. NaN and infinities follow IEEE arithmetic.

    Raises:
        ValueError: if shapes, dtypes, devices or ranges disagree.
    """
    check_tensor("cache", cache, torch.float16, ("N", "G", "D"))
    dim = cache.shape[2]
    if dim == 0:
        raise ValueError(f"cache must have D >= 1, got {tuple(cache.shape)}")
    check_tensor("slots", slots, torch.int64, ("B", "U"))
    check_tensor("weight", weight, torch.float32, (slots.shape[0], dim, "O"))
    if weight.shape[2] == 0:
        raise ValueError(f"weight must have O >= 1, got {tuple(weight.shape)}")
    check_tensor("bias", bias, torch.float32, (slots.shape[0], weight.shape[2]))
    check_devices(cache=cache, slots=slots, weight=weight, bias=bias)
    check_contiguous(cache=cache)
    multiply = _gather_linear_cpu if is_plain_cpu(cache, weight, bias) else _gather_linear
    out: Tensor = multiply(cache, slots, weight, bias)
    return out


def gather_linear_reference(cache: Tensor, slots: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The definition of ``gather_linear``; same contract, plain PyTorch, no validation."""
    num_requests, num_candidates = slots.shape
    dim, num_outputs = weight.shape[1:]
    out = weight.new_zeros((num_requests, num_candidates, num_outputs))
    rows = cache.view(-1, dim)  # (N * G, D)
    if not rows.shape[0]:
        return out
    padded = weight.new_zeros((_padded(num_candidates), _padded(dim)))
    wide = weight.new_zeros((num_requests, _padded(dim), _padded(num_outputs)))
    wide[:, :dim, :num_outputs] = weight
    for request in range(num_requests):
        mine = slots[request]
        padded[:num_candidates, :dim] = rows.index_select(0, mine.clamp_min(0))
        product = (padded @ wide[request])[:num_candidates, :num_outputs] + bias[request]
        out[request] = torch.where(mine[:, None] >= 0, product, 0.0)
    return out


def _padded(size: int) -> int:
    return max(-(-size // _PAD) * _PAD, _PAD)


def _checked_gather_linear(cache: Tensor, slots: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    check_range("slots", slots, -1, cache.shape[0] * cache.shape[1])
    return gather_linear_reference(cache, slots, weight, bias)


_gather_linear = torch.library.custom_op(
    "silvershard::gather_linear", gather_linear_reference, mutates_args=()
)
_gather_linear_cpu = run_on_cpu(gather_linear_native, _checked_gather_linear)
_gather_linear.register_kernel("cpu")(_gather_linear_cpu)


@_gather_linear.register_kernel("cuda")
def _(cache: Tensor, slots: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    from silvershard.kernels.gather_linear_triton import gather_linear_triton

    return gather_linear_triton(cache, slots, weight, bias)


@_gather_linear.register_fake
def _(cache: Tensor, slots: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return weight.new_empty((*slots.shape, weight.shape[2]))

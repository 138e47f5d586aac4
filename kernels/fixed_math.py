"""Float functions whose bits depend on nothing but the element: no neighbour, position or thread.

torch's own ``exp``, ``log`` and ``sigmoid`` round differently in the vectorised body and in the
scalar tail of a tensor, and its reductions change with shape and thread count. These are built from
IEEE additions, multiplications, divisions and bit operations only, in float64, and rounded once.

Shapes: D dimension that is reduced.
"""

import math
from functools import partial

import torch
from torch import Tensor

from silvershard.kernels.contract import check_devices
from silvershard.kernels.native_library import is_plain_cpu, run_on_cpu
from silvershard.kernels.native_operators import fixed_map_native

_LOG2_E = math.log2(math.e)
_LN_2 = math.log(2.0)
_SQRT_2 = math.sqrt(2.0)
_SMALLEST_NORMAL = 2.0**-126
# Beyond these bounds float32 holds only inf and 0, and the float64 exponent stays in range.
_EXP_LOW = -104.0
_EXP_HIGH = 89.0
_EXP_COEFFICIENTS = tuple(1.0 / math.factorial(power) for power in range(10, -1, -1))
_ATANH_COEFFICIENTS = tuple(2.0 / power for power in range(17, 0, -2))


def fixed_dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner products over the last dimension, summed in one fixed order.

    The products are padded with zeros to a power of two and folded: the first half plus the second
    half, until one number is left. Each row has the same bits alone and in any batch.

    Args:
        a: ``(..., D)`` float32.
        b: ``(..., D)`` float32; the leading dimensions broadcast with those of ``a``.

    Returns:
        ``(...)`` float32.

    Raises:
        ValueError: if dtypes, devices or D disagree, or D is 0.
    """
    for name, tensor in (("a", a), ("b", b)):
        if tensor.dtype != torch.float32:
            raise ValueError(f"{name} must be torch.float32, got {tensor.dtype}")
        if tensor.dim() == 0 or tensor.shape[-1] == 0:
            raise ValueError(f"{name} must have shape (..., D) with D >= 1, got {tensor.shape}")
    if a.shape[-1] != b.shape[-1]:
        raise ValueError(f"a and b must have the same D, got {a.shape[-1]} and {b.shape[-1]}")
    check_devices(a=a, b=b)
    answer: Tensor = _fixed_dot(a, b)
    return answer


def fixed_dot_reference(a: Tensor, b: Tensor) -> Tensor:
    """The definition of ``fixed_dot``; same contract, plain PyTorch, no validation."""
    folded = a * b
    dim = folded.shape[-1]
    width = 1 << (dim - 1).bit_length()
    if width != dim:
        folded = torch.nn.functional.pad(folded, (0, width - dim))
    while width > 1:
        width //= 2
        folded = folded[..., :width] + folded[..., width:]
    return folded.squeeze(-1)


def fixed_exp(x: Tensor) -> Tensor:
    """The exponential function, within 0.51 ulp of the exact value.

    Args:
        x: any shape, float32.

    Returns:
        Same shape, float32. ``inf`` above 88.7228; 0 where the exact value is below the smallest
        normal number, 2**-126 (x below about -87.3365), so subnormals are flushed; NaN stays NaN.

    Raises:
        ValueError: if ``x`` is not float32.
    """
    _check_float32(x)
    answer: Tensor = _fixed_exp_cpu(x) if is_plain_cpu(x) else _fixed_exp(x)
    return answer


def fixed_exp_reference(x: Tensor) -> Tensor:
    """The definition of ``fixed_exp``; same contract, plain PyTorch, no validation."""
    return _round_to_float32(_exp_float64(x.double()))


def fixed_log(x: Tensor) -> Tensor:
    """The natural logarithm, within 0.51 ulp of the exact value.

    Args:
        x: any shape, float32; subnormal inputs count with their own value.

    Returns:
        Same shape, float32. ``-inf`` at 0, NaN below 0, ``inf`` at ``inf``; NaN stays NaN.

    Raises:
        ValueError: if ``x`` is not float32.
    """
    _check_float32(x)
    answer: Tensor = _fixed_log_cpu(x) if is_plain_cpu(x) else _fixed_log(x)
    return answer


def fixed_log_reference(x: Tensor) -> Tensor:
    """The definition of ``fixed_log``; same contract, plain PyTorch, no validation."""
    wide = x.double()
    bits = wide.contiguous().view(torch.int64)
    exponent = ((bits >> 52) & 0x7FF) - 1023
    mantissa = ((bits & 0xFFFFFFFFFFFFF) | (1023 << 52)).view(torch.float64)  # in [1, 2)
    upper = mantissa > _SQRT_2
    mantissa = torch.where(upper, mantissa * 0.5, mantissa)
    exponent = torch.where(upper, exponent + 1, exponent)
    # log(m) = 2 atanh(s), whose odd series converges fast because |s| < 0.172.
    s = (mantissa - 1.0) / (mantissa + 1.0)
    result = s * _horner(_ATANH_COEFFICIENTS, s * s) + exponent.double() * _LN_2
    result = torch.where(wide == math.inf, math.inf, result)
    result = torch.where(wide == 0.0, -math.inf, result)
    result = torch.where(wide < 0.0, math.nan, result)
    return torch.where(x.isnan(), math.nan, result).float()


def fixed_sigmoid(x: Tensor) -> Tensor:
    """The logistic function ``1 / (1 + exp(-x))``, within 0.51 ulp of the exact value.

    Args:
        x: any shape, float32.

    Returns:
        Same shape, float32, in [0, 1]. 0 where the exact value is below 2**-126 (x below about
        -87.3365), so subnormals are flushed; NaN stays NaN.

    Raises:
        ValueError: if ``x`` is not float32.
    """
    _check_float32(x)
    answer: Tensor = _fixed_sigmoid_cpu(x) if is_plain_cpu(x) else _fixed_sigmoid(x)
    return answer


def fixed_sigmoid_reference(x: Tensor) -> Tensor:
    """The definition of ``fixed_sigmoid``; same contract, plain PyTorch, no validation."""
    wide = x.double()
    tail = _exp_float64(-wide.abs())
    return _round_to_float32(torch.where(wide < 0.0, tail, 1.0) / (tail + 1.0))


def fixed_sqrt(x: Tensor) -> Tensor:
    """The square root, correctly rounded.

    ``torch.sqrt`` is not: on the CPU a fifth of its float32 results were seen to be one ulp off.

    Args:
        x: any shape, float32.

    Returns:
        Same shape, float32. NaN below 0, the same zero at either zero; NaN stays NaN.

    Raises:
        ValueError: if ``x`` is not float32.
    """
    _check_float32(x)
    answer: Tensor = _fixed_sqrt_cpu(x) if is_plain_cpu(x) else _fixed_sqrt(x)
    return answer


def fixed_sqrt_reference(x: Tensor) -> Tensor:
    """The definition of ``fixed_sqrt``; same contract, plain PyTorch, no validation."""
    # No root of a float32 lies so near to a midpoint that an ulp of float64 could matter.
    return x.double().sqrt().float()


def _check_float32(x: Tensor) -> None:
    if x.dtype != torch.float32:
        raise ValueError(f"x must be torch.float32, got {x.dtype}")


def _horner(coefficients: tuple[float, ...], x: Tensor) -> Tensor:
    result = x * coefficients[0] + coefficients[1]
    for coefficient in coefficients[2:]:
        result = result * x + coefficient
    return result


def _exp_float64(x: Tensor) -> Tensor:
    clamped = torch.where(x.isnan(), 0.0, x).clamp(_EXP_LOW, _EXP_HIGH)
    power = torch.round(clamped * _LOG2_E)
    scale = ((power.to(torch.int64) + 1023) << 52).view(torch.float64)
    result = _horner(_EXP_COEFFICIENTS, clamped - power * _LN_2) * scale
    return torch.where(x.isnan(), math.nan, result)


def _round_to_float32(x: Tensor) -> Tensor:
    # Flushed here, because whether the CPU keeps subnormals is a setting of the thread.
    return torch.where(x < _SMALLEST_NORMAL, 0.0, x).float()


_fixed_dot = torch.library.custom_op("silvershard::fixed_dot", fixed_dot_reference, mutates_args=())
_fixed_exp = torch.library.custom_op("silvershard::fixed_exp", fixed_exp_reference, mutates_args=())
_fixed_log = torch.library.custom_op("silvershard::fixed_log", fixed_log_reference, mutates_args=())
_fixed_sigmoid = torch.library.custom_op(
    "silvershard::fixed_sigmoid", fixed_sigmoid_reference, mutates_args=()
)

_fixed_sqrt = torch.library.custom_op(
    "silvershard::fixed_sqrt", fixed_sqrt_reference, mutates_args=()
)


_fixed_exp_cpu = run_on_cpu(partial(fixed_map_native, function=0), fixed_exp_reference)
_fixed_exp.register_kernel("cpu")(_fixed_exp_cpu)
_fixed_log_cpu = run_on_cpu(partial(fixed_map_native, function=1), fixed_log_reference)
_fixed_log.register_kernel("cpu")(_fixed_log_cpu)
_fixed_sigmoid_cpu = run_on_cpu(partial(fixed_map_native, function=2), fixed_sigmoid_reference)
_fixed_sigmoid.register_kernel("cpu")(_fixed_sigmoid_cpu)
_fixed_sqrt_cpu = run_on_cpu(partial(fixed_map_native, function=3), fixed_sqrt_reference)
_fixed_sqrt.register_kernel("cpu")(_fixed_sqrt_cpu)


@_fixed_dot.register_fake
def _(a: Tensor, b: Tensor) -> Tensor:
    return torch.empty_like(a[..., 0] + b[..., 0])


@_fixed_exp.register_fake
@_fixed_log.register_fake
@_fixed_sigmoid.register_fake
@_fixed_sqrt.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)

"""Float functions on CUDA with the bits of ``fixed_math``: each operation rounded by itself.

Every kernel that calls them is launched with ``enable_fp_fusion=False``, because a fused multiply
and add would round once instead of twice.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

import math

import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]

# Columns that a thread loads at a time: 16 bytes of float16.
_COLUMNS_PER_THREAD = 8
# More slices than this, whose loads the compiler issues together, would not fit the registers.
_MOST_SLICES = 32
_LOG2_E = tl.constexpr(math.log2(math.e))
_LN_2 = tl.constexpr(math.log(2.0))
_SQRT_2 = tl.constexpr(math.sqrt(2.0))
_SMALLEST_NORMAL = tl.constexpr(2.0**-126)
_EXP_COEFFICIENTS = tl.constexpr(tuple(1.0 / math.factorial(power) for power in range(10, -1, -1)))
_ATANH_COEFFICIENTS = tl.constexpr(tuple(2.0 / power for power in range(17, 0, -2)))
# Adding and subtracting 1.5 * 2**52 rounds a small float64 to an integer, half to even.
_ROUNDER = tl.constexpr(6755399441055744.0)


def slice_width(dim: int) -> tuple[int, int]:
    """D padded to a power of two, and the width of the slices that it is read in."""
    width = 1 << (dim - 1).bit_length()
    return width, min(width, max(_COLUMNS_PER_THREAD, width // _MOST_SLICES))


@triton.jit
def fixed_dots(
    query_ptr,
    rows_ptr,
    offsets,
    active,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    SLICE: tl.constexpr,
    ROWS: tl.constexpr,
):
    """``fixed_dot`` of one query with the rows at ``offsets``, in float32.

    The slices of a row are folded first, which is the upper levels of the fold of the whole row;
    then the columns of the one slice that is left.
    """
    slices = _fold_slices(query_ptr, rows_ptr, offsets, active, 0, 1, DIM, WIDTH, SLICE)
    return _fold_columns(slices, SLICE, ROWS)


@triton.jit
def _fold_slices(
    query_ptr,
    rows_ptr,
    offsets,
    active,
    NUMBER: tl.constexpr,
    COUNT: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    SLICE: tl.constexpr,
):
    """Slice ``NUMBER`` of the products folded to ``COUNT`` slices."""
    if COUNT * SLICE == WIDTH:
        column = NUMBER * SLICE + tl.arange(0, SLICE)
        within = active[:, None]
        if (NUMBER + 1) * SLICE > DIM:
            within = within & (column < DIM)[None, :]
        query = tl.load(query_ptr + column, mask=column < DIM, other=0.0)
        rows = tl.load(rows_ptr + offsets[:, None] + column[None, :], mask=within, other=0.0)
        return query[None, :] * rows.to(tl.float32)
    else:
        lower = _fold_slices(
            query_ptr, rows_ptr, offsets, active, NUMBER, 2 * COUNT, DIM, WIDTH, SLICE
        )
        upper = _fold_slices(
            query_ptr, rows_ptr, offsets, active, NUMBER + COUNT, 2 * COUNT, DIM, WIDTH, SLICE
        )
        return lower + upper


@triton.jit
def _fold_columns(values, WIDTH: tl.constexpr, ROWS: tl.constexpr):
    """The columns folded to one: ``(ROWS,)``."""
    if WIDTH == 1:
        return tl.reshape(values, [ROWS])
    else:
        halves = tl.permute(tl.reshape(values, [ROWS, 2, WIDTH // 2]), [0, 2, 1])
        lower, upper = tl.split(halves)
        return _fold_columns(lower + upper, WIDTH // 2, ROWS)


@triton.jit
def _constant(VALUE: tl.constexpr):
    """A float64 scalar; a bare literal would pass through float32."""
    return tl.full([], VALUE, tl.float64)


@triton.jit
def fixed_exp(x):
    """``fixed_exp`` of float32 values."""
    wide = x.to(tl.float64)
    absent = wide != wide
    clamped = tl.where(absent, 0.0, wide)
    clamped = tl.where(clamped < -104.0, -104.0, tl.where(clamped > 89.0, 89.0, clamped))
    power = (clamped * _constant(_LOG2_E) + _constant(_ROUNDER)) - _constant(_ROUNDER)
    scale = ((power.to(tl.int64) + 1023) << 52).to(tl.float64, bitcast=True)
    rest = clamped - power * _constant(_LN_2)
    result = rest * _constant(_EXP_COEFFICIENTS[0]) + _constant(_EXP_COEFFICIENTS[1])
    for place in tl.static_range(2, 11):
        result = result * rest + _constant(_EXP_COEFFICIENTS[place])
    result = result * scale
    result = tl.where(result < _constant(_SMALLEST_NORMAL), 0.0, result)
    return tl.where(absent, float("nan"), result.to(tl.float32))


@triton.jit
def fixed_log(x):
    """``fixed_log`` of float32 values."""
    wide = x.to(tl.float64)
    bits = wide.to(tl.int64, bitcast=True)
    exponent = ((bits >> 52) & 0x7FF) - 1023
    mantissa = ((bits & 0xFFFFFFFFFFFFF) | (1023 << 52)).to(tl.float64, bitcast=True)
    upper = mantissa > _constant(_SQRT_2)
    mantissa = tl.where(upper, mantissa * 0.5, mantissa)
    exponent = tl.where(upper, exponent + 1, exponent)
    s = (mantissa - 1.0) / (mantissa + 1.0)
    square = s * s
    series = square * _constant(_ATANH_COEFFICIENTS[0]) + _constant(_ATANH_COEFFICIENTS[1])
    for place in tl.static_range(2, 9):
        series = series * square + _constant(_ATANH_COEFFICIENTS[place])
    result = s * series + exponent.to(tl.float64) * _constant(_LN_2)
    result = tl.where(wide == float("inf"), float("inf"), result)
    result = tl.where(wide == 0.0, float("-inf"), result)
    absent = (wide < 0.0) | (wide != wide)
    return tl.where(absent, float("nan"), result.to(tl.float32))

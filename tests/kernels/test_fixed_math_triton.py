import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from silvershard.kernels.fixed_math import (
    fixed_dot_reference,
    fixed_exp_reference,
    fixed_log_reference,
)
from silvershard.kernels.fixed_math_triton import fixed_dots, fixed_exp, fixed_log, slice_width

# The interpreter computes with numpy, which warns of infinities and NaN.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")


@triton.jit
def _functions_kernel(exp_ptr, log_ptr, x_ptr, BLOCK: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + place)
    tl.store(exp_ptr + place, fixed_exp(x))
    tl.store(log_ptr + place, fixed_log(x))


@triton.jit
def _dots_kernel(
    out_ptr, query_ptr, rows_ptr, D: tl.constexpr, W: tl.constexpr, S: tl.constexpr, R: tl.constexpr
):
    row = tl.arange(0, R)
    dots = fixed_dots(query_ptr, rows_ptr, row.to(tl.int64) * D, row < R - 1, D, W, S, R)
    tl.store(out_ptr + row, dots)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.cpu().view(torch.int32), b.cpu().view(torch.int32))


def test_exp_and_log_have_the_bits_of_the_reference(device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(1 << 31), 1 << 31, (1 << 16,), generator=generator).int()
    x = bits.view(torch.float32)
    x[: 1 << 14] = torch.randn(1 << 14, generator=generator) * 30
    edges = [0.0, -0.0, torch.inf, -torch.inf, 1e-45, 88.7228, 88.73, -87.3365, -87.34, -104.0, 1.0]
    x[: len(edges)] = torch.tensor(edges)
    x = torch.where(x.isnan(), torch.nan, x)
    exp, log = torch.empty_like(x, device=device), torch.empty_like(x, device=device)
    _functions_kernel[16,](exp, log, x.to(device), BLOCK=1 << 12, enable_fp_fusion=False)
    for got, reference in ((exp, fixed_exp_reference(x)), (log, fixed_log_reference(x))):
        assert torch.equal(got.cpu().isnan(), reference.isnan())
        assert same_bits(got.cpu().nan_to_num(7.0), reference.nan_to_num(7.0))


@pytest.mark.parametrize("dim", [1, 2, 3, 8, 16, 33, 64, 100, 128, 1000])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_dots_are_summed_in_the_order_of_the_reference(
    dim: int, dtype: torch.dtype, device: torch.device
) -> None:
    generator = torch.Generator().manual_seed(dim)
    query = torch.randn(dim, generator=generator) * 100
    rows = torch.randn((16, dim), generator=generator).to(dtype)
    rows[3] = 0
    rows[4] = -rows[4].abs() * query.sign()
    out = torch.empty(16, device=device)
    width, columns = slice_width(dim)
    _dots_kernel[1,](
        out,
        query.to(device),
        rows.to(device),
        D=dim,
        W=width,
        S=columns,
        R=16,
        enable_fp_fusion=False,
    )
    assert same_bits(out[:15], fixed_dot_reference(query, rows.float())[:15])

import pytest
import torch

from silvershard.kernels.quantize import quantize_rows_reference
from silvershard.kernels.quantize_triton import quantize_rows_triton


@pytest.mark.parametrize("dim", [1, 16, 33, 128, 1000])
@pytest.mark.parametrize("num_rows", [0, 1, 70])
def test_codes_and_scales_equal_the_reference(
    dim: int, num_rows: int, device: torch.device
) -> None:
    generator = torch.Generator().manual_seed(dim)
    x = torch.randn((num_rows, dim), generator=generator)
    # Halves between two codes, zeros, subnormal and huge rows.
    x[1::5] = torch.randint(-254, 255, x[1::5].shape, generator=generator).float() / 2
    x[1::5, :1] = 127.0
    x[2::5] = 0.0
    x[3::5] *= 1e-43
    x[4::5] *= 1e37
    codes, scales = quantize_rows_triton(x.to(device))
    expected_codes, expected_scales = quantize_rows_reference(x)
    assert torch.equal(scales.cpu().view(torch.int32), expected_scales.view(torch.int32))
    assert torch.equal(codes.cpu(), expected_codes)

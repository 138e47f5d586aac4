import pytest
import torch

from silvershard.kernels.gather_linear import gather_linear_reference
from silvershard.kernels.gather_linear_triton import gather_linear_triton


@pytest.mark.parametrize("dim", [1, 16, 33, 128])
@pytest.mark.parametrize("num_outputs", [1, 48, 100])
@pytest.mark.parametrize(("num_requests", "num_candidates"), [(1, 7), (2, 150)])
def test_outputs_equal_the_reference_to_float32_precision(
    dim: int, num_outputs: int, num_requests: int, num_candidates: int, device: torch.device
) -> None:
    generator = torch.Generator().manual_seed(dim)
    cache = torch.randn((3, 64, dim), generator=generator).half()
    slots = torch.randint(0, 3 * 64, (num_requests, num_candidates), generator=generator)
    slots[:, ::3] = -1
    slots[:, 1] = 3 * 64 - 1
    weight = torch.randn((num_requests, dim, num_outputs), generator=generator)
    bias = torch.randn((num_requests, num_outputs), generator=generator)
    arguments = (cache, slots, weight, bias)
    got = gather_linear_triton(*(part.to(device) for part in arguments)).cpu()
    torch.testing.assert_close(got, gather_linear_reference(*arguments), rtol=1e-5, atol=3e-5)
    assert not got[:, ::3].any()


def test_no_candidates_and_an_empty_cache_give_zeros(device: torch.device) -> None:
    cache = torch.empty((0, 64, 4), dtype=torch.float16, device=device)
    weight, bias = torch.ones((2, 4, 3), device=device), torch.ones((2, 3), device=device)
    none = torch.empty((2, 0), dtype=torch.int64, device=device)
    assert gather_linear_triton(cache, none, weight, bias).shape == (2, 0, 3)
    assert not gather_linear_triton(cache, none.new_full((2, 5), -1), weight, bias).any()

import pytest
import torch

from silvershard.kernels.refine import refine_reference
from silvershard.kernels.refine_triton import refine_triton


@pytest.mark.parametrize("dim", [1, 16, 33, 64, 128, 700])
@pytest.mark.parametrize(("num_requests", "num_heads", "num_candidates"), [(1, 1, 5), (2, 3, 200)])
def test_scores_have_the_bits_of_the_reference(
    dim: int, num_requests: int, num_heads: int, num_candidates: int, device: torch.device
) -> None:
    generator = torch.Generator().manual_seed(dim)
    query = torch.randn((num_requests, num_heads, dim), generator=generator)
    cache = torch.randn((3, 64, dim), generator=generator).half()
    slots = torch.randint(-1, 3 * 64, (num_requests, num_candidates), generator=generator)
    slots[:, :2] = torch.tensor([-1, 3 * 64 - 1])
    cache[1, :5] = torch.nan
    slots[(slots >= 64) & (slots < 69)] = -1
    got = refine_triton(query.to(device), cache.to(device), slots.to(device))
    expected = refine_reference(query, cache, slots)
    assert torch.equal(got.cpu().view(torch.int32), expected.view(torch.int32))


@pytest.mark.parametrize("shape", [(0, 2, 3), (2, 0, 3), (2, 2, 0)])
def test_no_candidates_or_heads_or_requests_give_nothing(
    shape: tuple[int, int, int], device: torch.device
) -> None:
    query = torch.ones((shape[0], shape[1], 4), device=device)
    slots = torch.zeros((shape[0], shape[2]), dtype=torch.int64, device=device)
    cache = torch.ones((1, 64, 4), dtype=torch.float16, device=device)
    assert refine_triton(query, cache, slots).shape == (shape[0], shape[2], shape[1])


def test_an_empty_cache_scores_only_padding(device: torch.device) -> None:
    cache = torch.empty((0, 64, 8), dtype=torch.float16, device=device)
    slots = torch.full((1, 3), -1, device=device)
    scores = refine_triton(torch.ones((1, 2, 8), device=device), cache, slots)
    assert (scores == -torch.inf).all()

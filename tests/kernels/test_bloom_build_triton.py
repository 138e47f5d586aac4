import pytest
import torch

from silvershard.kernels import PAD_TERM
from silvershard.kernels.bloom_build import bloom_build_reference
from silvershard.kernels.bloom_build_triton import bloom_build_triton


@pytest.mark.slow
@pytest.mark.parametrize("num_words", [1, 2])
@pytest.mark.parametrize(("num_slots", "num_terms"), [(0, 3), (1, 0), (5, 2), (200, 3), (640, 1)])
@pytest.mark.parametrize("seed", [-3, (1 << 63) - 1])
def test_planes_equal_the_reference(
    num_words: int, num_slots: int, num_terms: int, seed: int, device: torch.device
) -> None:
    generator = torch.Generator().manual_seed(num_slots)
    shape = (43, 10 // num_words, num_words)
    planes = torch.randint(-(1 << 62), 1 << 62, shape, generator=generator) * 2
    slots = torch.randperm(640, generator=generator)[:num_slots]
    terms = torch.randint(0, 1 << 62, (num_slots, num_terms), generator=generator)
    terms[torch.rand(terms.shape, generator=generator) < 0.3] = PAD_TERM
    there = planes.clone().to(device)
    for num_planes, num_hashes in ((40, 3), (1, 1), (7, 2)):
        hashing = (2, num_planes, num_hashes, seed)
        bloom_build_triton(there, slots.to(device), terms.to(device), *hashing)
        bloom_build_reference(planes, slots, terms, *hashing)
        assert torch.equal(there.cpu(), planes)


def test_a_pool_without_pages_is_left_alone(device: torch.device) -> None:
    planes = torch.empty((4, 0, 1), dtype=torch.int64, device=device)
    none = torch.empty(0, dtype=torch.int64, device=device)
    bloom_build_triton(planes, none, none.view(0, 2), 1, 3, 2, 5)

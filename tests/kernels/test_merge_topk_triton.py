import pytest
import torch

from silvershard.kernels.merge_topk import merge_topk_reference
from silvershard.kernels.merge_topk_triton import merge_topk_triton


@pytest.mark.parametrize("shape", [(1, 2, 7), (3, 2, 20), (5, 1, 1), (2, 0, 3), (0, 2, 3)])
def test_merged_lists_equal_the_reference(
    shape: tuple[int, int, int], device: torch.device
) -> None:
    generator = torch.Generator().manual_seed(1)
    scores = torch.randint(0, 5, shape, generator=generator).float()
    item_ids = torch.randint(-1, 1 << 50, shape, generator=generator)
    for k in (1, 9, 80):
        got = merge_topk_triton(scores.to(device), item_ids.to(device), k)
        for mine, other in zip(got, merge_topk_reference(scores, item_ids, k), strict=True):
            assert torch.equal(mine.cpu(), other)

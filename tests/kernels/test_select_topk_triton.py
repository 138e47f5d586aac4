from importlib import import_module

import pytest
import torch
from torch import Tensor

from silvershard.kernels.select_topk import select_topk_reference
from silvershard.kernels.select_topk_triton import select_topk_triton

MODULE = import_module("silvershard.kernels.select_topk_triton")
RANKING = import_module("silvershard.kernels.ranking_triton")


def candidates(shape: tuple[int, int], levels: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed + levels)
    scores = torch.randint(0, levels, shape, generator=generator).float() - levels // 2
    if levels > 1000:
        scores /= 7.0
    scores[torch.rand(shape, generator=generator) < 0.1] = -torch.inf
    scores[torch.rand(shape, generator=generator) < 0.05] = -0.0
    item_ids = torch.stack([torch.randperm(shape[1], generator=generator)] * shape[0])
    # Ids that differ in their upper half only, and ids that are equal.
    item_ids[:, ::3] <<= 40
    item_ids[:, 1::7] = 5
    item_ids[torch.rand(shape, generator=generator) < 0.1] = -1
    return scores, item_ids


def assert_equals_reference(scores: Tensor, item_ids: Tensor, k: int, device: torch.device) -> None:
    got = select_topk_triton(scores.to(device), item_ids.to(device), k)
    for mine, other in zip(got, select_topk_reference(scores, item_ids, k), strict=True):
        assert torch.equal(mine.cpu(), other)
        assert mine.is_contiguous()
    assert not got[0][got[0] == 0].signbit().any()


@pytest.mark.slow
@pytest.mark.parametrize("num_candidates", [0, 1, 17, 256])
@pytest.mark.parametrize("k", [1, 40, 300])
@pytest.mark.parametrize("levels", [1, 4, 100_000])
def test_short_rows_equal_the_reference(
    num_candidates: int, k: int, levels: int, device: torch.device
) -> None:
    assert_equals_reference(*candidates((3, num_candidates), levels), k, device)


@pytest.fixture
def small_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Limits that make a few hundred candidates a long row, sampled and merged over tiles."""
    monkeypatch.setattr(MODULE, "SHORT_ROW", 16)
    monkeypatch.setattr(MODULE, "SAMPLES", 64)
    monkeypatch.setattr(MODULE, "BLOCK", 512)
    monkeypatch.setattr(RANKING, "SORT_TILE", 32)


@pytest.mark.usefixtures("small_limits")
@pytest.mark.parametrize("num_candidates", [17, 600])
@pytest.mark.parametrize("k", [1, 90])
@pytest.mark.parametrize("levels", [1, 100_000])
def test_long_rows_equal_the_reference(
    num_candidates: int, k: int, levels: int, device: torch.device
) -> None:
    assert_equals_reference(*candidates((2, num_candidates), levels), k, device)


@pytest.mark.usefixtures("small_limits")
@pytest.mark.parametrize("rank", [1, 64])
@pytest.mark.parametrize("levels", [1, 100_000])
def test_a_cut_that_lets_too_few_or_too_many_pass_is_made_again(
    rank: int, levels: int, monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    monkeypatch.setattr(MODULE, "sample_rank", lambda *_: rank)
    monkeypatch.setattr(MODULE, "list_capacity", lambda *_: 45)
    assert_equals_reference(*candidates((1, 500), levels), 40, device)


@pytest.mark.usefixtures("small_limits")
def test_rows_of_padding_and_short_rows_among_long_ones_are_padded(device: torch.device) -> None:
    scores, item_ids = candidates((3, 400), 100_000)
    scores[1] = -torch.inf
    item_ids[2, 9:] = -1
    assert_equals_reference(scores, item_ids, 20, device)


def test_ids_shared_by_all_rows_need_no_copy(device: torch.device) -> None:
    scores, _ = candidates((3, 90), 4)
    assert_equals_reference(scores, torch.arange(90).expand(3, 90), 20, device)


def test_infinite_and_subnormal_scores_are_ranked(device: torch.device) -> None:
    scores = torch.tensor([[1.0, torch.inf, 1e-45, -1e-45, -3e38, torch.inf, -0.0]])
    assert_equals_reference(scores, torch.arange(7).flip(0)[None], 7, device)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="too slow in the interpreter")
@pytest.mark.parametrize(
    ("num_candidates", "k"), [(9000, 100), (700_000, 2048), (700_000, 300_000)]
)
@pytest.mark.parametrize("levels", [1, 1_000_000])
def test_rows_of_real_length_equal_the_reference(
    num_candidates: int, k: int, levels: int, device: torch.device
) -> None:
    assert_equals_reference(*candidates((3, num_candidates), levels), k, device)

from importlib import import_module

import pytest
import torch
from torch import Tensor

from silvershard.kernels.ranking_triton import list_capacity, new_lists, ranked_lists, sample_rank

MODULE = import_module("silvershard.kernels.ranking_triton")


def keys(scores: Tensor, item_ids: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    bits = scores.view(torch.int32)
    order = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    head = ((~order).long() << 32) | (item_ids >> 31)
    return head, ((item_ids & 0x7FFFFFFF) << 32) | positions


@pytest.mark.parametrize("capacity", [1, 2, 30, 64, 200])
def test_lists_are_sorted_and_decoded(
    capacity: int, monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    monkeypatch.setattr(MODULE, "SORT_TILE", 16)
    generator = torch.Generator().manual_seed(capacity)
    shape = (3, capacity)
    scores = torch.randint(-2, 3, shape, generator=generator).float()
    item_ids = torch.randint(0, 5, shape, generator=generator) * ((1 << 60) + 1)
    positions = torch.randint(0, 1 << 32, shape, generator=generator)
    head, tail = keys(scores, item_ids, positions)
    counts = torch.tensor([capacity + 7, capacity // 2, 0], dtype=torch.int32)
    heads, tails = new_lists(3, capacity, device)
    heads[0], tails[0] = head.to(device), tail.to(device)
    got = ranked_lists(heads, tails, counts.to(device), capacity + 3)
    for row, filled in enumerate((capacity, capacity // 2, 0)):
        order = sorted(
            range(filled),
            key=lambda at: (
                -float(scores[row, at]), int(item_ids[row, at]), int(positions[row, at])
            ),
        )  # fmt: skip
        padding = capacity + 3 - filled
        assert got[0][row].tolist() == scores[row, order].tolist() + [-torch.inf] * padding
        assert got[1][row].tolist() == item_ids[row, order].tolist() + [-1] * padding
        assert got[2][row].tolist() == positions[row, order].tolist() + [-1] * padding


def test_sampled_cuts_rarely_miss() -> None:
    generator = torch.Generator().manual_seed(0)
    population, num_sampled, wanted = 100_000, 4096, 2048
    rank = int(sample_rank(wanted, num_sampled, population))
    capacity = list_capacity(wanted, num_sampled, population)
    assert wanted < capacity < 4 * wanted
    for _ in range(200):
        drawn = torch.randint(0, population, (num_sampled,), generator=generator)
        passing = int(drawn.sort().values[rank - 1]) + 1
        assert wanted <= passing <= capacity


def test_a_list_never_holds_more_than_there_is() -> None:
    assert 10 <= list_capacity(10, 4096, 100) <= 100
    assert list_capacity(5000, 4096, 100) == 100
    assert list_capacity(300_000, 4096, 10_000_000) >= 300_000

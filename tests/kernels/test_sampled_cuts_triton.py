from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor

from silvershard.kernels.ivf_scan_triton import ivf_scan_triton
from silvershard.kernels.sampled_cuts_triton import set_cuts

PoolOf = Callable[..., Any]

SCAN = import_module("silvershard.kernels.ivf_scan_triton")


@pytest.mark.parametrize("num_samples", [64, 4096])
def test_samples_are_distinct_eligible_slots_and_the_cut_is_one_of_them(
    num_samples: int, pool_of: PoolOf, monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    monkeypatch.setattr(SCAN, "SAMPLES", num_samples)
    monkeypatch.setattr(SCAN, "list_capacity", lambda k, *_: 200)
    seen: list[tuple[Tensor, Tensor]] = []

    def kept(cuts: Tensor, lists: Any, *rest: Any) -> None:
        set_cuts(cuts, lists, *rest)
        seen.append((cuts.cpu(), lists.eligible.cpu()))

    monkeypatch.setattr(SCAN, "set_cuts", kept)
    pool = pool_of(2, num_pages=12, dim=4, live=0.8, distinct_scores=True)
    pool.planes[0, 5:9] = 0
    generator = torch.Generator().manual_seed(1)
    none = torch.empty((2, 0, 4), dtype=torch.int64)
    arguments = [
        torch.randint(-127, 128, (2, 4), generator=generator).to(torch.int8),
        torch.ones(2),
        torch.tensor([[0, 1, 2, 3], [0, 0, 0, -1]], dtype=torch.int32),
        *pool.scan_arguments(),
        none,
        none,
        torch.empty((2, 0), dtype=torch.int64),
    ]
    ivf_scan_triton(*(part.to(device) for part in arguments), 20)
    cuts, eligible = seen[0]
    # The second query has too few slots for a cut.
    assert int(eligible[0]) > 200 > int(eligible[1])
    assert cuts[1].tolist() == [(1 << 63) - 1] * 2
    slot = int(cuts[0, 1]) & 0xFFFFFFFF
    scores = pool.codes.view(-1, 4).float() @ arguments[0][0].float() * pool.scales.view(-1)
    live = torch.tensor([pool.bit(0, at) for at in range(pool.num_slots)])
    assert live[slot]
    better = int(((scores >= scores[slot]) & live)[: 11 * 64].sum())
    assert 20 <= better <= 200
    if num_samples == 4096:
        # Every slot is in the sample, so the cut is exactly the slot of the rank that was sought.
        assert better == int(20 + 4 * 20**0.5 + 5)

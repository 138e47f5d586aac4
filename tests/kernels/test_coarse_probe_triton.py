from importlib import import_module

import pytest
import torch
from torch import Tensor

from silvershard.kernels.coarse_probe import coarse_probe_reference
from silvershard.kernels.coarse_probe_triton import coarse_probe_triton
from silvershard.kernels.quantize import quantize_rows_reference

SELECT = import_module("silvershard.kernels.select_topk_triton")


def assert_equals_reference(
    query: Tensor, centroids: Tensor, probes: int, device: torch.device
) -> None:
    arguments = (
        query,
        *quantize_rows_reference(query),
        centroids,
        *quantize_rows_reference(centroids),
    )
    got = coarse_probe_triton(*(part.to(device) for part in arguments), probes)
    expected = coarse_probe_reference(*arguments, probes)
    assert got.dtype == expected.dtype
    assert torch.equal(got.cpu(), expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_queries", "num_clusters", "dim", "probes"),
    [(1, 1, 16, 1), (3, 40, 33, 4), (2, 200, 16, 80), (2, 100, 1024, 3), (17, 50, 1, 1)],
)
@pytest.mark.parametrize("levels", [2, 1000])
def test_probes_equal_the_reference(
    num_queries: int, num_clusters: int, dim: int, probes: int, levels: int, device: torch.device
) -> None:
    generator = torch.Generator().manual_seed(num_clusters + levels)

    def random(rows: int) -> Tensor:
        return torch.randint(-levels, levels + 1, (rows, dim), generator=generator).float() / 7

    assert_equals_reference(random(num_queries), random(num_clusters), probes, device)


def test_many_clusters_are_cut_by_a_sample(
    monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    monkeypatch.setattr(SELECT, "SHORT_ROW", 128)
    monkeypatch.setattr(SELECT, "SAMPLES", 64)
    generator = torch.Generator().manual_seed(0)
    query, centroids = (torch.randn((rows, 24), generator=generator) for rows in (2, 400))
    assert_equals_reference(query, centroids, 5, device)


def test_no_queries_give_no_probes(device: torch.device) -> None:
    assert_equals_reference(torch.ones((0, 8)), torch.ones((40, 8)), 3, device)

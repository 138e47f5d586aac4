import pytest
import torch
from torch import Tensor

from silvershard.model.clustering import spherical_kmeans


def mixture(num_items: int, num_centres: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    centres = torch.nn.functional.normalize(
        torch.randn(num_centres, 16, generator=generator), dim=1
    )
    label = torch.randint(num_centres, (num_items,), generator=generator)
    noise = 0.05 * torch.randn(num_items, 16, generator=generator)
    return torch.nn.functional.normalize(centres[label] + noise, dim=1), label


def test_planted_clusters_are_found() -> None:
    items, label = mixture(2000, 8)
    found = spherical_kmeans(items, 32, seed=1)
    purity = sum(
        int(torch.bincount(label[found.assignment == one]).max())
        for one in found.assignment.unique().tolist()
    )
    assert purity / 2000 > 0.99


def test_items_lie_at_their_nearest_centre_when_no_list_is_full() -> None:
    items, _ = mixture(1000, 8)
    found = spherical_kmeans(items, 8, seed=1, max_imbalance=8)
    assert torch.equal(found.assignment, (items @ found.centroids.T).argmax(1))


def test_the_same_arguments_give_the_same_bits() -> None:
    items, _ = mixture(500, 5)
    first, again = (spherical_kmeans(items, 20, seed=4) for _ in range(2))
    assert torch.equal(first.centroids, again.centroids)
    assert torch.equal(first.assignment, again.assignment)


@pytest.mark.parametrize("max_imbalance", [1.0, 1.5, 4.0])
def test_no_list_is_longer_than_allowed_even_when_all_items_are_equal(max_imbalance: float) -> None:
    items = torch.nn.functional.normalize(torch.ones(300, 4), dim=1)
    found = spherical_kmeans(items, 10, seed=0, max_imbalance=max_imbalance)
    sizes = torch.bincount(found.assignment, minlength=10)
    assert int(sizes.sum()) == 300
    assert int(sizes.max()) <= 30 * max_imbalance


def test_fewer_items_than_clusters_leave_clusters_empty() -> None:
    items, _ = mixture(3, 3)
    found = spherical_kmeans(items, 10, seed=0)
    assert found.centroids.shape == (10, 16)
    assert sorted(found.assignment.tolist()) == [0, 1, 2]


def test_no_item_at_all_gives_empty_clusters() -> None:
    found = spherical_kmeans(torch.zeros(0, 8), 4, seed=0)
    assert found.assignment.shape == (0,)
    assert torch.equal(found.centroids, torch.zeros(4, 8))


def test_bad_arguments_are_refused() -> None:
    items = torch.zeros(4, 8)
    with pytest.raises(ValueError, match="items must be"):
        spherical_kmeans(items.double(), 2, seed=0)
    with pytest.raises(ValueError, match="num_clusters"):
        spherical_kmeans(items, 0, seed=0)
    with pytest.raises(ValueError, match="max_imbalance"):
        spherical_kmeans(items, 2, seed=0, max_imbalance=0.5)

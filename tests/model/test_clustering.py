import math

import pytest
import torch
from torch import Tensor

from silvershard.model import clustering
from silvershard.model.clustering import (
    Clustering,
    assign_clusters,
    nearest_clusters,
    spherical_kmeans,
)


def mixture(num_items: int, num_centres: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    centres = torch.nn.functional.normalize(
        torch.randn(num_centres, 16, generator=generator), dim=1
    )
    label = torch.randint(num_centres, (num_items,), generator=generator)
    noise = 0.05 * torch.randn(num_items, 16, generator=generator)
    return torch.nn.functional.normalize(centres[label] + noise, dim=1), label


def spread(num_items: int, dim: int = 16, seed: int = 0) -> Tensor:
    """Items without clusters, most of them near one pole, so that lists overflow."""
    generator = torch.Generator().manual_seed(seed)
    items = torch.randn(num_items, dim, generator=generator)
    items[:, 0] += 2
    return torch.nn.functional.normalize(items, dim=1)


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clustering, "_MIN_BATCH", 64)
    monkeypatch.setattr(clustering, "_BATCH_PER_CLUSTER", 8)


def same(one: Clustering, other: Clustering) -> bool:
    return torch.equal(one.centroids, other.centroids) and torch.equal(
        one.assignment, other.assignment
    )


def served(items: Tensor, found: Clustering) -> float:
    """Mean inner product of the items and their centres."""
    return float((items * found.centroids[found.assignment]).sum(1).mean())


def test_planted_clusters_are_found() -> None:
    items, label = mixture(2000, 8)
    found = spherical_kmeans(items, 32, seed=1)
    purity = sum(
        int(torch.bincount(label[found.assignment == one]).max())
        for one in found.assignment.unique().tolist()
    )
    assert purity / 2000 > 0.99


@pytest.mark.usefixtures("small_batches")
def test_batches_serve_the_items_as_well_as_the_whole_sample_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    items = spread(6000)
    batches = spherical_kmeans(items, 40, seed=1)
    untrained = spherical_kmeans(items, 40, seed=1, iterations=0)
    monkeypatch.setattr(clustering, "_MIN_BATCH", 6000)
    whole = spherical_kmeans(items, 40, seed=1)
    gained = served(items, whole) - served(items, untrained)
    assert gained > 0.02
    assert served(items, batches) > served(items, whole) - 0.1 * gained


def test_items_lie_at_their_nearest_centre_when_no_list_is_full() -> None:
    items, _ = mixture(1000, 8)
    found = spherical_kmeans(items, 8, seed=1, max_imbalance=8)
    assert torch.equal(found.assignment, (items @ found.centroids.T).argmax(1))


@pytest.mark.parametrize("num_clusters", [255, 256, 257, 300])
def test_the_nearest_of_many_centres_is_found_among_those_that_are_open(num_clusters: int) -> None:
    generator = torch.Generator().manual_seed(num_clusters)
    codes, part = (
        torch.randint(-900, 900, (count, 16), generator=generator).float()
        for count in (num_clusters, 50)
    )
    codes[-1] = codes[0]
    closed = torch.rand(num_clusters, generator=generator) < 0.4
    for shut in (None, closed, ~closed):
        scores = part @ codes.T
        if shut is not None:
            scores[:, shut] = -torch.inf
        best, which = clustering._best(part, codes, shut)
        assert torch.equal(best, scores.amax(1))
        assert torch.equal(scores.gather(1, which[:, None])[:, 0], best)
        assert shut is None or not bool(shut[which].any())


def test_centres_are_of_unit_length() -> None:
    found = spherical_kmeans(spread(500), 20, seed=0)
    assert torch.allclose(found.centroids.norm(dim=1), torch.ones(20), atol=1e-6)


@pytest.mark.usefixtures("small_batches")
def test_the_bits_do_not_depend_on_threads_or_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    items = spread(3000, 33)
    threads = torch.get_num_threads()
    results = []
    try:
        for count, chunk in ((1, 1 << 19), (1, 1 << 19), (2, 1 << 19), (2, 997), (1, 40_000)):
            torch.set_num_threads(count)
            monkeypatch.setattr(clustering, "_CHUNK_ELEMENTS", chunk)
            results.append(spherical_kmeans(items, 300, seed=4, iterations=12, max_imbalance=1.2))
    finally:
        torch.set_num_threads(threads)
    assert all(same(results[0], one) for one in results[1:])


def test_every_product_that_decides_is_a_whole_number_that_float32_holds() -> None:
    items = torch.nn.functional.normalize(torch.rand(4, clustering._MAX_DIM) + 0.5, dim=1)
    codes = clustering._codes(items)
    assert torch.equal(codes, codes.round())
    assert int((codes.long() @ codes.long().T).max()) < 1 << 24


def test_another_seed_gives_other_centres() -> None:
    items = spread(500)
    one, other = (spherical_kmeans(items, 20, seed=seed) for seed in (4, 5))
    assert not torch.equal(one.centroids, other.centroids)


def test_the_lengths_of_the_items_do_not_matter() -> None:
    items = spread(500)
    powers = 2.0 ** torch.arange(500).remainder(240).sub(120)[:, None]
    assert same(spherical_kmeans(items, 20, seed=0), spherical_kmeans(items * powers, 20, seed=0))


def test_only_a_sample_of_the_items_trains() -> None:
    items = spread(4000)
    sample = torch.randperm(4000, generator=torch.Generator().manual_seed(3))[:200]
    others = torch.ones(4000, dtype=torch.bool).index_fill(0, sample, False)
    changed = items.clone()
    changed[others] = -items[others]
    first, again = (
        spherical_kmeans(one, 20, seed=3, sample_per_cluster=10, max_imbalance=20)
        for one in (items, changed)
    )
    assert torch.equal(first.centroids, again.centroids)
    assert torch.equal(first.assignment[sample], again.assignment[sample])


def test_a_centre_that_starves_moves_to_an_item_of_a_large_cluster() -> None:
    batch = spread(100, 4)
    centroids = torch.eye(4)
    sums, sizes = (100 * torch.eye(4)).long(), torch.tensor([60, 1, 0, 39])
    assignment = torch.tensor([0] * 60 + [1] + [3] * 39)
    clustering._reseed(centroids, sums, sizes, batch, assignment)
    assert torch.allclose(centroids[2], batch[0])
    assert torch.allclose(centroids[1], batch[61])
    assert torch.equal(centroids[[0, 3]], torch.eye(4)[[0, 3]])
    assert sizes.tolist() == [60, 0, 0, 39]
    assert sums.any(1).tolist() == [True, False, False, True]


def test_an_item_far_from_all_others_gets_no_list_of_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    items = spread(4000)
    items[:, 0] = items[:, 0].abs() + 0.5
    items[3] = torch.eye(16)[0] * -1
    order = torch.arange(4000)
    monkeypatch.setattr(torch, "randperm", lambda count, generator: order[:count])
    found = spherical_kmeans(items, 20, seed=0)
    assert int(torch.bincount(found.assignment, minlength=20).min()) > 10


@pytest.mark.parametrize("max_imbalance", [1.0, 1.5, 4.0, float("inf")])
@pytest.mark.parametrize("num_clusters", [1, 7, 300])
def test_no_list_is_longer_than_allowed(max_imbalance: float, num_clusters: int) -> None:
    items = spread(2000)
    found = spherical_kmeans(items, num_clusters, seed=0, max_imbalance=max_imbalance)
    sizes = torch.bincount(found.assignment, minlength=num_clusters)
    assert int(sizes.sum()) == 2000
    assert int(sizes.max()) <= math.ceil(min(2000 * max_imbalance / num_clusters, 2000))


@pytest.mark.parametrize("max_imbalance", [1.0, 1.5, 4.0])
def test_no_list_is_longer_than_allowed_even_when_all_items_are_equal(max_imbalance: float) -> None:
    items = torch.nn.functional.normalize(torch.ones(300, 4), dim=1)
    found = spherical_kmeans(items, 10, seed=0, max_imbalance=max_imbalance)
    sizes = torch.bincount(found.assignment, minlength=10)
    assert int(sizes.sum()) == 300
    assert int(sizes.max()) <= 30 * max_imbalance


def test_duplicates_in_huge_numbers_leave_the_other_items_where_they_belong() -> None:
    items, _ = mixture(3000, 20)
    items[:2000] = items[0]
    items[2000:2010] = 0
    found = spherical_kmeans(items, 30, seed=0, max_imbalance=2)
    sizes = torch.bincount(found.assignment, minlength=30)
    assert int(sizes.sum()) == 3000
    assert int(sizes.max()) <= 200
    nearest = (items[2010:] @ found.centroids.T).amax(1)
    own = (items[2010:] * found.centroids[found.assignment[2010:]]).sum(1)
    assert float((own > nearest - 0.01).float().mean()) > 0.7


def test_a_list_that_is_too_long_turns_away_those_that_lose_least_ties_by_order() -> None:
    # Scores at the centres (1, 0), (0, 1), (-1, 0): every item is nearest to the first.
    rows = torch.tensor([[3.0, 1], [3, 2], [3, 1], [3, 2.5], [3, 2], [9, 1]])
    codes = clustering._codes(torch.tensor([[1.0, 0], [0, 1], [-1, 0]]))
    start = torch.zeros(6, dtype=torch.int64)
    assert clustering._balanced(rows, codes, start, 5).tolist() == [0, 0, 0, 1, 0, 0]
    assert clustering._balanced(rows, codes, start, 4).tolist() == [0, 0, 0, 1, 1, 0]
    assert clustering._balanced(rows, codes, start, 3).tolist() == [0, 1, 0, 1, 1, 0]
    # The second list is full with three; the first keeps the two best, ties to the earlier item.
    assert clustering._balanced(rows, codes, start, 2).tolist() == [0, 1, 2, 1, 2, 0]


def test_what_no_round_can_place_fills_the_shortest_lists_evenly() -> None:
    sizes = torch.tensor([5, 0, 2, 5, 1])
    for count, grown in ((1, [0]), (3, [0, 0, 0]), (12, None)):
        clusters = clustering._shortest(sizes, count, 5)
        after = sizes + torch.bincount(clusters, minlength=5)
        assert len(clusters) == count
        assert int(after.max()) <= 5
        assert grown is None or int(after.min()) >= 1


def test_fewer_items_than_clusters_leave_clusters_empty() -> None:
    items, _ = mixture(3, 3)
    found = spherical_kmeans(items, 10, seed=0)
    assert found.centroids.shape == (10, 16)
    assert sorted(found.assignment.tolist()) == [0, 1, 2]


def test_no_item_at_all_gives_empty_clusters() -> None:
    found = spherical_kmeans(torch.zeros(0, 8), 4, seed=0)
    assert found.assignment.shape == (0,)
    assert torch.equal(found.centroids, torch.zeros(4, 8))


def test_items_without_a_direction_are_placed_somewhere() -> None:
    found = spherical_kmeans(torch.zeros(10, 8), 4, seed=0, max_imbalance=1)
    sizes = torch.bincount(found.assignment, minlength=4)
    assert (int(sizes.sum()), int(sizes.max())) == (10, 3)


def test_bad_arguments_are_refused() -> None:
    items = torch.zeros(4, 8)
    with pytest.raises(ValueError, match="items must be"):
        spherical_kmeans(items.double(), 2, seed=0)
    with pytest.raises(ValueError, match="items must have D"):
        spherical_kmeans(torch.zeros(4, 0), 2, seed=0)
    with pytest.raises(ValueError, match="num_clusters"):
        spherical_kmeans(items, 0, seed=0)
    with pytest.raises(ValueError, match="iterations"):
        spherical_kmeans(items, 2, seed=0, iterations=-1)
    with pytest.raises(ValueError, match="sample_per_cluster"):
        spherical_kmeans(items, 2, seed=0, sample_per_cluster=0)
    for wrong in (0.5, float("nan")):
        with pytest.raises(ValueError, match="max_imbalance"):
            spherical_kmeans(items, 2, seed=0, max_imbalance=wrong)
    for value in (float("nan"), float("inf")):
        items[3, 7] = value
        with pytest.raises(ValueError, match="items must be finite"):
            spherical_kmeans(items, 2, seed=0)


def test_given_centroids_get_the_items_that_they_score_best() -> None:
    items, _ = mixture(1000, 8)
    centroids = 3 * spherical_kmeans(items, 8, seed=1).centroids + 0.01
    found = assign_clusters(items, centroids, max_imbalance=8)
    assert torch.allclose(found.centroids, torch.nn.functional.normalize(centroids, dim=1))
    scores = items @ found.centroids.T
    own = scores.gather(1, found.assignment[:, None])[:, 0]
    # Items and centroids are compared in steps of 1/4000.
    assert (own - scores.amax(1)).min() > -1e-3
    assert (found.assignment == scores.argmax(1)).float().mean() > 0.98


def test_centroids_of_the_items_themselves_give_the_same_clusters_again() -> None:
    items = spread(2000)
    found = spherical_kmeans(items, 20, seed=0)
    again = assign_clusters(items, found.centroids)
    assert torch.equal(again.assignment, found.assignment)


def test_lists_of_given_centroids_are_no_longer_than_asked_for() -> None:
    items = spread(1000)
    centroids = -spread(20, seed=2)
    centroids[0] = torch.eye(16)[0]
    free = assign_clusters(items, centroids, max_imbalance=20)
    assert torch.bincount(free.assignment).max() > 500
    found = assign_clusters(items, centroids)
    assert torch.bincount(found.assignment).max() == 200
    assert torch.equal(found.centroids, free.centroids)


def test_the_assignment_to_given_centroids_does_not_depend_on_threads_or_chunks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    items, centroids = spread(3000), spread(300, seed=1)
    before, results = torch.get_num_threads(), []
    try:
        for threads, elements in ((1, 1 << 19), (2, 1 << 12)):
            torch.set_num_threads(threads)
            monkeypatch.setattr(clustering, "_CHUNK_ELEMENTS", elements)
            results.append(assign_clusters(items, centroids))
    finally:
        torch.set_num_threads(before)
    assert same(*results)


def test_centroids_that_cannot_be_used_are_refused() -> None:
    items = spread(10, dim=4)
    for centroids, problem in (
        (torch.ones(3, 5), "D of the items, 4, got 5"),
        (torch.ones(3, 4).double(), r"\(C, D\) float32 with C >= 1, got \(3, 4\) torch.float64"),
        (torch.ones(0, 4), "C >= 1"),
        (torch.full((3, 4), torch.inf), "finite"),
        (torch.zeros(3, 4), "no row of zeros"),
    ):
        with pytest.raises(ValueError, match=problem):
            assign_clusters(items, centroids)
    with pytest.raises(ValueError, match="max_imbalance"):
        assign_clusters(items, torch.ones(3, 4), max_imbalance=0.5)
    assert assign_clusters(torch.zeros(0, 4), torch.ones(3, 4)).assignment.shape == (0,)


@pytest.mark.parametrize("num_clusters", [3, 40, 300])
def test_an_item_that_comes_later_goes_where_it_would_go_in_lists_without_a_limit(
    num_clusters: int,
) -> None:
    items = spread(2000)
    whole = assign_clusters(items, spread(num_clusters, seed=1), max_imbalance=num_clusters)
    found = nearest_clusters(items, whole.centroids)
    assert found.dtype == torch.int32
    assert torch.equal(found.long(), whole.assignment)
    alone = torch.cat([nearest_clusters(items[at : at + 1], whole.centroids) for at in range(50)])
    assert torch.equal(alone, found[:50])
    assert nearest_clusters(items[:0], whole.centroids).shape == (0,)


def test_of_equally_near_clusters_the_smallest_takes_the_item() -> None:
    items = spread(500)
    centroids = assign_clusters(items, spread(20, seed=1)).centroids
    twice = torch.cat([centroids, centroids, centroids])
    assert torch.equal(nearest_clusters(items, twice), nearest_clusters(items, centroids))
    # The 400 of them are more than what one row is searched for at a time.
    many = centroids.repeat(20, 1)
    assert torch.equal(nearest_clusters(items, many), nearest_clusters(items, centroids))


def test_nothing_goes_to_a_cluster_that_nothing_was_left_for() -> None:
    centroids = torch.zeros(3, 16)
    centroids[1] = torch.eye(16)[0]
    away = -torch.eye(16)[:2]
    assert nearest_clusters(away, centroids).tolist() == [1, 1]
    assert nearest_clusters(away, torch.zeros(3, 16)).tolist() == [0, 0]

"""Centroids and assignments of items to clusters: seeded, balanced spherical k-means.

Shapes: n items, C clusters, D embedding dimension.

Source: Dhillon and Modha, "Concept Decompositions for Large Sparse Text Data Using Clustering",
Machine Learning 42, 2001, section 3 (spherical k-means).
"""

from typing import NamedTuple

import torch
from torch import Tensor

_CHUNK_ELEMENTS = 1 << 24


class Clustering(NamedTuple):
    """Cluster centres and where every item went."""

    centroids: Tensor
    """``(C, D)`` float32, unit length."""
    assignment: Tensor
    """``(n,)`` int64."""


def _nearest(items: Tensor, centroids: Tensor, choices: int) -> tuple[Tensor, Tensor]:
    """Return scores and indices ``(n, choices)`` of the best centroids, computed in chunks."""
    rows = max(_CHUNK_ELEMENTS // centroids.shape[0], 1)
    found = [torch.topk(chunk @ centroids.T, choices, 1) for chunk in items.split(rows)]
    return torch.cat([one.values for one in found]), torch.cat([one.indices for one in found])


def _balanced(scores: Tensor, choices: Tensor, num_clusters: int, capacity: int) -> Tensor:
    """Return assignments that fill no cluster beyond ``capacity``.

    Items are placed in the order of how much they gain from their first choice, so that a full
    cluster turns away those that lose least. An item all of whose choices are full goes to the
    emptiest cluster.
    """
    assignment = choices[:, 0].clone()
    sizes = torch.bincount(assignment, minlength=num_clusters)
    if int(sizes.max()) <= capacity:
        return assignment
    gain = scores[:, 0] - scores[:, -1]
    room = [capacity] * num_clusters
    order = torch.argsort(gain, descending=True, stable=True).tolist()
    table = choices.tolist()
    for item in order:
        for cluster in table[item]:
            if room[cluster]:
                break
        else:
            cluster = max(range(num_clusters), key=lambda one: (room[one], -one))
        room[cluster] -= 1
        assignment[item] = cluster
    return assignment


def spherical_kmeans(
    items: Tensor,
    num_clusters: int,
    *,
    seed: int,
    iterations: int = 20,
    max_imbalance: float = 4.0,
) -> Clustering:
    """Cluster unit vectors by inner product.

    The result depends only on the arguments. No list is longer than ``max_imbalance`` times the
    mean
    (rounded up), so that one probe never reads a large part of the catalogue.

    Args:
        items: ``(n, D)`` float32, unit length.
        num_clusters: C; clusters beyond the number of items stay empty.
        seed: of the initial centres.
        iterations: refinement steps after the initial centres.
        max_imbalance: longest list over mean list, at least 1.

    Raises:
        ValueError: if a shape or a setting is out of range.
    """
    if items.ndim != 2 or items.dtype != torch.float32:
        raise ValueError(f"items must be (n, D) float32, got {tuple(items.shape)} {items.dtype}")
    if num_clusters < 1:
        raise ValueError(f"num_clusters must be at least 1, got {num_clusters}")
    if max_imbalance < 1:
        raise ValueError(f"max_imbalance must be at least 1, got {max_imbalance}")
    count, dim = items.shape
    generator = torch.Generator().manual_seed(seed)
    centroids = torch.zeros(num_clusters, dim)
    used = min(num_clusters, count)
    centroids[:used] = items[torch.randperm(count, generator=generator)[:used]]
    if not used:
        return Clustering(centroids, torch.zeros(0, dtype=torch.int64))
    assignment = torch.zeros(count, dtype=torch.int64)
    for _ in range(iterations):
        best, choice = _nearest(items, centroids[:used], 1)
        assignment = choice[:, 0]
        sums = torch.zeros(used, dim).index_add_(0, assignment, items)
        empty = torch.nonzero(torch.bincount(assignment, minlength=used) == 0).flatten()
        if empty.numel():
            # An empty centre restarts at the items that their own centre serves worst.
            worst = torch.argsort(best[:, 0], stable=True)[: empty.numel()]
            sums[empty] = items[worst]
        centroids[:used] = torch.nn.functional.normalize(sums, dim=1)
    capacity = max(int(-(-count * max_imbalance // num_clusters)), 1)
    scores, choices = _nearest(items, centroids[:used], min(8, used))
    return Clustering(centroids, _balanced(scores, choices, used, capacity))

"""Centroids and assignments of items to clusters: seeded, balanced mini-batch spherical k-means.

Items and centres are rounded to integers so small that every inner product is exact in float32, and
centres are sums of such integers. No result therefore depends on the order in which a matrix
product or a sum was done: the bytes are the same for any number of threads, any chunk and any
device.

Shapes: n items, C clusters, D embedding dimension, m rows of a chunk.

Source: Sculley, "Web-Scale K-Means Clustering", WWW 2010, algorithm 1 (mini-batches and a learning
rate per centre).
Source: Dhillon and Modha, "Concept Decompositions for Large Sparse Text Data Using Clustering",
Machine Learning 42, 2001, section 3 (spherical k-means).
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from silvershard.kernels import fixed_dot, fixed_sqrt

SAMPLE_PER_CLUSTER = 1024
"""Most items that train one centre; the number of batches, not this, bounds the work."""
MAX_IMBALANCE = 4.0
"""Longest list over mean list, where nothing else is asked for."""
# Two unit vectors in steps of 1/4000 have an inner product of at most 4000² (1 + sqrt(D) / 8000)²,
# below 2**24 up to this D.
_STEPS = 4000
_MAX_DIM = 32768
_BATCH_PER_CLUSTER = 32
_MIN_BATCH = 1 << 14
# 2 MB of scores stay in the second-level cache between the product and the maximum.
_CHUNK_ELEMENTS = 1 << 19
_ARGMAX_FOLD = 16
_SETTLING = 4
_RESEED_SHARE = 16
_BALANCE_ROUNDS = 8


class Clustering(NamedTuple):
    """Cluster centres and where every item went."""

    centroids: Tensor
    """``(C, D)`` float32, unit length."""
    assignment: Tensor
    """``(n,)`` int64."""


def default_clusters(num_items: int) -> int:
    """Return a power of two near 2.6 times the root of the number of items."""
    return 1 << max(round(math.log2(2.6 * math.sqrt(max(num_items, 1)))), 0)


def spherical_kmeans(
    items: Tensor,
    num_clusters: int,
    *,
    seed: int,
    iterations: int = 60,
    max_imbalance: float = MAX_IMBALANCE,
    sample_per_cluster: int = SAMPLE_PER_CLUSTER,
) -> Clustering:
    """Cluster vectors by the direction they point in, on the device they are on.

    The result depends only on the arguments: not on threads, chunks or, while float32 products are
    not shortened (TF32 is off by default), the device. No list is longer than ``max_imbalance``
    times the mean (rounded up), so that one probe never reads a large part of the catalogue: a
    list that is too long turns away the items that lose least, ties by item order.

    Work is bounded by ``iterations`` batches of 32 items per cluster (at least 16,384 items), one
    pass over all items and the balancing; beside the items, memory holds one batch and some
    integers per item. A sample that fits one batch is used whole in every iteration, which is
    Lloyd's algorithm.

    Args:
        items: ``(n, D)`` float32, finite; their lengths do not matter. D at most 32,768.
        num_clusters: C; clusters beyond the number of items stay empty.
        seed: of the sample and the initial centres.
        iterations: batches after the initial centres.
        max_imbalance: longest list over mean list, at least 1.
        sample_per_cluster: the centres are trained on at most this many items per cluster.

    Raises:
        ValueError: if a shape or a setting is out of range, or a value is not finite.
    """
    _check(items, max_imbalance)
    if num_clusters < 1:
        raise ValueError(f"num_clusters must be at least 1, got {num_clusters}")
    if iterations < 0:
        raise ValueError(f"iterations must be at least 0, got {iterations}")
    if sample_per_cluster < 1:
        raise ValueError(f"sample_per_cluster must be at least 1, got {sample_per_cluster}")
    count, dim = items.shape
    centroids = torch.zeros(num_clusters, dim, device=items.device)
    used = min(num_clusters, count)
    if not used:
        return Clustering(centroids, torch.zeros(0, dtype=torch.int64, device=items.device))
    centroids[:used] = _train(items, used, seed, iterations, sample_per_cluster * num_clusters)
    return Clustering(centroids, _assigned(items, centroids[:used], num_clusters, max_imbalance))


def assign_clusters(
    items: Tensor, centroids: Tensor, *, max_imbalance: float = MAX_IMBALANCE
) -> Clustering:
    """Put every item at its best centroid, on the device they are on.

    The result depends only on the arguments, as that of ``spherical_kmeans`` does, and no list is
    longer than there: one that is too long turns away the items that lose least.

    Args:
        items: ``(n, D)`` float32, finite; their lengths do not matter. D at most 32,768.
        centroids: ``(C, D)`` float32, finite, no row of zeros; their lengths do not matter.
        max_imbalance: longest list over mean list, at least 1.

    Raises:
        ValueError: if a shape or a setting is out of range, or a value is not finite.
    """
    _check(items, max_imbalance)
    if centroids.ndim != 2 or centroids.dtype != torch.float32 or not len(centroids):
        raise ValueError(
            f"centroids must be (C, D) float32 with C >= 1, got {tuple(centroids.shape)} "
            f"{centroids.dtype}"
        )
    if centroids.shape[1] != items.shape[1]:
        raise ValueError(
            f"centroids must have the D of the items, {items.shape[1]}, got {centroids.shape[1]}"
        )
    if not bool(centroids.isfinite().all()):
        raise ValueError("centroids must be finite")
    if not bool(centroids.any(1).all()):
        raise ValueError("centroids must have no row of zeros")
    unit = _unit(centroids)
    return Clustering(unit, _assigned(items, unit, len(unit), max_imbalance))


def nearest_clusters(items: Tensor, centroids: Tensor) -> Tensor:
    """Return the cluster ``(n,)`` int32 that each item is nearest to, ties to the smaller number.

    What is compared is what ``spherical_kmeans`` compares, without the balance of its lists: an
    item that comes later goes to its best centroid however long that list is. Centroids of zeros
    are those of clusters that nothing was left for; nothing goes to them.

    Args:
        items: ``(n, D)`` float32, finite, in host memory; their lengths do not matter.
        centroids: ``(C, D)`` float32 of unit length, or zeros.
    """
    codes = _codes(centroids)
    unused = ~codes.any(1)
    nearest = torch.zeros(len(items), dtype=torch.int32)
    for window, part in _chunks(items, len(codes)):
        scores = (part @ codes.T).masked_fill_(unused, -torch.inf)
        # The first of equal ones, which torch does not promise.
        nearest[window] = torch.from_numpy(scores.numpy().argmax(1))
    return nearest


def _check(items: Tensor, max_imbalance: float) -> None:
    if items.ndim != 2 or items.dtype != torch.float32:
        raise ValueError(f"items must be (n, D) float32, got {tuple(items.shape)} {items.dtype}")
    if not 1 <= items.shape[1] <= _MAX_DIM:
        raise ValueError(f"items must have D in [1, {_MAX_DIM}], got {items.shape[1]}")
    if not max_imbalance >= 1:
        raise ValueError(f"max_imbalance must be at least 1, got {max_imbalance}")
    if not all(bool(part.isfinite().all()) for part in items.split(_rows_of(items.shape[1]))):
        raise ValueError("items must be finite")


def _assigned(items: Tensor, centroids: Tensor, num_clusters: int, max_imbalance: float) -> Tensor:
    """Return the cluster ``(n,)`` int64 of every item among the centroids, no list too long."""
    codes, count = _codes(centroids), len(items)
    # Filled in place: small tensors kept between large ones that are freed would tear the heap.
    assignment = torch.empty(count, dtype=torch.int64, device=items.device)
    for window, part in _chunks(items, len(centroids)):
        assignment[window] = _best(part, codes)[1]
    capacity = math.ceil(min(count * max_imbalance / num_clusters, count))
    return _balanced(items, codes, assignment, capacity)


def _train(items: Tensor, used: int, seed: int, iterations: int, most: int) -> Tensor:
    """Return centres ``(used, D)`` of unit length, from batches of a sample of the items."""
    generator = torch.Generator().manual_seed(seed)
    sample = torch.randperm(items.shape[0], generator=generator)[:most].to(items.device)
    centroids = _unit(items[sample[:used]])
    batches = -(-len(sample) // max(_BATCH_PER_CLUSTER * used, _MIN_BATCH))
    sums = torch.zeros(centroids.shape, dtype=torch.int64, device=items.device)
    sizes = torch.zeros(used, dtype=torch.int64, device=items.device)
    parts = sample.tensor_split(batches)
    for step in range(iterations):
        batch = items[parts[step % batches]]
        # A centre is the mean of its items of the latest batches, of more of them as it settles.
        # Sculley's rate, one over all items so far, never forgets where a centre was while it knew
        # nothing; a sample that is one batch forgets all, which is Lloyd's step.
        memory = min(batches, 1 + step // _SETTLING)
        sums -= -(-sums // memory)
        sizes -= -(-sizes // memory)
        codes = _codes(centroids)
        assignment = torch.empty(len(batch), dtype=torch.int64, device=items.device)
        for window, part in _chunks(batch, used):
            nearest = _best(part, codes)[1]
            assignment[window] = nearest
            sums.index_add_(0, nearest, part.to(torch.int64))
        sizes += torch.bincount(assignment, minlength=used)
        # A centre whose members cancel out stays where it is.
        moved = _unit(sums.float())
        centroids = torch.where(moved.any(1, keepdim=True), moved, centroids)
        if step < iterations - batches:
            _reseed(centroids, sums, sizes, batch, assignment)
    return centroids


def _reseed(
    centroids: Tensor, sums: Tensor, sizes: Tensor, batch: Tensor, assignment: Tensor
) -> None:
    """Move centres that starve to an item of the largest clusters, which they then share."""
    used = len(sizes)
    present = torch.bincount(assignment, minlength=used)
    donors = torch.argsort(sizes, descending=True, stable=True)
    donors = donors[(sizes[donors] * used > sizes.sum()) & (present[donors] > 1)]
    hungry = torch.argsort(sizes, stable=True)
    hungry = hungry[sizes[hungry] * used * _RESEED_SHARE < sizes.sum()][: len(donors)]
    donors = donors[: len(hungry)]
    by_cluster = torch.argsort(assignment, stable=True)
    chosen = by_cluster[(present.cumsum(0) - present)[donors]]
    centroids[hungry] = _unit(batch[chosen])
    sums[hungry] = 0
    sizes[hungry] = 0


def _balanced(items: Tensor, codes: Tensor, assignment: Tensor, capacity: int) -> Tensor:
    """Return assignments that fill no cluster beyond ``capacity``.

    In every round the clusters that are too long keep the items that would lose most and pass the
    others to the best cluster with room. A cluster that was full once takes nothing more, so that
    nothing is passed in circles. What is left after some rounds fills the shortest lists.
    """
    used = codes.shape[0]
    assignment = assignment.clone()
    for last in [False] * _BALANCE_ROUNDS + [True]:
        sizes = torch.bincount(assignment, minlength=used)
        if int(sizes.max()) <= capacity:
            break
        members = torch.nonzero((sizes > capacity)[assignment]).flatten()
        own = assignment[members]
        closed = sizes >= capacity
        loss, other = torch.empty(len(own), device=items.device), torch.empty_like(own)
        for window, part in _chunks(items, used, members):
            score, other[window] = _best(part, codes, closed)
            loss[window] = (part * codes[own[window]]).sum(1) - score
        order = torch.argsort(loss, descending=True, stable=True)
        order = order[torch.argsort(own[order], stable=True)]
        ahead = sizes.where(sizes > capacity, 0).cumsum(0) - sizes
        rank = torch.arange(len(order), device=items.device) - ahead[own[order]]
        away = order[rank >= capacity].sort().values
        assignment[members[away]] = (
            _shortest(sizes.clamp(max=capacity), len(away), capacity) if last else other[away]
        )
    return assignment


def _shortest(sizes: Tensor, count: int, capacity: int) -> Tensor:
    """Return a cluster for each of ``count`` items, so that the shortest lists grow evenly."""
    low, high = 0, capacity
    while low < high:
        level = (low + high) // 2
        if int((level - sizes).clamp(min=0).sum()) >= count:
            high = level
        else:
            low = level + 1
    room = (low - sizes).clamp(min=0)
    clusters = torch.arange(len(sizes), device=sizes.device)
    return clusters.repeat_interleave(room)[:count]


def _rows_of(width: int) -> int:
    return max(_CHUNK_ELEMENTS // width, 1)


def _chunks(items: Tensor, used: int, rows: Tensor | None = None) -> Iterator[tuple[slice, Tensor]]:
    """Yield the codes of the items, or of some rows of them, a few at a time and which they are."""
    step = _rows_of(max(used, items.shape[1]))
    for start in range(0, len(items if rows is None else rows), step):
        window = slice(start, start + step)
        yield window, _codes(_unit(items[window] if rows is None else items[rows[window]]))


def _unit(rows: Tensor) -> Tensor:
    """Return rows of length 1 in the same directions; rows of zeros stay zeros."""
    # Scaled by its largest value first, no row is too long or too short to be squared.
    scaled = rows / rows.abs().amax(1, keepdim=True)
    return torch.where(
        rows.any(1, keepdim=True), scaled / fixed_sqrt(fixed_dot(scaled, scaled))[:, None], 0.0
    )


def _codes(rows: Tensor) -> Tensor:
    """Return unit rows as whole numbers of steps, float32."""
    return torch.round(rows * _STEPS)


def _best(part: Tensor, codes: Tensor, closed: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the best score and its centre ``(m,)`` among centres that are not closed."""
    used = codes.shape[0]
    width = -(-used // _ARGMAX_FOLD)
    if used < _ARGMAX_FOLD * _ARGMAX_FOLD:
        scores = part @ codes.T
        if closed is not None:
            scores.masked_fill_(closed, -torch.inf)
        best, where = scores.max(1)
        return best, where
    # The maximum of one row with its index is slow in torch; the elementwise maximum of 16 parts
    # of the row is not. The last part is filled up with the first centres.
    filled = torch.cat([codes, codes[: width * _ARGMAX_FOLD - used]])
    scores = part @ filled.T  # (m, 16 width)
    if closed is not None:
        scores.masked_fill_(torch.cat([closed, closed[: len(filled) - used]]), -torch.inf)
    folded = scores.view(-1, _ARGMAX_FOLD, width)
    best, column = folded.amax(1).max(1)
    which = folded.gather(2, column[:, None, None].expand(-1, _ARGMAX_FOLD, 1)).max(1).indices
    return best, (which[:, 0] * width + column) % used

"""How good rankings are, and whether two of them are the same.

Shapes: B users (or requests), K ranks, N items.
"""

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

PADDING = -1

Relevant = Sequence[Collection[int]] | NDArray[np.int64] | Tensor
"""The held-out items of each user: a set each, or one id each ``(B,)``."""


class Ranking(Protocol):
    """Item ids best first, with their scores."""

    @property
    def item_ids(self) -> Any:
        """``(..., K)`` int64."""

    @property
    def scores(self) -> Any:
        """``(..., K)`` float32."""


class Comparison(NamedTuple):
    """Whether two rankings are the same; as a bool it is ``same``."""

    same: bool
    difference: str
    """The first difference in words; empty when there is none."""

    def __bool__(self) -> bool:
        return self.same


class Interval(NamedTuple):
    """A mean with the interval that holds it with 95 % confidence."""

    mean: float
    low: float
    high: float


def same_ranking(a: Ranking, b: Ranking) -> Comparison:
    """Compare ids, order and the bits of the scores.

    The scores are compared as float32 bit patterns, so that 0.0 and -0.0 differ and a NaN equals
    itself.
    """
    ids_a, ids_b = (np.asarray(one.item_ids, dtype=np.int64) for one in (a, b))
    scores_a, scores_b = (np.asarray(one.scores, dtype=np.float32) for one in (a, b))
    for what, left, right in (("item_ids", ids_a, ids_b), ("scores", scores_a, scores_b)):
        if left.shape != right.shape:
            return Comparison(False, f"{what} have shapes {left.shape} and {right.shape}")
    if ids_a.shape != scores_a.shape:
        return Comparison(False, f"{ids_a.shape} item_ids have {scores_a.shape} scores")
    other_ids = ids_a != ids_b
    other_bits = _bits(scores_a) != _bits(scores_b)
    different = np.argwhere(other_ids | other_bits)
    if not len(different):
        return Comparison(True, "")
    at = tuple(different[0].tolist())
    rank = at[0] if len(at) == 1 else at
    if other_ids[at]:
        return Comparison(
            False,
            f"rank {rank}: item {ids_a[at]} ({_described(scores_a[at])}) "
            f"and item {ids_b[at]} ({_described(scores_b[at])})",
        )
    return Comparison(
        False,
        f"rank {rank}: item {ids_a[at]} has scores {_described(scores_a[at])} "
        f"and {_described(scores_b[at])}",
    )


def recall_at_k(ranked: ArrayLike, relevant: Relevant, k: int) -> NDArray[np.float64]:
    """The share of each user's held-out items that are among the first k.

    Args:
        ranked: ``(B, K)`` item ids best first, -1 where there is none; ids of a row are distinct.
        relevant: the held-out items of each user.
        k: ranks that count, at least 1; ranks beyond K are empty.

    Returns:
        ``(B,)`` float64; NaN for a user without held-out items.

    Raises:
        ValueError: if a shape or k is out of range.
    """
    hits, sizes = _hits(ranked, relevant, k)
    with np.errstate(invalid="ignore"):
        return np.where(sizes > 0, hits.sum(1) / np.maximum(sizes, 1), np.nan)


def hit_rate_at_k(ranked: ArrayLike, relevant: Relevant, k: int) -> NDArray[np.float64]:
    """1 for each user with a held-out item among the first k, else 0; arguments as for recall."""
    hits, sizes = _hits(ranked, relevant, k)
    return np.where(sizes > 0, hits.any(1).astype(np.float64), np.nan)


def ndcg_at_k(ranked: ArrayLike, relevant: Relevant, k: int) -> NDArray[np.float64]:
    """Discounted gain of the first k over the best possible, per user; arguments as for recall.

    A hit at rank r (from 0) gains ``1 / log2(r + 2)``; a user with m held-out items can at best
    have them at the ranks 0 to ``min(m, k) - 1``.
    """
    hits, sizes = _hits(ranked, relevant, k)
    gains = 1.0 / np.log2(np.arange(max(k, hits.shape[1])) + 2.0)
    best = np.concatenate([[0.0], np.cumsum(gains[:k])])[np.minimum(sizes, k)]
    reached = (hits * gains[: hits.shape[1]]).sum(1)
    return np.where(sizes > 0, reached / np.where(best > 0, best, 1.0), np.nan)


def coverage_at_k(ranked: ArrayLike, num_items: int, k: int) -> float:
    """The share of the catalogue that is among the first k of any user.

    Args:
        ranked: ``(B, K)`` item ids best first, -1 where there is none.
        num_items: N, the items of the catalogue that the ids are from.
        k: ranks that count, at least 1; ranks beyond K are empty.

    Raises:
        ValueError: if a shape, k or N is out of range, or there are more ids than items.
    """
    if num_items < 1:
        raise ValueError(f"num_items must be at least 1, got {num_items}")
    found = np.unique(_ids(ranked, k))
    shown = int((found != PADDING).sum())
    if shown > num_items:
        raise ValueError(f"ranked must have at most {num_items} distinct ids, got {shown}")
    return shown / num_items


def overlap_at_k(a: ArrayLike, b: ArrayLike, k: int) -> NDArray[np.float64]:
    """The share of the first k of ``b`` that are among the first k of ``a``, per row.

    Args:
        a: ``(B, K)`` item ids, -1 where there is none.
        b: ``(B, K2)`` item ids, the ranking to be matched.
        k: ranks that count, at least 1.

    Returns:
        ``(B,)`` float64; 1 where ``b`` is empty.
    """
    left, right = _ids(a, k), _ids(b, k)
    if left.shape[0] != right.shape[0]:
        raise ValueError(f"a and b must have as many rows, got {left.shape[0]}, {right.shape[0]}")
    wanted = right != PADDING
    found = ((right[:, :, None] == left[:, None, :]).any(2) & wanted).sum(1)
    sizes = wanted.sum(1)
    return np.where(sizes > 0, found / np.maximum(sizes, 1), 1.0)


def paired_bootstrap(
    a: ArrayLike, b: ArrayLike, *, samples: int = 10_000, seed: int = 0
) -> Interval:
    """The mean of ``a - b`` over users with its 95 % percentile interval.

    Users are drawn with replacement, each with both of its numbers.

    Args:
        a: ``(B,)`` one number per user.
        b: ``(B,)`` numbers of the same users.
        samples: bootstrap samples, at least 1.
        seed: of the draws.

    Raises:
        ValueError: if the shapes differ, there are no users, or a number is not finite.
    """
    left, right = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if left.ndim != 1 or left.shape != right.shape or not len(left):
        raise ValueError(f"a and b must be (B,) with B >= 1, got {left.shape} and {right.shape}")
    if samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples}")
    differences = left - right
    if not np.isfinite(differences).all():
        raise ValueError("a and b must be finite")
    generator = np.random.default_rng(seed)
    means = np.empty(samples)
    rows = max((1 << 22) // len(differences), 1)
    for begin in range(0, samples, rows):
        count = min(rows, samples - begin)
        drawn = generator.integers(0, len(differences), (count, len(differences)))
        means[begin : begin + count] = differences[drawn].mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return Interval(float(differences.mean()), float(low), float(high))


def popularity_ranking(counts: ArrayLike, item_ids: ArrayLike) -> NDArray[np.int64]:
    """The item ids by count descending, then id ascending, ``(N,)`` int64.

    Args:
        counts: ``(N,)`` interactions of each item.
        item_ids: ``(N,)`` int64.
    """
    weight, ids = np.asarray(counts), np.asarray(item_ids, dtype=np.int64)
    if weight.ndim != 1 or weight.shape != ids.shape:
        raise ValueError(f"counts and item_ids must be (N,), got {weight.shape} and {ids.shape}")
    return ids[np.lexsort((ids, -weight))]


def _ids(ranked: ArrayLike, k: int) -> NDArray[np.int64]:
    ids = np.asarray(ranked, dtype=np.int64)
    if ids.ndim != 2:
        raise ValueError(f"ranked ids must be (B, K), got {ids.shape}")
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    return ids[:, :k]


def _hits(
    ranked: ArrayLike, relevant: Relevant, k: int
) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    """Which of the first k ranks are hits ``(B, K)``, and the held-out items per user ``(B,)``."""
    ids = _ids(ranked, k)
    if len(relevant) != len(ids):
        raise ValueError(f"relevant must have {len(ids)} entries, got {len(relevant)}")
    if isinstance(relevant, np.ndarray | Tensor):
        single = torch.as_tensor(relevant).numpy()
        if single.ndim != 1:
            raise ValueError(f"relevant must be (B,) or a set per user, got {single.shape}")
        held = single != PADDING
        return (ids == single[:, None]) & held[:, None], held.astype(np.int64)
    hits = np.zeros(ids.shape, dtype=np.bool_)
    for user, wanted in enumerate(relevant):
        hits[user] = np.isin(ids[user], list(wanted))
    return hits & (ids != PADDING), np.array([len(set(one)) for one in relevant], dtype=np.int64)


def _bits(scores: NDArray[np.float32]) -> NDArray[np.int32]:
    return np.ascontiguousarray(scores).view(np.int32)


def _described(score: np.float32) -> str:
    return f"{float(score)!r} = {np.float32(score).view(np.uint32):#010x}"

"""Exact selection of the best candidates, with ties broken by the smaller item id.

Shapes: Q query rows, M candidates per row, k results.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from silvershard.kernels.contract import check_devices, check_not_nan, check_tensor
from silvershard.kernels.native_library import is_plain_cpu, run_on_cpu
from silvershard.kernels.native_operators import merge_topk_native


class TopK(NamedTuple):
    """Ranked candidates: scores descending, ties by ascending item id.

    ``positions`` index the candidate axis. Padding has score ``-inf``, item id -1 and position -1.
    """

    scores: Tensor
    item_ids: Tensor
    positions: Tensor


def select_topk(scores: Tensor, item_ids: Tensor, k: int) -> TopK:
    """Keep the k best candidates of every row, best first.

    Ties are broken by the smaller item id, then by the smaller position. A candidate whose score is
    ``-inf`` or whose id is -1 is padding and is never returned. ``-0.0`` counts as, and is returned
    as, ``0.0``.

    Args:
        scores: ``(Q, M)`` float32, no NaN.
        item_ids: ``(Q, M)`` int64.
        k: results per row, >= 1; may exceed M.

    Returns:
        Scores, ids and positions, each ``(Q, k)``.

    Raises:
        ValueError: if shapes, dtypes or devices disagree, a score is NaN or k is below 1.
    """
    check_tensor("scores", scores, torch.float32, ("Q", "M"))
    check_tensor("item_ids", item_ids, torch.int64, tuple(scores.shape))
    check_devices(scores=scores, item_ids=item_ids)
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    select = _select_topk_cpu if is_plain_cpu(scores) else _select_topk
    return TopK(*select(scores, item_ids, k))


def select_topk_reference(
    scores: Tensor, item_ids: Tensor, k: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The definition of ``select_topk``; same contract, plain NumPy, no validation."""
    shape = (scores.shape[0], k)
    best_scores = np.full(shape, -np.inf, dtype=np.float32)
    best_ids = np.full(shape, -1, dtype=np.int64)
    positions = np.full(shape, -1, dtype=np.int64)
    host_scores, host_ids = scores.numpy(force=True), item_ids.numpy(force=True)
    for row, (values, ids) in enumerate(zip(host_scores, host_ids, strict=True)):
        best = best_positions(np.where(ids < 0, np.float32(-np.inf), values), k, ids.take)
        best_scores[row, : len(best)] = values[best] + np.float32(0.0)
        best_ids[row, : len(best)] = ids[best]
        positions[row, : len(best)] = best
    return (
        torch.from_numpy(best_scores).to(scores.device),
        torch.from_numpy(best_ids).to(scores.device),
        torch.from_numpy(positions).to(scores.device),
    )


def best_positions(
    scores: NDArray[np.float32],
    k: int,
    ids_at: Callable[[NDArray[np.int64]], NDArray[np.int64]],
) -> NDArray[np.int64]:
    """Find the k best candidates of one row, looking ids up only where they decide.

    Args:
        scores: ``(M,)``; ``-inf`` marks padding. A NaN ranks as ``inf``, so that no cut hides it.
        k: results to find, >= 1.
        ids_at: the item ids at some positions.

    Returns:
        Positions, best first; fewer than k where fewer candidates are not padding.
    """
    if k < len(scores):
        # Everything that equals the last score to be kept is a candidate, and so is a NaN.
        cut = np.partition(scores, -k)[-k]
        positions = np.flatnonzero(~(scores < cut))
    else:
        positions = np.arange(len(scores))
    found = scores[positions]
    found[np.isnan(found)] = np.inf
    order = _descending(found)
    ranked = found[order]
    same = ranked[1:] == ranked[:-1]
    if same.any():
        tied = np.flatnonzero(np.append(same, False) | np.append(False, same))
        ids = ids_at(positions[order[tied]])
        order[tied] = order[tied][np.lexsort((ids, -ranked[tied]))]
    order = order[:k]
    best: NDArray[np.int64] = positions[order[found[order] > -np.inf]]
    return best


def _descending(scores: NDArray[np.float32]) -> NDArray[np.int64]:
    """The stable permutation to descending order, for scores without NaN.

    NumPy sorts plain integers several times as fast as it finds a permutation, so each position
    travels as the low half of an integer whose high half orders like the negated score.
    """
    bits = (np.float32(0.0) - scores).view(np.int32)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    keys = (ordered.astype(np.int64) << 32) | np.arange(len(scores))
    keys.sort()
    return keys & 0xFFFFFFFF


def _checked_select_topk(scores: Tensor, item_ids: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    check_not_nan("scores", scores)
    return select_topk_reference(scores, item_ids, k)


def _native_select_topk(scores: Tensor, item_ids: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    return merge_topk_native(scores[None], item_ids[None], k)


_select_topk = torch.library.custom_op(
    "silvershard::select_topk", select_topk_reference, mutates_args=()
)
_select_topk_cpu = run_on_cpu(_native_select_topk, _checked_select_topk)
_select_topk.register_kernel("cpu")(_select_topk_cpu)


@_select_topk.register_kernel("cuda")
def _(scores: Tensor, item_ids: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    from silvershard.kernels.select_topk_triton import select_topk_triton

    return select_topk_triton(scores, item_ids, k)


@_select_topk.register_fake
def _(scores: Tensor, item_ids: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    shape = (scores.shape[0], k)
    return scores.new_empty(shape), item_ids.new_empty(shape), item_ids.new_empty(shape)

"""Exact selection of the best candidates, with ties broken by the smaller item id.

Shapes: Q query rows, M candidates per row, k results.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
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
    """The definition of ``select_topk``; same contract, plain PyTorch, no validation."""
    ranked = torch.where(item_ids < 0, -torch.inf, scores)
    best, positions = best_positions(ranked, k, lambda row, at: item_ids[row].gather(-1, at))
    if item_ids.shape[1] == 0:
        return best, torch.full_like(positions, -1), positions
    ids = item_ids.gather(1, positions.clamp_min(0))
    return best, torch.where(positions >= 0, ids, -1), positions


def best_positions(
    scores: Tensor, k: int, ids_at: Callable[[Tensor, Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Find the k best candidates of every row, looking ids up only where they decide.

    Args:
        scores: ``(Q, M)`` float32; ``-inf`` marks padding.
        k: results per row.
        ids_at: the item ids at ``positions`` of the given rows: called with rows ``(n,)`` and
            positions ``(n, m)``.

    Returns:
        Scores ``(Q, k)`` and positions ``(Q, k)`` int64, padded with ``-inf`` and -1.
    """
    num_rows, num_candidates = scores.shape
    kept = min(k, num_candidates)
    # Adding 0.0 turns -0.0 into 0.0, so that equal scores also have equal bits.
    best, positions = (scores + 0.0).topk(kept, dim=1)
    if num_rows * kept == 0:
        shape = (num_rows, k)
        return scores.new_full(shape, -torch.inf), positions.new_full(shape, -1)
    cut = best[:, -1:]
    # At the cut, topk takes any of several equal candidates; settle those rows one by one.
    crowded = ((scores >= cut).sum(dim=1, dtype=torch.int32) > kept) & (cut[:, 0] > -torch.inf)
    tied = (best[:, 1:] == best[:, :-1]) & (best[:, 1:] > -torch.inf)
    if bool(crowded.any()):
        for row in crowded.nonzero():
            candidates = (scores[row] >= cut[row]).nonzero()[None, :, 1]
            order = _in_order(scores[row].gather(1, candidates), ids_at(row, candidates))
            positions[row] = candidates.gather(1, order[:, :kept])
    if bool(tied.any()):
        rows = tied.any(dim=1).nonzero().squeeze(1)
        ascending = positions[rows].sort(dim=1).values
        order = _in_order(scores[rows].gather(1, ascending), ids_at(rows, ascending))
        positions[rows] = ascending.gather(1, order)
    positions = torch.where(best == -torch.inf, -1, positions)
    if kept < k:
        best = torch.nn.functional.pad(best, (0, k - kept), value=-torch.inf)
        positions = torch.nn.functional.pad(positions, (0, k - kept), value=-1)
    return best, positions


def _in_order(scores: Tensor, item_ids: Tensor) -> Tensor:
    """The permutation along the last dimension to score descending, then id, then position."""
    by_id = item_ids.sort(dim=-1, stable=True).indices
    by_score = scores.gather(-1, by_id).sort(dim=-1, stable=True, descending=True).indices
    return by_id.gather(-1, by_score)


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

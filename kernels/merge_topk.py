"""One ranking out of the rankings of several shards.

Shapes: S lists per request (one per shard), B requests, K1 candidates per list, k results.
"""

import torch
from torch import Tensor

from silvershard.kernels.contract import check_devices, check_not_nan, check_tensor
from silvershard.kernels.select_topk import TopK, select_topk_reference


def merge_topk(scores: Tensor, item_ids: Tensor, k: int) -> TopK:
    """Merge per-shard results into one ranking.

    Ties are broken by the smaller item id, so the result does not depend on shard order. The lists
    need not be sorted. Padding (score ``-inf`` or id -1) is never returned.

    Args:
        scores: ``(S, B, K1)`` float32, no NaN.
        item_ids: ``(S, B, K1)`` int64; no id twice in one request.
        k: results to keep, >= 1; may exceed S K1.

    Returns:
        Scores, ids and positions, each ``(B, k)``; a position is ``shard * K1 + rank`` of the
        winner.

    Raises:
        ValueError: if shapes, dtypes or devices disagree, a score is NaN or k is below 1.
    """
    check_tensor("scores", scores, torch.float32, ("S", "B", "K1"))
    check_tensor("item_ids", item_ids, torch.int64, tuple(scores.shape))
    check_devices(scores=scores, item_ids=item_ids)
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    check_not_nan("scores", scores)
    return TopK(*_merge_topk(scores, item_ids, k))


def merge_topk_reference(scores: Tensor, item_ids: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The definition of ``merge_topk``; same contract, plain PyTorch, no validation."""
    num_lists, num_requests, length = scores.shape
    shape = (num_requests, num_lists * length)
    return select_topk_reference(
        scores.transpose(0, 1).reshape(shape), item_ids.transpose(0, 1).reshape(shape), k
    )


_merge_topk = torch.library.custom_op(
    "silvershard::merge_topk", merge_topk_reference, mutates_args=()
)


@_merge_topk.register_fake
def _(scores: Tensor, item_ids: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    shape = (scores.shape[1], k)
    return scores.new_empty(shape), item_ids.new_empty(shape), item_ids.new_empty(shape)

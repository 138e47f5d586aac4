"""One ranking out of the rankings of several shards.

Shapes: S lists per request (one per shard), B requests, K1 candidates per list, k results.
"""

import torch
from torch import Tensor

from silvershard.kernels.contract import check_devices, check_not_nan, check_tensor
from silvershard.kernels.native_library import is_plain_cpu, run_on_cpu
from silvershard.kernels.native_operators import merge_topk_native
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
    merge = _merge_topk_cpu if is_plain_cpu(scores) else _merge_topk
    return TopK(*merge(scores, item_ids, k))


def merge_topk_reference(scores: Tensor, item_ids: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The definition of ``merge_topk``; same contract, plain PyTorch, no validation."""
    num_lists, num_requests, length = scores.shape
    shape = (num_requests, num_lists * length)
    return select_topk_reference(
        scores.transpose(0, 1).reshape(shape), item_ids.transpose(0, 1).reshape(shape), k
    )


def _checked_merge_topk(scores: Tensor, item_ids: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    check_not_nan("scores", scores)
    return merge_topk_reference(scores, item_ids, k)


_merge_topk = torch.library.custom_op(
    "silvershard::merge_topk", merge_topk_reference, mutates_args=()
)
_merge_topk_cpu = run_on_cpu(merge_topk_native, _checked_merge_topk)
_merge_topk.register_kernel("cpu")(_merge_topk_cpu)


@_merge_topk.register_kernel("cuda")
def _(scores: Tensor, item_ids: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    from silvershard.kernels.merge_topk_triton import merge_topk_triton

    return merge_topk_triton(scores, item_ids, k)


@_merge_topk.register_fake
def _(scores: Tensor, item_ids: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    shape = (scores.shape[1], k)
    return scores.new_empty(shape), item_ids.new_empty(shape), item_ids.new_empty(shape)

"""One ranking out of several on CUDA: the lists of a request side by side through ``select_topk``.

A program ranks the candidates of one request, as ``select_topk_triton`` says.
"""

from torch import Tensor

from silvershard.kernels.device_guard import on_device_of_operands
from silvershard.kernels.select_topk_triton import select_topk_triton


@on_device_of_operands
def merge_topk_triton(scores: Tensor, item_ids: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The CUDA implementation of ``merge_topk``; same contract, no validation."""
    num_lists, num_requests, length = scores.shape
    shape = (num_requests, num_lists * length)
    return select_topk_triton(
        scores.transpose(0, 1).reshape(shape), item_ids.transpose(0, 1).reshape(shape), k
    )

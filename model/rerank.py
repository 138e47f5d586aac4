"""The probabilities of tasks: of those that a request wants, and at no cost where it wants none.

Shapes: B requests, H heads, D embedding dimension, U candidates of a request, Us user state, Vs
signals, T tasks, N pages in the pool, G slots per page.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from silvershard.kernels import fixed_sigmoid
from silvershard.kernels.contract import check_not_nan
from silvershard.model.types import Work

RankSlots = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
"""``rank_slots`` of a model: query, user state, cache, slots, refined and signals to logits."""


def task_probabilities(
    rank: RankSlots,
    work: Work,
    user_state: Tensor,
    cache: Tensor,
    slots: Tensor,
    refined: Tensor,
    signals: Tensor,
) -> Tensor:
    """Return the probabilities of candidates, with the same bits whatever else is wanted.

    The reranker does not run for a request that wants no task. One task less than all saves its own
    probabilities and no more: rerankers share all layers but the last among the tasks, and that
    one is padded to 16 outputs.

    Args:
        rank: gives the logits ``(B, U, T)``.
        work: whose ``tasks`` says what is wanted.
        user_state: ``(B, Us)`` float32 of the reranker alone.
        cache: ``(N, G, D)`` float16.
        slots: ``(B, U)`` int64, -1 is padding.
        refined: ``(B, U, H)`` float32.
        signals: ``(B, U, Vs)`` float32.

    Returns:
        ``(B, U, T)`` float32, zeros where a task is not wanted.

    Raises:
        ValueError: if a logit is NaN.
    """
    wanted = work.tasks.bool()  # (B, T)
    whole = bool(wanted.all())
    rows = torch.nonzero(wanted.any(1)).flatten()
    tasks = refined.new_zeros(*slots.shape, wanted.shape[1])
    if not whole and not len(rows):
        return tasks
    chosen = slice(None) if whole else rows
    logits = rank(
        work.embedding[chosen],
        user_state[chosen],
        cache,
        slots[chosen],
        refined[chosen],
        signals[chosen],
    )
    check_not_nan("the reranker's logits", logits)
    if whole:
        return fixed_sigmoid(logits)
    for column in range(wanted.shape[1]):
        mine = torch.nonzero(wanted[rows, column]).flatten()
        tasks[rows[mine], :, column] = fixed_sigmoid(logits[mine, :, column].contiguous())
    return tasks

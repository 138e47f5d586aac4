"""Combination of ranked lists from devices or shards into one logical forward pass.

The same module joins the devices inside a shard and the shards inside the router; it holds no
weights.

Shapes: S lists, B requests, H heads, R candidates per head, Rs semantic candidates, T tasks, K
results.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from silvershard.kernels import merge_topk
from silvershard.model.types import Cutoffs, RoundOne, RoundTwo, StageTimes

LARGEST_ID = torch.iinfo(torch.int64).max


def slowest(times: Sequence[StageTimes]) -> StageTimes:
    """Return the largest time of every stage: lists are made side by side."""
    merged: StageTimes = {}
    for one in times:
        for stage, spent in one.items():
            merged[stage] = max(merged.get(stage, 0), spent)
    return merged


def _stack(lists: Sequence[Tensor], fill: float) -> Tensor:
    """Return the lists as ``(S, ...)``, their last dimension padded to the longest."""
    width = max(one.shape[-1] for one in lists)
    padded = [
        one
        if one.shape[-1] == width
        else torch.nn.functional.pad(one, (0, width - one.shape[-1]), value=fill)
        for one in lists
    ]
    return torch.stack(padded)


def _best(rounds: Sequence[RoundOne], width: int) -> tuple[Tensor, Tensor]:
    """Return scores and ids of the best candidates per head, each ``(B, H, width)``."""
    scores = _stack([one.scores for one in rounds], float("-inf"))  # (S, B, H, R)
    item_ids = _stack([one.item_ids for one in rounds], -1)
    shape = (*scores.shape[1:3], width)
    best = merge_topk(scores.flatten(1, 2), item_ids.flatten(1, 2), width)
    return best.scores.view(shape), best.item_ids.view(shape)


def _best_semantic(rounds: Sequence[RoundOne]) -> tuple[Tensor, Tensor]:
    """Return scores and ids of the best semantic candidates, as many as the longest Rs."""
    scores = _stack([one.semantic_scores for one in rounds], float("-inf"))  # (S, B, Rs)
    item_ids = _stack([one.semantic_item_ids for one in rounds], -1)
    if not scores.shape[2]:
        return scores[0], item_ids[0]
    best = merge_topk(scores, item_ids, scores.shape[2])
    return best.scores, best.item_ids


class Merge(nn.Module):
    """Global cut and global ranking over any number of lists; ties go to the smaller item id."""

    def candidates(self, rounds: Sequence[RoundOne], width: int) -> RoundOne:
        """Return the best ``width`` candidates per head of all lists, and the best semantic ones.

        Args:
            rounds: S lists; their R and Rs may differ.
            width: candidates per head to keep; of the semantic ones the longest Rs is kept.
        """
        scores, item_ids = _best(rounds, width)
        semantic_scores, semantic_item_ids = _best_semantic(rounds)
        return RoundOne(
            scores=scores,
            item_ids=item_ids,
            probed=torch.stack([one.probed for one in rounds]).sum(0),
            eligible=torch.stack([one.eligible for one in rounds]).sum(0),
            semantic_scores=semantic_scores,
            semantic_item_ids=semantic_item_ids,
            times=slowest([one.times for one in rounds]),
        )

    def cutoffs(
        self, rounds: Sequence[RoundOne], ann_k: Tensor, semantic_k: Tensor | None = None
    ) -> Cutoffs:
        """Return the score and id of the last candidate of each list that passes the global cut.

        Args:
            rounds: one list per shard that answered.
            ann_k: ``(B,)`` int64 candidates per head to keep over all shards.
            semantic_k: ``(B,)`` int64 semantic candidates to keep; None: of no request.
        """
        best_scores, best_ids = _best(rounds, int(ann_k.max()))
        last = (ann_k - 1)[:, None, None].expand(-1, best_scores.shape[1], 1)  # (B, H, 1)
        scores = best_scores.gather(2, last).squeeze(2)  # (B, H)
        item_ids = best_ids.gather(2, last).squeeze(2)
        if semantic_k is not None and bool(semantic_k.any()):
            # These have a cut of their own: theirs and that of the heads are of different numbers.
            none = (semantic_k == 0)[:, None]
            last = (semantic_k - 1).clamp(min=0)[:, None]
            semantic_scores, semantic_ids = _best_semantic(rounds)
            missing = int(semantic_k.max()) - semantic_scores.shape[1]
            own_scores, own_ids = (
                torch.nn.functional.pad(one, (0, max(missing, 0)), value=fill).gather(1, last)
                for one, fill in ((semantic_scores, float("-inf")), (semantic_ids, -1))
            )
            scores = torch.cat([scores, own_scores.masked_fill(none, float("inf"))], 1)
            item_ids = torch.cat([item_ids, own_ids], 1)
        return Cutoffs(scores, torch.where(item_ids < 0, LARGEST_ID, item_ids))

    def forward(self, rounds: Sequence[RoundTwo], width: int) -> RoundTwo:
        """Return the best ``width`` results of all lists by value.

        Args:
            rounds: S lists; their K may differ.
            width: K of the merged list.
        """
        values = _stack([one.values for one in rounds], float("-inf"))  # (S, B, K)
        item_ids = _stack([one.item_ids for one in rounds], -1)
        best = merge_topk(values, item_ids, width)
        found = best.positions.clamp(min=0)[:, None]  # (B, 1, width)
        missing = best.positions[:, None] < 0

        def pick(lists: Sequence[Tensor], fill: float) -> Tensor:
            flat = _stack(lists, fill).permute(1, 2, 0, 3).flatten(2)  # (B, N, S * K)
            return flat.gather(2, found.expand(-1, flat.shape[1], -1)).masked_fill(missing, fill)

        return RoundTwo(
            item_ids=best.item_ids,
            values=best.scores,
            refined=pick([one.refined[:, None] for one in rounds], float("-inf"))[:, 0],
            tasks=pick([one.tasks.transpose(1, 2) for one in rounds], 0.0).transpose(1, 2),
            kept=torch.stack([one.kept for one in rounds]).sum(0),
            semantic_kept=torch.stack([one.semantic_kept for one in rounds]).sum(0),
            reranked=torch.stack([one.reranked for one in rounds]).sum(0),
            times=slowest([one.times for one in rounds]),
        )


def passes(scores: Tensor, item_ids: Tensor, cutoffs: Cutoffs) -> Tensor:
    """Return which candidates pass the global cut, ``(B, H, R)`` bool.

    Args:
        scores: ``(B, H, R)`` float32.
        item_ids: ``(B, H, R)`` int64, -1 at padding, which never passes.
        cutoffs: of the same heads.
    """
    cut_scores = cutoffs.scores[:, :, None]
    cut_ids = cutoffs.item_ids[:, :, None]
    better = (scores > cut_scores) | ((scores == cut_scores) & (item_ids <= cut_ids))
    return better & (item_ids >= 0)

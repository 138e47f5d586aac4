"""Training of the reranker on frozen towers, and the choice of its best state.

It learns to tell the next item from items that the towers rank high and from random ones.

Shapes: N items, B positions of a batch, H heads, T tasks, D embedding dimension, m candidates per
position.
"""

import math
from collections.abc import Mapping
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

from silvershard.model.bags import spread
from silvershard.model.tower_training import with_prefix
from silvershard.model.training_batches import (
    EXCLUDED,
    all_items,
    draw,
    drawn_texts,
    histories,
    item_odds,
    learning_rate_factor,
    load_optimizer_state,
    optimizer_state,
    ranker_ndcg,
    user_odds,
)
from silvershard.model.training_config import TrainingConfig
from silvershard.model.training_data import HeldOut, TrainingData
from silvershard.model.two_tower import TwoTower

_EVALUATIONS = 5


class RankerTraining:
    """The second phase of training; ``done`` counts its steps."""

    name: Final = "reranker"

    def __init__(
        self,
        model: TwoTower,
        data: TrainingData,
        config: TrainingConfig,
        held: HeldOut | None,
    ) -> None:
        self.done = 0
        self.steps = config.ranker_steps if model.config.tasks else 0
        self.evaluate_every = max(self.steps // _EVALUATIONS, 1)
        self.ndcg = math.nan
        """Of the last evaluation."""
        self._model = model
        self._data = data
        self._config = config
        self._held = held
        self._optimizer = torch.optim.Adam(
            model.ranker.parameters(), lr=config.ranker_learning_rate
        )
        self._odds = item_odds(data, config)
        self._user_odds = user_odds(data, data.ranker_positions, config)
        self._best: dict[str, Tensor] = {}
        model.eval()
        model.share_history_table()
        with torch.no_grad():
            self._items = all_items(model, data)

    @property
    def learning_rate(self) -> float:
        """The learning rate of the next step."""
        config = self._config
        return config.ranker_learning_rate * learning_rate_factor(
            config.schedule, self.done, max(self.steps, 1), config.warm_up
        )

    def step(self) -> float:
        """Train on one batch and return its loss."""
        model, data, config = self._model, self._data, self._config
        for group in self._optimizer.param_groups:
            group["lr"] = self.learning_rate
        positions = draw(data.ranker_positions, self._user_odds, config.ranker_batch)
        targets = data.items[positions]
        with torch.no_grad():
            rows, lengths = histories(model, data, positions)
            texts, alone = drawn_texts(data, config, positions)
            rows = rows[~alone.repeat_interleave(lengths)]
            lengths = lengths.masked_fill(alone, 0)
            users = data.users.take(positions) | texts
            state = model.user_state(model.history(rows, lengths, users))
            query = model.user_embedding(state)
            hard, found = self._hard(query, positions)
        count = targets.shape[0] * config.ranker_random
        random = torch.multinomial(self._odds, count, replacement=True)
        random = random.view(targets.shape[0], -1)
        candidates = torch.cat([targets[:, None], hard, random], 1)  # (B, m)
        model.ranker.train()
        logits = self._logits(query, state, candidates)  # (B, m, T)
        model.ranker.eval()
        repeated = candidates == targets[:, None]
        repeated[:, 0] = False
        loss = ranker_loss(logits, data.task_positive[positions], repeated, found)
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self._optimizer.step()
        self.done += 1
        return loss.item()

    def _hard(self, query: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Items that a random head of each position ranks high.

        Returns:
            ``(B, ranker_hard)`` int64 of the ``ranker_depth`` best, and ``(B,)`` bool: whether the
            item that came next is among those best.
        """
        head = torch.randint(query.shape[1], (query.shape[0],))
        scores = query[torch.arange(query.shape[0]), head] @ self._items.T  # (B, N)
        before = positions - self._data.starts[positions]
        user = torch.arange(query.shape[0]).repeat_interleave(before)
        scores[user, self._data.items[spread(self._data.starts[positions], before)]] = EXCLUDED
        depth = min(self._config.ranker_depth, scores.shape[1])
        top = scores.topk(depth, 1).indices
        chosen = torch.rand(top.shape).argsort(1)[:, : self._config.ranker_hard]
        found = (top == self._data.items[positions][:, None]).any(1)
        return top.gather(1, chosen), found

    def _logits(self, query: Tensor, state: Tensor, candidates: Tensor) -> Tensor:
        """Task logits ``(B, m, T)`` of candidates ``(B, m)``."""
        items = self._items[candidates]  # (B, m, D)
        refined = (query[:, None] * items[:, :, None]).sum(3)
        return self._model.rank(query, state, items, refined, self._data.signals[candidates])

    @torch.no_grad()
    def evaluate(self) -> float:
        """Return NDCG@10 on the held-out items; NaN without them."""
        if self._held is not None:
            self.ndcg = ranker_ndcg(self._held, self._model, self._items, self._logits)
        return self.ndcg

    def keep(self) -> None:
        """Remember the present weights as the best."""
        weights = self._model.ranker.state_dict()
        self._best = {name: value.clone() for name, value in weights.items()}

    def restore(self) -> None:
        """Go back to the best weights, if any were kept."""
        if self._best:
            self._model.ranker.load_state_dict(self._best)

    def state(self) -> dict[str, Tensor]:
        """Everything but the weights that the next step depends on."""
        tensors = {f"optimizer.{key}": one for key, one in optimizer_state(self._optimizer).items()}
        return tensors | {f"best.{key}": one for key, one in self._best.items()}

    def load_state(self, tensors: Mapping[str, Tensor], done: int) -> None:
        """Continue after ``done`` steps from what ``state`` gave."""
        self.done = done
        load_optimizer_state(self._optimizer, with_prefix(tensors, "optimizer."))
        self._best = with_prefix(tensors, "best.")


def ranker_loss(logits: Tensor, positive: Tensor, repeated: Tensor, found: Tensor) -> Tensor:
    """Binary cross-entropy of all candidates plus softmax cross-entropy of the positives.

    Args:
        logits: ``(B, m, T)``; candidate 0 is the item that came next.
        positive: ``(B, T)`` bool, whether it counts for the task.
        repeated: ``(B, m)`` bool, candidates that are left out.
        found: ``(B,)`` bool, positions that count. Where the towers did not find the item it would
            teach that what they rank high is wrong.
    """
    labels = torch.zeros_like(logits)
    labels[:, 0] = positive.float()
    kept = (~repeated & found[:, None]).float()[..., None]
    binary = functional.binary_cross_entropy_with_logits(logits, labels, reduction="none")
    pointwise = (binary * kept).sum((0, 1)) / kept.sum().clamp(min=1)
    masked = logits.masked_fill(repeated[..., None], EXCLUDED)
    chosen = torch.logsumexp(masked, 1) - masked[:, 0]  # (B, T)
    counted = (positive & found[:, None]).float()
    listwise = (chosen * counted).sum(0) / counted.sum(0).clamp(min=1)
    return (pointwise + listwise).sum()

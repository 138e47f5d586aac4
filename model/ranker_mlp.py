"""The perceptron reranker.

Shapes: as in ``ranker_interface``; n = B * U candidates, O hidden units.
"""

import torch
from torch import Tensor

from silvershard.kernels import gather_linear
from silvershard.model.dense import PaddedLinear, padded, padded_product
from silvershard.model.ranker_arithmetic import linear
from silvershard.model.ranker_config import MLPConfig
from silvershard.model.ranker_interface import Prepared, Ranker, RankerShape, retriever_skip


class MLPRanker(Ranker):
    """A perceptron over user, item and their products, on top of the retriever's own scores.

    The user's part of the first layer is computed once per request; in serving so are the products
    of user and item, by folding the user into the weights.
    """

    def __init__(self, config: MLPConfig, shape: RankerShape) -> None:
        super().__init__(shape)
        first, second = config.hidden
        dim, num_heads = shape.dim, shape.num_heads
        self.user = PaddedLinear(num_heads * dim + shape.state_dim, first)
        self.item = PaddedLinear(dim + num_heads * dim + num_heads + shape.num_signals, first)
        self.middle = PaddedLinear(first, second)
        self.out = PaddedLinear(second, shape.num_tasks)
        self.skip = retriever_skip(num_heads, shape.num_tasks)
        with torch.no_grad():
            self.out.weight.zero_()
            self.out.bias.zero_()
        self.request_floats = 4 * (dim + 1) * first + self.user.in_features
        self.candidate_floats = 3 * (first + second) + 4 * padded(num_heads + shape.num_signals)

    def prepare(self, query: Tensor, user_state: Tensor) -> Prepared:
        """Return the user's part of the first layer ``(B, O)``, and the query."""
        return linear(self.user, torch.cat([query.flatten(1), user_state], 1)), query

    def score(self, prepared: Prepared, items: Tensor, refined: Tensor, signals: Tensor) -> Tensor:
        """Return the logits ``(B, U, T)``."""
        user, query = prepared
        crossed = query[:, None] * items[:, :, None]  # (B, U, H, D)
        given = torch.cat([items, crossed.flatten(2), refined, self.scaled(signals)], 2)
        item = self.item(given.flatten(0, 1)).view(*items.shape[:2], -1)
        hidden = self.middle((user[:, None] + item).flatten(0, 1).relu_()).relu_()
        logits: Tensor = self.out(hidden) + self.skip(refined.flatten(0, 1))
        return logits.view(*refined.shape[:2], -1)

    def prepare_slots(self, query: Tensor, user_state: Tensor) -> Prepared:
        """Return each user's weights ``(B, D, O)`` and biases ``(B, O)`` of an item."""
        user, _ = self.prepare(query, user_state)
        dim = self.shape.dim
        inputs = self.item.weight[:, : self.item.out_features]
        weight = inputs[:dim].expand(query.shape[0], -1, -1)
        for head in range(self.shape.num_heads):
            crossed = inputs[(1 + head) * dim : (2 + head) * dim]
            weight = weight + query[:, head, :, None] * crossed
        return weight, user + self.item.bias

    def score_slots(
        self, prepared: Prepared, cache: Tensor, slots: Tensor, refined: Tensor, signals: Tensor
    ) -> Tensor:
        """Return the logits ``(B, U, T)``; any numbers at padding."""
        item = gather_linear(cache, slots, *prepared).flatten(0, 1)  # (n, O)
        others = torch.cat([refined, self.scaled(signals)], 2).flatten(0, 1)
        first = (1 + self.shape.num_heads) * self.shape.dim
        # The rows of the layer's own padding save padding these weights at every call.
        last_row = first + padded(others.shape[1])
        rest = self.item.weight[first:last_row, : self.item.out_features]
        item += padded_product(others, rest)
        hidden = linear(self.middle, item.relu_()).relu_()
        # One product in place of two, which small requests feel.
        last = torch.cat([hidden, refined.flatten(0, 1)], 1)
        width = self.middle.out_features
        weight = torch.cat([self.out.weight[:width], self.skip.weight[: self.shape.num_heads]])
        logits = padded_product(last, weight)[:, : self.shape.num_tasks]
        logits = logits + (self.out.bias + self.skip.bias)
        return logits.view(*slots.shape, -1)

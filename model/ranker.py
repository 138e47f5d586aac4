"""The reranker: task logits of (request, item) pairs.

Shapes: B requests, n pairs, H heads, D embedding dimension, Us user state, Vs signals, T tasks.
"""

import torch
from torch import Tensor, nn

from silvershard.kernels import gather_linear
from silvershard.model.dense import PaddedLinear, padded_product


class MLPRanker(nn.Module):
    """A perceptron over user, item and their products, on top of the retriever's own scores.

    Each task is a linear function of the refined scores plus the output of the perceptron, which
    starts at zero: an untrained ranker orders as the retriever does. The user's part of the first
    layer is computed once per request; in serving so are the products of user and item, by folding
    the user into the weights.
    """

    signal_mean: Tensor
    signal_scale: Tensor

    def __init__(
        self,
        *,
        dim: int,
        num_heads: int,
        state_dim: int,
        num_signals: int,
        num_tasks: int,
        hidden: tuple[int, int] = (64, 32),
        skip_scale: float = 10.0,
    ) -> None:
        super().__init__()
        self.dim = dim
        self.num_heads = num_heads
        self.register_buffer("signal_mean", torch.zeros(num_signals))
        self.register_buffer("signal_scale", torch.ones(num_signals))
        self.user = PaddedLinear(num_heads * dim + state_dim, hidden[0])
        self.item = PaddedLinear(dim + num_heads * dim + num_heads + num_signals, hidden[0])
        self.middle = PaddedLinear(hidden[0], hidden[1])
        self.out = PaddedLinear(hidden[1], num_tasks)
        self.skip = PaddedLinear(num_heads, num_tasks)
        with torch.no_grad():
            self.out.weight.zero_()
            self.out.bias.zero_()
            self.skip.weight.zero_()
            # A cosine of 1 means even odds, so that untrained probabilities are small but distinct.
            self.skip.bias.fill_(-skip_scale)
            # Task t follows head t where there are as many heads, else the mean of all heads.
            for task in range(num_tasks):
                if num_heads == num_tasks:
                    self.skip.weight[task, task] = skip_scale
                else:
                    self.skip.weight[:num_heads, task] = skip_scale / num_heads

    def forward(
        self,
        query: Tensor,
        user_state: Tensor,
        request: Tensor,
        items: Tensor,
        refined: Tensor,
        signals: Tensor,
    ) -> Tensor:
        """Return the logits of each pair; a row has the same bits whatever pairs surround it.

        Args:
            query: ``(B, H, D)`` float32.
            user_state: ``(B, Us)`` float32.
            request: ``(n,)`` int64 in [0, B), the request of each pair.
            items: ``(n, D)`` float32.
            refined: ``(n, H)`` float32 scores of the item for each head.
            signals: ``(n, Vs)`` float32.

        Returns:
            ``(n, T)`` float32.
        """
        user = self._user(query, user_state)
        crossed = query[request] * items[:, None, :]  # (n, H, D)
        item = self.item(torch.cat([items, crossed.flatten(1), refined, self._scaled(signals)], 1))
        return self._finish(user[request] + item, refined)

    def rank_slots(
        self,
        query: Tensor,
        user_state: Tensor,
        cache: Tensor,
        slots: Tensor,
        refined: Tensor,
        signals: Tensor,
    ) -> Tensor:
        """Return the logits of cached candidates, as ``forward`` does up to float32 rounding.

        A row has the same bits whatever candidates and requests surround it. Rows of padding hold
        no meaning.

        Args:
            query: ``(B, H, D)`` float32.
            user_state: ``(B, Us)`` float32.
            cache: ``(N, G, D)`` float16 item embeddings.
            slots: ``(B, U)`` int64 in [-1, N G); -1 is padding.
            refined: ``(B, U, H)`` float32 scores of the item for each head.
            signals: ``(B, U, Vs)`` float32.

        Returns:
            ``(B, U, T)`` float32.
        """
        hidden = self.item.out_features
        inputs = self.item.weight[:, :hidden]
        weight = inputs[: self.dim].expand(query.shape[0], -1, -1)  # (B, D, O)
        for head in range(self.num_heads):
            crossed = inputs[(1 + head) * self.dim : (2 + head) * self.dim]
            weight = weight + query[:, head, :, None] * crossed
        bias = self._user(query, user_state) + self.item.bias
        item = gather_linear(cache, slots, weight, bias).flatten(0, 1)  # (B * U, O)
        by_head = refined.flatten(0, 1)
        others = torch.cat([by_head, self._scaled(signals.flatten(0, 1))], 1)
        first = (1 + self.num_heads) * self.dim
        item += padded_product(others, inputs[first : first + others.shape[1]])
        return self._finish(item, by_head).view(*slots.shape, -1)

    def _user(self, query: Tensor, user_state: Tensor) -> Tensor:
        user: Tensor = self.user(torch.cat([query.flatten(1), user_state], 1))  # (B, hidden)
        return user

    def _scaled(self, signals: Tensor) -> Tensor:
        return (signals - self.signal_mean) * self.signal_scale

    def _finish(self, first: Tensor, refined: Tensor) -> Tensor:
        """Return the logits ``(n, T)`` from the outputs of the first layer."""
        hidden = torch.relu(self.middle(torch.relu(first)))
        logits: Tensor = self.out(hidden) + self.skip(refined)
        return logits

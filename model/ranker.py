"""The reranker: task logits of (request, item) pairs.

Shapes: B requests, n pairs, H heads, D embedding dimension, Us user state, Vs signals, T tasks.
"""

import torch
from torch import Tensor, nn

from silvershard.model.dense import PaddedLinear


class MLPRanker(nn.Module):
    """A perceptron over user, item and their products, on top of the retriever's own scores.

    Each task is a linear function of the refined scores plus the output of the perceptron, which
    starts at zero: an untrained ranker orders as the retriever does. The user's part of the first
    layer is computed once per request.
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
        user = self.user(torch.cat([query.flatten(1), user_state], 1))  # (B, hidden)
        crossed = query[request] * items[:, None, :]  # (n, H, D)
        scaled = (signals - self.signal_mean) * self.signal_scale
        item = self.item(torch.cat([items, crossed.flatten(1), refined, scaled], 1))
        hidden = torch.relu(user[request] + item)
        hidden = torch.relu(self.middle(hidden))
        logits: Tensor = self.out(hidden) + self.skip(refined)
        return logits

"""The self-attention reranker: each candidate attends to the user's session.

Shapes: as in ``ranker_interface``; L session rows, M = padded(L + 1) keys of a token (the session,
padding, and last the token itself), A attention heads, n = B * U candidates.

Source: Kang and McAuley, "Self-Attentive Sequential Recommendation", ICDM 2018, section III, with
the candidate as the last token of the sequence and the norms before the sublayers.
"""

import math

import torch
from torch import Tensor, nn

from silvershard.model.dense import PaddedLinear, padded
from silvershard.model.ranker_arithmetic import (
    group_indicator,
    joined,
    linear,
    normed_rows,
    product,
    request_product,
    softmax_powers,
)
from silvershard.model.ranker_config import SelfAttentionConfig
from silvershard.model.ranker_interface import Prepared, Ranker, RankerShape, retriever_skip
from silvershard.model.ranker_session import real_rows, session_width, unpack_session

_LOG2_E = math.log2(math.e)


class _Layer(nn.Module):
    """Attention to the tokens of a session and to oneself, then a feed-forward network."""

    head_of: Tensor

    def __init__(self, dim: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        # Scores are in units of log 2, which the exponentials need.
        self.scale = _LOG2_E / math.sqrt(dim // heads)
        bound = 1.0 / math.sqrt(dim)
        # Without a bias: that of the keys would cancel in the softmax.
        self.inputs = nn.Parameter(torch.empty(dim, 3 * dim).uniform_(-bound, bound))
        self.mix = PaddedLinear(dim, dim)
        self.widen = PaddedLinear(dim, hidden)
        self.narrow = PaddedLinear(hidden, dim)
        head_of = group_indicator(heads, dim // heads) * self.scale
        self.register_buffer("head_of", head_of, persistent=False)

    def project(self, x: Tensor) -> list[Tensor]:
        """Return queries, keys and values ``(B, U, D)`` of tokens ``(B, U, D)``."""
        flat = product(normed_rows(x.flatten(0, 1)), self.inputs)
        return list(flat.view(*x.shape[:2], -1).split(x.shape[2], 2))

    def memory(self, keys: Tensor, values: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
        """Return the session as two matrices per request, all heads side by side.

        Args:
            keys: ``(B, M, D)``.
            values: ``(B, M, D)``.
            visible: ``(B, M)`` bool, real session tokens and the last column.

        Returns:
            ``(B, D, A * M)``, which turns queries into scores, and ``(B, A * M, padded(D + A))``,
            which turns weights into sums of session values and sums of all weights.
        """
        batch, tokens, dim = keys.shape
        heads = self.heads
        own = torch.eye(heads, device=keys.device)
        split = (batch, tokens, heads, dim // heads)
        keys = (keys * self.scale).view(split).permute(0, 2, 3, 1)[:, :, :, None]  # (B, A, ., 1, M)
        to_scores = (keys * own[:, None, :, None]).reshape(batch, dim, heads * tokens)
        session = visible.clone()
        session[:, -1] = False
        values = values.masked_fill(~session[:, :, None], 0.0).view(split)
        values = values.permute(0, 2, 1, 3)[:, :, :, None]  # (B, A, M, 1, .)
        to_sums = (values * own[:, None, :, None]).reshape(batch, heads * tokens, dim)
        counts = (visible[:, None, :, None] * own[:, None]).reshape(batch, heads * tokens, heads)
        padding = counts.new_zeros(*counts.shape[:2], padded(dim + heads) - dim - heads)
        return to_scores, torch.cat([to_sums, counts, padding], 2)

    def forward(
        self, x: Tensor, projected: list[Tensor], memory: tuple[Tensor, Tensor], visible: Tensor
    ) -> Tensor:
        """Return the tokens ``(B, U, D)`` after the layer.

        Args:
            x: ``(B, U, D)``.
            projected: what ``project`` makes of ``x``.
            memory: what ``memory`` makes of the session.
            visible: ``(B, 1 or U, M)`` bool, the keys that each token attends to.
        """
        mixed = self._attend(projected, memory, visible)
        flat = linear(self.mix, mixed.flatten(0, 1)).add_(x.flatten(0, 1))  # (n, D)
        widened = linear(self.widen, normed_rows(flat)).relu_()
        return linear(self.narrow, widened).add_(flat).view(x.shape)

    def _attend(
        self, projected: list[Tensor], memory: tuple[Tensor, Tensor], visible: Tensor
    ) -> Tensor:
        queries, keys, values = projected
        batch, width, dim = queries.shape
        by_head = (batch, width, self.heads, -1)
        scores = request_product(queries, memory[0]).view(by_head)  # (B, U, A, M)
        own = product((queries * keys).flatten(0, 1), self.head_of)[:, : self.heads]
        scores[..., -1] = own.view(batch, width, self.heads)
        weights = softmax_powers(scores.masked_fill_(~visible[:, :, None], -torch.inf))
        sums = request_product(weights.flatten(2), memory[1])
        total = sums[:, :, dim : dim + self.heads, None]
        mixed = weights[..., -1:] * values.reshape(by_head)
        mixed = mixed.add_(sums[:, :, :dim].unflatten(2, (self.heads, -1))) / total
        return mixed.flatten(2)


class SelfAttentionRanker(Ranker):
    """Stacked causal self-attention over the session with each candidate as the last token.

    A candidate attends to the session and to itself, never to another candidate, so its logits do
    not depend on what else is ranked. The session passes through the layers once per request.
    """

    def __init__(self, config: SelfAttentionConfig, shape: RankerShape) -> None:
        super().__init__(shape)
        dim = shape.dim
        self.session_rows = config.session_rows
        self.user = PaddedLinear(shape.num_heads * dim + shape.state_dim, dim)
        self.candidate = PaddedLinear(dim + shape.num_heads + shape.num_signals, dim)
        self.session = PaddedLinear(dim, dim)
        self.position = nn.Parameter(torch.randn(config.session_rows, dim) / math.sqrt(dim))
        """``(L, D)``, added to session tokens by age; 0 is the newest."""
        self.layers = nn.ModuleList(
            _Layer(dim, config.attention_heads, config.hidden) for _ in range(config.layers)
        )
        self.out = PaddedLinear(dim, shape.num_tasks)
        self.skip = retriever_skip(shape.num_heads, shape.num_tasks)
        with torch.no_grad():
            self.out.weight.zero_()
            self.out.bias.zero_()
        tokens = padded(config.session_rows + 1)
        scores = config.attention_heads * tokens
        self.candidate_floats = 12 * dim + 6 * scores + 4 * config.hidden
        matrices = (config.layers + 2) * scores * (2 * dim + 16)
        self.request_floats = matrices + tokens * self.candidate_floats

    def prepare(self, query: Tensor, user_state: Tensor) -> Prepared:
        """Return the user's part of a candidate token, the visible keys, and two matrices a layer.

        Shapes ``(B, D)``, ``(B, 1, M)``, and per layer those of ``_Layer.memory``.
        """
        dim, rows = self.shape.dim, self.session_rows
        state, packed = user_state.split([self.shape.state_dim, session_width(rows, dim)], 1)
        user = self.user(torch.cat([query.flatten(1), state], 1))
        embeddings, lengths = unpack_session(packed, dim)
        tokens = padded(rows + 1)
        place = torch.arange(tokens, device=lengths.device)
        age = (lengths[:, None] - 1 - place).clamp(0, rows - 1)
        embeddings = torch.nn.functional.pad(embeddings, (0, 0, 0, tokens - rows))
        x = linear(self.session, embeddings.flatten(0, 1)).view(embeddings.shape)
        x = x + self.position[age]
        oneself = place == tokens - 1
        visible = real_rows(lengths, tokens) | oneself  # (B, M)
        causal = visible[:, None] & ((place < place[:, None]) | oneself)  # (B, M, M)
        memories: list[Tensor] = []
        for number, layer in enumerate(self.layers):
            assert isinstance(layer, _Layer)
            projected = layer.project(x)
            memory = layer.memory(projected[1], projected[2], visible)
            memories += memory
            if number + 1 < len(self.layers):
                x = layer(x, projected, memory, causal)
        return user, visible[:, None], *memories

    def score(self, prepared: Prepared, items: Tensor, refined: Tensor, signals: Tensor) -> Tensor:
        """Return the logits ``(B, U, T)``."""
        user, visible, *memories = prepared
        given = joined(items, refined, self.scaled(signals))
        x = linear(self.candidate, given).view(items.shape).add_(user[:, None])
        for number, layer in enumerate(self.layers):
            assert isinstance(layer, _Layer)
            memory = (memories[2 * number], memories[2 * number + 1])
            x = layer(x, layer.project(x), memory, visible)
        logits = linear(self.out, normed_rows(x.flatten(0, 1)))
        return logits.add_(linear(self.skip, joined(refined))).view(*refined.shape[:2], -1)

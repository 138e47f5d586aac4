"""Sequence encoders: the items of a session to what is known of the user after each of them.

In evaluation mode a session's states have the same bits alone, in any batch, at any position of it,
padded to any length and on any number of threads; matrix products, sums and exponentials are those
of ``model/dense.py`` and ``kernels/fixed_math.py``, which have no gradient. Training mode runs
torch's own operators and dropout.

Shapes: B sessions, L positions, D width, A attention heads, d = D / A, M positions that are asked
for of each session, R rows of all sessions together, padded to a multiple of 16.

Source: W.-C. Kang and J. McAuley, Self-Attentive Sequential Recommendation, ICDM 2018, section 3;
J. Zhai et al., Actions Speak Louder than Words, ICML 2024, section 3.
"""

import math
from abc import abstractmethod
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn

from silvershard.kernels import fixed_exp, fixed_sigmoid, fixed_sqrt
from silvershard.kernels.contract import check_range, check_tensor
from silvershard.model.dense import PaddedLinear, padded, padded_product
from silvershard.model.encoder_config import (
    AttentionEncoderConfig,
    HSTUEncoderConfig,
    MeanEncoderConfig,
    SequenceEncoderConfig,
    check_encoder,
)

_EPSILON = 1e-5
_INITIAL_STD = 0.02
# Attention scores held at a time outside of training, which bounds the scratch memory.
_CHUNK_SCORES = 1 << 18


def build_encoder(config: SequenceEncoderConfig, dim: int) -> "SequenceEncoder":
    """Return a new encoder of sessions of width ``dim``.

    Raises:
        ValueError: if ``dim`` is below 1, or ``config.heads`` does not divide it.
    """
    check_encoder(config, dim=dim)
    if isinstance(config, MeanEncoderConfig):
        return MeanEncoder(config, dim)
    return LayeredEncoder(config, dim)


class SequenceEncoder(nn.Module):
    """What every encoder offers; a session is left-aligned, its oldest item first."""

    def __init__(self, max_length: int, dim: int) -> None:
        super().__init__()
        self.max_length = max_length
        self.dim = dim

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        """Return the state after each item, which depends on no later item.

        Args:
            x: ``(B, L, D)`` float32, L at most ``max_length``; finite in the first ``lengths`` rows
                of each session, whatever it may be beyond them. B and L may be 0.
            lengths: ``(B,)`` int64 in [0, L].

        Returns:
            ``(B, L, D)`` float32; zeros beyond ``lengths``.

        Raises:
            ValueError: if shapes, dtypes or lengths disagree.
        """
        real = self._real(x, lengths)
        if not x.shape[1]:
            return x.new_zeros(x.shape)
        return torch.where(real, self._encode(torch.where(real, x, 0.0), None), 0.0)

    def forward_last(self, x: Tensor, lengths: Tensor) -> Tensor:
        """Return ``last(forward(x, lengths), lengths)``, ``(B, D)``, with less work.

        It has the same bits in evaluation mode.
        """
        real = self._real(x, lengths)
        if not x.shape[1]:
            return x.new_zeros(x.shape[0], self.dim)
        states = self._encode(torch.where(real, x, 0.0), (lengths - 1).clamp(min=0))
        return torch.where((lengths > 0)[:, None], states, 0.0)

    def last(self, states: Tensor, lengths: Tensor) -> Tensor:
        """Return the state after the last item, ``(B, D)``; zeros for an empty session.

        Args:
            states: ``(B, L, D)`` float32 from ``forward``.
            lengths: ``(B,)`` int64 in [0, L].

        Raises:
            ValueError: if shapes, dtypes or lengths disagree.
        """
        self._real(states, lengths)
        if not states.shape[1]:
            return states.new_zeros(states.shape[0], self.dim)
        found = _at(states, (lengths - 1).clamp(min=0))
        return torch.where((lengths > 0)[:, None], found, 0.0)

    def _real(self, x: Tensor, lengths: Tensor) -> Tensor:
        """Check the arguments; return ``(B, L, 1)`` bool, True at the items of a session."""
        check_tensor("x", x, torch.float32, ("B", "L", self.dim))
        num_sessions, length, _ = x.shape
        if length > self.max_length:
            raise ValueError(f"x must have L at most max_length={self.max_length}, got {length}")
        check_tensor("lengths", lengths, torch.int64, (num_sessions,))
        check_range("lengths", lengths, 0, length + 1)
        return (torch.arange(length, device=x.device) < lengths[:, None])[..., None]

    @abstractmethod
    def _encode(self, x: Tensor, last: Tensor | None) -> Tensor:
        """Return the states of ``x (B, L, D)``; only those at ``last (B,)``, ``(B, D)``, if given.

        B is 0 or more, L at least 1; all of ``x`` is finite.
        """


class MeanEncoder(SequenceEncoder):
    """The state after an item is the mean of the session up to it."""

    def __init__(self, config: MeanEncoderConfig, dim: int) -> None:
        super().__init__(config.max_length, dim)

    def _encode(self, x: Tensor, last: Tensor | None) -> Tensor:
        length = x.shape[1]
        total = x
        step = 1
        # Each round doubles the items in a sum, so its order depends on the position only.
        while step < length:
            total = torch.cat([total[:, :step], total[:, step:] + total[:, :-step]], 1)
            step *= 2
        count = torch.arange(1, length + 1, dtype=torch.float32, device=x.device)
        means = total / count[:, None]
        return means if last is None else _at(means, last)


class LayeredEncoder(SequenceEncoder):
    """A stack of attention layers over the items and their positions.

    The state of the attention encoder is normalised; that of HSTU is the sum of its layers.
    """

    def __init__(self, config: AttentionEncoderConfig | HSTUEncoderConfig, dim: int) -> None:
        super().__init__(config.max_length, dim)
        self.num_heads = config.heads
        self.positions = (
            nn.Parameter(torch.randn(config.max_length, dim) * _INITIAL_STD)
            if config.absolute_positions
            else None
        )
        """``(max_length, D)`` float32, added to the items."""
        self.dropout = nn.Dropout(config.dropout)
        self.layers: nn.ModuleList
        self.norm: nn.Module
        if isinstance(config, AttentionEncoderConfig):
            self.layers = nn.ModuleList(AttentionLayer(config, dim) for _ in range(config.layers))
            self.norm = RowNorm(dim)
        else:
            self.layers = nn.ModuleList(HSTULayer(config, dim) for _ in range(config.layers))
            self.norm = nn.Identity()

    def _encode(self, x: Tensor, last: Tensor | None) -> Tensor:
        num_sessions, length, _ = x.shape
        # A compiled graph takes the whole batch, so that it serves batches of every size.
        if self.training or torch.compiler.is_compiling():
            return self._states(x, last)
        step = max(1, _CHUNK_SCORES // max(1, self.num_heads * length * length))
        if num_sessions <= step:
            return self._states(x, last)
        parts = [slice(start, start + step) for start in range(0, num_sessions, step)]
        return torch.cat([self._states(x[at], None if last is None else last[at]) for at in parts])

    def _states(self, x: Tensor, last: Tensor | None) -> Tensor:
        num_sessions, length, dim = x.shape
        if self.positions is not None:
            x = x + self.positions[:length]
        rows = num_sessions * length
        x = self.dropout(nn.functional.pad(x.reshape(rows, dim), (0, 0, 0, -rows % 16)))
        every = Asked.all_of(num_sessions, length, x.device)
        final = every if last is None else Asked.last_of(last, length)
        for layer in self.layers[:-1]:
            x = layer(x, every)
        x = self.norm(self.layers[-1](x, final))
        return x[:rows].view(num_sessions, length, dim) if last is None else x[:num_sessions]


class Asked(NamedTuple):
    """The positions whose states are asked for."""

    num_sessions: int
    rows: Tensor | None
    """``(R,)`` int64, their rows among those of all positions; None where they are all."""
    distance: Tensor
    """``(B or 1, M, L)`` int64: position minus that of each item, negative for a later one."""

    @classmethod
    def all_of(cls, num_sessions: int, length: int, device: torch.device) -> Self:
        """All positions."""
        places = torch.arange(length, device=device)
        return cls(num_sessions, None, (places[:, None] - places)[None])

    @classmethod
    def last_of(cls, last: Tensor, length: int) -> Self:
        """One position of each session, ``(B,)`` int64."""
        num_sessions = last.shape[0]
        rows = torch.arange(num_sessions, device=last.device) * length + last
        # Row 0 fills up; what becomes of it there is cut off.
        rows = nn.functional.pad(rows, (0, -num_sessions % 16))
        places = torch.arange(length, device=last.device)
        return cls(num_sessions, rows, last[:, None, None] - places)

    def of(self, x: Tensor) -> Tensor:
        """The rows asked for of rows ``(R, D)`` of all positions."""
        return x if self.rows is None else x[self.rows]


class CausalAttention(nn.Module):
    """Attention of positions to themselves and earlier ones."""

    def __init__(self, config: AttentionEncoderConfig | HSTUEncoderConfig) -> None:
        super().__init__()
        self.max_length = config.max_length
        self.num_heads = config.heads
        self.bias = (
            nn.Parameter(torch.randn(config.heads, config.max_length) * _INITIAL_STD)
            if config.relative_bias
            else None
        )
        """``(A, max_length)`` float32, added to the scores of a head by distance."""

    def forward(self, query: Tensor, key_value: Tensor, asked: Asked) -> Tensor:
        """Return the weighted sums of what the positions asked for see.

        Args:
            query: ``(R, D)`` float32 of the positions asked for.
            key_value: ``(R, 2 D)`` float32 of all positions.
            asked: the positions of the queries.

        Returns:
            ``(R, D)`` float32 of the positions asked for; zeros in rows of padding.
        """
        num_queries, num_keys = asked.distance.shape[1:]
        batch = (asked.num_sessions, self.num_heads)
        # Sums over 112 and over 208 terms were seen to differ though the further ones were zeros,
        # so in evaluation there are always as many.
        width = num_keys if self.training else padded(self.max_length)
        (queries,) = _by_head(query, 1, batch, num_queries, padded(num_queries))
        keys, values = _by_head(key_value, 2, batch, num_keys, width)
        scores = torch.bmm(queries, keys.mT).unflatten(0, batch)[:, :, :num_queries, :num_keys]
        if self.bias is not None:
            scores = scores + self.bias[:, asked.distance.clamp(min=0)].transpose(0, 1)
        weights = scores.new_zeros(*batch, queries.shape[1], width)
        weights[:, :, :num_queries, :num_keys] = self._weights(scores, asked.distance[:, None] >= 0)
        sums = self._sums(weights.flatten(0, 1), values).unflatten(0, batch)
        out = query.new_zeros(query.shape)
        width = query.shape[1] // self.num_heads
        rows = out[: asked.num_sessions * num_queries]
        rows = rows.view(asked.num_sessions, num_queries, self.num_heads, width)
        rows.copy_(sums[:, :, :num_queries, :width].transpose(1, 2))
        return out

    @abstractmethod
    def _weights(self, scores: Tensor, seen: Tensor) -> Tensor:
        """Return weights ``(B, A, M, L)`` of what is ``seen``, zeros elsewhere."""

    def _sums(self, weights: Tensor, values: Tensor) -> Tensor:
        """Return ``weights (B A, M, L) @ values (B A, L, d)``, scaled."""
        return torch.bmm(weights, values)


class SoftmaxAttention(CausalAttention):
    """Weights are the softmax of the scores."""

    def __init__(self, config: AttentionEncoderConfig) -> None:
        super().__init__(config)
        self.dropout = nn.Dropout(config.dropout)

    def _weights(self, scores: Tensor, seen: Tensor) -> Tensor:
        scores = torch.where(seen, scores, -math.inf)
        if self.training:
            dropped: Tensor = self.dropout(torch.softmax(scores, -1))
            return dropped
        return fixed_exp(scores - scores.amax(-1, keepdim=True))

    def _sums(self, weights: Tensor, values: Tensor) -> Tensor:
        sums = super()._sums(weights, values)
        if self.training:
            return sums
        return sums / _row_sums(weights.flatten(0, 1)).view(*sums.shape[:2], 1)


class PointwiseAttention(CausalAttention):
    """Weights are ``silu(score) / max_length``; they do not sum to 1."""

    def _weights(self, scores: Tensor, seen: Tensor) -> Tensor:
        return torch.where(seen, _silu(scores, training=self.training), 0.0)

    def _sums(self, weights: Tensor, values: Tensor) -> Tensor:
        return super()._sums(weights, values) / self.max_length


class AttentionLayer(nn.Module):
    """Self-attention, then a perceptron; both normalise their inputs and add to them."""

    def __init__(self, config: AttentionEncoderConfig, dim: int) -> None:
        super().__init__()
        self.query_scale = 1.0 / math.sqrt(dim // config.heads)
        self.norm = RowNorm(dim)
        self.query = PaddedLinear(dim, dim)
        self.key_value = PaddedLinear(dim, 2 * dim)
        self.attention = SoftmaxAttention(config)
        self.out = PaddedLinear(dim, dim)
        self.hidden_norm = RowNorm(dim)
        self.hidden = PaddedLinear(dim, config.feed_forward * dim)
        self.hidden_out = PaddedLinear(config.feed_forward * dim, dim)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, asked: Asked) -> Tensor:
        """Return the states ``(R, D)`` asked for, from the rows ``(R, D)`` of all positions."""
        normed = self.norm(x)
        query = _linear(self.query, asked.of(normed)) * self.query_scale
        mixed = self.attention(query, _linear(self.key_value, normed), asked)
        x = asked.of(x) + self.dropout(_linear(self.out, mixed))
        hidden = torch.relu(_linear(self.hidden, self.hidden_norm(x)))
        out: Tensor = self.dropout(_linear(self.hidden_out, self.dropout(hidden)))
        return x + out


class HSTULayer(nn.Module):
    """``x + f2(norm(A V) * U)`` with ``U, V, Q, K = silu(f1(norm(x)))``."""

    def __init__(self, config: HSTUEncoderConfig, dim: int) -> None:
        super().__init__()
        self.norm = RowNorm(dim)
        self.gate_query = PaddedLinear(dim, 2 * dim)
        self.key_value = PaddedLinear(dim, 2 * dim)
        self.attention = PointwiseAttention(config)
        self.mixed_norm = RowNorm(dim)
        self.out = PaddedLinear(dim, dim)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, asked: Asked) -> Tensor:
        """Return the states ``(R, D)`` asked for, from the rows ``(R, D)`` of all positions."""
        normed = self.norm(x)
        few, many = _linear(self.gate_query, asked.of(normed)), _linear(self.key_value, normed)
        # One call for both, because half of the time of `fixed_sigmoid` is its start.
        both = _silu(torch.cat([few.flatten(), many.flatten()]), training=self.training)
        gate, query = both[: few.numel()].view_as(few).chunk(2, 1)
        mixed = self.attention(query, both[few.numel() :].view_as(many), asked)
        out = _linear(self.out, self.dropout(self.mixed_norm(mixed) * gate))
        return asked.of(x) + out


class RowNorm(nn.Module):
    """Layer normalisation with a learned scale and shift."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(dim))
        self.shift = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        """Return rows ``(R, D)`` float32 of mean 0 and variance 1, scaled and shifted."""
        dim = x.shape[1]
        if self.training:
            return nn.functional.layer_norm(x, (dim,), self.scale, self.shift, _EPSILON)
        centred = x - _row_sums(x) / dim
        deviation = fixed_sqrt(_row_sums(centred * centred) / dim + _EPSILON)
        return centred / deviation * self.scale + self.shift


def _silu(x: Tensor, *, training: bool) -> Tensor:
    return nn.functional.silu(x) if training else x * fixed_sigmoid(x)


def _linear(layer: PaddedLinear, x: Tensor) -> Tensor:
    """Return what the layer does with rows ``(R, I)``; R needs no further padding."""
    return _product(x, layer.weight)[:, : layer.out_features] + layer.bias


def _row_sums(x: Tensor) -> Tensor:
    """Sums ``(R, 1)`` of rows ``(R, I)``, R a multiple of 16, in the order of a matrix product."""
    # It takes a third of the time of `fixed_dot`.
    return _product(x, x.new_ones(padded(x.shape[1]), padded(1)))[:, :1]


def _product(x: Tensor, weight: Tensor) -> Tensor:
    """``padded_product`` of rows that may be padded already; ``weight`` is."""
    return x @ weight if x.shape[1] == weight.shape[0] else padded_product(x, weight)


def _by_head(
    x: Tensor, num_parts: int, batch: tuple[int, int], length: int, num_rows: int
) -> Tensor:
    """Return ``x`` divided into parts and heads, padded with zeros.

    Args:
        x: ``(R, num_parts * D)`` float32, ``length`` rows of each session.
        num_parts: P, matrices that lie side by side.
        batch: B and A.
        length: rows of each session.
        num_rows: L, rows of each session in the result.

    Returns:
        ``(P, B * A, L, d)`` float32, contiguous, d padded to a multiple of 16.
    """
    num_sessions, num_heads = batch
    dim = x.shape[1] // (num_parts * num_heads)
    rows = x[: num_sessions * length].view(num_sessions, length, num_parts, num_heads, dim)
    filled = x.new_zeros(num_parts, *batch, num_rows, padded(dim))
    filled[..., :length, :dim] = rows.permute(2, 0, 3, 1, 4)
    return filled.flatten(1, 2)


def _at(x: Tensor, last: Tensor) -> Tensor:
    """Rows ``(B, D)`` of ``x (B, L, D)`` at one position of each session, ``(B,)`` int64."""
    return x[torch.arange(x.shape[0], device=x.device), last]

"""What every reranker is: task logits of the candidates of requests, in bounded memory.

Shapes: B requests, U candidates of a request, H heads, D embedding dimension, Us user state, Vs
signals, T tasks, N pages in the pool, G slots per page.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from silvershard.model.dense import PaddedLinear, padded
from silvershard.model.ranker_session import session_width

TEMPORARY_BYTES = 64 << 20
"""What ``Ranker.rank_slots`` allocates at most at a time, besides its result."""

_BYTES = 4
_FEWEST_ROWS = 16
# A cosine of 1 means even odds, so that untrained probabilities are small but distinct.
_SKIP_SCALE = 10.0

Prepared = tuple[Tensor, ...]
"""What a ranker computes once per request; the first dimension of each tensor is B."""

_Tile = Callable[[Prepared, slice, slice], Tensor]


class RankerShape(NamedTuple):
    """The sizes that the model around a ranker gives it."""

    dim: int
    """D."""
    num_heads: int
    """H."""
    state_dim: int
    """Width of the user state without a session."""
    session_length: int
    """Most ids of a history that the user tower reads."""
    num_signals: int
    """Vs."""
    num_tasks: int
    """T."""


def retriever_skip(num_heads: int, num_tasks: int) -> PaddedLinear:
    """Return the layer that turns refined scores into the logits of an untrained ranker.

    Task t follows head t where there are as many heads, else the mean of all heads.
    """
    skip = PaddedLinear(num_heads, num_tasks)
    with torch.no_grad():
        skip.weight.zero_()
        skip.bias.fill_(-_SKIP_SCALE)
        for task in range(num_tasks):
            if num_heads == num_tasks:
                skip.weight[task, task] = _SKIP_SCALE
            else:
                skip.weight[:num_heads, task] = _SKIP_SCALE / num_heads
    return skip


class Ranker(nn.Module, ABC):
    """Task logits: a linear function of the refined scores plus what the ranker has learned.

    What is learned starts at zero: an untrained ranker orders as the retriever does. Work on the
    user is done once per request, candidates are computed in tiles of bounded size, and a logit has
    the same bits in any tile, batch and company.

    A ranker with ``session_rows`` reads a user state whose last columns are a packed session of
    that many rows (``ranker_session.pack_session``).
    """

    signal_mean: Tensor
    signal_scale: Tensor
    skip: PaddedLinear

    session_rows: int = 0
    request_floats: int
    """Upper bound of the float32 numbers held per request of a tile."""
    candidate_floats: int
    """Upper bound of the float32 numbers held per candidate of a tile."""

    def __init__(self, shape: RankerShape) -> None:
        super().__init__()
        self.shape = shape
        self.register_buffer("signal_mean", torch.zeros(shape.num_signals))
        self.register_buffer("signal_scale", torch.ones(shape.num_signals))

    @abstractmethod
    def prepare(self, query: Tensor, user_state: Tensor) -> Prepared:
        """Return what ``score`` needs of each request ``(B, H, D)`` and ``(B, Us)``."""

    @abstractmethod
    def score(self, prepared: Prepared, items: Tensor, refined: Tensor, signals: Tensor) -> Tensor:
        """Return the logits ``(B, U, T)``; the inputs are those of ``forward``."""

    def prepare_slots(self, query: Tensor, user_state: Tensor) -> Prepared:
        """Return what ``score_slots`` needs of each request."""
        return self.prepare(query, user_state)

    def score_slots(
        self, prepared: Prepared, cache: Tensor, slots: Tensor, refined: Tensor, signals: Tensor
    ) -> Tensor:
        """Return the logits ``(B, U, T)``; any numbers at padding."""
        width = slots.shape[1]
        extra = padded(width) - width
        if extra:
            # Padded once, the rows need no padding at every product.
            slots = functional.pad(slots, (0, extra), value=-1)
            refined = functional.pad(refined, (0, 0, 0, extra))
            signals = functional.pad(signals, (0, 0, 0, extra))
        rows = cache.flatten(0, 1)
        if rows.shape[0]:
            items = rows.index_select(0, slots.flatten().clamp(min=0)).float()
        else:
            items = refined.new_zeros(slots.numel(), self.shape.dim)
        items = items.view(*slots.shape, -1)
        return self.score(prepared, items, refined, signals)[:, :width]

    def forward(
        self, query: Tensor, user_state: Tensor, items: Tensor, refined: Tensor, signals: Tensor
    ) -> Tensor:
        """Return the logits of candidates; differentiable.

        Without gradients memory is bounded as in ``rank_slots``, and a logit has the same bits
        whatever candidates and requests surround it.

        Args:
            query: ``(B, H, D)`` float32.
            user_state: ``(B, Us)`` float32.
            items: ``(B, U, D)`` float32.
            refined: ``(B, U, H)`` float32 scores of the item for each head.
            signals: ``(B, U, Vs)`` float32.

        Returns:
            ``(B, U, T)`` float32.

        Raises:
            ValueError: if a shape is another.
        """
        batch, dim = query.shape[0], self.shape.dim
        if items.ndim != 3 or (items.shape[0], items.shape[2]) != (batch, dim):
            raise ValueError(f"items must be ({batch}, U, {dim}), got {tuple(items.shape)}")
        self._check_shapes(query, user_state, items.shape[1], refined, signals)
        given = (query, user_state, items, refined, signals)
        if torch.is_grad_enabled() and any(x.requires_grad for x in (*given, *self.parameters())):
            return self.score(self.prepare(query, user_state), items, refined, signals)

        def tile(prepared: Prepared, requests: slice, columns: slice) -> Tensor:
            at = (requests, columns)
            return self.score(prepared, items[at], refined[at], signals[at])

        return self._tiled(self.prepare, tile, query, user_state, items.shape[1])

    @torch.no_grad()
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

        A logit has the same bits whatever candidates and requests surround it. Whatever B and U
        are, at most ``TEMPORARY_BYTES`` are held besides the arguments and the result.

        Args:
            query: ``(B, H, D)`` float32.
            user_state: ``(B, Us)`` float32.
            cache: ``(N, G, D)`` float16 item embeddings.
            slots: ``(B, U)`` int64 in [-1, N G); -1 is padding.
            refined: ``(B, U, H)`` float32 scores of the item for each head.
            signals: ``(B, U, Vs)`` float32.

        Returns:
            ``(B, U, T)`` float32; zeros at padding, whatever the other inputs hold there.

        Raises:
            ValueError: if a shape is another.
        """
        if slots.ndim != 2 or slots.shape[0] != query.shape[0]:
            raise ValueError(f"slots must be ({query.shape[0]}, U), got {tuple(slots.shape)}")
        self._check_shapes(query, user_state, slots.shape[1], refined, signals)
        if cache.ndim != 3 or cache.shape[2] != self.shape.dim:
            raise ValueError(f"cache must be (N, G, {self.shape.dim}), got {tuple(cache.shape)}")

        def tile(prepared: Prepared, requests: slice, columns: slice) -> Tensor:
            at = (requests, columns)
            logits = self.score_slots(prepared, cache, slots[at], refined[at], signals[at])
            return logits.masked_fill_((slots[at] < 0)[:, :, None], 0.0)

        return self._tiled(self.prepare_slots, tile, query, user_state, slots.shape[1])

    def scaled(self, signals: Tensor) -> Tensor:
        """Return signals of mean 0 and deviation 1 over the items of the training set."""
        return (signals - self.signal_mean) * self.signal_scale

    def _tiled(
        self,
        prepare: Callable[[Tensor, Tensor], Prepared],
        tile: _Tile,
        query: Tensor,
        user_state: Tensor,
        width: int,
    ) -> Tensor:
        most = TEMPORARY_BYTES // 2 // _BYTES
        rows = max(most // self.candidate_floats // _FEWEST_ROWS, 1) * _FEWEST_ROWS
        # Several requests share a tile where the candidates of each are few.
        group = max(min(most // self.request_floats, rows // padded(width)), 1)
        batch = query.shape[0]
        out = query.new_empty(batch, width, self.shape.num_tasks)
        if not out.numel():
            return out
        if batch <= group and width <= rows:
            return tile(prepare(query, user_state), slice(None), slice(None))
        for first in range(0, batch, group):
            requests = slice(first, first + group)
            prepared = prepare(query[requests], user_state[requests])
            for left in range(0, width, rows):
                columns = slice(left, left + rows)
                out[requests, columns] = tile(prepared, requests, columns)
        return out

    def _check_shapes(
        self,
        query: Tensor,
        user_state: Tensor,
        width: int,
        refined: Tensor,
        signals: Tensor,
    ) -> None:
        shape, batch = self.shape, query.shape[0]
        state = shape.state_dim + session_width(self.session_rows, shape.dim)
        for name, tensor, wanted in (
            ("query", query, (batch, shape.num_heads, shape.dim)),
            ("user_state", user_state, (batch, state)),
            ("refined", refined, (batch, width, shape.num_heads)),
            ("signals", signals, (batch, width, shape.num_signals)),
        ):
            if tensor.shape != wanted:
                raise ValueError(f"{name} must be {wanted}, got {tuple(tensor.shape)}")

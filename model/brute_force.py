"""Exact search over all items by the module alone: no index, no planes, no partitions.

It is what an exact request must be answered with, bit for bit, computed by other means than the
index: the filter is evaluated item by item over the catalogue's columns, every eligible item is
scored from the half-precision form of its embedding, and the list is sorted as a whole.

Shapes: N items, U eligible items, H heads, D embedding dimension, T tasks, K results.
"""

from typing import NamedTuple, Protocol, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from silvershard.kernels import Relation, fixed_dot, fixed_sigmoid, value_program
from silvershard.model.catalogue import NULL_INT, Catalogue
from silvershard.model.compiled_request import compile_request
from silvershard.model.filter import parse_filter
from silvershard.model.filter_expr import And, AnyItem, Compare, Expr, Not, Or, Term
from silvershard.model.request import Request
from silvershard.model.retriever import RetrievalModel
from silvershard.model.spec import ServingSpec

_MAX_VALUE = torch.finfo(torch.float32).max
_CHUNK_ITEMS = 4096
_RELATIONS = {
    Relation.LT: np.less,
    Relation.LE: np.less_equal,
    Relation.EQ: np.equal,
    Relation.NE: np.not_equal,
    Relation.GE: np.greater_equal,
    Relation.GT: np.greater,
}


class ExactAnswer(NamedTuple):
    """Results best first, without padding."""

    item_ids: NDArray[np.int64]
    """``(K,)``."""
    scores: NDArray[np.float32]
    """``(K,)`` values."""
    task_scores: dict[str, NDArray[np.float32]]
    """``(K,)`` probability per task."""
    exhausted: bool
    """True when fewer than k items are eligible."""


class _Model(RetrievalModel, Protocol):
    training: bool


class BruteForce:
    """A model and all of its items.

    Args:
        model: in eval mode.
        spec: of the generation.
        catalogue: its items, N of them.
        embeddings: ``(N, D)`` float32 of the items, as the model gives them.
    """

    def __init__(
        self, model: nn.Module, spec: ServingSpec, catalogue: Catalogue, embeddings: Tensor
    ) -> None:
        self._model = cast(_Model, model)
        self._spec = spec
        self._catalogue = catalogue
        self._cache = embeddings.half().cpu()
        self._signals = torch.from_numpy(catalogue.signals)

    def eligible(self, request: Request) -> NDArray[np.bool_]:
        """Return which items pass the filter of a request, ``(N,)``; excluded ids still do.

        Raises:
            FilterError: if the filter is none.
        """
        expr = parse_filter(request.filter, request.params, self._spec.item_schema)
        return matches(expr, self._catalogue)

    @torch.inference_mode()
    def answer(self, request: Request) -> ExactAnswer:
        """Return the answer of a request whose ``exact`` is set.

        Raises:
            RequestError: if the request cannot be served as stated.
        """
        compiled = compile_request(request, self._spec)
        allowed = self.eligible(request)
        allowed &= ~np.isin(self._catalogue.item_ids, compiled.exclude)
        rows = torch.from_numpy(np.flatnonzero(allowed))
        encoded = self._model.encode([compiled.features])
        refined = self._refined(encoded.embedding[0], rows)  # (U, H)
        signals = self._signals[rows][None]
        logits = self._model.rank_slots(
            encoded.embedding,
            encoded.user_state,
            self._cache[:, None],
            rows[None],
            refined[None],
            signals,
        )
        tasks = fixed_sigmoid(logits)[0]  # (U, T)
        score = (refined + 0.0).amax(1, keepdim=True)  # (U, 1)
        columns = torch.cat([score, tasks, signals[0]], 1)
        values = value_program(
            columns,
            torch.zeros(len(rows), dtype=torch.int64),
            compiled.value_ops[None],
            compiled.value_constants[None],
        ).clamp(-_MAX_VALUE, _MAX_VALUE)
        scores, item_ids = values.numpy(), self._catalogue.item_ids[rows.numpy()]
        best = np.lexsort((item_ids, -scores))[: compiled.k]
        names = self._spec.item_schema.tasks
        return ExactAnswer(
            item_ids=item_ids[best],
            scores=scores[best],
            task_scores={name: tasks[:, at].numpy()[best] for at, name in enumerate(names)},
            exhausted=len(best) < compiled.k,
        )

    def _refined(self, query: Tensor, rows: Tensor) -> Tensor:
        """Return the score of each item for each head, ``(U, H)`` float32."""
        parts = [
            fixed_dot(query[None], self._cache[chunk].float()[:, None])
            for chunk in rows.split(_CHUNK_ITEMS)
        ]
        return torch.cat(parts)


def matches(expr: Expr, catalogue: Catalogue) -> NDArray[np.bool_]:
    """Return which items an expression holds for, ``(N,)``: the meaning of a filter, column-wise.

    An item without a value fails every term and every comparison on it.
    """
    if isinstance(expr, AnyItem):
        return np.ones(len(catalogue), dtype=np.bool_)
    if isinstance(expr, Not):
        return ~matches(expr.operand, catalogue)
    if isinstance(expr, And | Or):
        joined = np.logical_and if isinstance(expr, And) else np.logical_or
        found: NDArray[np.bool_] = joined.reduce(
            [matches(operand, catalogue) for operand in expr.operands]
        )
        return found
    if isinstance(expr, Term):
        column = catalogue.categories[expr.attribute]
        holders = np.zeros(len(catalogue), dtype=np.bool_)
        holders[column.row_of[column.values == expr.value]] = True
        return holders
    return _compared(expr, catalogue)


def _compared(expr: Compare, catalogue: Catalogue) -> NDArray[np.bool_]:
    column = catalogue.numbers[expr.attribute]
    given = ~np.isnan(column) if column.dtype == np.float64 else column != NULL_INT
    holds: NDArray[np.bool_] = _RELATIONS[expr.relation](column, expr.value) & given
    return holds

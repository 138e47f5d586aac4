"""The state machine of one shard: it answers the rounds of a query over its own documents.

It does no I/O after loading and reads time only from the clock it is given, so that it can be
simulated. One thread owns it.

Shapes: B requests, H heads, R candidates per head, K results.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from silvershard.model.request import FeatureValues
from silvershard.model.retriever import PartCandidates, Retriever
from silvershard.model.spec import ServingSpec
from silvershard.model.two_tower import Encoded
from silvershard.model.types import Cutoffs, RoundOne, RoundTwo, Work
from silvershard.shard.errors import CandidatesExpired
from silvershard.shard.fields import FieldStore, FieldValue


class _OpenQuery(NamedTuple):
    work: Work
    candidates: list[PartCandidates]
    expires_at_s: float


class ShardExecutor:
    """One shard of one generation, with the candidates of the queries that are open on it."""

    def __init__(
        self,
        retriever: Retriever,
        fields: FieldStore,
        *,
        shard: int,
        num_shards: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._retriever = retriever
        self._fields = fields
        self._clock = clock
        self._open: dict[str, _OpenQuery] = {}
        self.shard = shard
        self.num_shards = num_shards
        self.documents = retriever.documents

    @property
    def spec(self) -> ServingSpec:
        """Return the generation as its clients see it."""
        return self._retriever.spec

    @property
    def num_open(self) -> int:
        """Return how many queries have candidates open."""
        return len(self._open)

    def encode(self, features: Sequence[Mapping[str, FeatureValues]]) -> Encoded:
        """Return query embeddings and user states of checked features."""
        return self._retriever.encode(features)

    def count(self, scan: Tensor) -> Tensor:
        """Return how many of this shard's documents pass each program ``(B, L, 4)``, ``(B,)``."""
        return self._retriever.count(scan)

    def open(self, key: str, work: Work, expires_at_s: float) -> RoundOne:
        """Run round one and keep its candidates under ``key``.

        Args:
            key: of the query batch, unique per router.
            work: the batch.
            expires_at_s: reading of the shard's clock at which the candidates are given up.
        """
        self.expire()
        first, candidates = self._retriever.open(work)
        self._open[key] = _OpenQuery(work, candidates, expires_at_s)
        return first

    def close(self, key: str, cutoffs: Cutoffs) -> RoundTwo:
        """Run round two on open candidates, which stay open so that a lost shard can be cut out.

        Raises:
            CandidatesExpired: if ``key`` is not open.
        """
        self.expire()
        query = self._open.get(key)
        if query is None:
            raise CandidatesExpired(key)
        return self._retriever.close(query.work, query.candidates, cutoffs)

    def open_and_close(
        self, key: str, work: Work, cutoffs: Cutoffs, expires_at_s: float
    ) -> RoundTwo:
        """Run both rounds at once, for a replica that takes over when the cutoffs are known."""
        self.open(key, work, expires_at_s)
        return self.close(key, cutoffs)

    def release(self, key: str) -> None:
        """Give up the candidates of a query; unknown keys are ignored."""
        self._open.pop(key, None)

    def expire(self) -> int:
        """Give up the candidates whose time ran out; return how many queries that ended."""
        now = self._clock()
        gone = [key for key, query in self._open.items() if query.expires_at_s <= now]
        for key in gone:
            del self._open[key]
        return len(gone)

    def fields(self, item_ids: Sequence[int], names: Sequence[str]) -> dict[str, list[FieldValue]]:
        """Return stored columns of items that this shard holds."""
        return self._fields.lookup(item_ids, names)

    def warm(self) -> None:
        """Run every stage once on an empty user, so that the first query pays no start-up cost."""
        encoded = self.encode([{}])
        batch = encoded.embedding.shape[0]
        empty = torch.zeros(batch, 0, 4, dtype=torch.int64)
        work = Work(
            embedding=encoded.embedding,
            user_state=encoded.user_state,
            scan=empty,
            verify=empty,
            exclude=torch.zeros(batch, 0, dtype=torch.int64),
            value_ops=torch.tensor([[[1, 0]]], dtype=torch.int32),
            value_constants=torch.zeros(batch, 1),
            probes=torch.tensor([self.spec.defaults.probes]),
            ann_k=torch.tensor([self.spec.defaults.ann_k]),
            semantic_k=torch.tensor([self.spec.defaults.semantic_k]),
            k=torch.tensor([1]),
        )
        first = self.open("warm", work, float("inf"))
        merge = self._retriever.merge
        self.close("warm", merge.cutoffs([first], work.ann_k, work.semantic_k))
        self.release("warm")

"""The state machine of one shard: it answers the rounds of a query over its own documents.

It does no I/O after loading and reads time only from the clock it is given, so that it can be
simulated. One thread owns it.

Updates are committed between two calls. A query that is open meanwhile goes on with the items as
they were when it was opened.

Shapes: B requests, H heads, R candidates per head, K results, L partitions of the update log.
"""

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from silvershard.model.request import FeatureValues
from silvershard.model.retriever import PartCandidates, Retriever
from silvershard.model.spec import ServingSpec
from silvershard.model.stages import Proceed, always
from silvershard.model.two_tower import Encoded
from silvershard.model.types import Cutoffs, RoundOne, RoundTwo, Work
from silvershard.shard.coalesce import Rejection
from silvershard.shard.errors import CandidatesExpired, UpdatesUnsupported
from silvershard.shard.fields import FieldStore, FieldValue
from silvershard.shard.live_index import LiveIndex
from silvershard.shard.page_pool import PoolUsage
from silvershard.shard.updater import Prepared, ShardUpdater

_DELETES_KNOWN = 1 << 18
"""Deleted ids that stay known with their versions, of 36 bytes each."""
_MOST_PIECES = 1024
"""In which those of a part are held: one of a few ids takes 1.5 KB."""
_WARM_BATCHES = (1, 2, 4, 8, 16, 32, 64)
_WARM_RUNS = 2


class _OpenQuery(NamedTuple):
    work: Work
    candidates: list[PartCandidates]
    expires_at_s: float
    epochs: tuple[int, ...]
    """Of every live part when it was opened."""


class LiveParts(NamedTuple):
    """What makes a shard follow updates."""

    parts: Sequence[LiveIndex]
    """Of every device, in the order of the retriever's parts."""
    updater: ShardUpdater
    cut: tuple[int, ...]
    """``(L,)`` positions of the log whose updates the snapshot holds; empty for none."""


class ShardExecutor:
    """One shard of one generation, with the candidates of the queries that are open on it.

    Args:
        retriever: its documents.
        held: their stored columns; or the live parts of a shard that follows updates.
        shard: its number.
        num_shards: S.
        clock: seconds.
    """

    def __init__(
        self,
        retriever: Retriever,
        held: FieldStore | LiveParts,
        *,
        shard: int,
        num_shards: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._retriever = retriever
        self._held = held
        self._clock = clock
        self._open: dict[str, _OpenQuery] = {}
        self._parts: Sequence[LiveIndex] = held.parts if isinstance(held, LiveParts) else ()
        self._any_retired = False
        self._deleted: list[deque[tuple[Tensor, Tensor]]] = [deque() for _ in self._parts]
        """Ids and versions of deletes up to the cut, the oldest first."""
        self.shard = shard
        self.num_shards = num_shards
        self.documents = retriever.documents
        self.cut: tuple[int, ...] = held.cut if isinstance(held, LiveParts) else ()

    @property
    def spec(self) -> ServingSpec:
        """Return the generation as its clients see it."""
        return self._retriever.spec

    @property
    def num_open(self) -> int:
        """Return how many queries have candidates open."""
        return len(self._open)

    def is_open(self, key: str) -> bool:
        """Return whether a query has candidates open."""
        return key in self._open

    @property
    def updater(self) -> ShardUpdater:
        """Return what prepares the updates of this shard.

        Raises:
            UpdatesUnsupported: if it was loaded to stay as it is.
        """
        return self._live.updater

    @property
    def _live(self) -> LiveParts:
        if not isinstance(self._held, LiveParts):
            raise UpdatesUnsupported("this shard was loaded without room for updates")
        return self._held

    def apply(self, prepared: Prepared, cut: tuple[int, ...] | None) -> list[Rejection]:
        """Commit prepared updates and tidy up, at once; see ``commit`` and ``tidy_up``."""
        rejected = self.commit(prepared, cut)
        self.tidy_up()
        return rejected

    def tidy_up(self) -> None:
        """Bring the pages in order, which belongs to every commit; queries may pass between."""
        self._any_retired = True
        for part in self._live.parts:
            part.tidy_up()
        self._reclaim()

    def commit(self, prepared: Prepared, cut: tuple[int, ...] | None) -> list[Rejection]:
        """Commit prepared updates; whoever opens a query from now on sees all of them.

        Args:
            prepared: by ``updater``.
            cut: ``(L,)`` positions of the log up to which the updates of this shard are then in;
                None: it stays, for these came ahead of their turn and will come again.

        Returns:
            The updates that were refused, for the same reason on every replica.

        Raises:
            UpdatesUnsupported: if the shard was loaded to stay as it is.
            PoolExhausted: if there is no room. Some of the updates may be in; to apply the same
                again is harmless, and helps once the queries have ended that hold retired slots.
        """
        live = self._live
        self.expire()
        rejected = list(prepared.rejected)
        for wave in prepared.waves:
            self._reclaim()
            self._any_retired = True
            for part, changes in zip(live.parts, wave, strict=True):
                rejected += part.commit(changes)
        live.updater.write_rows(prepared.rows)
        self._reclaim()
        if cut is not None:
            self._forget_deleted(prepared)
            self.cut = cut
        self.documents = sum(part.documents for part in live.parts)
        return rejected

    def _forget_deleted(self, prepared: Prepared) -> None:
        """Forget the ids that were deleted in earlier batches, but for the last ones.

        Nothing from before a cut comes again, so nothing older than its deletes does; the last ones
        stay known all the same. An urgent delete counts when it comes once more in its turn.
        """
        known = _DELETES_KNOWN // len(self._parts)
        for part, pieces in zip(self._parts, self._deleted, strict=True):
            excess = sum(len(item_ids) for item_ids, _ in pieces) - known
            while excess > 0:
                item_ids, versions = pieces.popleft()
                part.forget(item_ids[:excess], versions[:excess])
                if excess < len(item_ids):
                    pieces.appendleft((item_ids[excess:], versions[excess:]))
                excess -= len(item_ids)
        for wave in prepared.waves:
            for pieces, changes in zip(self._deleted, wave, strict=True):
                if len(changes.deletes):
                    pieces.append((changes.deletes, changes.delete_versions))
        for pieces in self._deleted:
            if len(pieces) > _MOST_PIECES:
                ids, versions = (torch.cat(columns) for columns in zip(*pieces, strict=True))
                pieces.clear()
                pieces.append((ids, versions))

    def _reclaim(self) -> None:
        """Let the parts reuse the slots that no open query can reach."""
        if not self._any_retired:
            return
        opened = [query.epochs for query in self._open.values()]
        for at, part in enumerate(self._parts):
            part.reclaim(min((epochs[at] for epochs in opened), default=part.epoch))
        self._any_retired = any(
            epochs[at] < part.epoch for epochs in opened for at, part in enumerate(self._parts)
        )

    def usage(self) -> PoolUsage:
        """Return how full the pages of this shard are, over all of its parts.

        The longest list is that of one part, and so is the mean.

        Raises:
            UpdatesUnsupported: if it was loaded to stay as it is.
        """
        each = [part.usage() for part in self._live.parts]
        live_slots = sum(one.live_slots for one in each)
        away = sum(one.assignment_error * one.live_slots for one in each)
        return PoolUsage(
            pages=sum(one.pages for one in each),
            free_pages=sum(one.free_pages for one in each),
            live_slots=live_slots,
            retired_slots=sum(one.retired_slots for one in each),
            dead_slots=sum(one.dead_slots for one in each),
            longest_list=max(one.longest_list for one in each),
            mean_list=sum(one.mean_list for one in each) / len(each),
            overflowed=sum(one.overflowed for one in each),
            assignment_error=away / max(live_slots, 1),
        )

    def encode(self, features: Sequence[Mapping[str, FeatureValues]]) -> Encoded:
        """Return query embeddings and user states of checked features."""
        return self._retriever.encode(features)

    def count(self, scan: Tensor) -> Tensor:
        """Return how many of this shard's documents pass each program ``(B, L, 4)``, ``(B,)``."""
        return self._retriever.count(scan)

    def open(
        self, key: str, work: Work, expires_at_s: float, proceed: Proceed = always
    ) -> RoundOne:
        """Run round one and keep its candidates under ``key``.

        Args:
            key: of the query batch, unique per router.
            work: the batch.
            expires_at_s: reading of the shard's clock at which the candidates are given up.
            proceed: is called with the name of each further stage, and may raise.
        """
        self.expire()
        first, candidates = self._retriever.open(work, proceed)
        epochs = tuple([part.epoch for part in self._parts])
        self._open[key] = _OpenQuery(work, candidates, expires_at_s, epochs)
        return first

    def close(self, key: str, cutoffs: Cutoffs, proceed: Proceed = always) -> RoundTwo:
        """Run round two on open candidates, which stay open so that a lost shard can be cut out.

        Args:
            key: of the query batch.
            cutoffs: what passes.
            proceed: is called with the name of each further stage, and may raise.

        Raises:
            CandidatesExpired: if ``key`` is not open.
        """
        self.expire()
        query = self._open.get(key)
        if query is None:
            raise CandidatesExpired(key)
        return self._retriever.close(query.work, query.candidates, cutoffs, proceed)

    def release(self, key: str) -> None:
        """Give up the candidates of a query; unknown keys are ignored."""
        if self._open.pop(key, None) is not None:
            self._reclaim()

    def expire(self) -> int:
        """Give up the candidates whose time ran out; return how many queries that ended."""
        now = self._clock()
        gone = [key for key, query in self._open.items() if query.expires_at_s <= now]
        for key in gone:
            del self._open[key]
        if gone:
            self._reclaim()
        return len(gone)

    def fields(
        self, item_ids: Sequence[int], names: Sequence[str], key: str | None = None
    ) -> dict[str, list[FieldValue]]:
        """Return stored columns of items that this shard holds.

        Args:
            item_ids: items that an answer of this shard named; one that is gone has no values.
            names: of columns.
            key: of the query that found them; while it is open, it gets them as it found them.
        """
        if isinstance(self._held, FieldStore):
            return self._held.lookup(item_ids, names)
        query = None if key is None else self._open.get(key)
        epochs = [part.epoch for part in self._parts] if query is None else query.epochs
        owners = self._held.updater.parts_of(item_ids)
        ids = torch.tensor(item_ids, dtype=torch.int64)
        found: dict[str, list[FieldValue]] = {name: [None] * len(item_ids) for name in names}
        for at, (part, epoch) in enumerate(zip(self._parts, epochs, strict=True)):
            mine = torch.from_numpy(owners == at) & (part.slots_at(ids, epoch) >= 0)
            places = torch.nonzero(mine).flatten().tolist()
            columns = part.lookup([item_ids[place] for place in places], names, epoch)
            for name, values in columns.items():
                for place, value in zip(places, values, strict=True):
                    found[name][place] = value
        return found

    def warm(self, give_way: Callable[[], object] = lambda: None) -> None:
        """Run every stage on empty users, so that no query pays what the first one costs.

        Each batch size that is a power of two up to 64, the largest batch by default, runs twice.

        Args:
            give_way: is called before each run.
        """
        for batch in _WARM_BATCHES:
            for _ in range(_WARM_RUNS):
                give_way()
                self._warm(batch)

    def _warm(self, batch: int) -> None:
        defaults = self.spec.defaults
        encoded = self.encode([{}] * batch)
        empty = torch.zeros(batch, 0, 4, dtype=torch.int64)
        work = Work(
            embedding=encoded.embedding,
            user_state=encoded.user_state,
            scan=empty,
            verify=empty,
            exclude=torch.zeros(batch, 0, dtype=torch.int64),
            value_ops=torch.tensor([[[1, 0]]], dtype=torch.int32).repeat(batch, 1, 1),
            value_constants=torch.zeros(batch, 1),
            probes=torch.full((batch,), defaults.probes),
            ann_k=torch.full((batch,), defaults.ann_k),
            semantic_k=torch.full((batch,), defaults.semantic_k),
            k=torch.ones(batch, dtype=torch.int64),
            tasks=torch.ones(batch, len(self.spec.item_schema.tasks), dtype=torch.int8),
        )
        first = self.open("warm", work, float("inf"))
        merge = self._retriever.merge
        self.close("warm", merge.cutoffs([first], work.ann_k, work.semantic_k))
        self.release("warm")

"""The two rounds of a batch over the shards, repeated without a shard that is lost on the way.

Whatever an answer holds of a shard was found by one replica as it was at one moment: where another
one takes over, or the same one has lost what was open, it runs round one anew, and round two at
once with the cutoffs that are known. The cuts over all shards are made again then; as long as they
come out the same, what was found by them stays.

Shapes: B requests, H heads, R candidates per head, K results, T tasks, P partitions.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from silvershard.cluster.consistency import Freshness
from silvershard.cluster.fanout import Fanout, Reply, Wait
from silvershard.cluster.freshness import Seen
from silvershard.cluster.freshness import slowest as slowest_seen
from silvershard.cluster.outcome import Coverage, CoverageLost, CoverageTimedOut, DegradeReason
from silvershard.cluster.replica_choice import kind_of
from silvershard.cluster.shard_link import ShardLink
from silvershard.model.answer import Answer, split_answers
from silvershard.model.compiled_request import CompiledRequest
from silvershard.model.merge import Merge, slowest
from silvershard.model.plan import Plan
from silvershard.model.spec import ServingSpec
from silvershard.model.types import Cutoffs, RoundOne, RoundTwo, Work
from silvershard.shard.errors import CandidatesExpired
from silvershard.shard.fields import FieldValue
from silvershard.shard.partition import partition_of, shard_partitions

T = TypeVar("T")

# Half the time for stragglers leaves as much for the next round; what is short of the minimum would
# be an error anyway, so it may take nearly all.
ROUND_WAIT = Wait(soft=0.5, hard=0.875)

# Merging more values than this would keep the event loop from noticing anything else.
_LARGE_MERGE = 1 << 16


@dataclass(frozen=True)
class Batch:
    """Requests of one batch that run together, in the form the shards take them."""

    key: str
    """Names the open candidates; unique per router."""
    compiled: Sequence[CompiledRequest]
    plans: Sequence[Plan]
    eligible: Sequence[int | None]
    """Items that the filter of each lets through, where they were counted."""
    warnings: Sequence[tuple[str, ...]]
    minimums: Sequence[float]
    """Coverage that each requires."""
    work: Work
    encoder: Seen
    """What the replica had applied that encoded the users."""


@dataclass(frozen=True)
class Served:
    """An answer as a router gives it."""

    answer: Answer
    coverage: Coverage
    fields: Mapping[str, list[FieldValue]] = field(default_factory=dict)
    """The columns asked for, one value per result."""
    freshness: Freshness | None = None
    """What the answer reflects; None for a generation that follows no log."""


Fate = Served | Exception


class _Opened(NamedTuple):
    """What a replica found that opened its candidates."""

    first: RoundOne
    seen: Seen
    """What it had applied then."""
    second: RoundTwo | None
    """Where the cutoffs were known already."""


def shortfall(fanout: Fanout, coverage: Coverage, minimum: float) -> Exception | None:
    """Return why a request that requires ``minimum`` has no answer; None if it has one."""
    if coverage.shards_full and coverage.documents >= minimum:
        return None
    # No answer at all is an error even where a request would accept any coverage.
    if fanout.timed_out or fanout.remaining_s <= 0:
        return CoverageTimedOut(coverage, minimum)
    return CoverageLost(coverage, minimum)


def owners(num_shards: int, num_partitions: int) -> Tensor:
    """Return the shard of every partition, ``(P,)`` int64."""
    table = torch.empty(num_partitions, dtype=torch.int64)
    for shard in range(num_shards):
        served = shard_partitions(shard, num_shards, num_partitions)
        table[served.start : served.stop] = shard
    return table


class Rounds:
    """Runs one batch; every shard it touched is released at the end, however it ends."""

    def __init__(self, fanout: Fanout, batch: Batch, spec: ServingSpec, owner: Tensor) -> None:
        """Make the rounds of a batch.

        Args:
            fanout: the shards as this batch sees them; belongs to these rounds from now on.
            batch: what to run.
            spec: the generation.
            owner: ``(P,)`` int64 shard of every partition.
        """
        self._fanout = fanout
        self._batch = batch
        self._spec = spec
        self._owner = owner
        self._merge = Merge()
        self._touched: dict[ShardLink, None] = {}
        """In the order in which they were asked."""
        self._opened: dict[int, Reply[RoundOne]] = {}
        """Round one of each shard, by the replica that has its candidates open."""
        self._closed: dict[int, RoundTwo] = {}
        """Round two on those candidates, with the newest cutoffs."""
        self._seen: dict[int, Seen] = {}
        """What each shard saw when it opened its candidates."""
        self._num_opened: dict[int, int] = {}
        self._network_us = 0
        self._merge_us = 0

    async def run(self) -> list[Fate]:
        """Return the fate of every request: an answer, or the error that it gets instead."""
        try:
            return await self._run()
        finally:
            for link in self._touched:
                link.release(self._batch.key)

    async def _run(self) -> list[Fate]:
        work = self._batch.work
        opened = await self._timed(
            self._fanout.ask(
                self._fanout.alive,
                self._open,
                ROUND_WAIT,
                kind=self._kind("open"),
                let_go=self._let_go,
            )
        )
        for shard, reply in opened.items():
            self._adopt(shard, reply)
        cutoffs: Cutoffs | None = None
        while self._someone_waits():
            rounds = [self._opened[shard].value for shard in self._fanout.alive]
            previous = cutoffs
            cutoffs = await self._compute(
                partial(self._merge.cutoffs, rounds, work.ann_k, work.semantic_k),
                sum(one.scores.numel() + one.semantic_scores.numel() for one in rounds),
            )
            if previous is None or not _same(previous, cutoffs):
                self._closed = {}
            if not await self._close(cutoffs):
                continue
            seconds = [self._closed[shard] for shard in self._fanout.alive]
            answers = await self._answers(rounds, seconds)
            columns = await self._fields(answers, cutoffs)
            if columns is None:
                continue
            return self._fates(answers, columns)
        return self._fates(None, None)

    def _someone_waits(self) -> bool:
        coverage = self._fanout.coverage()
        return any(
            shortfall(self._fanout, coverage, minimum) is None for minimum in self._batch.minimums
        )

    async def _open(
        self, link: ShardLink, remaining_s: float, cutoffs: Cutoffs | None = None
    ) -> _Opened:
        """Run round one on a replica, and round two at once where the cutoffs are known."""
        shard, key = link.shard, self._batch.key
        if self._num_opened.get(shard, 0) > len(self._fanout.replicas(shard)):
            # Each replica may lose what is open once; one that always does would never end.
            raise CandidatesExpired(key)
        self._touched[link] = None
        demand = self._fanout.demand(link, remaining_s)
        first, seen = await link.open(key, self._batch.work, remaining_s, demand)
        self._num_opened[shard] = self._num_opened.get(shard, 0) + 1
        if cutoffs is None:
            return _Opened(first, seen, None)
        second = await link.close(key, cutoffs, max(self._fanout.remaining_s, 0.0))
        return _Opened(first, seen, second)

    def _adopt(self, shard: int, reply: Reply[_Opened]) -> None:
        """Let a replica answer for a shard from now on."""
        found = reply.value
        self._opened[shard] = Reply(reply.link, found.first)
        self._seen[shard] = found.seen
        self._fanout.documents[shard] = found.seen.documents
        if found.second is None:
            self._closed.pop(shard, None)
        else:
            self._closed[shard] = found.second

    def _kind(self, op: str) -> str:
        plans = self._batch.plans
        return kind_of(op, sum(one.probes for one in plans), sum(one.ann_k for one in plans))

    def _let_go(self, link: ShardLink) -> None:
        """Release what a replica has open that another one was faster than."""
        link.release(self._batch.key)
        self._touched.pop(link, None)

    async def _ask_holders(
        self,
        shards: Sequence[int],
        ask_one: Callable[[ShardLink, float], Awaitable[T]],
        cutoffs: Cutoffs,
        *,
        op: str,
    ) -> dict[int, T]:
        """Return what the replicas say that have the candidates of ``shards`` open.

        A shard is missing there if it was lost, or if a replica had to open its candidates anew:
        its round one, and what follows from it, is another one now.
        """

        async def ask_or_open(link: ShardLink, remaining_s: float) -> T | _Opened:
            if self._opened[link.shard].link is link:
                try:
                    return await ask_one(link, remaining_s)
                except CandidatesExpired:
                    remaining_s = max(self._fanout.remaining_s, 0.0)
            return await self._open(link, remaining_s, cutoffs)

        holders = {shard: self._opened[shard].link for shard in shards}
        replies = await self._timed(
            self._fanout.ask(
                shards,
                ask_or_open,
                ROUND_WAIT,
                kind=self._kind(op),
                first=holders,
                let_go=self._let_go,
            )
        )
        found: dict[int, T] = {}
        for shard, (link, value) in replies.items():
            if isinstance(value, _Opened):
                self._adopt(shard, Reply(link, value))
            else:
                found[shard] = value
        return found

    async def _close(self, cutoffs: Cutoffs) -> bool:
        """Run round two where it has not run with these cutoffs.

        False if the cutoffs are to be made again.
        """

        async def close(link: ShardLink, remaining_s: float) -> RoundTwo:
            return await link.close(self._batch.key, cutoffs, remaining_s)

        missing = [shard for shard in self._fanout.alive if shard not in self._closed]
        found = await self._ask_holders(missing, close, cutoffs, op="close")
        self._closed |= found
        return len(found) == len(missing)

    async def _answers(
        self, rounds: Sequence[RoundOne], seconds: Sequence[RoundTwo]
    ) -> list[Answer]:
        batch = self._batch
        width = int(batch.work.k.max())
        second = await self._compute(
            partial(self._merge, seconds, width), sum(one.values.numel() for one in seconds)
        )
        first = RoundOne(
            scores=rounds[0].scores[:, :, :0],
            item_ids=rounds[0].item_ids[:, :, :0],
            probed=torch.stack([one.probed for one in rounds]).sum(0),
            eligible=torch.stack([one.eligible for one in rounds]).sum(0),
            semantic_scores=rounds[0].semantic_scores[:, :0],
            semantic_item_ids=rounds[0].semantic_item_ids[:, :0],
            times={},
        )
        times = {
            **slowest([one.times for one in rounds]),
            **slowest([one.times for one in seconds]),
            "merge": self._merge_us,
            "network": max(self._network_us, 0),
        }
        return split_answers(
            batch.compiled,
            batch.plans,
            batch.warnings,
            first,
            second,
            self._spec,
            batch.eligible,
            times,
            documents=sum(self._fanout.documents),
        )

    async def _fields(
        self, answers: Sequence[Answer], cutoffs: Cutoffs
    ) -> list[dict[str, list[FieldValue]]] | None:
        """Return the columns that each request wants; None if its answers are to be made again."""
        columns: list[dict[str, list[FieldValue]]] = []
        asking = [one.return_fields for one in self._batch.compiled]
        names = sorted({name for wanted in asking for name in wanted})
        wanted_ids = [
            answer.item_ids for answer, wanted in zip(answers, asking, strict=True) if wanted
        ]
        found: dict[str, dict[int, FieldValue]] = {name: {} for name in names}
        if wanted_ids:
            item_ids = torch.cat(wanted_ids).unique()
            shard_of = self._owner[partition_of(item_ids, self._spec.num_partitions)]
            by_shard: dict[int, list[int]] = {
                shard: item_ids[shard_of == shard].tolist() for shard in shard_of.unique().tolist()
            }

            async def look_up(
                link: ShardLink, remaining_s: float
            ) -> Mapping[str, list[FieldValue]]:
                ids = by_shard[link.shard]
                return await link.fields(self._batch.key, ids, names, remaining_s)

            replies = await self._ask_holders(sorted(by_shard), look_up, cutoffs, op="fields")
            if len(replies) < len(by_shard):
                return None
            for shard, values in replies.items():
                for name in names:
                    found[name].update(zip(by_shard[shard], values[name], strict=True))
        for answer, wanted in zip(answers, asking, strict=True):
            listed = answer.item_ids.tolist() if wanted else []
            columns.append({name: [found[name][item] for item in listed] for name in wanted})
        return columns

    def _fates(
        self,
        answers: Sequence[Answer] | None,
        columns: Sequence[dict[str, list[FieldValue]]] | None,
    ) -> list[Fate]:
        coverage = self._fanout.coverage()
        seen = [self._seen[at] for at in self._fanout.alive if at in self._seen]
        freshness = slowest_seen([self._batch.encoder, *seen])
        if freshness is not None and freshness.staleness_s > self._fanout.lagging_s:
            coverage = coverage.because(DegradeReason.UPDATES_LAGGING)
        fates: list[Fate] = []
        for at, minimum in enumerate(self._batch.minimums):
            error = shortfall(self._fanout, coverage, minimum)
            if error is not None or answers is None or columns is None:
                fates.append(error or CoverageLost(coverage, minimum))
                continue
            answer = answers[at]
            # Every cluster was scanned only where every shard answered.
            whole = coverage.shards_failed == 0
            fates.append(
                Served(
                    answer=replace(answer, exhausted=answer.exhausted and whole),
                    coverage=coverage,
                    fields=columns[at],
                    freshness=freshness,
                )
            )
        return fates

    async def _timed(self, asking: Awaitable[dict[int, Reply[T]]]) -> dict[int, Reply[T]]:
        started_s = self._fanout.clock()
        found = await asking
        spent_us = int((self._fanout.clock() - started_s) * 1e6)
        slowest_us = max((_work_us(reply.value) for reply in found.values()), default=0)
        self._network_us += spent_us - slowest_us
        return found

    async def _compute(self, compute: Callable[[], T], size: int) -> T:
        started_s = self._fanout.clock()
        found = compute() if size < _LARGE_MERGE else await asyncio.to_thread(compute)
        self._merge_us += int((self._fanout.clock() - started_s) * 1e6)
        return found


def _work_us(found: object) -> int:
    """Return how long a replica worked on what it found."""
    if isinstance(found, _Opened):
        return _work_us(found.first) + _work_us(found.second)
    return sum(found.times.values()) if isinstance(found, (RoundOne, RoundTwo)) else 0


def _same(one: Cutoffs, other: Cutoffs) -> bool:
    return torch.equal(one.scores, other.scores) and torch.equal(one.item_ids, other.item_ids)

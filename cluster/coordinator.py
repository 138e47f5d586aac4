"""The life of a batch of queries in a router: compile, count, plan, encode once, two rounds, merge.

Free of I/O: shards are reached through ``ShardLink``, time is read from the clock that is given.

Shapes: B requests, H heads.
"""

import asyncio
import random
import time
import uuid
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch

from silvershard.cluster.admission import Dropped
from silvershard.cluster.codec import Refusal
from silvershard.cluster.config import (
    DegradeSection,
    HealthSection,
    HedgingSection,
    RetriesSection,
)
from silvershard.cluster.consistency import ANY, Consistency
from silvershard.cluster.count_cache import CountCache
from silvershard.cluster.degrade import Ladder
from silvershard.cluster.degrade_policy import UNDEMANDING, DegradePolicy
from silvershard.cluster.extra_calls import ExtraCalls
from silvershard.cluster.fanout import LOSSES, Fanout, Wait
from silvershard.cluster.freshness import Seen
from silvershard.cluster.outcome import CoverageLost, CoverageTimedOut, DegradeReason
from silvershard.cluster.replica_choice import ReplicaChoice, kind_of
from silvershard.cluster.rounds import Batch, Fate, Rounds, Served, owners, shortfall
from silvershard.cluster.shard_link import ShardLink
from silvershard.model.compiled_request import CompiledRequest, RequestCompiler
from silvershard.model.plan import Plan
from silvershard.model.request import FeatureValues, Request, RequestError
from silvershard.model.retriever import assemble, pad_programs
from silvershard.model.spec import ServingSpec
from silvershard.model.two_tower import Encoded
from silvershard.model.types import StageTimes
from silvershard.shard.errors import DeadlineExceeded, RetrievalError, ShardUnavailable
from silvershard.shard.partition import shard_partitions

T = TypeVar("T")

# Counting and encoding come before the rounds, which must find most of the time left.
_COUNT_WAIT = Wait(soft=0.25, hard=0.5)
_ENCODE_SHARE = 0.4

# Where a replica may have to catch up first; counting and encoding wait side by side, and the
# rounds find it done.
_FRESH_COUNT_WAIT = Wait(soft=0.5, hard=0.6)
_FRESH_ENCODE_SHARE = 0.5

# Characters, ids and parameters. A filter of 17,000 characters compiles in up to 0.4 s, in which
# the event loop must go on answering others.
_SMALL_REQUEST = 1000
_ENCODE_ATTEMPTS = 3

# Of the largest message of a batch; far below what a connection carries.
_BATCH_BYTES = 64 << 20


@dataclass(frozen=True)
class Query:
    """A request with its service objective."""

    request: Request
    min_coverage: float
    deadline_s: float
    """Reading of the coordinator's clock at which the answer is too late."""
    arrived_s: float
    """Reading of the coordinator's clock when the request came in."""
    consistency: Consistency = ANY
    """How fresh the replicas that answer must be."""
    priority: int = 0
    """The larger one goes first, and is refused last."""
    tenant: str = ""
    degrade: DegradePolicy = UNDEMANDING
    """What may be left out of it under overload."""
    returns_tasks: bool = True
    """Whether the answer tells the probabilities of tasks."""


@dataclass(frozen=True)
class _Planned:
    """A request that is ready for the rounds."""

    at: int
    """Its place among the queries."""
    row: int
    """Its row in the encoded batch."""
    compiled: CompiledRequest
    plan: Plan
    eligible: int | None
    reasons: tuple[DegradeReason, ...]
    """Why the plan is not the one that was chosen."""


class Coordinator:
    """Answers batches over the shards of one generation."""

    def __init__(
        self,
        spec: ServingSpec,
        num_shards: int,
        replicas: Callable[[int], Sequence[ShardLink]],
        *,
        merge_headroom_s: float = 0.003,
        max_batch: int = 64,
        lagging_s: float = float("inf"),
        choice: ReplicaChoice | None = None,
        clock: Callable[[], float] = time.monotonic,
        ladder: Ladder | None = None,
        dropped: Dropped | None = None,
    ) -> None:
        """Make a coordinator.

        Args:
            spec: the generation.
            num_shards: S.
            replicas: the links to a shard at this moment, which may be none.
            merge_headroom_s: time kept back from the shards for merging and answering.
            max_batch: requests that run together.
            lagging_s: staleness of a shard from which on an answer says that updates lag.
            choice: chooses among the replicas; None: one with budgets of its own.
            clock: must be the clock of the event loop.
            ladder: what is left out under overload; None: nothing ever is.
            dropped: where what is not executed is counted.
        """
        self.spec = spec
        self.num_shards = num_shards
        self.replicas = replicas
        self._documents = [
            sum(
                spec.partition_documents[partition]
                for partition in shard_partitions(shard, num_shards, spec.num_partitions)
            )
            for shard in range(num_shards)
        ]
        self._compiler = RequestCompiler(spec)
        self._owner = owners(num_shards, spec.num_partitions)
        self._merge_headroom_s = merge_headroom_s
        self._max_batch = max_batch
        self._lagging_s = lagging_s
        self._clock = clock
        if choice is None:
            extra = ExtraCalls(HedgingSection(), RetriesSection(), retry_burst=max_batch)
            choice = ReplicaChoice(HealthSection(), extra, clock, random.Random())
        self._choice = choice
        self._ladder = ladder or Ladder(DegradeSection(ladder=()), clock)
        self._dropped = dropped or Dropped()
        self._counts = CountCache(clock)
        self._router = uuid.uuid4().hex[:12]
        self._batches = 0
        self._next_encoder = 0

    @property
    def documents(self) -> list[int]:
        """Return the items of each shard: as its replicas say, as published before they did."""
        for shard in range(self.num_shards):
            said = [link.seen for link in self.replicas(shard) if link.seen is not None]
            if said:
                self._documents[shard] = max(said, key=lambda one: sum(one.cut)).documents
        return list(self._documents)

    async def answer(self, queries: Sequence[Query]) -> list[Fate]:
        """Return the fate of every query, in order: an answer, or the error it gets instead.

        Queries share their work but not their fate. More than ``max_batch`` run as several batches,
        and so do those that demand different freshness, so that nobody waits for others' updates.
        """
        alike: dict[Consistency, list[int]] = {}
        for at, query in enumerate(queries):
            alike.setdefault(query.consistency, []).append(at)
        groups = [
            places[start : start + self._max_batch]
            for places in alike.values()
            for start in range(0, len(places), self._max_batch)
        ]
        found = await _side_by_side(
            [self._answer_group([queries[at] for at in group]) for group in groups]
        )
        fates = {
            at: fate
            for group, answered in zip(groups, found, strict=True)
            for at, fate in zip(group, answered, strict=True)
        }
        uncovered = (CoverageLost, CoverageTimedOut)
        self._dropped.uncovered += sum(isinstance(one, uncovered) for one in fates.values())
        return [fates[at] for at in range(len(queries))]

    async def _answer_group(self, queries: Sequence[Query]) -> list[Fate]:
        started_s = self._clock()
        fates: dict[int, Fate] = {}
        compiled: dict[int, CompiledRequest] = {}
        for at, query in enumerate(queries):
            try:
                compiled[at] = await self._compile(query)
            except (RequestError, DeadlineExceeded) as error:
                fates[at] = error
            except Exception as error:  # noqa: BLE001  # the server logs it; neighbours go on
                fates[at] = error
        if compiled:
            try:
                fates |= await self._answer_compiled(queries, compiled, started_s)
            except (Refusal, RequestError) as error:
                # They all demand the same, which no shard can meet.
                fates |= dict.fromkeys(compiled, error)
        return [fates[at] for at in range(len(queries))]

    async def _compile(self, query: Query) -> CompiledRequest:
        """Return the checked request; a large one does not keep the event loop from others.

        Raises:
            DeadlineExceeded: if its time ran out before.
            RequestError: if it cannot be served as stated.
        """
        if query.deadline_s <= self._clock():
            self._dropped.expired["queue"] += 1
            raise DeadlineExceeded("the time of the request ran out in the queue")
        self._ladder.check(query.degrade, self.spec)
        request = query.request
        size = (
            len(request.filter)
            + len(request.exclude_ids)
            + sum(
                len(value) if isinstance(value, Sequence) else 1
                for value in request.params.values()
            )
        )
        if size <= _SMALL_REQUEST:
            return self._compiler.compile(request)
        return await asyncio.to_thread(self._compiler.compile, request)

    async def _answer_compiled(
        self, queries: Sequence[Query], compiled: Mapping[int, CompiledRequest], started_s: float
    ) -> dict[int, Fate]:
        fanout = Fanout(
            documents=self.documents,
            replicas=self.replicas,
            choice=self._choice,
            clock=self._clock,
            deadline_s=min(queries[at].deadline_s for at in compiled) - self._merge_headroom_s,
            min_coverage=max(queries[at].min_coverage for at in compiled),
            consistency=queries[0].consistency,
            lagging_s=self._lagging_s,
        )
        times: StageTimes = {}
        users = [one.features for one in compiled.values()]
        counted: dict[int, int] = {}
        if any(one.needs_count for one in compiled.values()):
            counting = asyncio.create_task(self._count(fanout, compiled, times))
            try:
                found = await self._encode(fanout, users, times)
                counted = await counting
            finally:
                counting.cancel()
                await asyncio.gather(counting, return_exceptions=True)
        else:
            found = await self._encode(fanout, users, times)
        fates: dict[int, Fate] = {}
        if found is None:
            coverage = fanout.coverage()
            for at in compiled:
                minimum = queries[at].min_coverage
                fates[at] = shortfall(fanout, coverage, minimum) or CoverageLost(coverage, minimum)
            return fates
        encoded = found[0]
        planned: list[_Planned] = []
        level = self._ladder.level
        for row, (at, request) in enumerate(compiled.items()):
            try:
                one = self._planned(at, row, request, queries[at], counted.get(at), fanout, level)
                planned.append(one)
            except (RequestError, DeadlineExceeded) as error:
                fates[at] = error
        parts = self._parts(planned, encoded.embedding.shape[1])
        answered = await _side_by_side([self._run(part, queries, found, fanout) for part in parts])
        for part, part_fates in zip(parts, answered, strict=True):
            for one, fate in zip(part, part_fates, strict=True):
                fallback = bool(encoded.fallback) and encoded.fallback[one.row]
                reasons = one.reasons
                if fallback:
                    reasons = (*reasons, DegradeReason.EMBEDDING_FALLBACK)
                fates[one.at] = self._stamped(fate, queries[one.at], started_s, times, reasons)
        return fates

    def _planned(
        self,
        at: int,
        row: int,
        request: CompiledRequest,
        query: Query,
        eligible: int | None,
        fanout: Fanout,
        level: int,
    ) -> _Planned:
        """Return a request with the plan that it is run with.

        Raises:
            DeadlineExceeded: if its time ran out while users were encoded and filters counted.
            RequestError: if an exact search would keep too many candidates.
        """
        if query.deadline_s - self._merge_headroom_s <= self._clock():
            self._dropped.expired["rounds"] += 1
            raise DeadlineExceeded("the time of the request ran out before its first round")
        documents = sum(fanout.documents)
        plan, reasons = self._ladder.reduce(
            request.plan(self.spec, eligible, documents),
            level,
            request,
            query.degrade,
            self.spec,
            documents=documents,
            eligible=eligible,
            returns_tasks=query.returns_tasks,
        )
        return _Planned(at, row, request, plan, eligible, reasons)

    async def _count(
        self, fanout: Fanout, compiled: Mapping[int, CompiledRequest], times: StageTimes
    ) -> dict[int, int]:
        """Return how many items the filter of each request lets through, where its plan asks."""
        started_s = self._clock()
        counts: dict[int, int] = {}
        missing: dict[int, CompiledRequest] = {}
        # A count that is remembered may be older than what is demanded.
        any_will_do = fanout.consistency == ANY
        for at, one in compiled.items():
            exact = one.exact or not any_will_do
            known = self._counts.get(one) if one.needs_count and not exact else None
            if known is not None:
                counts[at] = known
            elif one.needs_count:
                missing[at] = one
        if not missing:
            return counts
        scan = pad_programs([one.scan for one in missing.values()])
        replies = await fanout.ask(
            fanout.alive,
            lambda link, remaining_s: link.count(
                scan, remaining_s, fanout.demand(link, remaining_s)
            ),
            _COUNT_WAIT if any_will_do else _FRESH_COUNT_WAIT,
            kind=kind_of("count", len(missing)),
        )
        if replies:
            sums = torch.stack([reply.value for reply in replies.values()]).sum(0).tolist()
            for (at, one), count in zip(missing.items(), sums, strict=True):
                counts[at] = count
                if len(replies) == self.num_shards:
                    self._counts.put(one, count)
        times["filter"] = int((self._clock() - started_s) * 1e6)
        return counts

    async def _encode(
        self,
        fanout: Fanout,
        users: Sequence[Mapping[str, FeatureValues]],
        times: StageTimes,
    ) -> tuple[Encoded, Seen] | None:
        """Return the embeddings of all users from one replica of any shard, and what that saw.

        None if none could; every shard is lost then.
        """
        started_s = self._clock()
        start = self._next_encoder
        self._next_encoder = (start + 1) % self.num_shards
        order = [(start + step) % self.num_shards for step in range(self.num_shards)]
        reply, errors = await fanout.ask_any(
            order,
            lambda link, remaining_s: link.encode(
                users, remaining_s, fanout.demand(link, remaining_s)
            ),
            _ENCODE_SHARE if fanout.consistency == ANY else _FRESH_ENCODE_SHARE,
            kind=kind_of("encode", len(users)),
            max_attempts=_ENCODE_ATTEMPTS,
        )
        if reply is not None:
            times["tower"] = int((self._clock() - started_s) * 1e6)
            return reply.value
        for shard in fanout.alive:
            message = "no shard could encode the request"
            reason: RetrievalError = ShardUnavailable(shard, message)
            try:
                fanout.choose(shard)
            except LOSSES as error:
                reason = error
            fanout.lose(shard, errors.get(shard, reason), started_s)
        return None

    def _parts(self, planned: Sequence[_Planned], num_heads: int) -> list[list[_Planned]]:
        """Return the requests in batches whose messages are of a bounded size."""
        num_tasks = len(self.spec.item_schema.tasks)
        parts: list[list[_Planned]] = []
        widest = 0
        for one in sorted(planned, key=lambda one: (one.plan.ann_k, one.at)):
            size = (
                12 * (num_heads * one.plan.ann_k + one.plan.semantic_k)
                + (16 + 4 * num_tasks) * one.compiled.k
                + 8 * len(one.compiled.exclude)
            )
            widest = max(widest, size)
            if not parts or (len(parts[-1]) + 1) * widest > _BATCH_BYTES:
                parts.append([])
                widest = size
            parts[-1].append(one)
        return parts

    async def _run(
        self,
        part: Sequence[_Planned],
        queries: Sequence[Query],
        found: tuple[Encoded, Seen],
        fanout: Fanout,
    ) -> list[Fate]:
        """Run the rounds of some requests of a batch."""
        encoded, encoder = found
        self._batches += 1
        rows = torch.tensor([one.row for one in part])
        compiled = [one.compiled for one in part]
        plans = [one.plan for one in part]
        minimums = [queries[one.at].min_coverage for one in part]
        batch = Batch(
            key=f"{self._router}/{self._batches}",
            compiled=compiled,
            plans=plans,
            eligible=[one.eligible for one in part],
            warnings=[encoded.warnings[one.row] for one in part],
            minimums=minimums,
            work=assemble(compiled, plans, encoded.embedding[rows], encoded.user_state[rows]),
            encoder=encoder,
        )
        own = fanout.fork(max(minimums))
        # Who was in a greater hurry may have been dropped.
        own.deadline_s = min(queries[one.at].deadline_s for one in part) - self._merge_headroom_s
        return await Rounds(own, batch, self.spec, self._owner).run()

    def _stamped(
        self,
        fate: Fate,
        query: Query,
        started_s: float,
        times: StageTimes,
        reasons: Sequence[DegradeReason],
    ) -> Fate:
        """Return a fate with the times of the whole request, and further reasons."""
        if not isinstance(fate, Served):
            return fate
        whole = {
            "queue": int((started_s - query.arrived_s) * 1e6),
            **times,
            **fate.answer.times,
            "total": int((self._clock() - query.arrived_s) * 1e6),
        }
        coverage = fate.coverage
        for reason in reasons:
            coverage = coverage.because(reason)
        return replace(fate, answer=replace(fate.answer, times=whole), coverage=coverage)


async def _side_by_side(works: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """Return the results of all; if one fails or the caller is cancelled, the others are too."""
    if len(works) == 1:
        return [await works[0]]
    tasks = [asyncio.create_task(work) for work in works]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

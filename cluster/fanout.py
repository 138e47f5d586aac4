"""Asking shards: which replica, how long, how often, and what to say of those that stay silent."""

import asyncio
from collections.abc import Awaitable, Callable, Collection, Mapping, MutableSequence, Sequence
from dataclasses import dataclass, field, replace
from typing import Generic, NamedTuple, TypeVar

from silvershard.cluster.consistency import ANY, Consistency
from silvershard.cluster.freshness import ANYTHING, Demand, is_met
from silvershard.cluster.outcome import Coverage, DegradeReason, ShardOutcome
from silvershard.cluster.shard_link import LinkState, ShardLink
from silvershard.shard.errors import (
    CandidatesExpired,
    DeadlineExceeded,
    GenerationError,
    Overloaded,
    ReplicaStale,
    RetrievalError,
    ShardUnavailable,
)

T = TypeVar("T")

_MAX_ATTEMPTS = 2

# Below the soft limit of a round, so that a replica which is behind can say so in time.
_FRESH_SHARE = 0.45

_LOSSES: Mapping[type[RetrievalError], tuple[str, DegradeReason]] = {
    ShardUnavailable: ("UNAVAILABLE", DegradeReason.SHARD_UNAVAILABLE),
    CandidatesExpired: ("ABORTED", DegradeReason.SHARD_UNAVAILABLE),
    DeadlineExceeded: ("DEADLINE_EXCEEDED", DegradeReason.SHARD_TIMEOUT),
    GenerationError: ("FAILED_PRECONDITION", DegradeReason.VERSION_MISMATCH_DROPPED),
    ReplicaStale: ("FAILED_PRECONDITION", DegradeReason.STALE_REPLICA_DROPPED),
    Overloaded: ("RESOURCE_EXHAUSTED", DegradeReason.SHARD_OVERLOADED),
}
LOSSES = tuple(_LOSSES)
"""What may go wrong with one shard without failing the query."""


class Wait(NamedTuple):
    """Shares of the remaining time that a round may take."""

    soft: float
    """From here on nobody waits for stragglers, if enough documents have answered."""
    hard: float
    """From here on nobody waits for anything."""


class Reply(NamedTuple, Generic[T]):
    """What a shard answered, and which replica did."""

    link: ShardLink
    value: T


@dataclass(eq=False)
class _Progress:
    started_s: float
    replica: str = ""
    attempts: int = 0


@dataclass(eq=False)
class Fanout:
    """The shards as one batch sees them: which are lost to it, and how much of it is covered."""

    documents: MutableSequence[int]
    """Items that each shard serves, also of those that never came up; the newest that is known."""
    replicas: Callable[[int], Sequence[ShardLink]]
    """The links to a shard at this moment, in order of preference."""
    clock: Callable[[], float]
    deadline_s: float
    """Reading of ``clock`` at which the shards' time ends."""
    min_coverage: float
    """Share of the documents worth waiting for until the hard limit."""
    lost: dict[int, ShardOutcome] = field(default_factory=dict)
    timed_out: bool = False
    """True once a shard was waited for in vain."""
    hung: set[ShardLink] = field(default_factory=set)
    """Replicas that this batch does not wait for again."""
    consistency: Consistency = ANY
    """What replicas must have applied."""
    lagging_s: float = float("inf")
    """Staleness from which on other replicas are preferred."""

    def fork(self, min_coverage: float) -> "Fanout":
        """Return a copy for a part of the batch: it knows of every loss so far."""
        return replace(
            self,
            documents=list(self.documents),
            min_coverage=min_coverage,
            lost=dict(self.lost),
            hung=set(self.hung),
        )

    @property
    def remaining_s(self) -> float:
        """Return the time left for the shards; may be negative."""
        return self.deadline_s - self.clock()

    @property
    def alive(self) -> list[int]:
        """Return the shards that are not lost to this batch."""
        return [shard for shard in range(len(self.documents)) if shard not in self.lost]

    def coverage_of(self, shards: Collection[int]) -> float:
        """Return the share of the documents that ``shards`` serve, 0 without any shard."""
        if not shards:
            return 0.0
        addressed = sum(self.documents)
        answered = sum(self.documents[shard] for shard in shards)
        return answered / addressed if addressed else 1.0

    def coverage(self) -> Coverage:
        """Return the coverage that the shards which are not lost give."""
        alive = self.alive
        return Coverage(
            documents=self.coverage_of(alive),
            shards_total=len(self.documents),
            shards_full=len(alive),
            shards_failed=len(self.lost),
            reasons=tuple(sorted({name for one in self.lost.values() for name in one.reasons})),
            shards=tuple(self.lost[shard] for shard in sorted(self.lost)),
        )

    def demand(self, link: ShardLink, remaining_s: float) -> Demand:
        """Return what a replica must have applied, and how long it may take to get there.

        Where another replica could be asked instead, that is half as long.
        """
        if self.consistency == ANY:
            return ANYTHING
        others = any(one is not link and self._is_usable(one) for one in self.replicas(link.shard))
        return Demand(self.consistency, remaining_s * _FRESH_SHARE / (2 if others else 1))

    def _is_usable(self, link: ShardLink) -> bool:
        return link not in self.hung and link.state in (LinkState.UP, LinkState.SUSPECT)

    def _is_fresh(self, link: ShardLink) -> bool:
        """Return False if a replica was not fresh enough by its last word."""
        seen = link.seen
        if seen is None:
            return True
        return seen.staleness_s <= self.lagging_s and is_met(self.consistency, seen)

    def choose(
        self, shard: int, tried: Collection[ShardLink] = (), first: ShardLink | None = None
    ) -> ShardLink:
        """Return the replica to ask next.

        Args:
            shard: index of the shard.
            tried: replicas that failed already.
            first: preferred to others in the same state.

        Raises:
            DeadlineExceeded: if the replicas that are left hang.
            ShardUnavailable: if there is none left.
        """
        left = [link for link in self.replicas(shard) if link not in tried]
        usable = [link for link in left if self._is_usable(link)]
        if usable:
            return min(
                usable,
                key=lambda link: (
                    link.state is not LinkState.UP,
                    link is not first,
                    not self._is_fresh(link),
                ),
            )
        if any(link in self.hung or link.state is LinkState.EJECTED for link in left):
            raise DeadlineExceeded(f"shard {shard} does not answer pings")
        raise ShardUnavailable(shard, "no replica is connected")

    async def ask(
        self,
        shards: Sequence[int],
        ask_one: Callable[[ShardLink, float], Awaitable[T]],
        wait: Wait,
        first: Mapping[int, ShardLink] | None = None,
    ) -> dict[int, Reply[T]]:
        """Ask shards side by side and return the answers of those that gave one.

        A replica that fails is replaced once. Shards that do not answer are in ``lost`` afterwards.

        Args:
            shards: whom to ask.
            ask_one: asks one replica, given the seconds left.
            wait: how long to wait.
            first: the replica of a shard to prefer.
        """
        started_s = self.clock()
        budget_s = self.deadline_s - started_s
        progress = {shard: _Progress(started_s) for shard in shards}
        tasks = {
            asyncio.ensure_future(
                self._ask_shard(shard, ask_one, progress[shard], (first or {}).get(shard))
            ): shard
            for shard in shards
        }
        found: dict[int, Reply[T]] = {}
        pending = set(tasks)
        try:
            while pending:
                answered = [shard for shard in self.alive if shard in found or shard not in shards]
                enough = self.coverage_of(answered) >= self.min_coverage
                now = self.clock()
                limit_s = started_s + budget_s * (wait.soft if enough else wait.hard)
                if now >= limit_s:
                    break
                # Even with enough answers, stragglers may use the time up to the soft limit.
                done, pending = await asyncio.wait(
                    pending, timeout=limit_s - now, return_when=asyncio.FIRST_COMPLETED
                )
                for task in done:
                    shard = tasks[task]
                    try:
                        found[shard] = task.result()
                    except LOSSES as error:
                        self._lose(shard, error, progress[shard])
            for task in pending:
                shard = tasks[task]
                waited_s = self.clock() - started_s
                self._lose(
                    shard,
                    DeadlineExceeded(f"shard {shard} did not answer within {waited_s:.3f} s"),
                    progress[shard],
                )
        finally:
            for task in pending:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        return found

    async def _ask_shard(
        self,
        shard: int,
        ask_one: Callable[[ShardLink, float], Awaitable[T]],
        progress: _Progress,
        first: ShardLink | None,
    ) -> Reply[T]:
        tried: list[ShardLink] = []
        failure: RetrievalError | None = None
        while True:
            try:
                link = self.choose(shard, tried, first)
            except LOSSES:
                if failure is None:
                    raise
                raise failure from None
            progress.replica = str(link.replica)
            progress.attempts += 1
            try:
                return Reply(link, await ask_one(link, max(self.remaining_s, 0.0)))
            except DeadlineExceeded:
                self.timed_out = True
                self.hung.add(link)
                raise
            except LOSSES as error:
                tried.append(link)
                failure = error
                if len(tried) >= _MAX_ATTEMPTS:
                    raise
            except asyncio.CancelledError:
                self.hung.add(link)
                raise

    def lose(self, shard: int, error: RetrievalError, started_s: float) -> None:
        """Count a shard as lost to this batch, although no round was run on it."""
        self._lose(shard, error, _Progress(started_s))

    def _lose(self, shard: int, error: RetrievalError, progress: _Progress) -> None:
        code, reason = next(row for kind, row in _LOSSES.items() if isinstance(error, kind))
        # A shard that was not even asked, because it hangs, took no time.
        if isinstance(error, DeadlineExceeded) and progress.attempts:
            self.timed_out = True
        self.lost[shard] = ShardOutcome(
            shard=shard,
            replica=progress.replica,
            code=code,
            reasons=(reason.value,),
            documents=self.documents[shard],
            latency_us=int((self.clock() - progress.started_s) * 1e6),
            attempts=progress.attempts,
        )

"""Asking shards: which replica, how long, how often, and what to say of those that stay silent."""

from collections.abc import Awaitable, Callable, Collection, Mapping, MutableSequence, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Generic, NamedTuple, TypeVar

from silvershard.cluster.consistency import ANY, Consistency
from silvershard.cluster.freshness import ANYTHING, Demand, is_met
from silvershard.cluster.outcome import Coverage, DegradeReason, ShardOutcome
from silvershard.cluster.races import SOON_S, Race, Races
from silvershard.cluster.replica_choice import ANY_SHARD, ReplicaChoice, Standing
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


class _Progress(NamedTuple):
    """What was done to get an answer of a shard."""

    started_s: float
    replica: str = ""
    attempts: int = 0
    hedged: bool = False


@dataclass(eq=False)
class Fanout:
    """The shards as one batch sees them: which are lost to it, and how much of it is covered."""

    documents: MutableSequence[int]
    """Items that each shard serves, also of those that never came up; the newest that is known."""
    replicas: Callable[[int], Sequence[ShardLink]]
    """The links to a shard at this moment."""
    choice: ReplicaChoice
    """Chooses among them."""
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
    outrun: set[ShardLink] = field(default_factory=set)
    """Replicas that others were faster than; this batch prefers others."""
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
            outrun=set(self.outrun),
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
        return self._meets(link) and (link.seen is None or link.seen.staleness_s <= self.lagging_s)

    def _meets(self, link: ShardLink) -> bool:
        """Return False if a replica had not applied what is demanded by its last word."""
        return link.seen is None or is_met(self.consistency, link.seen)

    def choose(
        self,
        shard: int,
        tried: Collection[ShardLink] = (),
        *,
        first: ShardLink | None = None,
        hedge: bool = False,
    ) -> ShardLink:
        """Return the replica to ask next.

        Args:
            shard: index of the shard.
            tried: replicas that were asked already.
            first: preferred to others of the same standing.
            hedge: whether one of them may still answer: then it is another replica that is as fresh
                as demanded.

        Raises:
            DeadlineExceeded: if the replicas that are left hang.
            ShardUnavailable: if there is none left.
        """
        replicas = self.replicas(shard)
        left = [link for link in replicas if link not in tried]
        usable = [link for link in left if link not in self.hung]
        if hedge:
            asked = {(link.shard, link.replica) for link in tried}
            usable = [
                link
                for link in usable
                if (link.shard, link.replica) not in asked and self._meets(link)
            ]
        found = self.choice.pick(
            replicas,
            usable,
            first=first,
            is_fresh=self._is_fresh,
            outrun=self.outrun,
            proven=hedge,
        )
        if found is not None:
            return found
        if any(link in self.hung or link.state is LinkState.EJECTED for link in left):
            raise DeadlineExceeded(f"shard {shard} does not answer pings")
        raise ShardUnavailable(shard, "no replica is connected")

    def _choose_any(
        self, order: Sequence[int], tried: Collection[ShardLink], *, hedge: bool
    ) -> ShardLink:
        """Return the best replica of any shard, of the first one in order among equals.

        Another shard is preferred to one that was asked already.

        Raises:
            RetrievalError: one of the losses, if there is none.
        """
        asked = {link.shard for link in tried}
        best: ShardLink | None = None
        best_rank = Standing.HUNG, True
        failure: RetrievalError = ShardUnavailable(ANY_SHARD, "there is no shard")
        for shard in order:
            try:
                link = self.choose(shard, tried, hedge=hedge)
            except LOSSES as error:
                failure = error
                continue
            standing = self.choice.standing(link)
            rank = Standing.HUNG if standing is None else standing, shard in asked
            if best is None or rank < best_rank:
                best, best_rank = link, rank
            if best_rank == (Standing.WELL, False):
                break
        if best is None:
            raise failure
        return best

    async def ask(
        self,
        shards: Sequence[int],
        ask_one: Callable[[ShardLink, float], Awaitable[T]],
        wait: Wait,
        *,
        kind: str,
        first: Mapping[int, ShardLink] | None = None,
        let_go: Callable[[ShardLink], None] = lambda _: None,
    ) -> dict[int, Reply[T]]:
        """Ask shards side by side and return the answers of those that gave one.

        Another replica is asked where one fails or is slow, as far as the budgets allow, and the
        first answer counts. Shards that do not answer are in ``lost`` afterwards.

        Args:
            shards: whom to ask.
            ask_one: asks one replica, given the seconds left.
            wait: how long to wait.
            kind: of the call; the same takes about as long on every replica of a shard.
            first: the replica of a shard to prefer.
            let_go: is told of a replica whose answer nobody wants any more, because another one
                was faster.
        """
        started_s = self.clock()
        races = self._races(ask_one, let_go)
        found: dict[int, Reply[T]] = {}
        try:
            for shard in shards:
                known = (first or {}).get(shard)
                races.start(
                    Race(
                        shard,
                        self.choice.latencies(shard, kind),
                        partial(self.choose, shard, first=known),
                        has_rivals=len(self.replicas(shard)) > 1,
                        max_attempts=self.choice.extra.max_attempts,
                        started_s=started_s,
                    )
                )
            while True:
                for race in races.take_over():
                    if race.winner is not None:
                        found[race.shard] = Reply(*race.winner)
                    elif race.failure is not None:
                        self._lose(race.shard, race.failure, _progress(race))
                if not races.open:
                    break
                answered = [shard for shard in self.alive if shard in found or shard not in shards]
                limit_s = self._limit_s(started_s, answered, races.open, wait)
                if self.clock() >= limit_s - SOON_S:
                    break
                await races.advance(limit_s)
            for race in races.open:
                waited_s = self.clock() - started_s
                error = DeadlineExceeded(
                    f"shard {race.shard} did not answer within {waited_s:.3f} s"
                )
                self._lose(race.shard, error, _progress(race))
            races.give_up()
        finally:
            await races.close()
        return found

    def _limit_s(
        self, started_s: float, answered: Collection[int], waiting: Collection[Race[T]], wait: Wait
    ) -> float:
        """Return the reading of the clock until which a round waits for those that are missing.

        With enough answers, stragglers may still use the time up to the soft limit. Replicas that
        miss pings are asked only where there is no other; they rarely answer: for them it is the
        soft limit where they are needed, and else no longer than nearly all calls take.
        """
        is_enough = self.coverage_of(answered) >= self.min_coverage
        is_hopeless = all(race.waits_for_hung_ones for race in waiting)
        budget_s = self.deadline_s - started_s
        limit_s = started_s + budget_s * (wait.soft if is_enough or is_hopeless else wait.hard)
        if is_enough and is_hopeless:
            return min(limit_s, started_s + max(race.latencies.delay_s for race in waiting))
        return limit_s

    async def ask_any(
        self,
        order: Sequence[int],
        ask_one: Callable[[ShardLink, float], Awaitable[T]],
        share: float,
        *,
        kind: str,
        max_attempts: int,
    ) -> tuple[Reply[T] | None, dict[int, RetrievalError]]:
        """Return the answer of one replica of any shard, and what went wrong on which shard.

        Args:
            order: the shards, the one to prefer first.
            ask_one: asks one replica, given the seconds left.
            share: of the remaining time, for all attempts together.
            kind: of the call.
            max_attempts: replicas that may fail.
        """
        started_s = self.clock()
        limit_s = started_s + max(self.remaining_s, 0.0) * share
        races = self._races(ask_one, lambda _: None)
        race: Race[T] = Race(
            ANY_SHARD,
            self.choice.latencies(ANY_SHARD, kind),
            partial(self._choose_any, order),
            has_rivals=sum(len(self.replicas(shard)) for shard in order) > 1,
            max_attempts=max_attempts,
            started_s=started_s,
        )
        try:
            races.start(race)
            while races.open and self.clock() < limit_s - SOON_S:
                await races.advance(limit_s)
            errors = {link.shard: error for link, error in race.failures}
            for attempt in race.running.values():
                self.timed_out = True
                shard = attempt.call.link.shard
                errors[shard] = DeadlineExceeded(f"shard {shard} did not answer in time")
            races.give_up()
        finally:
            await races.close()
        return None if race.winner is None else Reply(*race.winner), errors

    def _races(
        self,
        ask_one: Callable[[ShardLink, float], Awaitable[T]],
        let_go: Callable[[ShardLink], None],
    ) -> Races[T]:
        def on_hang(link: ShardLink) -> None:
            self.timed_out = True
            self.hung.add(link)

        def on_outrun(link: ShardLink) -> None:
            self.outrun.add(link)
            let_go(link)

        return Races(
            self.choice,
            self.clock,
            lambda link: ask_one(link, max(self.remaining_s, 0.0)),
            LOSSES,
            on_hang=on_hang,
            on_outrun=on_outrun,
        )

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
            hedged=progress.hedged,
        )


def _progress(race: Race[T]) -> _Progress:
    return _Progress(race.started_s, race.replica, len(race.tried), race.hedged)

"""Answers that are wanted at the same time, each of whichever replica gives it first.

One replica is asked; another one when the first fails, or takes longer than nearly all calls of its
kind. Whoever comes second is cancelled.

Source: Dean and Barroso, The Tail at Scale, CACM 2013, "Hedged requests".
"""

import asyncio
import math
from collections import deque
from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from silvershard.cluster.codec import status_row
from silvershard.cluster.replica_choice import Call, Latencies, ReplicaChoice, Standing
from silvershard.cluster.shard_link import LinkState, ShardLink
from silvershard.shard.errors import (
    DeadlineExceeded,
    Overloaded,
    RetrievalError,
    ShardUnavailable,
)

T = TypeVar("T")

SOON_S = 1e-6
"""Times that differ by less are the same: a timer may fire a moment early."""

# Pings tell within a few of these that a replica is suspect, and then it is hedged at once.
_LONGEST_LOOK_S = 0.05


class Choose(Protocol):
    """Returns whom to ask next."""

    def __call__(self, tried: Collection[ShardLink], *, hedge: bool) -> ShardLink:
        """Return a replica.

        Args:
            tried: those that were asked before.
            hedge: whether one of them may still answer.

        Raises:
            RetrievalError: one of the losses, if there is none.
        """
        ...


@dataclass(eq=False)
class _Attempt(Generic[T]):
    race: "Race[T]"
    call: Call
    is_hedge: bool


@dataclass(eq=False)
class Race(Generic[T]):
    """One answer, and who was asked for it."""

    shard: int
    latencies: Latencies
    """Of calls of this kind."""
    choose: Choose
    has_rivals: bool
    """False if there is nobody else to ask."""
    max_attempts: int
    started_s: float
    tried: list[ShardLink] = field(default_factory=list)
    running: dict[asyncio.Future[T], _Attempt[T]] = field(default_factory=dict)
    failures: list[tuple[ShardLink, RetrievalError]] = field(default_factory=list)
    refusal: RetrievalError | None = None
    """Why nobody could be asked at all."""
    winner: tuple[ShardLink, T] | None = None
    hedged: bool = False
    suppressed: bool = False
    hedge_at_s: float = math.inf

    @property
    def failure(self) -> RetrievalError | None:
        """Return what went wrong last."""
        return self.failures[-1][1] if self.failures else self.refusal

    @property
    def replica(self) -> str:
        """Return the index of the last replica that was asked; empty if there was none."""
        return str(self.tried[-1].replica) if self.tried else ""

    @property
    def waits_for_hung_ones(self) -> bool:
        """Return whether all those that may still answer have missed many pings."""
        return all(one.call.link.state is LinkState.EJECTED for one in self.running.values())


class Races(Generic[T]):
    """Runs races side by side in the task that waits for them."""

    def __init__(
        self,
        choice: ReplicaChoice,
        clock: Callable[[], float],
        ask_one: Callable[[ShardLink], Awaitable[T]],
        losses: tuple[type[RetrievalError], ...],
        *,
        on_hang: Callable[[ShardLink], None],
        on_outrun: Callable[[ShardLink], None],
    ) -> None:
        """Make no race yet.

        Args:
            choice: learns from every call.
            clock: must be the clock of the event loop.
            ask_one: asks one replica.
            losses: errors after which another replica may be asked; others end everything.
            on_hang: is told of a replica that was waited for in vain.
            on_outrun: is told of a replica that was asked first or second and answered later than
                the other; nobody waits for it any more.
        """
        self.open: dict[Race[T], None] = {}
        """Those that are not over, in order."""
        self._choice = choice
        self._clock = clock
        self._ask_one = ask_one
        self._losses = losses
        self._on_hang = on_hang
        self._on_outrun = on_outrun
        self._over: list[Race[T]] = []
        self._cancelled: list[asyncio.Future[T]] = []
        self._done: deque[tuple[Race[T], asyncio.Future[T]]] = deque()
        """Calls that have ended since anybody looked."""
        self._waker: asyncio.Future[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._timer_s = math.inf
        """Reading of the clock at which it wakes whoever waits."""

    def start(self, race: Race[T]) -> None:
        """Ask the first replica."""
        self.open[race] = None
        self._choice.extra.count_call()
        try:
            link = race.choose((), hedge=False)
        except self._losses as error:
            race.refusal = error
            self._end(race)
        else:
            self._ask(race, link)

    def take_over(self) -> list[Race[T]]:
        """Return the races that have ended since the last time, won or lost."""
        over, self._over = self._over, []
        return over

    async def advance(self, until_s: float) -> None:
        """Wait until a race ends or a hedge is due, at most until a reading of the clock."""
        wake_s = min([until_s, *(race.hedge_at_s for race in self.open)])
        if not self._done:
            await self._sleep(wake_s)
        while self._done:
            race, task = self._done.popleft()
            # Those that were given up meanwhile are in no race any more.
            attempt = race.running.pop(task, None)
            if attempt is not None:
                self._finish(task, attempt)
        due_s = self._clock() + SOON_S
        for race in self.open:
            if race.hedge_at_s <= due_s:
                self._hedge(race)

    async def _sleep(self, until_s: float) -> None:
        """Wait until a call ends, at most until a reading of the clock.

        A timer that is set for earlier is left as it is: most calls end before any, and to wake for
        nothing costs less than to set one for each wait.
        """
        loop = asyncio.get_running_loop()
        self._waker = loop.create_future()
        if until_s < self._timer_s:
            self._stop_timer()
            self._timer = loop.call_later(max(until_s - self._clock(), 0.0), self._ring)
            self._timer_s = until_s
        await self._waker

    def _ring(self) -> None:
        self._timer, self._timer_s = None, math.inf
        self._wake()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer, self._timer_s = None, math.inf

    def _wake(self) -> None:
        if self._waker is not None and not self._waker.done():
            self._waker.set_result(None)

    def give_up(self) -> None:
        """Wait no more for what is open: its replicas took too long."""
        for race in self.open:
            self._count_hedge(race, won=False)
            for task, attempt in race.running.items():
                self._count("DEADLINE_EXCEEDED")
                self._choice.gave_up(attempt.call)
                self._on_hang(attempt.call.link)
                self._cancel(task)
            race.running.clear()
        self.open.clear()

    async def close(self) -> None:
        """Cancel what is on its way and wait until it has ended; nothing is learned from it."""
        self._stop_timer()
        for race in self.open:
            for task, attempt in race.running.items():
                self._choice.abandoned(attempt.call)
                self._cancel(task)
            race.running.clear()
        self.open.clear()
        if self._cancelled:
            await asyncio.gather(*self._cancelled, return_exceptions=True)

    def _ask(self, race: Race[T], link: ShardLink, *, hedge: bool = False) -> None:
        race.tried.append(link)
        call = self._choice.begin(link, race.latencies)
        task = asyncio.ensure_future(self._ask_one(link))
        race.running[task] = _Attempt(race, call, hedge)

        def ended(_: asyncio.Future[T]) -> None:
            self._done.append((race, task))
            self._wake()

        task.add_done_callback(ended)
        if race.has_rivals and not race.hedged and self._choice.extra.hedging.enabled:
            race.hedge_at_s = call.started_s + race.latencies.delay_s

    def _finish(self, task: asyncio.Future[T], attempt: _Attempt[T]) -> None:
        race, call = attempt.race, attempt.call
        try:
            value = task.result()
        except DeadlineExceeded as error:
            self._count("DEADLINE_EXCEEDED")
            self._choice.gave_up(call)
            self._on_hang(call.link)
            self._fail(attempt, error)
        except self._losses as error:
            row = status_row(error)
            self._count("INTERNAL" if row is None else row.code)
            if isinstance(error, ShardUnavailable | Overloaded):
                self._choice.failed(call)
            else:
                self._choice.refused(call)
            self._fail(attempt, error)
        except BaseException:
            self._choice.abandoned(call)
            raise
        else:
            self._count("OK")
            self._choice.extra.counts.seconds.observe(self._clock() - call.started_s)
            self._choice.answered(call)
            race.winner = call.link, value
            self._count_hedge(race, won=attempt.is_hedge)
            for other, late in race.running.items():
                self._count("CANCELLED")
                self._choice.gave_up(late.call)
                self._cancel(other)
                self._on_outrun(late.call.link)
            race.running.clear()
            self._end(race)

    def _fail(self, attempt: _Attempt[T], error: RetrievalError) -> None:
        race = attempt.race
        race.failures.append((attempt.call.link, error))
        if race.running:
            # The other one that was asked may answer yet.
            return
        link = self._next(race, error)
        if link is None:
            self._count_hedge(race, won=False)
            self._end(race)
        else:
            self._ask(race, link)

    def _next(self, race: Race[T], error: RetrievalError) -> ShardLink | None:
        """Return who is asked after a failure; None if that was all."""
        if isinstance(error, DeadlineExceeded) or len(race.failures) >= race.max_attempts:
            return None
        try:
            link = race.choose(race.tried, hedge=False)
        except self._losses:
            return None
        granted = self._choice.extra.may_retry(refused=isinstance(error, Overloaded))
        return link if granted else None

    def _hedge(self, race: Race[T]) -> None:
        """Ask a second replica if there is a better one, and if that is granted."""
        (call,) = [attempt.call for attempt in race.running.values()]
        now_s = self._clock()
        # What is refused now may be granted when the replica has been silent for longer.
        waited_s = now_s - call.started_s
        look_s = max(race.latencies.delay_s, min(waited_s / 2, _LONGEST_LOOK_S))
        race.hedge_at_s = now_s + look_s
        slow = self._choice.standing(call.link)
        try:
            link = race.choose(race.tried, hedge=True)
        except self._losses:
            return
        other = self._choice.standing(link, proven=True)
        if slow is None or other is None or other is Standing.HUNG or other > slow:
            return
        suspect = call.link.state in (LinkState.SUSPECT, LinkState.EJECTED)
        extra = self._choice.extra
        if extra.may_hedge(suspect=suspect, silent=self._choice.is_silent(call)):
            race.hedged, race.hedge_at_s = True, math.inf
            self._ask(race, link, hedge=True)
        elif not race.suppressed:
            race.suppressed = True
            extra.counts.hedges_suppressed += 1

    def _count(self, code: str) -> None:
        self._choice.extra.counts.ended[code] += 1

    def _count_hedge(self, race: Race[T], *, won: bool) -> None:
        if race.hedged:
            counts = self._choice.extra.counts
            counts.hedges_won += won
            counts.hedges_lost += not won

    def _end(self, race: Race[T]) -> None:
        self.open.pop(race, None)
        self._over.append(race)

    def _cancel(self, task: asyncio.Future[T]) -> None:
        task.cancel()
        self._cancelled.append(task)

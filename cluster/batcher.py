"""The micro-batcher of a router: requests that come in together run together, within bounds."""

import asyncio
import contextlib
import math
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from silvershard.cluster.admission import Admission, Dropped, Ticket
from silvershard.cluster.config import AdmissionSection
from silvershard.cluster.consistency import ANY
from silvershard.cluster.coordinator import Query
from silvershard.cluster.metrics import Histogram
from silvershard.cluster.races import SOON_S
from silvershard.cluster.rounds import Fate
from silvershard.shard.errors import DeadlineExceeded, Overloaded

_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)

Run = Callable[[Sequence[Query]], Awaitable[list[Fate]]]

# What ran out of time waits no longer for its neighbours. An answer that is being put together
# comes sooner than that.
_PATIENCE_S = 0.02


@dataclass(eq=False)
class _Waiting(Ticket):
    query: Query
    run: Run
    fate: asyncio.Future[Fate]

    def end(self, fate: Fate) -> None:
        if not self.fate.done():
            self.fate.set_result(fate)


class Batcher:
    """Admits requests, gathers them into batches and runs a bounded number of batches at a time.

    A batch holds requests for the same ``run`` whose remaining times differ by less than a factor
    of two, so that nobody loses time to a neighbour in a hurry. Those that demand fresh shards may
    have to wait for updates: they share no batch with others, and have as many places of their own
    to run in. While nothing runs, nothing waits.
    """

    def __init__(
        self,
        admission: AdmissionSection,
        *,
        max_batch: int,
        max_delay_s: float,
        target_delay_s: float,
        clock: Callable[[], float],
        observe: Callable[[float], object] = lambda _: None,
    ) -> None:
        """Make a batcher.

        Args:
            admission: which requests wait, run and are refused.
            max_batch: requests of one batch.
            max_delay_s: longest wait of a request for neighbours, while others run.
            target_delay_s: age of the oldest that waits above which the newest goes first.
            clock: must be the clock of the event loop.
            observe: is told the age of the oldest that waits whenever requests come and go.
        """
        self._admission: Admission[_Waiting] = Admission(
            admission, max_batch=max_batch, target_delay_s=target_delay_s, clock=clock
        )
        self._line = self._admission.line
        self._max_batch = max_batch
        self._max_delay_s = max_delay_s
        self._clock = clock
        self._observe = observe
        self.sizes = Histogram(_SIZES)
        """Requests of each batch."""
        self._running: set[asyncio.Task[None]] = set()
        self._demanding: set[asyncio.Task[None]] = set()
        """Those that may wait for updates; the others are in ``_running``."""
        self._timer: asyncio.TimerHandle | None = None

    @property
    def capacity(self) -> int:
        """Return how many requests may wait, and so come together."""
        return self._line.capacity

    @property
    def dropped(self) -> Dropped:
        """Return what was not executed so far, and why."""
        return self._admission.dropped

    @property
    def limit(self) -> int:
        """Return the batches that may run at a time now."""
        return self._admission.limit

    @property
    def largest(self) -> int:
        """Return the requests that a batch may have now."""
        return self._admission.largest

    def is_hot(self) -> bool:
        """Return True while no shard should be asked twice for the same."""
        return self._admission.is_hot()

    @property
    def num_waiting(self) -> int:
        """Return how many requests wait for a batch; any thread may ask."""
        return len(self._line)

    async def submit(self, queries: Sequence[Query], run: Run) -> list[Fate]:
        """Return the fates of requests that came in together, in order.

        They are admitted together or not at all, but for those whose tenant has had enough or that
        cannot be answered in time; more than the queue holds never are. One that waits may still
        have to leave for requests of a higher priority.

        Cancelling the caller takes them out of the queue, or cancels their batch if nobody else is
        in it.

        Raises:
            Overloaded: if the queue has no room for all of them; nothing was executed then.
        """
        mine = [self._waiting(query, run) for query in queries]
        entering = [one for one in mine if self._take(one)]
        timers = self._watch(entering)
        try:
            if entering:
                self._enter(entering)
            return [await one.fate for one in mine]
        finally:
            for timer in timers:
                timer.cancel()
            for one in mine:
                self._leave(one)

    def _waiting(self, query: Query, run: Run) -> _Waiting:
        fate = asyncio.get_running_loop().create_future()
        priority = query.priority + self._admission.tenants.priority_of(query.tenant)
        demands = query.consistency != ANY
        return _Waiting(priority, query.tenant, query.deadline_s, demands, query, run, fate)

    def _take(self, one: _Waiting) -> bool:
        """Return whether the tenant of a request may have another one; it ends if not."""
        try:
            self._admission.tenants.take(one.tenant)
        except Overloaded as error:
            self._admission.refuse("tenant", one)
            one.end(error)
            return False
        return True

    def _enter(self, entering: Sequence[_Waiting]) -> None:
        self._observe(self._line.delay_s)
        full = len(self._line) + len(entering) > self._line.capacity
        if full and not self._line.newest_first:
            self._sweep()
        try:
            self._end(self._admission.admit(entering))
        except Overloaded as error:
            self._end([(one, error) for one in entering])
            raise
        self._start_when_due()

    def _leave(self, one: _Waiting) -> None:
        """Forget a request that nobody waits for any more."""
        if self._line.remove(one):
            self.dropped.cancelled["queue"] += 1
        elif one.fate.cancelled() or not one.fate.done():
            self.dropped.cancelled["run"] += 1
        one.fate.cancel()

    def _watch(self, entering: Sequence[_Waiting]) -> list[asyncio.TimerHandle]:
        """Look at the line when the time of requests is over, also if no batch begins or ends."""
        loop, now_s = asyncio.get_running_loop(), self._clock()
        return [
            loop.call_later(max(deadline_s - now_s, 0.0) + SOON_S, self._sweep)
            for deadline_s in {one.deadline_s for one in entering}
        ]

    def _give_up(self, one: _Waiting) -> None:
        """End a request that has no time left, although its batch goes on."""
        if not one.fate.done():
            self.dropped.expired["run"] += 1
            one.end(DeadlineExceeded("the time of the request ran out in its batch"))

    def _sweep(self) -> None:
        self._end(self._admission.sweep())

    def _end(self, leaving: Sequence[tuple[_Waiting, Exception]]) -> None:
        for one, error in leaving:
            if isinstance(error, Overloaded):
                self._admission.tenants.give_back(one.tenant)
            one.end(error)

    def _start_when_due(self) -> None:
        idle = not self._running and not self._demanding
        if len(self._line) >= self._max_batch or idle or not self._max_delay_s:
            self._start()
        elif self._timer is None:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(self._max_delay_s, self._start)

    def _start(self) -> None:
        """Start as many batches as may run."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if not any(self._may_run().values()):
            return
        self._sweep()
        self._observe(self._line.delay_s)
        while batch := self._next_batch():
            demands = batch[0].demands
            self.sizes.observe(len(batch))
            started_s = self._clock() if demands else self._admission.started(len(batch))
            task = asyncio.create_task(self._run(batch, started_s))
            running = self._demanding if demands else self._running
            running.add(task)
            task.add_done_callback(self._finished)
        if not len(self._line):
            # What one start takes along is no queue that stands.
            self._observe(0.0)

    def _may_run(self) -> dict[bool, bool]:
        """Return whether one that waits could run now, of those that demand and of the others."""
        line, limit = self._line, self._admission.limit
        return {
            True: line.num_demanding > 0 and len(self._demanding) < limit,
            False: len(line) > line.num_demanding and len(self._running) < limit,
        }

    def _next_batch(self) -> list[_Waiting]:
        """Take the next batch that may run out of the line; empty if there is none."""
        may_run = self._may_run()
        batch: list[_Waiting] = []
        if not any(may_run.values()):
            return batch
        kind: tuple[Run, int, bool] | None = None
        now_s, first_s = self._clock(), math.inf
        for one in self._line.in_order():
            # Who was cancelled leaves as soon as it is told so.
            if not may_run[one.demands] or one.fate.done():
                continue
            own = self._kind(one)
            kind = own if kind is None else kind
            if own == kind:
                first_s = min(first_s, one.deadline_s)
                if batch and not self._admission.fits(len(batch) + 1, first_s - now_s):
                    break
                self._line.remove(one)
                batch.append(one)
        return batch

    def _kind(self, one: _Waiting) -> tuple[Run, int, bool]:
        remaining_s = one.deadline_s - self._clock()
        return one.run, math.floor(math.log2(max(remaining_s, 1e-3))), one.demands

    async def _run(self, batch: Sequence[_Waiting], started_s: float) -> None:
        work = asyncio.ensure_future(batch[0].run([one.query for one in batch]))

        def stop_if_nobody_waits(_: asyncio.Future[Fate]) -> None:
            if all(one.fate.done() for one in batch):
                work.cancel()

        for one in batch:
            one.fate.add_done_callback(stop_if_nobody_waits)
        loop, now_s = asyncio.get_running_loop(), self._clock()
        last_s = max(one.deadline_s for one in batch)
        timers = [
            loop.call_later(max(one.deadline_s - now_s, 0.0) + _PATIENCE_S, self._give_up, one)
            for one in batch
            if one.deadline_s < last_s
        ]
        answered = late = False
        try:
            with contextlib.suppress(asyncio.CancelledError):
                fates: Sequence[Fate]
                try:
                    fates = await work
                    answered = any(_took_its_time(fate) for fate in fates)
                    late = all(isinstance(fate, DeadlineExceeded) for fate in fates)
                except Exception as error:  # noqa: BLE001  # the server logs it, once per request
                    fates = [error] * len(batch)
                for one, fate in zip(batch, fates, strict=True):
                    one.end(fate)
        finally:
            for timer in timers:
                timer.cancel()
            # Of one that may have waited for updates, neither its time nor its being late tells
            # whether it was too large.
            if not batch[0].demands:
                self._admission.ended(len(batch), started_s, answered=answered, late=late)

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._running.discard(task)
        self._demanding.discard(task)
        if len(self._line):
            self._start()


def _took_its_time(fate: Fate) -> bool:
    """Return whether a fate tells how long a batch takes; what is refused is quickly so."""
    return not isinstance(fate, Exception) or isinstance(fate, DeadlineExceeded)

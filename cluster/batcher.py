"""The micro-batcher of a router: requests that come in together run together, within bounds."""

import asyncio
import contextlib
import math
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from silvershard.cluster.consistency import ANY
from silvershard.cluster.coordinator import Query
from silvershard.cluster.rounds import Fate
from silvershard.shard.errors import Overloaded

Run = Callable[[Sequence[Query]], Awaitable[list[Fate]]]

_SHORTEST_DELAY_S = 0.01
_LONGEST_DELAY_S = 1.0
_SMOOTHING = 0.2


@dataclass(eq=False)
class _Waiting:
    query: Query
    run: Run
    fate: asyncio.Future[Fate]

    @property
    def demands(self) -> bool:
        """Return whether it may have to wait for updates."""
        return self.query.consistency != ANY


class Batcher:
    """Admits requests, gathers them into batches and runs a bounded number of batches at a time.

    A batch holds requests for the same ``run`` whose remaining times differ by less than a factor
    of two, so that nobody loses time to a neighbour in a hurry. Those that demand fresh shards may
    have to wait for updates: they share no batch with others, and take at most half of those that
    run. While nothing runs, nothing waits.
    """

    def __init__(
        self,
        *,
        max_batch: int,
        max_delay_s: float,
        max_running: int,
        queue: int,
        clock: Callable[[], float],
    ) -> None:
        """Make a batcher.

        Args:
            max_batch: requests of one batch.
            max_delay_s: longest wait of a request for neighbours, while others run.
            max_running: batches at a time.
            queue: requests that may wait.
            clock: must be the clock of the event loop.
        """
        self._max_batch = max_batch
        self._max_delay_s = max_delay_s
        self._max_running = max_running
        self._queue = queue
        self._clock = clock
        self._waiting: deque[_Waiting] = deque()
        self._running: set[asyncio.Task[None]] = set()
        self._demanding: set[asyncio.Task[None]] = set()
        """Those of them that may wait for updates."""
        self._timer: asyncio.TimerHandle | None = None
        self._batch_s = _SHORTEST_DELAY_S

    @property
    def num_waiting(self) -> int:
        """Return how many requests wait for a batch; any thread may ask."""
        return len(self._waiting)

    async def submit(self, queries: Sequence[Query], run: Run) -> list[Fate]:
        """Return the fates of requests that came in together, in order.

        They are admitted together or not at all; more than the queue holds never are.

        Cancelling the caller takes them out of the queue, or cancels their batch if nobody else is
        in it.

        Raises:
            Overloaded: if the queue has no room for all of them; nothing was executed then.
        """
        if len(self._waiting) + len(queries) > self._queue:
            # Those whose callers have left hold no place.
            self._waiting = deque(one for one in self._waiting if not one.fate.done())
        if len(self._waiting) + len(queries) > self._queue:
            batches = math.ceil(len(self._waiting) / self._max_batch)
            delay_s = self._batch_s * batches / self._max_running
            raise Overloaded(
                f"{len(self._waiting)} of at most {self._queue} requests are waiting",
                min(max(delay_s, _SHORTEST_DELAY_S), _LONGEST_DELAY_S),
            )
        loop = asyncio.get_running_loop()
        mine = [_Waiting(query, run, loop.create_future()) for query in queries]
        self._waiting.extend(mine)
        self._start_when_due()
        try:
            return [await one.fate for one in mine]
        finally:
            for one in mine:
                one.fate.cancel()

    def _start_when_due(self) -> None:
        if len(self._waiting) >= self._max_batch or not self._running or not self._max_delay_s:
            self._start()
        elif self._timer is None:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(self._max_delay_s, self._start)

    def _start(self) -> None:
        """Start as many batches as may run."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        while self._waiting and len(self._running) < self._max_running:
            batch = self._next_batch()
            if not batch:
                return
            task = asyncio.create_task(self._run(batch))
            self._running.add(task)
            if batch[0].demands:
                self._demanding.add(task)
            task.add_done_callback(self._finished)

    def _next_batch(self) -> list[_Waiting]:
        batch: list[_Waiting] = []
        left: deque[_Waiting] = deque()
        kind: tuple[Run, int, bool] | None = None
        is_full = len(self._demanding) >= max(self._max_running // 2, 1)
        for one in self._waiting:
            if one.fate.done():
                continue
            if kind is None and not (is_full and one.demands):
                kind = self._kind(one)
            if len(batch) < self._max_batch and self._kind(one) == kind:
                batch.append(one)
            else:
                left.append(one)
        self._waiting = left
        return batch

    def _kind(self, one: _Waiting) -> tuple[Run, int, bool]:
        remaining_s = one.query.deadline_s - self._clock()
        return one.run, math.floor(math.log2(max(remaining_s, 1e-3))), one.demands

    async def _run(self, batch: Sequence[_Waiting]) -> None:
        started_s = self._clock()
        work = asyncio.ensure_future(batch[0].run([one.query for one in batch]))

        def stop_if_nobody_waits(_: asyncio.Future[Fate]) -> None:
            if all(one.fate.done() for one in batch):
                work.cancel()

        for one in batch:
            one.fate.add_done_callback(stop_if_nobody_waits)
        fates: Sequence[Fate]
        with contextlib.suppress(asyncio.CancelledError):
            try:
                fates = await work
            except Exception as error:  # noqa: BLE001  # the server logs it, once per request
                fates = [error] * len(batch)
            for one, fate in zip(batch, fates, strict=True):
                if not one.fate.done():
                    one.fate.set_result(fate)
        spent_s = self._clock() - started_s
        self._batch_s += _SMOOTHING * (spent_s - self._batch_s)

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._running.discard(task)
        self._demanding.discard(task)
        if self._waiting:
            self._start()

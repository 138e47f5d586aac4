"""Sends batches of updates to a cluster, several at a time, those of one item in their order.

A batch waits until no batch that is still under way has one of its items. An upsert may be refused
for a while, as long as there is no room; then it is sent again. So what follows an upsert for the
same item waits for what becomes of it, and the last record of a file is what its item ends with.
"""

import random
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import NamedTuple, Self

from silvershard.cluster import ApplyResult, ItemUpsert, RequestRefused
from silvershard.deploy.errors import CommandError, TimedOut
from silvershard.deploy.update_files import Entry
from silvershard.deploy.update_json import ItemUpdate

RETRIED = ("RESOURCE_EXHAUSTED", "UNAVAILABLE", "DEADLINE_EXCEEDED")
"""Codes that mean: later, for a call or for an update of it."""
_FIRST_PAUSE_S = 0.1
_LONGEST_PAUSE_S = 5.0

Apply = Callable[[Sequence[ItemUpdate]], ApplyResult]
_Numbered = tuple[int, ItemUpdate]


class Delivery(NamedTuple):
    """A batch, and what became of it."""

    batch: Sequence[Entry]
    rejected: Mapping[int, str]
    """Why, by the number of the record; the others are durable."""


class Feed:
    """A pipeline to the cluster; a context manager, for one thread."""

    def __init__(
        self,
        apply: Apply,
        settled: Callable[[Delivery], None],
        *,
        in_flight: int = 4,
        rate: float | None = None,
        give_up_s: float = 300.0,
        clock: Callable[[], float] = time.monotonic,
        wait: Callable[[float], object] | None = None,
    ) -> None:
        """Make a pipeline.

        Args:
            apply: sends updates, from several threads at a time.
            settled: told of every batch that ended, in the order in which they were sent.
            in_flight: most batches under way.
            rate: most updates a second; None: any.
            give_up_s: longest time in which nothing of a batch is accepted.
            clock: seconds.
            wait: waits for so many seconds; None: until the pipeline is left at most.
        """
        self._apply = apply
        self._settled = settled
        self._in_flight = in_flight
        self._rate = rate
        self._give_up_s = give_up_s
        self._clock = clock
        self._left = threading.Event()
        self._wait = wait or self._left.wait
        self._threads = ThreadPoolExecutor(in_flight, thread_name_prefix="ingest")
        self._pending: deque[tuple[Sequence[Entry], set[int], Future[dict[int, str]]]] = deque()
        self._next_s = clock()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._left.set()
        self._threads.shutdown(cancel_futures=True)

    def send(self, batch: Sequence[Entry]) -> None:
        """Send a batch as soon as it may go, and tell of those before it that ended meanwhile.

        Raises:
            TimedOut: if nothing of a batch was accepted for too long.
            RequestRefused: if the cluster refuses a call for good.
        """
        item_ids = {one.update.item_id for one in batch if one.update is not None}
        while self._pending and (
            len(self._pending) >= self._in_flight
            or self._pending[0][2].done()
            or any(not item_ids.isdisjoint(others) for _, others, _ in self._pending)
        ):
            self._settle()
        self._pace(len(batch))
        future = self._threads.submit(self._deliver, batch)
        self._pending.append((batch, item_ids, future))

    def finish(self) -> None:
        """Tell of all batches, and return when the last has ended.

        Raises:
            TimedOut: as ``send``.
            RequestRefused: as ``send``.
        """
        while self._pending:
            self._settle()

    def _settle(self) -> None:
        batch, _, future = self._pending.popleft()
        self._settled(Delivery(batch, future.result()))

    def _pace(self, count: int) -> None:
        if self._rate is None:
            return
        now_s = self._clock()
        if self._next_s > now_s:
            self._wait(self._next_s - now_s)
        self._next_s = max(self._next_s, now_s) + count / self._rate

    def _deliver(self, batch: Sequence[Entry]) -> dict[int, str]:
        """Send a batch until every record of it is durable or rejected for good."""
        rejected = {one.number: one.reason for one in batch if one.update is None}
        left = [(one.number, one.update) for one in batch if one.update is not None]
        return rejected | self._send(left)

    def _send(self, left: Sequence[_Numbered]) -> dict[int, str]:
        rejected: dict[int, str] = {}
        progress_s, pause_s = self._clock(), _FIRST_PAUSE_S
        while left:
            told_s: float | None = None
            now, behind = _in_turn(left)
            try:
                result = self._apply([update for _, update in now])
            except RequestRefused as error:
                if error.code not in RETRIED:
                    raise
                told_s, reason = error.retry_after_s, str(error)
            except ValueError as error:
                # Something in it has no form on the wire, or all of it is too large.
                if len(left) == 1:
                    return rejected | {left[0][0]: str(error)}
                middle = len(left) // 2
                return rejected | self._send(left[:middle]) | self._send(left[middle:])
            else:
                again, refused, reason = _outcome(now, result)
                rejected |= refused
                left = sorted([*again, *behind], key=lambda one: one[0])
                if len(again) < len(now):
                    progress_s, pause_s = self._clock(), _FIRST_PAUSE_S
                if not again:
                    continue
            if self._left.is_set():
                raise CommandError("the ingest has ended")
            if self._clock() - progress_s > self._give_up_s:
                raise TimedOut(f"nothing was accepted for {self._give_up_s:g} s: {reason}")
            pause_s = min(pause_s * random.uniform(1.5, 2.5), _LONGEST_PAUSE_S)
            self._wait(pause_s if told_s is None else told_s)
        return rejected


def _in_turn(left: Sequence[_Numbered]) -> tuple[list[_Numbered], list[_Numbered]]:
    """Return what can be sent at once, and what has to wait for an upsert of its item in that."""
    now: list[_Numbered] = []
    behind: list[_Numbered] = []
    upserted: set[int] = set()
    for number, update in left:
        if update.item_id in upserted:
            behind.append((number, update))
            continue
        now.append((number, update))
        if isinstance(update, ItemUpsert):
            upserted.add(update.item_id)
    return now, behind


def _outcome(
    sent: Sequence[_Numbered], result: ApplyResult
) -> tuple[list[_Numbered], dict[int, str], str]:
    """Return what is to be sent again, what is rejected for good, and why the former."""
    again: list[_Numbered] = []
    refused: dict[int, str] = {}
    reason = ""
    for one in result.rejected:
        number, update = sent[one.index]
        if one.code in RETRIED:
            again.append((number, update))
            reason = reason or one.reason
        else:
            refused[number] = f"{one.code}: {one.reason}"
    return again, refused, reason

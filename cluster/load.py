"""The engine of an open-loop load: requests go out when they are due, whatever became of others.

A closed loop waits for an answer before it asks again, so while a server stalls nobody is measured
who would have waited. Here every request has a time at which it is due, and its latency counts from
there: a request that could not be sent in time waited, too.

Source: G. Tene, "How NOT to measure latency", 2013, on coordinated omission.
"""

import asyncio
import tempfile
from array import array
from collections.abc import Awaitable, Callable, Iterable, Iterator
from types import TracebackType
from typing import NamedTuple, Self

OK = "OK"
DEADLINE_EXCEEDED = "DEADLINE_EXCEEDED"
IN_FLIGHT_LIMIT = "IN_FLIGHT_LIMIT"
"""Code of a request that was not sent, because as many were in flight as may be."""
SENT_TOO_LATE = "SENT_TOO_LATE"
"""Code of a request whose time was over before the generator came to send it."""
UNSENT = (IN_FLIGHT_LIMIT, SENT_TOO_LATE)

_GRACE_S = 1.0
"""Beyond the deadline of the last request, for whoever does not keep to it."""
_BUFFER_BYTES = 1 << 18


class Reply(NamedTuple):
    """What came of a call."""

    code: str
    """Name of its gRPC status."""
    body: bytes
    """The answer; of a call that failed its rich status, if it has one."""


Send = Callable[[int, float], Awaitable[Reply]]
"""Sends the request of a number and returns what came of it within the seconds that are given."""


class Entry(NamedTuple):
    """One request and what came of it; times are seconds since the load began."""

    number: int
    at_s: float
    """When it was due."""
    sent_s: float
    done_s: float
    code: str
    """Name of a gRPC status, or one of ``UNSENT``."""
    body: bytes


class Journal:
    """Keeps every entry of a load until somebody reads them; a context manager.

    Answers are not looked at while the load goes on, and lie in a file without a name, so that a
    long one takes 40 bytes of memory per request.
    """

    def __init__(self) -> None:
        self._numbers = array("q")
        self._times = array("d")
        self._codes = array("H")
        self._ends = array("q", [0])
        self._known: dict[str, int] = {}
        # The file lives as long as the journal, which closes it.
        self._file = tempfile.TemporaryFile(buffering=_BUFFER_BYTES)  # noqa: SIM115

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()

    def __len__(self) -> int:
        return len(self._numbers)

    def add(self, entry: Entry) -> None:
        """Keep an entry.

        Raises:
            OSError: if there is no room for its answer.
        """
        self._file.write(entry.body)
        self._ends.append(self._ends[-1] + len(entry.body))
        self._numbers.append(entry.number)
        self._times.extend((entry.at_s, entry.sent_s, entry.done_s))
        self._codes.append(self._known.setdefault(entry.code, len(self._known)))

    def entries(self) -> Iterator[Entry]:
        """Yield all entries in the order of their numbers."""
        names = list(self._known)
        for place in sorted(range(len(self)), key=self._numbers.__getitem__):
            self._file.seek(self._ends[place])
            body = self._file.read(self._ends[place + 1] - self._ends[place])
            at_s, sent_s, done_s = self._times[3 * place : 3 * place + 3]
            code = names[self._codes[place]]
            yield Entry(self._numbers[place], at_s, sent_s, done_s, code, body)


class OpenLoop:
    """Sends requests when they are due and notes what comes of them."""

    def __init__(
        self,
        send: Send,
        journal: Journal,
        *,
        deadline_s: float,
        max_in_flight: int,
        clock: Callable[[], float],
    ) -> None:
        """Make a load that has not begun.

        Args:
            send: sends one request.
            journal: gets what comes of each.
            deadline_s: of each request, from when it was due.
            max_in_flight: requests that may wait for their answers at a time; one that is due
                beyond them is not sent, and noted as that.
            clock: must be the clock of the event loop.
        """
        self._send = send
        self._journal = journal
        self._deadline_s = deadline_s
        self._max_in_flight = max_in_flight
        self._clock = clock
        self._running: set[asyncio.Task[None]] = set()
        self._sender: asyncio.Task[None] | None = None
        self._failure: Exception | None = None
        self.stopped = False
        self.cut_short = 0
        """Requests that were in flight when the load was stopped, and are not noted."""

    def stop(self) -> None:
        """End the load: nothing more is sent, and nothing waited for."""
        self.stopped = True
        if self._sender is not None:
            self._sender.cancel()

    async def run(self, arrivals: Iterable[tuple[int, float]], start_s: float) -> None:
        """Send everything and wait until it is answered, or out of time.

        Args:
            arrivals: number of each request and when it is due, in seconds since ``start_s``.
            start_s: reading of the clock at which the load begins.

        Raises:
            Exception: whatever sending a request, or noting its answer, raises.
        """
        self._sender = asyncio.create_task(self._send_all(arrivals, start_s))
        if self.stopped:
            self._sender.cancel()
        try:
            await asyncio.wait([self._sender])
            if self._running and not self.stopped:
                await asyncio.wait(self._running, timeout=self._deadline_s + _GRACE_S)
        finally:
            left = [self._sender, *self._running]
            for task in left:
                task.cancel()
            await asyncio.gather(*left, return_exceptions=True)
        if not self._sender.cancelled() and (error := self._sender.exception()) is not None:
            raise error
        if self._failure is not None:
            raise self._failure

    async def _send_all(self, arrivals: Iterable[tuple[int, float]], start_s: float) -> None:
        for number, at_s in arrivals:
            # Others get a turn even when every request is late.
            await asyncio.sleep(max(start_s + at_s - self._clock(), 0.0))
            now_s = self._clock() - start_s
            if now_s >= at_s + self._deadline_s:
                self._journal.add(Entry(number, at_s, now_s, now_s, SENT_TOO_LATE, b""))
            elif len(self._running) >= self._max_in_flight:
                self._journal.add(Entry(number, at_s, now_s, now_s, IN_FLIGHT_LIMIT, b""))
            else:
                task = asyncio.create_task(self._ask(number, at_s, start_s))
                self._running.add(task)
                task.add_done_callback(self._ended)

    async def _ask(self, number: int, at_s: float, start_s: float) -> None:
        sent_s = self._clock() - start_s
        try:
            reply = await self._send(number, max(at_s + self._deadline_s - sent_s, 0.0))
        except asyncio.CancelledError:
            if self.stopped:
                self.cut_short += 1
                raise
            reply = Reply(DEADLINE_EXCEEDED, b"")
        done_s = self._clock() - start_s
        self._journal.add(Entry(number, at_s, sent_s, done_s, reply.code, reply.body))

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._running.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            assert isinstance(error, Exception)
            self._failure = self._failure or error
            if self._sender is not None:
                self._sender.cancel()

"""Calls of one log partition that come at the same time share one append to the log.

Nothing waits for others to come: what arrives while an append runs goes into the next one.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from silvershard.cluster.sequencer import Outcome, Write
from silvershard.shard.errors import DeadlineExceeded, Fenced, LogUnavailable

MAX_GROUP = 1024
"""Most writes of one append, so that what is urgent waits for some 20 ms of work at most."""

MAX_GROUP_BYTES = 8 << 20
"""Most bytes of one append, but for a single write that has more."""

Commit = Callable[[Sequence[Sequence[Write]]], list[Outcome]]


@dataclass(eq=False, slots=True)
class _Job:
    writes: Sequence[Write]
    size: int
    """Bytes of the writes."""
    deadline_s: float
    outcome: asyncio.Future[Outcome]


def groups_of(writes: Sequence[Write]) -> Iterator[Sequence[Write]]:
    """Yield the writes of a call in their order, in pieces that one append may have."""
    begin, size = 0, 0
    for at, write in enumerate(writes):
        if at > begin and (at - begin >= MAX_GROUP or size + len(write.body) > MAX_GROUP_BYTES):
            yield writes[begin:at]
            begin, size = at, 0
        size += len(write.body)
    if writes:
        yield writes[begin:]


def decided(outcomes: Sequence[Outcome | BaseException], url: str) -> list[Outcome]:
    """Return what became of the pieces of a call, which are for the log at ``url``.

    Raises:
        Fenced: if another sequencer has taken over, and nothing of the call is logged.
        LogUnavailable: if it has, and something of the call is logged or may be.
        DeadlineExceeded: if some of them, or all, did not get to the log in time.
        BaseException: what else became of one.
    """
    failures = [one for one in outcomes if isinstance(one, BaseException)]
    others = [one for one in failures if not isinstance(one, DeadlineExceeded)]
    fenced = [one for one in others if isinstance(one, Fenced)]
    if fenced and len(fenced) == len(others) and len(failures) == len(outcomes):
        raise fenced[0]
    if fenced:
        raise LogUnavailable(url, f"{fenced[0]}; some of the call may be logged")
    if others:
        raise others[0]
    if failures and len(failures) < len(outcomes):
        raise DeadlineExceeded("the time of the call ran out; a part of it is logged")
    if failures:
        raise failures[0]
    return [one for one in outcomes if not isinstance(one, BaseException)]


class Backlog:
    """How much waits for the log.

    What comes alone always fits, however large it is.
    """

    def __init__(self, max_updates: int, max_bytes: int) -> None:
        """Make an empty backlog with bounds."""
        self.updates = 0
        self.bytes = 0
        self._max_updates = max_updates
        self._max_bytes = max_bytes
        self._shorter = asyncio.Event()

    def fits(self, updates: int, size: int) -> bool:
        """Return whether there is room for updates of ``size`` bytes."""
        return not self.updates or (
            self.updates + updates <= self._max_updates and self.bytes + size <= self._max_bytes
        )

    async def until_fits(self, updates: int, size: int) -> None:
        """Return as soon as there is room."""
        while not self.fits(updates, size):
            self._shorter.clear()
            await self._shorter.wait()

    def add(self, updates: int, size: int) -> None:
        """Count updates that wait from now on."""
        self.updates += updates
        self.bytes += size

    def remove(self, updates: int, size: int) -> None:
        """Count them no more."""
        self.updates -= updates
        self.bytes -= size
        self._shorter.set()


class GroupCommit:
    """The queue in front of one log partition, and the thread that writes it."""

    def __init__(
        self, commit: Commit, *, clock: Callable[[], float], name: str = "log-partition"
    ) -> None:
        """Make a queue; ``run`` serves it.

        Args:
            commit: decides and logs the writes of several calls; runs on a thread of its own.
            clock: of the deadlines.
            name: of the thread.
        """
        self._commit = commit
        self._clock = clock
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=name)
        self._urgent: deque[_Job] = deque()
        self._others: deque[_Job] = deque()
        self._arrived = asyncio.Event()

    def submit(
        self, writes: Sequence[Write], deadline_s: float, *, urgent: bool
    ) -> asyncio.Future[Outcome]:
        """Queue the writes of a call and return what will become of them.

        The future raises what ``commit`` raised, or ``DeadlineExceeded`` if nothing of the call was
        logged in time. A call whose future is cancelled before its turn is dropped.

        Args:
            writes: in their order; one of ``groups_of``.
            deadline_s: when nobody waits any more.
            urgent: whether it goes ahead of those that are not.
        """
        size = sum(len(one.body) for one in writes)
        job = _Job(writes, size, deadline_s, asyncio.get_running_loop().create_future())
        (self._urgent if urgent else self._others).append(job)
        self._arrived.set()
        return job.outcome

    def call(self, work: Callable[[], int]) -> asyncio.Future[int]:
        """Run other work on the thread of the log partition, between two appends."""
        return asyncio.get_running_loop().run_in_executor(self._thread, work)

    async def run(self) -> None:
        """Serve the queue until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            await self._arrived.wait()
            self._arrived.clear()
            while group := self._take():
                calls = [job.writes for job in group]
                try:
                    outcomes = await loop.run_in_executor(self._thread, self._commit, calls)
                except asyncio.CancelledError:
                    raise
                except Exception as error:  # noqa: BLE001  # every waiting call states it
                    for job in group:
                        _settle(job.outcome, error)
                else:
                    for job, outcome in zip(group, outcomes, strict=True):
                        _settle(job.outcome, outcome)

    def close(self, error: Exception) -> None:
        """Fail what waits, and end the thread after what it is at."""
        for queue in (self._urgent, self._others):
            while queue:
                _settle(queue.popleft().outcome, error)
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _take(self) -> list[_Job]:
        """Return the calls of the next append, urgent ones first."""
        group: list[_Job] = []
        count = size = 0
        for queue in (self._urgent, self._others):
            while queue and (
                not group
                or (
                    count + len(queue[0].writes) <= MAX_GROUP
                    and size + queue[0].size <= MAX_GROUP_BYTES
                )
            ):
                job = queue.popleft()
                if job.outcome.done():
                    continue
                if self._clock() >= job.deadline_s:
                    late = DeadlineExceeded("the time of the call ran out; nothing of it is logged")
                    _settle(job.outcome, late)
                    continue
                group.append(job)
                count += len(job.writes)
                size += job.size
        return group


def _settle(future: asyncio.Future[Outcome], outcome: Outcome | Exception) -> None:
    if future.done():
        return
    if isinstance(outcome, Exception):
        future.set_exception(outcome)
    else:
        future.set_result(outcome)

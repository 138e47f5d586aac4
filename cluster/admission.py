"""Who may wait in a router, who goes next, how many batches run, and who is refused.

Free of I/O: time is read from the clock that is given.
"""

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from silvershard.cluster.batch_times import BatchTimes
from silvershard.cluster.config import AdmissionSection, ConcurrencySection, TenantSection
from silvershard.shard.errors import DeadlineExceeded, Overloaded

INTERVAL_S = 0.1
"""How long a queue must stand to be more than a burst."""

DEFAULT_TENANT = "default"
"""Whose limits hold for tenants that the configuration does not name."""

_SHORTEST_DELAY_S = 0.01
_LONGEST_DELAY_S = 10.0
_SMOOTHING = 0.2

# A batch may take so many times the least that one of its size took: a router with less to wait for
# would leave the shards idle between two rounds.
_TOLERANCE = 1.5
# Batches take longer than they typically do as often as not; one that is late was for nothing.
_MARGIN = 1.5
_STEEPEST = 0.5
_STEP = 0.5
_FORGET_S = 10.0
_LOAD_S = 0.1


@dataclass(eq=False)
class Ticket:
    """A request that wants to run; the larger priority goes first."""

    priority: int
    tenant: str
    deadline_s: float
    demands: bool
    """Whether it may have to wait for updates."""
    entered_s: float = field(default=0.0, init=False)
    """Reading of the clock when it began to wait."""


T = TypeVar("T", bound=Ticket)


@dataclass
class Dropped:
    """Requests that were not executed, or not to the end, since the router started."""

    refused: Counter[str] = field(default_factory=Counter)
    """By cause: ``queue`` on arrival, ``displaced`` by others, ``deadline`` and ``tenant``."""
    shed: Counter[tuple[str, str]] = field(default_factory=Counter)
    """The same by cause and tenant; those that the configuration does not name are ``other``."""
    shed_by_priority: Counter[str] = field(default_factory=Counter)
    """The same by priority: ``low`` below 0, ``normal``, ``high`` above 0."""
    uncovered: int = 0
    """Those that were executed, but too few documents answered."""
    expired: Counter[str] = field(default_factory=Counter)
    """Whose time ran out, by the stage that did not run: ``queue``, ``rounds``; ``run``: whose
    neighbours went on."""
    cancelled: Counter[str] = field(default_factory=Counter)
    """Whose callers went away, by where they were: ``queue``, ``run``."""


def _level(priority: int) -> str:
    return "normal" if not priority else "low" if priority < 0 else "high"


class WaitingLine(Generic[T]):
    """Requests that wait, at most so many, in the order in which they are served.

    The larger priority goes first. Among equals the oldest does; but once one has waited longer
    than the target in a line that was never empty for ``INTERVAL_S``, the newest does, which has
    the most time left. Who would be served last is refused first.

    Source: Maurer, "Fail at Scale", ACM Queue 13(8), 2015, for the order under load.
    """

    def __init__(self, capacity: int, target_delay_s: float, clock: Callable[[], float]) -> None:
        """Make an empty line."""
        self.capacity = capacity
        self._target_delay_s = target_delay_s
        self._clock = clock
        self._levels: dict[int, dict[T, None]] = {}
        """Those of each priority in order of arrival; no level is empty."""
        self._size = 0
        self.num_demanding = 0
        """Those among them that may have to wait for updates."""
        self._empty_s = clock()
        """When nobody but those waited last."""

    def __len__(self) -> int:
        return self._size

    @property
    def delay_s(self) -> float:
        """Return the age of the oldest, but for those that wait for updates."""
        first_s = now_s = self._clock()
        for level in self._levels.values():
            oldest = next((one for one in level if not one.demands), None)
            if oldest is not None:
                first_s = min(first_s, oldest.entered_s)
        return now_s - first_s

    @property
    def newest_first(self) -> bool:
        """Return True while a line stands in which somebody has waited too long."""
        if self._clock() - self._empty_s < INTERVAL_S:
            return False
        return self.delay_s > self._target_delay_s

    def in_order(self) -> Iterator[T]:
        """Yield those that wait, the next to be served first; they may leave meanwhile."""
        newest_first = self.newest_first
        for priority in sorted(self._levels, reverse=True):
            level = list(self._levels[priority])
            yield from reversed(level) if newest_first else level

    def num_ahead_of(self, priority: int) -> int:
        """Return how many go before a request that comes now."""
        least = priority + 1 if self.newest_first else priority
        return sum(len(level) for at, level in self._levels.items() if at >= least)

    def enter(self, group: Sequence[T]) -> list[T] | None:
        """Let all of a group wait, and return those that had to leave for them; None: no room.

        Whoever leaves would be served after every one of the group.
        """
        displaced = self._last(
            self._size + len(group) - self.capacity, min(one.priority for one in group)
        )
        if displaced is None:
            return None
        for one in displaced:
            self.remove(one)
        now_s = self._clock()
        if self._size == self.num_demanding:
            self._empty_s = now_s
        for one in group:
            one.entered_s = now_s
            self._levels.setdefault(one.priority, {})[one] = None
            self.num_demanding += one.demands
        self._size += len(group)
        return displaced

    def _last(self, count: int, priority: int) -> list[T] | None:
        """Return the last in order that come after a new request; None if there are too few."""
        found: list[T] = []
        newest_first = self.newest_first
        for at in sorted(self._levels):
            if len(found) >= count or at > priority or (at == priority and not newest_first):
                break
            level = self._levels[at]
            last_first = iter(level) if newest_first else reversed(level)
            found += itertools.islice(last_first, count - len(found))
        return found if len(found) >= count else None

    def remove(self, ticket: T) -> bool:
        """Let one leave; False if it does not wait."""
        level = self._levels.get(ticket.priority, {})
        if ticket not in level:
            return False
        del level[ticket]
        self._size -= 1
        self.num_demanding -= ticket.demands
        if self._size == self.num_demanding:
            self._empty_s = self._clock()
        if not level:
            del self._levels[ticket.priority]
        return True


class ConcurrencyLimit:
    """How many batches may run at a time, so that they keep the shards busy and no more.

    The limit follows the ratio of the least latency of a batch of that size to the latest one.
    Every ten seconds it begins anew at its minimum, where the least is measured without the queues
    that a larger limit makes.

    Source: Netflix, "concurrency-limits" (GradientLimit), 2018; the new beginning is that of
    Cardwell et al., "BBR: Congestion-Based Congestion Control", ACM Queue 14(5), 2016.
    """

    def __init__(self, config: ConcurrencySection, clock: Callable[[], float]) -> None:
        """Make a limit without any measurement."""
        self._config = config
        self._clock = clock
        self._value = float(config.min)
        self._best_s: dict[int, float] = {}
        """The least latency since the last beginning, by powers of two of the size."""
        self._began_s = clock()

    @property
    def value(self) -> int:
        """Return the batches that may run now."""
        return self._config.max if self._config.mode == "fixed" else int(self._value)

    def finished(self, size: int, started_s: float, *, someone_waits: bool) -> None:
        """Take note of a batch that was answered.

        Args:
            size: requests in it.
            started_s: reading of the clock when it began.
            someone_waits: whether a larger limit would be made use of.
        """
        now_s = self._clock()
        if now_s - self._began_s >= _FORGET_S:
            self._value, self._began_s = float(self._config.min), now_s
            self._best_s.clear()
        if started_s < self._began_s:
            return
        spent_s = max(now_s - started_s, 1e-6)
        bucket = size.bit_length()
        best_s = self._best_s[bucket] = min(spent_s, self._best_s.get(bucket, spent_s))
        ratio = max(_TOLERANCE * best_s / spent_s, _STEEPEST)
        if ratio < 1 or someone_waits:
            # What a change does is seen once as many batches have ended as may run, so that each
            # of them moves the limit by its share only.
            value = self._value + _STEP * (ratio - 1)
            self._value = min(max(value, self._config.min), self._config.max)


class TenantLimits:
    """The requests per second of each tenant: a bucket for those that are configured, no other."""

    def __init__(self, tenants: Mapping[str, TenantSection], clock: Callable[[], float]) -> None:
        """Make the buckets, which are full."""
        self._tenants = tenants
        self._clock = clock
        self._left = {name: self._depth(name) for name in tenants}
        self._filled_s = dict.fromkeys(tenants, clock())

    def priority_of(self, tenant: str) -> int:
        """Return what is added to the priority of a tenant's requests."""
        name = self._known(tenant)
        return self._tenants[name].priority if name else 0

    def take(self, tenant: str) -> None:
        """Count a request.

        Raises:
            Overloaded: if its tenant has had as many as it may; it does not count then.
        """
        name = self._known(tenant)
        if not name:
            return
        now_s, qps = self._clock(), self._tenants[name].qps
        grown = self._left[name] + (now_s - self._filled_s[name]) * qps
        self._left[name], self._filled_s[name] = min(grown, self._depth(name)), now_s
        if self._left[name] < 1:
            raise Overloaded(
                f"tenant {name!r} has used up its {qps:g} requests per second",
                max((1 - self._left[name]) / qps, _SHORTEST_DELAY_S),
            )
        self._left[name] -= 1

    def give_back(self, tenant: str) -> None:
        """Count a request that was refused for another reason no more."""
        name = self._known(tenant)
        if name:
            self._left[name] += 1

    def label(self, tenant: str) -> str:
        """Return the name of a tenant in metrics, of which there are few."""
        return self._known(tenant) or "other"

    def _known(self, tenant: str) -> str:
        if tenant in self._tenants:
            return tenant
        return DEFAULT_TENANT if DEFAULT_TENANT in self._tenants else ""

    def _depth(self, name: str) -> float:
        return max(self._tenants[name].qps, 1.0)


class Admission(Generic[T]):
    """Which of the requests of a router wait, run and are refused."""

    def __init__(
        self,
        config: AdmissionSection,
        *,
        max_batch: int,
        target_delay_s: float,
        clock: Callable[[], float],
    ) -> None:
        """Let nobody wait yet.

        Args:
            config: limits.
            max_batch: requests of one batch.
            target_delay_s: how long one may wait until the newest goes first.
            clock: seconds.
        """
        self.line: WaitingLine[T] = WaitingLine(config.queue, target_delay_s, clock)
        self.tenants = TenantLimits(config.tenants, clock)
        self.dropped = Dropped()
        self._hot = config.hot
        self._max_batch = max_batch
        self._clock = clock
        self._limit = ConcurrencyLimit(config.concurrency, clock)
        self._running = 0
        self._batch_s = 0.0
        """Typical time of a batch; 0 before the first one."""
        self._largest = max_batch
        self._times = BatchTimes()
        self._load, self._load_at_s = 0.0, clock()

    @property
    def limit(self) -> int:
        """Return the batches that may run at a time now."""
        return self._limit.value

    @property
    def running(self) -> int:
        """Return the batches that run, but for those that may have to wait for updates."""
        return self._running

    @property
    def largest(self) -> int:
        """Return the most requests that a batch may have now.

        Half of what was too many to be answered in time, and one more with each batch of as many
        that was: a shard may take as long for a batch as for its requests one after the other.
        """
        return self._largest

    def fits(self, size: int, left_s: float) -> bool:
        """Return whether a batch of that size is likely to end within a time; one always fits."""
        return size <= min(self._times.fitting(left_s, self._clock()), self._largest)

    @property
    def load(self) -> float:
        """Return the share of the batches that may run which do, over about 0.1 s."""
        busy = min(self._running / self.limit, 1.0)
        weight = -math.expm1((self._load_at_s - self._clock()) / _LOAD_S)
        return self._load + weight * (busy - self._load)

    def is_hot(self) -> bool:
        """Return True while a router has better things to do than to ask a shard twice."""
        return self.load > self._hot

    def admit(self, group: Sequence[T]) -> list[tuple[T, Exception]]:
        """Let requests that came together wait, and return who has to leave, and why.

        Those of the group are among them that cannot be answered in time; the others wait together
        or not at all.

        Raises:
            Overloaded: if there is no room for them; nobody waits and nobody leaves then.
        """
        leaving: list[tuple[T, Exception]] = []
        entering: list[T] = []
        for one in group:
            ahead = self.line.num_ahead_of(one.priority) + len(entering)
            error = self._hopeless(one, self._wait_s(ahead))
            if error is None:
                entering.append(one)
            else:
                leaving.append((one, error))
        if not entering:
            return leaving
        displaced = self.line.enter(entering)
        if displaced is None:
            for one in entering:
                self.refuse("queue", one)
            raise Overloaded(
                f"{len(self.line)} of at most {self.line.capacity} requests are waiting",
                self.retry_after_s(),
            )
        for one in displaced:
            self.refuse("displaced", one)
            message = f"{self.line.capacity} requests that go first are waiting"
            leaving.append((one, Overloaded(message, self.retry_after_s())))
        return leaving

    def refuse(self, cause: str, ticket: T) -> None:
        """Count a request that is refused."""
        self.dropped.refused[cause] += 1
        self.dropped.shed[cause, self.tenants.label(ticket.tenant)] += 1
        self.dropped.shed_by_priority[_level(ticket.priority)] += 1

    def sweep(self) -> list[tuple[T, Exception]]:
        """Take out of the line who can no longer be answered in time, and say why."""
        gone = []
        for one in self.line.in_order():
            error = self._hopeless(one, 0.0)
            if error is not None:
                self.line.remove(one)
                gone.append((one, error))
        return gone

    def retry_after_s(self) -> float:
        """Return the time until all that wait now have been served, as far as one can tell."""
        return min(max(self._wait_s(len(self.line)), _SHORTEST_DELAY_S), _LONGEST_DELAY_S)

    def started(self, size: int) -> float:
        """Take note that a batch of ``size`` begins to run; return the reading of the clock."""
        self._turn(1)
        now_s = self._clock()
        self._times.started(size, now_s)
        return now_s

    def ended(self, size: int, started_s: float, *, answered: bool, late: bool = False) -> None:
        """Take note that a batch no longer runs.

        Args:
            size: requests in it.
            started_s: what ``started`` returned.
            answered: whether it came to its end by itself and without an error.
            late: whether none of its requests was answered in time.
        """
        self._turn(-1)
        self._times.ended(size, self._clock(), answered=answered)
        if late:
            # Of a small one, its size was not the reason.
            if 2 * size > self._largest:
                self._largest = max(size // 2, 1)
        elif answered and size >= self._largest:
            self._largest = min(self._largest + 1, self._max_batch)
        if not answered:
            return
        spent_s = self._clock() - started_s
        self._batch_s += (_SMOOTHING if self._batch_s else 1.0) * (spent_s - self._batch_s)
        self._limit.finished(size, started_s, someone_waits=len(self.line) > 0)

    def _turn(self, change: int) -> None:
        self._load, self._load_at_s = self.load, self._clock()
        self._running += change

    def _wait_s(self, ahead: int) -> float:
        """Return about how long a request waits that so many go before."""
        if self._running < self.limit:
            return 0.0
        return self._batch_s * math.ceil((ahead + 1) / self._max_batch) / self.limit

    def _hopeless(self, ticket: T, wait_s: float) -> Exception | None:
        """Return why a request cannot be answered in time; None if it may be.

        While nothing runs, one is only refused once its time is over: what a batch takes is
        measured in no other way.
        """
        left_s = ticket.deadline_s - self._clock()
        if left_s <= 0:
            self.dropped.expired["queue"] += 1
            return DeadlineExceeded("the time of the request ran out in the queue")
        needs_s = wait_s + _MARGIN * self._batch_s
        if not self._running or needs_s <= left_s:
            return None
        self.refuse("deadline", ticket)
        return Overloaded(
            f"the request has {left_s:.3f} s left, waiting and running may take {needs_s:.3f} s",
            self.retry_after_s(),
        )

"""Which replica of a shard to ask: what its answers tell of it, and when it is set aside.

Free of I/O: the clock and the random numbers are given.

Sources: Mitzenmacher, The Power of Two Choices in Randomized Load Balancing, IEEE TPDS 2001; the
ejection of outliers with a cap and a panic threshold follows the Envoy proxy.
"""

import math
import random
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from enum import IntEnum, StrEnum
from weakref import WeakKeyDictionary

from silvershard.cluster.config import HealthSection
from silvershard.cluster.extra_calls import ExtraCalls
from silvershard.cluster.shard_link import LinkState, ShardLink

ANY_SHARD = -1
"""Stands for the shard of calls that every shard answers alike."""

_WINDOW = 256
_ENOUGH = 20
_SHORTEST_DELAY_S = 0.002

# Before anything is known of a shard, whose first answers are slow: the time between two pings.
_UNKNOWN_DELAY_S = 0.1

_SMOOTHING = 0.2
_HALF_LIFE_S = 2.0
"""Of what is remembered against a replica that is asked no more because of it."""
_HIGHEST_RATIO = 100.0
# What an event loop adds to a call, and so what says nothing of the replica.
_NOISE_S = 0.0005
_NEAR = 1.25
"""Loads that differ by less are the same."""

_OUTLIER = 5.0
_FIRST_BACKOFF_S = 0.1
_LONGEST_BACKOFF_S = 10.0

# Of the time after which calls are hedged. Of one call in twenty it takes that long by definition,
# and so of three in a row it says something.
_SILENT = 3.0
_SOON_S = 1e-6
_UNANSWERED = 3


def kind_of(op: str, *amounts: int) -> str:
    """Return the name of calls that take about as long: of one operation, on similar amounts.

    An amount of one kind is up to four times as large as another one, so that large calls have
    latencies of their own and do not look like hung ones among small calls.
    """
    return "/".join([op, *(str((amount.bit_length() + 1) // 2) for amount in amounts)])


class Latencies:
    """The newest latencies of one kind of call to one shard."""

    def __init__(self, quantile: float) -> None:
        """Make an empty window.

        Args:
            quantile: of the latencies, after which a call is hedged.
        """
        self._quantile = quantile
        self._newest: deque[float] = deque()
        self._sorted: list[float] = []

    def add(self, latency_s: float) -> None:
        """Count a call that took that long, or that was given up after it."""
        self._newest.append(latency_s)
        insort(self._sorted, latency_s)
        if len(self._newest) > _WINDOW:
            del self._sorted[bisect_left(self._sorted, self._newest.popleft())]

    @property
    def typical_s(self) -> float | None:
        """Return the median; None while there are too few."""
        known = len(self._sorted)
        return self._sorted[known // 2] if known >= _ENOUGH else None

    @property
    def delay_s(self) -> float:
        """Return the time after which a call is hedged."""
        known = len(self._sorted)
        if known < _ENOUGH:
            return _UNKNOWN_DELAY_S
        return max(self._sorted[math.ceil(self._quantile * known) - 1], _SHORTEST_DELAY_S)


class Cause(StrEnum):
    """Why a replica was set aside."""

    FAILURE = "failure"
    """It could not serve, or its connection broke."""
    SILENCE = "silence"
    """It left calls unanswered."""
    SLOWNESS = "slowness"
    """It takes many times as long as its peers."""


class Standing(IntEnum):
    """How willingly a replica is asked."""

    WELL = 0
    AVOIDED = 1
    """Pings are missing, or it is set aside."""
    HUNG = 2
    """So many pings are missing that it is asked only if there is no other."""


@dataclass(eq=False)
class _Replica:
    """What is known of a replica."""

    slowness: float = 1.0
    """Its latency / the typical latency of its shard, smoothed."""
    learned_s: float = 0.0
    """When that was so."""
    num_answers: int = 0
    in_flight: int = 0
    answered_s: float = -math.inf
    unanswered: int = 0
    """Calls in a row that nobody waits for any more."""
    backoff_s: float = 0.0
    """Time that it was set aside for last; 0 once it is well again."""
    aside_s: float = -math.inf
    aside_until_s: float = -math.inf

    def slowness_at(self, now_s: float) -> float:
        """Return the slowness, which is forgotten with time."""
        age = (now_s - self.learned_s) / _HALF_LIFE_S
        return float(1.0 + (self.slowness - 1.0) * 0.5**age)


@dataclass(eq=False)
class Call:
    """A call on its way, for what its end will tell."""

    link: ShardLink
    known: _Replica
    """What is known of it."""
    latencies: Latencies
    started_s: float


class ReplicaChoice:
    """Chooses among the replicas of the shards of one generation, and learns from their answers."""

    def __init__(
        self,
        health: HealthSection,
        extra: ExtraCalls,
        clock: Callable[[], float],
        rng: random.Random,
    ) -> None:
        """Make a choice that knows nothing yet.

        Args:
            health: how many replicas may be ejected.
            extra: budgets of hedges and retries.
            clock: returns seconds.
            rng: picks the two replicas of which the better one is asked.
        """
        self.extra = extra
        self.set_aside = extra.counts.set_aside
        """How often a replica was set aside."""
        self._health = health
        self._clock = clock
        self._rng = rng
        self._known: WeakKeyDictionary[ShardLink, _Replica] = WeakKeyDictionary()
        self._quantile = int(extra.hedging.after.removeprefix("p")) / 100
        self._latencies: dict[tuple[int, str], Latencies] = {}

    def latencies(self, shard: int, kind: str) -> Latencies:
        """Return the latencies of one kind of call to a shard."""
        key = shard, kind
        if key not in self._latencies:
            self._latencies[key] = Latencies(self._quantile)
        return self._latencies[key]

    def standing(self, link: ShardLink, *, proven: bool = False) -> Standing | None:
        """Return how willingly a replica is asked; None if it cannot be.

        Args:
            link: the replica.
            proven: whether one that may be well again counts as well only after it has answered.
        """
        state = link.state
        if state is LinkState.DOWN:
            return None
        if state is LinkState.EJECTED:
            return Standing.HUNG
        if state is LinkState.SUSPECT:
            return Standing.AVOIDED
        known = self._of(link)
        if not known.backoff_s:
            return Standing.WELL
        # One call at a time may show that it is well again.
        is_due = not (proven or known.in_flight) and self._clock() >= known.aside_until_s
        return Standing.WELL if is_due else Standing.AVOIDED

    def pick(
        self,
        replicas: Sequence[ShardLink],
        left: Collection[ShardLink],
        *,
        first: ShardLink | None = None,
        is_fresh: Callable[[ShardLink], bool] = lambda _: True,
        outrun: Collection[ShardLink] = (),
        proven: bool = False,
    ) -> ShardLink | None:
        """Return the replica to ask; None if none of those that are left can be.

        The better standing decides, then ``first``, then freshness, and among equals the less
        loaded of two. Of bad replicas the worst are not asked at all, as many as the cap allows.

        Args:
            replicas: all replicas of the shard.
            left: those of them that may be asked.
            first: preferred to others of the same standing.
            is_fresh: returns False for those that others are preferred to.
            outrun: those that were too slow for the same request before.
            proven: as for ``standing``.
        """
        ejected: Collection[ShardLink] = ()
        most = self._num_ejectable(replicas)
        if not most and len(left) == 1:
            # Nobody else is to be compared with it.
            (link,) = left
            return None if self.standing(link, proven=proven) is None else link
        if most:
            self._set_outliers_aside(replicas, most)
            bad = [link for link in replicas if self._is_bad(link)]
            ejected = sorted(bad, key=self._badness, reverse=True)[:most]
        standings: dict[ShardLink, Standing] = {}
        for link in left:
            standing = self.standing(link, proven=proven)
            if standing is not None and link not in ejected:
                slower = Standing.AVOIDED if link in outrun else Standing.WELL
                standings[link] = max(standing, slower)
        if not standings:
            return None
        best = min(standings.values())
        group = [link for link, standing in standings.items() if standing is best]
        if first is not None and first in group:
            return first
        group = [link for link in group if is_fresh(link)] or group
        if best is not Standing.WELL:
            return min(group, key=self._badness)
        for link in group:
            if self._of(link).backoff_s:
                return link
        if len(group) == 1:
            return group[0]
        one = group.pop(int(self._rng.random() * len(group)))
        other = group[int(self._rng.random() * len(group))]
        return other if self._load(other) * _NEAR < self._load(one) else one

    def begin(self, link: ShardLink, latencies: Latencies) -> Call:
        """Count a call; exactly one of the methods below ends it."""
        known = self._of(link)
        known.in_flight += 1
        return Call(link, known, latencies, self._clock())

    def answered(self, call: Call) -> None:
        """Learn from an answer."""
        now_s = self._clock()
        known = self._end(call)
        ratio = self._ratio(call, now_s - call.started_s)
        self._learn(known, ratio, now_s)
        known.num_answers += 1
        known.answered_s, known.unanswered = now_s, 0
        if not known.backoff_s or call.started_s < known.aside_s:
            return
        if ratio < _OUTLIER:
            known.backoff_s, known.aside_until_s = 0.0, -math.inf
            known.slowness = ratio
        else:
            self._set_aside(known, Cause.SLOWNESS, call.started_s)

    def refused(self, call: Call) -> None:
        """Learn that a replica answered in time that it cannot do what others may."""
        known = self._end(call)
        known.answered_s, known.unanswered = self._clock(), 0

    def failed(self, call: Call) -> None:
        """Learn that a replica could not serve."""
        self._set_aside(self._end(call), Cause.FAILURE, call.started_s)

    def gave_up(self, call: Call) -> None:
        """Learn that an answer did not come while it was of use."""
        now_s = self._clock()
        is_silent = self.is_silent(call)
        is_slow = now_s - call.started_s >= call.latencies.delay_s
        known = self._end(call)
        if not is_slow:
            # Others take as long: it may have been about to answer.
            return
        self._learn(known, self._ratio(call, now_s - call.started_s), now_s)
        known.unanswered += 1
        if is_silent or known.backoff_s or known.unanswered >= _UNANSWERED:
            self._set_aside(known, Cause.SILENCE, call.started_s)

    def abandoned(self, call: Call) -> None:
        """Learn nothing: whoever asked has left."""
        self._end(call)

    def is_silent(self, call: Call) -> bool:
        """Return whether the replica has answered nothing for long while this call waits."""
        since_s = max(call.started_s, call.known.answered_s)
        return self._clock() - since_s >= _SILENT * call.latencies.delay_s - _SOON_S

    def _of(self, link: ShardLink) -> _Replica:
        known = self._known.get(link)
        if known is None:
            known = self._known[link] = _Replica(learned_s=self._clock())
        return known

    def _end(self, call: Call) -> _Replica:
        call.known.in_flight -= 1
        return call.known

    def _ratio(self, call: Call, latency_s: float) -> float:
        """Return a latency / what is typical, and count it."""
        typical_s = call.latencies.typical_s
        call.latencies.add(latency_s)
        if typical_s is None:
            return 1.0
        return min(max(latency_s, _NOISE_S) / max(typical_s, _NOISE_S), _HIGHEST_RATIO)

    def _learn(self, known: _Replica, ratio: float, now_s: float) -> None:
        before = known.slowness_at(now_s)
        known.slowness, known.learned_s = before + _SMOOTHING * (ratio - before), now_s

    def _load(self, link: ShardLink) -> float:
        known = self._of(link)
        return known.slowness_at(self._clock()) * (known.in_flight + 1)

    def _badness(self, link: ShardLink) -> tuple[int, float, float]:
        standing = self.standing(link)
        rank = Standing.HUNG if standing is None else standing
        return rank, self._of(link).backoff_s, self._load(link)

    def _num_ejectable(self, replicas: Collection[ShardLink]) -> int:
        """Return how many may be ejected; those that cannot be asked anyway count among them."""
        # A share such as 0.34 of 50 must not be 16.999.
        most = math.floor(self._health.max_ejected * len(replicas) + 1e-9)
        return most and max(most - sum(link.state is LinkState.DOWN for link in replicas), 0)

    def _is_bad(self, link: ShardLink) -> bool:
        if link.state is LinkState.EJECTED:
            return True
        return link.state is not LinkState.DOWN and self._clock() < self._of(link).aside_until_s

    def _set_outliers_aside(self, replicas: Collection[ShardLink], most: int) -> None:
        """Set replicas aside that are much slower than their peers, until ``most`` are bad."""
        now_s = self._clock()
        most -= sum(self._is_bad(link) for link in replicas)
        slowness = {
            link: self._of(link).slowness_at(now_s)
            for link in replicas
            if self.standing(link) is Standing.WELL and not self._of(link).backoff_s
        }
        for link in sorted(slowness, key=lambda one: slowness[one], reverse=True)[: max(most, 0)]:
            peers = sorted(value for one, value in slowness.items() if one is not link)
            known = self._of(link)
            if not peers or known.num_answers < _ENOUGH:
                continue
            if slowness[link] >= _OUTLIER * peers[len(peers) // 2]:
                self._set_aside(known, Cause.SLOWNESS, now_s)

    def _set_aside(self, known: _Replica, cause: Cause, started_s: float) -> None:
        """Set a replica aside, for twice as long as before if it has not been well since.

        Args:
            known: the replica.
            cause: why.
            started_s: when the call began that tells it; one from before says nothing new.
        """
        if started_s < known.aside_s:
            return
        now_s = self._clock()
        known.backoff_s = min(max(2 * known.backoff_s, _FIRST_BACKOFF_S), _LONGEST_BACKOFF_S)
        known.aside_s, known.aside_until_s = now_s, now_s + known.backoff_s
        self.set_aside[cause] += 1

"""Whether shards have room for more items: upserts are refused before there is none.

What is accepted and not applied yet takes room as well, so that every accepted item finds a place.
"""

import threading
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple


class RoomReport(NamedTuple):
    """What a replica said of its room when it had applied its cut."""

    shard: int
    replica: int
    slots: int
    """Items that it has room for."""
    taken: int
    """Slots that items take, or will leave as soon as queries have ended."""
    cut: tuple[int, ...]
    """Per log partition, the last position that it had applied."""


class BlockedShard(NamedTuple):
    """A shard whose upserts are refused."""

    shard: int
    use: float
    """Share of its slots that are taken, accepted items included."""
    limit: float


@dataclass(slots=True)
class _Shard:
    reports: dict[int, RoomReport] = field(default_factory=dict)
    """By replica."""
    coming: dict[int, int] = field(default_factory=dict)
    """By replica: new items that it may not have counted yet."""
    accepted: dict[int, deque[tuple[int, int]]] = field(default_factory=dict)
    """Per log partition: positions, and how many new items were accepted up to each."""
    pending: dict[int, int] = field(default_factory=dict)
    """Per log partition: new items that are on their way into the log."""
    blocked: bool = False

    def use(self) -> float:
        """Return the share of the slots that are taken, in the replica that is fullest."""
        return max(
            (one.taken + self.coming[replica]) / one.slots if one.slots else 1.0
            for replica, one in self.reports.items()
        )


class FeedBlock:
    """Follows the room of every shard; any thread may call it.

    Slots that only a patch or the replacement of an item needs for a moment are what ``limit``
    keeps free.
    """

    def __init__(self, limit: float, hysteresis: float) -> None:
        """Start without any report: until the first one of a shard its upserts are refused.

        Args:
            limit: share of a shard's slots from which its upserts are refused, 0..1.
            hysteresis: how far the share must fall below that until they are accepted again.
        """
        self.limit = limit
        self.hysteresis = hysteresis
        self._lock = threading.Lock()
        self._shards: dict[int, _Shard] = {}
        self._resumed: dict[int, int] = {}
        """Per log partition, its end when this began to know of shards."""
        self._ends: dict[int, int] = {}
        """Per log partition, the last end that is known."""

    def resume(self, partition: int, end: int) -> None:
        """Count every record up to ``end`` as a new item until replicas report beyond it."""
        with self._lock:
            self._resumed[partition] = self._ends[partition] = end

    def forget(self) -> None:
        """Know nothing of any shard, as after a start: they hold other items from now on.

        What was accepted, or is on its way into the log, counts until replicas report beyond it.
        """
        with self._lock:
            for partition, end in self._ends.items():
                pending = sum(one.pending.get(partition, 0) for one in self._shards.values())
                self._resumed[partition] = end + pending
            self._shards.clear()

    def report(self, reports: Iterable[RoomReport]) -> None:
        """Take over what all replicas said last; those that are missing are gone.

        Of a shard that none speaks for, as after a swap or while it starts again, the last word
        stands: with what was accepted since its cut it never promises too much.
        """
        with self._lock:
            found: dict[int, dict[int, RoomReport]] = {}
            for one in reports:
                found.setdefault(one.shard, {})[one.replica] = one
            for number, said in found.items():
                self._shard(number).reports = said
            for shard in self._shards.values():
                shard.coming.clear()
            for shard in self._shards.values():
                for partition, accepted in shard.accepted.items():
                    done = min((one.cut[partition] for one in shard.reports.values()), default=0)
                    while accepted and accepted[0][0] <= done:
                        accepted.popleft()
                for replica, one in shard.reports.items():
                    shard.coming[replica] = self._coming(shard, one.cut)

    def unknown(self, num_shards: int) -> set[int]:
        """Return which of the first ``num_shards`` shards never said how much room they have."""
        with self._lock:
            known = {number for number, shard in self._shards.items() if shard.reports}
        return set(range(num_shards)) - known

    def reserve(self, shard: int, partition: int) -> str:
        """Keep room for one more item; return why there is none, or an empty text.

        Args:
            shard: that the item belongs to.
            partition: of the log that it is going to.
        """
        with self._lock:
            state = self._shard(shard)
            if refusal := self._refusal(shard, state):
                return refusal
            state.pending[partition] = state.pending.get(partition, 0) + 1
            for replica in state.coming:
                state.coming[replica] += 1
            return ""

    def refusal(self, shard: int) -> str:
        """Return why upserts of a shard are refused, or an empty text."""
        with self._lock:
            return self._refusal(shard, self._shard(shard))

    def settle(self, partition: int, position: int) -> None:
        """Give what was reserved in a log partition its place there.

        Args:
            partition: of the log.
            position: its end by now. Reservations whose records did not get there keep their room
                until it is applied.
        """
        with self._lock:
            self._ends[partition] = max(position, self._ends.get(partition, 0))
            for shard in self._shards.values():
                if count := shard.pending.pop(partition, 0):
                    shard.accepted.setdefault(partition, deque()).append((position, count))

    def blocked(self) -> list[BlockedShard]:
        """Return the shards whose upserts are refused, by number."""
        with self._lock:
            return [
                BlockedShard(number, shard.use() if shard.reports else 1.0, self.limit)
                for number, shard in sorted(self._shards.items())
                if self._refusal(number, shard)
            ]

    def _shard(self, shard: int) -> _Shard:
        return self._shards.setdefault(shard, _Shard())

    def _coming(self, shard: _Shard, cut: tuple[int, ...]) -> int:
        """Return the most new items that a replica may not have counted at a cut."""
        before = sum(max(end - cut[one], 0) for one, end in self._resumed.items())
        since = sum(
            count
            for partition, accepted in shard.accepted.items()
            for position, count in accepted
            if position > cut[partition]
        )
        return before + since + sum(shard.pending.values())

    def _refusal(self, number: int, shard: _Shard) -> str:
        if not shard.reports:
            return f"shard {number} has not said yet how much room it has"
        use = shard.use()
        shard.blocked = use >= (self.limit - self.hysteresis if shard.blocked else self.limit)
        if not shard.blocked:
            return ""
        return (
            f"shard {number} holds {use:.1%} of the items that it has room for; upserts are "
            f"refused from {self.limit:.1%} until it is below "
            f"{self.limit - self.hysteresis:.1%}: delete items, or set more updates.headroom"
        )

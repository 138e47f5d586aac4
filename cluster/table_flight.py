"""The calls of one lookup: made on one thread, ended on another.

Shapes: n sorted positions, S shards.
"""

import threading
from dataclasses import dataclass

from silvershard.cluster import table_pb2
from silvershard.cluster.table_link import Outcome, TableLink
from silvershard.shard.table_rows import Ints


def cut(positions: Ints, bounds: Ints, most: int) -> list[tuple[int, slice]]:
    """Return which of sorted positions ``(n,)`` go to which shard in one call.

    Args:
        positions: int64, ascending.
        bounds: ``(S + 1,)`` first position of every shard and the end of the last one.
        most: positions in one call.
    """
    ends = positions.searchsorted(bounds).tolist()
    return [
        (shard, slice(start, min(start + most, ends[shard + 1])))
        for shard in range(len(bounds) - 1)
        for start in range(ends[shard], ends[shard + 1], most)
    ]


@dataclass(eq=False)
class Part:
    """What one call asks of one shard."""

    shard: int
    rows: slice
    """Which of the rows that are asked for they are."""
    call: table_pb2.TableCall
    outcome: Outcome | None = None
    """None: no answer came so far."""
    link: TableLink | None = None
    """That was asked."""
    call_id: int = 0


class Flight:
    """Calls whose ends one thread waits for."""

    def __init__(self, parts: list[Part], expires_at_s: float) -> None:
        """Make a flight of calls that are still to be sent."""
        self.parts = parts
        self.expires_at_s = expires_at_s
        self._left = len(parts)
        # A bare lock wakes its waiter sooner than an event does.
        self._landed = threading.Lock()
        self._landed.acquire()

    def end(self, part: Part, outcome: Outcome) -> None:
        """Note how a call ended; the last one wakes the thread that waits."""
        part.outcome = outcome
        self._left -= 1
        if not self._left:
            self._landed.release()

    def wait(self, timeout_s: float) -> bool:
        """Wait until every call has ended; return False if that takes longer."""
        if not self.parts:
            return True
        landed = self._landed.acquire(timeout=min(max(0.0, timeout_s), threading.TIMEOUT_MAX))
        if landed:
            self._landed.release()
        return landed

    def forget(self) -> None:
        """Drop what nobody waits for any more; runs where the calls were sent."""
        for part in self.parts:
            if part.outcome is None and part.link is not None:
                part.link.forget(part.call_id)

"""The gaps between queries, in which a shard does the work that can wait."""

import threading
import time
from collections.abc import Callable

_LINGER_S = 0.002
"""A query comes back with its next round so soon."""
_LONGEST_WAIT_S = 0.02
_SHORTEST_SLEEP_S = 2e-4


class QueryGaps:
    """Counts the calls of queries that are in a process, and waits for moments without any.

    Python runs one thread at a time: a query that meets a batch of updates waits for it dozens of
    times, at every operation. Batches that step aside between their parts meet few queries. The
    wait is bounded, so that they get on beside queries that leave no gap.
    """

    def __init__(
        self,
        *,
        longest_s: float = _LONGEST_WAIT_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Make a count of none.

        Args:
            longest_s: bound of one wait.
            clock: measures it.
        """
        self._longest_s = longest_s
        self._clock = clock
        self._calls = 0
        self._idle = threading.Event()
        self._idle.set()
        self._idle_since_s = float("-inf")

    def begin(self) -> None:
        """Count a call that has come; ``begin`` and ``end`` are for one thread."""
        self._calls += 1
        self._idle.clear()

    def end(self) -> None:
        """Count it no more."""
        self._calls -= 1
        if not self._calls:
            self._idle_since_s = self._clock()
            self._idle.set()

    def wait(self) -> float:
        """Wait for a gap, on any thread; return the seconds that it took."""
        began_s = now_s = self._clock()
        until_s = began_s + self._longest_s
        while now_s < until_s and self._idle.wait(until_s - now_s):
            left_s = self._idle_since_s + _LINGER_S - self._clock()
            if left_s <= 0 and self._idle.is_set():
                break
            time.sleep(max(left_s, _SHORTEST_SLEEP_S))
            now_s = self._clock()
        return self._clock() - began_s

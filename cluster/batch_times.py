"""How much of the shards' time batches take by how many requests they hold, learned as they end."""

import math

_MEMORY = 0.9
"""What the last batch counts for when the next one ends."""
_ALIKE = 0.25
"""Variance of sizes below which they do not tell what one more request takes."""
_SHARE = 0.5
"""Of the time that is left: rounds give up stragglers after half of what they have."""


class BatchTimes:
    """A line through times over sizes: what a batch takes by itself, and each of its requests.

    Shards may take as long for a batch as for its requests one after the other, or hardly longer
    than for one of them. Which of both it is shows in small batches already, so that no large one
    has to be late first. What a batch takes is the time between the end of the one before it and
    its own, however many run side by side. Free of I/O.
    """

    def __init__(self) -> None:
        self._running = 0
        self._requests = 0
        """Of the batches that run."""
        self._turned_s = -math.inf
        """When the last one ended, or the first of those that run began."""
        self._weight = 0.0
        self._size = 0.0
        """Weighted mean, as all of these."""
        self._spent_s = 0.0
        self._variance = 0.0
        self._covariance = 0.0
        self._each_s: float | None = None
        """Of the last batches that were not all alike."""

    def started(self, size: int, now_s: float) -> None:
        """Take note that a batch of ``size`` requests begins."""
        if not self._running:
            self._turned_s = now_s
        self._running += 1
        self._requests += size

    def ended(self, size: int, now_s: float, *, answered: bool) -> None:
        """Take note that one has ended; ``answered``: it took the time that such a batch takes."""
        self._running -= 1
        self._requests -= size
        spent_s, self._turned_s = now_s - self._turned_s, now_s
        if not answered:
            return
        self._weight = self._weight * _MEMORY + 1.0
        share = 1.0 / self._weight
        more, longer_s = size - self._size, spent_s - self._spent_s
        self._size += share * more
        self._spent_s += share * longer_s
        self._variance = (1.0 - share) * (self._variance + share * more * more)
        self._covariance = (1.0 - share) * (self._covariance + share * more * longer_s)
        if self._variance >= _ALIKE:
            self._each_s = max(self._covariance / self._variance, 0.0)

    @property
    def each_s(self) -> float:
        """Return what one more request takes; its share of a batch while all were alike."""
        if self._each_s is None:
            return self._spent_s / max(self._size, 1.0)
        return self._each_s

    def fitting(self, left_s: float, now_s: float) -> float:
        """Return how many requests a batch may hold that has so much time, at least 1.

        Those that run come first. As many as take no longer than a batch takes by itself always
        fit: with fewer, most of the shards' time would be spent on batches and not on requests.
        """
        each_s = self.each_s
        if not each_s:
            return math.inf
        own_s = max(self._spent_s - each_s * self._size, 0.0)
        ahead_s = self._running * own_s + self._requests * each_s - (now_s - self._turned_s)
        left_s = _SHARE * left_s - (max(ahead_s, 0.0) if self._running else 0.0) - own_s
        return max(left_s / each_s, own_s / each_s, 1.0)

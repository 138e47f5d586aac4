"""When to start something again that keeps ending, and when to stop trying."""


class CrashLoop:
    """Counts quick deaths in a row."""

    def __init__(self, limit: int, window_s: float) -> None:
        self._limit = limit
        self._window_s = window_s
        self.quick_deaths = 0

    def died(self, lived_s: float) -> bool:
        """Take note of a death; return whether to give up.

        Args:
            lived_s: time from the start to the death.
        """
        self.quick_deaths = self.quick_deaths + 1 if lived_s < self._window_s else 1
        return self.quick_deaths >= self._limit

    @property
    def backoff_s(self) -> float:
        """Return how long to wait before the next start: 0.1 s, doubling to at most 5 s."""
        return min(0.1 * 2.0 ** max(self.quick_deaths - 1, 0), 5.0)

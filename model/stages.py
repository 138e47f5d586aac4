"""The stages of a query in one process: how long each took, whether the next is worth it."""

import time
from collections.abc import Callable

from silvershard.model.types import StageTimes

Proceed = Callable[[str], object]
"""Is called with the name of the next stage, and raises if it is not worth running."""


def always(stage: str) -> None:
    """Return, whatever the stage: nothing keeps it from running."""


class Stopwatch:
    """Microseconds between successive marks."""

    def __init__(self) -> None:
        self._last = time.perf_counter_ns()
        self.times: StageTimes = {}

    def mark(self, stage: str) -> None:
        """Add the time since the last mark to a stage."""
        now = time.perf_counter_ns()
        self.times[stage] = self.times.get(stage, 0) + (now - self._last) // 1000
        self._last = now

"""The search of the highest rate that a cluster serves well."""

from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass
class Trial:
    """A rate that was tried."""

    rate: float
    held: bool
    """Whether it was served well."""


@dataclass
class PeakSearch:
    """Doubles the rate until it is not served well, then halves the span in between.

    A rate that held is taken to be one below which every other holds, too.
    """

    first: float
    """The rate to begin with, above 0."""
    precision: float = 0.05
    """The search ends when the peak is known to this share of it."""
    most: float = 1e6
    """No higher rate is tried."""
    least: float = 0.1
    """No lower rate is tried."""
    trials: list[Trial] = field(default_factory=list)

    @property
    def peak(self) -> float | None:
        """Return the highest rate that held below every one that did not; None if none did."""
        return max((one.rate for one in self._held), default=None)

    @property
    def _limit(self) -> float | None:
        return min((one.rate for one in self.trials if not one.held), default=None)

    @property
    def _held(self) -> list[Trial]:
        limit = self._limit
        return [one for one in self.trials if one.held and (limit is None or one.rate < limit)]

    def next_rate(self) -> float | None:
        """Return the rate to try next; None once the peak is known."""
        peak, limit = self.peak, self._limit
        if not self.trials:
            return min(max(self.first, self.least), self.most)
        if limit is None:
            assert peak is not None
            return min(2 * peak, self.most) if peak < self.most else None
        if peak is None:
            return limit / 2 if limit / 2 >= self.least else None
        return (peak + limit) / 2 if limit > peak * (1 + self.precision) else None

    def run(self, holds: Callable[[float], bool]) -> float | None:
        """Return the peak, given what tries a rate and tells whether it held."""
        while (rate := self.next_rate()) is not None:
            self.trials.append(Trial(rate, holds(rate)))
        return self.peak

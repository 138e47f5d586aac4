"""A histogram of times whose percentiles have a bounded relative error.

Source: C. Masson, J. E. Rim and H. K. Lee, "DDSketch: a fast and fully-mergeable quantile sketch
with relative-error guarantees", VLDB 2019, section 2.
"""

import math
from dataclasses import dataclass, field

RELATIVE_ERROR = 0.005
"""Of any percentile of times that are at least a microsecond."""

_UNIT_S = 1e-6
_GROWTH = (1 + RELATIVE_ERROR) / (1 - RELATIVE_ERROR)
_LOG_GROWTH = math.log(_GROWTH)

# The share of an exact rank, such as 0.07 of 100, may come out above it by an ulp.
_ROUNDING = 1e-9


@dataclass
class Histogram:
    """Counts of times in buckets whose bounds grow by one percent; least and largest are exact.

    Histograms of several processes are merged without any further error.
    """

    counts: dict[int, int] = field(default_factory=dict)
    """By bucket; bucket 0 holds what is at most a microsecond."""
    count: int = 0
    total_s: float = 0.0
    least_s: float = math.inf
    largest_s: float = 0.0

    def add(self, seconds: float) -> None:
        """Count a time; one below zero counts as zero.

        Raises:
            ValueError: if it is not finite.
        """
        if not math.isfinite(seconds):
            raise ValueError(f"a time must be a finite number of seconds, got {seconds}")
        seconds = max(seconds, 0.0)
        bucket = math.ceil(math.log(seconds / _UNIT_S) / _LOG_GROWTH) if seconds > _UNIT_S else 0
        self.counts[bucket] = self.counts.get(bucket, 0) + 1
        self.count += 1
        self.total_s += seconds
        self.least_s = min(self.least_s, seconds)
        self.largest_s = max(self.largest_s, seconds)

    def merge(self, other: "Histogram") -> None:
        """Count everything that another histogram has counted."""
        for bucket, times in other.counts.items():
            self.counts[bucket] = self.counts.get(bucket, 0) + times
        self.count += other.count
        self.total_s += other.total_s
        self.least_s = min(self.least_s, other.least_s)
        self.largest_s = max(self.largest_s, other.largest_s)

    def quantile(self, share: float) -> float | None:
        """Return the smallest time that ``share`` of all times do not exceed; None without any.

        Args:
            share: 0..1; 0 gives the least time and 1 the largest, both exactly.

        Raises:
            ValueError: if the share is out of range.
        """
        if not 0 <= share <= 1:
            raise ValueError(f"share must be in 0..1, got {share}")
        if not self.count:
            return None
        rank = max(math.ceil(share * self.count - _ROUNDING), 1)
        if rank == self.count:
            return self.largest_s
        if share == 0:
            return self.least_s
        seen = 0
        for bucket in sorted(self.counts):
            seen += self.counts[bucket]
            if seen >= rank:
                break
        middle_s = 2 * _UNIT_S * _GROWTH**bucket / (_GROWTH + 1) if bucket else _UNIT_S
        return min(max(middle_s, self.least_s), self.largest_s)

    @property
    def mean_s(self) -> float | None:
        """Return the exact mean; None without any time."""
        return self.total_s / self.count if self.count else None

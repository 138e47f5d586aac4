"""What a load found: counts and percentiles, in total, per second and per stretch of its rate."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from silvershard.cluster.arrivals import Stretch
from silvershard.cluster.histogram import Histogram
from silvershard.cluster.load import IN_FLIGHT_LIMIT, SENT_TOO_LATE, Entry
from silvershard.cluster.load_outcome import FAILED, Judged, Outcome

PERCENTILES = {"p50_ms": 0.5, "p90_ms": 0.9, "p99_ms": 0.99, "p999_ms": 0.999, "max_ms": 1.0}

BUSY_SHARE = 0.8
"""Of a core that a process of the generator may take before it is doubted."""
LATE_SHARE = 0.2
"""Of a percentile of the latencies that may come from sending late before it is doubted."""
_LATE_S = 0.002
"""Sending late by no more is nobody's trouble."""


@dataclass
class Tally:
    """The requests that were due in some span of time.

    Latencies are those of answers, from when the request was due; what failed has none and counts
    by its code.
    """

    latency: Histogram = field(default_factory=Histogram)
    lag: Histogram = field(default_factory=Histogram)
    """From when a request was due to when it was sent."""
    outcomes: Counter[str] = field(default_factory=Counter)
    codes: Counter[str] = field(default_factory=Counter)
    """Of what failed."""
    reasons: Counter[str] = field(default_factory=Counter)
    generations: Counter[int] = field(default_factory=Counter)
    coverage_total: float = 0.0
    """Over all answers."""
    least_coverage: float = 1.0

    def add(self, entry: Entry, judged: Judged) -> None:
        """Count a request."""
        outcome, answer = judged.outcome, judged.answer
        self.outcomes[outcome.value] += 1
        self.reasons.update(judged.reasons)
        if outcome is not Outcome.UNSENT:
            self.lag.add(entry.sent_s - entry.at_s)
        if outcome in FAILED:
            self.codes[judged.code if answer is None else Outcome.LATE.value.upper()] += 1
        if answer is not None:
            self.latency.add(entry.done_s - entry.at_s)
            self.generations[answer.version.generation] += 1
            self.coverage_total += judged.coverage or 0.0
            self.least_coverage = min(self.least_coverage, judged.coverage or 0.0)

    def merge(self, other: "Tally") -> None:
        """Count everything that another process has counted."""
        self.latency.merge(other.latency)
        self.lag.merge(other.lag)
        self.outcomes += other.outcomes
        self.codes += other.codes
        self.reasons += other.reasons
        self.generations += other.generations
        self.coverage_total += other.coverage_total
        self.least_coverage = min(self.least_coverage, other.least_coverage)

    def count(self, *outcomes: Outcome) -> int:
        """Return how many requests had one of these outcomes; all of them where none is named."""
        return sum(self.outcomes[one.value] for one in outcomes or Outcome)

    @property
    def failed_share(self) -> float:
        """Return the share of requests without an answer in time; 0 without any request."""
        return self.count(*FAILED) / max(self.count(), 1)

    def quantile_ms(self, share: float) -> float | None:
        """Return a percentile of the latencies; None without any answer."""
        seconds = self.latency.quantile(share)
        return None if seconds is None else seconds * 1e3

    def as_json(self, seconds: float) -> dict[str, Any]:
        """Return the counts as JSON values.

        Args:
            seconds: over which the requests were due.
        """
        answered, good = self.latency.count, self.count(Outcome.OK, Outcome.DEGRADED)
        return {
            "requests": self.count(),
            "rate": round(self.count() / seconds, 3),
            "goodput": round(good / seconds, 3),
            **{one.value: self.count(one) for one in Outcome},
            "failed_share": round(self.failed_share, 6),
            **{name: _rounded(self.quantile_ms(share)) for name, share in PERCENTILES.items()},
            "coverage": _rounded(self.coverage_total / answered) if answered else None,
            "least_coverage": self.least_coverage if answered else None,
        }


@dataclass
class Generator:
    """How one process of the generator fared."""

    seconds: float
    """In which it sent."""
    cpu_s: float
    """That it took of the processors meanwhile."""
    cut_short: int
    """Requests in flight when it was stopped."""


@dataclass
class LoadReport:
    """Everything that a load found; reports of several processes are merged."""

    stretches: Sequence[Stretch]
    """Of the part that counts."""
    total: Tally = field(default_factory=Tally)
    seconds: dict[int, Tally] = field(default_factory=dict)
    """By the second in which requests were due, from when the load began to count."""
    parts: list[Tally] = field(default_factory=list)
    """By stretch."""
    generators: list[Generator] = field(default_factory=list)
    measured_s: float = 0.0
    """How long the part that counts went on; less than its stretches if it was stopped."""

    def __post_init__(self) -> None:
        self.parts = self.parts or [Tally() for _ in self.stretches]

    def add(self, entry: Entry, judged: Judged, zero_s: float) -> None:
        """Count a request, unless it was due before ``zero_s``, in the warm-up."""
        at_s = entry.at_s - zero_s
        if at_s < 0:
            return
        self.total.add(entry, judged)
        self.seconds.setdefault(int(at_s), Tally()).add(entry, judged)
        end_s = 0.0
        for part, stretch in zip(self.parts, self.stretches, strict=True):
            end_s += stretch.seconds
            if at_s < end_s or part is self.parts[-1]:
                part.add(entry, judged)
                return

    def merge(self, other: "LoadReport") -> None:
        """Add what another process of the same load found."""
        self.total.merge(other.total)
        for second, tally in other.seconds.items():
            self.seconds.setdefault(second, Tally()).merge(tally)
        for mine, theirs in zip(self.parts, other.parts, strict=True):
            mine.merge(theirs)
        self.generators += other.generators
        self.measured_s = max(self.measured_s, other.measured_s)

    @property
    def whole_s(self) -> float:
        """Return how long the part that counts was to go on."""
        return sum(one.seconds for one in self.stretches)

    @property
    def limited_by_generator(self) -> bool:
        """Return whether the figures say more of the generator than of what it asked."""
        return bool(self.warnings(in_flight=False))

    def warnings(self, *, in_flight: bool = True) -> list[str]:
        """Return what makes the figures doubtful, for people.

        Args:
            in_flight: whether to speak of the limit of requests in flight, which a cluster that is
                too slow reaches as well as a generator that is.
        """
        said = []
        codes, lag, latency = self.total.codes, self.total.lag, self.total.latency
        if in_flight and codes[IN_FLIGHT_LIMIT]:
            said.append(
                f"{codes[IN_FLIGHT_LIMIT]} requests were not sent, because as many were in flight "
                "as may be, and count as failed: raise the limit, or the cluster cannot keep up"
            )
        if codes[SENT_TOO_LATE]:
            said.append(
                f"{codes[SENT_TOO_LATE]} requests were not sent before their deadline and count as "
                "failed: the generator was the limit, give it more processes or a lower rate"
            )
        for share in (0.5, 0.99):
            late_s, took_s = lag.quantile(share) or 0.0, latency.quantile(share) or math.inf
            if late_s > max(LATE_SHARE * took_s, _LATE_S):
                said.append(
                    f"at p{share * 100:.0f} requests were sent {late_s * 1e3:.1f} ms late, part of "
                    f"the {took_s * 1e3:.1f} ms there: the generator was the limit, or had no core"
                )
                break
        busy = [one.cpu_s / one.seconds for one in self.generators if one.seconds > 0]
        if busy and max(busy) > BUSY_SHARE:
            said.append(
                f"a process of the generator took {max(busy):.2f} cores: it was the limit, or "
                "close to it; give it more processes"
            )
        return said

    def as_json(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        measured_s = max(self.measured_s, 1e-9)
        series = {
            second: self.seconds.get(second, Tally()).as_json(min(measured_s - second, 1.0))
            for second in range(math.ceil(measured_s))
        }
        ends_s = _ends(self.stretches)
        return {
            "seconds": round(measured_s, 3),
            **self.total.as_json(measured_s),
            "errors": dict(sorted(self.total.codes.items())),
            "reasons": dict(sorted(self.total.reasons.items())),
            "generations": {
                str(number): times for number, times in sorted(self.total.generations.items())
            },
            "stretches": [
                {
                    "wanted_rate": stretch.rate,
                    "wanted_end_rate": stretch.end_rate,
                    **part.as_json(max(min(stretch.seconds, measured_s - begin_s), 1e-9)),
                }
                for stretch, part, begin_s in zip(self.stretches, self.parts, ends_s, strict=False)
                if begin_s < measured_s
            ],
            "series": [{"second": second, **one} for second, one in series.items()],
            "generator": {
                "processes": len(self.generators),
                "cpu_s": round(sum(one.cpu_s for one in self.generators), 3),
                "cores": round(
                    sum(one.cpu_s / one.seconds for one in self.generators if one.seconds > 0), 3
                ),
                "lag_p50_ms": _milliseconds(self.total.lag.quantile(0.5)),
                "lag_p99_ms": _milliseconds(self.total.lag.quantile(0.99)),
                "lag_max_ms": _milliseconds(self.total.lag.quantile(1.0)),
                "cut_short": sum(one.cut_short for one in self.generators),
            },
            "warnings": self.warnings(),
        }


def merged(reports: Iterable[LoadReport]) -> LoadReport:
    """Return one report of all processes of a load, of which there is at least one."""
    first, *others = reports
    for other in others:
        first.merge(other)
    return first


def _ends(stretches: Sequence[Stretch]) -> list[float]:
    ends = [0.0]
    for stretch in stretches:
        ends.append(ends[-1] + stretch.seconds)
    return ends


def _milliseconds(seconds: float | None) -> float | None:
    return None if seconds is None else _rounded(seconds * 1e3)


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)

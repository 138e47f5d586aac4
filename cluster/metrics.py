"""Numbers that a process counts about itself, and their text for Prometheus.

Source: Prometheus documentation, "Exposition formats", text format 0.0.4.
"""

import math
import threading
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence

TEXT_FORMAT = "text/plain; version=0.0.4; charset=utf-8"
"""Content type of ``Metrics.text``."""


class Counter:
    """A number per label value that only grows."""

    kind = "counter"

    def __init__(self, label: str = "") -> None:
        """Make a counter; without a label it is one number, shown from the start as 0."""
        self._label = label
        self._lock = threading.Lock()
        self._values: dict[str, float] = {} if label else {"": 0}

    def add(self, value: str = "", amount: float = 1) -> None:
        """Add to the number of a label value."""
        with self._lock:
            self._values[value] = self._values.get(value, 0) + amount

    def samples(self) -> list[tuple[str, str, float]]:
        """Return suffix, labels in braces and number of every label value, in order."""
        with self._lock:
            return [
                ("", _labels(self._label, one), self._values[one]) for one in sorted(self._values)
            ]


class Gauge:
    """A number that is read where it lies whenever somebody asks."""

    kind = "gauge"

    def __init__(self, read: Callable[[], float]) -> None:
        """Make a gauge; ``read`` may be called on any thread."""
        self._read = read

    def samples(self) -> list[tuple[str, str, float]]:
        """Return the number as it is now."""
        return [("", "", self._read())]


class Histogram:
    """How many observations were at most each bound, their number and their sum."""

    kind = "histogram"

    def __init__(self, bounds: Sequence[float]) -> None:
        """Make a histogram.

        Args:
            bounds: upper ends of the buckets, inclusive, ascending.

        Raises:
            ValueError: if they do not ascend.
        """
        if list(bounds) != sorted(set(bounds)):
            raise ValueError(f"bounds must ascend, got {list(bounds)}")
        self._bounds = (*bounds, math.inf)
        self._lock = threading.Lock()
        self._counts = [0] * len(self._bounds)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        """Count one observation."""
        with self._lock:
            self._counts[bisect_left(self._bounds, value)] += 1
            self._sum += value

    def samples(self) -> list[tuple[str, str, float]]:
        """Return buckets, each with all below it, then sum and count."""
        with self._lock:
            counts, total = list(self._counts), self._sum
        found: list[tuple[str, str, float]] = []
        below = 0
        for bound, count in zip(self._bounds, counts, strict=True):
            below += count
            found.append(("_bucket", _labels("le", _number(bound)), below))
        return [*found, ("_sum", "", total), ("_count", "", below)]


Metric = Counter | Gauge | Histogram


class Metrics:
    """All metrics of a process, by name."""

    def __init__(self) -> None:
        """Make an empty set."""
        self._metrics: dict[str, tuple[str, Metric]] = {}

    def add(self, name: str, meaning: str, metric: Metric) -> None:
        """Take a metric in.

        Args:
            name: in base units; of a counter it ends with ``_total``.
            meaning: one line for people.
            metric: where it is counted.

        Raises:
            ValueError: if the name is taken, or does not say that it is a counter.
        """
        if name in self._metrics:
            raise ValueError(f"metric {name} exists already")
        if (metric.kind == "counter") != name.endswith("_total"):
            raise ValueError(f"a counter, and nothing else, must end with _total, got {name}")
        self._metrics[name] = meaning, metric

    def names(self) -> list[str]:
        """Return the names of all metrics in the order in which they were added."""
        return list(self._metrics)

    def text(self) -> str:
        """Return all metrics as Prometheus reads them."""
        return "".join(
            line
            for name, (meaning, metric) in self._metrics.items()
            for line in _lines(name, meaning, metric)
        )


def _lines(name: str, meaning: str, metric: Metric) -> Iterable[str]:
    yield f"# HELP {name} {meaning}\n"
    yield f"# TYPE {name} {metric.kind}\n"
    for suffix, labels, value in metric.samples():
        yield f"{name}{suffix}{labels} {_number(value)}\n"


def _labels(name: str, value: str) -> str:
    if not name:
        return ""
    escaped = value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
    return f'{{{name}="{escaped}"}}'


def _number(value: float) -> str:
    if math.isinf(value):
        return "+Inf" if value > 0 else "-Inf"
    return str(int(value)) if value == int(value) else repr(value)

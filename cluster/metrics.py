"""Numbers that a process counts about itself, and their text for Prometheus.

Source: Prometheus documentation, "Exposition formats", text format 0.0.4.
"""

import math
import threading
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence

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


class Tally:
    """Counts that are kept elsewhere, and are read there whenever somebody asks."""

    kind = "counter"

    def __init__(self, read: Callable[[], Mapping[tuple[str, ...], float]], *labels: str) -> None:
        """Make a tally.

        Args:
            read: returns the counts by the values of the labels; called on any thread.
            labels: names of the labels.
        """
        self._read = read
        self._names = labels

    def samples(self) -> list[tuple[str, str, float]]:
        """Return the counts as they are now, in order."""
        counts = dict(self._read())
        return [
            ("", _braces(zip(self._names, one, strict=True)), counts[one]) for one in sorted(counts)
        ]


class Gauges(Tally):
    """Numbers by labels that are read where they lie."""

    kind = "gauge"


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

    def __init__(self, bounds: Sequence[float], label: str = "") -> None:
        """Make a histogram.

        Args:
            bounds: upper ends of the buckets, inclusive, ascending.
            label: name of the label by whose value observations are told apart; empty: none.

        Raises:
            ValueError: if they do not ascend.
        """
        if list(bounds) != sorted(set(bounds)):
            raise ValueError(f"bounds must ascend, got {list(bounds)}")
        self._bounds = (*bounds, math.inf)
        self._lock = threading.Lock()
        self._label = label
        self._series: dict[str, tuple[list[int], list[float]]] = {}
        """Counts and sum by the value of the label."""
        if not label:
            self._series[""] = self._empty()

    def observe(self, value: float, label: str = "") -> None:
        """Count one observation, under a value of the label."""
        with self._lock:
            if label not in self._series:
                self._series[label] = self._empty()
            counts, total = self._series[label]
            counts[bisect_left(self._bounds, value)] += 1
            total[0] += value

    def _empty(self) -> tuple[list[int], list[float]]:
        return [0] * len(self._bounds), [0.0]

    def samples(self) -> list[tuple[str, str, float]]:
        """Return buckets, each with all below it, then sum and count."""
        with self._lock:
            series = {one: (list(at[0]), at[1][0]) for one, at in self._series.items()}
        found: list[tuple[str, str, float]] = []
        for value in sorted(series):
            counts, total = series[value]
            own = [(self._label, value)] if self._label else []
            below = 0
            for bound, count in zip(self._bounds, counts, strict=True):
                below += count
                found.append(("_bucket", _braces([*own, ("le", _number(bound))]), below))
            found += [("_sum", _braces(own), total), ("_count", _braces(own), below)]
        return found


Metric = Counter | Tally | Gauge | Histogram


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
    return _braces([(name, value)] if name else [])


def _braces(labels: Iterable[tuple[str, str]]) -> str:
    """Return labels and their values as Prometheus reads them; empty without any."""
    pairs = ",".join(f'{name}="{_escaped(value)}"' for name, value in labels)
    return f"{{{pairs}}}" if pairs else ""


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


def _number(value: float) -> str:
    if math.isinf(value):
        return "+Inf" if value > 0 else "-Inf"
    return str(int(value)) if value == int(value) else repr(value)

"""When the requests of an open-loop load are due: at constant, stepped or growing rates.

Source: E. Cinlar, Introduction to Stochastic Processes, 1975, section 4.7: a Poisson process whose
rate changes is one of rate 1 with its time stretched.
"""

import itertools
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Stretch:
    """A span of the load whose rate is constant, or changes evenly from one to another."""

    seconds: float
    rate: float
    """Requests per second at its begin."""
    end_rate: float
    """At its end."""

    def __post_init__(self) -> None:
        if not 0 < self.seconds < math.inf:
            raise ValueError(
                f"a stretch must last a positive number of seconds, got {self.seconds}"
            )
        for rate in (self.rate, self.end_rate):
            if not 0 <= rate < math.inf:
                raise ValueError(f"a rate must be a number from 0, got {rate}")
        if not self.requests:
            raise ValueError("a stretch must have a rate above 0 at its begin or its end")

    @property
    def requests(self) -> float:
        """Return how many requests are expected in it."""
        return (self.rate + self.end_rate) / 2 * self.seconds

    def time_of(self, requests: float) -> float:
        """Return the seconds after which so many requests are expected, at most all of them."""
        growth = (self.end_rate - self.rate) / self.seconds
        # The form of the quadratic formula that loses no digits where the rate hardly changes.
        root = math.sqrt(max(self.rate**2 + 2 * growth * requests, 0.0))
        return 2 * requests / (self.rate + root) if requests else 0.0


def arrivals(stretches: Sequence[Stretch], *, poisson: bool, seed: int) -> Iterator[float]:
    """Yield the times at which requests are due, in seconds from the begin, ascending.

    Args:
        stretches: one after the other.
        poisson: whether the times between two requests are drawn, exponentially distributed; else
            they are even, and the first request is due at once.
        seed: of the times that are drawn; equal seeds give equal times.
    """
    draw = random.Random(seed)
    begin_s, before, number = 0.0, 0.0, 0
    at = _gap(draw) if poisson else 0.0
    for stretch in stretches:
        while at - before < stretch.requests:
            yield begin_s + stretch.time_of(at - before)
            number += 1
            at = at + _gap(draw) if poisson else float(number)
        begin_s += stretch.seconds
        before += stretch.requests


def _gap(draw: random.Random) -> float:
    return -math.log(1.0 - draw.random())


def share_of(
    times_s: Iterator[float], process: int, num_processes: int
) -> Iterator[tuple[int, float]]:
    """Yield the number and the time of every request that one of several processes sends.

    Together they send what one process would send alone.

    Args:
        times_s: of all requests.
        process: index of the process.
        num_processes: how many there are.
    """
    return itertools.islice(enumerate(times_s), process, None, num_processes)

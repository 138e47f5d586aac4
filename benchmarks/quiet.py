"""Times calls in turn in one process, and only when the machine is quiet.

A sample is taken when no other process wants a core, and is taken again when a thread of this
process lost its core during it; a share of samples that stayed disturbed is reported.
"""

import math
import os
import resource
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

Call = Callable[[int], object]
"""Runs once; the number says which of the rotating inputs to take."""


def runnable() -> int:
    """Return how many threads of the machine want a core, this one included."""
    return int(Path("/proc/loadavg").read_text().split()[3].split("/")[0])


def switches() -> int:
    """Return how often a thread of this process has lost its core against its will."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


@dataclass(frozen=True)
class Guard:
    """When a sample may be taken and when it counts as disturbed."""

    max_tries: int = 6
    max_wait_s: float = 0.25
    """Longest wait for a quiet machine before a try."""
    budget_s: float = 1.0
    """No further try once the tries of a sample took this long."""
    runnable: Callable[[], int] = runnable
    switches: Callable[[], int] = switches
    clock: Callable[[], float] = time.perf_counter
    sleep: Callable[[float], None] = time.sleep

    def wait(self) -> bool:
        """Wait until nobody else wants a core; return whether that came true."""
        end = self.clock() + self.max_wait_s
        while self.runnable() > 1:
            if self.clock() >= end:
                return False
            self.sleep(0.0005)
        return True


@dataclass
class Series:
    """The samples of one side: seconds per call, one per round."""

    seconds: list[float] = field(default_factory=list)
    tries: int = 0
    disturbed: int = 0
    """Tries during which a thread lost its core, or that began on a busy machine."""
    unsettled: int = 0
    """Samples for which every try was disturbed; the shortest one is kept."""

    @property
    def median(self) -> float:
        """Return the median of the samples in seconds."""
        return statistics.median(self.seconds)


@dataclass
class _Side:
    call: Call
    calls: int
    series: Series
    at: int = 0

    def once(self) -> None:
        for _ in range(self.calls):
            self.call(self.at)
            self.at += 1

    def sample(self, guard: Guard) -> None:
        """Append the first undisturbed try, or the shortest of all."""
        best = math.inf
        began = guard.clock()
        for _ in range(guard.max_tries):
            quiet = guard.wait()
            before = guard.switches()
            start = guard.clock()
            self.once()
            took = (guard.clock() - start) / self.calls
            clean = quiet and guard.switches() == before
            self.series.tries += 1
            best = took if clean else min(best, took)
            if clean:
                break
            self.series.disturbed += 1
            if guard.clock() - began > guard.budget_s:
                self.series.unsettled += 1
                break
        else:
            self.series.unsettled += 1
        self.series.seconds.append(best)


def interleave(
    sides: Mapping[str, Call],
    *,
    rounds: int,
    guard: Guard | None = None,
    sample_s: float = 0.002,
    budget_s: float = math.inf,
    min_rounds: int = 3,
) -> dict[str, Series]:
    """Measure every side once per round, in turn.

    Args:
        sides: what to measure. Every call gets the next number, so that no input comes twice in a
            row.
        rounds: samples per side.
        guard: when a sample counts; the default one looks at ``/proc``.
        sample_s: a sample holds as many calls (at most 64) as take about this long.
        budget_s: no further round after this long.
        min_rounds: rounds that are measured unless they take four times the budget.
    """
    guard = guard or Guard()
    running = {}
    for name, call in sides.items():
        for warm in (0, 1):
            start = guard.clock()
            call(warm)
            took = max(guard.clock() - start, 1e-7)
            if took > budget_s:
                break
        running[name] = _Side(call, max(1, min(64, math.ceil(sample_s / took))), Series(), at=2)
    began = guard.clock()
    for number in range(rounds):
        spent = guard.clock() - began
        if number and spent > budget_s * (1 if number >= min_rounds else 4):
            break
        for side in running.values():
            side.sample(guard)
    return {name: side.series for name, side in running.items()}


def ratio(ours: Series, modes: list[Series]) -> float:
    """Return the median over the rounds of the best mode of the peer over ours."""
    rounds = zip(ours.seconds, *(mode.seconds for mode in modes), strict=True)
    return float(statistics.median(min(peer) / mine for mine, *peer in rounds))


def busy_cores() -> float:
    """Return the load of the last minute per core, for the record."""
    return os.getloadavg()[0] / (os.cpu_count() or 1)

"""What lets the stages of the calls of a shard run, as long as somebody waits for them in time."""

from collections import Counter
from collections.abc import Callable
from typing import Protocol

from silvershard.shard.errors import DeadlineExceeded


class Abandoned(Exception):
    """Ends a call that nobody waits for any more."""


class _Call(Protocol):
    dropped: bool
    """True once nobody waits for it any more."""
    expires_at_s: float
    """Reading of the clock at which its time is over."""


class StageGate:
    """Refuses what is not worth running, and counts it by the stage that did not run."""

    def __init__(self, clock: Callable[[], float]) -> None:
        """Make a gate that has refused nothing."""
        self.expired: Counter[str] = Counter()
        self.cancelled: Counter[str] = Counter()
        self._clock = clock

    def check(self, call: _Call, stage: str) -> None:
        """Return if the next stage of a call is worth running.

        Raises:
            Abandoned: if nobody waits for it any more.
            DeadlineExceeded: if its time ran out.
        """
        if call.dropped:
            self.cancelled[stage] += 1
            raise Abandoned
        if self._clock() >= call.expires_at_s:
            self.expired[stage] += 1
            raise DeadlineExceeded(f"the time of the call ran out in the queue before {stage}")

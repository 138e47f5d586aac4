"""What a router may send beyond one call per shard and stage: hedges and retries, within budgets.

Source: Dean and Barroso, The Tail at Scale, CACM 2013, "Within Request Short-Term Adaptations".
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from silvershard.cluster.config import HedgingSection, RetriesSection
from silvershard.cluster.metrics import Histogram

_SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)

# Hedges that may follow each other at once, whatever was sent before.
_HEDGE_BURST = 16

# Budgets are shares of calls; whole millionths keep their sums exact.
_ONE = 1_000_000


def _is_cool() -> bool:
    return False


class TokenBucket:
    """A share of what is counted, with a burst in advance.

    After n calls of ``deposit`` at most ``burst + share * n`` calls of ``take`` were granted.
    """

    def __init__(self, share: float, burst: int) -> None:
        """Make a full bucket.

        Args:
            share: tokens per deposit, 0..1.
            burst: tokens that it holds; of none it still collects one.
        """
        self._share = round(share * _ONE)
        self._capacity = max(burst, 1) * _ONE
        self._tokens = burst * _ONE

    def deposit(self) -> None:
        """Count a call of which a share may follow."""
        self._tokens = min(self._tokens + self._share, self._capacity)

    def take(self) -> bool:
        """Return whether one more may be sent; counts it if so."""
        if self._tokens < _ONE:
            return False
        self._tokens -= _ONE
        return True


@dataclass
class ExtraCounts:
    """What became of hedges and retries since the start."""

    calls: int = 0
    """First calls, of which the budgets are shares."""
    hedges_won: int = 0
    hedges_lost: int = 0
    """Among them those of which neither call was answered."""
    hedges_suppressed: int = 0
    """Calls that were slow enough for a hedge that there was no budget for, or no time."""
    hedges_free: int = 0
    """Sent because a replica gave no sign of life, outside the budget."""
    retries: int = 0
    retries_suppressed: int = 0
    set_aside: Counter[str] = field(default_factory=Counter)
    """Replicas that were set aside, by cause."""
    ended: Counter[str] = field(default_factory=Counter)
    """Calls to shards by the name of their gRPC status; ``CANCELLED``: another one was faster."""
    seconds: Histogram = field(default_factory=partial(Histogram, _SECONDS))
    """Of those that were answered."""


class ExtraCalls:
    """The budgets of one router, shared by all generations that it serves."""

    def __init__(
        self,
        hedging: HedgingSection,
        retries: RetriesSection,
        *,
        retry_burst: int = 0,
        is_hot: Callable[[], bool] = _is_cool,
    ) -> None:
        """Make full budgets.

        Args:
            hedging: whether and when to hedge, and how often.
            retries: how often to ask again.
            retry_burst: retries that may follow each other at once.
            is_hot: returns True while the cluster is too busy for work that may be for nothing.
        """
        self.hedging = hedging
        self.max_attempts = retries.max_attempts
        self.counts = ExtraCounts()
        self._is_hot = is_hot
        self._hedges = TokenBucket(hedging.budget, _HEDGE_BURST)
        self._retries = TokenBucket(retries.budget, retry_burst)

    def count_call(self) -> None:
        """Count a first call."""
        self.counts.calls += 1
        self._hedges.deposit()
        self._retries.deposit()

    def may_hedge(self, *, suspect: bool, silent: bool) -> bool:
        """Return whether a hedge may be sent now; the budget is charged if it may.

        Args:
            suspect: the replica misses pings: whatever it was asked, it does not work on it.
            silent: the replica has answered nothing for long.
        """
        if not self.hedging.enabled:
            return False
        if suspect or (silent and not self._is_hot()):
            self.counts.hedges_free += 1
            return True
        return not self._is_hot() and self._hedges.take()

    def may_retry(self, *, refused: bool) -> bool:
        """Return whether another replica may be asked now; the budget is charged if it may.

        Args:
            refused: the replica is overloaded, and others may be as well.
        """
        granted = not (refused and self._is_hot()) and self._retries.take()
        if granted:
            self.counts.retries += 1
        else:
            self.counts.retries_suppressed += 1
        return granted

"""An assignment of copies to hosts with all of its sums, changed copy by copy.

Shapes: n copies, m hosts, u units of capacity.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

_Ints = NDArray[np.int64]
_Mask = NDArray[np.bool_]

NOWHERE = -1
SHARED_HOST = 1 << 40
"""Cost of a pair of copies of a shard on one host."""
SHARED_ZONE = 1 << 20
"""Cost of a pair of copies of a shard in one zone, where zones count."""
STAYS = 1 << 50
"""Cost of a copy on a host that it shall leave."""
NEVER = 1 << 60
"""Cost of a step that is not allowed."""
ALWAYS_LESS = 1 << 59
"""No path costs as much, even one that also has a step that is never taken costs more."""
_NO_COPIES: _Ints = np.zeros(0, dtype=np.int64)


class Problem(NamedTuple):
    """What is to be placed where."""

    shards: _Ints
    """``(n,)`` which shard each copy is of."""
    needs: _Ints
    """``(n, u)`` what each copy takes."""
    weights: _Ints
    """``(n,)`` load of each copy, at least 1."""
    rooms: _Ints
    """``(m, u)`` what each host has."""
    strengths: NDArray[np.float64]
    """``(m,)`` load that is fair for each host, relative to the others, more than 0."""
    zones: _Ints
    """``(m,)`` zone of each host."""
    zones_count: bool
    """Whether copies of a shard shall lie in different zones."""
    usable: _Mask
    """``(n, m)`` where each copy may be."""
    costs: _Ints
    """``(n, m)`` what that costs: 1 for a move, or ``STAYS``."""
    at: _Ints
    """``(n,)`` where each copy is kept to begin with, or ``NOWHERE``."""


class State:
    """An assignment with its sums, changed copy by copy."""

    def __init__(self, problem: Problem, at: _Ints) -> None:
        self.problem = problem
        num_shards = int(problem.shards.max(initial=-1)) + 1
        hosts, zones = len(problem.rooms), int(problem.zones.max(initial=-1)) + 1
        self.at = np.full(len(at), NOWHERE, dtype=np.int64)
        self.free = problem.rooms.copy()
        self.on_host = np.zeros((num_shards, hosts), dtype=np.int64)
        self.in_zone = np.zeros((num_shards, zones), dtype=np.int64)
        self.load = np.zeros(hosts, dtype=np.float64)
        # What does not fit where it is kept is left out, the largest first.
        order = np.lexsort((np.arange(len(at)), problem.needs[:, 0]))
        for copy in order.tolist():
            host = int(at[copy])
            if host != NOWHERE and (self.free[host] >= problem.needs[copy]).all():
                self.move(copy, host)

    @property
    def is_complete(self) -> bool:
        """Return whether every copy has a host."""
        return bool((self.at != NOWHERE).all())

    def move(self, copy: int, host: int) -> None:
        """Put a copy onto a host, or ``NOWHERE``, without looking at the room there."""
        problem = self.problem
        shard = problem.shards[copy]
        for target, sign in ((int(self.at[copy]), -1), (host, 1)):
            if target == NOWHERE:
                continue
            self.free[target] -= sign * problem.needs[copy]
            self.on_host[shard, target] += sign
            self.in_zone[shard, problem.zones[target]] += sign
            self.load[target] += sign * problem.weights[copy]
        self.at[copy] = host

    def violations(self) -> int:
        """Return what the pairs that share hosts and zones cost."""
        cost = SHARED_HOST * _pairs(self.on_host)
        return cost + (SHARED_ZONE * _pairs(self.in_zone) if self.problem.zones_count else 0)

    def cost(self) -> int:
        """Return what the assignment costs."""
        placed = np.flatnonzero(self.at != NOWHERE)
        return self.violations() + int(self.problem.costs[placed, self.at[placed]].sum())

    def step_costs(self, *, with_places: bool = True) -> _Ints:
        """Return what putting each copy onto each host costs more, ``(n, m)``.

        Args:
            with_places: count what a copy costs on its host, and not only pairs that share.
        """
        problem, at = self.problem, self.at
        shards = problem.shards
        placed = at != NOWHERE
        here = np.where(placed, at, 0)
        costs = SHARED_HOST * self.on_host[shards]
        leaves = SHARED_HOST * (self.on_host[shards, here] - 1)
        if problem.zones_count:
            own_zone = problem.zones[here]
            same = (problem.zones[None, :] == own_zone[:, None]) & placed[:, None]
            costs = costs + SHARED_ZONE * (self.in_zone[shards][:, problem.zones] - same)
            leaves = leaves + SHARED_ZONE * (self.in_zone[shards, own_zone] - 1)
        if with_places:
            costs = costs + problem.costs
            leaves = leaves + problem.costs[np.arange(len(at)), here]
        costs = costs - np.where(placed, leaves, 0)[:, None]
        costs[~problem.usable] = NEVER
        costs[placed, at[placed]] = NEVER
        return costs

    def fits(self) -> _Mask:
        """Return which copies fit onto which hosts as they are, ``(n, m)``."""
        enough = self.free[None, :, :] >= self.problem.needs[:, None, :]  # (n, m, u)
        return np.asarray(enough.all(2), dtype=np.bool_)

    def evening_move(self, sources: _Mask, targets: _Mask) -> tuple[int, int] | None:
        """Return the move of a copy that evens the load the most; None if there is none."""
        problem = self.problem
        allowed = self.fits() & (self.step_costs(with_places=False) <= 0) & targets[None, :]
        ratio = self.load / problem.strengths
        for source in np.lexsort((np.arange(len(ratio)), -ratio)).tolist():
            copies = np.flatnonzero(self.at == source) if sources[source] else _NO_COPIES
            after = (self.load[None, :] + problem.weights[copies, None]) / problem.strengths
            left = (self.load[source] - problem.weights[copies]) / problem.strengths[source]
            worst = np.maximum(after, left[:, None])
            worst[~allowed[copies] | (after >= ratio[source])] = np.inf
            if worst.size and worst.min() < np.inf:
                copy, host = divmod(int(worst.argmin()), worst.shape[1])
                return int(copies[copy]), host
        return None


def _pairs(counts: _Ints) -> int:
    return int((counts * (counts - 1) // 2).sum())

"""The search for a place for every copy: least cost flows, and where they are not enough, branches.

Copies are balls and hosts are bins with a capacity in several units. The cost of an assignment is
the sum of what each pair of copies of a shard costs on one host or in one zone, and of what each
copy costs on its host. It is a separable convex cost, so that for copies of equal needs successive
shortest paths and the cancelling of negative cycles lead to the optimum. For copies of unequal
needs, which is bin packing, the same steps are a heuristic, and a search with a bound on its steps
goes on from there.

Shapes: n copies, m hosts, u units of capacity.

Source: Ahuja, Magnanti and Orlin, "Network Flows", 1993, chapters 9 (successive shortest paths,
cancelling of cycles) and 14 (convex costs).
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from silvershard.deploy.placement_state import (
    ALWAYS_LESS,
    NEVER,
    NOWHERE,
    SHARED_HOST,
    SHARED_ZONE,
    STAYS,
    Problem,
    State,
)

_Ints = NDArray[np.int64]
_Mask = NDArray[np.bool_]

_STEPS = 6_000
"""Branches that are tried where needs differ: a third of a second at 256 copies on 64 hosts."""


class Found(NamedTuple):
    """What a search came to."""

    at: _Ints
    """``(n,)`` the host of each copy; ``NOWHERE`` where there is none."""
    is_proven: bool
    """Whether it is proven that no more copies have room and that no fewer pairs can share."""


def search(problem: Problem) -> Found:
    """Return an assignment of all copies at the least cost, or of as many as have room.

    The result depends on the order of copies and hosts alone.
    """
    problem, uniform = _counted(problem)
    best = _improved(State(problem, problem.at))
    if not uniform and not best.is_complete:
        fresh = _improved(State(problem, np.full_like(problem.at, NOWHERE)))
        if fresh.is_complete:
            best = fresh
    if uniform:
        return Found(best.at, is_proven=True)
    if best.is_complete and best.cost() < _least_violations(problem) + SHARED_ZONE:
        return Found(best.at, is_proven=True)
    branches = _Branches(problem, best.at if best.is_complete else None)
    found = branches.run()
    if found is not None:
        best = _improved(State(problem, found))
    return Found(best.at, is_proven=branches.has_ended)


def _counted(problem: Problem) -> tuple[Problem, bool]:
    """Return the problem in numbers of copies where these alone decide, and whether they do.

    They do where each host has room for as many of the largest copies as of the smallest ones.
    """
    copies = len(problem.needs)
    units = problem.needs.max(0, initial=0) > 0
    largest, smallest = problem.needs[:, units].max(0), problem.needs[:, units].min(0)
    rooms = problem.rooms[:, units]
    if not units.any() or not smallest.all():
        return problem, not units.any()
    most, least = (
        np.minimum((rooms // one).min(1, initial=copies), copies) for one in (smallest, largest)
    )
    if (most != least).any():
        return problem, False
    ones = np.ones((copies, 1), dtype=np.int64)
    return problem._replace(needs=ones, rooms=least[:, None]), True


def spread_load(problem: Problem, at: _Ints, sources: _Mask, targets: _Mask) -> _Ints:
    """Return an assignment with copies moved to some hosts as long as that evens the load.

    A move makes the more loaded of its two hosts less loaded, costs no pair that shares, and
    leaves nothing without room.

    Args:
        problem: as for ``search``.
        at: ``(n,)`` a complete assignment.
        sources: ``(m,)`` hosts that may give.
        targets: ``(m,)`` hosts that may receive.
    """
    state = State(problem, at)
    for _ in range(4 * len(at)):
        move = state.evening_move(sources, targets)
        if move is None:
            break
        state.move(*move)
    return state.at


def _improved(state: State) -> State:
    """Return a state with every copy placed that a path leads to, and no cheaper neighbour."""
    problem = state.problem
    _cancel_all(state)
    order = np.lexsort((np.arange(len(state.at)), -problem.needs[:, 0]))
    for copy in order.tolist():
        if state.at[copy] == NOWHERE:
            _place(state, copy)
    _cancel_all(state)
    _relabel(state)
    return state


def _relabel(state: State) -> None:
    """Let copies of a shard that need the same exchange places as long as that costs less.

    In the cost of a step another copy of the shard counts that leaves at the same time; here none
    does, as what the shard has on each host stays as it is.
    """
    problem, at = state.problem, state.at
    alike = problem.shards[:, None] == problem.shards[None, :]
    alike &= (problem.needs[:, None, :] == problem.needs[None, :, :]).all(2)
    placed = at != NOWHERE
    alike &= placed[:, None] & placed[None, :]
    for _ in range(len(at)):
        here = np.where(placed, state.at, 0)
        there = problem.costs[:, here]  # (n, n)
        allowed = problem.usable[:, here]
        own = np.diagonal(there)
        gain = own[:, None] + own[None, :] - there - there.T
        gain[~(alike & allowed & allowed.T)] = 0
        if not gain.size or gain.max() <= 0:
            return
        one, other = divmod(int(gain.argmax()), len(at))
        host, other_host = int(state.at[one]), int(state.at[other])
        state.move(one, other_host)
        state.move(other, host)


def _place(state: State, copy: int) -> None:
    """Place one copy if it can be, moving others out of its way along the cheapest path."""
    for _ in range(len(state.at)):
        steps, fits = state.step_costs(), state.fits()
        host, cost = _cheapest_end(state, copy, steps, fits)
        if cost <= 0:
            break
        swaps = _swap_costs(state, steps)
        nobody = np.full(len(state.at), NOWHERE)
        dist, parent, cycle = _shortest(swaps[copy], nobody, swaps)
        if cycle:
            if _follow(state, cycle, NOWHERE):
                continue
            break
        total = dist + np.where(fits, steps, NEVER).min(1, initial=NEVER)
        total[state.at == NOWHERE] = NEVER
        if total.min() < min(cost, ALWAYS_LESS):
            path = _path_to(int(total.argmin()), parent)
            last, _ = _cheapest_end(state, path[-1], steps, fits)
            if _follow(state, [copy, *path], last):
                return
        break
    if cost < NEVER:
        state.move(copy, host)


def _path_to(last: int, parent: _Ints) -> list[int]:
    path = [last]
    while parent[path[-1]] != NOWHERE:
        path.append(int(parent[path[-1]]))
    return path[::-1]


def _cheapest_end(state: State, copy: int, steps: _Ints, fits: _Mask) -> tuple[int, int]:
    """Return the cheapest host with room for a copy, the least loaded among equals, and the cost.

    The cost is at least ``NEVER`` where there is none.
    """
    costs = np.where(fits[copy], steps[copy], NEVER)
    least = int(costs.min(initial=NEVER))
    problem = state.problem
    ratio = (state.load + problem.weights[copy]) / problem.strengths
    ratio[costs > least] = np.inf
    return int(ratio.argmin()), least


def _swap_costs(state: State, steps: _Ints) -> _Ints:
    """Return what it costs that a copy takes the place of another, which then needs one, (n, n)."""
    problem, at = state.problem, state.at
    placed = at != NOWHERE
    here = np.where(placed, at, 0)
    costs = steps[:, here]  # (n, n)
    # The other one leaves, so that it is no pair with it.
    same = problem.shards[:, None] == problem.shards[None, :]
    costs = costs - np.where(same, SHARED_HOST, 0)
    room = state.free[here] + problem.needs  # (n, u) where each placed copy leaves
    fits = (room[None, :, :] >= problem.needs[:, None, :]).all(2)
    costs[~fits | (steps[:, here] >= NEVER) | ~placed[None, :]] = NEVER
    np.fill_diagonal(costs, NEVER)
    return costs


def _shortest(dist: _Ints, parent: _Ints, costs: _Ints) -> tuple[_Ints, _Ints, list[int]]:
    """Return distances, predecessors, and a cycle of negative cost where one was met."""
    everyone = np.arange(len(dist))
    for _ in range(len(dist)):
        through = dist[:, None] + costs
        best = through.argmin(0)
        value = through[best, everyone]
        better = value < np.minimum(dist, ALWAYS_LESS)
        if not better.any():
            break
        dist = np.where(better, value, dist)
        parent = np.where(better, best, parent)
        cycle = _cycle_in(parent)
        if cycle:
            return dist, parent, cycle
    return dist, parent, []


def _cycle_in(parent: _Ints) -> list[int]:
    """Return a cycle of the predecessors in their order, empty if there is none."""
    ahead = parent
    for _ in range(len(parent).bit_length()):
        ahead = np.where(ahead == NOWHERE, NOWHERE, ahead[ahead])
    turning = np.flatnonzero(ahead != NOWHERE)
    if not len(turning):
        return []
    cycle = [int(ahead[turning[0]])]
    while (one := int(parent[cycle[-1]])) != cycle[0]:
        cycle.append(one)
    return cycle[::-1]


def _cancel_all(state: State) -> None:
    for _ in range(4 * len(state.at)):
        if not _cancel(state):
            return


def _cancel(state: State) -> bool:
    """Follow one path or cycle of negative cost; return whether there was one."""
    steps, fits = state.step_costs(), state.fits()
    swaps = _swap_costs(state, steps)
    placed = state.at != NOWHERE
    ends = np.where(fits & placed[:, None], steps, NEVER).min(1, initial=NEVER)
    nobody = np.full(len(state.at), NOWHERE)
    dist, parent, cycle = _shortest(np.where(placed, 0, NEVER), nobody, swaps)
    if cycle:
        return _follow(state, cycle, NOWHERE)
    total = dist + ends
    if not len(total) or total.min() >= 0:
        return False
    path = _path_to(int(total.argmin()), parent)
    host, _ = _cheapest_end(state, path[-1], steps, fits)
    return _follow(state, path, host)


def _follow(state: State, path: Sequence[int], last_host: int) -> bool:
    """Let each copy of a path take the place of the next one, the last one that of a host.

    Args:
        state: changed if nothing lacks room then, and it costs less or holds one copy more.
        path: copies; the first one may be placed nowhere.
        last_host: where the last one goes; ``NOWHERE`` closes a cycle.
    """
    before, cost = state.at.copy(), state.cost()
    targets = [int(before[one]) for one in path[1:]]
    targets.append(int(before[path[0]]) if last_host == NOWHERE else last_host)
    for copy, host in zip(path, targets, strict=True):
        state.move(copy, host)
    grows = bool(before[path[0]] == NOWHERE)
    has_room = len(set(path)) == len(path) and bool((state.free >= 0).all())
    if has_room and (grows or state.cost() < cost):
        return True
    for copy in path:
        state.move(copy, int(before[copy]))
    return False


def _least_violations(problem: Problem) -> int:
    """Return what pairs that share cost at least: copies spread as evenly as there are places."""
    cost = 0
    for shard in np.unique(problem.shards).tolist():
        copies = np.flatnonzero(problem.shards == shard)
        hosts = np.flatnonzero((problem.usable & (problem.costs < STAYS))[copies].any(0))
        cost += SHARED_HOST * _even_pairs(len(copies), len(hosts))
        if problem.zones_count:
            zones = len(np.unique(problem.zones[hosts]))
            cost += SHARED_ZONE * _even_pairs(len(copies), zones)
    return cost


def _even_pairs(copies: int, places: int) -> int:
    each, more = divmod(copies, max(places, 1))
    return more * (each + 1) * each // 2 + (places - more) * each * (each - 1) // 2


class _Branches:
    """All assignments, the most promising first, cut where they cost as much as the best one.

    Args:
        problem: as for ``search``.
        best: ``(n,)`` a complete assignment to do better than; None if none is known.
    """

    def __init__(self, problem: Problem, best: _Ints | None) -> None:
        self._problem = problem
        self._state = State(problem, np.full_like(problem.at, NOWHERE))
        self._best = best
        self._best_cost = NEVER if best is None else State(problem, best).cost()
        self._least = _least_violations(problem)
        # The largest first, and copies of a shard one after the other.
        keys = (np.arange(len(problem.at)), problem.shards, *(-problem.needs.T[::-1]))
        self._order = np.lexsort(keys).tolist()
        self._steps_left = _STEPS
        self.has_ended = True
        """Whether no branch is left that could be better."""

    def run(self) -> _Ints | None:
        """Return the best complete assignment; None if none is known."""
        problem = self._problem
        if (problem.needs.sum(0) <= problem.rooms.sum(0)).all():
            self._descend(0, 0)
        return self._best

    def _descend(self, depth: int, cost: int) -> None:
        state = self._state
        if depth == len(self._order):
            self._best, self._best_cost = state.at.copy(), cost
            return
        copy = self._order[depth]
        for host, more in self._choices(depth):
            # Among assignments of as few shared places as possible the first one will do.
            good = self._best_cost < self._least + SHARED_ZONE
            if good or cost + more >= self._best_cost:
                return
            if self._steps_left == 0:
                self.has_ended = False
                return
            self._steps_left -= 1
            state.move(copy, host)
            self._descend(depth + 1, cost + more)
            state.move(copy, NOWHERE)

    def _choices(self, depth: int) -> Iterable[tuple[int, int]]:
        """Return the hosts for the next copy and what each costs more, the cheapest first."""
        state, problem = self._state, self._problem
        copy = self._order[depth]
        shard = problem.shards[copy]
        allowed = problem.usable[copy] & (state.free >= problem.needs[copy]).all(1)
        costs = SHARED_HOST * state.on_host[shard] + problem.costs[copy]
        if problem.zones_count:
            costs = costs + SHARED_ZONE * state.in_zone[shard][problem.zones]
        hosts = np.flatnonzero(allowed)
        if depth and self._is_twin(copy, self._order[depth - 1]):
            # Twins are interchangeable: they stand in the order of the hosts.
            hosts = hosts[hosts >= state.at[self._order[depth - 1]]]
        left = state.free[hosts, 0]
        order = np.lexsort((hosts, left, costs[hosts]))
        return [(int(hosts[one]), int(costs[hosts[one]])) for one in order]

    def _is_twin(self, copy: int, other: int) -> bool:
        problem = self._problem
        rows = (problem.shards, problem.needs, problem.costs, problem.usable)
        return all(np.array_equal(one[copy], one[other]) for one in rows)

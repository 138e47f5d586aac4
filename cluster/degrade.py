"""Spending less on each request under overload: when, in which order, and down to which floors.

Free of I/O: time is read from the clock that is given.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

from silvershard.cluster.admission import INTERVAL_S
from silvershard.cluster.config import DegradeSection
from silvershard.cluster.degrade_policy import DegradeMode, DegradePolicy
from silvershard.cluster.outcome import DegradeReason
from silvershard.model.compiled_request import CompiledRequest
from silvershard.model.plan import ALL_PAGES_SHARE, PROBE, PROBE_WIDE, Plan
from silvershard.model.request import RequestError
from silvershard.model.spec import ServingSpec

_RUNGS = {"nprobe": (0.5, 0.0), "ann_k": (0.5, 0.0), "tasks": (0.0,)}
"""What each rung of a step leaves of a number, before its floor."""

_MARGIN = 1.5
"""Clusters that hold so many times k eligible items on average are probed at least."""


class Reduced(NamedTuple):
    """A plan that is really run, and why it is not the one that was chosen."""

    plan: Plan
    reasons: tuple[DegradeReason, ...] = ()


class Ladder:
    """How many rungs down a router is; all its requests share them.

    A rung further down once the queue delay was above the trigger for ``INTERVAL_S`` without a
    break, as when the queue empties; a rung back up once it was not for
    ``trigger.recover_after_ms``.

    Source: Nichols and Jacobson, "Controlling Queue Delay", ACM Queue 10(5), 2012, for the delay
    that must stand for an interval.
    """

    def __init__(self, config: DegradeSection, clock: Callable[[], float]) -> None:
        """Make a ladder that nobody stands on."""
        self._floors = config.floors
        self._trigger_s = config.trigger.queue_delay_ms / 1e3
        self._recover_s = config.trigger.recover_after_ms / 1e3
        self._clock = clock
        self._rungs = [(step, share) for step in config.ladder for share in _RUNGS[step]]
        self._level = 0
        self._above_since_s: float | None = None
        self._calm_since_s = clock()

    @property
    def lowest(self) -> int:
        """Return the number of rungs."""
        return len(self._rungs)

    @property
    def level(self) -> int:
        """Return how many rungs down the router is at this moment."""
        if self._level and self._above_since_s is None:
            steps = int((self._clock() - self._calm_since_s) / self._recover_s)
            if steps:
                self._level = max(self._level - steps, 0)
                self._calm_since_s += steps * self._recover_s
        return self._level

    def observe(self, delay_s: float) -> None:
        """Take note of the queue delay at this moment."""
        now_s, level = self._clock(), self.level
        if delay_s <= self._trigger_s:
            if self._above_since_s is not None:
                self._calm_since_s = now_s
            self._above_since_s = None
        elif self._above_since_s is None:
            self._above_since_s = now_s
        elif now_s - self._above_since_s >= INTERVAL_S and level < self.lowest:
            self._level, self._above_since_s = level + 1, now_s

    def check(self, policy: DegradePolicy, spec: ServingSpec) -> None:
        """Check a policy against a generation.

        Raises:
            RequestError: naming the field.
        """
        if policy.min_nprobe > spec.num_clusters:
            raise RequestError(
                "degrade.min_nprobe",
                f"must be in 0..{spec.num_clusters}, got {policy.min_nprobe}",
            )
        for name in policy.required_tasks:
            if name not in spec.item_schema.tasks:
                known = ", ".join(spec.item_schema.tasks) or "none"
                raise RequestError(
                    "degrade.required_tasks",
                    f"unknown task {name[:80]!r}; the model has {known}",
                )

    def reduce(
        self,
        plan: Plan,
        level: int,
        compiled: CompiledRequest,
        policy: DegradePolicy,
        spec: ServingSpec,
        *,
        documents: int,
        eligible: int | None = None,
        returns_tasks: bool = True,
    ) -> Reduced:
        """Return the plan that a request is run with ``level`` rungs down.

        A plan that the request pins, and an exact search, stay as they are. So do numbers that the
        request gives, unless it allows less of them, and a plan for a filter that lets nothing
        through. What is left is meant to find k results where the whole plan does: an answer is
        worse for what the router has to do, not shorter.

        Args:
            plan: what was chosen.
            level: reading of ``level``; all requests of a batch share one.
            compiled: the request.
            policy: what it allows.
            spec: the generation.
            documents: items there are.
            eligible: items that its filter lets through, where they were counted.
            returns_tasks: whether its answer tells the probabilities of tasks.
        """
        fixed = compiled.pinned is not None or compiled.exact or eligible == 0
        if not level or fixed or policy.mode is DegradeMode.NEVER:
            return Reduced(plan)
        left = dict(self._rungs[:level])
        allowed = policy.mode is DegradeMode.ALLOW
        reasons: list[DegradeReason] = []
        found = plan
        if "nprobe" in left and (allowed or not compiled.nprobe):
            count = max(documents if eligible is None else eligible, 1)
            holding = math.ceil(spec.num_clusters * min(_MARGIN * compiled.k, count) / count)
            own = self._floors.nprobe if compiled.nprobe else self._probes_floor(plan, spec)
            floor = max(own, policy.min_nprobe, holding)
            found = _fewer_probes(plan, left["nprobe"], floor, spec)
            if found != plan:
                reasons.append(DegradeReason.NPROBE_REDUCED)
        if "ann_k" in left and (allowed or not compiled.ann_k):
            floor = max(self._floors.ann_k, policy.min_ann_k, compiled.k)
            ann_k = max(math.ceil(plan.ann_k * left["ann_k"]), min(floor, plan.ann_k))
            if ann_k < plan.ann_k:
                found = found._replace(ann_k=ann_k)
                if compiled.semantic_k is None:
                    generated = math.ceil(plan.semantic_k * ann_k / plan.ann_k)
                    found = found._replace(semantic_k=generated)
                reasons.append(DegradeReason.RERANK_DEPTH_REDUCED)
        if "tasks" in left:
            needed = {
                *compiled.tasks_read,
                *policy.required_tasks,
                *self._floors.required_tasks,
            }
            # A reranker that computes one task has computed nearly all of every other one, so
            # work is only saved where none is needed.
            if compiled.tasks and needed.isdisjoint(compiled.tasks):
                found = found._replace(without=compiled.tasks)
                if returns_tasks:
                    reasons.append(DegradeReason.TASKS_SKIPPED)
        return Reduced(found, tuple(reasons))

    def _probes_floor(self, plan: Plan, spec: ServingSpec) -> int:
        """Return the floor of a plan: it grows with what a selective filter makes of the probes."""
        floor, base = self._floors.nprobe, spec.defaults.probes
        if plan.probes <= base:
            return floor
        return math.ceil(floor * _worth(plan, spec) / base)


def _worth(plan: Plan, spec: ServingSpec) -> int:
    """Return the probes whose work a plan costs: reading every page costs no more than half."""
    return min(plan.probes, math.ceil(ALL_PAGES_SHARE * spec.num_clusters))


def _fewer_probes(plan: Plan, share: float, floor: int, spec: ServingSpec) -> Plan:
    worth = _worth(plan, spec)
    probes = max(math.ceil(worth * share), floor, 1)
    if probes >= worth:
        return plan
    kind = PROBE if probes <= spec.defaults.probes else PROBE_WIDE
    return plan._replace(kind=kind, probes=probes)

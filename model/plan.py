"""The plan of a query: how many clusters are probed and how many candidates are kept.

A fixed number of probes loses recall under selective filters, so each query gets a plan from the
number of items that its filter lets through. The plan is an input of the answer: it is named in
it, and a request may pin it.
"""

import math
import re
from typing import NamedTuple

from silvershard.model.limits import MAX_ANN_K
from silvershard.model.semantic_config import MAX_SEMANTIC_K
from silvershard.model.spec import ServingSpec

PROBE = "probe"
PROBE_WIDE = "probe_wide"
ALL_PAGES = "all_pages"
KINDS = (PROBE, PROBE_WIDE, ALL_PAGES)

_PATTERN = re.compile(
    r"(probe|probe_wide|all_pages)\(probes=(\d{1,9}),ann_k=(\d{1,9})(?:,semantic_k=(\d{1,9}))?"
    r"(?:,without=([A-Za-z0-9_+]+))?\)"
)

ALL_PAGES_SHARE = 0.5
"""Probing more than this share of the clusters costs as much as reading every page once."""


class PlanError(ValueError):
    """A plan that cannot run on this generation."""


class Plan(NamedTuple):
    """How one query is searched; global, so the answer does not depend on the shard count."""

    kind: str
    probes: int
    """Clusters probed per head, over the whole catalogue."""
    ann_k: int
    """Candidates per head that pass the scan cut, over the whole catalogue."""
    semantic_k: int = 0
    """Candidates of the decoder of semantic ids, over the whole catalogue; 0: it is not asked."""
    without: tuple[str, ...] = ()
    """Tasks that are not computed, in the order of the schema; the value formula reads none."""

    def __str__(self) -> str:
        """Return the text form that an answer names and a request may pin."""
        semantic = f",semantic_k={self.semantic_k}" if self.semantic_k else ""
        without = f",without={'+'.join(self.without)}" if self.without else ""
        return f"{self.kind}(probes={self.probes},ann_k={self.ann_k}{semantic}{without})"


def parse_plan(text: str, spec: ServingSpec) -> Plan:
    """Return the plan that ``text`` names.

    Raises:
        PlanError: if the text is no plan, or does not fit the generation.
    """
    match = _PATTERN.fullmatch(text.strip())
    if match is None:
        raise PlanError(
            "expected kind(probes=P,ann_k=R) or kind(probes=P,ann_k=R,semantic_k=S), "
            "either with ,without=TASK+TASK at the end, "
            f"with kind one of {', '.join(KINDS)}, "
            f"got {text[:80]!r}"
        )
    without = _tasks(match[5] or "", spec.item_schema.tasks)
    plan = Plan(match[1], int(match[2]), int(match[3]), int(match[4] or 0), without)
    if not 1 <= plan.probes <= spec.num_clusters:
        raise PlanError(f"probes must be in 1..{spec.num_clusters}, got {plan.probes}")
    if not 1 <= plan.ann_k <= MAX_ANN_K:
        raise PlanError(f"ann_k must be in 1..{MAX_ANN_K}, got {plan.ann_k}")
    check_semantic_k(plan.semantic_k, spec)
    if plan.kind == ALL_PAGES and plan.probes != spec.num_clusters:
        raise PlanError(f"all_pages probes {spec.num_clusters} clusters, got {plan.probes}")
    return plan


def _tasks(text: str, known: tuple[str, ...]) -> tuple[str, ...]:
    """Return the named tasks in the order of the schema.

    Raises:
        PlanError: if one is unknown or named twice.
    """
    named = text.split("+") if text else []
    for name in named:
        if name not in known:
            tasks = ", ".join(known) or "none"
            raise PlanError(f"unknown task {name[:80]!r} in without; the model has {tasks}")
    if len(set(named)) < len(named):
        raise PlanError(f"without must name each task once, got {text[:80]}")
    return tuple(name for name in known if name in named)


def check_semantic_k(semantic_k: int, spec: ServingSpec) -> None:
    """Check a number of semantic candidates against a generation.

    Raises:
        PlanError: if it is out of range, or the generation has no semantic ids.
    """
    if semantic_k and spec.semantic is None:
        raise PlanError(
            f"semantic_k must be 0, as model {spec.model} has no semantic ids, got {semantic_k}"
        )
    if not 0 <= semantic_k <= MAX_SEMANTIC_K:
        raise PlanError(f"semantic_k must be in 0..{MAX_SEMANTIC_K}, got {semantic_k}")


def choose_plan(
    spec: ServingSpec,
    *,
    k: int,
    eligible: int | None,
    nprobe: int = 0,
    ann_k: int = 0,
    semantic_k: int | None = None,
    exact: bool = False,
    documents: int | None = None,
) -> Plan:
    """Return the plan for a query whose filter lets ``eligible`` items through.

    Args:
        spec: the generation.
        k: wanted results.
        eligible: items that pass the filter over all shards (an upper bound where Bloom terms are
            involved); None without a filter.
        nprobe: clusters per head asked for by the request; 0 leaves the choice to the plan.
        ann_k: candidates per head asked for by the request; 0 leaves the choice to the plan.
        semantic_k: semantic candidates asked for by the request; 0 turns the source off, None
            leaves the choice to the plan.
        exact: score every eligible item. The decoder is not asked unless the request says so, as
            every eligible item is a candidate anyway.
        documents: items there are now; None: as many as were published.

    Raises:
        PlanError: if ``exact`` would keep more candidates than ``MAX_ANN_K``.
    """
    clusters = spec.num_clusters
    documents = spec.documents if documents is None else documents
    count = documents if eligible is None else min(eligible, documents)
    if exact:
        if count > MAX_ANN_K:
            raise PlanError(
                f"an exact search keeps every eligible item, at most {MAX_ANN_K}; "
                f"{count} are eligible: narrow the filter"
            )
        return Plan(ALL_PAGES, clusters, max(count, k, 1), semantic_k or 0)
    # Refine recovers the exact order only when the scan keeps clearly more than k (architecture 6).
    kept = min(ann_k or max(spec.defaults.ann_k, math.ceil(1.5 * k)), MAX_ANN_K)
    generated = spec.defaults.semantic_k if semantic_k is None else semantic_k
    if nprobe:
        probes = min(nprobe, clusters)
        return Plan(ALL_PAGES if probes == clusters else PROBE, probes, kept, generated)
    base = spec.defaults.probes
    if count == 0:
        return Plan(ALL_PAGES, clusters, kept, generated)
    by_selectivity = math.ceil(base * documents / count)
    by_candidates = math.ceil(clusters * min(kept, count) / count)
    probes = max(base, by_selectivity, by_candidates)
    if probes == base:
        return Plan(ALL_PAGES if base == clusters else PROBE, base, kept, generated)
    if probes > ALL_PAGES_SHARE * clusters:
        return Plan(ALL_PAGES, clusters, kept, generated)
    return Plan(PROBE_WIDE, probes, kept, generated)

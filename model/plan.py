"""The plan of a query: how many clusters are probed and how many candidates are kept.

A fixed number of probes loses recall under selective filters, so each query gets a plan from the
number of items that its filter lets through. The plan is an input of the answer: it is named in
it, and a request may pin it.
"""

import math
import re
from typing import NamedTuple

from silvershard.model.spec import MAX_ANN_K, ServingSpec

PROBE = "probe"
PROBE_WIDE = "probe_wide"
ALL_PAGES = "all_pages"
KINDS = (PROBE, PROBE_WIDE, ALL_PAGES)

_PATTERN = re.compile(r"(probe|probe_wide|all_pages)\(probes=(\d{1,9}),ann_k=(\d{1,9})\)")

# Probing more than this share of the clusters costs as much as reading every page once.
_ALL_PAGES_SHARE = 0.5


class PlanError(ValueError):
    """A plan that cannot run on this generation."""


class Plan(NamedTuple):
    """How one query is searched; global, so the answer does not depend on the shard count."""

    kind: str
    probes: int
    """Clusters probed per head, over the whole catalogue."""
    ann_k: int
    """Candidates per head that pass the scan cut, over the whole catalogue."""

    def __str__(self) -> str:
        """Return the text form that an answer names and a request may pin."""
        return f"{self.kind}(probes={self.probes},ann_k={self.ann_k})"


def parse_plan(text: str, spec: ServingSpec) -> Plan:
    """Return the plan that ``text`` names.

    Raises:
        PlanError: if the text is no plan, or does not fit the generation.
    """
    match = _PATTERN.fullmatch(text.strip())
    if match is None:
        raise PlanError(
            f"expected kind(probes=P,ann_k=R) with kind one of {', '.join(KINDS)}, "
            f"got {text[:80]!r}"
        )
    plan = Plan(match[1], int(match[2]), int(match[3]))
    if not 1 <= plan.probes <= spec.num_clusters:
        raise PlanError(f"probes must be in 1..{spec.num_clusters}, got {plan.probes}")
    if not 1 <= plan.ann_k <= MAX_ANN_K:
        raise PlanError(f"ann_k must be in 1..{MAX_ANN_K}, got {plan.ann_k}")
    if plan.kind == ALL_PAGES and plan.probes != spec.num_clusters:
        raise PlanError(f"all_pages probes {spec.num_clusters} clusters, got {plan.probes}")
    return plan


def choose_plan(
    spec: ServingSpec,
    *,
    k: int,
    eligible: int | None,
    nprobe: int = 0,
    ann_k: int = 0,
    exact: bool = False,
) -> Plan:
    """Return the plan for a query whose filter lets ``eligible`` items through.

    Args:
        spec: the generation.
        k: wanted results.
        eligible: items that pass the filter over all shards (an upper bound where Bloom terms are
            involved); None without a filter.
        nprobe: clusters per head asked for by the request; 0 leaves the choice to the plan.
        ann_k: candidates per head asked for by the request; 0 leaves the choice to the plan.
        exact: score every eligible item.

    Raises:
        PlanError: if ``exact`` would keep more candidates than ``MAX_ANN_K``.
    """
    clusters = spec.num_clusters
    count = spec.documents if eligible is None else min(eligible, spec.documents)
    if exact:
        if count > MAX_ANN_K:
            raise PlanError(
                f"an exact search keeps every eligible item, at most {MAX_ANN_K}; "
                f"{count} are eligible: narrow the filter"
            )
        return Plan(ALL_PAGES, clusters, max(count, k, 1))
    # Refine recovers the exact order only when the scan keeps clearly more than k (architecture 6).
    kept = min(ann_k or max(spec.defaults.ann_k, math.ceil(1.5 * k)), MAX_ANN_K)
    if nprobe:
        probes = min(nprobe, clusters)
        return Plan(ALL_PAGES if probes == clusters else PROBE, probes, kept)
    base = spec.defaults.probes
    if count == 0:
        return Plan(ALL_PAGES, clusters, kept)
    by_selectivity = math.ceil(base * spec.documents / count)
    by_candidates = math.ceil(clusters * min(kept, count) / count)
    probes = max(base, by_selectivity, by_candidates)
    if probes == base:
        return Plan(ALL_PAGES if base == clusters else PROBE, base, kept)
    if probes > _ALL_PAGES_SHARE * clusters:
        return Plan(ALL_PAGES, clusters, kept)
    return Plan(PROBE_WIDE, probes, kept)

"""How much of an exact search's answer a plan finds: measured once, looked up for every answer.

Shapes: K depths, R numbers of candidates, P numbers of probes.
"""

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import replace
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator

from silvershard.model.plan import ALL_PAGES, PROBE, PROBE_WIDE, Plan
from silvershard.model.quality import overlap_at_k
from silvershard.model.request import Request
from silvershard.model.retriever import Retriever
from silvershard.model.spec import ServingSpec

DEPTHS = (10, 100)
"""Numbers of results that are measured."""
FEWEST_PROBES = 8
"""Of the measured ones, where the default has no fewer; overload leaves so many."""

_EXACT_ITEMS = 20_000
"""Beyond so many items the best of so many by the embeddings stand for all."""
_AT_ONCE = 16


class RecallCalibration(BaseModel):
    """What requests without a filter found of their exact answers, by depth, candidates, probes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    requests: int = Field(ge=1, description="requests that were measured")
    semantic: bool = Field(description="whether the decoder of semantic ids was asked")
    ks: tuple[int, ...] = Field(min_length=1, description="(K,) results, ascending")
    ann_ks: tuple[int, ...] = Field(min_length=1, description="(R,) candidates, ascending")
    probes: tuple[int, ...] = Field(min_length=1, description="(P,) clusters, ascending")
    recall: tuple[tuple[tuple[float, ...], ...], ...] = Field(
        description="(K, R, P) mean share of the exact answer that was found, 0..1"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name in ("ks", "ann_ks", "probes"):
            axis = getattr(self, name)
            if axis[0] < 1 or list(axis) != sorted(set(axis)):
                raise ValueError(f"{name} must be ascending numbers from 1, got {axis}")
        shape = len(self.ks), len(self.ann_ks), len(self.probes)
        table = np.array(self.recall, dtype=object)
        if table.shape != shape or not all(0 <= one <= 1 for one in table.flatten()):
            raise ValueError(f"recall must be of shape {shape} and in 0..1, got {table.shape}")
        return self

    def estimate(
        self, plan: Plan, *, k: int, documents: int, eligible: int | None = None
    ) -> float | None:
        """Return the share of an exact answer that a plan is expected to find, 0..1.

        None where nothing like it was measured: more results, fewer candidates or probes than any,
        another use of the decoder, or a filter, unless all that it lets through are candidates.

        Args:
            plan: that was run.
            k: results that were wanted.
            documents: items there are.
            eligible: items that the filter lets through; None without a filter.
        """
        count = documents if eligible is None else eligible
        if plan.kind == ALL_PAGES and plan.ann_k >= count:
            return 1.0
        within = k <= self.ks[-1] and plan.ann_k >= self.ann_ks[0] and plan.probes >= self.probes[0]
        if eligible is not None or not within or bool(plan.semantic_k) != self.semantic:
            return None
        # Fewer results are found at least as well, and more candidates find no less.
        depth = bisect_left(self.ks, k)
        table = np.array(self.recall[depth])  # (R, P)
        by_candidates = _interpolated(self.ann_ks, table, plan.ann_k)
        return float(_interpolated(self.probes, by_candidates[:, None], plan.probes)[0])


def _interpolated(axis: Sequence[int], values: NDArray[np.float64], at: int) -> NDArray[np.float64]:
    """Return the values at a point of their first axis, linear in its logarithm."""
    logs = np.log(np.array(axis, dtype=np.float64))
    place = float(np.clip(math.log(at), logs[0], logs[-1]))
    return np.array([np.interp(place, logs, column) for column in values.T])


@torch.inference_mode()
def calibrate(retriever: Retriever, users: Sequence[Request]) -> RecallCalibration | None:
    """Return what plans find of the exact answers to some users; None without items or users.

    Args:
        retriever: the generation, over all its documents.
        users: their features and excluded ids count.
    """
    spec = retriever.spec
    if not spec.documents or not users:
        return None
    ks = sorted({min(one, spec.documents) for one in DEPTHS})
    ann_ks, probes = _axes(spec, ks[-1])
    asked = [Request(features=one.features, exclude_ids=one.exclude_ids, k=ks[-1]) for one in users]
    if spec.documents <= _EXACT_ITEMS:
        wanted = _ids(retriever, [replace(one, exact=True) for one in asked])
    else:
        most = Plan(ALL_PAGES, spec.num_clusters, _EXACT_ITEMS)
        wanted = _ids(retriever, [replace(one, plan=str(most)) for one in asked])
    recall = np.zeros((len(ks), len(ann_ks), len(probes)))
    for row, ann_k in enumerate(ann_ks):
        for column, clusters in enumerate(probes):
            plan = _plan(spec, ann_k, clusters)
            found = _ids(retriever, [replace(one, plan=str(plan)) for one in asked])
            for depth, k in enumerate(ks):
                recall[depth, row, column] = overlap_at_k(found, wanted, k).mean()
    return RecallCalibration(
        requests=len(users),
        semantic=bool(spec.defaults.semantic_k),
        ks=tuple(ks),
        ann_ks=tuple(ann_ks),
        probes=tuple(probes),
        recall=tuple(
            tuple(tuple(round(float(one), 6) for one in row) for row in table) for table in recall
        ),
    )


def _axes(spec: ServingSpec, most: int) -> tuple[list[int], list[int]]:
    """Return the numbers of candidates and of probes that are measured."""
    kept, base, clusters = spec.defaults.ann_k, spec.defaults.probes, spec.num_clusters
    ann_ks = {math.ceil(kept / 4), math.ceil(kept / 2), kept, max(kept, math.ceil(1.5 * most))}
    probes = {min(FEWEST_PROBES, base), math.ceil(base / 2), base, min(2 * base, clusters)}
    probes |= {min(4 * base, clusters), math.ceil(clusters / 2), clusters}
    return sorted(ann_ks), sorted(probes)


def _plan(spec: ServingSpec, ann_k: int, probes: int) -> Plan:
    """Return the plan of a request without a filter; it asks the decoder as overload does."""
    generated = math.ceil(spec.defaults.semantic_k * min(ann_k / spec.defaults.ann_k, 1.0))
    if probes == spec.num_clusters:
        return Plan(ALL_PAGES, probes, ann_k, generated)
    return Plan(PROBE if probes <= spec.defaults.probes else PROBE_WIDE, probes, ann_k, generated)


def _ids(retriever: Retriever, requests: Sequence[Request]) -> NDArray[np.int64]:
    """Return the ids of the answers, ``(B, K)`` int64, -1 where there are fewer."""
    ids = np.full((len(requests), requests[0].k), -1, dtype=np.int64)
    for start in range(0, len(requests), _AT_ONCE):
        for at, answer in enumerate(retriever(requests[start : start + _AT_ONCE]), start=start):
            found = answer.item_ids
            ids[at, : len(found)] = found
    return ids

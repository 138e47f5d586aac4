"""The answer to one request, as the module and every cluster of it give it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from silvershard.model.compiled_request import CompiledRequest
from silvershard.model.counts import Counts
from silvershard.model.plan import Plan
from silvershard.model.spec import ServingSpec
from silvershard.model.types import RoundOne, RoundTwo, StageTimes


@dataclass(frozen=True)
class Answer:
    """Results best first, without padding."""

    item_ids: Tensor
    """``(K,)`` int64."""
    scores: Tensor
    """``(K,)`` float32 values."""
    refined: Tensor
    """``(K,)`` float32 inner products."""
    task_scores: Mapping[str, Tensor]
    """``(K,)`` float32 probability per task that the plan has computed."""
    plan: Plan
    exhausted: bool
    """True when fewer than k eligible items exist: every cluster was scanned, nothing was cut."""
    counts: Counts
    warnings: tuple[str, ...] = ()
    times: StageTimes = field(default_factory=dict)


def split_answers(
    compiled: Sequence[CompiledRequest],
    plans: Sequence[Plan],
    warnings: Sequence[tuple[str, ...]],
    first: RoundOne,
    second: RoundTwo,
    spec: ServingSpec,
    eligible: Sequence[int | None],
    times: StageTimes,
    *,
    documents: int | None = None,
) -> list[Answer]:
    """Return one answer per request of a batch.

    Args:
        compiled: B requests.
        plans: the plan of each.
        warnings: what the encoder has to say of each.
        first: the merged first round, for its counts.
        second: the merged second round, at least as wide as the largest k.
        spec: the generation.
        eligible: items the filter of each request lets through, where it was counted.
        times: stage times of the batch.
        documents: items there are by now; None: as many as were published.
    """
    addressed = spec.documents if documents is None else documents
    answers = []
    found = (second.item_ids >= 0).sum(1).tolist()
    heads = spec.item_schema.heads
    intersected = spec.item_schema.head_merge == "intersection"
    for at, (request, plan) in enumerate(zip(compiled, plans, strict=True)):
        size = min(request.k, found[at])
        short = size < request.k
        whole = plan.probes == spec.num_clusters
        # A head that kept fewer than R kept all that is eligible; as many as R may be a cut, unless
        # no more can be eligible. Over all clusters every head sees the same items; an intersection
        # may be smaller than what its heads kept.
        count, kept, most = eligible[at], int(second.kept[at]), plan.ann_k
        if whole:
            most *= len(heads)
        elif not intersected:
            kept = found[at]
        # Items may have come since they were counted; over all clusters the scan counts again.
        bound = addressed
        if count is not None:
            bound = max(count, int(first.eligible[at]) // len(heads))
        uncut = kept < most or plan.ann_k >= bound
        # The decoder searches exactly: less than was asked of it is all that is eligible.
        all_found = int(second.semantic_kept[at]) < plan.semantic_k
        said = list(warnings[at])
        if not short or all_found:
            pass
        elif not uncut:
            said.append(
                f"only {size} of {request.k} results were kept by the scan: raise search.ann_k, "
                f"now {plan.ann_k}"
            )
        elif not whole:
            said.append(
                f"only {size} of {request.k} results lie in the {plan.probes} probed clusters "
                f"of {spec.num_clusters}: raise search.nprobe"
            )
        answers.append(
            Answer(
                item_ids=second.item_ids[at, :size],
                scores=second.values[at, :size],
                refined=second.refined[at, :size],
                task_scores={
                    name: second.tasks[at, :size, column]
                    for column, name in enumerate(spec.item_schema.tasks)
                    if name not in plan.without
                },
                plan=plan,
                exhausted=short and (all_found or (whole and uncut)),
                counts=Counts(
                    addressed=addressed,
                    probed=int(first.probed[at]),
                    eligible=eligible[at],
                    ann_kept=int(second.kept[at]),
                    reranked=int(second.reranked[at]),
                    semantic_kept=int(second.semantic_kept[at]),
                ),
                warnings=tuple(said),
                times=times,
            )
        )
    return answers

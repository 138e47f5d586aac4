"""An answer as the public message.

Shapes: K results.
"""

import math

from silvershard.cluster import retrieval_pb2
from silvershard.cluster.codec import coverage_to
from silvershard.cluster.field_columns import column_to
from silvershard.cluster.outcome import DegradeReason
from silvershard.cluster.rounds import Served
from silvershard.model.dtypes import ValueType
from silvershard.model.recall_calibration import RecallCalibration
from silvershard.model.schema import Schema


def response_of(
    served: Served, schema: Schema, *, task_scores: bool
) -> retrieval_pb2.RetrieveResponse:
    """Return an answer as a message, without what the router knows of the request.

    Args:
        served: the answer.
        schema: gives the types of the fields.
        task_scores: whether the request asked for them.
    """
    answer = served.answer
    counts = answer.counts
    message = retrieval_pb2.RetrieveResponse(
        item_ids=answer.item_ids.tolist(),
        scores=answer.scores.tolist(),
        exhausted=answer.exhausted,
        coverage=coverage_to(served.coverage),
        counts=retrieval_pb2.StageCounts(
            addressed=counts.addressed,
            probed=counts.probed,
            eligible=counts.eligible,
            ann_kept=counts.ann_kept,
            reranked=counts.reranked,
            semantic_kept=counts.semantic_kept,
        ),
        timings_us={name: min(spent, 2**32 - 1) for name, spent in answer.times.items()},
        warnings=answer.warnings,
        plan=str(answer.plan),
    )
    if task_scores:
        for name, column in answer.task_scores.items():
            message.task_scores[name].values.extend(column.tolist())
            message.task_scores[name].SetInParent()
    dtypes: dict[str, ValueType] = {one.name: one.dtype for one in schema.fields}
    for name, values in served.fields.items():
        message.fields[name].CopyFrom(column_to(values, dtypes[name]))
    return message


def expected_recall(
    calibration: RecallCalibration | None, served: Served, message: retrieval_pb2.RetrieveRequest
) -> float | None:
    """Return the share of an exact answer over all documents that is expected in an answer.

    None where it was not measured: for a generation, for a plan, or for the order that a formula of
    the request's own or default rows in place of the user's make.
    """
    coverage, counts = served.coverage, served.answer.counts
    own_order = bool(message.value or message.task_weights)
    uncounted = bool(message.filter) and counts.eligible is None
    fallback = DegradeReason.EMBEDDING_FALLBACK in coverage.reasons
    if calibration is None or own_order or uncounted or fallback:
        return None
    # Those shards that answered have the candidates of all to themselves.
    plan = served.answer.plan
    deep = math.ceil(plan.ann_k / coverage.documents) if coverage.documents else plan.ann_k
    found = calibration.estimate(
        plan._replace(ann_k=deep),
        k=message.k,
        documents=counts.addressed,
        eligible=counts.eligible if message.filter else None,
    )
    # The best items are as likely to be in a shard as any documents. Where one is missing, more of
    # the results are of the others, so that this is the least that is expected.
    return None if found is None else found * coverage.documents

"""An answer as the public message.

Shapes: K results.
"""

from silvershard.cluster import retrieval_pb2
from silvershard.cluster.codec import coverage_to
from silvershard.cluster.field_columns import column_to
from silvershard.cluster.rounds import Served
from silvershard.model.dtypes import ValueType
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

from typing import Any

import numpy as np
import torch

from silvershard.cluster import retrieval_pb2
from silvershard.cluster.codec import coverage_from
from silvershard.cluster.field_columns import column_from
from silvershard.cluster.outcome import Coverage, ShardOutcome
from silvershard.cluster.response import response_of
from silvershard.cluster.rounds import Served
from silvershard.model.answer import Answer
from silvershard.model.counts import Counts
from silvershard.model.plan import Plan

PARTIAL = Coverage(
    documents=0.5,
    shards_total=2,
    shards_full=1,
    shards_failed=1,
    reasons=("SHARD_TIMEOUT",),
    shards=(ShardOutcome(1, "0", "DEADLINE_EXCEEDED", ("SHARD_TIMEOUT",), 75, 1000, 1),),
)


def test_an_answer_becomes_a_response_bit_for_bit(whole: Any) -> None:
    scores = torch.tensor([1 / 3, -0.0, -3.4028234e38])
    answer = Answer(
        item_ids=torch.tensor([2**62, 0, 7]),
        scores=scores,
        refined=scores,
        task_scores={"rated": torch.tensor([0.1, 0.2, 0.3]), "liked": torch.tensor([0.0] * 3)},
        plan=Plan("probe", 4, 40),
        exhausted=True,
        counts=Counts(600, 500, 0, 40, 39, 12),
        warnings=("said",),
        times={"total": 2**40, "ann": 3},
    )
    served = Served(answer, PARTIAL, {"title": ["a", None, "c"], "year": [1, 2, None]})
    message = response_of(served, whole.spec.item_schema, task_scores=True)
    message = retrieval_pb2.RetrieveResponse.FromString(message.SerializeToString())
    assert list(message.item_ids) == [2**62, 0, 7]
    got = np.array(message.scores, dtype=np.float32)
    assert got.tobytes() == scores.numpy().tobytes()
    rated = np.array(message.task_scores["rated"].values, dtype=np.float32)
    assert rated.tobytes() == answer.task_scores["rated"].numpy().tobytes()
    assert list(message.task_scores["liked"].values) == [0.0] * 3
    assert column_from(message.fields["title"]) == ["a", None, "c"]
    assert column_from(message.fields["year"]) == [1, 2, None]
    assert message.exhausted
    assert message.plan == "probe(probes=4,ann_k=40)"
    assert message.counts.semantic_kept == 12
    assert message.counts.HasField("eligible")
    assert dict(message.timings_us) == {"total": 2**32 - 1, "ann": 3}
    assert coverage_from(message.coverage) == PARTIAL
    bare = response_of(served, whole.spec.item_schema, task_scores=False)
    assert len(bare.task_scores) == 0

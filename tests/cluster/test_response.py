from typing import Any

import numpy as np
import pytest
import torch

from silvershard.cluster import retrieval_pb2
from silvershard.cluster.codec import coverage_from
from silvershard.cluster.field_columns import column_from
from silvershard.cluster.outcome import Coverage, ShardOutcome
from silvershard.cluster.response import expected_recall, response_of
from silvershard.cluster.rounds import Served
from silvershard.model.answer import Answer
from silvershard.model.counts import Counts
from silvershard.model.plan import Plan
from silvershard.model.recall_calibration import RecallCalibration

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


CALIBRATION = RecallCalibration(
    requests=9, semantic=False, ks=(10,), ann_ks=(40,), probes=(2, 4), recall=(((0.5, 0.8),),)
)


def answered(plan: Plan, eligible: int | None = None, **coverage: Any) -> Served:
    answer = Answer(
        item_ids=torch.tensor([7]),
        scores=torch.tensor([1.0]),
        refined=torch.tensor([1.0]),
        task_scores={},
        plan=plan,
        exhausted=False,
        counts=Counts(600, 500, eligible, 40, 39, 0),
        warnings=(),
        times={},
    )
    return Served(answer, Coverage(**{**FULL, **coverage}))


FULL: dict[str, Any] = {"documents": 1.0, "shards_total": 2, "shards_full": 2, "shards_failed": 0}
PROBED = Plan("probe", 4, 40)
Asked = retrieval_pb2.RetrieveRequest


def test_the_plan_that_was_run_and_the_documents_that_answered_make_the_expectation() -> None:
    def expected(served: Served, **fields: Any) -> float | None:
        return expected_recall(CALIBRATION, served, Asked(k=10, **fields))

    assert expected(answered(PROBED)) == pytest.approx(0.8)
    assert expected(answered(Plan("probe", 2, 40))) == pytest.approx(0.5)
    half = {"documents": 0.5, "shards_full": 1, "shards_failed": 1}
    assert expected(answered(PROBED, **half)) == pytest.approx(0.4)
    exact = Plan("all_pages", 16, 600)
    assert expected(answered(exact, **half)) == pytest.approx(0.5)
    assert expected(answered(exact, 90), filter="year > 3") == 1.0


@pytest.mark.parametrize(
    ("served", "fields"),
    [
        (answered(PROBED), {"value": "score"}),
        (answered(PROBED), {"task_weights": {"liked": 2.0}}),
        (answered(PROBED, 90), {"filter": "year > 3"}),
        (answered(PROBED, None), {"filter": "year > 3"}),
        (answered(PROBED, reasons=("EMBEDDING_FALLBACK",)), {}),
    ],
)
def test_what_was_not_measured_has_no_expectation(served: Served, fields: dict[str, Any]) -> None:
    assert expected_recall(CALIBRATION, served, Asked(k=10, **fields)) is None
    assert expected_recall(None, answered(PROBED), Asked(k=10)) is None


def test_an_expectation_is_part_of_the_message_only_where_there_is_one(whole: Any) -> None:
    for expected in (None, 0.0, 0.75):
        served = answered(PROBED, expected_recall=expected)
        message = response_of(served, whole.spec.item_schema, task_scores=False)
        assert message.coverage.HasField("expected_recall") == (expected is not None)
        assert coverage_from(message.coverage).expected_recall == expected

import pickle

from silvershard.cluster.outcome import (
    Coverage,
    CoverageLost,
    CoverageTimedOut,
    DegradeReason,
    ShardOutcome,
)
from silvershard.shard.errors import CoverageError, DeadlineExceeded

LOST = Coverage(
    documents=0.25,
    shards_total=2,
    shards_full=1,
    shards_failed=1,
    reasons=(DegradeReason.SHARD_TIMEOUT.value,),
    shards=(ShardOutcome(1, "0", "DEADLINE_EXCEEDED", ("SHARD_TIMEOUT",), 75, 1000, 1),),
)


def test_a_coverage_is_degraded_when_it_has_a_reason() -> None:
    assert LOST.degraded
    assert not Coverage(1.0, 2, 2, 0).degraded


def test_a_further_reason_is_named_once_and_in_order() -> None:
    whole = Coverage(1.0, 2, 2, 0).because(DegradeReason.EMBEDDING_FALLBACK)
    assert whole.degraded
    assert whole.documents == 1.0
    both = LOST.because(DegradeReason.EMBEDDING_FALLBACK)
    assert both.reasons == ("EMBEDDING_FALLBACK", "SHARD_TIMEOUT")
    assert both.because(DegradeReason.EMBEDDING_FALLBACK) == both


def test_errors_carry_the_coverage_and_say_what_was_required() -> None:
    lost, late = CoverageLost(LOST, 0.9), CoverageTimedOut(LOST, 0.9)
    assert isinstance(lost, CoverageError)
    assert isinstance(late, DeadlineExceeded)
    assert "0.2500 of the documents answered, at least 0.9000 are required" in str(lost)
    assert "time ran out when 0.2500" in str(late)


def test_that_no_shard_answered_is_said_in_words() -> None:
    nothing = Coverage(0.0, 2, 0, 2, ("SHARD_UNAVAILABLE",))
    assert str(CoverageLost(nothing, 0.0)) == "no shard answered"
    assert "no shard had answered" in str(CoverageTimedOut(nothing, 0.5))


def test_errors_survive_pickling() -> None:
    for error in (CoverageLost(LOST, 0.9), CoverageTimedOut(LOST, 0.9)):
        again = pickle.loads(pickle.dumps(error))
        assert type(again) is type(error)
        assert str(again) == str(error)
        assert again.coverage == LOST
        assert again.minimum == 0.9

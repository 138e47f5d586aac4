import pickle

from silvershard.cluster import retrieval_pb2
from silvershard.cluster.codec import refused, status_of
from silvershard.cluster.consistency import UpdateToken
from silvershard.cluster.updates import (
    ApplyResult,
    Durability,
    LoggedNotApplied,
    UpdateRejection,
    result_from,
    result_to,
)

RESULT = ApplyResult(
    (UpdateToken(9, 0, 5),),
    (UpdateRejection(3, "ABORTED", "is older", 8), UpdateRejection(4, "NOT_FOUND", "gone")),
)


def test_an_outcome_comes_through_unchanged() -> None:
    data = result_to(RESULT).SerializeToString()
    assert result_from(retrieval_pb2.ApplyResponse.FromString(data)) == RESULT


def test_a_code_of_another_release_is_unknown() -> None:
    message = retrieval_pb2.ApplyResponse()
    message.rejected.add(code=99)
    assert result_from(message).rejected[0].code == "UNKNOWN"


def test_durabilities_are_those_of_the_wire() -> None:
    for one in Durability:
        assert retrieval_pb2.Durability.Name(one.value) == f"DURABILITY_{one.name}"


def test_what_is_logged_but_not_applied_keeps_its_outcome() -> None:
    error = LoggedNotApplied(RESULT)
    assert "2 others are rejected" in str(error)
    assert pickle.loads(pickle.dumps(error)).result == RESULT
    status = status_of(error)
    found = refused("DEADLINE_EXCEEDED", status.message, status.details)
    assert (found.reason, found.logged) == ("LOGGED_NOT_APPLIED", RESULT)


def test_the_status_of_many_rejections_stays_small() -> None:
    many = RESULT._replace(rejected=RESULT.rejected * 1000)
    status = status_of(LoggedNotApplied(many))
    assert status.ByteSize() < 2000
    assert "2000 others are rejected" in status.message
    found = refused("DEADLINE_EXCEEDED", status.message, status.details)
    assert found.logged == RESULT._replace(rejected=())

from typing import Any

import pytest

from silvershard.cluster import retrieval_pb2
from silvershard.cluster.codec import coverage_to, status_of
from silvershard.cluster.load import IN_FLIGHT_LIMIT, OK, Entry
from silvershard.cluster.load_outcome import Outcome, judge, record_line
from silvershard.cluster.outcome import Coverage, CoverageLost


def answer(coverage: float = 1.0, reasons: tuple[str, ...] = ()) -> retrieval_pb2.RetrieveResponse:
    found = Coverage(coverage, 4, 4, 0, reasons)
    message = retrieval_pb2.RetrieveResponse(item_ids=[9, 4], coverage=coverage_to(found))
    message.version.generation = 3
    message.version.shard_map_version = 12
    message.version.cut.add(partition=1, position=70)
    message.version.cut.add(partition=0, position=60)
    return message


def entry(body: bytes = b"", code: str = OK, took_s: float = 0.1) -> Entry:
    return Entry(5, 2.0, 2.01, 2.0 + took_s, code, body)


@pytest.mark.parametrize(
    ("message", "took_s", "outcome"),
    [
        (answer(), 0.1, Outcome.OK),
        (answer(reasons=("UPDATES_LAGGING",)), 0.1, Outcome.DEGRADED),
        (answer(0.75, ("SHARD_TIMEOUT",)), 0.1, Outcome.PARTIAL),
        (answer(0.75, ("SHARD_TIMEOUT",)), 1.1, Outcome.LATE),
    ],
)
def test_an_answer_counts_by_what_it_says_and_when_it_came(
    message: Any, took_s: float, outcome: Outcome
) -> None:
    judged = judge(entry(message.SerializeToString(), took_s=took_s), 1.0)
    assert (judged.outcome, judged.code) == (outcome, OK)
    assert judged.coverage == message.coverage.documents


def test_an_error_counts_by_its_code_and_says_how_much_was_covered() -> None:
    lost = Coverage(0.5, 2, 1, 1, ("SHARD_UNAVAILABLE",))
    status = status_of(CoverageLost(lost, 0.9))
    judged = judge(entry(status.SerializeToString(), "UNAVAILABLE"), 1.0)
    assert (judged.outcome, judged.code, judged.coverage) == (Outcome.ERROR, "UNAVAILABLE", 0.5)
    assert judged.reasons == ("SHARD_UNAVAILABLE",)
    assert "0.5" in judged.message


@pytest.mark.parametrize("body", [b"", b"\xff\xff"])
def test_an_error_without_details_is_one(body: bytes) -> None:
    judged = judge(entry(body, "UNAVAILABLE"), 1.0)
    assert (judged.outcome, judged.coverage, judged.reasons) == (Outcome.ERROR, None, ())


def test_bytes_that_are_no_answer_are_an_error() -> None:
    judged = judge(entry(b"\xff\xff"), 1.0)
    assert (judged.outcome, judged.code) == (Outcome.ERROR, "UNREADABLE")


def test_what_was_not_sent_is_no_error_of_the_cluster() -> None:
    judged = judge(entry(code=IN_FLIGHT_LIMIT), 1.0)
    assert (judged.outcome, judged.code) == (Outcome.UNSENT, IN_FLIGHT_LIMIT)


def test_a_line_of_a_record_holds_what_a_checker_reads() -> None:
    one = entry(answer(0.75, ("SHARD_TIMEOUT",)).SerializeToString())
    line = record_line(
        one,
        judge(one, 1.0),
        request={"index": 4, "k": 2},
        router="host:1",
        zero_s=1.5,
        zero_unix_s=1_000.0,
    )
    assert line == {
        "kind": "query",
        "number": 5,
        "at_s": 0.5,
        "sent_s": 0.51,
        "done_s": 0.6,
        "unix_s": 1000.5,
        "code": "OK",
        "outcome": "partial",
        "message": "",
        "request": {"index": 4, "k": 2},
        "ids": [9, 4],
        "exhausted": False,
        "plan": "",
        "generation": 3,
        "cut": [60, 70],
        "coverage": 0.75,
        "reasons": ["SHARD_TIMEOUT"],
        "shard_map_version": 12,
        "router": "host:1",
    }

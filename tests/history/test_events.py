import json
from typing import Any

import pytest
from history.events import (
    CatalogueEvent,
    FaultEvent,
    HistoryError,
    Lost,
    QueryEvent,
    Token,
    WriteEvent,
    event_of,
    numbered,
    read,
    said_of,
)

EVENTS = [
    CatalogueEvent(generation=1, num_partitions=64, items={"3": {"kind": ["a"]}}, marker=("t", 1)),
    WriteEvent(
        item_id=3,
        op="upsert",
        version=2,
        invoked_s=1.0,
        done_s=2.0,
        outcome="acked",
        tokens=(Token(7, 0, 9),),
        attributes={"kind": ["a"]},
    ),
    FaultEvent(name="kill", begin_s=1.0, end_s=2.0, excuses=True),
    QueryEvent(
        sent_s=1.0,
        done_s=2.0,
        request={"k": 3, "after": [[7, 0, 9]]},
        ids=(3,),
        cut=(Token(7, 0, 9),),
        coverage=0.5,
        reasons=("SHARD_TIMEOUT",),
        shards_total=2,
        lost=(Lost(1, 50, ("SHARD_TIMEOUT",)),),
    ),
]


def test_events_survive_a_file() -> None:
    lines = [f"{json.dumps(said_of(one))}\n" for one in EVENTS]
    assert list(read(lines)) == numbered(EVENTS)
    assert [one.line for one in read(lines)] == [1, 2, 3, 4]


def test_what_is_as_by_default_is_not_said() -> None:
    assert said_of(FaultEvent(name="kill", begin_s=1.0, end_s=2.0)) == {
        "kind": "fault",
        "name": "kill",
        "begin_s": 1.0,
        "end_s": 2.0,
    }


def test_who_records_may_keep_more() -> None:
    said = {"kind": "query", "sent_s": 1.0, "done_s": 2.0, "host": "a"}
    assert event_of(said) == QueryEvent(sent_s=1.0, done_s=2.0)


def test_a_line_that_was_cut_by_a_crash_is_left_out() -> None:
    whole = json.dumps(said_of(EVENTS[2]))
    assert len(list(read([f"{whole}\n", whole[:20]]))) == 1
    with pytest.raises(HistoryError, match="line 1: "):
        list(read([f"{whole[:20]}\n", whole]))


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"kind": "song"}, "line 5: kind must be one of query, write, .* got 'song'"),
        ({"kind": "query", "sent_s": 1.0}, "line 5: done_s is required of kind query"),
        ({"kind": "write", "op": "burn"}, "item_id is required of kind write"),
    ],
)
def test_an_event_that_lacks_something_is_refused(wrong: Any, reason: str) -> None:
    with pytest.raises(HistoryError, match=reason):
        event_of(wrong, 5)


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("op", "burn", "op must be one of upsert, patch, delete, got 'burn'"),
        ("outcome", "maybe", "outcome must be one of acked, refused, unknown, got 'maybe'"),
        ("version", 0, "version must be above 0, got 0"),
    ],
)
def test_a_write_says_what_it_was(field: str, value: Any, reason: str) -> None:
    with pytest.raises(HistoryError, match=reason):
        event_of({**said_of(EVENTS[1]), field: value})


@pytest.mark.parametrize(
    ("event", "failure"),
    [
        (QueryEvent(sent_s=1.0, done_s=2.0), ""),
        (
            QueryEvent(sent_s=1.0, done_s=2.0, code="UNAVAILABLE", message="no shard"),
            "it was refused with UNAVAILABLE (no shard)",
        ),
        (QueryEvent(sent_s=1.0, done_s=2.5, deadline_s=1.0), "it took 1.500 s of 1.000 s"),
        (EVENTS[3], "it covers 0.500000 for SHARD_TIMEOUT"),
    ],
)
def test_a_failure_is_told_in_words(event: Any, failure: str) -> None:
    assert event.failure == failure

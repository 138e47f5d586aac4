from dataclasses import replace
from typing import Any

import pytest
from history.events import Token, WriteEvent
from history.item_states import ABSENT, ANYTHING, ItemHistory, State

PLACE = (7, 0)
ANY_TIME = float("inf")


def write(version: int, op: str = "upsert", at: int | None = None, **more: Any) -> WriteEvent:
    fields = {} if op == "delete" else {"title": version}
    tokens = () if at is None else (Token(*PLACE, at),)
    return WriteEvent(
        item_id=1,
        op=op,
        version=version,
        outcome="unknown" if at is None else "acked",
        tokens=tokens,
        **{"invoked_s": float(version), "done_s": version + 0.5, "fields": fields, **more},
    )


def titles(states: list[State]) -> list[Any]:
    return [one.fields.get("title") if one.is_there else None for one in states]


@pytest.mark.parametrize(("reached", "must"), [(0, 0), (4, 0), (5, 1), (8, 1), (9, 3)])
def test_who_has_reached_a_token_must_show_what_it_stands_for(reached: int, must: int) -> None:
    own = ItemHistory([write(1, at=5), write(2), write(3, at=9)])
    assert own.must({PLACE: reached}, ANY_TIME, float("-inf"), 0.0) == must


def test_all_tokens_of_a_call_must_be_reached() -> None:
    both = (Token(7, 0, 5), Token(7, 1, 3))
    own = ItemHistory([replace(write(1, at=5), tokens=both)])
    assert own.must({(7, 0): 5}, ANY_TIME, float("-inf"), 0.0) == 0
    assert own.must({(7, 0): 5, (7, 1): 3}, ANY_TIME, float("-inf"), 0.0) == 1


def test_updates_of_no_known_outcome_may_be_in_or_not() -> None:
    own = ItemHistory([write(1, at=1), write(2, "patch"), write(3, "delete")])
    possible = own.possible(ABSENT, 1, ANY_TIME)
    assert titles(possible.states) == [1, 2, None]
    assert titles(possible.older()) == [None]


def test_a_patch_of_one_column_keeps_what_may_have_been_before() -> None:
    own = ItemHistory(
        [
            write(1, at=1, fields={"title": "a", "year": 1}),
            write(2, "patch", fields={"title": "b"}),
            write(3, "patch", at=3, fields={"year": 2}),
        ]
    )
    possible = own.possible(ABSENT, 3, ANY_TIME)
    assert [one.fields for one in possible.states] == [
        {"title": "a", "year": 2},
        {"title": "b", "year": 2},
    ]


def test_what_was_sent_after_an_answer_is_not_in_it() -> None:
    own = ItemHistory([write(1, at=1), write(2, at=2), write(3, at=3)])
    assert titles(own.possible(ABSENT, 0, 2.2).states) == [None, 1, 2]
    assert own.must({PLACE: 9}, 2.2, float("-inf"), 0.0) == 2


def test_of_an_unknown_item_nothing_is_known_until_it_is_written() -> None:
    own = ItemHistory([write(1, "patch", at=1), write(2, "delete", at=2)])
    states = own.possible(ANYTHING, 0, ANY_TIME).states
    assert [one.is_known for one in states] == [False, False, True]


def test_what_an_answer_shows_is_known_from_then_on() -> None:
    own = ItemHistory([write(1, at=1), write(2), write(3)])
    shown = [one for one in own.possible(ABSENT, 1, ANY_TIME).states if one.fields["title"] == 2]
    own.note(10.0, own.least(ABSENT, 1, ANY_TIME, shown))
    assert own.proven(10.0) == 0.0
    assert own.proven(10.1) == 2.0


def test_too_many_doubts_leave_nothing_known() -> None:
    doubts = [write(at, "patch", fields={f"column {at}": at}) for at in range(2, 10)]
    own = ItemHistory([write(1, at=1), *doubts])
    assert own.states(ABSENT)[-1] == [ANYTHING]

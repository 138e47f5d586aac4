from collections.abc import Callable
from typing import Any

import pytest
from history.events import HistoryError
from history.placing import shard_of

GONE = "no_resurrected_delete"
STALE = "read_your_writes"
HONEST = "coverage_honesty"
MIXED = "no_mixed_generation"
INELIGIBLE = "no_ineligible_item"
WHOLE = "seen_whole"
CUT = "cut_is_monotone_per_token"
FAILED = "no_failed_request"
RECOVERY = "bounded_recovery"


def test_a_history_of_nothing_is_right_and_proves_nothing(said: Any) -> None:
    report = said.report()
    report.require()
    with pytest.raises(AssertionError, match="nothing was there to look at for seen_whole"):
        report.require(WHOLE)


def test_only_properties_that_exist_can_be_asked_for(said: Any) -> None:
    with pytest.raises(ValueError, match=r"names must be of coverage_honesty, .* got speed"):
        said.report(names=["speed"])


def test_a_violation_says_what_where_of_whom_and_why(said: Any) -> None:
    said.catalogue()
    said.write(50, 1, at=1)
    said.write(50, 2, "delete", at=2)
    said.query([50], ["v1"], cut=2)
    (violation,) = said.report().violations
    assert str(violation) == (
        "no_resurrected_delete: line 4, 3 of item 50: it is there after the delete of version 2"
    )
    with pytest.raises(AssertionError, match="1 violations:\nno_resurrected_delete: line 4"):
        said.report().require()


# Duplicates.


@pytest.mark.parametrize(("ids", "twice"), [([1, 2, 1], (1,)), ([3, 3, 1, 1], (1, 3))])
def test_an_item_that_comes_twice_is_a_duplicate(said: Any, ids: Any, twice: Any) -> None:
    said.catalogue()
    line = said.query(ids)
    assert said.wrong() == [("no_duplicate", (line,), twice)]


def test_the_same_item_in_two_answers_is_none(said: Any) -> None:
    said.catalogue()
    said.query([1, 2])
    said.query([2, 1])
    assert said.wrong() == []


# Generations.


def test_a_title_of_another_generation_is_mixed_in(said: Any) -> None:
    said.catalogue(1)
    said.catalogue(2)
    said.query([1, 2], ["G1", "G1"])
    line = said.query([1, 2], ["G1", "G2"])
    assert said.wrong() == [(MIXED, (line,), (2,))]


def test_an_answer_whose_stamp_is_not_that_of_its_items_is_mixed(said: Any) -> None:
    said.catalogue(1)
    said.catalogue(2)
    line = said.query([1, 2], ["G1", "G1"], generation=2)
    assert said.wrong() == [(MIXED, (line,), (1, 2))]


def test_an_item_that_only_another_generation_holds_is_mixed_in(said: Any) -> None:
    said.catalogue(1, items={"1": {}})
    said.catalogue(2, items={"1": {}, "2": {}})
    line = said.query([1, 2])
    said.query([1, 2], generation=2)
    assert said.wrong() == [(MIXED, (line,), (2,))]


def test_a_generation_answers_only_once_somebody_made_it_live(said: Any) -> None:
    said.catalogue(1)
    said.catalogue(2)
    said.query([1], ["G1"])
    early = said.query([1], ["G2"], generation=2)
    activated = said.activate(2)
    said.query([1], ["G2"], generation=2)
    said.query([1], ["G1"], generation=1)
    assert said.wrong() == [(MIXED, (early, activated), ())]


def test_a_generation_that_a_request_pins_may_answer_before(said: Any) -> None:
    said.catalogue(1)
    said.catalogue(2)
    said.query([1], ["G1"])
    said.query([1], ["G2"], generation=2, request={"k": 1, "generation": 2})
    said.query([1], ["G2"], generation=2, request={"k": 1, "alias": "canary"})
    said.activate(2)
    assert said.wrong() == []


def test_the_generation_that_serves_first_may_be_any(said: Any) -> None:
    said.catalogue(1)
    said.catalogue(2)
    said.query([1], ["G2"], generation=2)
    line = said.query([1], ["G1"])
    activated = said.activate(1)
    said.query([1], ["G1"])
    assert said.wrong() == [(MIXED, (line, activated), ())]


def test_an_updated_item_has_no_generation(said: Any) -> None:
    said.catalogue(1)
    said.catalogue(2)
    said.write(1, 1, at=1)
    said.query([1], ["v1"], generation=2, cut=1)
    assert said.wrong() == []


# Deletes.


@pytest.mark.parametrize("how", ["cut", "token", "settled"])
def test_an_acked_delete_is_in_no_answer_that_must_see_it(said: Any, how: str) -> None:
    said.catalogue()
    said.write(50, 1, at=1)
    deleted = said.write(50, 2, "delete", at=2)
    seeing = {
        "cut": {"cut": 2},
        "token": {"cut": 2, "request": {"k": 9, "after": [[7, 0, 2]]}},
        "settled": {"settled": True},
    }[how]
    line = said.query([50], ["v1"], **seeing)
    assert said.wrong() == [(GONE, (line, deleted), (50,))]


def test_a_published_item_that_was_deleted_stays_away(said: Any) -> None:
    said.catalogue()
    deleted = said.write(1, 1, "delete", at=4)
    said.query([1, 2], ["G1", "G1"], cut=3)
    line = said.query([1, 2], ["G1", "G1"], cut=4)
    assert said.wrong() == [(GONE, (line, deleted), (1,))]


def test_a_delete_that_a_swap_forgets_is_found(said: Any) -> None:
    said.catalogue(1)
    said.catalogue(2)
    deleted = said.write(1, 1, "delete", at=4)
    said.activate(2)
    line = said.query([1], ["G2"], generation=2, cut=4)
    assert said.wrong() == [(GONE, (line, deleted), (1,))]


def test_an_answer_of_before_the_delete_may_hold_the_item(said: Any) -> None:
    said.catalogue()
    said.write(50, 1, at=1)
    said.write(50, 2, "delete", at=2)
    said.query([50], ["v1"], cut=1)
    assert said.wrong() == []


def test_an_item_that_was_written_again_may_be_there(said: Any) -> None:
    said.catalogue()
    said.write(50, 1, "delete", at=1)
    said.write(50, 2, at=2)
    said.query([50], ["v2"], cut=1)
    said.query([50], ["v2"], cut=2)
    assert said.wrong() == []


def test_a_delete_that_nobody_answered_may_have_happened_or_not(said: Any, exact: Any) -> None:
    said.catalogue(items={})
    said.write(50, 1, at=1)
    said.write(50, 2, "delete", outcome="unknown")
    said.write(51, 1, at=3)
    said.query([50, 51], ["v1", "v1"], cut=3, request=exact())
    said.query([51], ["v1"], cut=3, request=exact())
    said.query([50, 51], ["v1", "v1"], cut=3, request=exact())
    assert said.wrong() == []


def test_a_delete_that_was_seen_has_happened_for_all_that_came_after(said: Any, exact: Any) -> None:
    said.catalogue(items={})
    said.write(50, 1, at=1)
    deleted = said.write(50, 2, "delete", outcome="unknown")
    said.query([], [], cut=1, request=exact())
    said.query([50], ["v1"], cut=1, request=exact())
    # Sent after the delete was seen, so it is behind the delete in the log.
    said.write(51, 1, at=3)
    line = said.query([50, 51], ["v1", "v1"], cut=3, request=exact())
    assert said.wrong() == [(GONE, (line, deleted), (50,))]


def test_an_update_of_before_proves_nothing_of_what_was_seen_later(said: Any, exact: Any) -> None:
    said.catalogue(items={})
    said.write(50, 1, at=1)
    said.write(50, 2, "delete", outcome="unknown")
    said.write(51, 1, at=2)
    said.query([51], ["v1"], cut=2, request=exact())
    said.query([50, 51], ["v1", "v1"], cut=2, request=exact())
    assert said.wrong() == []


def test_an_item_whose_time_is_over_may_be_gone(said: Any, exact: Any) -> None:
    said.catalogue(items={})
    said.write(50, 1, at=1, ttl_s=10.0, invoked_s=101.0)
    early = said.query([], [], cut=1, request=exact(), sent_s=105.0, done_s=106.0)
    said.query([], [], cut=1, request=exact(), sent_s=110.0, done_s=112.0)
    said.query([50], ["v1"], cut=1, request=exact(), sent_s=111.0, done_s=112.0)
    assert said.wrong() == [(STALE, (early, 2), (50,))]


# What was written is read.


def test_a_token_shows_what_was_written(said: Any) -> None:
    said.catalogue()
    said.write(50, 1, at=1)
    written = said.write(50, 2, at=2)
    said.query([50], ["v1"], cut=1)
    request = {"k": 9, "after": [[7, 0, 2]]}
    said.query([50], ["v2"], cut=2, request=request)
    line = said.query([50], ["v1"], cut=2, request=request)
    assert said.wrong() == [(STALE, (line, written), (50,))]


def test_an_answer_shows_at_least_what_its_cut_says(said: Any) -> None:
    said.catalogue()
    patched = said.write(1, 1, "patch", at=1, attributes={}, fields={"title": "v1"})
    line = said.query([1], ["G1"], cut=1)
    said.query([1], ["v1"], cut=0)
    assert said.wrong() == [(STALE, (line, patched), (1,))]


def test_an_acked_item_that_is_missing_where_it_must_be_was_not_read(said: Any, exact: Any) -> None:
    said.catalogue()
    written = said.write(50, 1, at=1)
    request = exact("kind:w")
    said.query([], cut=0, request=request)
    line = said.query([], cut=1, request=request)
    assert said.wrong() == [(STALE, (line, written), (50,))]


def test_a_newer_version_than_the_token_is_as_good(said: Any, exact: Any) -> None:
    said.catalogue()
    said.write(50, 1, at=1)
    said.write(50, 2, outcome="unknown")
    said.write(50, 3, at=3)
    request = exact("kind:w", after=[[7, 0, 1]])
    for version in (1, 2, 3):
        said.query([50], [f"v{version}"], cut=1, request=request)
    assert said.wrong() == []


def test_an_update_that_was_sent_again_is_one_update(said: Any, exact: Any) -> None:
    said.catalogue()
    said.write(50, 1, outcome="unknown")
    written = said.write(50, 1, at=1)
    said.query([], cut=0, request=exact("kind:w"))
    line = said.query([], cut=1, request=exact("kind:w"))
    assert said.wrong() == [(STALE, (line, 2, written), (50,))]


def test_what_was_said_before_sending_gives_way_to_what_came_of_it(said: Any, exact: Any) -> None:
    said.catalogue()
    said.write(50, 1, outcome="unknown", invoked_s=103.0)
    said.write(50, 1, outcome="refused", invoked_s=103.0)
    line = said.query([50], ["v1"], cut=0)
    assert said.wrong() == [(INELIGIBLE, (line,), (50,))]


def test_an_update_that_was_refused_when_sent_again_may_be_there_all_the_same(said: Any) -> None:
    said.catalogue()
    said.write(50, 1, outcome="unknown")
    said.write(50, 1, outcome="refused")
    said.query([50], ["v1"], cut=0)
    assert said.wrong() == []


def test_two_updates_of_one_version_make_no_history(said: Any) -> None:
    said.write(50, 1, at=1)
    said.write(50, 1, at=1, fields={"title": "other"})
    with pytest.raises(HistoryError, match="line 2: version 1 of item 50 is of another update"):
        said.report()


def test_a_patch_that_was_acked_proves_that_its_item_was_there(said: Any, exact: Any) -> None:
    said.catalogue(items={})
    said.write(50, 1, outcome="unknown")
    patched = said.write(50, 2, "patch", at=2, attributes={}, fields={"title": "v2"})
    said.query([50], ["v2"], cut=2, request=exact())
    line = said.query([], cut=2, request=exact())
    assert said.wrong() == [(STALE, (line, patched), (50,))]


# Eligibility.


@pytest.mark.parametrize(
    ("text", "ids", "wrong"),
    [
        ("kind:b", [1], [1]),
        ("NOT kind:a", [2], [2]),
        ("year >= 2002", [1, 2, 3], [1]),
        ("kind:$wanted", [1], [1]),
    ],
)
def test_an_item_that_its_filter_keeps_out_is_ineligible(
    said: Any, text: str, ids: Any, wrong: Any
) -> None:
    said.catalogue()
    params = {"wanted": "b"} if "$" in text else {}
    line = said.query(ids, request={"k": 3, "filter": text, "params": params})
    assert said.wrong() == [(INELIGIBLE, (line,), (one,)) for one in wrong]


def test_an_item_is_as_eligible_as_its_newest_version(said: Any) -> None:
    said.catalogue()
    written = said.write(1, 1, "patch", at=1, attributes={"kind": ["b"]}, fields={})
    request = {"k": 9, "filter": "kind:a"}
    said.query([1], cut=0, request=request)
    line = said.query([1], cut=1, request=request)
    # It shows nothing that would tell the version; the one before would pass.
    assert said.wrong() == [(STALE, (line, written), (1,))]


def test_an_item_that_nobody_published_or_wrote_is_ineligible(said: Any) -> None:
    said.catalogue()
    line = said.query([1, 99], ["G1", "x"])
    assert said.wrong() == [(INELIGIBLE, (line,), (99,))]


def test_an_item_of_the_future_is_ineligible(said: Any) -> None:
    said.catalogue()
    line = said.query([50], ["v1"], cut=0)
    said.write(50, 1, at=1)
    assert said.wrong() == [(INELIGIBLE, (line,), (50,))]


def test_an_excluded_item_is_ineligible(said: Any) -> None:
    said.catalogue()
    line = said.query([1, 2], request={"k": 9, "exclude_ids": [2]})
    assert said.wrong() == [(INELIGIBLE, (line,), (2,))]


def test_a_request_for_unverified_answers_may_get_others(said: Any) -> None:
    said.catalogue()
    said.query([1], request={"k": 9, "filter": "kind:b", "filter_mode": "BLOOM"})
    assert said.wrong() == []


def test_an_update_in_doubt_lets_both_be_right(said: Any, exact: Any) -> None:
    said.catalogue(items={"1": {"kind": ["a"]}})
    said.write(1, 1, "patch", outcome="unknown", attributes={"kind": ["b"]}, fields={})
    for text in ("kind:a", "kind:b"):
        said.query([1], request=exact(text))
        said.query([], request=exact(text))
    assert said.wrong() == []


def test_of_a_catalogue_that_nobody_recorded_nothing_is_ineligible(said: Any, exact: Any) -> None:
    said.catalogue(items=None)
    said.query([1, 99], ["G1", "x"], request=exact("kind:b"))
    said.query([1, 99], ["G1", "x"], generation=9, request=exact("kind:b"))
    assert said.wrong() == []


# An item is seen whole.


def test_an_item_that_is_half_of_one_version_is_not_seen_whole(said: Any) -> None:
    said.catalogue()
    said.write(50, 1, at=1)
    said.write(50, 2, at=2)
    # The filter reads the second version, the title is of the first, and both may be there.
    line = said.query([50], ["v1"], cut=1, request={"k": 9, "filter": "year = 2"})
    assert said.wrong() == [(WHOLE, (line, 2), (50,))]


def test_fields_of_two_versions_are_not_of_one(said: Any) -> None:
    said.catalogue()
    said.write(50, 1, at=1, fields={"title": "x", "year": 1})
    said.write(50, 2, at=2, fields={"title": "y", "year": 2})
    said.query([50], fields={"title": ["x"], "year": [1]}, cut=1)
    line = said.query([50], fields={"title": ["y"], "year": [1]}, cut=1)
    assert said.wrong() == [(WHOLE, (line, 2), (50,))]


def test_a_title_that_nobody_wrote_is_of_no_version(said: Any) -> None:
    said.catalogue()
    line = said.query([1], ["G7"])
    assert said.wrong() == [(WHOLE, (line,), (1,))]


def test_a_patch_in_doubt_may_be_shown_or_not(said: Any) -> None:
    said.catalogue()
    said.write(50, 1, at=1)
    said.write(50, 2, "patch", outcome="unknown", attributes={}, fields={"title": "p2"})
    said.write(50, 3, "patch", at=3, attributes={"year": 3}, fields={})
    for title in ("v1", "p2"):
        said.query([50], [title], cut=3, request={"k": 9, "filter": "year = 3"})
    assert said.wrong() == []


# Coverage.


def test_an_answer_below_its_minimum_is_no_answer(said: Any) -> None:
    said.catalogue()
    partial = {"coverage": 0.5, "reasons": ["SHARD_TIMEOUT"]}
    said.query([1], request={"k": 9, "min_coverage": 0.5}, **partial)
    line = said.query([1], request={"k": 9, "min_coverage": 0.6}, **partial)
    assert said.wrong(names=[HONEST]) == [(HONEST, (line,), ())]


@pytest.mark.parametrize(
    "wrong",
    [
        {"coverage": 0.5},
        {"coverage": 1.5},
        {"coverage": 0.0, "reasons": ["SHARD_TIMEOUT"]},
        {"coverage": 0.9, "reasons": ["SHARD_TIMEOUT"], "exhausted": True},
        {"coverage": 0.9, "reasons": ["SHARD_TIMEOUT"], "shards_total": 2},
        {"coverage": 1.0, "shards_total": 2, "lost": [[0, 2, []]]},
    ],
)
def test_a_coverage_that_contradicts_itself_is_dishonest(said: Any, wrong: Any) -> None:
    line = said.query([1], **wrong)
    assert said.wrong(names=[HONEST]) == [(HONEST, (line,), ())]


def shards(num_shards: int) -> list[list[int]]:
    """Return which of the published items each shard has."""
    return [
        [item for item in range(4) if shard_of(item, 16, num_shards) == one]
        for one in range(num_shards)
    ]


def test_the_coverage_is_that_of_the_documents_of_the_shards(said: Any) -> None:
    lost, kept, _ = shards(3)
    assert lost
    assert kept
    named = {"shards_total": 3, "lost": [[0, len(lost), ["SHARD_TIMEOUT"]]], "addressed": 4}
    how = {"reasons": ["SHARD_TIMEOUT"], **named}
    said.catalogue()
    said.query(kept, coverage=len(kept) / 4, **how)
    by_shards = said.query(kept, coverage=0.9, **how)
    other = {**how, "lost": [[0, len(lost) + 1, ["SHARD_TIMEOUT"]]]}
    documents = said.query(kept, coverage=1 - (len(lost) + 1) / 4, **other)
    unexplained = said.query(kept, coverage=len(kept) / 4, **{**how, "reasons": ["OTHER"]})
    assert said.wrong(names=[HONEST]) == [
        (HONEST, (line,), ()) for line in (by_shards, documents, unexplained)
    ]


def test_documents_that_were_written_meanwhile_may_count_or_not(said: Any) -> None:
    lost, kept, _ = shards(3)
    new = next(item for item in range(50, 90) if shard_of(item, 16, 3) == 0)
    said.catalogue()
    said.write(new, 1, outcome="unknown")
    for more in (0, 1):
        named = [[0, len(lost) + more, ["SHARD_TIMEOUT"]]]
        said.query(
            kept,
            coverage=len(kept) / (4 + more),
            addressed=4 + more,
            shards_total=3,
            lost=named,
            reasons=["SHARD_TIMEOUT"],
        )
    assert said.wrong(names=[HONEST]) == []


def test_an_answer_holds_nothing_of_a_shard_that_it_lacks(said: Any) -> None:
    lost, kept, _ = shards(3)
    said.catalogue()
    line = said.query(
        [*kept, lost[0]],
        coverage=len(kept) / 4,
        shards_total=3,
        lost=[[0, len(lost), ["SHARD_TIMEOUT"]]],
        reasons=["SHARD_TIMEOUT"],
    )
    assert said.wrong(names=[HONEST]) == [(HONEST, (line,), (lost[0],))]


def test_full_coverage_lacks_no_item_of_any_shard(said: Any, exact: Any) -> None:
    said.catalogue()
    said.query([0, 1, 2, 3], request=exact())
    line = said.query([0, 1, 3], request=exact())
    exhausted = said.query([0, 1, 2], request={"k": 9}, exhausted=True)
    assert said.wrong() == [(HONEST, (line,), (2,)), (HONEST, (exhausted,), (3,))]


def test_an_answer_lacks_only_items_of_the_shards_that_it_names(said: Any, exact: Any) -> None:
    lost, kept, _ = shards(3)
    partial = {
        "coverage": len(kept) / 4,
        "shards_total": 3,
        "lost": [[0, len(lost), ["SHARD_TIMEOUT"]]],
        "reasons": ["SHARD_TIMEOUT"],
        "request": exact(),
    }
    said.catalogue()
    said.query(kept, **partial)
    line = said.query(kept[1:], **partial)
    assert said.wrong(names=[HONEST]) == [(HONEST, (line,), (kept[0],))]


@pytest.mark.parametrize(
    "how",
    [
        {"request": {"k": 9}},
        {"request": {"k": 2, "exact": True}},
        {"request": {"k": 9, "exact": True}, "warnings": ["only 2 of 9 results were kept"]},
        {"request": {"k": 9, "exact": True, "filter": "year < 2002"}},
        {"request": {"k": 9, "exact": True, "exclude_ids": [2, 3]}},
    ],
)
def test_an_answer_that_need_not_hold_all_may_lack_some(said: Any, how: Any) -> None:
    said.catalogue()
    said.query([0, 1], **how)
    assert said.wrong() == []


def test_an_error_holds_no_items(said: Any) -> None:
    line = said.query([1], code="UNAVAILABLE")
    assert said.wrong(names=[HONEST]) == [(HONEST, (line,), ())]


# Tokens and cuts.


def test_a_cut_reaches_every_token_of_its_request(said: Any) -> None:
    request = {"k": 9, "after": [[7, 0, 5]]}
    said.query([], cut=5, request=request)
    said.query([], cut=9, request=request)
    line = said.query([], cut=4, request=request)
    assert said.wrong() == [(CUT, (line,), ())]


def test_a_cut_of_another_partition_or_log_reaches_no_token(said: Any) -> None:
    lines = [
        said.query([], cut=9, request={"k": 9, "after": [[7, 1, 5]]}),
        said.query([], cut=9, request={"k": 9, "after": [[8, 0, 5]]}),
    ]
    assert said.wrong() == [(CUT, (line,), ()) for line in lines]


def test_a_cut_may_go_back_for_who_shows_no_token(said: Any) -> None:
    said.query([], cut=9)
    said.query([], cut=4)
    assert said.wrong() == []


# Failures and recovery.


@pytest.mark.parametrize(
    "failing",
    [
        {"code": "UNAVAILABLE"},
        {"code": "DEADLINE_EXCEEDED"},
        {"ids": [], "deadline_s": 0.4},
        {"ids": [], "coverage": 0.9, "reasons": ["SHARD_TIMEOUT"]},
    ],
)
def test_a_request_fails_only_for_a_fault_that_excuses_it(said: Any, failing: Any) -> None:
    said.fault(excuses=False)
    line = said.query(**failing)
    assert said.wrong() == [(FAILED, (line,), ())]


def test_a_request_that_was_called_off_did_not_fail(said: Any) -> None:
    said.query(code="CANCELLED")
    assert said.wrong() == []
    line = said.query(code="ABORTED")
    assert said.wrong(uncounted=["CANCELLED"]) == [(FAILED, (line,), ())]
    assert said.wrong(uncounted=["CANCELLED", "ABORTED"]) == []


def failing(said: Any, sent_s: float, line_of: Callable[..., int] | None = None) -> int:
    return (line_of or said.query)(code="UNAVAILABLE", sent_s=sent_s, done_s=sent_s + 0.1)


OUTAGE = {"begin_s": 200.0, "end_s": 210.0, "excuses": True, "recovery_s": 5.0}


def test_requests_may_fail_while_a_fault_lasts_and_until_it_must_be_over(said: Any) -> None:
    for sent_s in (199.95, 200.0, 205.0, 210.0, 215.0):
        failing(said, sent_s)
    said.fault(**OUTAGE)
    said.query([], sent_s=215.2, done_s=215.3)
    report = said.report()
    report.require(RECOVERY, FAILED)


def test_a_fault_that_lasts_too_long_is_named(said: Any) -> None:
    line = failing(said, 215.1)
    fault = said.fault(**OUTAGE)
    said.query([], sent_s=216.0, done_s=216.1)
    assert said.wrong() == [(RECOVERY, (line, fault), ())]


def test_once_recovered_a_late_failure_is_one_of_its_own(said: Any) -> None:
    said.fault(**OUTAGE)
    said.query([], sent_s=212.0, done_s=212.1)
    line = failing(said, 216.0)
    before = failing(said, 199.0)
    assert said.wrong() == [(FAILED, (line,), ()), (FAILED, (before,), ())]


def test_a_fault_without_a_limit_excuses_until_the_first_success(said: Any) -> None:
    said.fault(**{**OUTAGE, "recovery_s": None})
    failing(said, 290.0)
    said.query([], sent_s=300.0, done_s=300.1)
    line = failing(said, 301.0)
    assert said.wrong() == [(FAILED, (line,), ())]


def test_a_fault_may_cost_so_many_requests_and_no_more(said: Any) -> None:
    fault = said.fault(**OUTAGE, may_fail=2)
    lines = [failing(said, 201.0), failing(said, 202.0)]
    assert said.wrong() == []
    lines.append(failing(said, 203.0))
    assert said.wrong() == [(RECOVERY, (fault, *lines), ())]

from silvershard.cluster import follower
from silvershard.deploy.readiness import NOTHING, REMEMBERED, Key, Readiness, refusals
from silvershard.deploy.shard_host import Held

LIVE, COMING = 1, 2
Refused = tuple[tuple[int, str], ...]


def held(*cut: int, refused: Refused = ()) -> Held:
    return Held("prepared", "", 9, cut, cut, 0.0, 0, 0, len(refused), refused)


def process(live: tuple[int, ...], coming: tuple[int, ...]) -> dict[int, Held]:
    return {LIVE: held(*live), COMING: held(*coming)}


def test_who_has_less_of_any_log_partition_is_behind() -> None:
    readiness = Readiness()
    reports = {(0, 0): process((5, 7), (5, 7)), (1, 0): process((5, 7), (9, 6))}
    assert readiness.observe(reports, LIVE, COMING, 0.0) == (
        "shard 1.0 is at position 9, 6 of the update log, the live generation at 5, 7"
    )
    reports[1, 0] = process((5, 7), (9, 7))
    assert readiness.observe(reports, LIVE, COMING, 10.0) == ""


def test_without_a_log_nobody_is_behind() -> None:
    assert Readiness().observe({(0, 0): process((), ())}, LIVE, COMING, 0.0) == ""


def test_who_keeps_pace_is_level_although_the_live_one_is_always_a_batch_ahead() -> None:
    readiness, said = Readiness(), []
    for step in range(40):
        reports: dict[Key, dict[int, Held]] = {
            (0, 0): process((step + 1,), (step,)),
            (1, 0): process((step,), (step + 1,)),
        }
        said.append(readiness.observe(reports, LIVE, COMING, 0.2 * step))
    assert said[0] != ""
    assert said[5:] == [""] * 35


def test_who_stops_is_behind_after_a_second() -> None:
    readiness = Readiness()
    assert readiness.observe({(0, 0): process((5,), (5,))}, LIVE, COMING, 0.0) == ""
    stopped = {(0, 0): process((6,), (5,))}
    assert readiness.observe(stopped, LIVE, COMING, 0.9) == ""
    assert "at position 5 of the update log, the live generation at 6" in readiness.observe(
        stopped, LIVE, COMING, 1.1
    )


def test_who_holds_no_live_generation_is_measured_by_its_replicas() -> None:
    readiness = Readiness()
    reports = {
        (0, 0): {COMING: held(5)},
        (0, 1): {LIVE: held(6)},
        (0, 2): {LIVE: held(4)},
        (1, 0): {COMING: held(1)},
    }
    assert readiness.observe(reports, LIVE, COMING, 0.0) == (
        "shard 0.0 is at position 5 of the update log, the live generation at 6"
    )
    reports[0, 0] = {COMING: held(6)}
    assert readiness.observe(reports, LIVE, COMING, 0.1) == ""


def test_a_process_that_comes_again_begins_anew() -> None:
    readiness = Readiness()
    reports = {(0, 0): process((5,), (5,))}
    assert readiness.observe(reports, LIVE, COMING, 0.0) == ""
    assert readiness.observe({(0, 0): {LIVE: held(5)}}, LIVE, COMING, 0.1) == ""
    behind = {(0, 0): process((5,), (4,))}
    assert readiness.observe(behind, LIVE, COMING, 0.2) != ""
    assert readiness.observe({}, LIVE, COMING, 0.3) == ""


def test_what_both_refused_is_not_lacking() -> None:
    one, two = (7, "too many values"), (8, "no embedding")
    both = {(0, 0): {LIVE: held(5, refused=(one, two)), COMING: held(5, refused=(two, one))}}
    assert refusals(both, LIVE, COMING) == NOTHING
    more = {
        **both,
        (1, 0): {LIVE: held(5, refused=(one,)), COMING: held(5, refused=(one, two))},
        (1, 1): {COMING: held(5, refused=(two,))},
    }
    assert refusals(more, LIVE, COMING).refused == (
        "it refused updates of 1 items that the live one took; item 8: no embedding"
    )


def test_what_any_replica_of_the_shard_refused_the_live_one_did_not_take() -> None:
    poison = ((7, "too many values"),)
    reports = {
        (0, 0): {COMING: held(5, refused=poison)},
        (0, 1): {LIVE: held(5, refused=poison)},
        (1, 0): {LIVE: held(5)},
    }
    assert refusals(reports, LIVE, COMING) == NOTHING
    # Another shard says nothing about it.
    reports[0, 1], reports[1, 0] = reports[1, 0], reports[0, 1]
    assert "it refused updates of 1 items" in refusals(reports, LIVE, COMING).refused


def test_tables_are_told_apart_by_what_is_said_of_them() -> None:
    other = held(5, refused=((-1, "no such table b"),))
    reports = {(0, 0): {LIVE: held(5, refused=((-1, "no such table a"),)), COMING: other}}
    assert "item -1: no such table b" in refusals(reports, LIVE, COMING).refused
    reports[0, 0][LIVE] = other
    assert refusals(reports, LIVE, COMING) == NOTHING


def test_where_more_was_refused_than_is_remembered_nothing_can_be_said() -> None:
    assert REMEMBERED == follower._REMEMBERED
    many = tuple((item, "poison") for item in range(REMEMBERED))
    reports = {(0, 0): {LIVE: held(5, refused=many), COMING: held(5, refused=((999, "poison"),))}}
    found = refusals(reports, LIVE, COMING)
    assert (found.refused, found.early) == ("", "")
    assert "took what shards 0 refused is not known" in found.unknown
    reports[0, 0][LIVE] = held(5, refused=many[1:])
    assert refusals(reports, LIVE, COMING).refused != ""


def test_the_live_one_may_still_come_to_what_the_coming_one_refused() -> None:
    reports = {(0, 0): {LIVE: held(4), COMING: held(5, refused=((7, "poison"),))}}
    assert refusals(reports, LIVE, COMING) == NOTHING._replace(
        early="the live one has not come to all that shards 0 refused"
    )
    reports[0, 0][LIVE] = held(5)
    assert refusals(reports, LIVE, COMING).refused != ""


def test_new_processes_are_measured_by_the_furthest_old_one_whatever_its_shard() -> None:
    readiness = Readiness()
    old = [held(5, 2), held(4, 7)]
    new = {(0, 0): held(5, 7), (2, 1): held(5, 6)}
    assert readiness.observe_new(new, old, 0.0) == (
        "shard 2.1 is at position 5, 6 of the update log, the live generation at 5, 7"
    )
    assert readiness.observe_new({**new, (2, 1): held(6, 7)}, old, 10.0) == ""
    assert Readiness().observe_new(new, [], 0.0) == ""

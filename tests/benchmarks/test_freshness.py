from itertools import islice

import numpy as np
import pytest

from benchmarks import freshness
from benchmarks import live_catalogue as live
from silvershard.cluster.updates import ItemDelete, ItemPatch, ItemUpsert


def stream(*answers: tuple[float, float, int]) -> freshness.Stream:
    """Return a stream of answers: when due, when done, and the position of the cut."""
    due, done, positions = zip(*answers, strict=True)
    return freshness.Stream(due_s=[*due], done_s=[*done], positions=[*positions])


def test_an_ack_is_visible_with_the_first_answer_that_reflects_it() -> None:
    seen = stream((0.0, 1.0, 3), (1.0, 2.0, 5), (2.0, 3.0, 9))
    lag = freshness.lags([(0.5, 2), (0.75, 4), (1.0, 5), (1.5, 6)], seen)
    assert lag.tolist() == [0.5, 1.25, 1.0, 1.5]


def test_answers_that_overtake_each_other_count_in_order_of_arrival() -> None:
    seen = stream((0.0, 4.0, 1), (1.0, 2.0, 7))
    assert freshness.lags([(1.5, 7)], seen).tolist() == [0.5]


def test_an_ack_that_no_answer_followed_is_left_out_and_one_already_seen_took_no_time() -> None:
    seen = stream((0.0, 1.0, 3))
    assert freshness.lags([(0.0, 4), (2.0, 3)], seen).tolist() == [0.0]


def test_latency_counts_from_when_a_query_was_due_within_the_span() -> None:
    seen = stream((0.0, 0.5, 1), (1.0, 1.25, 1), (2.0, 2.75, 1))
    assert seen.percentile(100) == pytest.approx(750)
    assert seen.percentile(100, 1.0, 2.0) == pytest.approx(250)


def test_updates_come_in_their_shares_and_nothing_follows_a_delete() -> None:
    made = list(islice(live.updates(5000, seed=0), 4000))
    kinds = {ItemPatch: 0.7, ItemUpsert: 0.2, ItemDelete: 0.1}
    for kind, share in kinds.items():
        assert sum(isinstance(one, kind) for one in made) / len(made) == pytest.approx(
            share, abs=0.03
        )
    gone: set[int] = set()
    for one in made:
        assert one.item_id not in gone
        if isinstance(one, ItemDelete):
            gone.add(one.item_id)
    assert {one.item_id % 2 for one in made if one.item_id < 5000} == {0}


def test_canaries_are_new_items_and_each_has_a_year_of_its_own() -> None:
    made = live.canaries(5)
    years = [one.attributes["year"] for one in made]
    assert years == [live.CANARY_YEAR + row for row in range(5)]
    assert len({one.item_id for one in made}) == 5


def test_items_depend_on_the_seed_alone_and_fit_their_schema() -> None:
    ids = np.arange(50, dtype=np.int64)
    one, other = live.items(ids, seed=3), live.items(ids, seed=3)
    one.validate(live.schema())
    assert (one.signals == other.signals).all()
    assert (one.features["words"].values == other.features["words"].values).all()

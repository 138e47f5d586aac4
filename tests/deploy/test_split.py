from dataclasses import replace

import numpy as np
import pytest

from silvershard.deploy import movielens
from silvershard.deploy.csv_files import DataError
from silvershard.deploy.dataset import MovieLens, from_ratings
from silvershard.deploy.split import split
from silvershard.deploy.synthetic import generate
from silvershard.model.catalogue import Ragged, as_column
from silvershard.model.training_config import TrainingConfig

TEMPORAL = TrainingConfig(split="temporal", test_share=0.3, validation_share=0.2)


def rated(ratings: dict[int, list[tuple[int, int]]]) -> MovieLens:
    """Users with the movie and the time of each of their ratings."""
    rows = [(user, movie, time) for user, entries in ratings.items() for movie, time in entries]
    users, movies, times = (np.array(column, dtype=np.int64) for column in zip(*rows, strict=True))
    known = np.arange(1, 7) * 10
    return from_ratings(
        source="hand",
        generated=True,
        movie_ids=known,
        titles=as_column([str(one) for one in known], "string"),
        years=np.full(6, 1990),
        genres=Ragged.from_rows([["Drama"]] * 6, dtype="string"),
        tags=Ragged.from_rows([[]] * 6, dtype="string"),
        user_ids=users,
        rated_movie_ids=movies,
        ratings=np.full(len(rows), 3.0, dtype=np.float32),
        timestamps=times,
    )


def rows_of(ragged: Ragged) -> list[list[int]]:
    return [ragged.row(row).tolist() for row in range(len(ragged))]


@pytest.fixture
def hand() -> MovieLens:
    # Ten ratings at the times 1 to 10: the first five train, two validate, three test.
    return rated(
        {
            1: [(10, 1), (20, 2), (30, 6), (40, 8), (50, 9)],
            2: [(20, 3), (10, 4), (30, 5)],
            3: [(60, 7)],
            4: [(10, 10)],
        }
    )


def test_a_temporal_split_cuts_all_users_at_one_time(hand: MovieLens) -> None:
    parts = split(hand, TEMPORAL)
    assert (parts.valid_from, parts.test_from) == (6, 8)
    assert hand.timestamps[parts.train_rows].tolist() == [1, 2, 3, 4, 5]
    assert rows_of(parts.histories) == [[10, 20], [20, 10, 30], [], []]
    assert rows_of(parts.test_histories) == [[10, 20, 30], [20, 10, 30], [60], []]
    # The one that comes next is in the arrays, all of them are in the sets.
    assert parts.test_item_ids.tolist() == [40, -1, -1, -1]
    assert [hand.rated_movie_ids[one].tolist() for one in rows_of(parts.test_sets)] == [
        [40, 50],
        [],
        [],
        [10],
    ]


def test_a_user_validates_with_the_next_item_only_after_a_training_history(
    hand: MovieLens,
) -> None:
    parts = split(hand, TEMPORAL)
    # User 3 begins between the cuts: a history for the test, none for validation.
    assert parts.valid_item_ids.tolist() == [30, -1, -1, -1]
    assert parts.valid_rows.tolist() == [2, -1, -1, -1]


def test_users_without_a_history_before_the_cut_are_cold_and_not_among_the_tested(
    hand: MovieLens,
) -> None:
    parts = split(hand, TEMPORAL)
    assert parts.cold.tolist() == [False, False, False, True]
    assert parts.test_rows.tolist() == [3, -1, -1, -1]
    assert parts.summary == (
        "temporal: 5 interactions before 1970-01-01 train, tested are 2 held-out interactions of 1 "
        "users from 1970-01-01 on, and apart from them 1 of 1 users without a history before it"
    )


def test_interactions_of_one_second_stay_on_the_later_side_of_a_cut() -> None:
    data = rated({1: [(10, 1), (20, 5), (30, 5)], 2: [(10, 2), (20, 5)], 3: [(10, 3), (20, 9)]})
    parts = split(data, TrainingConfig(split="temporal", test_share=0.3, validation_share=0.0))
    assert parts.test_from == 5
    assert data.timestamps[parts.train_rows].tolist() == [1, 2, 3]
    assert parts.test_sets.lengths.tolist() == [2, 1, 1]


def test_data_of_one_moment_cannot_be_cut() -> None:
    data = rated({1: [(10, 5), (20, 5)], 2: [(10, 5), (20, 5)]})
    with pytest.raises(DataError, match="must leave interactions to train on: none is older than"):
        split(data, TEMPORAL)


def test_without_a_share_for_validation_nobody_validates(hand: MovieLens) -> None:
    parts = split(hand, TrainingConfig(split="temporal", test_share=0.3, validation_share=0.0))
    assert (parts.valid_rows < 0).all()
    assert len(parts.train_rows) == 7


def test_leave_last_out_tests_one_item_of_each_user_and_nobody_is_cold() -> None:
    data = generate(300, 50, 25, seed=1)
    parts = split(data)
    tested = parts.test_rows >= 0
    assert parts.test_sets.lengths.tolist() == tested.astype(int).tolist()
    assert parts.test_sets.values.tolist() == parts.test_rows[tested].tolist()
    assert not parts.cold.any()
    assert parts.test_from is None
    assert parts.summary == (
        f"leave last out: {tested.sum()} held-out interactions of {tested.sum()} users"
    )


@pytest.mark.parametrize("name", ["leave_last_out", "temporal"])
def test_every_rating_has_one_place(name: str) -> None:
    data = generate(300, 50, 25, seed=1)
    parts = split(data, TrainingConfig(split=name, test_share=0.2, validation_share=0.1))  # type: ignore[arg-type]
    users = np.repeat(np.arange(len(parts.user_ids)), parts.test_histories.lengths)
    known = np.setdiff1d(np.arange(len(data.ratings)), parts.test_sets.values)
    assert np.array_equal(data.user_ids[known], parts.user_ids[users])
    assert np.array_equal(data.rated_movie_ids[known], parts.test_histories.values)
    assert np.isin(parts.train_rows, known).all()
    assert np.array_equal(data.rated_movie_ids[parts.train_rows], parts.histories.values)
    assert not np.isin(parts.valid_rows[parts.valid_rows >= 0], parts.train_rows).any()


def test_nothing_after_the_cut_reaches_what_the_model_learns_from() -> None:
    data = generate(300, 50, 25, seed=1)
    recipe = TrainingConfig(split="temporal", test_share=0.2, validation_share=0.1)
    parts = split(data, recipe)
    assert parts.test_from is not None
    later = data.timestamps >= parts.test_from
    changed = replace(
        data,
        ratings=np.where(later, 0.5, data.ratings).astype(np.float32),
        rated_movie_ids=np.where(later, data.movie_ids[0], data.rated_movie_ids),
    )
    others = split(changed, recipe)
    for name in ("train_rows", "valid_rows", "valid_item_ids", "user_ids"):
        assert np.array_equal(getattr(parts, name), getattr(others, name)), name
    for name in ("histories", "test_histories"):
        assert np.array_equal(getattr(parts, name).values, getattr(others, name).values), name
    rows = [
        movielens.catalogue(one, *movielens.popularity(one, p))
        for one, p in ((data, parts), (changed, others))
    ]
    assert np.array_equal(rows[0].signals, rows[1].signals)
    for name, column in rows[0].features.items():
        assert column.values.tolist() == rows[1].features[name].values.tolist(), name
    # A change before the cut is seen, so the comparison can fail.
    earlier = replace(data, ratings=np.where(later, data.ratings, 0.5).astype(np.float32))
    popular = movielens.popularity(earlier, split(earlier, recipe))
    assert not np.array_equal(movielens.catalogue(earlier, *popular).signals, rows[0].signals)


def test_shares_that_leave_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="must be less than 1 together, got 1"):
        TrainingConfig(test_share=0.6, validation_share=0.4)

from dataclasses import replace

import numpy as np
import pytest

from silvershard.deploy import movielens_users
from silvershard.deploy.dataset import MovieLens, Tagging, from_ratings
from silvershard.deploy.movielens_users import MAX_TAGS, Moments, after_all, before, declared
from silvershard.deploy.synthetic import generate
from silvershard.model.catalogue import Ragged, as_column
from silvershard.model.request import WeightedIds
from silvershard.shard.errors import ConfigError

NAMES = ("tags", "activity")


def tagging(*events: tuple[int, int, str, int]) -> Tagging:
    """Events of user, movie, tag, time, in the order of users and times."""
    users, movies, tags, times = zip(*events, strict=True)
    return Tagging(
        np.array(users), np.array(movies), as_column(list(tags), "string"), np.array(times)
    )


@pytest.fixture
def data() -> MovieLens:
    """User 1 rates 10, 20, 30, 40 at times 100 to 400, user 2 rates 10 alone."""
    movies = np.array([10, 20, 30, 40])
    return from_ratings(
        source="test",
        generated=True,
        movie_ids=movies,
        titles=as_column(["a", "b", "c", "d"], "string"),
        years=np.array([2000] * 4),
        genres=Ragged.from_rows([[]] * 4, dtype="string"),
        tags=Ragged.from_rows([[]] * 4, dtype="string"),
        user_ids=np.array([1, 1, 1, 1, 2]),
        rated_movie_ids=np.array([10, 20, 30, 40, 10]),
        ratings=np.array([5, 4, 3, 2, 1], np.float32),
        timestamps=np.array([100, 200, 300, 400, 150]),
        tagging=tagging(
            (1, 40, "early", 50),
            (1, 10, "noir", 110),
            (1, 20, "noir", 200),
            (1, 10, "slow", 290),
            (1, 10, "slow", 300),
            (2, 10, "odd", 160),
            (2, 20, "unrated", 170),
            (3, 10, "stranger", 1),
        ),
    )


def test_tags_count_once_given_and_once_their_film_was_rated(data: MovieLens) -> None:
    moments = Moments(np.array([0, 0, 0, 0, 0, 4, 4]), np.array([0, 1, 2, 3, 4, 4, 5]))
    made = movielens_users.requests(movielens_users.columns(data, ["tags"], moments), 7)
    found = [dict(zip(one["tags"].ids, one["tags"].weights, strict=True)) for one in made]
    # A tag of the second of a rating is not known then, nor one of a film that was not yet rated.
    assert found == [
        {},
        {"noir": 1},
        {"noir": 2, "slow": 1},
        {"noir": 2, "slow": 2},
        {"noir": 2, "slow": 2, "early": 1},
        {},
        {"odd": 1},
    ]


def test_activity_is_of_earlier_ratings(data: MovieLens) -> None:
    column = movielens_users.columns(data, ["activity"], before(data, np.arange(5)))["activity"]
    assert column.values.lengths.tolist() == [0, 2, 2, 2, 0]
    assert column.values.values.tolist() == pytest.approx(
        [5, np.log(2), 4.5, np.log(3), 4, np.log(4)]
    )
    ended = movielens_users.columns(data, ["activity"], after_all(data))["activity"]
    assert ended.values.values.tolist() == pytest.approx([3.5, np.log(5), 1, np.log(2)])


def test_the_future_of_a_user_changes_nothing() -> None:
    films = generate(200, 30, 25, seed=5)
    rows = np.arange(0, len(films.ratings), 7)
    expected = movielens_users.columns(films, NAMES, before(films, rows))
    cut = int(np.median(films.timestamps))
    later = films.timestamps >= cut
    ratings = np.where(later, np.float32(0.5), films.ratings)
    given = films.tagging
    tags = np.where(given.timestamps >= cut, "unheard of", given.tags).astype(object)
    other = replace(films, ratings=ratings, tagging=given._replace(tags=tags))
    found = movielens_users.columns(other, NAMES, before(other, rows))
    past = films.timestamps[rows] <= cut
    assert 10 < past.sum() < len(rows)
    for name, column in expected.items():
        for at in np.flatnonzero(past):
            assert found[name].values.row(at).tolist() == column.values.row(at).tolist()
    changed = [
        found["activity"].values.row(at).tolist() != expected["activity"].values.row(at).tolist()
        for at in np.flatnonzero(~past)
    ]
    assert np.mean(changed) > 0.5


def test_the_tags_that_were_given_last_are_kept(data: MovieLens) -> None:
    events = [(1, 10, f"tag {at}", 110 + at) for at in range(MAX_TAGS + 5)]
    many = replace(data, tagging=tagging(*events, (1, 10, "tag 0", 199)))
    (asked,) = movielens_users.requests(
        movielens_users.columns(many, ["tags"], before(many, np.array([2]))), 1
    )
    kept = [*(f"tag {at}" for at in range(6, MAX_TAGS + 5)), "tag 0"]
    assert asked["tags"] == WeightedIds(kept, [1.0] * (MAX_TAGS - 1) + [2.0])


def test_the_order_of_moments_does_not_matter(data: MovieLens) -> None:
    rows = np.array([3, 4, 0, 2])
    mixed = movielens_users.columns(data, NAMES, before(data, rows))
    whole = movielens_users.columns(data, NAMES, before(data, np.arange(5)))
    for name, column in mixed.items():
        for at, row in enumerate(rows.tolist()):
            assert column.values.row(at).tolist() == whole[name].values.row(row).tolist()


def test_a_feature_is_declared_as_its_columns_are(data: MovieLens) -> None:
    columns = movielens_users.columns(data, NAMES, before(data, np.arange(5)))
    for feature in declared(NAMES):
        columns[feature.name].validate(feature)
    assert declared(()) == ()


def test_an_unknown_feature_is_named() -> None:
    with pytest.raises(
        ConfigError, match="user_features: must be among tags, activity, got 'shoe size'"
    ):
        declared(["tags", "shoe size"])

import time

import numpy as np
import pytest

from silvershard.deploy.dataset import MovieLens
from silvershard.deploy.movielens import catalogue, popularity, schema, split
from silvershard.deploy.synthetic import TAGS, generate
from silvershard.model.catalogue import NULL_INT, Ragged


@pytest.fixture(scope="module")
def films() -> MovieLens:
    return generate()


def _members(values: Ragged, names: list[str]) -> np.ndarray:
    """Whether each row has each name, ``(N, len(names))`` bool."""
    column = {name: position for position, name in enumerate(names)}
    members = np.zeros((len(values), len(names)), dtype=bool)
    members[values.row_of, [column[value] for value in values.values]] = True
    return members


def test_the_same_seed_gives_the_same_films_and_another_seed_others() -> None:
    first, again, other = (generate(200, 30, 25, seed=seed) for seed in (5, 5, 6))
    for name in ("movie_ids", "titles", "years", "user_ids", "rated_movie_ids", "ratings"):
        assert np.array_equal(getattr(first, name), getattr(again, name)), name
    for name in ("genres", "tags"):
        assert getattr(first, name).values.tolist() == getattr(again, name).values.tolist()
    assert np.array_equal(first.timestamps, again.timestamps)
    for column, same in zip(first.tagging, again.tagging, strict=True):
        assert np.array_equal(column, same)
    assert not np.array_equal(first.rated_movie_ids[:500], other.rated_movie_ids[:500])


def test_the_shape_is_that_of_movielens(films: MovieLens) -> None:
    assert films.generated
    assert "generated" in films.source
    assert len(films.movie_ids) == 2000
    assert np.array_equal(np.unique(films.user_ids), np.arange(1, 601))
    assert films.num_unknown == films.num_repeated == 0
    assert (np.diff(films.movie_ids) > 0).all()
    assert np.isin(films.ratings * 2, np.arange(1, 11)).all()
    assert np.bincount(films.user_ids)[1:].min() >= 20
    assert 50 <= len(films.ratings) / 600 <= 70
    assert 0.35 <= (films.ratings >= 4).mean() <= 0.6
    assert len(set(films.titles.tolist())) == 2000
    assert set(films.genres.values.tolist()) == set(TAGS)
    assert (films.years == NULL_INT).any()
    assert (films.genres.lengths == 0).any()
    assert (films.tags.lengths == 0).any()
    same_user = np.diff(films.user_ids) == 0
    assert (np.diff(films.timestamps)[same_user] > 0).all()


def test_one_rating_in_ten_is_tagged_with_a_tag_of_the_film(films: MovieLens) -> None:
    tagging = films.tagging
    assert 0.08 < len(tagging.tags) / len(films.ratings) < 0.1
    for movie, tag in zip(films.movie_rows(tagging.movie_ids), tagging.tags, strict=True):
        assert tag in films.tags.row(movie)
    same_user = np.diff(tagging.user_ids)
    assert (same_user >= 0).all()
    assert (np.diff(tagging.timestamps)[same_user == 0] > 0).all()


def test_generating_takes_under_two_seconds() -> None:
    generate(100, 1, 20)
    started = time.process_time()
    generate()
    assert time.process_time() - started < 2.0


def test_popularity_is_long_tailed(films: MovieLens) -> None:
    counts = np.sort(np.bincount(films.movie_rows(films.rated_movie_ids), minlength=2000))[::-1]
    assert counts[:200].sum() > 0.3 * counts.sum()
    assert counts[1000:].sum() < 0.25 * counts.sum()


@pytest.mark.parametrize(("kind", "factor"), [("genres", 2.0), ("tags", 3.5)])
def test_users_keep_to_the_tastes_of_their_first_half(
    films: MovieLens, kind: str, factor: float
) -> None:
    values: Ragged = getattr(films, kind)
    members = _members(values, sorted(set(values.values.tolist())))
    rows = films.movie_rows(films.rated_movie_ids)
    base = members[rows].mean(axis=0)
    shares, expected = [], []
    for user in range(1, 601):
        watched = members[rows[films.user_ids == user]]
        early, late = np.array_split(watched, 2)
        favourite = int(np.argmax(early.mean(axis=0) - base))
        shares.append(late[:, favourite].mean())
        expected.append(base[favourite])
    assert np.mean(shares) > factor * np.mean(expected)


def test_tastes_last_for_some_films_and_then_drift(films: MovieLens) -> None:
    members = _members(films.tags, sorted(set(films.tags.values.tolist()))).astype(float)
    rows = films.movie_rows(films.rated_movie_ids)

    def share_in_common(apart: int) -> float:
        same_user = films.user_ids[apart:] == films.user_ids[:-apart]
        common = (members[rows[apart:]] * members[rows[:-apart]]).sum(axis=1) > 0
        return float(common[same_user].mean())

    # Five films apart, the companions of a film are behind, and only the mood is left.
    assert share_in_common(5) > 1.3 * share_in_common(20)


def test_users_rate_films_of_their_tastes_higher(films: MovieLens) -> None:
    members = _members(films.genres, list(TAGS)).astype(float)
    rows = films.movie_rows(films.rated_movie_ids)
    gaps = []
    for user in range(1, 601):
        mine = films.user_ids == user
        watched, ratings = members[rows[mine]], films.ratings[mine]
        early, late = np.array_split(np.arange(len(watched)), 2)
        favourite = int(np.argmax(watched[early].mean(axis=0) - members[rows].mean(axis=0)))
        inside = watched[late, favourite] > 0
        if inside.any() and not inside.all():
            gaps.append(ratings[late][inside].mean() - ratings[late][~inside].mean())
    assert np.mean(gaps) > 0.1


def test_the_next_film_follows_from_the_recent_ones_beyond_popularity(films: MovieLens) -> None:
    parts = split(films)
    counts, _ = popularity(films, parts)
    together = np.zeros((2000, 2000))
    for row in range(len(parts.user_ids)):
        history = films.movie_rows(parts.histories.row(row))
        for apart in range(1, 4):
            np.add.at(together, (history[:-apart], history[apart:]), 1.0)
    together = (together + together.T) / (1.0 + counts)
    hits = {"popular": 0, "recent": 0, "earliest": 0, "all": 0}
    for row, target in enumerate(films.movie_rows(parts.test_item_ids)):
        history = films.movie_rows(parts.test_histories.row(row))
        for name, scores in (
            ("popular", counts.astype(float)),
            ("recent", together[history[-5:]].sum(axis=0)),
            ("earliest", together[history[:5]].sum(axis=0)),
            ("all", together[history].sum(axis=0)),
        ):
            scores[history] = -1.0
            hits[name] += int((scores > scores[target]).sum() < 10)
    assert hits["recent"] > 3 * hits["popular"]
    assert hits["recent"] > 2 * hits["earliest"]
    assert hits["all"] > 1.5 * hits["popular"]


def test_generated_films_fit_the_schema(films: MovieLens) -> None:
    parts = split(films)
    catalogue(films, *popularity(films, parts)).validate(schema())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_movies": 99}, "num_movies must be at least 100, got 99"),
        ({"num_users": 0}, "num_users must be at least 1, got 0"),
        ({"ratings_per_user": 19}, "ratings_per_user must be from 20 to num_movies / 5 = 400"),
        ({"ratings_per_user": 401}, "ratings_per_user must be from 20 to"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate(**arguments)

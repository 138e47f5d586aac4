from silvershard.deploy.movielens_texts import ITEM_FEATURES, MAX_TAGS, columns, known_tags
from silvershard.deploy.split import split
from silvershard.deploy.synthetic import generate


def test_there_is_a_column_for_each_feature_with_a_row_for_each_film() -> None:
    films = generate(150, 20, 24, seed=3)
    made = columns(films, split(films))
    assert set(made) == {feature.name for feature in ITEM_FEATURES}
    assert made["title"].row(7).tolist() == [films.titles[7]]
    assert {len(column) for column in made.values()} == {150}


def test_tags_of_held_out_ratings_do_not_count() -> None:
    films = generate(150, 40, 24, seed=3)
    parts = split(films)
    known = known_tags(films, parts)
    trained = set(
        zip(
            films.user_ids[parts.train_rows].tolist(),
            films.rated_movie_ids[parts.train_rows].tolist(),
            strict=True,
        )
    )
    tagging = films.tagging
    dropped = 0
    for row, movie in enumerate(films.movie_ids.tolist()):
        given = tagging.movie_ids == movie
        users, tags = tagging.user_ids[given].tolist(), tagging.tags[given].tolist()
        allowed = {tag for user, tag in zip(users, tags, strict=True) if (user, movie) in trained}
        found = known.row(row).tolist()
        assert len(found) <= MAX_TAGS
        assert set(found) <= allowed
        dropped += len(set(tags) - allowed)
    assert len(known.values) > 0
    assert dropped > 0

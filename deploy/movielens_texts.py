"""What the MovieLens recipe gives a text encoder to read: titles, and tags known in training.

Shapes: N movies, R ratings.
"""

from collections import Counter

import numpy as np

from silvershard.deploy.dataset import MovieLens
from silvershard.deploy.split import Split
from silvershard.model.catalogue import Ragged
from silvershard.model.schema import UserFeature
from silvershard.model.text_config import QUERY

MAX_TAGS = 16
"""Tags of a movie that are read: those that most people gave it."""

REQUEST_FEATURE = UserFeature(name=QUERY, kind="text", dtype="string", max_length=8)
"""The text of a request."""
ITEM_FEATURES = tuple(
    UserFeature(name=name, kind="text", dtype="string") for name in ("title", "tags")
)


def columns(data: MovieLens, parts: Split) -> dict[str, Ragged]:
    """The values of ``ITEM_FEATURES``, N rows each."""
    titles = Ragged(data.titles, np.arange(len(data.titles) + 1, dtype=np.int64))
    return {"title": titles, "tags": known_tags(data, parts)}


def known_tags(data: MovieLens, parts: Split) -> Ragged:
    """The tags of each movie that training may know, at most ``MAX_TAGS``.

    A tag does not count that a user gave to a movie whose rating of that user is held out, nor one
    from the time that a temporal split holds out. The tag that most people gave comes first, ties
    in alphabetical order. Where nobody is known to have given the tags, all of them count.
    """
    tagging = data.tagging
    if not len(tagging.tags):
        return Ragged.from_rows(
            [data.tags.row(row).tolist()[:MAX_TAGS] for row in range(len(data.movie_ids))],
            dtype="string",
        )
    held_out = np.concatenate([parts.valid_rows[parts.valid_rows >= 0], parts.test_sets.values])
    pairs = set(
        zip(data.user_ids[held_out].tolist(), data.rated_movie_ids[held_out].tolist(), strict=True)
    )
    counts: list[Counter[str]] = [Counter() for _ in data.movie_ids]
    rows = data.movie_rows(tagging.movie_ids).tolist()
    users, movies = tagging.user_ids.tolist(), tagging.movie_ids.tolist()
    times = tagging.timestamps.tolist()
    for row, user, movie, tag, time_s in zip(rows, users, movies, tagging.tags, times, strict=True):
        late = parts.valid_from is not None and time_s >= parts.valid_from
        if not late and (user, movie) not in pairs:
            counts[row][str(tag)] += 1
    first = [sorted(one, key=lambda tag: (-one[tag], tag))[:MAX_TAGS] for one in counts]
    return Ragged.from_rows(first, dtype="string")

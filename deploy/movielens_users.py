"""What the MovieLens recipe tells of a user beside the history: the user's own tags, and activity.

``tags`` are the tags that the user gave, weighted by how often. ``activity`` is the mean rating
that the user gave and the logarithm of 1 plus their number. Both are as they were at one moment: of
ratings before it alone, and of tags given before it to films that were rated before it. A tag of
the film that is to be predicted would tell which film it is, so it counts only after its rating.

Shapes: R ratings, n moments.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from silvershard.deploy.dataset import MovieLens
from silvershard.model.catalogue import Ragged, UserColumn
from silvershard.model.request import FeatureValues, WeightedIds
from silvershard.model.schema import UserFeature
from silvershard.shard.errors import ConfigError

MAX_TAGS = 32
"""Tags of a user that count: those that were given last."""

_FEATURES = {
    "tags": UserFeature(name="tags", dtype="string", max_length=MAX_TAGS),
    "activity": UserFeature(name="activity", kind="numbers", dtype="float", width=2),
}


class Moments(NamedTuple):
    """Moments in the lives of users, as ranges of rows of a ``MovieLens``."""

    starts: NDArray[np.int64]
    """``(n,)`` first rating of the user."""
    ends: NDArray[np.int64]
    """``(n,)`` the rating that has not happened yet; the row behind the user's last: all have."""


def before(data: MovieLens, rows: NDArray[np.int64]) -> Moments:
    """The moments before these ratings ``(n,)``."""
    return Moments(np.searchsorted(data.user_ids, data.user_ids[rows]).astype(np.int64), rows)


def after_all(data: MovieLens) -> Moments:
    """The moment after the last rating of each user, in the order of their ids."""
    users = np.unique(data.user_ids)
    return Moments(
        np.searchsorted(data.user_ids, users).astype(np.int64),
        np.searchsorted(data.user_ids, users, side="right").astype(np.int64),
    )


def declared(names: Sequence[str]) -> tuple[UserFeature, ...]:
    """The features of these names as the schema declares them.

    Raises:
        ConfigError: if there is no such feature.
    """
    for name in names:
        if name not in _FEATURES:
            raise ConfigError(
                f"training.user_features: must be among {', '.join(_FEATURES)}, got {name!r}"
            )
    return tuple(_FEATURES[name] for name in names)


def columns(data: MovieLens, names: Sequence[str], moments: Moments) -> dict[str, UserColumn]:
    """The values of these features at each moment."""
    made = {"tags": _tags, "activity": _activity}
    return {name: made[name](data, moments) for name in names}


def requests(columns: Mapping[str, UserColumn], count: int) -> list[dict[str, FeatureValues]]:
    """The same values as the features of ``count`` requests, row by row."""
    made: list[dict[str, FeatureValues]] = [{} for _ in range(count)]
    for name, column in columns.items():
        for row, features in enumerate(made):
            values = column.values.row(row).tolist()
            if column.weights is None:
                features[name] = values
                continue
            offsets = column.values.offsets
            weights = column.weights[offsets[row] : offsets[row + 1]].tolist()
            features[name] = WeightedIds(values, weights)
    return made


def _activity(data: MovieLens, moments: Moments) -> UserColumn:
    sums = np.concatenate([[0.0], np.cumsum(data.ratings, dtype=np.float64)])
    counts = moments.ends - moments.starts
    some = counts > 0
    means = (sums[moments.ends] - sums[moments.starts])[some] / counts[some]
    numbers = np.stack([means, np.log1p(counts[some])], axis=1)
    offsets = np.concatenate([[0], np.cumsum(2 * some)]).astype(np.int64)
    return UserColumn(Ragged(numbers.ravel(), offsets))


def _tags(data: MovieLens, moments: Moments) -> UserColumn:
    known: dict[int, list[tuple[int, str]]] = {}
    for start, row, tag in zip(*_known_from(data), strict=True):
        known.setdefault(start, []).append((row, tag))
    found: list[dict[str, int]] = [{}] * len(moments.ends)
    order = np.lexsort((moments.ends, moments.starts))
    user, at = -1, 0
    counts: dict[str, int] = {}
    for moment in order.tolist():
        start, end = int(moments.starts[moment]), int(moments.ends[moment])
        if start != user:
            user, at, counts = start, 0, {}
        given = known.get(start, [])
        if at < len(given) and given[at][0] <= end:
            counts = dict(counts)
            while at < len(given) and given[at][0] <= end:
                tag = given[at][1]
                # The tag that was given last comes last.
                counts[tag] = counts.pop(tag, 0) + 1
                at += 1
        found[moment] = counts
    kept = [list(counts.items())[-MAX_TAGS:] for counts in found]
    weights = [count for items in kept for _, count in items]
    values = Ragged.from_rows([[tag for tag, _ in items] for items in kept], dtype="string")
    return UserColumn(values, np.array(weights, dtype=np.float32))


def _known_from(data: MovieLens) -> tuple[list[int], list[int], list[str]]:
    """For each tag of a film that its user rated: the user's first row, and from when it is known.

    It is known at moments from that row on. The tags of a user are in the order of these rows.
    """
    starts, rows, tags = [], [], []
    tagging = data.tagging
    bounds = np.flatnonzero(np.diff(tagging.user_ids, prepend=-1, append=-1)).tolist()
    for begin, end in pairwise(bounds):
        user = tagging.user_ids[begin]
        first, last = np.searchsorted(data.user_ids, [user, user + 1]).tolist()
        rated = {
            int(movie): first + at for at, movie in enumerate(data.rated_movie_ids[first:last])
        }
        # The first rating that is later than the tag: in one second, which is first is not known.
        later = first + np.searchsorted(
            data.timestamps[first:last], tagging.timestamps[begin:end], side="right"
        )
        given = [
            (max(rated[movie] + 1, row), at)
            for at, (movie, row) in enumerate(
                zip(tagging.movie_ids[begin:end].tolist(), later.tolist(), strict=True)
            )
            if movie in rated
        ]
        for row, at in sorted(given):
            starts.append(first)
            rows.append(row)
            tags.append(str(tagging.tags[begin + at]))
    return starts, rows, tags

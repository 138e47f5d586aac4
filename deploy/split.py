"""Which interactions train, validate and test: each user's last ones, or those after a cut in time.

``leave_last_out`` holds out the last interaction of every user, so every user is tested once, and
what other people did later is known. ``temporal`` cuts at one time for all users, as a service that
is trained today and asked tomorrow: fewer users are tested, and some of them are new.

Shapes: R ratings, U users.
"""

import datetime
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from silvershard.deploy.csv_files import DataError
from silvershard.deploy.dataset import MovieLens
from silvershard.model.catalogue import Ragged
from silvershard.model.training_config import TrainingConfig


@dataclass(frozen=True, eq=False)
class Split:
    """Which ratings train, validate and test.

    Attributes:
        user_ids: ``(U,)`` int64, every user with a rating, ascending.
        train_rows: int64 rows of the ``MovieLens`` that train, ascending: by user, then time.
        valid_rows: ``(U,)`` int64 row that validates, -1 for a user without one.
        test_rows: ``(U,)`` int64 row of the first interaction that is held out for the test, -1 for
            a user without one and for a cold one.
        valid_item_ids: ``(U,)`` int64 movie of ``valid_rows``, -1 as above.
        test_item_ids: ``(U,)`` int64 movie of ``test_rows``, -1 as above.
        histories: movie ids that each user trains with, oldest first: what is known when predicting
            the validation item.
        test_histories: movie ids that are known when predicting the test items, oldest first.
        test_sets: int64 rows of all interactions of each user that are held out for the test.
        cold: ``(U,)`` bool, users whose every interaction is held out: the model has no history.
        valid_from: time in seconds since 1970 UTC from which nothing trains; None without a cut.
        test_from: time from which everything is held out for the test; None without a cut.
    """

    user_ids: NDArray[np.int64]
    train_rows: NDArray[np.int64]
    valid_rows: NDArray[np.int64]
    test_rows: NDArray[np.int64]
    valid_item_ids: NDArray[np.int64]
    test_item_ids: NDArray[np.int64]
    histories: Ragged
    test_histories: Ragged
    test_sets: Ragged
    cold: NDArray[np.bool_]
    valid_from: int | None = None
    test_from: int | None = None

    @property
    def summary(self) -> str:
        """What is tested, in words."""
        tested = self.test_rows >= 0
        items = int(self.test_sets.lengths[tested].sum())
        text = f"{items:,} held-out interactions of {int(tested.sum()):,} users"
        if self.test_from is None or self.valid_from is None:
            return f"leave last out: {text}"
        cold_items = int(self.test_sets.lengths[self.cold].sum())
        return (
            f"temporal: {len(self.train_rows):,} interactions before {_day(self.valid_from)} "
            f"train, tested are {text} from {_day(self.test_from)} on, and apart from them "
            f"{cold_items:,} of {int(self.cold.sum()):,} users without a history before it"
        )


def split(movielens: MovieLens, config: TrainingConfig | None = None) -> Split:
    """Return the split that training, validation and every table of results use.

    Args:
        movielens: the data set.
        config: says which split; leave last out without it.

    Raises:
        DataError: if no interaction lies before the cut of a temporal split.
    """
    if config is not None and config.split == "temporal":
        return _temporal(movielens, config.test_share, config.validation_share)
    return _leave_last_out(movielens)


def _leave_last_out(movielens: MovieLens) -> Split:
    """Hold out the last interaction of each user with at least three; the one before validates.

    "Last" is by timestamp, then movie id.
    """
    starts, ends = _users(movielens)
    held_out = ends - starts >= 3
    test_rows = np.where(held_out, ends - 1, -1)
    valid_rows = np.where(held_out, ends - 2, -1)
    known = np.ones(len(movielens.user_ids), dtype=np.bool_)
    known[test_rows[held_out]] = False
    trains = known.copy()
    trains[valid_rows[held_out]] = False
    return _split(movielens, trains, known, valid_rows, test_rows)


def _temporal(movielens: MovieLens, test_share: float, validation_share: float) -> Split:
    """Hold out everything from one time on; the time before it validates.

    Interactions of one second stay together, on the later side of a cut. Each user validates with
    the first interaction after the first cut, if there is one before it.
    """
    times = movielens.timestamps
    ordered = np.sort(times)
    last = len(ordered) - 1
    test_from = int(ordered[min(round(len(ordered) * (1 - test_share)), last)])
    trained = round(len(ordered) * (1 - test_share - validation_share))
    valid_from = min(int(ordered[min(trained, last)]), test_from)
    known, trains = times < test_from, times < valid_from
    if not trains.any():
        raise DataError(
            movielens.source,
            "a temporal split must leave interactions to train on: none is older than the latest "
            f"{test_share + validation_share:.0%} of them",
        )
    starts, ends = _users(movielens)
    before, trained_rows = _counts(known, starts), _counts(trains, starts)
    test_rows = np.where((before > 0) & (before < ends - starts), starts + before, -1)
    valid_rows = np.where((trained_rows > 0) & (trained_rows < before), starts + trained_rows, -1)
    return _split(movielens, trains, known, valid_rows, test_rows, valid_from, test_from)


def _split(
    movielens: MovieLens,
    trains: NDArray[np.bool_],
    known: NDArray[np.bool_],
    valid_rows: NDArray[np.int64],
    test_rows: NDArray[np.int64],
    valid_from: int | None = None,
    test_from: int | None = None,
) -> Split:
    """Return the split of these rows.

    Args:
        movielens: the data set.
        trains: ``(R,)`` rows that train.
        known: ``(R,)`` rows that are no part of the test.
        valid_rows: as in ``Split``.
        test_rows: as in ``Split``.
        valid_from: as in ``Split``.
        test_from: as in ``Split``.
    """
    starts, _ = _users(movielens)
    movies = movielens.rated_movie_ids
    before = _counts(known, starts)
    return Split(
        user_ids=movielens.user_ids[starts],
        train_rows=np.flatnonzero(trains).astype(np.int64),
        valid_rows=valid_rows,
        test_rows=test_rows,
        valid_item_ids=np.where(valid_rows >= 0, movies[valid_rows], -1),
        test_item_ids=np.where(test_rows >= 0, movies[test_rows], -1),
        histories=_grouped(movies[trains], _counts(trains, starts)),
        test_histories=_grouped(movies[known], before),
        test_sets=_grouped(np.flatnonzero(~known).astype(np.int64), _counts(~known, starts)),
        cold=before == 0,
        valid_from=valid_from,
        test_from=test_from,
    )


def _users(movielens: MovieLens) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the first row of each user and the row behind the last, ``(U,)`` each."""
    starts = np.flatnonzero(np.diff(movielens.user_ids, prepend=-1)).astype(np.int64)
    return starts, np.append(starts[1:], len(movielens.user_ids)).astype(np.int64)


def _counts(chosen: NDArray[np.bool_], starts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return how many rows of each user are chosen, ``(U,)``."""
    counts: NDArray[np.int64] = np.add.reduceat(chosen.astype(np.int64), starts)
    return counts


def _grouped(values: NDArray[np.int64], lengths: NDArray[np.int64]) -> Ragged:
    offsets = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return Ragged(values, offsets)


def _day(time_s: int) -> str:
    return datetime.datetime.fromtimestamp(time_s, datetime.UTC).strftime("%Y-%m-%d")

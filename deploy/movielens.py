"""The MovieLens recipe: where the data come from, and the catalogue they make.

Shapes: N movies, R ratings, U users, V signals.
"""

import hashlib
import os
import queue
import re
import tempfile
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from http.client import HTTPException
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from silvershard.deploy import movielens_texts
from silvershard.deploy.csv_files import DataError
from silvershard.deploy.dataset import MovieLens, load
from silvershard.deploy.movielens_users import declared
from silvershard.deploy.split import Split, split
from silvershard.deploy.synthetic import generate
from silvershard.model.catalogue import NULL_INT, Catalogue, Ragged, as_column
from silvershard.model.schema import Attribute, Field, Schema, UserFeature
from silvershard.shard.errors import RetrievalError

__all__ = [
    "BASE_URL",
    "DataError",
    "DownloadError",
    "MovieLens",
    "Popularity",
    "Split",
    "catalogue",
    "default_cache_dir",
    "fetch",
    "find",
    "load",
    "popularity",
    "schema",
    "split",
]

BASE_URL = "https://files.grouplens.org/datasets/movielens/"
DATA_VARIABLE = "SILVERSHARD_DATA"
NAME = "ml-latest-small"

LICENCE = """\
MovieLens is data of GroupLens, University of Minnesota. Licence in short: for research; no
commercial use without their permission; no endorsement implied; redistribution under the same
conditions; no warranty. Publications cite Harper and Konstan 2015, doi.org/10.1145/2827872.
The full text is README.txt in {path}"""

HISTORY_LENGTH = 50
MAX_GENRES = 16
FILTER_TAGS = 256
"""Tags of a movie that filters know: those that most people gave it. The movie with the most tags
sets the width of every item's term slots; in ml-latest-small it has 173, so filters know them all,
in ml-32m one has thousands."""

TRY_TIMEOUT_S = 5.0
"""Limit of one connection attempt and of one read."""
FIRST_ANSWER_S = 7.0
"""Limit of the first answer, name resolution and all addresses of the host included."""
DOWNLOAD_S = 120.0
"""Limit of the zip, once the host has answered."""

_MAX_CHECKSUM_BYTES = 4096
_MAX_ZIP_BYTES = 64 * 2**20
_READ_BYTES = 2**16
_MEAN_PRIOR = 10.0
_YEARS = (1900.0, 2030.0)


class DownloadError(RetrievalError, OSError):
    """The data set could not be downloaded; the message says what failed."""


class Popularity(NamedTuple):
    """How often and how well each movie was rated in training."""

    counts: NDArray[np.int64]
    """``(N,)`` int64 ratings."""
    means: NDArray[np.float32]
    """``(N,)`` float32 mean rating, as if ten more ratings had been the overall mean."""


def find(
    data: Path | None,
    *,
    environ: Mapping[str, str] = os.environ,
    cache_dir: Path | None = None,
    offline_ok: bool = True,
    max_malformed: int = 0,
    download: Callable[[Path], Path] | None = None,
    report: Callable[[str], None] = print,
) -> MovieLens:
    """The data set that the user named, or the downloaded one, or else a generated one.

    The first of these that is given decides, and one that is named but unusable is an error:
    ``data``, ``$SILVERSHARD_DATA``, the cached or downloaded ml-latest-small, ``generate()``. The
    first line that is reported says which it is, with its sizes; generated films are announced as
    such together with the reason. The licence of a download follows.

    Args:
        data: folder or zip, or None.
        environ: environment variables.
        cache_dir: folder for the download; ``default_cache_dir(environ)`` if None.
        offline_ok: generate films if the download fails, rather than fail.
        max_malformed: as in ``load``.
        download: takes the cache folder and returns the path of a zip, or raises OSError; ``fetch``
            if None.
        report: receives each line for the user.

    Raises:
        DataError: if the chosen data cannot be used.
        DownloadError: if the download fails and ``offline_ok`` is False.
    """
    named = data or (Path(environ[DATA_VARIABLE]) if environ.get(DATA_VARIABLE) else None)
    if named is not None:
        movielens = load(named.expanduser(), max_malformed=max_malformed)
        report(f"data: {movielens.summary}")
        return movielens
    try:
        path = (download or fetch)(cache_dir or default_cache_dir(environ))
    except OSError as error:
        if not offline_ok:
            raise DownloadError(f"{NAME} is not here and cannot be downloaded: {error}") from error
        movielens = generate()
        report(
            f"data: NOT MovieLens but {movielens.summary} "
            f"(no --data, no ${DATA_VARIABLE}, and {NAME} cannot be downloaded: {error})"
        )
        return movielens
    movielens = load(path, source=f"downloaded {NAME}", max_malformed=max_malformed)
    report(f"data: {movielens.summary}")
    for line in LICENCE.format(path=path).splitlines():
        report(line)
    return movielens


def default_cache_dir(environ: Mapping[str, str] = os.environ) -> Path:
    """``$XDG_CACHE_HOME/silvershard``, or ``~/.cache/silvershard`` where that is not set."""
    base = environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "silvershard"


def fetch(
    cache_dir: Path, *, base_url: str = BASE_URL, first_answer_s: float = FIRST_ANSWER_S
) -> Path:
    """Path of ml-latest-small.zip in the cache, downloaded once and checked at every use.

    GroupLens re-issues this file in place, so no checksum can be written down here: the zip is
    checked against the MD5 that they publish beside it, over the same connection security (https).
    That finds damage, not a dishonest host. The file is named for its MD5, and a cached file that
    no longer has it is removed. One try, no retries.

    Args:
        cache_dir: folder for the zip; created if missing.
        base_url: where ``ml-latest-small.zip`` and ``ml-latest-small.zip.md5`` are.
        first_answer_s: limit of the first answer in seconds.

    Raises:
        DownloadError: if the host does not answer in time, or what it sends is damaged.
        OSError: if the cache cannot be written.
    """
    for cached in sorted(cache_dir.glob(f"{NAME}-*.zip")):
        if cached.stem.removeprefix(f"{NAME}-") == _md5(cached):
            return cached
        cached.unlink()
    url = urllib.parse.urljoin(base_url, f"{NAME}.zip")
    published = _in_time(lambda: _read_url(f"{url}.md5", _MAX_CHECKSUM_BYTES), first_answer_s, url)
    digests = re.findall(rb"\b[0-9a-fA-F]{32}\b", published)
    if len(digests) != 1:
        raise DownloadError(f"{url}.md5 must hold one MD5, got {published[:80]!r}")
    digest = digests[0].decode().lower()
    content = _in_time(lambda: _read_url(url, _MAX_ZIP_BYTES), DOWNLOAD_S, url)
    got = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if got != digest:
        raise DownloadError(
            f"{url} is damaged: its MD5 must be {digest}, got {got} of {len(content):,} bytes"
        )
    cache_dir.mkdir(parents=True, exist_ok=True)
    path = cache_dir / f"{NAME}-{digest}.zip"
    with tempfile.TemporaryDirectory(dir=cache_dir, prefix="download-") as folder:
        partial = Path(folder) / path.name
        partial.write_bytes(content)
        partial.replace(path)
    return path


def popularity(movielens: MovieLens, parts: Split) -> Popularity:
    """Counts and means per movie from the training rows alone."""
    rows = movielens.movie_rows(movielens.rated_movie_ids[parts.train_rows])
    ratings = movielens.ratings[parts.train_rows]
    counts = np.bincount(rows, minlength=len(movielens.movie_ids)).astype(np.int64)
    sums = np.bincount(rows, weights=ratings, minlength=len(movielens.movie_ids))
    prior = float(ratings.mean(dtype=np.float64))
    means = (sums + _MEAN_PRIOR * prior) / (counts + _MEAN_PRIOR)
    return Popularity(counts, means.astype(np.float32))


def schema(user_features: Sequence[str] = (), *, texts: bool = False) -> Schema:
    """What MovieLens items and users consist of.

    Args:
        user_features: names of features of ``movielens_users`` that there are beside the history.
        texts: whether requests have a text and items what ``movielens_texts`` gives to read.

    Raises:
        ConfigError: if there is no such feature.

    Signals are about 0 to 1: ``popularity`` is log1p of the training ratings over its largest
    value, ``mean_rating`` the damped mean over 5, ``recency`` the year from 1900 to 2030.
    """
    return Schema(
        user_features=(
            UserFeature(name="history", dtype="int", max_length=HISTORY_LENGTH),
            *declared(user_features),
            *([movielens_texts.REQUEST_FEATURE] if texts else []),
        ),
        item_features=(
            UserFeature(name="movie_id", dtype="int", max_length=1),
            UserFeature(name="genres", dtype="string", max_length=MAX_GENRES),
            UserFeature(name="year", dtype="int", max_length=1),
            UserFeature(name="decade", dtype="int", max_length=1),
            *(movielens_texts.ITEM_FEATURES if texts else ()),
        ),
        attributes=(
            Attribute(name="genre", kind="category", dtype="string"),
            Attribute(name="tag", kind="category", dtype="string"),
            Attribute(name="year", kind="number", dtype="int"),
        ),
        signals=("popularity", "mean_rating", "recency"),
        fields=(
            Field(name="title", dtype="string"),
            Field(name="year", dtype="int"),
            Field(name="genres", dtype="string"),
        ),
        heads=("rated", "liked"),
        tasks=("rated", "liked"),
        value="$rated * rated + $liked * liked",
        weights={"rated": 1.0, "liked": 1.0},
    )


def catalogue(
    movielens: MovieLens,
    counts: NDArray[np.int64],
    means: NDArray[np.float32],
    texts: Mapping[str, Ragged] | None = None,
) -> Catalogue:
    """The movies as ``schema()`` declares them.

    The tower looks up no tags: they are of all users at all times, so a tag that a user gave a
    held-out movie would tell of the user's next interaction. Filters know the first ``FILTER_TAGS``
    of a movie. A movie without a year has no year and decade ids, null in the year attribute and
    field, and the median ``recency``.

    Args:
        movielens: the data set.
        counts: ``(N,)`` int64 ratings per movie, from the training split.
        means: ``(N,)`` float32 mean ratings in [0, 5], from the training split.
        texts: further item features, of ``movielens_texts``.

    Raises:
        ValueError: if ``counts`` or ``means`` are not one number per movie.
    """
    num_movies = len(movielens.movie_ids)
    for name, column in (("counts", counts), ("means", means)):
        if column.shape != (num_movies,):
            raise ValueError(f"{name} must have shape ({num_movies},), got {column.shape}")
    dated = movielens.years != NULL_INT
    years = movielens.years[dated]
    popular = np.log1p(counts) / max(float(np.log1p(counts.max())), 1.0)
    median = float(np.median(years)) if len(years) else sum(_YEARS) / 2
    recency = (np.where(dated, movielens.years, median) - _YEARS[0]) / (_YEARS[1] - _YEARS[0])
    joined = ["|".join(movielens.genres.row(row)) for row in range(num_movies)]
    return Catalogue(
        item_ids=movielens.movie_ids,
        categories={"genre": movielens.genres, "tag": _first(movielens.tags, FILTER_TAGS)},
        numbers={"year": movielens.years},
        signals=np.stack([popular, means / 5.0, recency], axis=1).astype(np.float32),
        fields={
            "title": movielens.titles,
            "year": movielens.years,
            "genres": as_column(joined, "string"),
        },
        features={
            "movie_id": _grouped(movielens.movie_ids, np.ones(num_movies, dtype=np.int64)),
            "genres": movielens.genres,
            "year": _grouped(years, dated.astype(np.int64)),
            "decade": _grouped(years // 10 * 10, dated.astype(np.int64)),
            **(texts or {}),
        },
    )


def _grouped(values: NDArray[Any], lengths: NDArray[np.int64]) -> Ragged:
    offsets = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return Ragged(values, offsets)


def _first(rows: Ragged, most: int) -> Ragged:
    """The first ``most`` values of every row."""
    lengths = np.minimum(rows.lengths, most)
    starts = np.repeat(rows.offsets[:-1] - (np.cumsum(lengths) - lengths), lengths)
    kept = rows.values[starts + np.arange(int(lengths.sum()))]
    return _grouped(kept, lengths)


def _md5(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def _in_time(read: Callable[[], bytes], limit_s: float, url: str) -> bytes:
    """What ``read`` returns, unless it takes longer than the limit.

    Name resolution has no timeout of its own, so the wait is on a thread that can be left behind.
    """
    results: queue.SimpleQueue[bytes | Exception] = queue.SimpleQueue()

    def work() -> None:
        try:
            results.put(read())
        except (OSError, HTTPException, ValueError) as error:
            results.put(error)

    threading.Thread(target=work, daemon=True, name="silvershard-download").start()
    try:
        result = results.get(timeout=limit_s)
    except queue.Empty:
        raise DownloadError(f"{url} did not answer within {limit_s:g} s") from None
    if isinstance(result, DownloadError):
        raise result
    if isinstance(result, Exception):
        reason = result.reason if isinstance(result, urllib.error.URLError) else result
        raise DownloadError(f"{url}: {reason}") from result
    return result


def _read_url(url: str, max_bytes: int) -> bytes:
    """The content behind the URL; a progress bar appears after two seconds."""
    request = urllib.request.Request(url, headers={"User-Agent": "silvershard"})
    with urllib.request.urlopen(request, timeout=TRY_TIMEOUT_S) as response:
        if url.startswith("https:") and not response.geturl().startswith("https:"):
            raise DownloadError(f"{url} must stay on https, got sent to {response.geturl()}")
        expected = response.headers.get("Content-Length")
        total = int(expected) if expected and expected.isdigit() else None
        content = bytearray()
        with tqdm(
            total=total, desc=f"downloading {NAME}", unit="B", unit_scale=True, delay=2, leave=False
        ) as bar:
            while block := response.read(_READ_BYTES):
                content += block
                bar.update(len(block))
                if len(content) > max_bytes:
                    raise DownloadError(f"{url} must have at most {max_bytes:,} bytes")
        if total is not None and len(content) != total:
            raise DownloadError(f"{url} must have {total:,} bytes, got {len(content):,}")
        return bytes(content)

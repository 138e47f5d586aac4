import hashlib
import io
import os
import pickle
import socket
import threading
import time
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest

from silvershard.deploy import movielens as recipe
from silvershard.deploy.csv_files import DataError
from silvershard.deploy.dataset import MovieLens, from_ratings, load
from silvershard.deploy.movielens import (
    DownloadError,
    catalogue,
    default_cache_dir,
    fetch,
    find,
    popularity,
    schema,
    split,
)
from silvershard.deploy.synthetic import generate
from silvershard.model.catalogue import NULL_INT, Ragged, as_column

MOVIES = "movieId,title,genres\n1,Heat (1995),Crime|Drama\n2,Up (2009),Animation\n"
RATINGS = "userId,movieId,rating,timestamp\n1,1,4.0,5\n1,2,3.0,6\n2,2,5.0,7\n"


@dataclass
class Site:
    """A web server on the loopback interface: what it serves, and what it was asked for."""

    url: str
    files: dict[str, bytes] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    promised: dict[str, int] = field(default_factory=dict)
    release: threading.Event = field(default_factory=threading.Event)


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            name = self.path.removeprefix("/")
            served.asked.append(name)
            if name.startswith("hang/"):
                served.release.wait(20)
                return
            if name not in served.files:
                self.send_error(404)
                return
            content = served.files[name]
            self.send_response(200)
            self.send_header("Content-Length", str(served.promised.get(name, len(content))))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            return

    monkeypatch.setenv("no_proxy", "*")
    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        served = Site(f"http://127.0.0.1:{server.server_port}/")
        thread = threading.Thread(target=server.serve_forever, args=(0.005,))
        thread.start()
        yield served
        served.release.set()
        server.shutdown()
        thread.join()


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("no_proxy", "*")
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{held.getsockname()[1]}/"


def _zip(ratings: str = RATINGS) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("ml-latest-small/movies.csv", MOVIES)
        archive.writestr("ml-latest-small/ratings.csv", ratings)
    return stream.getvalue()


def _publish(site: Site, content: bytes) -> str:
    digest = hashlib.md5(content).hexdigest()
    site.files["ml-latest-small.zip"] = content
    site.files["ml-latest-small.zip.md5"] = f"MD5 (ml-latest-small.zip) = {digest}\n".encode()
    return digest


def _folder(path: Path) -> Path:
    path.mkdir()
    (path / "movies.csv").write_text(MOVIES)
    (path / "ratings.csv").write_text(RATINGS)
    return path


def _no_download(_: Path) -> Path:
    raise AssertionError("must not download")


def test_a_download_is_cached_and_used_again_without_the_network(
    site: Site, tmp_path: Path
) -> None:
    digest = _publish(site, _zip())
    cache = tmp_path / "new" / "cache"
    path = fetch(cache, base_url=site.url)
    assert path == cache / f"ml-latest-small-{digest}.zip"
    assert path.read_bytes() == _zip()
    assert site.asked == ["ml-latest-small.zip.md5", "ml-latest-small.zip"]
    assert fetch(cache, base_url=site.url) == path
    assert len(site.asked) == 2
    assert list(cache.iterdir()) == [path]


def test_a_damaged_cache_is_removed_and_downloaded_again(site: Site, tmp_path: Path) -> None:
    _publish(site, _zip())
    path = fetch(tmp_path, base_url=site.url)
    path.write_bytes(_zip()[:-1])
    site.files.clear()
    with pytest.raises(DownloadError, match="Not Found"):
        fetch(tmp_path, base_url=site.url)
    assert list(tmp_path.iterdir()) == []
    _publish(site, _zip())
    assert fetch(tmp_path, base_url=site.url).read_bytes() == _zip()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("flipped", r"ml-latest-small\.zip is damaged: its MD5 must be [0-9a-f]{32}, got"),
        ("cut", "is damaged: its MD5 must be"),
        ("cut short", "bytes, got"),
        ("page", r"\.md5 must hold one MD5, got b'<html>'"),
        ("two", r"\.md5 must hold one MD5"),
        ("no checksum", "Not Found"),
        ("no zip", "Not Found"),
        ("large checksum", r"\.md5 must have at most 4,096 bytes"),
    ],
)
def test_a_damaged_download_is_refused_and_leaves_nothing_behind(
    site: Site, tmp_path: Path, damage: str, message: str
) -> None:
    content = _zip()
    _publish(site, content)
    zipped, checksum = "ml-latest-small.zip", "ml-latest-small.zip.md5"
    if damage == "flipped":
        site.files[zipped] = content[:100] + bytes([content[100] ^ 1]) + content[101:]
    elif damage == "cut":
        site.files[zipped] = content[:-10]
    elif damage == "cut short":
        site.files[zipped] = content[:-10]
        site.promised[zipped] = len(content)
    elif damage == "page":
        site.files[checksum] = b"<html>"
    elif damage == "two":
        site.files[checksum] *= 2
    elif damage == "no checksum":
        del site.files[checksum]
    elif damage == "no zip":
        del site.files[zipped]
    else:
        site.files[checksum] += b" " * 5000
    with pytest.raises(DownloadError, match=message):
        fetch(tmp_path, base_url=site.url)
    assert list(tmp_path.iterdir()) == []


def test_an_oversized_download_is_refused(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _publish(site, _zip())
    monkeypatch.setattr(recipe, "_MAX_ZIP_BYTES", 100)
    with pytest.raises(DownloadError, match="must have at most 100 bytes"):
        fetch(tmp_path, base_url=site.url)


def test_a_host_that_says_nothing_is_left_in_time(site: Site, tmp_path: Path) -> None:
    started = time.monotonic()
    with pytest.raises(DownloadError, match=r"did not answer within 0\.05 s"):
        fetch(tmp_path, base_url=f"{site.url}hang/", first_answer_s=0.05)
    assert time.monotonic() - started < 2.0


def test_the_limits_of_a_missing_network_stay_under_ten_seconds() -> None:
    assert max(recipe.TRY_TIMEOUT_S, recipe.FIRST_ANSWER_S) < 10.0
    assert recipe.TRY_TIMEOUT_S <= 5.0


def test_the_data_are_taken_from_the_first_place_that_is_named(tmp_path: Path) -> None:
    given, other = _folder(tmp_path / "given"), _folder(tmp_path / "other")
    lines: list[str] = []
    search = partial(find, cache_dir=tmp_path, download=_no_download, report=lines.append)
    assert search(given, environ={"SILVERSHARD_DATA": str(other)}).source == str(given)
    assert search(None, environ={"SILVERSHARD_DATA": str(other)}).source == str(other)
    assert lines == [
        f"data: {given}: 2 movies, 2 users, 3 ratings",
        f"data: {other}: 2 movies, 2 users, 3 ratings",
    ]


@pytest.mark.parametrize("by", ["argument", "variable"])
def test_a_named_place_without_data_is_an_error_and_nothing_else_is_tried(
    tmp_path: Path, by: str
) -> None:
    missing = tmp_path / "missing"
    environ = {"SILVERSHARD_DATA": str(missing)} if by == "variable" else {}
    with pytest.raises(DataError, match="missing: does not exist"):
        find(missing if by == "argument" else None, environ=environ, download=_no_download)


def test_malformed_rows_pass_only_on_request_and_are_announced(tmp_path: Path) -> None:
    folder = _folder(tmp_path / "a")
    (folder / "ratings.csv").write_text(RATINGS + "1,3,4.0\n")
    with pytest.raises(DataError, match="line 5: must have 4 columns, got 3"):
        find(folder, environ={})
    lines: list[str] = []
    find(folder, environ={}, max_malformed=1, report=lines.append)
    assert "malformed rows dropped: 1, the first" in lines[0]


def test_a_download_is_announced_with_its_licence(site: Site, tmp_path: Path) -> None:
    digest = _publish(site, _zip())
    lines: list[str] = []
    movielens = find(
        None,
        environ={"SILVERSHARD_DATA": "", "XDG_CACHE_HOME": str(tmp_path)},
        download=partial(fetch, base_url=site.url),
        report=lines.append,
    )
    assert not movielens.generated
    assert lines[0] == "data: downloaded ml-latest-small: 2 movies, 2 users, 3 ratings"
    text = " ".join(lines[1:])
    assert "no commercial use without their permission" in text
    assert "10.1145/2827872" in text
    cached = tmp_path / "silvershard" / f"ml-latest-small-{digest}.zip"
    assert text.endswith(f"README.txt in {cached}")
    assert cached.is_file()


def test_a_refused_connection_gives_generated_films_at_once(refused: str, tmp_path: Path) -> None:
    lines: list[str] = []
    download = partial(fetch, base_url=refused)
    started = time.monotonic()
    movielens = find(None, environ={}, cache_dir=tmp_path, download=download, report=lines.append)
    assert time.monotonic() - started < 5.0
    assert movielens.generated
    assert np.array_equal(movielens.rated_movie_ids, generate().rated_movie_ids)
    assert len(lines) == 1
    assert lines[0].startswith("data: NOT MovieLens but generated films with planted tastes: 2,000")
    assert "cannot be downloaded" in lines[0]
    assert "refused" in lines[0]


@pytest.mark.parametrize(
    ("trouble", "reason"),
    [("damaged", "is damaged: its MD5 must be"), ("no cache", "Not a directory")],
)
def test_a_failed_download_gives_generated_films_and_says_why(
    site: Site, tmp_path: Path, trouble: str, reason: str
) -> None:
    _publish(site, _zip())
    (tmp_path / "file").write_text("")
    cache = tmp_path / "file" / "cache" if trouble == "no cache" else tmp_path
    if trouble == "damaged":
        site.files["ml-latest-small.zip"] += b"x"
    lines: list[str] = []
    download = partial(fetch, base_url=site.url)
    assert find(None, environ={}, cache_dir=cache, download=download, report=lines.append).generated
    assert reason in lines[0]


def test_without_permission_to_generate_a_failed_download_is_an_error(
    refused: str, tmp_path: Path
) -> None:
    download = partial(fetch, base_url=refused)
    with pytest.raises(DownloadError, match="ml-latest-small is not here and cannot be downloaded"):
        find(None, environ={}, cache_dir=tmp_path, offline_ok=False, download=download)


def test_the_download_error_survives_pickling() -> None:
    error = DownloadError("the host is away")
    assert str(pickle.loads(pickle.dumps(error))) == str(error) == "the host is away"


def test_the_cache_follows_the_environment() -> None:
    assert default_cache_dir({"XDG_CACHE_HOME": "/x"}) == Path("/x/silvershard")
    assert default_cache_dir({}) == Path.home() / ".cache" / "silvershard"


def _rated(histories: dict[int, list[tuple[int, int]]], movie_ids: list[int]) -> MovieLens:
    """Ratings from ``(movie, timestamp)`` pairs per user; the rating is 1 + movie % 5."""
    rows = [
        (user, movie, 1.0 + movie % 5, timestamp)
        for user, pairs in histories.items()
        for movie, timestamp in pairs
    ]
    users, movies, ratings, timestamps = zip(*rows, strict=True)
    return from_ratings(
        source="test",
        generated=False,
        movie_ids=np.array(movie_ids, dtype=np.int64),
        titles=as_column([f"Film {movie}" for movie in movie_ids], "string"),
        years=np.array([1950 + 10 * row for row in range(len(movie_ids))], dtype=np.int64),
        genres=Ragged.from_rows([["Drama", "War"]] * len(movie_ids), dtype="string"),
        tags=Ragged.from_rows([[f"t{movie}", "all"] for movie in movie_ids], dtype="string"),
        user_ids=np.array(users, dtype=np.int64),
        rated_movie_ids=np.array(movies, dtype=np.int64),
        ratings=np.array(ratings, dtype=np.float32),
        timestamps=np.array(timestamps, dtype=np.int64),
    )


def test_the_last_interaction_tests_and_the_one_before_validates() -> None:
    movielens = _rated(
        {
            7: [(10, 3), (20, 1), (30, 2), (40, 4)],
            3: [(30, 5), (10, 9)],
            5: [(40, 6), (30, 6), (10, 6)],
            0: [(20, 1)],
        },
        [10, 20, 30, 40],
    )
    parts = split(movielens)
    assert parts.user_ids.tolist() == [0, 3, 5, 7]
    assert parts.test_item_ids.tolist() == [-1, -1, 40, 40]
    assert parts.valid_item_ids.tolist() == [-1, -1, 30, 10]
    assert [parts.histories.row(row).tolist() for row in range(4)] == [
        [20],
        [30, 10],
        [10],
        [20, 30],
    ]
    assert [parts.test_histories.row(row).tolist() for row in range(4)] == [
        [20],
        [30, 10],
        [10, 30],
        [20, 30, 10],
    ]
    assert movielens.rated_movie_ids[parts.train_rows].tolist() == [20, 30, 10, 10, 20, 30]
    assert parts.test_rows.tolist() == [-1, -1, 5, 9]
    assert parts.valid_rows.tolist() == [-1, -1, 4, 8]


def _check_split(movielens: MovieLens) -> None:
    """Compare the split with one made user by user."""
    parts = split(movielens)
    by_user: dict[int, list[tuple[int, int]]] = {}
    for user, movie, timestamp in zip(
        movielens.user_ids.tolist(),
        movielens.rated_movie_ids.tolist(),
        movielens.timestamps.tolist(),
        strict=True,
    ):
        by_user.setdefault(user, []).append((timestamp, movie))
    assert parts.user_ids.tolist() == sorted(by_user)
    train = 0
    for row, user in enumerate(sorted(by_user)):
        movies = [movie for _, movie in sorted(by_user[user])]
        cut = len(movies) - 2 if len(movies) >= 3 else len(movies)
        valid, test = movies[cut:] or (-1, -1)
        assert (parts.valid_item_ids[row], parts.test_item_ids[row]) == (valid, test)
        assert parts.histories.row(row).tolist() == movies[:cut]
        assert parts.test_histories.row(row).tolist() == movies[: cut + 1]
        train += cut
    held = np.concatenate([parts.train_rows, parts.valid_rows, parts.test_rows])
    held = held[held >= 0]
    assert len(parts.train_rows) == train
    assert np.array_equal(np.sort(held), np.arange(len(movielens.ratings)))
    assert np.array_equal(movielens.rated_movie_ids[parts.train_rows], parts.histories.values)


def test_the_split_of_generated_films_is_that_of_each_user_alone() -> None:
    _check_split(generate(300, 50, 25, seed=1))


def test_popularity_is_counted_on_the_training_split_alone() -> None:
    movielens = _rated(
        {1: [(10, 1), (20, 2), (30, 3)], 2: [(10, 1), (30, 2), (20, 3), (40, 4)]}, [10, 20, 30, 40]
    )
    counts, means = popularity(movielens, split(movielens))
    assert counts.tolist() == [2, 0, 1, 0]
    assert means.tolist() == [1.0, 1.0, 1.0, 1.0]
    assert (counts.dtype, means.dtype) == (np.int64, np.float32)


def test_means_are_damped_towards_the_overall_mean() -> None:
    movielens = _rated({1: [(4, 1), (5, 2)], 2: [(4, 1)]}, [4, 5, 6])
    counts, means = popularity(movielens, split(movielens))
    prior = (5.0 + 5.0 + 1.0) / 3
    expected = [(10.0 + 10 * prior) / 12, (1.0 + 10 * prior) / 11, prior]
    assert counts.tolist() == [2, 1, 0]
    assert np.allclose(means, expected, rtol=1e-6)


def test_the_catalogue_is_what_the_schema_declares() -> None:
    movielens = _rated({1: [(10, 1), (20, 2), (30, 3)]}, [10, 20, 30])
    movielens.years[1] = NULL_INT
    counts = np.array([3, 0, 1], dtype=np.int64)
    means = np.array([5.0, 2.5, 1.0], dtype=np.float32)
    built = catalogue(movielens, counts, means)
    built.validate(schema())
    assert built.item_ids.tolist() == [10, 20, 30]
    assert built.fields["title"].tolist() == ["Film 10", "Film 20", "Film 30"]
    assert built.fields["genres"].tolist() == ["Drama|War"] * 3
    assert built.fields["year"].tolist() == [1950, NULL_INT, 1970]
    assert built.numbers["year"].tolist() == [1950, NULL_INT, 1970]
    assert built.categories["tag"].row(1).tolist() == ["t20", "all"]
    assert built.features["movie_id"].values.tolist() == [10, 20, 30]
    assert [built.features["decade"].row(row).tolist() for row in range(3)] == [[1950], [], [1970]]
    assert [built.features["year"].row(row).tolist() for row in range(3)] == [[1950], [], [1970]]
    expected = [
        [1.0, 1.0, 50 / 130],
        [0.0, 0.5, 60 / 130],
        [np.log(2) / np.log(4), 0.2, 70 / 130],
    ]
    assert np.allclose(built.signals, expected, rtol=1e-6)


def test_the_item_tower_reads_no_tags() -> None:
    names = {feature.name for feature in schema().item_features}
    assert names == {"movie_id", "genres", "year", "decade"}


def test_a_catalogue_without_ratings_or_years_is_finite() -> None:
    movielens = _rated({1: [(10, 1)]}, [10])
    movielens.years[:] = NULL_INT
    built = catalogue(movielens, np.zeros(1, dtype=np.int64), np.zeros(1, dtype=np.float32))
    built.validate(schema())
    assert built.signals.tolist() == [[0.0, 0.0, 0.5]]


def test_statistics_of_another_length_are_refused() -> None:
    movielens = _rated({1: [(10, 1)]}, [10])
    counts, means = np.zeros(1, dtype=np.int64), np.zeros(1, dtype=np.float32)
    with pytest.raises(ValueError, match=r"counts must have shape \(1,\), got \(2,\)"):
        catalogue(movielens, np.zeros(2, dtype=np.int64), means)
    with pytest.raises(ValueError, match=r"means must have shape \(1,\), got \(2,\)"):
        catalogue(movielens, counts, np.zeros(2, dtype=np.float32))


@pytest.fixture(scope="module")
def real() -> MovieLens:
    path = os.environ.get("SILVERSHARD_DATA")
    if not path:
        pytest.skip("SILVERSHARD_DATA is not set, so there is no real MovieLens to read")
    # One row of a copy in use is known to be damaged.
    return load(Path(path), max_malformed=1)


def test_real_data_are_read_whole(real: MovieLens) -> None:
    path = Path(os.environ["SILVERSHARD_DATA"])
    if not path.is_dir():
        pytest.skip("SILVERSHARD_DATA is a zip; lines are counted in a folder")
    with (path / "ratings.csv").open("rb") as stream:
        rows = sum(1 for _ in stream) - 1
    dropped = real.num_unknown + real.num_repeated + len(real.malformed)
    assert len(real.ratings) + dropped == rows
    assert real.num_unknown == real.num_repeated == 0
    assert {"Comedy", "Drama", "Film-Noir"} <= set(real.genres.values.tolist())
    assert "(no genres listed)" not in set(real.genres.values.tolist())
    dated = real.years[real.years != NULL_INT]
    assert len(dated) > 0.99 * len(real.years)
    assert ((dated >= 1870) & (dated <= 2030)).all()


def test_real_data_are_split_like_each_user_alone(real: MovieLens) -> None:
    if len(real.ratings) > 1_000_000:
        pytest.skip("the user-by-user check is for ml-latest-small")
    _check_split(real)


def test_real_data_fit_the_schema(real: MovieLens) -> None:
    catalogue(real, *popularity(real, split(real))).validate(schema())


def test_filters_know_the_tags_that_most_people_gave_a_movie() -> None:
    rows = [[f"tag{number}" for number in range(count)] for count in (0, 3, 256, 300, 1)]
    kept = recipe._first(Ragged.from_rows(rows, dtype="string"), recipe.FILTER_TAGS)
    assert [kept.row(row).tolist() for row in range(5)] == [row[:256] for row in rows]

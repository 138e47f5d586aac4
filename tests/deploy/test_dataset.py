import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from silvershard.deploy.csv_files import DataError
from silvershard.deploy.dataset import MovieLens, from_ratings, load, split_title
from silvershard.model.catalogue import NULL_INT, Ragged, as_column

FILES = {
    "movies.csv": (
        "movieId,title,genres\n"
        "30,Zulu (no year),(no genres listed)\n"
        '10,"Alien, The (1979)",Horror|Sci-Fi\n'
        "20,Amélie (2001) ,Comedy|Romance|Comedy\n"
    ),
    "ratings.csv": (
        "userId,movieId,rating,timestamp\n"
        "2,20,4.0,100\n"
        "2,10,3.5,100\n"
        "1,30,0.5,7\n"
        "1,10,5.0,9\n"
        "1,20,2.0,8\n"
    ),
    "tags.csv": (
        "userId,movieId,tag,timestamp\n"
        "1,20,Whimsical,1\n"
        "2,20, Paris ,2\n"
        "3,20,paris,3\n"
        "3,20,art  House,3\n"
        "3,99,lost,3\n"
        "3,10,  ,3\n"
    ),
}


def _write(folder: Path, files: Mapping[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def _ratings(movielens: MovieLens) -> list[tuple[float, ...]]:
    return list(
        zip(
            movielens.user_ids.tolist(),
            movielens.rated_movie_ids.tolist(),
            movielens.ratings.tolist(),
            movielens.timestamps.tolist(),
            strict=True,
        )
    )


def _from(rows: list[tuple[int, int, float, int]], movie_ids: list[int]) -> MovieLens:
    empty = Ragged.from_rows([[]] * len(movie_ids), dtype="string")
    users, movies, ratings, timestamps = zip(*rows, strict=True)
    return from_ratings(
        source="test",
        generated=False,
        movie_ids=np.array(movie_ids, dtype=np.int64),
        titles=as_column(["x"] * len(movie_ids), "string"),
        years=np.full(len(movie_ids), 2000, dtype=np.int64),
        genres=empty,
        tags=empty,
        user_ids=np.array(users, dtype=np.int64),
        rated_movie_ids=np.array(movies, dtype=np.int64),
        ratings=np.array(ratings, dtype=np.float32),
        timestamps=np.array(timestamps, dtype=np.int64),
    )


def test_movies_come_by_id_with_title_year_genres_and_tags(tmp_path: Path) -> None:
    movielens = load(_write(tmp_path, FILES))
    assert movielens.movie_ids.tolist() == [10, 20, 30]
    assert movielens.titles.tolist() == ["Alien, The", "Amélie", "Zulu (no year)"]
    assert movielens.years.tolist() == [1979, 2001, NULL_INT]
    assert [movielens.genres.row(row).tolist() for row in range(3)] == [
        ["Horror", "Sci-Fi"],
        ["Comedy", "Romance"],
        [],
    ]
    assert [movielens.tags.row(row).tolist() for row in range(3)] == [
        [],
        ["paris", "art house", "whimsical"],
        [],
    ]
    assert movielens.source == str(tmp_path)
    assert not movielens.generated


def test_ratings_come_by_user_then_time_then_movie(tmp_path: Path) -> None:
    movielens = load(_write(tmp_path, FILES))
    assert _ratings(movielens) == [
        (1, 30, 0.5, 7),
        (1, 20, 2.0, 8),
        (1, 10, 5.0, 9),
        (2, 10, 3.5, 100),
        (2, 20, 4.0, 100),
    ]
    assert movielens.num_users == 2
    assert movielens.ratings.dtype == np.float32


def test_a_zip_gives_the_same_as_a_folder(tmp_path: Path) -> None:
    folder = load(_write(tmp_path, FILES))
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
        for name, text in FILES.items():
            archive.writestr(f"ml-x/{name}", text)
    zipped = load(tmp_path / "data.zip", source="zip")
    assert _ratings(zipped) == _ratings(folder)
    assert zipped.titles.tolist() == folder.titles.tolist()
    assert zipped.tags.values.tolist() == folder.tags.values.tolist()
    assert zipped.source == "zip"


def test_tags_are_optional(tmp_path: Path) -> None:
    files = {name: text for name, text in FILES.items() if name != "tags.csv"}
    movielens = load(_write(tmp_path, files))
    assert movielens.tags.lengths.tolist() == [0, 0, 0]
    assert [len(column) for column in movielens.tagging] == [0, 0, 0, 0]


def test_who_gave_a_tag_and_when_is_kept_in_the_order_of_users_and_time(tmp_path: Path) -> None:
    files = {**FILES, "tags.csv": FILES["tags.csv"] + "1,10, Space  Ship,0\n"}
    tagging = load(_write(tmp_path, files)).tagging
    assert tagging.user_ids.tolist() == [1, 1, 2, 3, 3]
    assert tagging.movie_ids.tolist() == [10, 20, 20, 20, 20]
    assert tagging.tags.tolist() == ["space ship", "whimsical", "paris", "paris", "art house"]
    assert tagging.timestamps.tolist() == [0, 1, 2, 3, 3]


def test_the_order_of_rows_in_the_file_does_not_matter(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    pairs = rng.permutation(40 * 50)[:900]
    rows = [
        (int(pair // 50), int(pair % 50) * 3, 3.0, int(time))
        for pair, time in zip(pairs, rng.integers(0, 30, 900), strict=True)
    ]
    expected = sorted(rows, key=lambda row: (row[0], row[3], row[1]))
    movie_ids = list(range(0, 150, 3))
    assert _ratings(_from(rows, movie_ids)) == expected
    assert _ratings(_from(sorted(rows), movie_ids)) == expected


def test_blocks_of_users_are_ordered_like_one(monkeypatch: pytest.MonkeyPatch) -> None:
    # Times of 55 bits and seven bits of movies leave one bit, so two users, per block.
    rng = np.random.default_rng(4)
    rows = [
        (user, movie, 3.0, int(time))
        for user in range(9)
        for movie, time in zip(range(64, 94), rng.integers(0, 2**55, 30), strict=True)
    ]
    expected = sorted(rows, key=lambda row: (row[0], row[3], row[1]))
    assert _ratings(_from(rows, list(range(128)))) == expected
    monkeypatch.setattr(np, "lexsort", None)
    assert _ratings(_from(rows, list(range(128)))) == expected


def test_one_movie_and_one_moment_are_enough() -> None:
    assert _ratings(_from([(5, 0, 3.0, 9), (6, 0, 4.0, 9)], [0])) == [
        (5, 0, 3.0, 9),
        (6, 0, 4.0, 9),
    ]


@pytest.mark.parametrize("last", [60, 2**40], ids=["table", "search"])
def test_ratings_of_unknown_movies_are_dropped_and_counted(last: int) -> None:
    rows = [(1, 10, 3.0, 1), (1, 11, 3.0, 2), (1, last, 4.0, 3), (2, last + 1, 2.0, 1)]
    movielens = _from(rows, [10, last])
    assert _ratings(movielens) == [(1, 10, 3.0, 1), (1, last, 4.0, 3)]
    assert movielens.num_unknown == 2
    assert "2 ratings dropped: movie not in movies.csv" in movielens.summary
    assert movielens.movie_rows(np.array([last, 5, 10, last + 7])).tolist() == [1, -1, 0, -1]


def test_only_the_last_rating_of_a_movie_by_a_user_counts() -> None:
    rows = [(1, 10, 3.0, 5), (1, 20, 1.0, 2), (1, 10, 4.0, 1), (1, 20, 2.0, 2), (2, 10, 5.0, 0)]
    movielens = _from(rows, [10, 20])
    assert _ratings(movielens) == [(1, 20, 2.0, 2), (1, 10, 3.0, 5), (2, 10, 5.0, 0)]
    assert movielens.num_repeated == 2
    assert "2 ratings dropped: rated again later by the same user" in movielens.summary


def test_malformed_rows_are_dropped_only_on_request(tmp_path: Path) -> None:
    bad = FILES["ratings.csv"] + "3,10,4.0,1 https://example.org\n"
    _write(tmp_path, {**FILES, "ratings.csv": bad})
    with pytest.raises(DataError, match=r"ratings\.csv, line 7, column timestamp: must be"):
        load(tmp_path)
    movielens = load(tmp_path, max_malformed=1)
    assert movielens.num_users == 2
    assert len(movielens.malformed) == 1
    assert movielens.summary.endswith(
        f"malformed rows dropped: 1, the first {movielens.malformed[0]}"
    )


def test_the_summary_counts_what_is_kept(tmp_path: Path) -> None:
    movielens = load(_write(tmp_path, FILES), source="these")
    assert movielens.summary == "these: 3 movies, 2 users, 5 ratings"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("movies.csv", "movieId,title,genres\n", "must have at least one movie, got only a header"),
        ("movies.csv", "movieId,title\n1,a\n", "line 1, column genres: must be in the header"),
        ("movies.csv", "movieId,title,genres\nx,a,b\n", "line 2, column movieId: must be an int"),
        (
            "movies.csv",
            "movieId,title,genres\n1,a,b\n2,a,b\n1,a,b\n",
            "line 4, column movieId: must be unique, got 1 again",
        ),
        (
            "tags.csv",
            "userId,movieId,tag,timestamp\n1,10,a,1\n1,1x,b,1\n",
            "tags.csv, line 3, column movieId: must be an",
        ),
        (
            "tags.csv",
            "userId,movieId,tag,timestamp\n1,10,a,yesterday\n",
            "tags.csv, line 2, column timestamp: must be an",
        ),
        ("tags.csv", "movieId,tag\n10,a\n", "tags.csv, line 1, column userId: must be in"),
        ("ratings.csv", "userId,movieId,rating,timestamp\n1,77,3,4\n", "none of the 1 ratings is"),
    ],
)
def test_bad_input_is_refused_by_file_line_and_column(
    tmp_path: Path, name: str, text: str, message: str
) -> None:
    _write(tmp_path, {**FILES, name: text})
    with pytest.raises(DataError) as caught:
        load(tmp_path)
    assert message in str(caught.value)


def test_a_path_that_is_no_data_set_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere: does not exist; required is a MovieLens folder"):
        load(tmp_path / "nowhere")
    (tmp_path / "file").write_text("hello")
    with pytest.raises(DataError, match="file: is neither a folder nor a zip"):
        load(tmp_path / "file")
    with pytest.raises(DataError, match=r"movies\.csv: is missing"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("text", "title", "year"),
    [
        ("Heat (1995)", "Heat", 1995),
        ("Heat (1995) ", "Heat", 1995),
        ("Heat", "Heat", NULL_INT),
        ("Cosmos (TV)", "Cosmos (TV)", NULL_INT),
        ("Death Note (2006\u20132007)", "Death Note", 2006),
        ("Fawlty Towers (1975-1979)", "Fawlty Towers", 1975),
        ("Ongoing (2011- )", "Ongoing", 2011),
        ("(500) Days of Summer (2009)", "(500) Days of Summer", 2009),
        ("2001: A Space Odyssey (1968)", "2001: A Space Odyssey", 1968),
        ("(1999)", "(1999)", NULL_INT),
        ("Twice (1990) (1991)", "Twice (1990)", 1991),
    ],
)
def test_the_year_is_taken_from_the_end_of_the_title(text: str, title: str, year: int) -> None:
    assert split_title(text) == (title, year)

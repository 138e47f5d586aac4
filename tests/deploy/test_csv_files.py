import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest

from silvershard.deploy import csv_files
from silvershard.deploy.csv_files import DataError, has_file, read_ratings, text_rows

HEADER = "userId,movieId,rating,timestamp\n"


def _write(folder: Path, text: str | bytes, name: str = "ratings.csv") -> Path:
    content = text.encode() if isinstance(text, str) else text
    (folder / name).write_bytes(content)
    return folder


def _rows(path: Path) -> list[tuple[float, ...]]:
    columns, malformed = read_ratings(path, 0)
    assert not malformed
    assert [column.dtype for column in columns.values()] == [
        np.int64,
        np.int64,
        np.float32,
        np.int64,
    ]
    return list(zip(*(column.tolist() for column in columns.values()), strict=True))


def _error(path: Path, max_malformed: int = 0) -> DataError:
    with pytest.raises(DataError) as caught:
        read_ratings(path, max_malformed)
    return caught.value


def _random_rows(count: int) -> list[tuple[int, int, float, int]]:
    rng = np.random.default_rng(7)
    return list(
        zip(
            rng.integers(0, 10**15, count).tolist(),
            rng.integers(0, 300_000, count).tolist(),
            (rng.integers(1, 11, count) / 2).tolist(),
            (10 ** rng.integers(0, 15, count)).tolist(),
            strict=True,
        )
    )


@pytest.mark.parametrize("style", ["plain", "crlf", "quoted", "spaced", "no last newline", "bom"])
def test_every_way_to_write_the_same_rows_reads_the_same(tmp_path: Path, style: str) -> None:
    rows = _random_rows(500)
    fields = [[str(value) for value in row] for row in rows]
    if style == "quoted":
        fields = [[f'"{field}"' for field in row] for row in fields]
    if style == "spaced":
        fields = [[f" {field}" for field in row] for row in fields]
    text = HEADER + "".join(",".join(row) + "\n" for row in fields)
    if style == "crlf":
        text = text.replace("\n", "\r\n")
    if style == "no last newline":
        text = text.removesuffix("\n")
    if style == "bom":
        text = "\ufeff" + text
    assert _rows(_write(tmp_path, text)) == rows


def test_plain_decimals_of_mixed_widths_are_not_read_row_by_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(csv_files, "_parse_rows", None)
    text = HEADER + "1,2,4,1000000000\n10000,3,3.25,7\n"
    assert _rows(_write(tmp_path, text)) == [(1, 2, 4.0, 1_000_000_000), (10_000, 3, 3.25, 7)]


@pytest.mark.parametrize("size", [1, 7, 64, 1000])
def test_the_size_of_a_chunk_does_not_show(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    rows = _random_rows(50)
    text = HEADER + "".join(f"{u},{m},{r},{t}\n" for u, m, r, t in rows)
    monkeypatch.setattr(csv_files, "_CHUNK_BYTES", size)
    assert _rows(_write(tmp_path, text)) == rows
    bad = text + "1,2,3.0,x\n"
    assert _error(_write(tmp_path, bad)).line == 52


def test_ratings_take_any_decimal_form_that_python_takes(tmp_path: Path) -> None:
    forms = ["4", "4.", "4.0", ".5", "0.50", "4.25", "3.141592", "4e0", "+4", "04.5"]
    text = HEADER + "".join(f"1,{movie},{form},3\n" for movie, form in enumerate(forms))
    expected = [float(np.float32(float(form))) for form in forms]
    assert [row[2] for row in _rows(_write(tmp_path, text))] == expected


def test_columns_may_come_in_any_order_with_others_between(tmp_path: Path) -> None:
    text = "timestamp,note,rating,movieId,userId\n9,hi,3.5,20,1\n8,,0.5,30,2\n"
    assert _rows(_write(tmp_path, text)) == [(1, 20, 3.5, 9), (2, 30, 0.5, 8)]


def test_blank_lines_are_skipped_and_still_counted(tmp_path: Path) -> None:
    assert _rows(_write(tmp_path, HEADER + "\n1,2,3.0,4\n\n\n5,6,1.0,7\n\n")) == [
        (1, 2, 3.0, 4),
        (5, 6, 1.0, 7),
    ]
    assert _error(_write(tmp_path, HEADER + "\n1,2,3.0,4\n\n1,2,9,4\n")).line == 5


@pytest.mark.parametrize(
    ("row", "column", "message"),
    [
        ("1,2,3.0,84743496 https://x", "timestamp", "must be an integer of 0 or more"),
        ("1.5,2,3.0,4", "userId", "must be an integer of 0 or more, got '1.5'"),
        ("1,-2,3.0,4", "movieId", "must be an integer of 0 or more, got '-2'"),
        ("1,,3.0,4", "movieId", "must be an integer of 0 or more, got ''"),
        ("1,2,,4", "rating", "must be a number, got ''"),
        ("1,2,.,4", "rating", "must be a number, got '.'"),
        ("1,2,3.0.0,4", "rating", "must be a number, got '3.0.0'"),
        ("1,2,good,4", "rating", "must be a number, got 'good'"),
        ("1,2,nan,4", "rating", "must be from 0.5 to 5.0, got nan"),
        ("1,2,5.5,4", "rating", "must be from 0.5 to 5.0, got 5.5"),
        ("1,2,0,4", "rating", "must be from 0.5 to 5.0, got 0"),
        ("1,2,3.0", None, "must have 4 columns, got 3"),
        ("1,2,3.0,4,5", None, "must have 4 columns, got 5"),
        ("1,2,3.0,9999999999999999999", "timestamp", "must be an integer of 0 or more"),
        ("1,2,3.0,\u0663", "timestamp", "must be an integer of 0 or more"),
    ],
)
def test_a_malformed_row_is_refused_by_file_line_and_column(
    tmp_path: Path, row: str, column: str | None, message: str
) -> None:
    error = _error(_write(tmp_path, f"{HEADER}1,2,3.0,4\n{row}\n1,3,3.0,4\n"))
    assert (error.line, error.column) == (3, column)
    assert message in error.message
    where = f"{tmp_path / 'ratings.csv'}, line 3" + (f", column {column}" if column else "")
    assert str(error) == f"{where}: {error.message}"


def test_rows_of_three_and_five_fields_do_not_make_two_rows_of_four(tmp_path: Path) -> None:
    assert _error(_write(tmp_path, HEADER + "1,2,3\n4,1,2,3,4\n")).line == 2


def test_malformed_rows_are_dropped_and_listed_up_to_the_limit(tmp_path: Path) -> None:
    _write(tmp_path, HEADER + "1,2,3.0,4\n1,x,3.0,4\n1,3,3.5,5\n1,4,3.0\n")
    columns, malformed = read_ratings(tmp_path, 2)
    assert columns["movieId"].tolist() == [2, 3]
    assert [(error.line, error.column) for error in malformed] == [(3, "movieId"), (5, None)]
    error = _error(tmp_path, 1)
    assert error.line == 3
    assert error.message.endswith("this is one of more than 1 malformed rows")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        (HEADER, "must have at least one rating, got only a header"),
        ("userId,movieId,rating\n1,2,3\n", "column timestamp: must be in the header once"),
        (HEADER.replace("movieId", "userId"), "column userId: must be in the header once"),
        ("1,2,3.0,4\n", "line 1, column userId: must be in the header once, got '1,2,3.0,4'"),
    ],
)
def test_a_file_without_header_or_rows_is_refused(tmp_path: Path, text: str, message: str) -> None:
    assert message in str(_error(_write(tmp_path, text)))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    assert str(_error(tmp_path)) == f"{tmp_path / 'ratings.csv'}: is missing"


def test_text_rows_know_quotes_line_breaks_and_byte_order_marks(tmp_path: Path) -> None:
    text = '\ufeffmovieId,title,genres\r\n1,"One, ""two""\r\nthree",A|B\r\n\r\n2,Amélie,C\r\n'
    _write(tmp_path, text, "movies.csv")
    assert list(text_rows(tmp_path, "movies.csv", "title", "movieId")) == [
        (3, ['One, "two"\r\nthree', "1"]),
        (5, ["Amélie", "2"]),
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", ": is empty"),
        (b"movieId,name\n1,a\n", "line 1, column title: must be in the header once"),
        (b"movieId,title\n1,a\n2\n", "line 3: must have 2 columns, got 1"),
        (b'movieId,title\n1,a\n2,"b\n3,c\n', "is not valid CSV"),
        (b"movieId,title\n1,a\n2,\xff\n", "line 3: must be UTF-8: invalid start byte"),
        (b"movieId,t\xe9tle\n", "line 1: must be UTF-8: invalid continuation byte"),
        (b"movieId,title\n1," + b"a" * 200_000 + b"\n", "is not valid CSV: field larger"),
    ],
)
def test_text_rows_refuse_what_is_not_their_table(
    tmp_path: Path, content: bytes, message: str
) -> None:
    _write(tmp_path, content, "movies.csv")
    with pytest.raises(DataError) as caught:
        list(text_rows(tmp_path, "movies.csv", "movieId", "title"))
    assert message in str(caught.value)


@pytest.mark.parametrize("ending", [b"\n", b"\r\n"])
@pytest.mark.parametrize("where", ["folder", "zip"])
def test_a_byte_that_is_not_utf_8_is_found_on_its_own_line(
    tmp_path: Path, ending: bytes, where: str
) -> None:
    rows = [b"movieId,title", *(b"%d,Am\xc3\xa9lie" % number for number in range(2, 20_000))]
    # A title of two lines counts as two.
    rows[100] = b'101,"one' + ending + b'two"'
    rows[15_000] = b"15001,Am\xe9lie"
    content = ending.join(rows) + ending
    path = _write(tmp_path, content, "movies.csv")
    if where == "zip":
        path = tmp_path / "a.zip"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("ml/movies.csv", content)
    with pytest.raises(DataError, match="must be UTF-8: invalid continuation byte") as caught:
        list(text_rows(path, "movies.csv", "movieId", "title"))
    assert caught.value.line == 15_002


def _zip(path: Path, **members: str) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in members.items():
            archive.writestr(name.replace("__", "/") + ".csv", text)
    return path


def test_a_zip_is_read_in_place_whatever_folder_its_files_are_in(tmp_path: Path) -> None:
    path = _zip(tmp_path / "a.zip", any__where__ratings=HEADER + "1,2,3.0,4\n")
    assert _rows(path) == [(1, 2, 3.0, 4)]
    assert has_file(path, "ratings.csv")
    assert not has_file(path, "tags.csv")
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.zip"]


def test_a_zip_must_hold_a_file_once(tmp_path: Path) -> None:
    assert "must be in the zip once, got 0 times" in str(_error(_zip(tmp_path / "a.zip", x="")))
    both = _zip(tmp_path / "b.zip", a__ratings=HEADER, b__ratings=HEADER)
    assert "must be in the zip once, got 2 times" in str(_error(both))


def test_an_oversized_member_of_a_zip_is_not_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = _zip(tmp_path / "a.zip", ratings=HEADER + "1,2,3.0,4\n" * 1000)
    monkeypatch.setattr(csv_files, "MAX_FILE_BYTES", 5000)
    assert "must have at most 5,000 bytes, got 10,032" in str(_error(path))


@pytest.mark.parametrize("where", ["data", "flag"])
def test_a_damaged_or_encrypted_zip_is_refused(tmp_path: Path, where: str) -> None:
    path = _zip(tmp_path / "a.zip", ratings=HEADER + "1,2,3.0,4\n" * 1000)
    content = bytearray(path.read_bytes())
    if where == "data":
        content[60] ^= 0xFF
    else:
        content[content.index(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(content)
    assert ("cannot be read" if where == "data" else "must not be encrypted") in str(_error(path))


def test_the_error_survives_pickling() -> None:
    error = DataError("f.csv", "must be 1, got 2", 3, "rating")
    copy = pickle.loads(pickle.dumps(error))
    assert str(copy) == str(error) == "f.csv, line 3, column rating: must be 1, got 2"
    assert (copy.file, copy.message, copy.line, copy.column) == (
        "f.csv",
        "must be 1, got 2",
        3,
        "rating",
    )

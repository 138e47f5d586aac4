"""Reads the CSV files of a data set out of a folder or a zip, with errors that name the line.

Ratings are parsed as whole columns, a few megabytes at a time, because ml-32m has 32 million.
"""

import csv
import re
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from silvershard.shard.errors import RetrievalError

RATING_COLUMNS = ("userId", "movieId", "rating", "timestamp")
MIN_RATING, MAX_RATING = 0.5, 5.0

MAX_FILE_BYTES = 8 * 2**30
"""Largest CSV file read out of a zip; ml-32m's ratings.csv has 0.9 GB."""

_CHUNK_BYTES = 8 * 2**20
_MAX_DIGITS = 15
_INTEGER = re.compile(r"-?[0-9]{1,18}")


class DataError(RetrievalError, ValueError):
    """A file of a data set cannot be used.

    Attributes:
        file: path of the file or folder at fault.
        message: what was required and what was got.
        line: 1-based line in the file, or None.
        column: name of the column, or None.
    """

    def __init__(
        self, file: str, message: str, line: int | None = None, column: str | None = None
    ) -> None:
        where = file
        if line is not None:
            where += f", line {line}"
        if column is not None:
            where += f", column {column}"
        super().__init__(f"{where}: {message}")
        self.file = file
        self.message = message
        self.line = line
        self.column = column


def text_rows(path: Path, name: str, *columns: str) -> Iterator[tuple[int, list[str]]]:
    """The wanted columns of every row of a CSV file, with the line that the row ends on.

    A progress bar appears after two seconds.
    """
    file = name_of(path, name)
    with _open(path, name) as (stream, size):
        reader = csv.reader(_text_lines(file, stream), strict=True)
        try:
            header = next(reader, None) if size else None
            positions = _positions(file, header, columns)
            width = len(header or ())
            with tqdm(
                reader, desc=f"reading {file}", unit=" rows", unit_scale=True, delay=2, leave=False
            ) as rows:
                for row in rows:
                    if not row:
                        continue
                    if len(row) != width:
                        raise DataError(
                            file, f"must have {width} columns, got {len(row)}", reader.line_num
                        )
                    yield reader.line_num, [row[position] for position in positions]
        except csv.Error as error:
            raise DataError(file, f"is not valid CSV: {error}", reader.line_num) from error


def _text_lines(file: str, stream: IO[bytes]) -> Iterator[str]:
    """The lines of a file; a text wrapper would decode far ahead of the line at fault."""
    for number, line in enumerate(stream, start=1):
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise DataError(file, f"must be UTF-8: {error.reason}", number) from error


def _positions(file: str, header: Sequence[str] | None, columns: Sequence[str]) -> list[int]:
    if header is None:
        raise DataError(file, "is empty")
    for column in columns:
        if header.count(column) != 1:
            raise DataError(
                file, f"must be in the header once, got {','.join(header)[:200]!r}", 1, column
            )
    return [header.index(column) for column in columns]


def parse_int(file: str, line: int, column: str, text: str) -> int:
    if not _INTEGER.fullmatch(text) or int(text) < 0:
        raise DataError(file, f"must be an integer of 0 or more, got {text[:40]!r}", line, column)
    return int(text)


def read_ratings(path: Path, max_malformed: int) -> tuple[dict[str, NDArray[Any]], list[DataError]]:
    malformed: list[DataError] = []
    file = name_of(path, "ratings.csv")
    parts: list[list[NDArray[Any]]] = []
    with _open(path, "ratings.csv") as (stream, size):
        header_line = stream.readline(65_536).removeprefix(b"\xef\xbb\xbf")
        header = header_line.decode("utf-8", "replace").rstrip("\r\n").split(",")
        positions = _positions(file, header if header_line else None, RATING_COLUMNS)
        line = 2
        with tqdm(
            total=size, desc=f"reading {file}", unit="B", unit_scale=True, delay=2, leave=False
        ) as bar:
            for chunk in _line_chunks(stream):
                columns = _parse_fast(chunk, positions, len(header))
                if columns is None:
                    columns = _parse_rows(file, line, chunk, positions, len(header), malformed)
                if len(malformed) > max_malformed:
                    raise _too_many(malformed, max_malformed)
                parts.append(columns)
                line += chunk.count(b"\n")
                bar.update(len(chunk))
    if not sum(len(part[0]) for part in parts):
        raise DataError(file, "must have at least one rating, got only a header")
    ratings = {
        name: np.concatenate([part[index] for part in parts])
        for index, name in enumerate(RATING_COLUMNS)
    }
    return ratings, malformed


def _too_many(malformed: Sequence[DataError], max_malformed: int) -> DataError:
    """The first error, and that there are more than were allowed, if any were."""
    first = malformed[0]
    if max_malformed == 0:
        return first
    message = f"{first.message}; this is one of more than {max_malformed} malformed rows"
    return DataError(first.file, message, first.line, first.column)


def _line_chunks(stream: IO[bytes]) -> Iterator[bytes]:
    """Whole lines, each ended by a newline, about ``_CHUNK_BYTES`` at a time."""
    rest = b""
    while block := stream.read(_CHUNK_BYTES):
        head, newline, tail = block.rpartition(b"\n")
        if newline:
            yield rest + head + newline
            rest = tail
        else:
            rest += block
    if rest:
        yield rest + b"\n"


def _parse_fast(
    chunk: bytes, positions: Sequence[int], num_columns: int
) -> list[NDArray[Any]] | None:
    """The columns of lines that hold nothing but good plain decimals, or None for other lines.

    Vectorised over the rows of the chunk: about three times as fast as ``numpy.loadtxt``.
    """
    padding = b"0" * (_MAX_DIGITS + 1)
    text = np.frombuffer(padding + chunk.replace(b"\r\n", b"\n"), dtype=np.uint8)
    newline = text == ord("\n")
    ends = np.flatnonzero(newline | (text == ord(",")))
    num_rows = int(np.count_nonzero(newline))
    if (
        len(ends) != num_rows * num_columns
        or not newline[ends[num_columns - 1 :: num_columns]].all()
    ):
        return None
    starts = np.empty_like(ends)
    starts[0], starts[1:] = len(padding), ends[:-1] + 1
    columns: list[NDArray[Any]] = []
    for name, position in zip(RATING_COLUMNS, positions, strict=True):
        field_ends = ends[position::num_columns]
        lengths = field_ends - starts[position::num_columns]
        values = _parse_decimal(text, field_ends, lengths, fraction=name == "rating")
        if values is None:
            return None
        columns.append(values)
    ratings = columns[RATING_COLUMNS.index("rating")]
    return columns if ((ratings >= MIN_RATING) & (ratings <= MAX_RATING)).all() else None


def _parse_decimal(
    text: NDArray[np.uint8],
    ends: NDArray[np.int64],
    lengths: NDArray[np.int64],
    *,
    fraction: bool,
) -> NDArray[Any] | None:
    """Numbers of digits, with one point at most if ``fraction``; None if a field is anything else.

    Digits are gathered from the last to the first, one position of all rows at a time.
    """
    longest, shortest = int(lengths.max()), int(lengths.min())
    if shortest < 1 or longest > _MAX_DIGITS:
        return None
    mantissa = np.zeros(len(ends), dtype=np.int64)
    scale: Any = np.ones(len(ends), dtype=np.int64) if fraction else 1
    divisor = np.ones(len(ends), dtype=np.int64)
    points = np.zeros(len(ends), dtype=np.int64)
    for place in range(longest):
        digit = text[ends - (place + 1)] - np.uint8(ord("0"))
        if place >= shortest:
            digit[lengths <= place] = 0
        if fraction:
            point = digit == (ord(".") - ord("0")) % 256
            digit[point] = 0
            divisor[point] = scale[point]
            points += point
        if (digit > 9).any():
            return None
        mantissa += digit.astype(np.int64) * scale
        scale = np.where(point, scale, scale * 10) if fraction else scale * 10
    if not fraction:
        return mantissa
    if (points > 1).any() or (points == lengths).any():
        return None
    return (mantissa / divisor).astype(np.float32)


def _parse_rows(
    file: str,
    first_line: int,
    chunk: bytes,
    positions: Sequence[int],
    num_columns: int,
    malformed: list[DataError],
) -> list[NDArray[Any]]:
    """The columns of any lines, row by row; malformed rows are left out and added to the list."""
    rows: list[tuple[int, int, float, int]] = []
    for line, raw in enumerate(chunk.split(b"\n")[:-1], start=first_line):
        fields = raw.decode("utf-8", "replace").rstrip("\r").split(",")
        if fields == [""]:
            continue
        try:
            if len(fields) != num_columns:
                raise DataError(file, f"must have {num_columns} columns, got {len(fields)}", line)
            user, movie, rating, timestamp = (
                fields[position].strip().removeprefix('"').removesuffix('"')
                for position in positions
            )
            rows.append(
                (
                    parse_int(file, line, "userId", user),
                    parse_int(file, line, "movieId", movie),
                    _parse_rating(file, line, rating),
                    parse_int(file, line, "timestamp", timestamp),
                )
            )
        except DataError as error:
            malformed.append(error)
    columns = list(zip(*rows, strict=True)) or [()] * len(positions)
    return [
        np.array(values, dtype=np.float32 if name == "rating" else np.int64)
        for values, name in zip(columns, RATING_COLUMNS, strict=True)
    ]


def _parse_rating(file: str, line: int, text: str) -> float:
    try:
        rating = float(text)
    except ValueError:
        raise DataError(file, f"must be a number, got {text[:40]!r}", line, "rating") from None
    if not MIN_RATING <= rating <= MAX_RATING:
        raise DataError(
            file, f"must be from {MIN_RATING} to {MAX_RATING}, got {rating:g}", line, "rating"
        )
    return rating


def name_of(path: Path, name: str) -> str:
    return str(path / name)


def has_file(path: Path, name: str) -> bool:
    if path.is_dir():
        return (path / name).is_file()
    with zipfile.ZipFile(path) as archive:
        return bool(_members(archive, name))


def _members(archive: zipfile.ZipFile, name: str) -> list[zipfile.ZipInfo]:
    return [info for info in archive.infolist() if PurePosixPath(info.filename).name == name]


@contextmanager
def _open(path: Path, name: str) -> Iterator[tuple[IO[bytes], int]]:
    """The bytes of a file in the folder or zip, and how many there are."""
    file = name_of(path, name)
    try:
        if path.is_dir():
            if not (path / name).is_file():
                raise DataError(file, "is missing")
            with (path / name).open("rb") as stream:
                yield stream, (path / name).stat().st_size
            return
        with zipfile.ZipFile(path) as archive:
            members = _members(archive, name)
            if len(members) != 1:
                raise DataError(file, f"must be in the zip once, got {len(members)} times")
            if members[0].file_size > MAX_FILE_BYTES:
                raise DataError(
                    file,
                    f"must have at most {MAX_FILE_BYTES:,} bytes, got {members[0].file_size:,}",
                )
            if members[0].flag_bits & 1:
                raise DataError(file, "must not be encrypted")
            with archive.open(members[0]) as member:
                yield member, members[0].file_size
    except (OSError, EOFError, zlib.error, zipfile.BadZipFile, NotImplementedError) as error:
        raise DataError(file, f"cannot be read: {error}") from error

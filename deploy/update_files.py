"""Files of updates, read record by record: JSON lines, and Parquet with a row per upsert.

A record that cannot be read is told with its reason, and the file is read on.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol

from silvershard.deploy.errors import CommandError, ExitCode
from silvershard.deploy.update_json import KEYS, ItemUpdate, update_from

FORMATS = ("auto", "parquet", "jsonl")
MAX_LINE_BYTES = 8 << 20
_MAGIC = b"PAR1"
_MARK_BYTES = 4096
_ROWS_AT_ONCE = 1024
_MAPS = ("attributes", "signals", "fields", "features")
_SHOWN = 2000


class Entry(NamedTuple):
    """One record of a file."""

    number: int
    """Of its line or row, from 1."""
    end: int
    """Where reading goes on behind it: bytes of JSON lines, rows of Parquet."""
    record: object
    """As a JSON value; the text of a line that is none."""
    update: ItemUpdate | None
    """None if the record is none."""
    reason: str = ""
    """Why it is none."""


class UpdateFile(Protocol):
    """A file of updates."""

    path: Path

    @property
    def size(self) -> int:
        """Return the ``end`` of the last record."""

    def mark(self, end: int) -> str:
        """Return what another file would most likely not have before ``end``."""

    def entries(self, end: int = 0, number: int = 0) -> Iterator[Entry]:
        """Yield the records behind a place.

        Args:
            end: of the last record that was read.
            number: of that record.
        """


def open_updates(path: Path, form: str = "auto") -> UpdateFile:
    """Return the reader of a file.

    Args:
        path: of the file.
        form: of ``FORMATS``; ``auto`` looks at the first bytes.

    Raises:
        CommandError: if it cannot be read as that, or a column is no part of an update.
    """
    try:
        with path.open("rb") as file:
            is_parquet = form == "parquet" or (form == "auto" and file.read(4) == _MAGIC)
        return ParquetRows(path) if is_parquet else JsonLines(path)
    except OSError as error:
        raise CommandError(f"{path} cannot be read: {error.strerror or error}") from None


class JsonLines:
    """A file with one JSON object per line; blank lines are passed over."""

    def __init__(self, path: Path) -> None:
        """Read the file at ``path``; it may grow meanwhile."""
        self.path = path

    @property
    def size(self) -> int:
        """Return the bytes of the file."""
        return self.path.stat().st_size

    def mark(self, end: int) -> str:
        """Return a hash of the bytes just before ``end``."""
        with self.path.open("rb") as file:
            file.seek(max(end - _MARK_BYTES, 0))
            return hashlib.sha256(file.read(min(end, _MARK_BYTES))).hexdigest()

    def entries(self, end: int = 0, number: int = 0) -> Iterator[Entry]:
        """Yield the records behind byte ``end``, which is the end of line ``number``."""
        with self.path.open("rb") as file:
            file.seek(end)
            while line := file.readline(MAX_LINE_BYTES + 1):
                number += 1
                too_long = len(line) > MAX_LINE_BYTES
                if too_long and not line.endswith(b"\n"):
                    _skip_line(file)
                end = file.tell()
                if too_long:
                    reason = f"a line must be at most {MAX_LINE_BYTES} bytes"
                    yield Entry(number, end, _text(line), None, reason)
                elif line.strip():
                    yield _entry(number, end, line)


def _skip_line(file: IO[bytes]) -> None:
    while (rest := file.readline(MAX_LINE_BYTES)) and not rest.endswith(b"\n"):
        pass


def _text(line: bytes) -> str:
    return line[:_SHOWN].decode(errors="replace").rstrip("\n")


def _entry(number: int, end: int, line: bytes) -> Entry:
    try:
        document = json.loads(line)
    except UnicodeDecodeError:
        return Entry(number, end, _text(line), None, "a line must be UTF-8")
    except RecursionError:
        return Entry(number, end, _text(line), None, "a line must not be nested so deep")
    except ValueError as error:
        return Entry(number, end, _text(line), None, f"a line must be JSON: {error}")
    return _read(number, end, document)


def _read(number: int, end: int, document: object) -> Entry:
    try:
        return Entry(number, end, document, update_from(document))
    except ValueError as error:
        return Entry(number, end, document, None, str(error))


class ParquetRows:
    """A Parquet file with one upsert per row.

    Columns are ``item_id``; ``attributes.NAME``, ``signals.NAME``, ``fields.NAME`` and
    ``features.NAME``; ``version``, ``if_version``, ``ttl_s`` and ``embedding``. What is null is not
    given.
    """

    def __init__(self, path: Path) -> None:
        """Read the file at ``path``.

        Raises:
            CommandError: if it is not Parquet, a column is no part of an upsert, or pyarrow, which
                reads it, is missing.
        """
        try:
            import pyarrow
            from pyarrow import parquet
        except ModuleNotFoundError:
            raise CommandError(
                f"{path} is Parquet, which needs pyarrow: pip install 'silvershard[parquet]'"
            ) from None
        self.path = path
        self._refused: tuple[type[Exception], ...] = (pyarrow.ArrowException, OSError)
        try:
            self._file = parquet.ParquetFile(path)
        except self._refused as error:
            raise CommandError(f"{path} cannot be read as Parquet: {error}") from None
        self._columns = _columns(path, self._file.schema_arrow)

    @property
    def size(self) -> int:
        """Return the rows of the file."""
        return int(self._file.metadata.num_rows)

    def mark(self, end: int) -> str:
        """Return a hash of the end of the file, where Parquet describes the whole."""
        with self.path.open("rb") as file:
            file.seek(max(self.path.stat().st_size - _MARK_BYTES, 0))
            return hashlib.sha256(file.read()).hexdigest()

    def entries(self, end: int = 0, number: int = 0) -> Iterator[Entry]:
        """Yield the records behind row ``end``; groups of rows before it are not read."""
        first = 0
        for group in range(self._file.num_row_groups):
            rows = self._file.metadata.row_group(group).num_rows
            if first + rows > end:
                yield from self._group(group, first, max(end - first, 0))
            first += rows

    def _group(self, group: int, first: int, skipped: int) -> Iterator[Entry]:
        batches = self._file.iter_batches(
            batch_size=_ROWS_AT_ONCE, row_groups=[group], use_threads=False
        )
        while True:
            try:
                batch = next(batches, None)
            except self._refused as error:
                raise CommandError(
                    f"{self.path}: rows behind {first} cannot be read: {error}"
                ) from None
            if batch is None:
                return
            columns = [column.to_pylist() for column in batch.slice(skipped).columns]
            for number, row in enumerate(zip(*columns, strict=True), first + skipped + 1):
                yield _read(number, number, self._document(row))
            first += len(batch)
            skipped = max(skipped - len(batch), 0)

    def _document(self, row: tuple[Any, ...]) -> Mapping[str, object]:
        document: dict[str, Any] = {"op": "upsert"}
        for (what, name), value in zip(self._columns, row, strict=True):
            if value is None:
                continue
            if name:
                document.setdefault(what, {})[name] = value
            else:
                document[what] = value
        return document


def _columns(path: Path, schema: Any) -> list[tuple[str, str]]:
    """Return of every column what of an upsert it is, and its name there.

    Raises:
        CommandError: naming the column that is none.
    """
    found = []
    for column in schema:
        what, _, name = column.name.partition(".")
        known = bool(name) if what in _MAPS else column.name in ("item_id", *KEYS["upsert"])
        if not known:
            raise CommandError(
                f"{path}: column {column.name!r} is no part of an upsert: item_id, "
                f"{', '.join(f'{one}.NAME' for one in _MAPS)}, version, if_version, ttl_s or "
                "embedding",
                ExitCode.USAGE,
            )
        if not _is_plain(column.type):
            raise CommandError(
                f"{path}: column {column.name!r} must hold integers, floats, text, or lists of "
                f"these, got {column.type}",
                ExitCode.USAGE,
            )
        found.append((what, name))
    if ("item_id", "") not in found:
        raise CommandError(f"{path} must have a column item_id", ExitCode.USAGE)
    return found


def _is_plain(kind: Any) -> bool:
    from pyarrow import types

    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return _is_scalar(kind.value_type)
    return _is_scalar(kind)


def _is_scalar(kind: Any) -> bool:
    from pyarrow import types

    if types.is_dictionary(kind):
        kind = kind.value_type
    return bool(
        types.is_integer(kind)
        or types.is_floating(kind)
        or types.is_string(kind)
        or types.is_large_string(kind)
    )

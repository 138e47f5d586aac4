"""The update log in one SQLite file, for the processes of one machine.

A commit is one transaction in write-ahead mode that is synced before it is seen, by this process or
any other. The file is made under another name and then linked, so nobody sees half of one.
"""

import contextlib
import json
import os
import sqlite3
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlsplit

from silvershard.cluster.update_log import (
    Head,
    LogRecord,
    NewRecord,
    check_dense,
    check_partition,
    check_read,
    check_records,
    checked_cut,
    checksum,
    first_rows,
    new_log_id,
    newest_heads,
    newest_rows,
)
from silvershard.shard.errors import (
    ConfigError,
    Fenced,
    LogDamaged,
    LogMissing,
    LogTrimmed,
    LogUnavailable,
)

APPLICATION_ID = 0x53534C31
FORMAT = 1
_FULL = 2
_POLL_S = 0.005
_TRIMMED_AT_ONCE = 2_000
# Large enough that a batch of a thousand changed heads does not pay for a checkpoint every time.
_CHECKPOINT_PAGES = 4096
_KEEP_WAL_BYTES = 64 << 20
_CACHE_KIB = 64 << 10

# The key of a record is its partition in the upper bits and its position in the lower ones, so that
# appends go to the end of the tree of rows.
_POSITION_BITS = 56

_TABLES = """
CREATE TABLE log (log_id INTEGER NOT NULL, num_partitions INTEGER NOT NULL);
CREATE TABLE partitions (
    partition INTEGER PRIMARY KEY, epoch INTEGER NOT NULL, last INTEGER NOT NULL,
    trimmed INTEGER NOT NULL
);
CREATE TABLE records (
    key INTEGER PRIMARY KEY, item_id INTEGER NOT NULL, version INTEGER NOT NULL,
    logged_unix_ms INTEGER NOT NULL, urgent INTEGER NOT NULL, checksum INTEGER NOT NULL,
    payload BLOB NOT NULL
);
CREATE INDEX urgent_records ON records (urgent) WHERE urgent = 1;
CREATE TABLE heads (
    partition INTEGER NOT NULL, item_id INTEGER NOT NULL, version INTEGER NOT NULL,
    deleted INTEGER NOT NULL, position INTEGER NOT NULL, expires_unix_ms INTEGER NOT NULL,
    PRIMARY KEY (partition, item_id)
) WITHOUT ROWID;  -- deleted is 2 where the log has nothing but patches of the item
CREATE INDEX expiring_heads ON heads (partition, expires_unix_ms) WHERE expires_unix_ms > 0;
CREATE TABLE row_versions (
    partition INTEGER NOT NULL, name TEXT NOT NULL, version INTEGER NOT NULL,
    PRIMARY KEY (partition, name)
) WITHOUT ROWID;
CREATE TABLE pins (
    name TEXT NOT NULL, partition INTEGER NOT NULL, position INTEGER NOT NULL,
    PRIMARY KEY (name, partition)
) WITHOUT ROWID;
"""
_RECORD = "key, item_id, version, logged_unix_ms, urgent, payload, checksum"
_HEAD = "item_id, version, deleted, position, expires_unix_ms"
_DELETED, _PATCHED = 1, 2


class SqliteLog:
    """An update log in one file; see ``UpdateLog``."""

    def __init__(
        self, url: str, num_partitions: int | None, *, create: bool, timeout_s: float
    ) -> None:
        """Open the file of ``url``, made where there is none and ``create`` is True.

        Raises:
            ConfigError: if the url names no absolute file, or the log has another L.
            LogUnavailable: if it cannot be opened.
            LogDamaged: if the file is not an update log.
        """
        self.url = url
        self.path = _path_of(url)
        self._timeout_s = timeout_s
        self._closed = False
        self._write_lock = threading.Lock()
        self._pool_lock = threading.Lock()
        self._readers: list[sqlite3.Connection] = []
        with self._worded():
            if create and not self.path.exists():
                self._create(num_partitions or 1)
            self._file = _identity(self.path)
            if self._file is None:
                raise LogMissing(self.url, "there is no such file")
            self._writer = self._connect()
            try:
                self.log_id, self.num_partitions = self._read_log()
                if num_partitions not in (None, self.num_partitions):
                    raise ConfigError(
                        f"update log {url} has {self.num_partitions} partitions for ever, got "
                        f"num_partitions {num_partitions}"
                    )
            except BaseException:
                self._writer.close()
                raise

    def _create(self, num_partitions: int) -> None:
        draft = self.path.with_name(f".{self.path.name}.{os.getpid()}-{threading.get_ident()}")
        try:
            with contextlib.closing(sqlite3.connect(draft, isolation_level=None)) as made:
                made.execute("PRAGMA journal_mode=WAL")
                made.execute(f"PRAGMA application_id={APPLICATION_ID}")
                made.execute(f"PRAGMA user_version={FORMAT}")
                made.execute("PRAGMA synchronous=FULL")
                made.executescript(f"BEGIN; {_TABLES}")
                made.execute("INSERT INTO log VALUES (?, ?)", (new_log_id(), num_partitions))
                made.executemany(
                    "INSERT INTO partitions VALUES (?, 0, 0, 0)",
                    ((partition,) for partition in range(num_partitions)),
                )
                made.execute("COMMIT")
            _sync(draft)
            # Another process may have linked its own meanwhile; then that is the log.
            with contextlib.suppress(FileExistsError):
                os.link(draft, self.path)
        finally:
            draft.unlink(missing_ok=True)
        _sync(self.path.parent)

    def _connect(self) -> sqlite3.Connection:
        one = sqlite3.connect(
            f"file:{quote(str(self.path))}?mode=rw",
            uri=True,
            timeout=self._timeout_s,
            isolation_level=None,
            check_same_thread=False,
        )
        try:
            (kind,) = one.execute("PRAGMA application_id").fetchone()
            (held,) = one.execute("PRAGMA user_version").fetchone()
            if kind != APPLICATION_ID:
                raise LogDamaged(self.url, "the file is not an update log")
            if held != FORMAT:
                raise LogDamaged(self.url, f"the format must be {FORMAT}, got {held}")
            one.execute("PRAGMA synchronous=FULL")
            one.execute(f"PRAGMA wal_autocheckpoint={_CHECKPOINT_PAGES}")
            one.execute(f"PRAGMA journal_size_limit={_KEEP_WAL_BYTES}")
            one.execute(f"PRAGMA cache_size=-{_CACHE_KIB}")
            (mode,) = one.execute("PRAGMA journal_mode").fetchone()
            (synchronous,) = one.execute("PRAGMA synchronous").fetchone()
            if mode != "wal" or synchronous != _FULL:
                raise ConfigError(
                    f"update log {self.url}: SQLite must run with journal_mode wal and synchronous "
                    f"{_FULL}, got {mode} and {synchronous}: put the file on a local disk"
                )
        except BaseException:
            one.close()
            raise
        return one

    def _read_log(self) -> tuple[int, int]:
        with self._reading() as reader:
            log_id, num_partitions = reader.execute("SELECT * FROM log").fetchone()
        return log_id, num_partitions

    @contextlib.contextmanager
    def _worded(self) -> Iterator[None]:
        """Raise errors of SQLite and of the file system as those of a log."""
        try:
            yield
        except sqlite3.Error as error:
            if isinstance(error, sqlite3.DatabaseError) and _is_damage(error):
                raise LogDamaged(self.url, f"the file is damaged: {error}") from None
            raise LogUnavailable(self.url, str(error)) from None
        except OSError as error:
            raise LogUnavailable(self.url, error.strerror or str(error)) from None

    def _check_file(self) -> None:
        """Refuse to go on with a file that others no longer find under its name."""
        if self._closed:
            raise LogUnavailable(self.url, "is closed")
        if _identity(self.path) != self._file:
            raise LogUnavailable(self.url, "the file was replaced or removed while in use")

    @contextlib.contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        """Give a connection that sees one state of the log."""
        with self._worded():
            self._check_file()
            with self._pool_lock:
                reader = self._readers.pop() if self._readers else None
            reader = reader or self._connect()
            keep = False
            try:
                reader.execute("BEGIN")
                yield reader
                reader.execute("COMMIT")
                keep = True
            except (LogTrimmed, LogDamaged):
                reader.execute("ROLLBACK")
                keep = True
                raise
            finally:
                with self._pool_lock:
                    keep = keep and not self._closed
                    if keep:
                        self._readers.append(reader)
                if not keep:
                    reader.close()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        """Give the connection of the writer in a transaction that ends with the block."""
        with self._worded(), self._write_lock:
            self._check_file()
            self._writer.execute("BEGIN IMMEDIATE")
            try:
                yield self._writer
                self._writer.execute("COMMIT")
            except BaseException:
                if self._writer.in_transaction:
                    self._writer.execute("ROLLBACK")
                raise

    def acquire(self, partition: int, epoch: int | None = None) -> int:
        """See ``UpdateLog.acquire``."""
        check_partition(partition, self.num_partitions)
        with self._writing() as writer:
            newest = _partition(writer, "epoch", partition)
            if epoch is not None and epoch != newest:
                raise Fenced(partition, epoch, newest)
            writer.execute(
                "UPDATE partitions SET epoch = epoch + 1 WHERE partition = ?", (partition,)
            )
            return newest + 1

    def append(
        self, partition: int, epoch: int, records: Sequence[NewRecord], logged_unix_ms: int
    ) -> int:
        """See ``UpdateLog.append``."""
        check_partition(partition, self.num_partitions)
        with self._writing() as writer:
            current = _partition(writer, "epoch", partition)
            if epoch != current:
                raise Fenced(partition, epoch, current)
            first = _partition(writer, "last", partition) + 1
            writer.executemany(
                "INSERT INTO records VALUES (?, ?, ?, ?, ?, ?, ?)",
                _rows(partition, first, records, logged_unix_ms),
            )
            # In their order in the tree, so that each page is looked for once.
            heads = sorted(newest_heads(first, records).items())
            writer.executemany(
                "INSERT OR REPLACE INTO heads VALUES (?, ?, ?, ?, ?, ?)",
                [
                    (partition, item_id, version, _PATCHED if patched else deleted, position, ms)
                    for item_id, (version, deleted, position, ms, patched) in heads
                ],
            )
            writer.executemany(
                "INSERT OR REPLACE INTO row_versions VALUES (?, ?, ?)",
                ((partition, name, version) for name, version in newest_rows(records).items()),
            )
            writer.execute(
                "UPDATE partitions SET last = ? WHERE partition = ?",
                (first + len(records) - 1, partition),
            )
        return first

    def read(self, partition: int, after: int, limit: int) -> list[LogRecord]:
        """See ``UpdateLog.read``."""
        check_partition(partition, self.num_partitions)
        with self._reading() as reader:
            check_read(self.url, partition, after, _partition(reader, "trimmed", partition))
            end = _partition(reader, "last", partition)
            records = self._records(reader, partition, after, limit, "")
        check_dense(self.url, partition, after, end, limit, records)
        return records

    def read_urgent(self, partition: int, after: int, limit: int) -> list[LogRecord]:
        """See ``UpdateLog.read_urgent``."""
        check_partition(partition, self.num_partitions)
        with self._reading() as reader:
            check_read(self.url, partition, after, _partition(reader, "trimmed", partition))
            return self._records(reader, partition, after, limit, "AND urgent = 1")

    def _records(
        self, reader: sqlite3.Connection, partition: int, after: int, limit: int, condition: str
    ) -> list[LogRecord]:
        found = reader.execute(
            f"SELECT {_RECORD} FROM records WHERE key > ? AND key < ? {condition} "
            "ORDER BY key LIMIT ?",
            (_key(partition, after), _key(partition + 1, 0), limit),
        )
        with contextlib.closing(found):
            rows = first_rows(found)
        records = [
            LogRecord(key - _key(partition, 0), item_id, version, logged_ms, urgent == 1, payload)
            for key, item_id, version, logged_ms, urgent, payload, _ in rows
        ]
        check_records(self.url, partition, records, [row[-1] for row in rows])
        return records

    def wait(self, partition: int, after: int, timeout_s: float) -> bool:
        """See ``UpdateLog.wait``."""
        give_up_s = time.monotonic() + timeout_s
        while self.end(partition) <= after:
            left_s = give_up_s - time.monotonic()
            if left_s <= 0:
                return False
            time.sleep(min(left_s, _POLL_S))
        return True

    def end(self, partition: int) -> int:
        """See ``UpdateLog.end``."""
        check_partition(partition, self.num_partitions)
        with self._reading() as reader:
            return _partition(reader, "last", partition)

    def start(self, partition: int) -> int:
        """See ``UpdateLog.start``."""
        check_partition(partition, self.num_partitions)
        with self._reading() as reader:
            return _partition(reader, "trimmed", partition)

    def heads(self, partition: int, item_ids: Sequence[int]) -> dict[int, Head]:
        """See ``UpdateLog.heads``."""
        check_partition(partition, self.num_partitions)
        with self._reading() as reader:
            return dict(
                _heads(
                    reader.execute(
                        f"SELECT {_HEAD} FROM heads WHERE partition = ? AND item_id IN "
                        "(SELECT value FROM json_each(?))",
                        (partition, json.dumps(list(item_ids))),
                    )
                )
            )

    def expired(self, partition: int, now_ms: int, limit: int) -> list[tuple[int, Head]]:
        """See ``UpdateLog.expired``."""
        check_partition(partition, self.num_partitions)
        with self._reading() as reader:
            return _heads(
                reader.execute(
                    f"SELECT {_HEAD} FROM heads WHERE partition = ? AND expires_unix_ms > 0 "
                    "AND expires_unix_ms <= ? AND deleted = 0 "
                    "ORDER BY expires_unix_ms, item_id LIMIT ?",
                    (partition, now_ms, limit),
                )
            )

    def row_version(self, partition: int, table: str) -> int:
        """See ``UpdateLog.row_version``."""
        check_partition(partition, self.num_partitions)
        with self._reading() as reader:
            found = reader.execute(
                "SELECT version FROM row_versions WHERE partition = ? AND name = ?",
                (partition, table),
            ).fetchone()
            return int(found[0]) if found else 0

    def pin(self, name: str, cut: Sequence[int]) -> None:
        """See ``UpdateLog.pin``."""
        positions = checked_cut(cut, self.num_partitions)
        with self._writing() as writer:
            for partition, position in enumerate(positions):
                check_read(self.url, partition, position, _partition(writer, "trimmed", partition))
            writer.executemany(
                "INSERT OR REPLACE INTO pins VALUES (?, ?, ?)",
                ((name, partition, position) for partition, position in enumerate(positions)),
            )

    def unpin(self, name: str) -> None:
        """See ``UpdateLog.unpin``."""
        with self._writing() as writer:
            writer.execute("DELETE FROM pins WHERE name = ?", (name,))

    def pins(self) -> dict[str, tuple[int, ...]]:
        """See ``UpdateLog.pins``."""
        found: dict[str, tuple[int, ...]] = {}
        with self._reading() as reader:
            for name, position in reader.execute(
                "SELECT name, position FROM pins ORDER BY name, partition"
            ):
                found[name] = (*found.get(name, ()), position)
        return found

    def trim(self, partition: int, upto: int) -> int:
        """See ``UpdateLog.trim``; deletes in several transactions, so that appends pass."""
        check_partition(partition, self.num_partitions)
        with self._writing() as writer:
            start = _partition(writer, "trimmed", partition)
            (lowest,) = writer.execute(
                "SELECT MIN(position) FROM pins WHERE partition = ?", (partition,)
            ).fetchone()
            bounds = [upto, _partition(writer, "last", partition)]
            start = max(start, min(bounds if lowest is None else [*bounds, lowest]))
            writer.execute(
                "UPDATE partitions SET trimmed = ? WHERE partition = ?", (start, partition)
            )
        while True:
            with self._writing() as writer:
                deleted = writer.execute(
                    "DELETE FROM records WHERE key IN (SELECT key FROM records WHERE key > ? AND "
                    "key <= ? ORDER BY key LIMIT ?)",
                    (_key(partition, 0), _key(partition, start), _TRIMMED_AT_ONCE),
                ).rowcount
            if deleted < _TRIMMED_AT_ONCE:
                return start

    def close(self) -> None:
        """See ``UpdateLog.close``."""
        with self._write_lock:
            with self._pool_lock:
                self._closed = True
                readers, self._readers = self._readers, []
            for one in (*readers, self._writer):
                one.close()


def _path_of(url: str) -> Path:
    parts = urlsplit(url)
    # Some write sqlite:////absolute/path.
    path = Path(f"/{unquote(parts.path).lstrip('/')}")
    if parts.netloc or parts.query or parts.fragment or not path.name:
        raise ConfigError(f"the url of a SQLite log must be sqlite:///ABSOLUTE/PATH, got {url!r}")
    return path


def _identity(path: Path) -> tuple[int, int] | None:
    """Return what another file under the same name would not share; None where there is none."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _is_damage(error: sqlite3.DatabaseError) -> bool:
    primary = getattr(error, "sqlite_errorcode", 0) & 0xFF
    return primary in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_FORMAT)


def _key(partition: int, position: int) -> int:
    return partition << _POSITION_BITS | position


def _rows(
    partition: int, first: int, records: Sequence[NewRecord], logged_unix_ms: int
) -> list[tuple[Any, ...]]:
    """Return what ``records`` of the file keeps of an append."""
    key = _key(partition, 0)
    rows = []
    for position, new in enumerate(records, first):
        item_id, version, urgent, _, _, payload, *_ = new
        crc = checksum((position, item_id, version, logged_unix_ms, urgent, payload))
        rows.append((key | position, item_id, version, logged_unix_ms, urgent, crc, payload))
    return rows


def _partition(connection: sqlite3.Connection, column: str, partition: int) -> int:
    (value,) = connection.execute(
        f"SELECT {column} FROM partitions WHERE partition = ?", (partition,)
    ).fetchone()
    return int(value)


def _heads(rows: sqlite3.Cursor) -> list[tuple[int, Head]]:
    return [
        (item_id, Head(version, mark == _DELETED, position, expires, mark == _PATCHED))
        for item_id, version, mark, position, expires in rows
    ]

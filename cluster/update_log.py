"""The durable log of updates: what it holds, what every store of it promises, how one is opened.

Shapes: L log partitions, n records.
"""

import secrets
import struct
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol
from urllib.parse import urlsplit

from silvershard.shard.errors import ConfigError, LogDamaged, LogTrimmed

MAX_PARTITIONS = 64
MAX_POSITION = (1 << 53) - 1
"""Positions are exact in a float64, which is what numbers of a Redis script are."""
NO_ITEM = -1
"""``item_id`` of a record that changes rows of a table."""

READ_BYTES = 8 << 20
"""A read ends with the record with which its payloads come to so much."""

_SEALED = struct.Struct("<qqqq?")


class NewRecord(NamedTuple):
    """An accepted mutation, before it has a position."""

    item_id: int
    """``NO_ITEM`` for rows of a table."""
    version: int
    urgent: bool
    deleted: bool
    """Whether the item is gone after it."""
    expires_unix_ms: int
    """When the item expires as of this record; 0: never."""
    payload: bytes
    table: str = ""
    """Table whose rows it changes; empty for an item."""
    patched: bool = False
    """Whether the log has nothing but patches of the item, so that it is one of a snapshot's."""


class LogRecord(NamedTuple):
    """A mutation as the log keeps it."""

    position: int
    """At least 1, without gaps inside a log partition."""
    item_id: int
    """``NO_ITEM`` for rows of a table."""
    version: int
    logged_unix_ms: int
    urgent: bool
    payload: bytes


class Head(NamedTuple):
    """The newest record of an item."""

    version: int
    deleted: bool
    position: int
    expires_unix_ms: int
    """0: never."""
    patched: bool = False
    """Whether the log has nothing but patches of the item: only a snapshot can tell if it is."""


class UpdateLog(Protocol):
    """A log of L partitions, each a gapless sequence of records with one writer at a time.

    Every method may be called from any thread. What a reader sees is durable and stays.

    Raises:
        LogUnavailable: from every method, when the store cannot be reached in time or refuses.
        LogDamaged: from every method, when what is stored is not what was written.
    """

    @property
    def url(self) -> str:
        """Return where the log is, without a password."""

    @property
    def log_id(self) -> int:
        """Return the number that the log was created with, above 0 and below 2**63."""

    @property
    def num_partitions(self) -> int:
        """Return L, fixed when the log was created."""

    def acquire(self, partition: int, epoch: int | None = None) -> int:
        """Become the writer of a partition: return an epoch that fences every earlier one.

        Nothing of an earlier append gets into the log from then on, also where its answer was lost.

        Args:
            partition: of the log.
            epoch: that of the caller, who wants it renewed; None: whoever writes at present.

        Raises:
            Fenced: if ``epoch`` is given and is not the newest; nothing has changed.
        """

    def append(
        self, partition: int, epoch: int, records: Sequence[NewRecord], logged_unix_ms: int
    ) -> int:
        """Store records, all or none, and return the position of the first.

        They are durable when this returns. Heads and row versions become those of the last record
        of each item and table, in the same transaction. After ``LogUnavailable`` they may be stored
        or not, or may yet be: ``heads`` and ``end`` tell only after the next ``acquire``.

        Raises:
            Fenced: if ``epoch`` is not the newest of the partition; nothing is stored.
        """

    def read(self, partition: int, after: int, limit: int) -> list[LogRecord]:
        """Return the records at ``after + 1`` and on, in order.

        They are ``limit`` at most, and none follows that with which payloads reach ``READ_BYTES``.

        Raises:
            LogTrimmed: if the record at ``after + 1`` was trimmed.
        """

    def read_urgent(self, partition: int, after: int, limit: int) -> list[LogRecord]:
        """Return the urgent records beyond ``after``, in order, as many as ``read`` would.

        Raises:
            LogTrimmed: if records beyond ``after`` were trimmed.
        """

    def wait(self, partition: int, after: int, timeout_s: float) -> bool:
        """Return True as soon as there is a record beyond ``after``, False after ``timeout_s``."""

    def end(self, partition: int) -> int:
        """Return the last position, 0 before the first record."""

    def start(self, partition: int) -> int:
        """Return the last trimmed position, 0 where nothing was trimmed."""

    def heads(self, partition: int, item_ids: Sequence[int]) -> dict[int, Head]:
        """Return the heads of those items that have any; trimming keeps them."""

    def expired(self, partition: int, now_ms: int, limit: int) -> list[tuple[int, Head]]:
        """Return at most ``limit`` items whose time is over, the earliest first."""

    def row_version(self, partition: int, table: str) -> int:
        """Return the newest version of rows of a table, 0 where there is none."""

    def pin(self, name: str, cut: Sequence[int]) -> None:
        """Keep what lies beyond ``cut`` until ``unpin(name)``; replaces a pin of that name.

        Args:
            name: of who needs it.
            cut: ``(L,)`` positions; empty for the very start.

        Raises:
            LogTrimmed: if some of it was trimmed already.
        """

    def unpin(self, name: str) -> None:
        """Remove a pin, if there is one of that name."""

    def pins(self) -> dict[str, tuple[int, ...]]:
        """Return the cut of every pin."""

    def trim(self, partition: int, upto: int) -> int:
        """Forget records up to ``upto``, the lowest pin or the end, and return ``start``."""

    def close(self) -> None:
        """Let go of the store; later calls raise ``LogUnavailable``."""


def open_log(
    url: str,
    num_partitions: int | None = 1,
    *,
    create: bool = True,
    timeout_s: float = 5.0,
) -> UpdateLog:
    """Return the log at ``url``, made where there is none.

    Args:
        url: ``sqlite:///PATH``, a file of this machine, or ``redis://HOST:PORT/DB``, where
            ``?prefix=NAME`` tells logs of one server apart and ``&trust_durability=1`` goes on
            where the server forbids to look at its settings.
        num_partitions: L, a power of two up to 64; None: that of the existing log, else 1.
        create: whether to make a log.
        timeout_s: time in which one call reconnects and waits for locks.

    Raises:
        ConfigError: if the url or L is not possible, the log has another L, or the store would not
            keep what it acknowledges.
        LogUnavailable: if it cannot be reached, or there is none and ``create`` is False.
        LogDamaged: if what is there is not an update log.
    """
    if num_partitions is not None and not (
        1 <= num_partitions <= MAX_PARTITIONS and num_partitions.bit_count() == 1
    ):
        raise ConfigError(
            f"num_partitions must be a power of two up to {MAX_PARTITIONS}, got {num_partitions}"
        )
    scheme = urlsplit(url).scheme
    if scheme == "sqlite":
        from silvershard.cluster.sqlite_log import SqliteLog

        return SqliteLog(url, num_partitions, create=create, timeout_s=timeout_s)
    if scheme in ("redis", "rediss"):
        try:
            from silvershard.cluster.redis_log import RedisLog
        except ModuleNotFoundError as error:
            if error.name != "redis":
                raise
            raise ConfigError(
                f"a log at {scheme}:// needs redis-py: pip install 'silvershard[redis]'"
            ) from None
        return RedisLog(url, num_partitions, create=create, timeout_s=timeout_s)
    raise ConfigError(f"the url of a log must start with sqlite:/// or redis://, got {url!r}")


class AppliedRecords:
    """The last record that was applied of every log partition.

    It tells a log that lost what was applied, also once that has grown again. Only one thread asks.
    """

    def __init__(self, log: UpdateLog) -> None:
        """Know nothing of a log yet."""
        self._log = log
        self._last: dict[int, LogRecord | None] = {}
        """None where the record at the cut of the start is not to be had."""
        self._lost: set[int] = set()
        """Partitions that ended before the last record when they were last looked at."""

    def note(self, partition: int, record: LogRecord) -> None:
        """Take it that a record is the last that was applied."""
        self._last[partition] = record

    def check(self, partition: int, done: int, end: int) -> None:
        """Refuse a partition that lost what was applied.

        Args:
            partition: of the log.
            done: position up to which everything is applied.
            end: its last position as of now.

        Raises:
            LogDamaged: if it did, or may have.
            LogTrimmed: if it may have, and that can be told no more.
            LogUnavailable: if it cannot be read.
        """
        if end < done:
            self._lost.add(partition)
            reason = f"partition {partition} ends at {end}, but {done} was applied already"
            raise LogDamaged(self._log.url, reason)
        if partition in self._lost:
            if self._log.read(partition, done - 1, 1) != [self._last.get(partition)]:
                reason = f"position {done} of partition {partition} is not what was applied"
                raise LogDamaged(self._log.url, reason)
            self._lost.discard(partition)
        elif done and partition not in self._last:
            self._last[partition] = self._found(partition, done)

    def _found(self, partition: int, position: int) -> LogRecord | None:
        """Return a record that was applied before the start; nothing else needs it."""
        try:
            (record,) = self._log.read(partition, position - 1, 1)
        except (LogDamaged, LogTrimmed):
            return None
        return record


def new_log_id() -> int:
    """Return a number that no other log has."""
    return secrets.randbits(62) + 1


def checksum(record: tuple[int, int, int, int, bool, bytes]) -> int:
    """Return the CRC32 of everything in a ``LogRecord``, its position included."""
    position, item_id, version, logged_unix_ms, urgent, payload = record
    sealed = _SEALED.pack(position, item_id, version, logged_unix_ms, urgent)
    return zlib.crc32(payload, zlib.crc32(sealed))


def check_partition(partition: int, num_partitions: int) -> None:
    """Refuse a partition that a log does not have.

    Raises:
        ConfigError: if it is not below L.
    """
    if not 0 <= partition < num_partitions:
        raise ConfigError(
            f"a partition of this log is at most {num_partitions - 1}, got {partition}"
        )


def checked_cut(cut: Sequence[int], num_partitions: int) -> tuple[int, ...]:
    """Return a cut with one position per partition; an empty one is that before everything.

    Raises:
        ConfigError: if it has another length or a negative position.
    """
    full = tuple(cut) or (0,) * num_partitions
    if len(full) != num_partitions or min(full) < 0:
        raise ConfigError(
            f"a cut of this log has {num_partitions} positions of at least 0, got {list(cut)}"
        )
    return full


def check_read(url: str, partition: int, after: int, start: int) -> None:
    """Refuse to read what was trimmed.

    Raises:
        LogTrimmed: if ``after`` lies before ``start``.
    """
    if after < start:
        raise LogTrimmed(url, partition, after, start)


def check_records(
    url: str, partition: int, records: Sequence[LogRecord], checksums: Sequence[int]
) -> None:
    """Refuse records that are not those which were written.

    Raises:
        LogDamaged: naming the first of them.
    """
    for record, expected in zip(records, checksums, strict=True):
        if checksum(record) != expected:
            raise LogDamaged(
                url, f"the record at position {record.position} of partition {partition} is damaged"
            )


def first_rows(rows: Iterable[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """Return rows that end with a payload and its checksum, as many as one read may have."""
    found, size = [], 0
    for row in rows:
        found.append(row)
        size += len(row[-2])
        if size >= READ_BYTES:
            break
    return found


def check_dense(
    url: str, partition: int, after: int, end: int, limit: int, records: Sequence[LogRecord]
) -> None:
    """Refuse a range of records in which one is missing.

    Args:
        url: of the log.
        partition: of the log.
        after: position before the first that was asked for.
        end: last position of the partition.
        limit: most records that were asked for.
        records: what was found, in order.

    Raises:
        LogDamaged: naming the first position that is missing.
    """
    expected = after
    for expected, record in enumerate(records, after + 1):
        if record.position != expected:
            break
    else:
        if len(records) == max(min(limit, end - after), 0):
            return
        if records and sum(len(one.payload) for one in records) >= READ_BYTES:
            return
        expected += 1
    raise LogDamaged(url, f"the record at position {expected} of partition {partition} is missing")


def newest_heads(first: int, records: Sequence[NewRecord]) -> dict[int, Head]:
    """Return the heads that records leave behind whose first has the position ``first``."""
    return {
        record.item_id: Head(
            record.version, record.deleted, position, record.expires_unix_ms, record.patched
        )
        for position, record in enumerate(records, first)
        if not record.table
    }


def newest_rows(records: Sequence[NewRecord]) -> Mapping[str, int]:
    """Return the version of the last record of every table."""
    return {record.table: record.version for record in records if record.table}

"""The update log in Redis Streams, for many hosts. Redis 6.2 or newer.

Every change is one script, hence one unit of the append-only file. With ``appendfsync always`` the
server answers nobody before that file is synced, so readers see durable records only.

What a writer sends carries a token that the server keeps: sent again as it is, because the answer
was lost, it finds itself done. What comes too late finds another epoch and changes nothing.
"""

import itertools
import secrets
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar

from silvershard.cluster.redis_scripts import ACQUIRE, APPEND, CREATE, LOOK, PIN, READ, TRIM
from silvershard.cluster.redis_server import NotDurable, RedisServer, ServerUnavailable
from silvershard.cluster.update_log import (
    READ_BYTES,
    Head,
    LogRecord,
    NewRecord,
    check_dense,
    check_partition,
    check_read,
    check_records,
    checked_cut,
    checksum,
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

T = TypeVar("T")

FORMAT = 1
_BLOCK_S = 0.5
_TRIMMED_AT_ONCE = 10_000
# Fewer than a script of Redis can hand to one command.
_WORDS_AT_ONCE = 4_000
_RECORD = struct.Struct("<qqq?I")
_HEAD = struct.Struct("<qBqq")
_DELETED, _PATCHED = 1, 2


class RedisLog:
    """An update log in a Redis server; see ``UpdateLog``."""

    def __init__(
        self, url: str, num_partitions: int | None, *, create: bool, timeout_s: float
    ) -> None:
        """Open the log of ``url``, made where there is none and ``create`` is True.

        A call gives up when ``timeout_s`` have passed and the attempt under way, which takes as
        long at most, has ended.

        Raises:
            ConfigError: if the server could lose what it acknowledged, or the log has another L.
            LogUnavailable: if the server cannot be reached, or there is no log.
            LogDamaged: if something else is stored under its keys.
        """
        self._server = RedisServer(url, timeout_s)
        self._client, self._prefix = self._server.client, self._server.prefix
        self.url = self._server.url
        self.log_id = 0
        self._timeout_s = timeout_s
        try:
            self.log_id, self.num_partitions = self._open(num_partitions, create=create)
        except LogUnavailable as error:
            self.close()
            if isinstance(error.__cause__, NotDurable):
                raise ConfigError(str(error)) from None
            raise
        except BaseException:
            self.close()
            raise
        self._write_locks = [threading.Lock() for _ in range(self.num_partitions)]
        self._ends = [0] * self.num_partitions
        """Where the records of this writer end."""
        self._acquiring: dict[tuple[int, int], bytes] = {}
        """Tokens by partition and epoch to follow, as long as their answer is awaited."""

    def _open(self, num_partitions: int | None, *, create: bool) -> tuple[int, int]:
        wanted = num_partitions or 1
        script = self._client.register_script(CREATE)
        found = self._call(
            lambda: script(
                keys=[self._log, *(self._key(one, "state") for one in range(wanted))],
                args=[FORMAT, new_log_id(), wanted] if create else [],
            )
        )
        if not found:
            raise LogMissing(self.url, "there is no log under this prefix")
        if None in found or int(found[0]) != FORMAT:
            raise LogDamaged(self.url, f"{self._log} must be a log of format {FORMAT}")
        held = int(found[2])
        if num_partitions not in (None, held):
            raise ConfigError(
                f"update log {self.url} has {held} partitions for ever, got num_partitions "
                f"{num_partitions}"
            )
        return int(found[1]), held

    @property
    def _log(self) -> str:
        return f"{self._prefix}:log"

    def _key(self, partition: int, what: str) -> str:
        return f"{self._prefix}:{partition}:{what}"

    def _call(self, work: Callable[[], T]) -> T:
        """Do ``work``, again after a pause while the server cannot be reached."""
        try:
            return self._server.call(work)
        except ServerUnavailable as error:
            raise LogUnavailable(self.url, str(error)) from error

    def _change(self, source: str, keys: Sequence[str], *values: Any) -> list[Any]:
        """Run a script of ``redis_scripts`` and return its answer, the word decoded."""
        script = self._client.register_script(source)
        attempts = itertools.count(1)

        def run() -> tuple[int, list[Any]]:
            attempt = next(attempts)
            return attempt, script(keys=[self._log, *keys], args=[self.log_id, *values])

        attempt, (word, *rest) = self._call(run)
        if word == b"other":
            raise self._not_this_log()
        if word == b"fenced" and attempt > 1 and source is APPEND:
            raise LogUnavailable(
                self.url,
                "another writer took over while an answer was awaited: it is unknown whether the "
                "records are stored",
            )
        return [word.decode(), *rest]

    def _look(self, *commands: tuple[Any, ...]) -> list[Any]:
        """Return the answers to commands that see one state of this log."""
        values = (word for command in commands for word in (len(command), *command))
        return self._change(LOOK, [], *values)[1:]

    def _not_this_log(self) -> LogDamaged:
        return LogDamaged(
            self.url,
            f"the server no longer holds the log {self.log_id} that was opened: it was emptied, or "
            "another one took its place",
        )

    def acquire(self, partition: int, epoch: int | None = None) -> int:
        """See ``UpdateLog.acquire``."""
        check_partition(partition, self.num_partitions)
        with self._write_locks[partition]:
            while True:
                newest = self._number(partition, "epoch") if epoch is None else epoch
                # Kept while it is unknown what became of it, so that nobody fences himself.
                token = self._acquiring.setdefault((partition, newest), secrets.token_bytes(12))
                state = self._key(partition, "state")
                word, found, *end = self._change(ACQUIRE, [state], token, newest)
                del self._acquiring[partition, newest]
                if word == "done":
                    self._ends[partition] = end[0]
                    return int(found)
                if epoch is not None:
                    raise Fenced(partition, epoch, found)

    def append(
        self, partition: int, epoch: int, records: Sequence[NewRecord], logged_unix_ms: int
    ) -> int:
        """See ``UpdateLog.append``."""
        check_partition(partition, self.num_partitions)
        kinds = ("state", "records", "urgent", "heads", "expiry", "tables")
        keys = [self._key(partition, kind) for kind in kinds]
        token = secrets.token_bytes(12)
        with self._write_locks[partition]:
            last = self._ends[partition]
            values = _appended(records, last + 1, logged_unix_ms)
            word, found = self._change(APPEND, keys, token, epoch, last, *values)
            if word == "fenced":
                raise Fenced(partition, epoch, found)
            if word == "moved":
                raise LogUnavailable(
                    self.url,
                    f"partition {partition} ends at {found} and not at {last}: records that this "
                    "writer had no answer for are stored; nothing of these is",
                )
            self._ends[partition] = found + len(records) - 1
            return int(found)

    def read(self, partition: int, after: int, limit: int) -> list[LogRecord]:
        """See ``UpdateLog.read``."""
        end, records = self._records(partition, "records", after, limit)
        check_dense(self.url, partition, after, end, limit, records)
        return records

    def read_urgent(self, partition: int, after: int, limit: int) -> list[LogRecord]:
        """See ``UpdateLog.read_urgent``."""
        return self._records(partition, "urgent", after, limit)[1]

    def _records(
        self, partition: int, stream: str, after: int, limit: int
    ) -> tuple[int, list[LogRecord]]:
        check_partition(partition, self.num_partitions)
        keys = [self._key(partition, "state"), self._key(partition, stream)]
        bounds = (after, limit, READ_BYTES, _RECORD.size)
        _, start, end, entries = self._change(READ, keys, *bounds)
        check_read(self.url, partition, after, start)
        try:
            records, checksums = _decoded(entries)
        except (ValueError, struct.error):
            raise LogDamaged(
                self.url, f"an entry of {self._key(partition, stream)} is no record"
            ) from None
        check_records(self.url, partition, records, checksums)
        return end, records

    def wait(self, partition: int, after: int, timeout_s: float) -> bool:
        """See ``UpdateLog.wait``."""
        give_up_s = time.monotonic() + timeout_s
        streams: dict[Any, Any] = {self._key(partition, "records"): f"{after}-0"}
        while self.end(partition) <= after:
            left_s = give_up_s - time.monotonic()
            if left_s <= 0:
                return False
            # Blocks in slices, so that a closed log is left and a lost server noticed.
            block_ms = max(int(min(left_s, _BLOCK_S, self._timeout_s / 2) * 1000), 1)
            self._call(partial(self._client.xread, streams, count=1, block=block_ms))
        return True

    def end(self, partition: int) -> int:
        """See ``UpdateLog.end``."""
        return self._number(partition, "end")

    def start(self, partition: int) -> int:
        """See ``UpdateLog.start``."""
        return self._number(partition, "start")

    def _number(self, partition: int, field: str) -> int:
        check_partition(partition, self.num_partitions)
        (value,) = self._look(("HGET", self._key(partition, "state"), field))
        return int(value)

    def heads(self, partition: int, item_ids: Sequence[int]) -> dict[int, Head]:
        """See ``UpdateLog.heads``."""
        check_partition(partition, self.num_partitions)
        key = self._key(partition, "heads")
        found = self._look(
            *(
                ("HMGET", key, *item_ids[at : at + _WORDS_AT_ONCE])
                for at in range(0, len(item_ids), _WORDS_AT_ONCE)
            )
        )
        return {
            item_id: self._head(partition, item_id, packed)
            for item_id, packed in zip(item_ids, itertools.chain.from_iterable(found), strict=True)
            if packed is not None
        }

    def _head(self, partition: int, item_id: int, packed: bytes) -> Head:
        try:
            version, mark, position, expires_unix_ms = _HEAD.unpack(packed)
        except struct.error:
            raise LogDamaged(
                self.url, f"the head of item {item_id} in partition {partition} is damaged"
            ) from None
        return Head(version, mark == _DELETED, position, expires_unix_ms, mark == _PATCHED)

    def expired(self, partition: int, now_ms: int, limit: int) -> list[tuple[int, Head]]:
        """See ``UpdateLog.expired``."""
        check_partition(partition, self.num_partitions)
        key = self._key(partition, "expiry")
        (found,) = self._look(("ZRANGE", key, 1, now_ms, "BYSCORE", "LIMIT", 0, limit))
        heads = self.heads(partition, [int(item_id) for item_id in found])
        # An item may have changed between the two looks.
        over = [
            (item_id, head)
            for item_id, head in heads.items()
            if 0 < head.expires_unix_ms <= now_ms and not head.deleted
        ]
        return sorted(over, key=lambda one: (one[1].expires_unix_ms, one[0]))

    def row_version(self, partition: int, table: str) -> int:
        """See ``UpdateLog.row_version``."""
        check_partition(partition, self.num_partitions)
        (version,) = self._look(("HGET", self._key(partition, "tables"), table))
        return int(version or 0)

    def pin(self, name: str, cut: Sequence[int]) -> None:
        """See ``UpdateLog.pin``."""
        positions = checked_cut(cut, self.num_partitions)
        partitions = range(self.num_partitions)
        keys = [self._key(one, kind) for kind in ("state", "pins") for one in partitions]
        word, *where = self._change(PIN, keys, name, *positions)
        if word == "trimmed":
            raise LogTrimmed(self.url, where[0], positions[where[0]], where[1])

    def unpin(self, name: str) -> None:
        """See ``UpdateLog.unpin``."""
        keys = [self._key(one, "pins") for one in range(self.num_partitions)]
        self._look(*(("HDEL", key, name) for key in keys))

    def pins(self) -> dict[str, tuple[int, ...]]:
        """See ``UpdateLog.pins``."""
        partitions = range(self.num_partitions)
        found = self._look(*(("HGETALL", self._key(one, "pins")) for one in partitions))
        pinned = [dict(zip(flat[::2], flat[1::2], strict=True)) for flat in found]
        return {
            name.decode(): tuple(int(one[name]) for one in pinned) for name in sorted(pinned[0])
        }

    def trim(self, partition: int, upto: int) -> int:
        """See ``UpdateLog.trim``; in several steps, so that appends pass between them."""
        check_partition(partition, self.num_partitions)
        keys = [self._key(partition, kind) for kind in ("state", "records", "urgent", "pins")]
        while True:
            word, start = self._change(TRIM, keys, upto, _TRIMMED_AT_ONCE)
            if word == "done":
                return int(start)

    def close(self) -> None:
        """See ``UpdateLog.close``."""
        self._server.close()


def _appended(records: Sequence[NewRecord], first: int, logged_unix_ms: int) -> Iterator[Any]:
    """Yield what APPEND takes after the end of the partition."""
    heads, tables = newest_heads(first, records), newest_rows(records)
    yield from (len(records), len(heads), len(tables))
    for position, record in enumerate(records, first):
        yield int(record.urgent)
        yield _packed(record, position, logged_unix_ms)
    for item_id, (version, deleted, position, expires_unix_ms, patched) in heads.items():
        mark = _PATCHED if patched else _DELETED * deleted
        yield item_id
        yield _HEAD.pack(version, mark, position, expires_unix_ms)
        yield expires_unix_ms
    yield from itertools.chain.from_iterable(tables.items())


def _packed(record: NewRecord, position: int, logged_unix_ms: int) -> bytes:
    item_id, version, urgent = record.item_id, record.version, record.urgent
    crc = checksum((position, item_id, version, logged_unix_ms, urgent, record.payload))
    return _RECORD.pack(item_id, version, logged_unix_ms, urgent, crc) + record.payload


def _decoded(entries: Sequence[Any]) -> tuple[list[LogRecord], list[int]]:
    records, checksums = [], []
    for entry_id, (_, packed) in entries:
        item_id, version, logged_ms, urgent, crc = _RECORD.unpack_from(packed)
        position = int(entry_id.partition(b"-")[0])
        payload = packed[_RECORD.size :]
        records.append(LogRecord(position, item_id, version, logged_ms, urgent, payload))
        checksums.append(crc)
    return records, checksums

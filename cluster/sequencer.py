"""Gives updates their order: it checks them, decides what is accepted, and writes the log.

Shapes: L log partitions, P partitions of the catalogue.
"""

import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from silvershard.cluster import retrieval_pb2
from silvershard.cluster.feed_block import FeedBlock
from silvershard.cluster.live_generation import LiveGeneration
from silvershard.cluster.mutation_codec import logged, mutation_from, ttl_s
from silvershard.cluster.update_log import NO_ITEM, NewRecord, UpdateLog
from silvershard.cluster.updates import UpdateRejection
from silvershard.shard.errors import Fenced, MutationError
from silvershard.shard.mutations import check
from silvershard.shard.partition import partition_of

MAX_VERSION = 1 << 62
"""Largest version of a mutation, so that there is always a next one."""
EXPIRY = "expiry"
"""The operation of a delete that an item's ttl asks for."""


@dataclass(frozen=True, slots=True)
class Write:
    """A mutation that every shard can take, before its place in the order is known."""

    index: int
    op: str
    partition: int
    """Of the log."""
    item_id: int
    """``NO_ITEM`` for rows of a table."""
    home: int
    """Partition of the catalogue that the item belongs to; -1 for rows of a table."""
    table: str
    version: int
    """0: the next one."""
    if_version: int | None
    urgent: bool
    expires_unix_ms: int
    message: retrieval_pb2.Mutation


class Checked(NamedTuple):
    """A call whose mutations are checked one by one."""

    writes: tuple[Write, ...]
    rejected: tuple[UpdateRejection, ...]


class Outcome(NamedTuple):
    """What became of the writes of a call in one log partition."""

    position: int
    """Of the last one that is in the log; 0: none is."""
    rejected: tuple[UpdateRejection, ...]


@dataclass(slots=True)
class _Item:
    """An item or a table as the writes before leave it."""

    version: int
    exists: bool
    place: int
    """Position of its newest record; of the n-th record of this commit: -n, from 1."""
    expires_unix_ms: int


class Sequencer:
    """The one writer of all partitions of a log.

    ``check`` is for any thread; for each log partition one thread at a time may call ``commit`` or
    ``expire``. What was accepted is durable when they return.
    """

    def __init__(
        self,
        log: UpdateLog,
        live: LiveGeneration,
        *,
        num_shards: int = 1,
        feed: FeedBlock | None = None,
        unix_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
    ) -> None:
        """Become the writer of every partition of the log: earlier ones write no more.

        Args:
            log: the log.
            live: the generation that serves.
            num_shards: S, of the cluster.
            feed: knows whether shards have room; None: they always have.
            unix_ms: wall-clock time in milliseconds.

        Raises:
            LogUnavailable: if the log cannot be written.
        """
        self.log = log
        self.live = live
        self.fenced: Fenced | None = None
        """Set once another sequencer has taken over."""
        self._num_shards = num_shards
        self._feed = feed
        self._unix_ms = unix_ms
        self._lock = threading.Lock()
        self._counts: Counter[tuple[str, str]] = Counter()
        self.epochs = tuple(log.acquire(one) for one in range(log.num_partitions))
        if feed is not None:
            for partition in range(log.num_partitions):
                feed.resume(partition, log.end(partition))

    def follow(self, live: LiveGeneration, num_shards: int) -> None:
        """Check updates against another generation from now on."""
        self.live, self._num_shards = live, num_shards

    def counts(self) -> dict[tuple[str, str], int]:
        """Return how many mutations of each operation ended with each code."""
        with self._lock:
            return dict(self._counts)

    def check(self, mutations: Sequence[retrieval_pb2.Mutation]) -> Checked:
        """Return which mutations every shard of the live generation can take."""
        live = self.live
        found: list[tuple[int, retrieval_pb2.Mutation, int, int]] = []
        rejected = []
        for index, message in enumerate(mutations):
            try:
                item_id, expires_unix_ms = self._checked(message, live)
            except MutationError as error:
                rejected.append(UpdateRejection(index, "INVALID_ARGUMENT", str(error)))
                self._count(message.WhichOneof("op") or "none", "INVALID_ARGUMENT")
            else:
                found.append((index, message, item_id, expires_unix_ms))
        ids = torch.tensor([max(item_id, 0) for _, _, item_id, _ in found], dtype=torch.int64)
        homes = partition_of(ids, live.spec.num_partitions).tolist()
        writes = tuple(
            self._write(index, message, item_id, home, expires_unix_ms)
            for (index, message, item_id, expires_unix_ms), home in zip(found, homes, strict=True)
        )
        return Checked(writes, tuple(rejected))

    def _checked(self, message: retrieval_pb2.Mutation, live: LiveGeneration) -> tuple[int, int]:
        """Return the item of a mutation and when it expires.

        Raises:
            MutationError: naming the field.
        """
        if message.version > MAX_VERSION:
            raise MutationError("version", f"must be at most {MAX_VERSION}, got {message.version}")
        seconds = ttl_s(message)
        # Every number stands for the version that the server is to assign.
        mutation = check(mutation_from(message, message.version or 1), live.spec, live.tables)
        expires_unix_ms = self._unix_ms() + max(int(seconds * 1000), 1) if seconds else 0
        return getattr(mutation, "item_id", NO_ITEM), expires_unix_ms

    def _write(
        self,
        index: int,
        message: retrieval_pb2.Mutation,
        item_id: int,
        home: int,
        expires_unix_ms: int,
    ) -> Write:
        table = message.rows.table if item_id == NO_ITEM else ""
        place = zlib.crc32(table.encode()) if table else home
        return Write(
            index=index,
            op=message.WhichOneof("op") or "",
            partition=place % self.log.num_partitions,
            item_id=item_id,
            home=-1 if table else home,
            table=table,
            version=message.version,
            if_version=message.if_version if message.HasField("if_version") else None,
            urgent=message.delete.urgent,
            expires_unix_ms=expires_unix_ms,
            message=message,
        )

    def commit(self, partition: int, calls: Sequence[Sequence[Write]]) -> list[Outcome]:
        """Decide the writes of several calls in order, and log what is accepted in one append.

        Args:
            partition: of the log; all writes belong to it.
            calls: of each call its writes, in its order.

        Raises:
            Fenced: if another sequencer has taken over; nothing of these calls is in the log.
            LogUnavailable: if it cannot be written; what of these calls is in the log is unknown.
        """
        if self.fenced is not None:
            raise self.fenced
        state = self._state(partition, [write for writes in calls for write in writes])
        records: list[NewRecord] = []
        decided = [[self._decide(write, state, records) for write in writes] for writes in calls]
        first = self._append(partition, records)
        outcomes = []
        for writes, fates in zip(calls, decided, strict=True):
            places = [fate for fate in fates if isinstance(fate, int)]
            positions = [first - 1 - place if place < 0 else place for place in places]
            rejected = tuple(fate for fate in fates if isinstance(fate, UpdateRejection))
            outcomes.append(Outcome(max(positions, default=0), rejected))
            for write, fate in zip(writes, fates, strict=True):
                self._count(write.op, fate.code if isinstance(fate, UpdateRejection) else "OK")
        return outcomes

    def expire(self, partition: int, limit: int = 1000) -> int:
        """Log deletes of at most ``limit`` items whose time is over; return how many there were.

        Raises:
            Fenced: if another sequencer has taken over.
            LogUnavailable: if the log cannot be written.
        """
        if self.fenced is not None:
            raise self.fenced
        over = self.log.expired(partition, self._unix_ms(), limit)
        records = []
        for item_id, head in over:
            version = head.version + 1
            message = retrieval_pb2.Mutation(delete=retrieval_pb2.ItemDelete(item_id=item_id))
            payload = logged(message, version)
            records.append(
                NewRecord(
                    item_id=item_id,
                    version=version,
                    urgent=False,
                    deleted=True,
                    expires_unix_ms=0,
                    payload=payload,
                )
            )
        self._append(partition, records)
        for _ in records:
            self._count(EXPIRY, "OK")
        return len(records)

    def _append(self, partition: int, records: Sequence[NewRecord]) -> int:
        """Return the position of the first record, 0 without any."""
        if not records:
            return 0
        try:
            first = self.log.append(partition, self.epochs[partition], records, self._unix_ms())
        except Fenced as error:
            self.fenced = error
            raise
        if self._feed is not None:
            self._feed.settle(partition, first + len(records) - 1)
        return first

    def _state(self, partition: int, writes: Iterable[Write]) -> dict[int | str, _Item]:
        """Return the items and tables of the writes as the log has them."""
        ids = {write.item_id for write in writes if not write.table}
        heads = self.log.heads(partition, sorted(ids))
        held = self.live.held(sorted(ids - heads.keys()))
        state: dict[int | str, _Item] = {
            item_id: _Item(head.version, not head.deleted, head.position, head.expires_unix_ms)
            for item_id, head in heads.items()
        }
        for item_id in ids - heads.keys():
            state[item_id] = _Item(0, item_id in held, 0, 0)
        for table in {write.table for write in writes if write.table}:
            version = self.log.row_version(partition, table)
            # The newest position stands for that of the table, which the log does not keep.
            end = self.log.end(partition) if version else 0
            state[table] = _Item(version, version > 0, end, 0)
        return state

    def _decide(
        self, write: Write, state: dict[int | str, _Item], records: list[NewRecord]
    ) -> int | UpdateRejection:
        """Return the place of a write, or why it is refused; what is accepted joins ``records``."""
        now = state[write.table or write.item_id]
        if write.version and write.version == now.version:
            if (write.op == "delete") == now.exists:
                return self._stale(write, now, f"version {write.version} is of another change, not")
            return now.place  # sent again
        if write.version and write.version < now.version:
            return self._stale(write, now, f"version {write.version} is not above")
        if write.if_version is not None:
            is_met = (
                write.if_version == now.version and now.version > 0
                if write.if_version
                else not now.exists
            )
            if not is_met:
                return self._stale(write, now, f"if_version {write.if_version} is not")
        gone = write.op == "delete"
        if not now.exists and write.op == "patch":
            return UpdateRejection(
                write.index, "NOT_FOUND", f"there is no item {write.item_id} to patch"
            )
        if not now.exists and gone and not write.version:
            if now.version:
                return now.place  # deleted already
            return UpdateRejection(
                write.index, "NOT_FOUND", f"there is no item {write.item_id} to delete"
            )
        if write.op == "upsert" and (refusal := self._no_room(write, now)):
            return refusal
        now.version = write.version or now.version + 1
        now.exists = not gone
        if write.op != "patch":
            now.expires_unix_ms = write.expires_unix_ms
        records.append(
            NewRecord(
                item_id=write.item_id,
                version=now.version,
                urgent=write.urgent,
                deleted=gone,
                expires_unix_ms=now.expires_unix_ms,
                payload=logged(write.message, now.version, write.expires_unix_ms),
                table=write.table,
            )
        )
        now.place = -len(records)
        return now.place

    def _no_room(self, write: Write, now: _Item) -> UpdateRejection | None:
        if self._feed is None:
            return None
        shard = self._shard_of(write.home)
        if now.exists:
            reason = self._feed.refusal(shard)
        else:
            reason = self._feed.reserve(shard, write.partition)
        return UpdateRejection(write.index, "RESOURCE_EXHAUSTED", reason) if reason else None

    def _shard_of(self, home: int) -> int:
        # The one whose ``shard_partitions`` hold it.
        return ((home + 1) * self._num_shards - 1) // self.live.spec.num_partitions

    def _stale(self, write: Write, now: _Item, what: str) -> UpdateRejection:
        name = f"table {write.table}" if write.table else f"item {write.item_id}"
        if now.version:
            held = f"version {now.version}" + ("" if now.exists else ", which deleted it")
        else:
            held = "without a version" if now.exists else "not there"
        return UpdateRejection(
            write.index, "ABORTED", f"{what} that of {name}, which is {held}", now.version
        )

    def _count(self, op: str, code: str) -> None:
        with self._lock:
            self._counts[op, code] += 1

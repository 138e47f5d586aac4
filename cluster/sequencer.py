"""Gives updates their order: it checks them, decides what is accepted, and writes the log.

Shapes: L log partitions, P partitions of the catalogue.
"""

import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from silvershard.cluster import retrieval_pb2
from silvershard.cluster.faults import Faults
from silvershard.cluster.feed_block import FeedBlock
from silvershard.cluster.live_generation import LiveGeneration
from silvershard.cluster.mutation_check import MutationCheck
from silvershard.cluster.mutation_codec import body_of, logged, sealed, ttl_s
from silvershard.cluster.update_log import NO_ITEM, NewRecord, UpdateLog
from silvershard.cluster.updates import UpdateRejection
from silvershard.shard.errors import Fenced, MutationError
from silvershard.shard.partition import partition_of

MAX_VERSION = 1 << 62
"""Largest version of a mutation, so that there is always a next one."""
EXPIRY = "expiry"
"""The operation of a delete that an item's ttl asks for."""


class Write(NamedTuple):
    """A mutation that every shard can take, before its place in the order is known."""

    number: int
    """Of the mutation in its call, from 0."""
    op: str
    item_id: int
    """``NO_ITEM`` for rows of a table."""
    table: str
    version: int
    """0: the next one."""
    if_version: int | None
    urgent: bool
    expires_unix_ms: int
    body: bytes
    """What the log keeps of it, but its version."""
    home: int
    """Partition of the catalogue that the item belongs to; -1 for rows of a table."""
    partition: int
    """Of the log."""


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
    deleted: bool
    """Whether a delete is what the log has last of it."""
    place: int
    """Position of its newest record; of the n-th record of this commit: -n, from 1."""
    expires_unix_ms: int
    patched: bool
    """Whether the log has nothing but patches of it, or nothing at all."""


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
        faults: Faults | None = None,
    ) -> None:
        """Become the writer of every partition of the log: earlier ones write no more.

        Args:
            log: the log.
            live: the generation that serves.
            num_shards: S, of the cluster.
            feed: knows whether shards have room; None: they always have.
            unix_ms: wall-clock time in milliseconds.
            faults: say when the log cannot be written; None: never.

        Raises:
            LogUnavailable: if the log cannot be written.
        """
        self.log = log
        self.fenced: Fenced | None = None
        """Set once another sequencer has taken over."""
        self._num_shards = num_shards
        self._feed = feed
        self._unix_ms = unix_ms
        self._faults = faults
        self._lock = threading.Lock()
        self._counts: Counter[tuple[str, str]] = Counter()
        self._followed = live, MutationCheck(live.spec, live.tables)
        self._unanswered: set[int] = set()
        """Partitions to which an append had no answer."""
        self._epochs = [log.acquire(one) for one in range(log.num_partitions)]
        if feed is not None:
            for partition in range(log.num_partitions):
                feed.resume(partition, log.end(partition))

    def follow(self, live: LiveGeneration, num_shards: int) -> None:
        """Check updates against another generation from now on."""
        if live is not self.live:
            self._followed = live, MutationCheck(live.spec, live.tables)
        if num_shards != self._num_shards and self._feed is not None:
            # Other shards hold other items: what is known of their room is of no use.
            self._feed.forget()
        self._num_shards = num_shards

    @property
    def live(self) -> LiveGeneration:
        """Return the generation that updates are checked against."""
        return self._followed[0]

    @property
    def epochs(self) -> tuple[int, ...]:
        """Return the epoch of every partition that this sequencer writes under."""
        return tuple(self._epochs)

    def counts(self) -> dict[tuple[str, str], int]:
        """Return how many mutations of each operation ended with each code."""
        with self._lock:
            return dict(self._counts)

    def check(self, mutations: Sequence[retrieval_pb2.Mutation]) -> Checked:
        """Return which mutations every shard of the live generation can take.

        The messages are used up: they lose what the log does not keep.
        """
        live, check = self._followed
        found: list[tuple[int, str, int, str, int, int | None, bool, int, bytes]] = []
        rejected = []
        for index, message in enumerate(mutations):
            op = message.WhichOneof("op") or ""
            version = message.version
            if_version = message.if_version if message.HasField("if_version") else None
            try:
                if version > MAX_VERSION:
                    raise MutationError("version", f"must be at most {MAX_VERSION}, got {version}")
                expires_unix_ms = self._expiry(message) if op == "upsert" else 0
                body = body_of(message)
                item_id = check(message, op, len(body))
            except MutationError as error:
                rejected.append(UpdateRejection(index, "INVALID_ARGUMENT", str(error)))
                self._count({(op or "none", "INVALID_ARGUMENT"): 1})
                continue
            table = message.rows.table if item_id == NO_ITEM else ""
            urgent = op == "delete" and message.delete.urgent
            found.append(
                (index, op, item_id, table, version, if_version, urgent, expires_unix_ms, body)
            )
        ids = torch.tensor([max(one[2], 0) for one in found], dtype=torch.int64)
        homes = partition_of(ids, live.spec.num_partitions).tolist()
        num_logs = self.log.num_partitions
        writes = tuple(
            Write(*one, -1, zlib.crc32(one[3].encode()) % num_logs)
            if one[3]
            else Write(*one, home, home % num_logs)
            for one, home in zip(found, homes, strict=True)
        )
        return Checked(writes, tuple(rejected))

    def _expiry(self, message: retrieval_pb2.Mutation) -> int:
        """Return when the item of an upsert expires, 0: never.

        Raises:
            MutationError: if its ttl is none.
        """
        seconds = ttl_s(message)
        return self._unix_ms() + max(int(seconds * 1000), 1) if seconds else 0

    def awaits_room(self, writes: Iterable[Write]) -> bool:
        """Return whether a shard of items to upsert has never said how much room it has."""
        unknown = self._feed.unknown(self._num_shards) if self._feed is not None else set()
        return bool(unknown) and any(
            write.op == "upsert" and self._shard_of(write.home) in unknown for write in writes
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
        self._hold_epoch(partition)
        state = self._state(partition, [write for writes in calls for write in writes])
        records: list[NewRecord] = []
        decided = [[self._decide(write, state, records) for write in writes] for writes in calls]
        first = self._append(partition, records)
        outcomes = []
        counts: Counter[tuple[str, str]] = Counter()
        for writes, fates in zip(calls, decided, strict=True):
            position = 0
            rejected = []
            for write, fate in zip(writes, fates, strict=True):
                if isinstance(fate, int):
                    position = max(position, first - 1 - fate if fate < 0 else fate)
                    counts[write.op, "OK"] += 1
                else:
                    rejected.append(fate)
                    counts[write.op, fate.code] += 1
            outcomes.append(Outcome(position, tuple(rejected)))
        self._count(counts)
        return outcomes

    def expire(self, partition: int, limit: int = 1000) -> int:
        """Log deletes of at most ``limit`` items whose time is over; return how many there were.

        Raises:
            Fenced: if another sequencer has taken over.
            LogUnavailable: if the log cannot be written.
        """
        self._hold_epoch(partition)
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
        if records:
            self._count({(EXPIRY, "OK"): len(records)})
        return len(records)

    def _hold_epoch(self, partition: int) -> None:
        """Make sure that the log is as this writer knows it.

        What became of an append without an answer shows only under a new epoch: under the old one
        it might still get into the log, behind a decision that was made without it.
        """
        if self.fenced is not None:
            raise self.fenced
        if self._faults is not None:
            self._faults.check_log(self.log.url)
        if partition in self._unanswered:
            try:
                self._epochs[partition] = self.log.acquire(partition, self._epochs[partition])
            except Fenced as error:
                self.fenced = error
                raise
            self._unanswered.discard(partition)

    def _append(self, partition: int, records: Sequence[NewRecord]) -> int:
        """Return the position of the first record, 0 without any."""
        if not records:
            return 0
        self._unanswered.add(partition)
        try:
            first = self.log.append(partition, self._epochs[partition], records, self._unix_ms())
        except Fenced as error:
            self.fenced = error
            raise
        self._unanswered.discard(partition)
        if self._feed is not None:
            self._feed.settle(partition, first + len(records) - 1)
        return first

    def _state(self, partition: int, writes: Iterable[Write]) -> dict[int | str, _Item]:
        """Return the items and tables of the writes as the log and the generation have them."""
        ids: set[int] = set()
        tables: set[str] = set()
        for write in writes:
            if write.table:
                tables.add(write.table)
            else:
                ids.add(write.item_id)
        heads = self.log.heads(partition, sorted(ids))
        state: dict[int | str, _Item] = {
            item_id: _Item(head.version, not head.deleted, *head[1:])
            for item_id, head in heads.items()
        }
        for item_id in ids - heads.keys():
            state[item_id] = _Item(0, True, False, 0, 0, True)
        # Whether an item is that was never upserted or deleted is what the generation says.
        from_snapshot = sorted(ids - {one for one, head in heads.items() if not head.patched})
        held = self.live.held(from_snapshot)
        for item_id in from_snapshot:
            state[item_id].exists = item_id in held
        for table in tables:
            version = self.log.row_version(partition, table)
            # The newest position stands for that of the table, which the log does not keep.
            end = self.log.end(partition) if version else 0
            state[table] = _Item(version, version > 0, False, end, 0, False)
        return state

    def _decide(
        self, write: Write, state: dict[int | str, _Item], records: list[NewRecord]
    ) -> int | UpdateRejection:
        """Return the place of a write, or why it is refused; what is accepted joins ``records``."""
        now = state[write.table or write.item_id]
        if write.version and write.version == now.version:
            if (write.op == "delete") != now.deleted:
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
                write.number, "NOT_FOUND", f"there is no item {write.item_id} to patch"
            )
        if not now.exists and gone and not write.version:
            if now.deleted:
                return now.place  # deleted already
            return UpdateRejection(
                write.number, "NOT_FOUND", f"there is no item {write.item_id} to delete"
            )
        if write.op == "upsert" and (refusal := self._no_room(write, now)):
            return refusal
        now.version = write.version or now.version + 1
        now.exists, now.deleted = not gone, gone
        if write.op != "patch":
            now.expires_unix_ms = write.expires_unix_ms
            now.patched = False
        records.append(
            NewRecord(
                write.item_id,
                now.version,
                write.urgent,
                gone,
                now.expires_unix_ms,
                sealed(write.body, now.version, write.expires_unix_ms),
                write.table,
                now.patched,
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
        return UpdateRejection(write.number, "RESOURCE_EXHAUSTED", reason) if reason else None

    def _shard_of(self, home: int) -> int:
        # The one whose ``shard_partitions`` hold it.
        return ((home + 1) * self._num_shards - 1) // self.live.spec.num_partitions

    def _stale(self, write: Write, now: _Item, what: str) -> UpdateRejection:
        name = f"table {write.table}" if write.table else f"item {write.item_id}"
        if now.version:
            held = f"version {now.version}" + (", which deleted it" if now.deleted else "")
        else:
            held = "without a version" if now.exists else "not there"
        return UpdateRejection(
            write.number, "ABORTED", f"{what} that of {name}, which is {held}", now.version
        )

    def _count(self, counts: Mapping[tuple[str, str], int]) -> None:
        with self._lock:
            self._counts.update(counts)

"""What keeps a shard up to date: it reads the update log, prepares batches and has them committed.

It runs on a thread of its own; the model is held only while a prepared batch is committed.

Shapes: L log partitions.
"""

import logging
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from silvershard.cluster.faults import Faults
from silvershard.cluster.freshness import Cut, Lag, Refused
from silvershard.cluster.update_log import (
    READ_BYTES,
    AppliedRecords,
    LogRecord,
    UpdateLog,
)
from silvershard.shard.changes import NOTHING_TO_PATCH
from silvershard.shard.errors import (
    LogDamaged,
    LogTrimmed,
    LogUnavailable,
    MutationError,
    PoolExhausted,
    RetrievalError,
)

MAX_BATCH = 1024
"""Most records of a batch, where nothing else is decided: a commit of so many takes some 7 ms."""

# A batch of this much work keeps what is urgent waiting no longer.
_BATCH_S = 0.05
# Beside it records gather, for a batch of many takes less time than many of a few.
_SHARE = 0.1
_LONGEST_PAUSE_S = 0.25
# Queries that leave no gap make a batch so much slower at most.
_MOST_GAPS_S = 0.1
# A part of a batch that is worth to step aside for.
_READ = 512
_SMALLEST_BATCH = 64

# Longer than any query is open.
_ROOM_S = 15.0
_ROOM_RETRY_S = 0.05

_REMEMBERED = 256
"""Refused items that are remembered."""

# Longest sleep of an idle follower, and so its staleness.
_IDLE_S = 0.01

_FIRST_DELAY_S = 0.05
_LONGEST_DELAY_S = 1.0

_log = logging.getLogger(__name__)

P = TypeVar("P")
P_co = TypeVar("P_co", covariant=True)

Rejected = Sequence[tuple[int, str]]
"""Items whose updates were refused, and why."""


class Updater(Protocol[P_co]):
    """What turns updates into a batch that is quickly committed."""

    def prepare(self, mutations: Sequence[Any], give_way: Callable[[], None]) -> P_co:
        """Return what the mutations, as they were decoded, mean for this shard.

        Args:
            mutations: of a batch.
            give_way: is called between the parts of the work, and lets queries go first.
        """
        ...


class _TooLarge(Exception):
    """A batch that there is no room for in one piece."""


@dataclass
class UpdateCounts:
    """What a follower has done so far."""

    batches: int = 0
    records: int = 0
    """Read and handed on, whichever shard they belong to."""
    urgent: int = 0
    """Records that were applied ahead of their turn."""
    rejected: int = 0
    longest_commit_s: float = 0.0


class Follower(Generic[P]):
    """Follows all partitions of a log for one shard of one generation.

    A record that is refused for what it says is logged and passed over, alike on every replica.
    While the log cannot be read, or not beyond the cut, the shard stays at its cut and looks again.
    Any other failure ends the following: nothing is ever skipped.
    """

    def __init__(
        self,
        log: UpdateLog,
        updater: Updater[P],
        commit: Callable[[P, Cut | None], Rejected],
        decode: Callable[[bytes], Any],
        *,
        cut: Cut = (),
        max_batch: int = MAX_BATCH,
        name: str = "shard",
        gap: Callable[[], float] = lambda: 0.0,
        clock: Callable[[], float] = time.monotonic,
        unix_clock: Callable[[], float] = time.time,
        faults: Faults | None = None,
    ) -> None:
        """Make a follower that does not run yet.

        Args:
            log: the log; may be shared.
            updater: prepares batches; only this follower calls it.
            commit: applies a prepared batch and moves the cut of the shard, which stays for None:
                the batch came ahead of its turn; returns once it did.
            decode: reads the payload of a record; what it returns, the updater takes.
            cut: ``(L,)`` what is applied already; empty for nothing.
            max_batch: most records of a batch.
            name: what the log calls the shard.
            gap: waits for a moment without a query, and returns for how long.
            clock: measures times.
            unix_clock: tells how old a record is.
            faults: say when the log cannot be reached; None: never.
        """
        self.counts = UpdateCounts()
        self.failure = ""
        """Why it follows no more."""
        self.trouble = ""
        """Why it does not get on at present."""
        self.refused: Refused = ()
        """The newest items whose updates were refused for what they say, and why."""
        self._log = log
        self._updater = updater
        self._commit = commit
        self._decode = decode
        self._max_batch = max_batch
        self._batch = max_batch
        self._name = name
        self._gap = gap
        self._gave_way_s = 0.0
        """What was spent on waiting for gaps."""
        self._gaps_left_s = _MOST_GAPS_S
        """What this step may still spend on it."""
        self._looked_s = float("-inf")
        """When urgent records were looked for."""
        self._prepared_s = 0.0
        """What preparing the batch took."""
        self._clock = clock
        self._unix_clock = unix_clock
        self._faults = faults
        self._began_s = clock()
        start = cut or (0,) * log.num_partitions
        self._lag = Lag(start, start, float("-inf"), float("inf"))
        self._seen_ends = start
        """``(L,)`` last positions when urgent records were looked for."""
        self._urgent = list(start)
        """``(L,)`` up to where urgent records are applied."""
        self._logged_s = [float("inf")] * len(start)
        """``(L,)`` when the last record that was read was logged."""
        self._read: dict[int, LogRecord] = {}
        """The last record that was read of a partition."""
        self._applied = AppliedRecords(log)
        self._applied_urgent = AppliedRecords(log)
        """The last ones that were applied ahead of their turn."""
        self._cut_short = False
        """Whether the last batch had no room for more bytes."""
        self._is_urgent = False
        """Whether urgent records are applied ahead of their turn."""
        self._turn = 0
        self._ended = threading.Event()
        self._hurried = threading.Event()
        self._thread: threading.Thread | None = None
        self._progressed: Callable[[], None] = lambda: None

    @property
    def log_id(self) -> int:
        """Return the number of the log."""
        return self._log.log_id

    @property
    def lag(self) -> Lag:
        """Return how far it has come; any thread may ask."""
        return self._lag

    @property
    def staleness_s(self) -> float:
        """Return for how long an update may have been in the log without being applied here.

        That is the time since the cut was the end of the log, or the age of the oldest record that
        is not applied, whichever is larger.
        """
        lag = self._lag
        since_s = self._clock() - max(lag.current_s, self._began_s)
        return max(since_s, self._unix_clock() - lag.oldest_unix_s, 0.0)

    def start(self, progressed: Callable[[], None] = lambda: None) -> None:
        """Follow on a thread of its own until ``stop``.

        Args:
            progressed: is told on that thread of every look at the log, and of a failure.
        """
        self._progressed = progressed
        self._thread = threading.Thread(target=self._follow, name=f"follow-{self._name}")
        self._thread.daemon = True
        self._thread.start()

    def stop(self, timeout_s: float = 5.0) -> None:
        """End the following; what is being committed is finished within ``timeout_s``."""
        self._ended.set()
        self._hurried.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout_s)

    def hurry(self) -> None:
        """Apply what is in the log without waiting for more; any thread may ask."""
        self._hurried.set()

    def catch_up(self) -> None:
        """Apply all that was logged so far, on this thread, while the shard serves nobody yet.

        Waits for a log that cannot be reached. Returns early after ``stop``.

        Raises:
            LogDamaged: if the log lost what is to be applied.
            LogTrimmed: if it keeps that no more.
            RetrievalError: if it cannot be applied.
        """
        delay_s = _FIRST_DELAY_S
        while self._lag.current_s == float("-inf") and not self._ended.is_set():
            try:
                self.step()
            except LogUnavailable as error:
                self._suffer(error)
                self._ended.wait(delay_s)
                delay_s = min(2 * delay_s, _LONGEST_DELAY_S)

    def step(self) -> bool:
        """Read the log once and apply what is there; return True if more is left.

        Raises:
            LogUnavailable: if the log cannot be reached.
            RetrievalError: if it cannot be followed any further.
        """
        in_haste = self._hurried.is_set()
        self._hurried.clear()
        self._step_began(in_haste=in_haste)
        asked_s = self._clock()
        ends = self._seen_ends = self._ends()
        for partition, end in enumerate(ends):
            self._applied.check(partition, self._lag.cut[partition], end)
            if self._urgent[partition] > self._lag.cut[partition]:
                self._applied_urgent.check(partition, self._urgent[partition], end)
        behind = sum(ends) - sum(self._lag.cut)
        if behind > min(self._batch, _SMALLEST_BATCH) or self._cut_short:
            self._apply_urgent()
        records, cut = self._next_records(ends)
        if records:
            self._prepared_s = 0.0
            self._apply(records, cut)
            for partition, record in self._read.items():
                self._applied.note(partition, record)
                self._logged_s[partition] = record.logged_unix_ms / 1e3
            self._fit_batch(len(records), self._prepared_s)
        # What is left of a partition was logged after what was read last.
        left = [at for at, end in enumerate(ends) if end > cut[at]]
        more = bool(left)
        oldest = min((self._logged_s[at] for at in left), default=float("inf"))
        current_s = self._lag.current_s if more else asked_s
        # Records may have come since the ends were read.
        known = tuple(max(pair) for pair in zip(ends, cut, strict=True))
        self._lag = Lag(cut, known, current_s, oldest, asked_s, self.refused)
        if self.trouble:
            _log.info("%s follows the update log again", self._name)
            self.trouble = ""
        return more

    def _next_records(self, ends: Cut) -> tuple[list[LogRecord], Cut]:
        """Return the records of the next batch, and the cut that it leads to.

        Their payloads are at most ``READ_BYTES``, unless there is only one.
        """
        cut = list(self._lag.cut)
        found: list[LogRecord] = []
        size = 0
        self._cut_short = False
        self._read.clear()
        # Another partition begins every time, so that a busy one holds up no other.
        self._turn += 1
        for step in range(len(cut)):
            partition = (self._turn + step) % len(cut)
            room = self._batch - len(found)
            if room <= 0 or ends[partition] <= cut[partition]:
                continue
            for record in self._records_of(partition, cut[partition], room):
                size += len(record.payload)
                self._cut_short = size >= READ_BYTES
                if found and size > READ_BYTES:
                    return found, tuple(cut)
                found.append(record)
                cut[partition] = record.position
                self._read[partition] = record
        return found, tuple(cut)

    def _records_of(self, partition: int, after: int, room: int) -> Iterator[LogRecord]:
        """Yield the records of a partition beyond a position, ``room`` at most."""
        while room > 0:
            limit = min(room, _READ)
            records = self._log.read(partition, after, limit)
            yield from records
            if len(records) < limit:
                return
            room, after = room - limit, records[-1].position
            self._give_way()

    def _give_way(self) -> None:
        """Let queries go first, and urgent records, where there are some."""
        if self._is_urgent:
            return
        if self._gaps_left_s > 0 and not self._hurried.is_set():
            spent_s = self._gap()
            self._gaps_left_s -= spent_s
            self._gave_way_s += spent_s
        if self._clock() >= self._looked_s + _IDLE_S:
            self._look_for_urgent()

    def _step_began(self, *, in_haste: bool) -> None:
        self._gaps_left_s = 0.0 if in_haste else _MOST_GAPS_S
        self._looked_s = self._clock()

    def _look_for_urgent(self) -> None:
        self._looked_s = self._clock()
        ends = self._ends()
        if ends != self._seen_ends:
            self._seen_ends = ends
            self._apply_urgent()

    def _ends(self) -> Cut:
        if self._faults is not None:
            self._faults.check_log(self._log.url)
        return tuple(self._log.end(one) for one in range(self._log.num_partitions))

    def _apply_urgent(self) -> None:
        """Apply the urgent records beyond the cut; their versions make it harmless to do so again.

        The cut stays where it is. They are deletes, which need no room, and give way to nobody.
        """
        if self._is_urgent:
            return
        self._is_urgent = True
        try:
            for partition, done in enumerate(self._lag.cut):
                after = max(done, self._urgent[partition])
                while records := self._log.read_urgent(partition, after, self._batch):
                    self._apply(records, None)
                    after = self._urgent[partition] = records[-1].position
                    self._applied_urgent.note(partition, records[-1])
                    self.counts.urgent += len(records)
        finally:
            self._is_urgent = False

    def _apply(self, records: Sequence[LogRecord], cut: Cut | None) -> None:
        mutations: list[Any] = []
        for record in records:
            try:
                mutations.append(self._decode(record.payload))
            except MutationError as error:
                self._reject([(record.item_id, str(error))])
        self._apply_all(mutations, cut)
        self.counts.batches += 1
        self.counts.records += len(records)

    def _apply_all(self, mutations: Sequence[Any], cut: Cut | None) -> None:
        """Prepare and commit mutations, in halves where there is no room for all at once.

        Each half frees the slots that its items had before. The cut moves with the last one; what
        came before it may come again, which versions make harmless.
        """
        began_s, gave_way_s = self._clock(), self._gave_way_s
        prepared = self._updater.prepare(mutations, self._give_way)
        self._prepared_s += self._clock() - began_s - (self._gave_way_s - gave_way_s)
        self._give_way()
        try:
            rejected, spent_s = self._committed(prepared, cut, len(mutations))
        except _TooLarge:
            middle = len(mutations) // 2
            self._apply_all(mutations[:middle], None if cut is None else self._lag.cut)
            self._apply_all(mutations[middle:], cut)
            return
        self._reject(rejected)
        self.counts.longest_commit_s = max(self.counts.longest_commit_s, spent_s)

    def _committed(self, prepared: P, cut: Cut | None, size: int) -> tuple[Rejected, float]:
        """Commit a batch; return what was refused, and how long the model was asked for.

        Raises:
            _TooLarge: if there is room for a part of its ``size`` mutations.
        """
        began_s = self._clock()
        while True:
            started_s = self._clock()
            try:
                rejected = self._commit(prepared, cut)
            except PoolExhausted as error:
                if error.free and size > 1:
                    raise _TooLarge from None
                # Queries that are open hold slots of items that have changed since.
                if started_s - began_s >= _ROOM_S or self._ended.is_set():
                    raise
                self.trouble = str(error)
                self._apply_urgent()
                self._ended.wait(_ROOM_RETRY_S)
            else:
                return rejected, self._clock() - started_s

    def _reject(self, rejected: Rejected) -> None:
        for item_id, reason in rejected:
            _log.warning("%s refuses an update of item %d: %s", self._name, item_id, reason)
            if reason != NOTHING_TO_PATCH:
                # All tables are item -1.
                same = (item_id, reason) if item_id < 0 else item_id
                others = [one for one in self.refused if same not in (one, one[0])]
                self.refused = (*others, (item_id, reason))[-_REMEMBERED:]
        self.counts.rejected += len(rejected)

    def _fit_batch(self, size: int, spent_s: float) -> None:
        """Make batches as large as can be applied in the time of one."""
        if 2 * size < self._batch:
            return
        fitting = math.ceil(size * _BATCH_S / max(spent_s, 1e-6))
        self._batch = max(min(fitting, 2 * self._batch, self._max_batch), _SMALLEST_BATCH)
        self._batch = min(self._batch, self._max_batch)

    def _follow(self) -> None:
        delay_s = _FIRST_DELAY_S
        while not self._ended.is_set():
            began_s, gave_way_s = self._clock(), self._gave_way_s
            try:
                more = self.step()
                delay_s = _FIRST_DELAY_S
                self._progressed()
                spent_s = self._clock() - began_s - (self._gave_way_s - gave_way_s)
                if not more:
                    self._pause(began_s + min(spent_s / _SHARE, _LONGEST_PAUSE_S))
                if not more and not self._ended.is_set():
                    partition = self._turn % len(self._lag.cut)
                    self._log.wait(partition, self._lag.cut[partition], _IDLE_S)
            except (LogUnavailable, LogDamaged, LogTrimmed) as error:
                # What it holds is right as of its cut, and as stale as its answers say.
                self._suffer(error)
                self._ended.wait(delay_s)
                delay_s = min(2 * delay_s, _LONGEST_DELAY_S)
            except Exception as error:  # noqa: BLE001  # a thread's border; logged
                if not self._ended.is_set():
                    self._fail(error)
                return

    def _pause(self, until_s: float) -> None:
        """Let records gather for the next batch, but for urgent ones, until somebody hurries."""
        while (left_s := until_s - self._clock()) > 0:
            if self._hurried.wait(min(left_s, _IDLE_S)):
                return
            self._look_for_urgent()

    def _suffer(self, error: RetrievalError) -> None:
        if self.trouble != str(error):
            _log.warning("%s cannot follow for now: %s", self._name, error)
        self.trouble = str(error)

    def _fail(self, error: Exception) -> None:
        known = isinstance(error, RetrievalError)
        reason = str(error) if known else f"internal error: {type(error).__name__}: {error}"
        _log.error(
            "%s follows the update log no more: %s",
            self._name,
            reason,
            exc_info=None if known else error,
        )
        self.failure = reason
        self._progressed()

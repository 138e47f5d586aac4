"""What keeps the rows of a table process up to date: it follows the update log on a thread.

Shapes: L log partitions.
"""

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from silvershard.cluster.table_changes import change_from, log_partition
from silvershard.cluster.update_log import NO_ITEM, AppliedRecords, UpdateLog, checked_cut
from silvershard.shard.errors import LogUnavailable, MutationError, RetrievalError
from silvershard.shard.table import TableShard

_BATCH = 2048

# Longest sleep of an idle follower, as of those of shards: a lookup may be waiting for it.
_IDLE_S = 0.01

_FIRST_DELAY_S = 0.05
_LONGEST_DELAY_S = 1.0

_log = logging.getLogger(__name__)


@dataclass
class TableProgress:
    """How far the rows of a table are."""

    partition: int
    """Of the log, in which the changes of the table are."""
    position: int
    """Up to where everything is applied."""
    end: int
    """Last position of the partition, as last seen."""
    changes: int = 0
    """Applied by this process."""


class TableFollower:
    """Follows a log for the rows of some tables.

    It reads only the partitions in which their changes are. A change is applied in the order of the
    log or not at all, and nothing is skipped: while the log cannot be read, whatever the reason,
    the rows stay as they are, and it is tried again.
    """

    def __init__(self, log: UpdateLog, tables: Sequence[TableShard], cut: Sequence[int]) -> None:
        """Make a follower that does not run yet.

        Args:
            log: the log; may be shared.
            tables: whose rows nobody else changes.
            cut: ``(L,)`` positions up to which changes are in the rows; empty for none.

        Raises:
            ConfigError: if the cut is not of that log.
        """
        self.trouble = ""
        """Why it does not follow at present."""
        self.rejected = 0
        """Changes that were refused for what they say, as every shard does."""
        self._log = log
        self._tables = {one.plan.name: one for one in tables}
        self._plans = {name: one.plan for name, one in self._tables.items()}
        positions = checked_cut(cut, log.num_partitions)
        self._progress = {}
        for name in self._tables:
            at = log_partition(name, log.num_partitions)
            self._progress[name] = TableProgress(at, positions[at], positions[at])
        self._positions = {one.partition: one.position for one in self._progress.values()}
        self._applied = AppliedRecords(log)
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        self._progressed: Callable[[], None] = lambda: None

    @property
    def log_id(self) -> int:
        """Return the number of the log."""
        return self._log.log_id

    def progress(self, table: str) -> TableProgress:
        """Return how far the rows of a table are; any thread may ask."""
        return self._progress[table]

    def start(self, progressed: Callable[[], None] = lambda: None) -> None:
        """Follow on a thread of its own until ``stop``.

        Args:
            progressed: is told on that thread when changes were applied.
        """
        self._progressed = progressed
        self._thread = threading.Thread(target=self._follow, name="follow-tables", daemon=True)
        self._thread.start()

    def stop(self, timeout_s: float = 5.0) -> None:
        """End the following; what is being applied is finished within ``timeout_s``."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join(timeout_s)

    def catch_up(self) -> None:
        """Apply all that was logged so far, on this thread; waits for a log that is out of reach.

        Raises:
            RetrievalError: if changes are missing or damaged.
        """
        delay_s = _FIRST_DELAY_S
        while not self._ended.is_set():
            try:
                if not self.step():
                    return
            except LogUnavailable as error:
                self._suffer(error)
                self._ended.wait(delay_s)
                delay_s = min(2 * delay_s, _LONGEST_DELAY_S)

    def step(self) -> bool:
        """Read the log once and apply what is there; return True if more is left.

        Raises:
            LogUnavailable: if the log cannot be reached.
            LogTrimmed: if changes that are not applied were trimmed.
            LogDamaged: if they are damaged, or what was applied is not there any more.
        """
        more = False
        for partition, position in self._positions.items():
            end = self._log.end(partition)
            self._applied.check(partition, position, end)
            if end > position:
                position = self._apply(partition, position)
                more = more or position < end
            for one in self._progress.values():
                if one.partition == partition:
                    one.position, one.end = position, max(end, position)
        self.trouble = ""
        return more

    def _apply(self, partition: int, after: int) -> int:
        """Apply the next records of a partition; return the position of the last."""
        records = self._log.read(partition, after, _BATCH)
        for record in records:
            if record.item_id == NO_ITEM:
                self._apply_change(record.payload)
            self._positions[partition] = record.position
            self._applied.note(partition, record)
        return self._positions[partition]

    def _apply_change(self, payload: bytes) -> None:
        try:
            change = change_from(payload, self._plans)
        except MutationError as error:
            _log.warning("a change of rows is refused: %s", error)
            self.rejected += 1
            return
        if change is not None:
            self._tables[change.table].apply(change.version, change.rows, change.values)
            self._progress[change.table].changes += 1

    def _follow(self) -> None:
        delay_s = _FIRST_DELAY_S
        while not self._ended.is_set():
            try:
                more = self.step()
                delay_s = _FIRST_DELAY_S
                self._progressed()
                if not more and not self._ended.is_set():
                    partition, position = next(iter(self._positions.items()))
                    self._log.wait(partition, position, _IDLE_S)
            except Exception as error:  # noqa: BLE001  # a thread's border; logged
                if not self._ended.is_set():
                    self._suffer(error)
                self._ended.wait(delay_s)
                delay_s = min(2 * delay_s, _LONGEST_DELAY_S)

    def _suffer(self, error: Exception) -> None:
        known = isinstance(error, RetrievalError)
        reason = str(error) if known else f"internal error: {type(error).__name__}: {error}"
        if self.trouble != reason:
            _log.warning("tables do not follow: %s", reason, exc_info=None if known else error)
        self.trouble = reason

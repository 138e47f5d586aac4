"""How a shard process gets its generations into memory, and which ones it shall have."""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from silvershard.cluster.faults import Faults
from silvershard.cluster.follower import MAX_BATCH, Follower
from silvershard.cluster.hosting import Commit, Loaded
from silvershard.cluster.mutation_codec import logged_batch
from silvershard.cluster.query_gaps import QueryGaps
from silvershard.cluster.shard_map import ShardMap
from silvershard.cluster.signal_records import SignalRecords
from silvershard.cluster.update_log import UpdateLog
from silvershard.shard.errors import ConfigError, StateError
from silvershard.shard.executor import ShardExecutor
from silvershard.shard.load import load_executor
from silvershard.shard.snapshot import open_snapshot
from silvershard.shard.table_placement import TableSettings
from silvershard.shard.updater import Prepared, ShardUpdater

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ShardLoader:
    """Loads one shard of any generation; calling it with a directory does so.

    Raises:
        ConfigError: if there is a log to follow and no headroom.
    """

    shard: int
    num_shards: int
    devices: Sequence[str] = ("cpu",)
    tables: TableSettings | None = None
    log: UpdateLog | None = None
    """What the shard follows; None: it stays as it is."""
    headroom: float = 0.1
    """Free pages for updates, as a share of those in use."""
    max_batch: int = MAX_BATCH
    """Most updates that are applied at once."""
    gaps: QueryGaps | None = None
    """Between the queries that updates and loading give way to; None: to none."""
    clock: Callable[[], float] = time.monotonic
    faults: Faults | None = None
    """Say when the log cannot be reached; None: never."""

    def __post_init__(self) -> None:
        if self.log is not None and not self.headroom > 0:
            raise ConfigError(
                f"updates.headroom must be more than 0 where shards follow an update log, "
                f"got {self.headroom}"
            )

    def __call__(self, path: Path, check: Callable[[], None] = lambda: None) -> Loaded:
        """Return the shard of the generation in a directory, warm.

        Args:
            path: directory of the generation.
            check: is called between the parts of the work; its exceptions call that off.

        Raises:
            SnapshotError: if a file is missing or damaged.
            StateError: if the generation was published from another log than is followed.
        """
        if self.log is not None:
            self._check_log(path, self.log)

        def give_way() -> float:
            check()
            return self._gap()

        executor = load_executor(
            path,
            self.shard,
            self.num_shards,
            devices=self.devices,
            tables=self.tables,
            headroom=self.headroom if self.log is not None else 0.0,
            give_way=give_way,
            clock=self.clock,
        )
        follow = None if self.log is None else partial(self._follow, executor, self.log)
        return Loaded(executor, follow)

    def _gap(self) -> float:
        return 0.0 if self.gaps is None else self.gaps.wait()

    def _check_log(self, path: Path, log: UpdateLog) -> None:
        manifest = open_snapshot(path).manifest
        if manifest.log_id not in (0, log.log_id):
            raise StateError(
                f"generation {manifest.spec.generation} holds updates of log {manifest.log_id}, "
                f"{log.url} is log {log.log_id}: publish it again, or give back that log"
            )

    def _follow(
        self, executor: ShardExecutor, log: UpdateLog, commit: Commit
    ) -> Follower[Prepared]:
        return Follower(
            log,
            _RecordUpdater(executor.updater),
            commit,
            bytes,
            cut=executor.cut,
            max_batch=self.max_batch,
            name=f"shard {self.shard} of generation {executor.spec.generation}",
            gap=self._gap,
            clock=self.clock,
            faults=self.faults,
        )


class _RecordUpdater:
    """Prepares the payloads of records, all those of a batch at once."""

    def __init__(self, updater: ShardUpdater) -> None:
        self._updater = updater
        self._signals = SignalRecords()

    def prepare(self, payloads: Sequence[bytes], give_way: Callable[[], None]) -> Prepared:
        """Return what the shard commits; a payload that is no mutation is rejected."""
        give_way()
        batch, refused = logged_batch(payloads, self._signals, give_way)
        give_way()
        prepared = self._updater.prepare_batch(batch, give_way)
        return prepared._replace(rejected=(*refused, *prepared.rejected))


def wanted_generations(map_path: str, snapshot: str) -> tuple[str, dict[int, str]]:
    """Return the directory of the generation to serve first, and those of further ones.

    A process that starts again must hold what its shard map says by now, not what its first start
    was told.

    Args:
        map_path: shard map file; empty or missing: there is none yet.
        snapshot: directory of the generation where there is no map.
    """
    if not map_path:
        return snapshot, {}
    try:
        shard_map = ShardMap.read(Path(map_path))
    except StateError as error:
        _log.info("the shard serves %s: %s", snapshot, error)
        return snapshot, {}
    further = {
        number: path
        for number, path in shard_map.snapshots.items()
        if number != shard_map.generation
    }
    return shard_map.snapshot, further

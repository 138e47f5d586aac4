"""The Ray actor of table shards: it loads their rows, follows the log and serves on own threads."""

import asyncio
import os
import threading
from collections.abc import Coroutine, Mapping
from pathlib import Path
from typing import Any, TypeVar

import ray

from silvershard.cluster.log_reach import reach_log
from silvershard.cluster.security import peers_of
from silvershard.cluster.security_config import PeerSection
from silvershard.cluster.table_config import TableHolding, TableRows
from silvershard.cluster.table_follower import TableFollower
from silvershard.cluster.table_server import TableServer
from silvershard.shard.errors import ConfigError, StateError
from silvershard.shard.table import TableShard

T = TypeVar("T")


class TableProcess:
    """One incarnation of the shards of one index of several tables; Ray starts the next one.

    Each incarnation loads the rows as they were published and replays the log from there, and then
    serves.
    """

    def __init__(
        self,
        shard: int,
        holding: str,
        *,
        host: str = "127.0.0.1",
        peers: Mapping[str, Any] | None = None,
    ) -> None:
        """Load a shard of each table, catch up with the log, and open a free port for each.

        Args:
            shard: index of the shard in every table that has so many.
            holding: file of a ``TableHolding``, which each incarnation reads anew.
            host: address to bind.
            peers: the fields of a ``PeerSection``.

        Raises:
            ConfigError: if no table has such a shard.
            StateError: if the holding is not there, or is of another log.
            SnapshotError: if rows are missing or damaged.
        """
        held = TableHolding.read(Path(holding))
        tables = [_load(shard, one) for one in held.tables if shard < one.plan.num_shards]
        if not tables:
            raise ConfigError(f"shard {shard} needs at least one table, {holding} has none for it")
        self._shard = shard
        self._follower = _caught_up(held, tables) if held.log_url else None
        own = peers_of(PeerSection.model_validate(peers or {}))
        self._servers = [
            TableServer(table, host=host, peers=own, follower=self._follower) for table in tables
        ]
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="table-server", daemon=True).start()
        for server in self._servers:
            self._wait(server.start())
        if self._follower is not None:
            self._follower.start(self._advanced)

    def describe(self) -> dict[str, Any]:
        """Return this incarnation, and its entry for the map of each table."""
        tables = {
            server.table.plan.name: {
                "shard": self._shard,
                "address": server.address,
                "epoch": server.epoch,
                "rows": len(server.table.span),
                "pid": os.getpid(),
            }
            for server in self._servers
        }
        return {"shard": self._shard, "pid": os.getpid(), "tables": tables}

    def stop(self, grace_s: float = 2.0) -> None:
        """Answer what runs for at most ``grace_s``, then close the ports."""
        if self._follower is not None:
            self._follower.stop()
        for server in self._servers:
            self._wait(server.stop(grace_s))

    def _advanced(self) -> None:
        for server in self._servers:
            server.advanced()

    def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()


@ray.remote(num_cpus=0.1, max_restarts=-1)
class TableActor:
    """A ``TableProcess`` of the release that is installed when Ray starts it.

    Ray gives every incarnation the code of this class as it was when the actor was made, which may
    be that of an earlier release: so there is none here.
    """

    def __init__(self, *args: Any, **more: Any) -> None:
        """Make the process."""
        self._process = TableProcess(*args, **more)

    def describe(self) -> dict[str, Any]:
        """Return what it says of itself."""
        return self._process.describe()

    def stop(self, grace_s: float = 2.0) -> None:
        """Answer what runs for at most ``grace_s``, then close the ports."""
        self._process.stop(grace_s)


def _load(shard: int, rows: TableRows) -> TableShard:
    if rows.path:
        return TableShard.from_file(rows.plan, shard, Path(rows.path))
    return TableShard.generated(rows.plan, shard, rows.seed)


def _caught_up(held: TableHolding, tables: list[TableShard]) -> TableFollower:
    """Return what follows the log for these tables, once it has reached its end.

    Raises:
        StateError: if the rows were published from another log.
    """
    log = reach_log(held.log_url)
    if held.log_id not in (0, log.log_id):
        raise StateError(
            f"the rows hold changes of log {held.log_id}, {log.url} is log {log.log_id}: publish "
            "them again, or give back that log"
        )
    follower = TableFollower(log, tables, held.cut)
    follower.catch_up()
    return follower

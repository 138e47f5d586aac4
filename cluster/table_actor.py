"""The Ray actor of table shards: it loads their rows and serves them on a thread of its own."""

import asyncio
import os
import threading
from collections.abc import Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import ray

from silvershard.cluster.table_server import TableServer
from silvershard.shard.errors import ConfigError
from silvershard.shard.table import TableShard
from silvershard.shard.table_plan import TablePlan

T = TypeVar("T")


@ray.remote(num_cpus=0.1, max_restarts=-1)
class TableActor:
    """One incarnation of the shards of one index of several tables; Ray starts the next one.

    The next one holds the rows of the sources: in-place updates that came since are not in it.
    """

    def __init__(
        self,
        shard: int,
        tables: Sequence[Mapping[str, Any]],
        *,
        host: str = "127.0.0.1",
        insecure: bool = False,
    ) -> None:
        """Load a shard of each table and open a free port for each.

        Args:
            shard: index of the shard in every table.
            tables: of each, ``plan``: the fields of a ``TablePlan``; and either ``path``: a
                safetensors file of the whole table, or ``seed``: of a generated table.
            host: address to bind.
            insecure: allow an address that other machines can reach.

        Raises:
            ConfigError: unless there is a table, and exactly one of path and seed of each.
        """
        if not tables:
            raise ConfigError("a table process needs at least one table, got none")
        self._shard = shard
        self._servers = [
            TableServer(_load(shard, **table), host=host, insecure=insecure) for table in tables
        ]
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="table-server", daemon=True).start()
        for server in self._servers:
            self._wait(server.start())

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
        for server in self._servers:
            self._wait(server.stop(grace_s))

    def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()


def _load(
    shard: int, plan: Mapping[str, Any], path: str | None = None, seed: int | None = None
) -> TableShard:
    checked = TablePlan.model_validate(plan)
    if path is not None and seed is None:
        return TableShard.from_file(checked, shard, Path(path))
    if path is None and seed is not None:
        return TableShard.generated(checked, shard, seed)
    raise ConfigError("either path or seed must be given, not both")

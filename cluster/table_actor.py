"""The Ray actor of a table shard: it loads the rows and serves them on a thread of its own."""

import asyncio
import os
import threading
from collections.abc import Coroutine
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
    """One incarnation of a table shard; Ray starts the next one when it dies.

    The next one holds the rows of the source: in-place updates that came since are not in it.
    """

    def __init__(
        self,
        plan: dict[str, Any],
        shard: int,
        *,
        path: str | None = None,
        seed: int | None = None,
        host: str = "127.0.0.1",
        insecure: bool = False,
    ) -> None:
        """Load a shard and open a free port.

        Args:
            plan: the fields of a ``TablePlan``.
            shard: index of the shard.
            path: safetensors file of the whole table.
            seed: without a path, of a generated table.
            host: address to bind.
            insecure: allow an address that other machines can reach.

        Raises:
            ConfigError: unless exactly one of path and seed is given.
        """
        checked = TablePlan.model_validate(plan)
        if path is not None and seed is None:
            table = TableShard.from_file(checked, shard, Path(path))
        elif path is None and seed is not None:
            table = TableShard.generated(checked, shard, seed)
        else:
            raise ConfigError("either path or seed must be given, not both")
        self._server = TableServer(table, host=host, insecure=insecure)
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="table-server", daemon=True).start()
        self._wait(self._server.start())

    def describe(self) -> dict[str, Any]:
        """Return the entry of this incarnation for the table map."""
        return {
            "shard": self._server.table.shard,
            "address": self._server.address,
            "epoch": self._server.epoch,
            "rows": len(self._server.table.span),
            "pid": os.getpid(),
        }

    def stop(self, grace_s: float = 2.0) -> None:
        """Answer what runs for at most ``grace_s``, then close the port."""
        self._wait(self._server.stop(grace_s))

    def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

"""The Ray actor of a shard: it loads the shard and runs its server on a thread of its own."""

import asyncio
import os
import threading
from collections.abc import Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import ray
import torch

from silvershard.cluster.logs import log_to_stderr
from silvershard.cluster.shard_server import ShardServer
from silvershard.cluster.table_config import ShardTables
from silvershard.cluster.table_source import RemoteRows, settings_of
from silvershard.shard.load import load_executor

T = TypeVar("T")


@ray.remote(num_cpus=0.1, max_restarts=-1)
class ShardActor:
    """One incarnation of a replica of a shard; Ray starts the next one when it dies."""

    def __init__(
        self,
        snapshot: str,
        shard: int,
        num_shards: int,
        *,
        replica: int = 0,
        host: str = "127.0.0.1",
        insecure: bool = False,
        devices: Sequence[str] = ("cpu",),
        num_threads: int = 1,
        tables: Mapping[str, Any] | None = None,
    ) -> None:
        """Load a shard, warm it and open a free port.

        Args:
            snapshot: directory of the generation.
            shard: index of the shard.
            num_shards: S.
            replica: index of this copy of the shard.
            host: address to bind.
            insecure: allow an address that other machines can reach.
            devices: the local devices that the shard's documents are split over.
            num_threads: threads of each tensor operation.
            tables: the fields of a ``ShardTables``.
        """
        log_to_stderr()
        torch.set_num_threads(num_threads)
        settings = settings_of(ShardTables.model_validate(tables or {}))
        executor = load_executor(
            Path(snapshot), shard, num_shards, devices=devices, tables=settings
        )
        source = settings.source
        self._server = ShardServer(
            executor,
            replica=replica,
            host=host,
            insecure=insecure,
            lookups=source.counts if isinstance(source, RemoteRows) else dict,
        )
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="shard-server", daemon=True).start()
        self._wait(self._server.start())

    def describe(self) -> dict[str, Any]:
        """Return the entry of this incarnation for the shard map, and its generation."""
        return {
            "shard": self._server.executor.shard,
            "replica": self._server.replica,
            "address": self._server.address,
            "epoch": self._server.epoch,
            "documents": self._server.executor.documents,
            "pid": os.getpid(),
            "generation": self._server.generation,
        }

    def stop(self, grace_s: float = 2.0) -> None:
        """Answer what runs for at most ``grace_s``, then close the port."""
        self._wait(self._server.stop(grace_s))

    def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

"""The Ray actor of a shard: it loads the shard and runs its server on a thread of its own."""

import asyncio
import gc
import os
import sys
import threading
from collections.abc import Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import ray
import torch

from silvershard.cluster import wire
from silvershard.cluster.document import RELEASE
from silvershard.cluster.faults import faults_of_shard
from silvershard.cluster.follower import MAX_BATCH
from silvershard.cluster.hosting import ready
from silvershard.cluster.log_reach import reach_log
from silvershard.cluster.logs import log_to_stderr
from silvershard.cluster.query_gaps import QueryGaps
from silvershard.cluster.security import peers_of
from silvershard.cluster.security_config import PeerSection
from silvershard.cluster.shard_loader import ShardLoader, wanted_generations
from silvershard.cluster.shard_server import ShardServer
from silvershard.cluster.staged import await_staged
from silvershard.cluster.table_config import ShardTables
from silvershard.cluster.table_source import RemoteSources, settings_of

# Beside 5,000 updates a second the median query took 15.5 ms with the 5 ms of Python, at which the
# threads of model and updates take turns, and 9.9 ms with this; 5.0 ms without updates.
_TURN_S = 0.001

T = TypeVar("T")


class ShardProcess:
    """One incarnation of a replica of a shard; Ray starts the next one when it dies."""

    def __init__(
        self,
        snapshot: str,
        shard: int,
        num_shards: int,
        *,
        replica: int = 0,
        host: str = "127.0.0.1",
        peers: Mapping[str, Any] | None = None,
        devices: Sequence[str] = ("cpu",),
        num_threads: int = 1,
        tables: Mapping[str, Any] | None = None,
        map_path: str = "",
        log_url: str = "",
        headroom: float = 0.1,
        max_batch: int = MAX_BATCH,
        faults_dir: str = "",
        epochs: str = "",
    ) -> None:
        """Load a shard, let it catch up with the update log, and open a free port.

        Args:
            snapshot: directory of the generation.
            shard: index of the shard.
            num_shards: S.
            replica: index of this copy of the shard.
            host: address to bind.
            peers: the fields of a ``PeerSection``.
            devices: the local devices that the shard's documents are split over.
            num_threads: threads of each tensor operation.
            tables: the fields of a ``ShardTables``.
            map_path: shard map file, which knows what a process that starts again shall serve;
                empty: always ``snapshot``.
            log_url: update log to follow; empty: none.
            headroom: free pages for updates, as a share of those in use.
            max_batch: most updates that are applied at once.
            faults_dir: where its faults are written down; empty: there are none.
            epochs: control store that numbers the incarnations of a cluster of several hosts, where
                a generation may also be on its way to this one; empty: the time does.
        """
        log_to_stderr()
        torch.set_num_threads(num_threads)
        if log_url:
            sys.setswitchinterval(_TURN_S)
        own = peers_of(PeerSection.model_validate(peers or {}))
        settings = settings_of(ShardTables.model_validate(tables or {}), own.dialer)
        gaps, faults = QueryGaps(), faults_of_shard(faults_dir, shard, replica)
        load = ShardLoader(
            shard,
            num_shards,
            devices=devices,
            tables=settings,
            log=reach_log(log_url) if log_url else None,
            headroom=headroom,
            max_batch=max_batch,
            gaps=gaps,
            faults=faults,
        )
        epoch = None
        if epochs:
            # A single machine needs no redis-py.
            from silvershard.cluster.epochs import next_epoch

            await_staged(lambda: wanted_generations(map_path, snapshot)[0])
            epoch = next_epoch(epochs, f"shard-{shard}-{replica}")
        first, further = wanted_generations(map_path, snapshot)
        sources = settings.sources
        loaded = ready(load(Path(first)))
        # A collection looks at the 400,000 objects of the libraries, and takes 160 ms. What refers
        # to itself of this generation is made later than here, and so is freed with it.
        gc.collect()
        gc.freeze()
        self._server = ShardServer(
            loaded,
            snapshot=first,
            load=load,
            replica=replica,
            host=host,
            peers=own,
            epoch=epoch,
            lookups=sources.counts if isinstance(sources, RemoteSources) else dict,
            gaps=gaps,
            faults=faults,
        )
        for generation, path in further.items():
            self._server.hosting.prepare(generation, path)
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="shard-server", daemon=True).start()
        self._wait(self._server.start())

    def describe(self) -> dict[str, Any]:
        """Return the entry of this incarnation for the shard map, and what it serves."""
        served = self._server.hosting.served
        return {
            "shard": self._server.shard,
            "replica": self._server.replica,
            "address": self._server.address,
            "epoch": self._server.epoch,
            "documents": served[-1].seen.documents if served else 0,
            "pid": os.getpid(),
            "release": RELEASE,
            "wire": wire.VERSION,
            "generation": served[-1].generation if served else 0,
            "generations": [one.generation for one in served],
        }

    def stop(self, grace_s: float = 2.0) -> None:
        """Answer what runs for at most ``grace_s``, then close the port."""
        self._wait(self._server.stop(grace_s))

    def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()


@ray.remote(num_cpus=0.1, max_restarts=-1)
class ShardActor:
    """A ``ShardProcess`` of the release that is installed when Ray starts it.

    Ray gives every incarnation the code of this class as it was when the actor was made, which may
    be that of an earlier release: so there is none here.
    """

    def __init__(self, *args: Any, **more: Any) -> None:
        """Make the process."""
        self._process = ShardProcess(*args, **more)

    def describe(self) -> dict[str, Any]:
        """Return what it says of itself."""
        return self._process.describe()

    def stop(self, grace_s: float = 2.0) -> None:
        """Answer what runs for at most ``grace_s``, then close the port."""
        self._process.stop(grace_s)

"""The router process: it follows the shard map, keeps links to the shards and serves requests.

Run it with ``python -P -m silvershard.cluster.router --config FILE``; FILE holds a ``RouterConfig``
as JSON. Once it listens it prints one line of JSON with its address. It ends on SIGTERM, after the
requests in flight.
"""

import argparse
import asyncio
import contextlib
import ctypes
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import grpc
import grpc.aio
import torch
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from pydantic import ValidationError

from silvershard.cluster.batcher import Batcher
from silvershard.cluster.config import RouterConfig
from silvershard.cluster.coordinator import Coordinator
from silvershard.cluster.links import Links
from silvershard.cluster.listen import bind, server_options
from silvershard.cluster.logs import log_to_stderr
from silvershard.cluster.server import SERVICE, RetrievalService, Serving
from silvershard.cluster.shard_map import ShardMap
from silvershard.model.spec import ServingSpec
from silvershard.shard.errors import ConfigError, RetrievalError, SnapshotError, StateError
from silvershard.shard.load import load_spec

_log = logging.getLogger(__name__)

_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING

_PR_SET_PDEATHSIG = 1


class Router:
    """One router: a server in front, links behind, and the newest shard map in between."""

    def __init__(
        self,
        config: RouterConfig,
        *,
        load: Callable[[Path], ServingSpec] = load_spec,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Make a router that does not listen yet.

        Args:
            config: what it needs to know.
            load: reads what a router must know of a generation from its directory.
            clock: must be the clock of the event loop.
        """
        self.address = ""
        self._config = config
        self._load = load
        self._clock = clock
        self._map: ShardMap | None = None
        self._map_stamp: tuple[int, int, int] | None = None
        self._serving: Serving | None = None
        self._ready = False
        self._links = Links(config.ping)
        self._retired: set[asyncio.Task[None]] = set()
        query = config.query
        self._batcher = Batcher(
            max_batch=query.max_batch,
            max_delay_s=query.max_delay_us / 1e6,
            max_running=query.max_running,
            queue=query.queue,
            clock=clock,
        )
        self._health = health.aio.HealthServicer()
        self._server: grpc.aio.Server | None = None
        self._follower: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Bind the port and serve; ``address`` is set from then on.

        Raises:
            ConfigError: if the host is refused.
            StateError: if the port is in use.
        """
        listen = self._config.listen
        server = grpc.aio.server(options=server_options(self._config.query.max_request_bytes))
        service = RetrievalService(
            lambda: self._serving, self._batcher, self._config.query, self._clock
        )
        service.add_to(server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        names = (
            SERVICE,
            health_pb2.DESCRIPTOR.services_by_name["Health"].full_name,
            reflection.SERVICE_NAME,
        )
        reflection.enable_server_reflection(names, server)
        self.address = bind(server, listen.host, listen.port, insecure=listen.insecure)
        await self._set_health("", ready=False)
        await self._set_health(SERVICE, ready=False)
        await server.start()
        self._server = server
        await self.follow()
        self._follower = asyncio.create_task(self._follow_forever())

    async def stop(self) -> None:
        """Refuse new requests, answer those in flight for at most ``drain_s``, and disconnect."""
        if self._follower is not None:
            self._follower.cancel()
            await asyncio.gather(self._follower, return_exceptions=True)
        await self._health.enter_graceful_shutdown()
        if self._server is not None:
            await self._server.stop(self._config.drain_s)
        for task in self._retired:
            task.cancel()
        await asyncio.gather(self._links.aclose(), *self._retired, return_exceptions=True)

    async def follow(self) -> None:
        """Take over the shard map if it changed, and publish what is healthy."""
        self._read_map()
        shard_map, serving = self._map, self._serving
        if shard_map is None or serving is None:
            return
        reached = {
            shard
            for shard in range(shard_map.num_shards)
            if any(link.reached for link in self._links.replicas(shard))
        }
        if not self._ready and len(reached) == shard_map.num_shards:
            # Latched: less coverage is no reason to send users to nobody.
            self._ready = True
            await self._set_health("", ready=True)
            await self._set_health(SERVICE, ready=True)
        coordinator = serving.coordinator
        addressed = sum(coordinator.documents)
        answering = sum(coordinator.documents[shard] for shard in reached)
        coverage = answering / addressed if addressed else float(bool(reached))
        covered = bool(reached) and coverage >= self._config.query.min_coverage
        await self._set_health(f"model/{coordinator.spec.model}", ready=covered)

    async def _follow_forever(self) -> None:
        while True:
            await asyncio.sleep(self._config.poll_ms / 1e3)
            try:
                await self.follow()
            except Exception:  # noqa: BLE001  # logged; nothing else would follow the map
                _log.exception("following the shard map failed; the next look is due as usual")

    async def _set_health(self, name: str, *, ready: bool) -> None:
        await self._health.set(name, _SERVING if ready else _NOT_SERVING)

    def _read_map(self) -> None:
        """Read the map file if it is another one than before; a damaged one is logged once."""
        path = Path(self._config.map_path)
        try:
            status = path.stat()
        except OSError:
            return
        stamp = (status.st_ino, status.st_mtime_ns, status.st_size)
        if stamp == self._map_stamp:
            return
        self._map_stamp = stamp
        try:
            self._take(ShardMap.read(path))
        except (StateError, SnapshotError, ValueError) as error:
            _log.error("the last good shard map is kept: %s", error)

    def _take(self, shard_map: ShardMap) -> None:
        """Serve by another map.

        Raises:
            SnapshotError: if its generation cannot be read.
            ValueError: if it does not fit its generation.
        """
        before, serving = self._map, self._serving
        if before is not None and serving is not None and _same_cut(before, shard_map):
            coordinator = serving.coordinator
        else:
            spec = self._load(Path(shard_map.snapshot))
            if spec.generation != shard_map.generation:
                raise ValueError(
                    f"shard map names generation {shard_map.generation}, "
                    f"its snapshot holds {spec.generation}"
                )
            query = self._config.query
            links = Links(self._config.ping)
            coordinator = Coordinator(
                spec,
                shard_map.num_shards,
                links.replicas,
                merge_headroom_s=query.merge_headroom_ms / 1e3,
                max_batch=query.max_batch,
                clock=self._clock,
            )
            if serving is not None:
                self._retire(self._links)
            self._links = links
        self._links.update(shard_map)
        self._map = shard_map
        self._serving = Serving(coordinator, shard_map.version)
        _log.info(
            "serving generation %d from %d shards by map %d",
            shard_map.generation,
            shard_map.num_shards,
            shard_map.version,
        )

    def _retire(self, links: Links) -> None:
        """Close links that no new request uses, once those that do have ended by their deadline."""

        async def close_later() -> None:
            try:
                await asyncio.sleep(self._config.query.deadline_max_ms / 1e3)
            finally:
                await links.aclose()

        task = asyncio.create_task(close_later())
        self._retired.add(task)
        task.add_done_callback(self._retired.discard)


def _same_cut(one: ShardMap, other: ShardMap) -> bool:
    return (one.generation, one.num_shards, one.snapshot) == (
        other.generation,
        other.num_shards,
        other.snapshot,
    )


def read_config(path: Path) -> RouterConfig:
    """Return the settings in a file.

    Raises:
        ConfigError: naming the setting that cannot be used.
    """
    try:
        return RouterConfig.model_validate_json(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"config {path}: {error.strerror or error}") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "file"
        raise ConfigError(f"config {path}: {where}: {first['msg']}") from None


async def serve(config: RouterConfig) -> None:
    """Run a router until SIGTERM or SIGINT."""
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    for signum in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signum, stopped.set)
    router = Router(config)
    try:
        await router.start()
        line = {"event": "listening", "address": router.address, "pid": os.getpid()}
        sys.stdout.write(json.dumps(line) + "\n")
        sys.stdout.flush()
        await stopped.wait()
    finally:
        await router.stop()


def _die_with_parent(parent_pid: int | None) -> None:
    """Have the kernel end this process when the thread that started it ends."""
    parent = parent_pid or os.getppid()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM) != 0:
        _log.warning("prctl failed: %s", os.strerror(ctypes.get_errno()))
    if os.getppid() != parent:
        raise SystemExit(0)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the router process and return its exit code."""
    parser = argparse.ArgumentParser(prog="silvershard-router")
    parser.add_argument("--config", type=Path, required=True, help="RouterConfig as JSON")
    options = parser.parse_args(arguments)
    log_to_stderr()
    try:
        config = read_config(options.config)
        if config.die_with_parent:
            _die_with_parent(config.parent_pid)
        torch.set_num_threads(config.num_threads)
        with contextlib.suppress(asyncio.CancelledError):
            asyncio.run(serve(config))
    except ConfigError as error:
        _log.error("%s", error)
        return 2
    except RetrievalError as error:
        _log.error("%s", error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

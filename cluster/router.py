"""The router: it follows the shard map, keeps links to the shards and serves requests."""

import asyncio
import logging
import time
from collections.abc import Callable
from pathlib import Path

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from silvershard.cluster.batcher import Batcher
from silvershard.cluster.config import RouterConfig
from silvershard.cluster.coordinator import Coordinator
from silvershard.cluster.links import Links
from silvershard.cluster.listen import bind, server_options
from silvershard.cluster.server import SERVICE, RetrievalService, Serving
from silvershard.cluster.shard_map import ShardMap
from silvershard.shard.errors import SnapshotError, StateError
from silvershard.shard.snapshot import open_snapshot

_log = logging.getLogger(__name__)

_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING

_RETRY_S = 1.0
"""Time between two tries of a map that was refused: reading its snapshot may take long."""

_Stamp = tuple[int, int, int]


class Router:
    """One router: a server in front, links behind, and the newest shard map in between."""

    def __init__(
        self,
        config: RouterConfig,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Make a router that does not listen yet.

        Args:
            config: what it needs to know.
            clock: must be the clock of the event loop.
        """
        self.address = ""
        self._config = config
        self._clock = clock
        self._map: ShardMap | None = None
        self._map_stamp: _Stamp | None = None
        """Of the file that ``_map`` was read from."""
        self._refused: tuple[_Stamp, str] | None = None
        self._retry_at_s = 0.0
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
        """Take the map in the file if it is another one than before.

        One that cannot be taken is logged once and tried again, because its snapshot may be
        unreadable for a moment only.
        """
        path = Path(self._config.map_path)
        try:
            status = path.stat()
        except OSError:
            return
        stamp = (status.st_ino, status.st_mtime_ns, status.st_size)
        if stamp == self._map_stamp:
            return
        known = self._refused is not None and self._refused[0] == stamp
        if known and self._clock() < self._retry_at_s:
            return
        try:
            self._take(ShardMap.read(path))
        except (StateError, SnapshotError, ValueError) as error:
            if self._refused != (stamp, str(error)):
                _log.error("the last good shard map is kept: %s", error)
            self._refused = stamp, str(error)
            self._retry_at_s = self._clock() + _RETRY_S
            return
        self._map_stamp, self._refused = stamp, None

    def _take(self, shard_map: ShardMap) -> None:
        """Serve by another map.

        Raises:
            SnapshotError: if its generation cannot be read.
            ValueError: if it does not fit its generation.
        """
        before, serving = self._map, self._serving
        if before is not None and serving is not None and _same_cut(before, shard_map):
            coordinator, content_hash = serving.coordinator, serving.content_hash
        else:
            manifest = open_snapshot(Path(shard_map.snapshot)).manifest
            spec, content_hash = manifest.spec, manifest.content_hash
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
        self._serving = Serving(coordinator, content_hash, shard_map.version)
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

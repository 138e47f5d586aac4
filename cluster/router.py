"""The router: it follows the shard map, keeps links to the shards and serves requests."""

import asyncio
import logging
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from silvershard.cluster.batcher import Batcher
from silvershard.cluster.config import RouterConfig
from silvershard.cluster.coordinator import Coordinator
from silvershard.cluster.degrade import Ladder
from silvershard.cluster.extra_calls import ExtraCalls
from silvershard.cluster.faults import faults_of_router
from silvershard.cluster.http_server import HttpServer
from silvershard.cluster.links import Connections, Links
from silvershard.cluster.listen import bind, server_options
from silvershard.cluster.metrics import Gauge, Metrics
from silvershard.cluster.replica_choice import ReplicaChoice
from silvershard.cluster.request_meter import RequestMeter
from silvershard.cluster.router_pages import RouterFacts, router_pages
from silvershard.cluster.server import SERVICE, Offer, RetrievalService, Serving
from silvershard.cluster.shard_map import ShardMap
from silvershard.cluster.update_service import SERVICE as UPDATES
from silvershard.cluster.update_service import UpdateService
from silvershard.model.recall_calibration import RecallCalibration
from silvershard.shard.errors import SnapshotError, StateError
from silvershard.shard.snapshot import open_snapshot

_log = logging.getLogger(__name__)

_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING

_RETRY_S = 1.0
"""Time between two tries of a map that was refused: reading its snapshot may take long."""

_Stamp = tuple[int, int, int]


class _Held(NamedTuple):
    """A generation that the router can ask for."""

    coordinator: Coordinator
    links: Links
    content_hash: str
    snapshot: str
    num_shards: int
    calibration: RecallCalibration | None
    """What its plans find of exact answers."""


class Router:
    """One router: a server in front, links behind, and the newest shard map in between.

    Every request is stamped with one generation for its whole life. Another map changes the
    generation between requests: what is in flight goes on with the links that it began with.
    """

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
        self._held: dict[int, _Held] = {}
        self._offer: Offer | None = None
        self._ready = False
        self._faults = faults_of_router(config.faults_dir)
        self._connections = Connections(config.ping, self._faults)
        self._retired: set[asyncio.Task[None]] = set()
        self._ladder = Ladder(config.degrade, clock)
        self._batcher = Batcher(
            config.admission,
            max_batch=config.query.max_batch,
            max_delay_s=config.query.max_delay_us / 1e6,
            target_delay_s=config.degrade.trigger.queue_delay_ms / 1e3,
            clock=clock,
            observe=self._ladder.observe,
        )
        self._extra = ExtraCalls(config.hedging, config.retries, is_hot=self._batcher.is_hot)
        self._facts = RouterFacts()
        self._metrics = Metrics()
        self._meter = RequestMeter(SERVICE, self._metrics)
        self._metrics.add(
            "silvershard_queue_depth",
            "Requests that wait for a batch.",
            Gauge(lambda: self._batcher.num_waiting),
        )
        self._http = HttpServer(router_pages(lambda: self._facts, self._metrics))
        self._logged_level = 0
        self._updates = UpdateService(lambda: self._map.sequencer if self._map else None)
        self._health = health.aio.HealthServicer()
        self._server: grpc.aio.Server | None = None
        self._follower: asyncio.Task[None] | None = None

    @property
    def http_address(self) -> str:
        """Return ``host:port`` of probes and metrics; empty before the start, or without them."""
        return self._http.address

    async def start(self) -> None:
        """Bind the ports and serve; ``address`` is set from then on.

        Raises:
            ConfigError: if a host is refused.
            StateError: if a port is in use.
        """
        listen = self._config.listen
        observability = self._config.observability
        if observability.http:
            # First of all: whoever probes is told that this router starts.
            self._http.start(observability.http, insecure=observability.insecure)
        server = grpc.aio.server(
            interceptors=(self._meter,),
            options=server_options(self._config.query.max_request_bytes),
        )
        service = RetrievalService(
            lambda: self._offer, self._batcher, self._config.query, self._clock
        )
        service.add_to(server)
        self._updates.add_to(server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        names = (
            SERVICE,
            UPDATES,
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
        self._facts = self._facts._replace(draining=True)
        if self._follower is not None:
            self._follower.cancel()
            await asyncio.gather(self._follower, return_exceptions=True)
        await self._health.enter_graceful_shutdown()
        if self._server is not None:
            await self._server.stop(self._config.drain_s)
        for task in self._retired:
            task.cancel()
        await asyncio.gather(*self._retired, return_exceptions=True)
        await self._updates.aclose()
        await self._connections.aclose()
        if self._faults is not None:
            self._faults.stop()
        self._http.stop()

    async def follow(self) -> None:
        """Take over the shard map if it changed, and publish what is healthy."""
        self._log_level()
        await self._read_map()
        shard_map = self._map
        if shard_map is None:
            return
        coordinator, links = self._held[shard_map.generation][:2]
        reached = {
            shard
            for shard in range(shard_map.num_shards)
            if any(link.reached for link in links.replicas(shard))
        }
        if not self._ready and len(reached) == shard_map.num_shards:
            # Latched: less coverage is no reason to send users to nobody.
            self._ready = True
            await self._set_health("", ready=True)
            await self._set_health(SERVICE, ready=True)
        documents = coordinator.documents
        addressed = sum(documents)
        answering = sum(documents[shard] for shard in reached)
        coverage = answering / addressed if addressed else float(bool(reached))
        covered = bool(reached) and coverage >= self._config.query.min_coverage
        await self._set_health(f"model/{coordinator.spec.model}", ready=covered)
        self._facts = self._facts._replace(
            ready=self._ready,
            covered=covered,
            coverage=coverage,
            model=coordinator.spec.model,
            generation=shard_map.generation,
            content_hash=self._held[shard_map.generation].content_hash,
            map_version=shard_map.version,
        )

    async def _follow_forever(self) -> None:
        while True:
            await asyncio.sleep(self._config.poll_ms / 1e3)
            try:
                await self.follow()
            except Exception:  # noqa: BLE001  # logged; nothing else would follow the map
                _log.exception("following the shard map failed; the next look is due as usual")

    def _log_level(self) -> None:
        """Say when the router spends more or less on each request than before."""
        level = self._ladder.level
        if level != self._logged_level:
            _log.warning(
                "overload: %d of %d steps down, %d batches may run, refused so far: %s",
                level,
                self._ladder.lowest,
                self._batcher.limit,
                dict(self._batcher.dropped.refused) or "none",
            )
            self._logged_level = level

    async def _set_health(self, name: str, *, ready: bool) -> None:
        await self._health.set(name, _SERVING if ready else _NOT_SERVING)

    async def _read_map(self) -> None:
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
            await self._take(ShardMap.read(path))
        except (StateError, SnapshotError, ValueError) as error:
            if self._refused != (stamp, str(error)):
                _log.error("the last good shard map is kept: %s", error)
            self._refused = stamp, str(error)
            self._retry_at_s = self._clock() + _RETRY_S
            return
        self._map_stamp, self._refused = stamp, None

    async def _take(self, shard_map: ShardMap) -> None:
        """Serve by another map, from one request to the next.

        Raises:
            SnapshotError: if its live generation cannot be read.
            ValueError: if it does not fit its generation.
        """
        held: dict[int, _Held] = {}
        for number, snapshot in shard_map.hosted.items():
            known = self._held.get(number)
            if known is not None and known[3:5] == (snapshot, shard_map.num_shards):
                held[number] = known
                continue
            try:
                held[number] = await self._hold(number, snapshot, shard_map.num_shards)
            except (SnapshotError, ValueError) as error:
                if number == shard_map.generation:
                    raise
                _log.error("generation %d is not offered: %s", number, error)
        for one in held.values():
            one.links.update(shard_map)
        for number, before in self._held.items():
            if held.get(number) is not before:
                self._retire(before.links)
        self._held, self._map = held, shard_map
        self._offer = Offer(
            shard_map.generation,
            {
                number: Serving(
                    one.coordinator, one.content_hash, shard_map.version, one.calibration
                )
                for number, one in held.items()
            },
            {alias: number for alias, number in shard_map.aliases.items() if number in held},
        )
        _log.info(
            "serving generation %d from %d shards by map %d",
            shard_map.generation,
            shard_map.num_shards,
            shard_map.version,
        )

    async def _hold(self, number: int, snapshot: str, num_shards: int) -> _Held:
        """Return a generation without links yet; reads its manifest beside the event loop."""
        manifest = (await asyncio.to_thread(open_snapshot, Path(snapshot))).manifest
        spec, query = manifest.spec, self._config.query
        if spec.generation != number:
            raise ValueError(
                f"shard map names generation {number}, its snapshot holds {spec.generation}"
            )
        links = Links(self._connections, number, linger_s=query.deadline_max_ms / 1e3)
        # Every batch that runs may count and encode at the same time, and a host that is lost may
        # hold a replica of every shard.
        self._extra.allow_burst(2 * self._config.admission.concurrency.max * num_shards)
        coordinator = Coordinator(
            spec,
            num_shards,
            links.replicas,
            merge_headroom_s=query.merge_headroom_ms / 1e3,
            max_batch=query.max_batch,
            lagging_s=query.lagging_ms / 1e3,
            choice=ReplicaChoice(self._config.health, self._extra, self._clock, random.Random()),
            clock=self._clock,
            ladder=self._ladder,
            dropped=self._batcher.dropped,
        )
        hashed = manifest.content_hash
        return _Held(coordinator, links, hashed, snapshot, num_shards, manifest.calibration)

    def _retire(self, links: Links) -> None:
        """Close links that no new request uses, once those that do have ended by their deadline."""

        async def close_later() -> None:
            try:
                await asyncio.sleep(self._config.query.deadline_max_ms / 1e3)
            finally:
                links.close()

        task = asyncio.create_task(close_later())
        self._retired.add(task)
        task.add_done_callback(self._retired.discard)

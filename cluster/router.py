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

from silvershard.cluster.audit import AuditLog
from silvershard.cluster.batcher import Batcher
from silvershard.cluster.config import RouterConfig
from silvershard.cluster.coordinator import Coordinator
from silvershard.cluster.degrade import Ladder
from silvershard.cluster.dialer import Dials, peer_dialer
from silvershard.cluster.extra_calls import ExtraCalls
from silvershard.cluster.faults import faults_of_router
from silvershard.cluster.http_server import HttpServer
from silvershard.cluster.links import Connections, GrpcShardLink, Links
from silvershard.cluster.listen import bind, server_options
from silvershard.cluster.map_file import MapFile, MapSource, Stamp
from silvershard.cluster.metrics import Metrics
from silvershard.cluster.recall_audit import RecallAudit
from silvershard.cluster.replica_choice import ReplicaChoice
from silvershard.cluster.request_meter import RequestMeter
from silvershard.cluster.router_metrics import add_recall_metrics, add_router_metrics
from silvershard.cluster.router_pages import RouterFacts, router_pages
from silvershard.cluster.security import front_protection
from silvershard.cluster.server import SERVICE, Offer, RetrievalService, Serving
from silvershard.cluster.shard_map import ShardMap
from silvershard.cluster.tracing import RequestTracer
from silvershard.cluster.update_service import SERVICE as UPDATES
from silvershard.cluster.update_service import UpdateService
from silvershard.model.recall_calibration import RecallCalibration
from silvershard.shard.errors import SnapshotError, StateError
from silvershard.shard.snapshot import Snapshot, open_snapshot

_log = logging.getLogger(__name__)

_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING

_MEET_S = 2.0
"""Longest wait for the first connection to every shard of a new cut of the catalogue, for which the
old one goes on serving."""
_HEALTH_BYTES = 4096
_RETRY_S = 1.0
"""Time between two tries of a map that was refused: reading its snapshot may take long."""


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
        maps: MapSource[ShardMap] | None = None,
        opener: Callable[[Path], Snapshot] | None = None,
        dialer: Dials | None = None,
        rng: random.Random | None = None,
    ) -> None:
        """Make a router that does not listen yet.

        Args:
            config: what it needs to know.
            clock: must be the clock of the event loop.
            maps: where the shard map comes from; None: the file of the configuration.
            opener: opens the generation in a directory; None: from the file system.
            dialer: opens channels to other processes; None: as the configuration says.
            rng: chooses among replicas.

        Raises:
            ConfigError: if a file of tokens, secrets or certificates cannot be used, or packages
                are missing that its settings need.
        """
        self.address = ""
        self.own_address = ""
        """Where health checks reach this router and no other; set where it shares its port."""
        self._config = config
        self._clock = clock
        self._map: ShardMap | None = None
        self._maps = maps or MapFile(ShardMap, Path(config.map_path), "shard map")
        self._opener = opener
        self._rng = rng or random.Random()
        self._map_stamp: Stamp | None = None
        """Of the file that ``_map`` was read from."""
        self._refused: tuple[Stamp, str] | None = None
        self._retry_at_s = 0.0
        self._held: dict[int, _Held] = {}
        self._coming: dict[int, _Held] = {}
        """Of a map with another number of shards, whose processes are being met."""
        self._take_at_s = 0.0
        """When it is taken although not all of them were met."""
        self._offer: Offer | None = None
        self._ready = False
        dialer = dialer or peer_dialer(config.security.peers)
        self._faults = faults_of_router(config.faults_dir)
        self._connections = Connections(config.ping, dialer, self._faults)
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
        self._extra = ExtraCalls(
            config.hedging,
            config.retries,
            # A process that dies fails what it was asked by the batches that run, and no more:
            # its connection is down from then on.
            retry_burst=config.admission.concurrency.max,
            is_hot=self._batcher.is_hot,
        )
        self._facts = RouterFacts()
        self._metrics = Metrics()
        self._meter = RequestMeter(SERVICE, self._metrics)
        add_router_metrics(
            self._metrics, self._batcher, self._extra, lambda: self._logged_level, self._live_links
        )
        self._recall = RecallAudit(
            config.observability.recall_audit,
            is_hot=self._batcher.is_hot,
            clock=clock,
            draw=self._rng.random,
        )
        add_recall_metrics(self._metrics, self._recall)
        otel = config.observability.otel
        self._tracer = RequestTracer(SERVICE, otel) if otel.endpoint else None
        audit = AuditLog(Path(config.security.audit)) if config.security.audit else None
        self._protection = front_protection(config.security, audit, self._metrics)
        self._http = HttpServer(router_pages(lambda: self._facts, self._metrics))
        self._logged_level = 0
        self.service = RetrievalService(
            lambda: self._offer, self._batcher, config.query, clock, served=self._recall.served
        )
        """Answers requests, whoever brings them."""
        self._updates = UpdateService(lambda: self._map.sequencer if self._map else None, dialer)
        self._health = health.aio.HealthServicer()
        self._server: grpc.aio.Server | None = None
        self._own: grpc.aio.Server | None = None
        self._follower: asyncio.Task[None] | None = None

    @property
    def http_address(self) -> str:
        """Return ``host:port`` of probes and metrics; empty before the start, or without them."""
        return self._http.address

    async def start(self, *, ready_within_s: float = 0.0) -> None:
        """Bind the ports and serve; ``address`` is set from then on.

        Args:
            ready_within_s: do so only once every shard is reached, for which there is so much time;
                0: at once, and keep requests waiting until then.

        Raises:
            TimeoutError: if a shard is not reached in time.
            ConfigError: if a host is refused.
            StateError: if a port is in use.
        """
        listen = self._config.listen
        observability = self._config.observability
        if observability.http:
            # First of all: whoever probes is told that this router starts.
            self._http.start(
                observability.http, insecure=observability.insecure, shared=self._config.shared
            )
        await self._set_health("", ready=False)
        await self._set_health(SERVICE, ready=False)
        if self._config.shared:
            self._own = grpc.aio.server(
                interceptors=self._protection.interceptors, options=server_options(_HEALTH_BYTES)
            )
            health_pb2_grpc.add_HealthServicer_to_server(self._health, self._own)
            self.own_address = bind(self._own, "127.0.0.1", 0, self._protection.door)
            await self._own.start()
        if ready_within_s:
            async with asyncio.timeout(ready_within_s):
                while not self._ready:
                    await self.follow()
                    await asyncio.sleep(self._config.poll_ms / 1e3)
        server = grpc.aio.server(
            interceptors=(
                *self._protection.interceptors,
                *((self._tracer,) if self._tracer is not None else ()),
                self._meter,
            ),
            options=server_options(
                self._config.query.max_request_bytes, shared=self._config.shared
            ),
        )
        self.service.add_to(server)
        self._updates.add_to(server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        names = (
            SERVICE,
            UPDATES,
            health_pb2.DESCRIPTOR.services_by_name["Health"].full_name,
            reflection.SERVICE_NAME,
        )
        reflection.enable_server_reflection(names, server)
        self.address = bind(server, listen.host, listen.port, self._protection.door)
        await server.start()
        self._server = server
        await self.follow()
        self._follower = asyncio.create_task(self._follow_forever())

    async def stop(self, *, replaced: bool = False) -> None:
        """Refuse new requests, answer those in flight for at most ``drain_s``, and disconnect.

        Args:
            replaced: another router answers at the same ports, also whoever probes.
        """
        if replaced:
            self._http.stop()
        self._facts = self._facts._replace(draining=True)
        if self._follower is not None:
            self._follower.cancel()
            await asyncio.gather(self._follower, return_exceptions=True)
        await self._health.enter_graceful_shutdown()
        if self._server is not None:
            await self._server.stop(self._config.drain_s)
        if self._own is not None:
            await self._own.stop(0.0)
        for task in self._retired:
            task.cancel()
        await asyncio.gather(*self._retired, return_exceptions=True)
        await self._recall.aclose()
        await self._updates.aclose()
        await self._connections.aclose()
        if self._faults is not None:
            self._faults.stop()
        self._http.stop()
        if self._tracer is not None:
            await asyncio.to_thread(self._tracer.close)

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
        stamp = self._maps.stamp()
        if stamp is None or stamp == self._map_stamp:
            return
        known = self._refused is not None and self._refused[0] == stamp
        if known and self._clock() < self._retry_at_s:
            return
        try:
            shard_map = self._maps.read()
            self._check_order(shard_map)
            if not await self._take(shard_map):
                return
        except (StateError, SnapshotError, ValueError) as error:
            if self._refused != (stamp, str(error)):
                _log.error("the last good shard map is kept: %s", error)
            self._refused = stamp, str(error)
            self._retry_at_s = self._clock() + _RETRY_S
            return
        self._map_stamp, self._refused = stamp, None

    def _check_order(self, shard_map: ShardMap) -> None:
        """Refuse a map that is older than the one that is served.

        A file that was put back, or a copy of it that came late, names processes that have left.

        Raises:
            StateError: if it is.
        """
        known = self._map
        if known is None or known.origin != shard_map.origin:
            return
        if shard_map.version < known.version:
            raise StateError(
                f"shard map version must be at least {known.version}, which is served, "
                f"got {shard_map.version}"
            )

    async def _take(self, shard_map: ShardMap) -> bool:
        """Serve by another map, from one request to the next; return False while it is too early.

        One with another number of shards names processes that this router has not met yet.

        Raises:
            SnapshotError: if its live generation cannot be read.
            ValueError: if it does not fit its generation.
        """
        held: dict[int, _Held] = {}
        for number, snapshot in shard_map.hosted.items():
            for known in (self._held.get(number), self._coming.get(number)):
                if known is not None and known[3:5] == (snapshot, shard_map.num_shards):
                    held[number] = known
            if number in held:
                continue
            try:
                held[number] = await self._hold(number, snapshot, shard_map.num_shards)
            except (SnapshotError, ValueError) as error:
                if number == shard_map.generation:
                    raise
                _log.error("generation %d is not offered: %s", number, error)
        for one in held.values():
            one.links.update(shard_map)
        is_new_cut = self._map is not None and self._map.num_shards != shard_map.num_shards
        coming, self._coming = self._coming, held if is_new_cut else {}
        for number, before in coming.items():
            if held.get(number) is not before:
                self._retire(before.links)
        if is_new_cut and not self._has_met(held[shard_map.generation], bool(coming)):
            return False
        self._coming = {}
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
        return True

    def _has_met(self, held: _Held, was_coming: bool) -> bool:
        """Return whether some replica of every shard was met, or was waited for long enough."""
        if not was_coming:
            self._take_at_s = self._clock() + _MEET_S
        met = [
            any(link.reached for link in held.links.replicas(shard))
            for shard in range(held.num_shards)
        ]
        return all(met) or self._clock() >= self._take_at_s

    async def _hold(self, number: int, snapshot: str, num_shards: int) -> _Held:
        """Return a generation without links yet; reads its manifest beside the event loop."""
        opener = self._opener or open_snapshot
        manifest = (await asyncio.to_thread(opener, Path(snapshot))).manifest
        spec, query = manifest.spec, self._config.query
        if spec.generation != number:
            raise ValueError(
                f"shard map names generation {number}, its snapshot holds {spec.generation}"
            )
        links = Links(self._connections, number, linger_s=query.deadline_max_ms / 1e3)
        coordinator = Coordinator(
            spec,
            num_shards,
            links.replicas,
            merge_headroom_s=query.merge_headroom_ms / 1e3,
            max_batch=query.max_batch,
            lagging_s=query.lagging_ms / 1e3,
            choice=ReplicaChoice(self._config.health, self._extra, self._clock, self._rng),
            clock=self._clock,
            ladder=self._ladder,
            dropped=self._batcher.dropped,
        )
        hashed = manifest.content_hash
        return _Held(coordinator, links, hashed, snapshot, num_shards, manifest.calibration)

    def _live_links(self) -> list[GrpcShardLink]:
        """Return the replicas of the live generation; any thread may ask."""
        shard_map, held = self._map, self._held
        one = held.get(shard_map.generation) if shard_map is not None else None
        if one is None:
            return []
        return [link for shard in range(one.num_shards) for link in one.links.replicas(shard)]

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

"""A cluster: actors of shards, tables and sequencer, maps and routers, all watched.

Ray starts the actors again when they end; the launcher notices, gives the router their new place,
and stops what keeps crashing. It is never on the path of a request.

Shapes: S shards, R replicas.
"""

import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel

from silvershard.cluster.dialer import peer_dialer
from silvershard.cluster.document import RELEASE
from silvershard.cluster.shard_map import ShardEntry, ShardMap
from silvershard.deploy.canary import ask_canary
from silvershard.deploy.check_watch import CheckWatch, StartCheck
from silvershard.deploy.cluster_size import size_from
from silvershard.deploy.config import Config
from silvershard.deploy.errors import CommandError, TimedOut
from silvershard.deploy.fault_plan import faults_dir
from silvershard.deploy.generation_watch import GenerationWatch
from silvershard.deploy.layout import Place
from silvershard.deploy.local_routers import LocalRouters
from silvershard.deploy.log_pins import check_log, pin_generations
from silvershard.deploy.moving import Moving
from silvershard.deploy.next_map import drawn_map, next_map
from silvershard.deploy.processes import Process, descendants, is_alive, kill_all, myself
from silvershard.deploy.pulse import Pulse
from silvershard.deploy.rolling import Rolling
from silvershard.deploy.runtime import threads_per_shard
from silvershard.deploy.scaling import Scaling
from silvershard.deploy.sequencer_seat import SequencerSeat
from silvershard.deploy.sequencer_watch import SequencerEntry, SequencerHandle, SequencerWatch
from silvershard.deploy.shard_host import Connect, ShardHost
from silvershard.deploy.shard_set import StartShard
from silvershard.deploy.shard_watch import ActorWatch, Handle, ShardHandle, ShardWatch
from silvershard.deploy.site import Replaceable, Routers, Site, ThisMachine
from silvershard.deploy.state import ClusterRecord, ShardRecord, StateDir
from silvershard.deploy.state_log import log_url, made_log
from silvershard.deploy.table_tier import StartTables, TableTiers
from silvershard.shard.outline import read_outline

TICK_S = 0.1
_CENSUS_S = 1.0

_SETTLE_S = 30.0
"""How long a cluster that is adopted waits for everybody to say where they are."""


class LocalCluster:
    """Shards, sequencer, map and router; a context that ends everything it started.

    Ray must be running. Start, poll and stop it on the same thread. It runs on this machine unless
    a site says otherwise.
    """

    def __init__(
        self,
        state: StateDir,
        config: Config,
        *,
        generation: int,
        snapshot: Path,
        model: str = "",
        guard: Process | None = None,
        ray_dir: str = "",
        site: Site | None = None,
        routers: Routers | None = None,
        start_shard: StartShard | None = None,
        start_tables: StartTables | None = None,
        start_sequencer: Callable[[str], SequencerHandle] | None = None,
        connect: Connect | None = None,
        start_check: StartCheck | None = None,
        canary: Callable[[str], None] | None = None,
        report: Callable[[str], None] = lambda _: None,
    ) -> None:
        """Prepare a cluster.

        Args:
            state: where map, settings, record and logs go.
            config: settings.
            generation: number of the generation that is live first.
            snapshot: its directory.
            model: logical name of the model in it; by default that of the settings.
            guard: the process that cleans up after this one; this process if there is none.
            ray_dir: temporary directory of Ray, for the record.
            site: the machines that it runs on; by default this one.
            routers: the routers; by default ``runtime.routers`` processes of this machine.
            start_shard: starts a shard; by default as a Ray actor that serves ``snapshot``.
            start_tables: starts a process of tables; by default as a Ray actor.
            start_sequencer: starts the sequencer of a name; by default as a Ray actor.
            connect: opens the way to a shard process, to prepare generations there; by default
                as ``security`` says.
            start_check: compares a new set of shards with the one that serves; by default a
                process does.
            canary: asks the router at an address one question before the cluster counts as ready.
            report: hears what is being waited for.
        """
        self.admin = ""
        """``host:port`` of the admin plane, for the record; empty: there is none."""
        self._state = state
        self._config = config
        self._snapshot = snapshot
        self._model = model or config.model.name
        self._driver = myself()
        self._guard = guard or self._driver
        self._ray_dir = ray_dir
        self._peers = config.security.peers
        dialer = peer_dialer(self._peers)
        self._canary = canary or partial(ask_canary, dialer=dialer)
        self._report = report
        self._router: Routers = routers or LocalRouters(state, config, dialer)
        self._site: Site = site or ThisMachine(state, dialer)
        self._tables = TableTiers(state, config, start_tables, feel=partial(Pulse, dialer=dialer))
        connect = connect or partial(ShardHost, dialer=dialer)
        self._generations = GenerationWatch(
            state,
            config,
            generation,
            connect=connect,
            lacking=self._site.lacking,
            plan=self._site.plan,
        )
        self._scaling = Scaling(
            state,
            config,
            self._generations,
            start_shard or self._start_actor,
            connect=connect,
            watch=self._watched,
            draw_map=self._drawn,
            start_check=start_check or partial(CheckWatch, self._site.maps),
            places=self._site.places,
            maps=self._site.maps,
        )
        self._moving = Moving(
            state,
            config,
            self._generations,
            self._scaling,
            start_shard or self._start_actor,
            connect=connect,
            watch=self._watched,
            places=self._site.places,
        )
        self._log_url = log_url(state, config)
        self._start_sequencer = start_sequencer or self._start_sequencer_actor
        self._sequencer = SequencerSeat(
            self._watched_sequencer, lambda name: self._site.find(name) is not None
        )
        fronts: dict[str, Replaceable] = {"routers": self._router, "sequencer": self._sequencer}
        if self._site.agents is not None:
            fronts["agents of hosts"] = self._site.agents
        self._rolling = Rolling(
            state, config, self._generations, self._scaling, fronts, leave=self._site.leave
        )
        self._map: ShardMap | None = self._site.read_map()
        self._settled_s = time.monotonic() + _SETTLE_S if self._map is not None else 0.0
        """Until when the map that was found stays as it is, unless everybody serves before."""
        self._written: ClusterRecord | None = None
        self._family: dict[int, Process] = {}
        self._next_census_s = 0.0
        self._since_unix_s = time.time()

    @property
    def address(self) -> str:
        """Return ``host:port`` of the router, empty before it listens."""
        return self._router.address

    @property
    def shards(self) -> list[ShardRecord]:
        """Return every shard as the launcher sees it now."""
        documents = self._generations.documents
        is_standby = self._generations.is_standby
        return [
            one.record.model_copy(
                update={
                    "documents": documents(one.shard),
                    "standby": is_standby((one.shard, one.replica)),
                }
            )
            for one in self._shards
        ]

    @property
    def _shards(self) -> list[ShardWatch]:
        """Return the processes of the shards that serve."""
        return self._scaling.current.watches

    @property
    def _num_named(self) -> int:
        """Return how many shard processes the map of a whole cluster names."""
        sharding = self._scaling.current.sharding
        return sharding.shards * sharding.replicas

    def start_router(self) -> None:
        """Start the router, which waits for its shards, so that both can start side by side."""
        self._report("router")
        self._router.start()

    def start_shards(self) -> None:
        """Start tables, sequencer and R actors per shard, all at once.

        Raises:
            Refused: if the update log is not that of the state directory, or is gone.
            ConfigError: if the update log would not keep what it acknowledges.
            LogUnavailable: if the update log cannot be reached or made.
        """
        self._report("shards")
        self._tables.hold(self._generations.wanted)
        if self._log_url:
            self._make_log()
            self._sequencer.start()
        self._scaling.start()

    def _watched_sequencer(self, name: str) -> SequencerWatch:
        handle = self._start_sequencer(name)
        restarts = self._restarts_before(handle)
        runtime = self._config.runtime
        return SequencerWatch(0, handle, runtime, feel=self._site.feel, restarts=restarts)

    def _watched(
        self, num_shards: int, shard: int, replica: int, handle: ShardHandle
    ) -> ShardWatch:
        return ShardWatch(
            shard,
            handle,
            self._config.runtime,
            replica=replica,
            feel=self._site.feel,
            restarts=self._restarts_before(handle),
            host=self._site.places.where(Place(num_shards, shard, replica)),
        )

    def _restarts_before(self, handle: Handle[Any]) -> int:
        """Return how often an actor that is adopted was started again before."""
        return handle.restarts() if self._map is not None else 0

    def adopt(self) -> None:
        """Watch what another supervisor has started, and go on from its map.

        Raises:
            RetrievalError: as ``start_shards``, or if the control store cannot be written.
        """
        self.start_shards()
        self._generations.started()

    def _make_log(self) -> None:
        """Make the update log where there never was one; let it keep what generations need."""
        outline = read_outline(self._snapshot)
        log = made_log(self._state, self._config, outline)
        try:
            check_log(log, outline)
            pin_generations(log, self._state)
        finally:
            log.close()

    def _start_sequencer_actor(self, name: str) -> SequencerHandle:
        from silvershard.cluster import sequencer_actor

        updates = self._config.updates
        return self._site.movable(
            name,
            lambda: self._actor(
                sequencer_actor.SequencerActor,
                name,
                SequencerEntry,
                str(self._snapshot),
                self._log_url,
                map_path=str(self._state.shard_map_file),
                feed_block=updates.feed_block,
                hysteresis=updates.feed_block_hysteresis,
                expiry_every_s=updates.expiry_every_ms / 1e3,
                peers=self._peers.model_dump(),
                faults_dir=faults_dir(self._state, self._config),
            ),
        )

    def _start_actor(self, num_shards: int, shard: int, replica: int) -> ShardHandle:
        from silvershard.cluster import shard_actor

        # Ray wants a name that nobody has.
        name = self._site.places.name(Place(num_shards, shard, replica))
        handle: ShardHandle = self._actor(
            shard_actor.ShardActor,
            name,
            ShardEntry,
            str(self._snapshot),
            shard,
            num_shards,
            devices=self._config.sharding.devices,
            replica=replica,
            num_threads=threads_per_shard(self._config.sharding),
            tables=self._tables.for_shards().model_dump(),
            map_path=str(self._state.shard_map_file),
            log_url=self._log_url,
            headroom=self._config.updates.headroom,
            max_batch=self._config.updates.max_batch,
            peers=self._peers.model_dump(),
            faults_dir=faults_dir(self._state, self._config),
        )
        return self._site.places.kept(name, handle)

    # ray.remote turns the class into something that its type does not say.
    def _actor(
        self, actor_class: Any, name: str, kind: type[BaseModel], *args: Any, **more: Any
    ) -> Handle[Any]:
        """Start an actor where the site wants it, or adopt the one that runs there."""
        from silvershard.deploy.ray_shard import RayShard

        actor = self._site.find(name)
        if actor is None:
            options = self._site.options(name)
            more |= self._site.binding(name)
            actor = actor_class.options(name=name, **options).remote(*args, **more)
        return RayShard(actor, kind)

    def wait_until_ready(self, timeout_s: float) -> None:
        """Wait until the router has reached every shard and has answered one question.

        Only then does the control store name the generation as the live one.

        Raises:
            StateError: if the control store cannot be written.
            CommandError: if a shard or the router cannot start, with its reason.
            TimedOut: if it takes too long, naming what is missing.
        """
        give_up_s = time.monotonic() + timeout_s
        while True:
            if self._router.has_failed:
                raise CommandError(f"the router could not start: {self._router.last_words()}")
            self.poll()
            watches: list[ActorWatch[Any]] = [*self._tables.watches, *self._shards]
            if self._sequencer.watch is not None:
                watches.append(self._sequencer.watch)
            for one in watches:
                if one.state == "failed":
                    raise CommandError(f"{one.name} could not start: {one.reason}")
            serving = sum(one.state == "serving" for one in self._shards)
            served = [one.state == "serving" for one in self._tables.watches]
            is_sequenced = self._sequencer.serves
            in_map = len(self._map.entries) if self._map else 0
            all_serve = serving == len(self._shards) and all(served) and is_sequenced
            is_whole = all_serve and in_map == self._num_named
            if is_whole and self._router.phase == "serving":
                self._report("first question")
                self._canary(self._router.address)
                self._generations.started()
                return
            if time.monotonic() > give_up_s:
                tables = f"{sum(served)} of {len(served)} table processes and " if served else ""
                raise TimedOut(
                    f"not ready after {timeout_s:g} s: {tables}{serving} of {len(self._shards)} "
                    f"shards serve, {in_map} in the map, the router is {self._router.phase}"
                    f"{'' if is_sequenced else ', the sequencer does not serve'}; "
                    f"see {self._state.root / 'log'}"
                )
            self._report(f"shards {serving}/{len(self._shards)}")
            time.sleep(TICK_S)

    def poll(self) -> None:
        """Look at everything once, repair the router, and keep map and record true."""
        self._site.poll(self._generations.kept)
        self._tables.hold(self._generations.wanted)
        self._tables.poll()
        self._scaling.current.poll()
        self._sequencer.poll()
        self._generations.poll(self._shards)
        self._scaling.poll()
        self._rolling.poll()
        self._moving.poll()
        self._router.follow(self._generations.control)
        self._router.poll()
        self._write_map()
        self._write_record()

    def announce(self) -> None:
        """Write the record, so that what is started from now on can be cleaned up after a crash."""
        self._write_record()

    def _write_map(self) -> None:
        if not self._shards:
            return
        if time.monotonic() < self._settled_s and not self._all_serve:
            return
        made = next_map(
            self._map,
            self._generations,
            num_shards=self._scaling.current.sharding.shards,
            num_named=self._num_named,
            **self._map_facts,
        )
        if made is not None:
            self._site.write_map(made)
            self._map = made

    def _drawn(self, entries: tuple[ShardEntry, ...], num_shards: int) -> ShardMap:
        """Return a map of these processes, of the version of the last one."""
        return drawn_map(self._map, self._generations, entries, num_shards, **self._map_facts)

    @property
    def _map_facts(self) -> dict[str, Any]:
        """Return what a map says beside its processes."""
        return {
            "sequencer": self._sequencer.address,
            "log_url": self._log_url,
            "log_partitions": self._config.updates.partitions,
        }

    @property
    def _all_serve(self) -> bool:
        """Return whether all that the map could name is there to be named."""
        return self._sequencer.serves and len(self._generations.in_service) == self._num_named

    def _write_record(self) -> None:
        now_s = time.monotonic()
        if now_s >= self._next_census_s:
            self._next_census_s = now_s + _CENSUS_S
            self._take_census()
        shards = self.shards
        record = ClusterRecord(
            guard=self._guard,
            driver=self._driver,
            address=self._router.address,
            model=self._model,
            generation=self._generations.live,
            documents=sum({one.shard: one.documents for one in shards}.values()),
            map_version=self._map.version if self._map else 0,
            router=self._router.record,
            shards=tuple(shards),
            tables=self._tables.records,
            sequencer=self._sequencer.watch.record.model_copy(
                update={"host": self._site.host_of(self._sequencer.actor)}
            )
            if self._sequencer.watch
            else None,
            routers=self._router.records,
            ray=self._site.ray,
            host=self._site.name,
            release=RELEASE,
            generations=self._generations.records,
            size=size_from(self._scaling.current.sharding) if shards else None,
            admin=self.admin,
            http=self._router.http,
            security=self._config.security,
            ray_dir=self._ray_dir,
            processes=tuple(self._family.values()),
            since_unix_s=self._since_unix_s,
        )
        if record != self._written:
            self._site.write_record(record)
            self._written = record

    def _take_census(self) -> None:
        """Note all processes below the driver; those whose parent ended meanwhile are kept."""
        living = {one.pid: one for one in descendants(self._driver.pid)}
        self._family = living | {p: o for p, o in self._family.items() if is_alive(o)}

    def run(self, stop: threading.Event) -> None:
        """Watch and repair until told to stop."""
        while not stop.wait(TICK_S):
            self.poll()

    def stop(self) -> None:
        """End the router, then the actors."""
        self._take_census()
        self._router.stop()
        with ExitStack() as rest:
            rest.callback(self._scaling.close)
            rest.callback(self._moving.close)
            rest.callback(self._tables.end)
            rest.callback(self._sequencer.end)
            rest.callback(self._generations.close)

    def kill_leftovers(self) -> list[Process]:
        """Kill what this cluster started and still runs; return what cannot be killed."""
        return kill_all(one for one in self._family.values() if is_alive(one))

    def __enter__(self) -> Self:
        """Start everything and wait until it serves."""
        try:
            self.start_router()
            self.start_shards()
            self.wait_until_ready(self._config.runtime.start_timeout_s)
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """End everything."""
        self.stop()

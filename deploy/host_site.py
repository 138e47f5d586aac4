"""Several hosts as the supervisor of a cluster sees them, through the store and through Ray."""

import json
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

from silvershard.cluster.shard_map import ShardMap
from silvershard.deploy.cluster_size import in_force
from silvershard.deploy.cluster_store import (
    ClusterStore,
    Freshness,
    HostReport,
    Launched,
    RouterOrder,
)
from silvershard.deploy.config_sections import ShardingSection
from silvershard.deploy.control_store import Control
from silvershard.deploy.errors import Refused
from silvershard.deploy.host_agents import HostAgents, actor_name
from silvershard.deploy.host_places import Beside, HostPlaces, present_in
from silvershard.deploy.host_router import RouterDir
from silvershard.deploy.host_state import HostState
from silvershard.deploy.memory_plan import MemoryPlan
from silvershard.deploy.placement import Copy, Host
from silvershard.deploy.pulse import Pulse
from silvershard.deploy.router_watch import RouterWatch
from silvershard.deploy.shard_watch import Entry, Handle
from silvershard.deploy.staging import Stager
from silvershard.deploy.state import ClusterRecord, RouterPhase, RouterRecord, StateDir
from silvershard.shard.generations import generation_dir
from silvershard.shard.outline import Outline

NAMESPACE = "silvershard"
"""Namespace of our actors in a Ray that was found."""
NODE_SHARE = 0.001
"""How much of the resource that every node of Ray has an actor takes which is tied to it."""

_LOOK_S = 0.5
_SILENT_S = 5.0
"""A host whose agent has said nothing for so long is shown as such."""
_NODES_S = 1.0
_STRAYS_S = 35.0
"""How long what an earlier supervisor left goes on beside the longest deadline: the map may name
it until everybody has spoken."""

E = TypeVar("E", bound=Entry)


class Actors(NamedTuple):
    """What the site needs of Ray."""

    find: Callable[[str], Any]
    """Returns the actor of a name, None if there is none."""
    addresses: Callable[[], Collection[str]]
    """Returns the IP addresses of the nodes that Ray thinks alive."""
    end: Callable[[Any], None]
    """Ends an actor for good."""
    restart: Callable[[Any], None]
    """Ends the process of an actor, which Ray starts again."""


class HostRouters:
    """The routers of all hosts, as their agents tell of them."""

    def __init__(
        self,
        names: Sequence[str],
        clock: Callable[[], float] = time.monotonic,
        order: Callable[[str], object] = lambda _: None,
    ) -> None:
        """Know of the routers of these hosts; ``order`` writes a ``RouterOrder`` or nothing."""
        self.phase: RouterPhase = "starting"
        self.address = ""
        self.http = ""
        self.refused = ""
        """Why not all of them were replaced when that was last asked for; empty: they were."""
        self._order = order
        self._to_replace: list[str] = []
        """Hosts whose routers are still to be replaced, the present one first."""
        self._ordered = 0
        self.records = tuple(RouterRecord(state="starting", host=name) for name in names)
        self._https: dict[str, str] = {}
        self._freshness = Freshness(clock)

    @property
    def record(self) -> RouterRecord:
        """Return the first one that serves, else the first one."""
        serving = [one for one in self.records if one.state == "serving"]
        return (serving or list(self.records))[0]

    @property
    def has_failed(self) -> bool:
        """Return False: whoever ends is started again by the agent of its host."""
        return False

    def take(self, reports: dict[str, HostReport]) -> None:
        """Take what the hosts say."""
        self.records = tuple(self._record(one.host, reports.get(one.host)) for one in self.records)
        states = {one.state for one in self.records}
        order: tuple[RouterPhase, ...] = ("restarting", "starting", "serving")
        self.phase = next(one for one in order if one in states)
        self._follow_order(reports)
        self.address = self.record.address
        found = reports.get(self.record.host)
        self.http = found.http if found is not None else ""

    def follow(self, control: Control) -> None:
        """Do nothing: which hosts have a router was said when they were started."""

    def replace(self) -> None:
        """Let a new process take the place of each, one host after the other."""
        self.refused = ""
        self._to_replace = [one.host for one in self.records]
        self._order_next()

    @property
    def is_replacing(self) -> bool:
        """Return whether one is being replaced, or is still to be."""
        return bool(self._to_replace)

    def _order_next(self) -> None:
        self._ordered = time.time_ns()
        order = RouterOrder(host=self._to_replace[0], number=self._ordered)
        self._order(order.model_dump_json())

    def _follow_order(self, reports: dict[str, HostReport]) -> None:
        """Go on to the next host once one is done."""
        report = reports.get(self._to_replace[0]) if self._to_replace else None
        if report is None or report.ordered != self._ordered:
            return
        if report.refused:
            self.refused = f"{report.host}: {report.refused}"
        self._to_replace = [] if report.refused else self._to_replace[1:]
        if self._to_replace:
            self._order_next()
        else:
            # Who starts anew shall not carry it out again.
            self._order("")

    def _record(self, host: str, report: HostReport | None) -> RouterRecord:
        if report is None or report.router is None:
            return RouterRecord(state="starting", host=host)
        silent_s = self._freshness.silent_s(report)
        if silent_s < _SILENT_S:
            return report.router
        reason = f"its host has said nothing for {silent_s:.0f} s"
        return report.router.model_copy(update={"state": "restarting", "reason": reason})

    def start(self) -> None:
        """Do nothing: agents start them."""

    def poll(self) -> None:
        """Do nothing: the site takes reports."""

    def last_words(self) -> str:
        """Return why one of them does not serve."""
        return next((one.reason for one in self.records if one.reason), "it wrote nothing")

    def stop(self) -> None:
        """Do nothing: agents end them."""


class SupervisorDir(RouterDir):
    """A place of its own for the supervisor, where it has the map as it wrote it last.

    It may run on a node that is no host, and on a host the agent writes that of the router.
    """

    def __init__(self, state: StateDir) -> None:
        """Make the place."""
        super().__init__(state, ".supervisor")

    @property
    def shard_map_file(self) -> Path:
        """Return the map that routers follow."""
        return self.place / "shard_map.json"

    @property
    def coming_map_file(self) -> Path:
        """Return the map by which a new set of shards is checked."""
        return self.place / "shard_map.coming.json"


class HostSite:
    """Several hosts; see ``site.Site``."""

    feel: Callable[[str], Pulse] | None = None

    def __init__(
        self,
        store: ClusterStore,
        launched: Launched,
        term: int,
        actors: Actors,
        *,
        address: str,
        stager: Stager,
        control: Callable[[], Control],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Look at nobody yet.

        Args:
            store: of the cluster.
            launched: what was started.
            term: of this supervisor.
            actors: what Ray knows.
            address: IP address of the node that this runs on, which may be no host.
            stager: brings generations to it.
            control: returns the document of the control store.
            clock: for the pauses.

        Raises:
            StateError: if the store cannot be used.
        """
        self._store = store
        self._launched = launched
        self._term = term
        self._actors = actors
        self._stager = stager
        self._control = control
        self._clock = clock
        self.config = in_force(launched.config, control().scaled)
        """Settings, with the numbers of processes that are in force."""
        state = StateDir(Path(launched.root))
        self._generations = state.generations
        self.maps: StateDir = SupervisorDir(state)
        settings = RouterWatch(self.maps, launched.config).settings()
        self.maps.router_file.write_text(settings.model_dump_json(indent=1))
        self._host_states: dict[str, HostState] = dict(control().host_states)
        """Of those that are not up; who is lost for too long is down."""
        self._lost_since_s: dict[str, float] = {}
        self.places = HostPlaces(
            store,
            launched,
            term,
            self.config.sharding,
            self._planned_copies,
            lambda: self._host_states,
        )
        longest_s = self.config.query.deadline_max_ms / 1e3
        self._end_strays_s = clock() + _STRAYS_S + longest_s
        self.ray = launched.ray
        self.name = next((one.name for one in launched.hosts if one.address == address), address)
        self.reports: dict[str, HostReport] = {}
        """What every host said last."""
        self.site_routers = HostRouters(
            [one.name for one in launched.hosts if one.router],
            clock,
            lambda text: store.write(term, "order", text),
        )
        self.agents = HostAgents(
            [one.name for one in launched.hosts],
            lambda host: actors.restart(actors.find(actor_name(host))),
            self._has_agent,
        )
        self.has_left = False
        """Whether the next supervisor shall take over."""
        self.plan: Callable[[Outline | None, Outline], MemoryPlan] | None = self._planned
        self._looked_s = -_LOOK_S
        self._wanted = ""
        self._movable: dict[str, str] = {}
        """The host of each actor that may change it."""

    def host_of(self, actor: str) -> str:
        """Return the host that an actor is on, or was placed on."""
        return self._movable.get(actor) or self.places.layout.of(actor).host

    def find(self, actor: str) -> Any:
        """Return the actor that runs under a name already."""
        return self._actors.find(actor)

    def options(self, actor: str) -> dict[str, Any]:
        """Return options that tie an actor to its host and let it outlive the supervisor."""
        return tied_to(self._launched.host(self.host_of(actor)).address)

    def binding(self, actor: str) -> dict[str, Any]:
        """Return the address of the host of an actor, and how it waits for what it needs."""
        address = self._launched.host(self.host_of(actor)).address
        bound: dict[str, Any] = {"host": address}
        if actor in self._movable:
            return {**bound, "patient": True}
        return {**bound, "epochs": self._store.url}

    def movable(self, actor: str, start: Callable[[], Handle[E]]) -> Handle[E]:
        """Start an actor on the first host that is there, and on another one when that is lost."""
        return MovingHandle(self, actor, start)

    def settle(self, actor: str) -> None:
        """Learn the host of an actor that may be anywhere, or choose one that is there."""
        up = self._actors.addresses()
        host = self._told_host() if self.find(actor) is not None else ""
        chosen = [one.name for one in self._launched.hosts if one.address in up]
        self._movable[actor] = host or (chosen or [self._launched.hosts[0].name])[0]

    def _told_host(self) -> str:
        """Return where the last supervisor had the sequencer."""
        record = self._store.read(ClusterRecord, "record")
        sequencer = record.sequencer if record is not None else None
        return sequencer.host if sequencer is not None else ""

    def is_lost(self, actor: str) -> bool:
        """Return whether Ray has given up the host of an actor, and there is another one."""
        up = self._actors.addresses()
        here = self._launched.host(self._movable[actor]).address
        return here not in up and any(one.address in up for one in self._launched.hosts)

    def poll(self, kept: Collection[int]) -> None:
        """Take what the hosts say, and tell them which generations they shall have.

        Raises:
            Superseded: if another supervisor has taken over. Whoever stood still meanwhile must not
                go on with what it had begun: the processes are the other one's.
        """
        now_s = self._clock()
        if now_s < self._looked_s + _LOOK_S:
            return
        self._store.check(self._term)
        self._looked_s = now_s
        wanted = json.dumps(sorted(kept))
        if wanted != self._wanted:
            self._store.write(self._term, "wanted", wanted)
            self._wanted = wanted
        self._host_states = {**self._gone(now_s), **self._control().host_states}
        self.places.flush()
        if now_s >= self._end_strays_s:
            self._end_strays()
        self.reports = self._store.reports()
        self._stager.poll(kept, self.reports)
        self.site_routers.take(self.reports)
        self.agents.take(self.reports)

    def _gone(self, now_s: float) -> dict[str, HostState]:
        """Return the hosts that Ray has lost for so long that their copies shall be elsewhere."""
        up, limit_s = self._actors.addresses(), self.config.replicas.replace_after_s
        self._lost_since_s = {
            one.name: self._lost_since_s.get(one.name, now_s)
            for one in self._launched.hosts
            if one.address not in up
        }
        lost = self._lost_since_s.items()
        return {name: "down" for name, since_s in lost if limit_s and now_s >= since_s + limit_s}

    def _end_strays(self) -> None:
        """End what an earlier supervisor had begun to start or to end."""
        for name in self.places.strays:
            actor = self.find(name)
            if actor is not None:
                self._actors.end(actor)
            self.places.ended(name)
        self.places.strays = []

    def _has_agent(self, host: str) -> bool:
        is_up = self._launched.host(host).address in self._actors.addresses()
        return is_up and self.find(actor_name(host)) is not None

    def leave(self) -> None:
        """Let the next supervisor take over."""
        self.has_left = True

    def lacking(self, generation: int) -> str:
        """Return in words which host does not have a generation; empty if all of them do."""
        if generation and not self._stager.holds(generation):
            return f"generation {generation} is not where the supervisor runs: {self._stager.said}"
        for name in sorted({one.host for one in self.places.layout.copies}):
            report = self.reports.get(name)
            if generation and (report is None or generation not in report.generations):
                said = f" ({report.staging})" if report is not None and report.staging else ""
                return f"generation {generation} is not on {name} yet{said}"
        return ""

    def read_map(self) -> ShardMap | None:
        """Return the map that routers follow already."""
        found = self._store.read(ShardMap, "map")
        if found is not None:
            found.write_atomic(self.maps.shard_map_file)
        return found

    def write_map(self, shard_map: ShardMap) -> None:
        """Give all hosts a new map."""
        self._store.write(self._term, "map", shard_map.model_dump_json(indent=1))
        shard_map.write_atomic(self.maps.shard_map_file)

    def write_record(self, record: ClusterRecord) -> None:
        """Write down what runs, for all hosts."""
        self._store.write(self._term, "record", record.model_dump_json(indent=1))

    def _planned_copies(
        self,
        sharding: ShardingSection,
        hosts: Sequence[Host],
        present: Mapping[Copy, str],
        beside: Sequence[Beside],
    ) -> Mapping[Copy, str]:
        """Return the host of every copy; see ``host_places.PlanCopies``."""
        # It loads torch, which a supervisor needs for nothing else.
        from silvershard.deploy.host_plan import plan_beside

        control = self._control()
        snapshot = generation_dir(self._generations, control.live or self._launched.generation)
        kept = len(control.kept)
        made = plan_beside(
            self.config, snapshot, sharding, hosts, present, beside, generations=kept
        )
        return made.placement.at

    def _planned(self, live: Outline | None, new: Outline) -> MemoryPlan:
        """Return how a generation comes in, from the memory that the hosts were listed with."""
        held = MemoryPlan("beside", 0, 0, 0, 0, 0, "")
        if live is None:
            return held
        # They load torch, which a supervisor needs for nothing else.
        from silvershard.deploy.footprint import read_footprint
        from silvershard.deploy.plan import plan_cluster

        config = in_force(self._launched.config, self._control().scaled)
        try:
            made = plan_cluster(
                config,
                read_footprint(Path(new.path), config),
                self.places.hosts,
                present_in(self.places.layout, config.sharding),
            )
        except Refused as error:
            return held._replace(mode="refused", reason=str(error))
        return held._replace(mode=made.swap)


class MovingHandle(Generic[E]):
    """An actor that is started on another host when Ray has given up the one that it is on."""

    def __init__(
        self,
        site: HostSite,
        actor: str,
        start: Callable[[], Handle[E]],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Start it, or adopt it where it is.

        Args:
            site: the hosts.
            actor: its name.
            start: starts it where the site wants it.
            clock: for the pauses.
        """
        self._site = site
        self._actor = actor
        self._start = start
        self._clock = clock
        self._restarts = 0
        """Of those that were given up, themselves counted."""
        site.settle(actor)
        self._handle: Handle[E] | None = start()
        self._looked_s = clock()

    def restarts(self) -> int:
        """Return how often it was started again, here or elsewhere."""
        now_s = self._clock()
        if now_s >= self._looked_s + _NODES_S:
            self._looked_s = now_s
            self._look()
        return self._restarts + (self._handle.restarts() if self._handle is not None else 0)

    def _look(self) -> None:
        if self._handle is not None and self._site.is_lost(self._actor):
            self._restarts += self._handle.restarts() + 1
            self._handle.end()
            self._handle = None
        # Ray gives the name free a little later.
        if self._handle is None and self._site.find(self._actor) is None:
            self._site.settle(self._actor)
            self._handle = self._start()

    def entry(self) -> E | None:
        """Return where it serves, None while it loads."""
        return self._handle.entry() if self._handle is not None else None

    def ask_again(self) -> None:
        """Forget what it said."""
        if self._handle is not None:
            self._handle.ask_again()

    def end(self) -> None:
        """End it for good."""
        if self._handle is not None:
            self._handle.end()


def tied_to(address: str) -> dict[str, Any]:
    """Return the options of an actor that belongs to one host and outlives who started it."""
    return {
        "lifetime": "detached",
        "namespace": NAMESPACE,
        "num_cpus": 0,
        "resources": {f"node:{address}": NODE_SHARE},
    }

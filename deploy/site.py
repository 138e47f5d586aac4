"""Where the processes of a cluster run, and who hears of the map: this machine or several hosts."""

from collections.abc import Callable, Collection
from functools import partial
from typing import Any, Protocol, TypeVar

from silvershard.cluster.dialer import PLAIN, Dials
from silvershard.cluster.shard_map import ShardMap
from silvershard.deploy.control_store import Control
from silvershard.deploy.memory_plan import MemoryPlan
from silvershard.deploy.places import HerePlaces, Places
from silvershard.deploy.pulse import Feel, Pulse
from silvershard.deploy.shard_watch import Entry, Handle
from silvershard.deploy.state import ClusterRecord, RouterPhase, RouterRecord, StateDir
from silvershard.shard.outline import Outline

E = TypeVar("E", bound=Entry)


class Replaceable(Protocol):
    """What is replaced while it serves."""

    @property
    def is_replacing(self) -> bool:
        """Return whether a process is taking the place of another one."""
        ...

    @property
    def refused(self) -> str:
        """Return why it was not replaced the last time; empty: it was."""
        ...

    def replace(self) -> None:
        """Let a new process take its place."""
        ...


class Routers(Replaceable, Protocol):
    """The routers of a cluster, or its only one."""

    @property
    def phase(self) -> RouterPhase:
        """Return that of the one which is furthest behind."""
        ...

    @property
    def address(self) -> str:
        """Return ``host:port`` of one that serves, empty before one listens."""
        ...

    @property
    def http(self) -> str:
        """Return ``host:port`` of its probes and metrics; empty: there are none."""
        ...

    @property
    def record(self) -> RouterRecord:
        """Return one of them as status shows it."""
        ...

    @property
    def records(self) -> tuple[RouterRecord, ...]:
        """Return every router, if there may be several."""
        ...

    @property
    def has_failed(self) -> bool:
        """Return whether one has ended by itself."""
        ...

    def start(self) -> None:
        """Start them."""
        ...

    def poll(self) -> None:
        """Look once."""
        ...

    def last_words(self) -> str:
        """Return why one has failed."""
        ...

    def follow(self, control: Control) -> None:
        """Have as many as the control store says, where that is decided there."""
        ...

    def stop(self) -> None:
        """End them in order."""
        ...


class Site(Protocol):
    """What a cluster needs to know of the machines that it runs on; nothing here waits long."""

    feel: Feel | None
    """Takes the pulse of a process here; None where processes may be on other hosts."""
    plan: Callable[[Outline | None, Outline], MemoryPlan] | None
    """Returns how a generation can be brought in beside the live one, if any process has to load
    it; None where the memory of this machine decides."""
    ray: str
    """``host:port`` of the Ray that was found; empty: the cluster brings its own."""
    name: str
    """The host on which this is decided; empty: there is only this machine."""
    maps: StateDir
    """Where the map that routers follow is on this machine, with the settings of a router."""

    @property
    def places(self) -> Places:
        """Return where shard processes go."""
        ...

    @property
    def agents(self) -> Replaceable | None:
        """Return the agents of the hosts; None on a single machine."""
        ...

    def leave(self) -> None:
        """Let the next supervisor take over, where there can be another one."""
        ...

    def host_of(self, actor: str) -> str:
        """Return the host of an actor; empty on a single machine."""
        ...

    def find(self, actor: str) -> Any:
        """Return the actor that runs under a name already; None if there is none to adopt."""
        ...

    def options(self, actor: str) -> dict[str, Any]:
        """Return the options that Ray gets for an actor."""
        ...

    def binding(self, actor: str) -> dict[str, Any]:
        """Return what an actor is told of the host that it is for."""
        ...

    def movable(self, actor: str, start: Callable[[], Handle[E]]) -> Handle[E]:
        """Start an actor that may run on any host, and start it elsewhere when its host is lost."""
        ...

    def poll(self, kept: Collection[int]) -> None:
        """Look once; ``kept`` are the generations that every host shall have on disk."""
        ...

    def lacking(self, generation: int) -> str:
        """Return in words which host does not have a generation; empty if all of them do."""
        ...

    def read_map(self) -> ShardMap | None:
        """Return the map that routers follow already; None before the first one."""
        ...

    def write_map(self, shard_map: ShardMap) -> None:
        """Give routers and shards a new map."""
        ...

    def write_record(self, record: ClusterRecord) -> None:
        """Write down what runs."""
        ...


class ThisMachine:
    """A single machine: what runs here ends with the cluster, and files tell everybody."""

    plan: Callable[[Outline | None, Outline], MemoryPlan] | None = None
    agents: Replaceable | None = None
    ray = ""
    name = ""

    def __init__(self, state: StateDir, dialer: Dials = PLAIN) -> None:
        self.feel: Feel | None = partial(Pulse, dialer=dialer)
        self.places: Places = HerePlaces()
        self.maps = state
        self._state = state

    def leave(self) -> None:
        """Do nothing: the cluster ends with who started it."""

    def host_of(self, actor: str) -> str:
        """Return nothing."""
        return ""

    def find(self, actor: str) -> Any:
        """Return None: the embedded Ray is new."""
        return None

    def options(self, actor: str) -> dict[str, Any]:
        """Return no options."""
        return {}

    def binding(self, actor: str) -> dict[str, Any]:
        """Return nothing: the loopback address is the default."""
        return {}

    def movable(self, actor: str, start: Callable[[], Handle[E]]) -> Handle[E]:
        """Start it here."""
        return start()

    def poll(self, kept: Collection[int]) -> None:
        """Do nothing."""

    def lacking(self, generation: int) -> str:
        """Return nothing: a generation is published here."""
        return ""

    def read_map(self) -> ShardMap | None:
        """Return None: a map of an earlier cluster was removed."""
        return None

    def write_map(self, shard_map: ShardMap) -> None:
        """Replace the file."""
        shard_map.write_atomic(self._state.shard_map_file)

    def write_record(self, record: ClusterRecord) -> None:
        """Replace the file."""
        self._state.write_record(record)

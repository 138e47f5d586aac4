"""What starts processes again, the real parts of the supervisor that watch them, and the maps that
they make."""

import random
from pathlib import Path
from typing import Any

from simulation.network import Deliver
from simulation.process import ShardProcess

from silvershard.cluster.map_file import Stamp
from silvershard.cluster.shard_map import ShardEntry, ShardMap
from silvershard.deploy.config import Config
from silvershard.deploy.control_store import ControlStore
from silvershard.deploy.generation_watch import GenerationWatch
from silvershard.deploy.next_map import next_map
from silvershard.deploy.processes import Process, Processes
from silvershard.deploy.pulse import Pulse
from silvershard.deploy.shard_host import ShardHost
from silvershard.deploy.shard_watch import ShardWatch
from silvershard.shard.errors import StateError

TICK_S = 0.1
_FIRST_PID = 1 << 30

Place = tuple[int, int]


class Engine:
    """Starts the process of a place, and another one where it believes that it ended.

    It stands for Ray: it hears of a death at once, and of a host that is cut off only in time.
    """

    def __init__(self, world: Any, places: list[Place], generation: int) -> None:
        self.processes: dict[Place, ShardProcess] = {}
        """The newest incarnation of each place."""
        self.all: list[ShardProcess] = []
        """Every incarnation that may live."""
        self.starts = dict.fromkeys(places, 0)
        self._world = world
        self._draw = random.Random(f"{world.seed}/engine")
        self._first = generation
        for place in places:
            self._start(place)

    def host_of(self, place: Place) -> str:
        return f"host{sum(place) % self._world.num_hosts}"

    def died(self, process: ShardProcess) -> None:
        """Take note that a process ended; the newest one of its place is started again."""
        if process in self.all:
            self.all.remove(process)
        if self.processes[process.place] is process:
            self.replace(process.place)

    def replace(self, place: Place) -> None:
        """Start another incarnation, whatever became of the one before."""
        self.starts[place] += 1
        self._world.loop.call_later(self._draw.uniform(0.02, 0.3), self._start, place)

    def _start(self, place: Place) -> None:
        world, before = self._world, self.processes.get(place)
        host = self.host_of(place)
        address = f"{host}:{6000 + len(self.all) + 100 * self.starts[place]}"
        if before is not None and before.is_dead and self._draw.random() < 0.5:
            # A port that became free is taken again.
            address = before.address
        world.epochs += 1
        process = ShardProcess(world, place, address, world.epochs, _FIRST_PID + world.epochs)
        self.processes[place] = process
        self.all.append(process)
        world.say("start", process.name, address)

        def begin() -> None:
            if process.is_dead or process.is_stopped:
                return
            # What starts again serves what the map says by then.
            newest = world.board.newest
            generation = newest.generation if newest else self._first
            snapshot = Path(newest.snapshot) if newest else world.path(generation)
            world.network.processes[address] = process
            process.start(process.serve(generation, snapshot))

        world.loop.call_later(self._draw.uniform(0.1, 0.5), begin)

    def handle(self, place: Place) -> "Handle":
        return Handle(self, place)


class Handle:
    """A place as the watch of one supervisor sees it."""

    def __init__(self, engine: Engine, place: Place) -> None:
        self._engine, self._place = engine, place
        self._starts = engine.starts[place]
        self._said: ShardEntry | None = None

    def restarts(self) -> int:
        return self._engine.starts[self._place] - self._starts

    def entry(self) -> ShardEntry | None:
        process = self._engine.processes[self._place]
        if self._said is None and not process.is_dead and not process.is_stopped:
            self._said = process.entry
        return self._said

    def ask_again(self) -> None:
        self._said = None

    def end(self) -> None:
        """Never: no place is given up in the simulation."""
        raise AssertionError("a place was given up")


class KnownProcesses(Processes):
    """The processes of the simulation, by their numbers."""

    def __init__(self, world: Any) -> None:
        self._world = world

    def _find(self, pid: int) -> ShardProcess | None:
        found = [one for one in self._world.engine.all if one.pid == pid]
        return found[0] if found else None

    def identify(self, pid: int) -> Process | None:
        found = self._find(pid)
        return None if found is None else Process(pid=pid, started=found.epoch, boot="simulated")

    def is_alive(self, process: Process) -> bool:
        found = self._find(process.pid)
        return found is not None and not found.is_dead

    def kill(self, process: Process) -> bool:
        found = self._find(process.pid)
        if found is None or self._world.network.cut_hosts[found.host]:
            return False
        self._world.kill(found, "hung")
        return True


class Store(ControlStore):
    """A control store in memory."""

    def __init__(self) -> None:
        self.document = ""
        self.version = 0
        self.is_down = False

    @property
    def place(self) -> str:
        return "memory"

    def load(self) -> str:
        if self.is_down:
            raise StateError("the control store is down")
        return self.document

    def replace(self, document: str, version: int) -> bool:
        if self.is_down:
            raise StateError("the control store is down")
        if version != self.version + 1:
            return False
        self.document, self.version = document, version
        return True


class State:
    """What ``GenerationWatch`` needs of a state directory."""

    def __init__(self, generations: Path, control: Store) -> None:
        self.generations = generations
        self.control = control


class Board:
    """Every map that was ever written; each router reads the newest one, or an older one."""

    def __init__(self) -> None:
        self.maps: list[ShardMap] = []

    @property
    def newest(self) -> ShardMap | None:
        return self.maps[-1] if self.maps else None


class View:
    """The map as one router reads it."""

    def __init__(self, board: Board) -> None:
        self.read_at = 0
        """Place of the map that was read last, from 1."""
        self.is_late = False
        self._board = board
        self._seen = 0

    def stamp(self) -> Stamp | None:
        if not self.is_late:
            self._seen = len(self._board.maps)
        return (1, self._seen, 0) if self._seen else None

    def read(self) -> ShardMap:
        self.read_at = self._seen
        return self._board.maps[self._seen - 1]


class Supervisor:
    """One life of the supervisor: watches, generations and the map."""

    def __init__(self, world: Any, number: int, generation: int) -> None:
        self.name = f"supervisor {number}"
        self.is_dead = self.is_stopped = False
        self.inbox: list[Deliver] = []
        self._world = world
        clock = lambda: world.loop.now_s  # noqa: E731
        dialer = world.network.dialer(self)
        config: Config = world.config
        processes = KnownProcesses(world)
        self._watches = [
            ShardWatch(
                place[0],
                world.engine.handle(place),
                config.runtime,
                replica=place[1],
                feel=lambda address: Pulse(address, dialer, clock=clock),
                clock=clock,
                processes=processes,
            )
            for place in world.places
        ]
        self._generations = GenerationWatch(
            world.state,
            config,
            generation,
            connect=lambda address: ShardHost(address, dialer, clock=clock),
            free_bytes=lambda: 1 << 40,
            clock=clock,
        )
        self._is_started = False
        world.loop.call_soon(self.tick)

    def tick(self) -> None:
        """Do what the launcher does again and again."""
        world = self._world
        if self.is_dead:
            return
        for one in self._watches:
            one.poll()
        self._generations.poll(self._watches)
        sharding = world.config.sharding
        made = next_map(
            world.board.newest,
            self._generations,
            num_shards=sharding.shards,
            num_named=sharding.shards * sharding.replicas,
        )
        if made is not None and (self._is_whole(made) or self._is_started):
            world.publish(made)
        newest = world.board.newest
        is_served = newest is not None and self._is_whole(newest) and not world.store.is_down
        if is_served and not self._is_started:
            self._generations.started()
            self._is_started = True
        world.loop.call_later(TICK_S, self.tick)

    def _is_whole(self, made: ShardMap) -> bool:
        return {one.shard for one in made.entries} == set(range(made.num_shards))

    def die(self) -> None:
        self.is_dead = True
        self._generations.close()

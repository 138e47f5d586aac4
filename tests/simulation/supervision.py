"""What starts processes again, the real parts of the supervisor that watch them, and the maps that
they make."""

import random
from pathlib import Path
from typing import Any

from simulation.network import Deliver
from simulation.process import Place, ShardProcess

from silvershard.cluster.map_file import Stamp
from silvershard.cluster.shard_map import ShardEntry, ShardMap
from silvershard.deploy.cluster_size import in_force
from silvershard.deploy.config import Config
from silvershard.deploy.control_store import ControlStore
from silvershard.deploy.generation_watch import GenerationWatch
from silvershard.deploy.next_map import drawn_map, next_map
from silvershard.deploy.processes import Process, Processes
from silvershard.deploy.pulse import Pulse
from silvershard.deploy.scaling import Scaling
from silvershard.deploy.shard_host import ShardHost
from silvershard.deploy.shard_watch import ShardWatch
from silvershard.shard.errors import StateError

TICK_S = 0.1
LOOK_S = 0.5
"""Between two looks of a supervisor at whether another one has taken over."""
LEFT_S = 7.0
"""After that nobody asks processes that an earlier supervisor did not come to end."""
_FIRST_PID = 1 << 30


class Engine:
    """Starts the process of a place, and another one where it believes that it ended.

    It stands for Ray: it hears of a death at once, and of a host that is cut off only in time.
    """

    def __init__(self, world: Any, generation: int) -> None:
        self.processes: dict[Place, ShardProcess] = {}
        """The newest incarnation of each place."""
        self.all: list[ShardProcess] = []
        """Every incarnation that may live."""
        self.starts: dict[Place, int] = {}
        """How often each place that there shall be was started again."""
        self._world = world
        self._draw = random.Random(f"{world.seed}/engine")
        self._first = generation

    def open(self, place: Place) -> "Handle":
        """Have a process at a place, if there is none."""
        if place not in self.starts:
            self.starts[place] = 0
            self._start(place)
        return Handle(self, place)

    def end(self, place: Place) -> None:
        """Have no process at a place."""
        if self.starts.pop(place, None) is not None:
            for process in [one for one in self.all if one.place == place]:
                self._world.kill(process, "it is not wanted any more")
            self.processes.pop(place, None)

    def host_of(self, place: Place) -> str:
        return f"host{sum(place.named) % self._world.num_hosts}"

    def is_newest(self, process: ShardProcess) -> bool:
        return self.processes.get(process.place) is process

    def died(self, process: ShardProcess) -> None:
        """Take note that a process ended; the newest one of its place is started again."""
        if process in self.all:
            self.all.remove(process)
        if self.is_newest(process) and process.place in self.starts:
            self.replace(process.place)

    def replace(self, place: Place) -> None:
        """Start another incarnation, whatever became of the one before."""
        self.starts[place] += 1
        self._world.loop.call_later(self._draw.uniform(0.02, 0.3), self._start, place)

    def _start(self, place: Place) -> None:
        if place not in self.starts:
            return
        world, before = self._world, self.processes.get(place)
        world.epochs += 1
        address = f"{self.host_of(place)}:{6000 + world.epochs}"
        if before is not None and before.is_dead and self._draw.random() < 0.5:
            # A port that became free is taken again.
            address = before.address
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


class Handle:
    """A place as the watch of one supervisor sees it."""

    def __init__(self, engine: Engine, place: Place) -> None:
        self._engine, self._place = engine, place
        self._starts = engine.starts[place]
        self._said: ShardEntry | None = None

    def restarts(self) -> int:
        return self._engine.starts.get(self._place, self._starts) - self._starts

    def entry(self) -> ShardEntry | None:
        process = self._engine.processes.get(self._place)
        if process is None:
            return None
        if self._said is None and not process.is_dead and not process.is_stopped:
            self._said = process.entry
        return self._said

    def ask_again(self) -> None:
        self._said = None

    def end(self) -> None:
        self._engine.end(self._place)


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
    """What ``GenerationWatch`` and ``Scaling`` need of a state directory."""

    def __init__(self, generations: Path, control: Store) -> None:
        self.generations = generations
        self.control = control
        self.shard_map_file = generations / "map.json"
        self.coming_map_file = generations / "coming.json"


class Comparison:
    """A comparison of the answers of a new set of shards with those of the old one."""

    def __init__(self, world: Any) -> None:
        self._clock = lambda: world.loop.now_s
        self._end_s = world.loop.now_s + world.draw.uniform(0.1, 1.5)
        self._found = "it answers otherwise" if world.draw.random() < 0.1 else ""

    def poll(self) -> str | None:
        return self._found if self._clock() >= self._end_s else None

    def end(self) -> None:
        pass


class Board:
    """Every map that was ever written; each router reads the newest one, or an older one.

    Whoever takes over fences all earlier supervisors.
    """

    def __init__(self) -> None:
        self.maps: list[ShardMap] = []
        self.term = 0
        self._cut_s: list[tuple[int, float]] = []
        """The first version of each cut of the catalogue, and when it was written."""

    def add(self, made: ShardMap, now_s: float) -> None:
        """Write a map."""
        if not self.maps or self.maps[-1].num_shards != made.num_shards:
            self._cut_s.append((made.version, now_s))
        self.maps.append(made)

    @property
    def num_cuts(self) -> int:
        return len(self._cut_s)

    def left_s(self, shard_map: ShardMap) -> float:
        """Return when a map of another cut took the place of a map."""
        later = [at_s for version, at_s in self._cut_s if version > shard_map.version]
        return min(later, default=float("inf"))

    @property
    def newest(self) -> ShardMap | None:
        return self.maps[-1] if self.maps else None


class View:
    """The map as one router reads it."""

    def __init__(self, board: Board) -> None:
        self.is_late = False
        """It stays as it is."""
        self.is_old = False
        """It is what it was a while ago."""
        self._board = board
        self._seen = 0
        """Place of the map that is there, from 1."""

    def stamp(self) -> Stamp | None:
        if not self.is_late:
            self._seen = len(self._board.maps)
        return (1, self._shown, 0) if self._seen else None

    @property
    def _shown(self) -> int:
        return max(self._seen - 2, 1) if self.is_old else self._seen

    def read(self) -> ShardMap:
        return self._board.maps[self._shown - 1]


class Supervisor:
    """One life of the supervisor: watches, scaling, generations and the map."""

    def __init__(self, world: Any, number: int, generation: int) -> None:
        self.name = f"supervisor {number}"
        self.is_dead = self.is_stopped = False
        self.inbox: list[Deliver] = []
        self._world = world
        self._clock = clock = lambda: world.loop.now_s
        self._dialer = dialer = world.network.dialer(self)
        self._processes = KnownProcesses(world)
        self._opened: set[Place] = set()
        world.board.term += 1
        self._term = world.board.term
        self._looked_s = self._began_s = clock()
        config: Config = in_force(world.config, world.store.read().scaled)
        connect = lambda address: ShardHost(address, dialer, clock=clock)  # noqa: E731
        self._generations = GenerationWatch(
            world.state,
            config,
            generation,
            connect=connect,
            free_bytes=lambda: 1 << 40,
            clock=clock,
        )
        self._scaling = Scaling(
            world.state,
            config,
            self._generations,
            self._open,
            connect=connect,
            draw_map=lambda entries, num_shards: drawn_map(
                world.board.newest, self._generations, entries, num_shards
            ),
            start_check=lambda *_: Comparison(world),
            watch=self._watched,
            clock=clock,
        )
        self._scaling.start()
        self._is_started = False
        world.loop.call_soon(self.tick)

    def _open(self, num_shards: int, shard: int, copy: int) -> Handle:
        place = Place(shard, copy, num_shards)
        self._opened.add(place)
        handle: Handle = self._world.engine.open(place)
        return handle

    def _watched(self, _: int, shard: int, copy: int, handle: Any) -> ShardWatch:
        return ShardWatch(
            shard,
            handle,
            self._world.config.runtime,
            replica=copy,
            feel=lambda address: Pulse(address, self._dialer, clock=self._clock),
            clock=self._clock,
            processes=self._processes,
        )

    def tick(self) -> None:
        """Do what the launcher does again and again."""
        world, board = self._world, self._world.board
        if self.is_dead:
            return
        if self.is_stopped:
            self.inbox.append(self.tick)
            return
        if self._clock() >= self._looked_s + LOOK_S:
            self._looked_s = self._clock()
            if self._is_superseded():
                return
        self._scaling.current.poll()
        self._generations.poll(self._scaling.current.watches)
        self._scaling.poll()
        sharding = self._scaling.current.sharding
        made = next_map(
            board.newest,
            self._generations,
            num_shards=sharding.shards,
            num_named=sharding.shards * sharding.replicas,
        )
        if made is not None and (self._is_whole(made) or self._is_started):
            if self._is_superseded():
                return
            world.publish(made)
        newest = board.newest
        is_served = newest is not None and self._is_whole(newest) and not world.store.is_down
        if is_served and not self._is_started:
            self._generations.started()
            self._is_started = True
        if self._clock() > self._began_s + LEFT_S:
            for place in [one for one in world.engine.starts if one not in self._opened]:
                world.engine.end(place)
        world.loop.call_later(TICK_S, self.tick)

    def _is_superseded(self) -> bool:
        """Return whether another one has taken over, which ends this one."""
        if self._world.board.term != self._term:
            self._world.say(self.name, "is superseded")
            self.die()
        return self.is_dead

    def _is_whole(self, made: ShardMap) -> bool:
        return {one.shard for one in made.entries} == set(range(made.num_shards))

    def stop(self) -> None:
        """Let it stand still."""
        self.is_stopped = True

    def resume(self) -> None:
        self.is_stopped = False
        inbox, self.inbox = self.inbox, []
        for deliver in inbox:
            deliver()

    def die(self) -> None:
        self.is_dead = True
        self._generations.close()

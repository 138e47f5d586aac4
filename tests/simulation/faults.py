"""What breaks: drawn from the seed, begun and ended in virtual time."""

import asyncio
import random
from collections import Counter
from collections.abc import Callable
from typing import Any

from simulation.checks import SETTLE_S
from simulation.network import Fault, Path, Receiver
from simulation.process import Condition, ShardProcess

from silvershard.deploy.activate import want
from silvershard.deploy.cluster_size import Scaled, in_force, size_of
from silvershard.deploy.control_store import LIVE, wanted
from silvershard.deploy.errors import Refused
from silvershard.shard.errors import StateError


class Faults:
    """Breaks things at random until the clients have sent everything."""

    def __init__(self, world: Any) -> None:
        self.counts: Counter[str] = Counter()
        self._world = world
        self._draw = random.Random(f"{world.seed}/faults")
        self._conditions: dict[Path, Condition] = {}
        self._mends: dict[asyncio.TimerHandle, Callable[[], None]] = {}
        self._running: set[asyncio.Task[None]] = set()
        kinds: dict[Callable[[], bool], float] = {
            self._drop: 22,
            self._repeat: 28,
            self._delay: 30,
            self._break_stream: 2,
            self._cut_path: 2,
            self._slow_down: 1.5,
            self._jump: 2,
            self._stall_log: 4,
            self._late_map: 4,
            self._old_map: 1,
            self._stop: 0.8,
            self._kill: 0.5,
            self._kill_all: 0.03,
            self._replace: 0.2,
            self._cut_host: 0.06,
            self._kill_supervisor: 0.25,
            self._take_over: 0.15,
            self._store_down: 0.4,
            self._kill_router: 0.08,
            self._burst: 0.12,
            self._activate: 0.4,
            self._roll_back: 0.15,
            self._scale: 0.4,
            self._call_off: 0.05,
        }
        self._kinds = list(kinds)
        self._weights = list(kinds.values())

    async def run(self) -> None:
        """Break things; at the end everything is mended."""
        world, plan = self._world, self._world.plan
        made, most = 0, plan.steps or plan.requests
        while not world.is_over and made < most:
            wanted_now = int(world.sent * plan.faults_per_request)
            while sum(self.counts.values()) < wanted_now and made < most:
                kind = self._draw.choices(self._kinds, self._weights)[0]
                if kind():
                    made += 1
                    self.counts[kind.__name__.lstrip("_").replace("_", " ")] += 1
            await asyncio.sleep(0.02 * self._draw.random())
        for handle, mend in list(self._mends.items()):
            handle.cancel()
            mend()
        self._mends.clear()
        while self._running:
            await asyncio.wait(list(self._running))

    def is_whole(self, node: Receiver, process: ShardProcess, since_s: float) -> bool:
        """Return whether nothing is wrong between a router and a process since then.

        A router needs a moment to connect again; a message that is lost concerns but one call.
        """
        path = self._world.network.path(node, process.address)
        condition = self._conditions.get(path)
        hurt = condition is not None and not condition.is_good_since(since_s - SETTLE_S)
        return not (hurt or path.is_cut or path.hurt_s >= since_s)

    def _condition(self, path: Path) -> Condition:
        if path not in self._conditions:
            self._conditions[path] = Condition(self._world.loop)
        return self._conditions[path]

    def _for(self, seconds: float, mend: Callable[[], None]) -> None:
        """Mend something later, at the latest at the end."""

        def now() -> None:
            self._mends.pop(handle, None)
            mend()

        handle = self._world.loop.call_later(seconds, now)
        self._mends[handle] = mend

    def _process(self) -> ShardProcess | None:
        living = [one for one in self._world.engine.all if one.shard_server is not None]
        return self._draw.choice(living) if living else None

    def _path(self) -> Path | None:
        process = self._process()
        node = self._draw.choice(self._world.nodes)
        return None if process is None else self._world.network.path(node, process.address)

    def _message(self, kind: str) -> bool:
        path = self._path()
        if path is None or not path.calls:
            return False
        # A stream does not repeat what a client says.
        back = kind == "twice" or self._draw.random() < 0.5
        late_s = self._draw.choice((0.002, 0.02, 0.2)) * self._draw.random()
        path.faults[back].append(Fault(kind, late_s))
        self._world.say(kind, path.client.name, path.address, "back" if back else "", late_s)
        return True

    def _drop(self) -> bool:
        return self._message("drop")

    def _repeat(self) -> bool:
        return self._message("twice")

    def _delay(self) -> bool:
        return self._message("late")

    def _break_stream(self) -> bool:
        path = self._path()
        if path is None or not path.calls:
            return False
        call = self._draw.choice(list(path.calls))
        self._condition(path).hurt_until(self._world.loop.now_s)
        self._world.say("break", path.client.name, path.address)
        call.lose("connection reset by peer")
        return True

    def _cut_path(self) -> bool:
        path = self._path()
        if path is None:
            return False
        seconds = self._draw.choice((0.05, 0.3, 3.0)) * self._draw.random()
        condition = self._condition(path)
        condition.worsen()
        path.cut()
        self._world.say("cut", path.client.name, path.address, seconds)

        def mend() -> None:
            condition.better()
            path.heal()

        self._for(seconds, mend)
        return True

    def _slow_down(self) -> bool:
        process = self._process()
        if process is None or process.slowness > 1:
            return False
        factor = self._draw.choice((3, 10, 100, 1000))
        process.slowness *= factor
        process.condition.worsen()
        self._world.say("slow", process.name, factor)

        def mend() -> None:
            process.slowness /= factor
            process.condition.better()

        self._for(self._draw.random(), mend)
        return True

    def _jump(self) -> bool:
        """Let the clock of a process jump; a monotonic one never goes back."""
        process = self._process()
        if process is None:
            return False
        process.clock_offset_s += self._draw.choice((0.01, 1.0, 60.0))
        self._world.jumped_s = self._world.loop.now_s
        self._world.say("clock jumps", process.name)
        return True

    def _stall_log(self) -> bool:
        process = self._process()
        if process is None or process.is_stalled or self._world.catalogue.log is None:
            return False
        process.is_stalled = True
        process.log_condition.worsen()
        self._world.say("stall", process.name)

        def mend() -> None:
            process.is_stalled = False
            process.log_condition.better()
            for tail in list(process.tails):
                tail.hurry()

        self._for(2 * self._draw.random(), mend)
        return True

    def _late_map(self) -> bool:
        node = self._draw.choice(self._world.nodes)
        if node.view.is_late:
            return False
        node.view.is_late = True
        self._world.say("late map", node.name)

        def mend() -> None:
            node.view.is_late = False

        self._for(self._draw.random(), mend)
        return True

    def _old_map(self) -> bool:
        """Let a router find an older map than before for a while."""
        node = self._draw.choice(self._world.nodes)
        if node.view.is_old:
            return False
        node.view.is_old = True
        self._world.say("old map", node.name)

        def mend() -> None:
            node.view.is_old = False

        self._for(0.3 * self._draw.random(), mend)
        return True

    def _stop(self) -> bool:
        process = self._process()
        if process is None or process.is_stopped:
            return False
        process.stop()
        self._world.say("stop", process.name)

        def mend() -> None:
            if process.is_stopped:
                self._world.say("resume", process.name)
                process.resume()

        self._for(self._draw.choice((0.05, 0.5, 4.0)) * self._draw.random(), mend)
        return True

    def _kill(self) -> bool:
        process = self._process()
        if process is not None:
            self._world.kill(process, "")
        return process is not None

    def _kill_all(self) -> bool:
        """End every process of a shard."""
        shard = self._draw.randrange(self._world.board.newest.num_shards)
        for process in [one for one in self._world.engine.all if one.place.shard == shard]:
            self._world.kill(process, "all")
        return True

    def _replace(self) -> bool:
        """Start another incarnation although the one before lives, and goes on for a while."""
        process = self._process()
        engine = self._world.engine
        if process is None or not engine.is_newest(process):
            return False
        self._world.say("replace", process.name)
        engine.replace(process.place)

        def end() -> None:
            if process in engine.all:
                self._world.kill(process, "replaced")

        self._for(0.5 + 3 * self._draw.random(), end)
        return True

    def _cut_host(self) -> bool:
        world = self._world
        host = f"host{self._draw.randrange(world.num_hosts)}"
        world.say("cut", host)
        world.network.cut_host(host)
        touched = [one for one in world.engine.all if one.host == host]
        for process in touched:
            process.condition.worsen()
        seconds = self._draw.choice((0.2, 2.0, 8.0)) * self._draw.random()
        if seconds > 2.0:
            # By then the engine has noticed, too, and starts the processes elsewhere in its mind.
            for process in touched:
                if world.engine.is_newest(process):
                    self._for(2.0, lambda one=process: self._give_up(one))

        def mend() -> None:
            world.say("heal", host)
            world.network.heal_host(host)
            for process in touched:
                process.condition.better()

        self._for(seconds, mend)
        return True

    def _give_up(self, process: ShardProcess) -> None:
        """Replace a process that cannot be reached; it ends once it can be."""
        engine = self._world.engine
        if process.is_dead or not engine.is_newest(process):
            return
        self._world.say("give up", process.name)
        engine.replace(process.place)

        def end() -> None:
            if process in engine.all:
                self._world.kill(process, "replaced")

        self._for(4.0, end)

    def _kill_supervisor(self) -> bool:
        world = self._world
        if world.supervisor.is_dead:
            return False
        world.say("supervisor ends")
        world.supervisor.die()
        self._for(3 * self._draw.random(), world.restart_supervisor)
        return True

    def _take_over(self) -> bool:
        """Start another supervisor although the one before lives, and may stand still first."""
        world, before = self._world, self._world.supervisor
        if before.is_dead or before.is_stopped or world.store.is_down:
            return False
        if self._draw.random() < 0.7:
            world.say(before.name, "stands still")
            before.stop()
            self._for(4 * self._draw.random(), before.resume)
        world.restart_supervisor()
        return True

    def _store_down(self) -> bool:
        store = self._world.store
        if store.is_down or self._world.supervisor.is_dead:
            return False
        store.is_down = True
        self._world.say("store down")

        def mend() -> None:
            store.is_down = False

        self._for(self._draw.random(), mend)
        return True

    def _kill_router(self) -> bool:
        world = self._world
        at = self._draw.randrange(len(world.nodes))
        node = world.nodes[at]
        world.say("kill", node.name)
        task = asyncio.create_task(node.die())
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        world.nodes[at] = world.new_router(at)
        return True

    def _burst(self) -> bool:
        world = self._world
        if world.rate > 1:
            return False
        world.say("burst")
        world.rate = 12.0
        for node in world.nodes:
            node.condition.worsen()
        nodes = list(world.nodes)

        def mend() -> None:
            world.rate = 1.0
            for node in nodes:
                node.condition.better()

        self._for(0.4, mend)
        return True

    def _want(self, kind: Any, generation: int) -> bool:
        world = self._world
        name = f"{self._draw.getrandbits(40):010x}"
        try:
            want(world.store, wanted(kind, generation, LIVE, operation_id=name))
        except (Refused, StateError):
            return False
        world.say(kind, generation)
        return True

    def _scale(self) -> bool:
        """Want another number of shards or copies."""
        world = self._world
        if world.store.is_down:
            return False
        now = size_of(in_force(world.config, world.store.read().scaled))
        changes: dict[str, int] = {"replicas": 5 - now.replicas}
        if self._draw.random() < 0.7:
            changes = {"shards": self._draw.choice([n for n in (2, 3, 4) if n != now.shards])}
        size = now.model_copy(update=changes)
        scaled = Scaled(size=size, instead_of=size_of(world.config))
        name = f"{self._draw.getrandbits(40):010x}"
        operation = wanted("scale", 0, LIVE, operation_id=name)
        try:
            want(world.store, operation.model_copy(update={"scaled": scaled}))
        except (Refused, StateError):
            return False
        world.say("scale", size)
        return True

    def _call_off(self) -> bool:
        """Call off what is being done."""
        store = self._world.store
        going = None if store.is_down else store.read().current
        if going is None:
            return False
        self._world.say("call off", going.what)
        store.call_off(going.operation_id, "nobody wants it any more")
        return True

    def _activate(self) -> bool:
        store = self._world.store
        if store.is_down:
            return False
        others = [one for one in self._world.generations if one != store.read().live]
        return self._want("activate", self._draw.choice(others))

    def _roll_back(self) -> bool:
        store = self._world.store
        if store.is_down or not store.read().previous:
            return False
        return self._want("rollback", store.read().previous)

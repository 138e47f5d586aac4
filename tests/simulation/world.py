"""A whole cluster in virtual time: routers, shard processes, supervisor, clients and faults."""

import asyncio
import gc
import hashlib
import json
import logging
import random
import traceback
from collections import Counter, deque
from dataclasses import dataclass, field, replace
from pathlib import Path

from history.checker import BOUNDED_RECOVERY
from simulation.calls import CallLedger
from simulation.catalogue import FILTERS, NUM_USERS, Catalogue
from simulation.checks import NO_OLDER_MAP, NO_UNKNOWN_FAILURE, Asked, Checks, Violation
from simulation.faults import Faults
from simulation.network import Aborted, Context, Deliver, Network, Server
from simulation.process import Condition, Costs, Origins, ShardProcess, programs_of
from simulation.supervision import TICK_S, Board, Engine, State, Store, Supervisor, View
from simulation.virtual_time import SimulatedLoop

from silvershard.cluster import retrieval_pb2
from silvershard.cluster.config import (
    DegradeFloors,
    DegradeSection,
    PingSection,
    QuerySection,
    RouterConfig,
)
from silvershard.cluster.router import Router
from silvershard.cluster.shard_map import ShardMap
from silvershard.deploy.config import Config
from silvershard.deploy.config_sections import RuntimeSection, ShardingSection, SwapSection
from silvershard.model.spec import ServingSpec
from silvershard.shard.generations import generation_dir
from silvershard.shard.snapshot import Manifest, Snapshot

GENERATIONS = (1, 2, 3)
POLL_S = 0.1
DEFAULT_S = 2.0
"""Time of a request that states no limit."""
RECOVERY_S = 15.0
"""After the last fault everything is well again within that: the longest time that a replica is
set aside, and the time to load."""

OPERATION_S = 40.0
"""Nothing that is wanted of the cluster takes longer to be done or given up: twice the time that
the settings give it, and that of whoever leaves."""

_GROUPS_PER_S = 15.0
_GROUP = 24
"""Requests that come together at most."""
_KEPT = 40_000

_SERVICE = "/silvershard.v1.Retrieval"


@dataclass(frozen=True)
class Plan:
    """What a run is made of; the seed decides the rest."""

    seed: int
    requests: int = 20_000
    steps: int = 0
    """Faults after which no further one is made; 0: as many as belong to the requests."""
    faults_per_request: float = 0.11


@dataclass
class Outcome:
    """What a run came to."""

    plan: Plan
    trace: str
    """Hash of everything that happened, in order."""
    requests: int
    answers: int
    judged: int
    """Requests that had to be answered in full, whatever broke."""
    faults: Counter[str]
    codes: Counter[str]
    unverified: int
    """Answers with too many possible cuts to compare them."""
    virtual_s: float
    shape: str
    maps: int
    """Shard maps that were written."""
    cuts: int
    """Times that another number of shards took over."""
    terms: int
    """Supervisors that took over."""
    violations: list[Violation] = field(default_factory=list)
    last: list[str] = field(default_factory=list)
    """The last events before the first violation."""

    @property
    def replay(self) -> str:
        plan = self.plan
        steps = f" --steps {plan.steps}" if plan.steps else ""
        return (
            f"python -P tests/simulation/run.py --seed {plan.seed} --requests {plan.requests}"
            f"{steps}"
        )

    def __str__(self) -> str:
        lines = [
            f"seed {self.plan.seed}: {self.shape}; {self.requests} requests "
            f"({self.judged} had to succeed), {sum(self.faults.values())} faults, "
            f"{self.maps} maps, {self.cuts} other cuts, {self.terms} other supervisors, "
            f"{self.virtual_s:.0f} virtual s, trace {self.trace}",
            f"  answers {dict(sorted(self.codes.items()))}",
            f"  faults {dict(sorted(self.faults.items()))}",
        ]
        if self.violations:
            lines += [f"{len(self.violations)} violations:"]
            lines += [str(one) for one in self.violations[:10]]
            lines += ["the last events:", *self.last, f"replay: {self.replay}"]
        return "\n".join(lines)


class RouterNode:
    """One life of a router."""

    is_stopped = False

    def __init__(self, world: "World", name: str) -> None:
        self.name = name
        self.is_dead = False
        self.inbox: list[Deliver] = []
        self.view = View(world.board)
        self.condition = Condition(world.loop)
        self.condition.hurt_until(world.loop.now_s)
        self.named_s: dict[int, float] = {}
        """Since when its map names an incarnation, by epoch."""
        self.fenced_s: dict[int, float] = {}
        """Since when its map names a newer one in its place."""
        self.spent: dict[str, float] = {}
        """The least that hedges and retries were above their shares."""
        self.server = Server()
        self.asking: dict[asyncio.Task[None], None] = {}
        self._world = world
        self.map: ShardMap | None = None
        """By which it serves."""
        self.router = Router(
            world.router_config,
            clock=world.loop.time,
            maps=self.view,
            opener=world.open,
            dialer=world.network.dialer(self),
            rng=random.Random(f"{world.seed}/{name}"),
        )
        self.router.service.add_to(self.server)  # type: ignore[arg-type]
        self._following = world.loop.create_task(self._follow())

    async def _follow(self) -> None:
        while True:
            await self.router.follow()
            self.take_note()
            self._world.checks.budgets(self)
            await asyncio.sleep(POLL_S)

    def take_note(self) -> None:
        """Notice another map of the router."""
        shard_map = self.router._map
        if shard_map is self.map:
            return
        assert shard_map is not None
        now_s, before, self.map = self._world.loop.now_s, self.map, shard_map
        self._world.say(self.name, "serves by map", shard_map.version)
        if before is not None and before.version > shard_map.version:
            self._world.checks.violated(
                NO_OLDER_MAP, f"{self.name} takes {shard_map.version} after {before.version}"
            )
        named = {one.epoch for one in shard_map.entries}
        newest = {(one.shard, one.replica): one.epoch for one in shard_map.entries}
        for epoch in [one for one in self.named_s if one not in named]:
            del self.named_s[epoch]
        for epoch in sorted(named):
            self.named_s.setdefault(epoch, now_s)
        for process in self._world.engine.all:
            if (
                process.place.num_shards == shard_map.num_shards
                and newest.get(process.place.named, 0) > process.epoch
            ):
                self.fenced_s.setdefault(process.epoch, now_s)

    async def die(self) -> None:
        self.is_dead = True
        self._following.cancel()
        for task in list(self.asking):
            task.cancel()
        await asyncio.gather(self._following, *self.asking, return_exceptions=True)
        await self.router.stop()


class World:
    """Everything of one run."""

    def __init__(self, plan: Plan, root: Path) -> None:
        self.plan = plan
        self.seed = plan.seed
        self.loop = SimulatedLoop()
        self.draw = random.Random(f"{plan.seed}/world")
        draw = self.draw
        shards, replicas = draw.choice(((2, 2), (2, 3), (3, 2), (3, 2), (4, 2), (3, 3)))
        standby = draw.choice((0, 0, 1))
        self.num_hosts = replicas + standby + draw.choice((0, 1))
        num_routers = draw.choice((1, 2, 2))
        log_partitions = draw.choice((0, 1, 2))
        self.shape = (
            f"{shards} shards x {replicas} + {standby} on {self.num_hosts} hosts, "
            f"{num_routers} routers, {log_partitions} log partitions"
        )
        self.costs = Costs()
        self.catalogue = Catalogue(plan.seed, items=160, log_partitions=log_partitions)
        self.config = Config(
            sharding=ShardingSection(shards=shards, replicas=replicas, standby=standby),
            runtime=RuntimeSection(crash_window_s=0.001, hang_s=2.0),
            query=QuerySection(deadline_max_ms=3000),
            swap=SwapSection(timeout_s=15.0, drain_ms=3000, keep_previous=draw.random() < 0.7),
        )
        self.router_config = RouterConfig(
            map_path="simulated",
            drain_s=0.0,
            query=self.config.query,
            ping=PingSection(),
            degrade=DegradeSection(
                floors=DegradeFloors(nprobe=1, ann_k=12, required_tasks=("origin",))
            ),
        )
        self._root = root
        self._hash = hashlib.blake2b(digest_size=12)
        self._events: deque[str] = deque(maxlen=_KEPT)
        self.network = Network(self.loop, plan.seed)
        self.ledger = CallLedger(self)
        self.board = Board()
        self.store = Store()
        self.origins = Origins()
        self.epochs = 0
        self._specs = {one: self._published(one) for one in GENERATIONS}
        self.programs = programs_of(self._specs[1])
        self.state = State(root, self.store)
        self.checks = Checks(self)
        self.sent = 0
        self.rate = 1.0
        """What the clients send / what they usually send."""
        self.is_over = False
        self.jumped_s = float("-inf")
        """When the clock of a process jumped last."""
        self.generations = GENERATIONS
        self._num_routers = num_routers
        self._routers = 0
        self.nodes: list[RouterNode] = []
        self.sessions: dict[int, tuple[int, ...]] = {}

    def _published(self, generation: int) -> ServingSpec:
        """Write what is read of a generation besides its tensors; return its spec."""
        spec = self.catalogue.spec(generation)
        folder = generation_dir(self._root, generation)
        folder.mkdir(parents=True, exist_ok=True)
        document = {
            "spec": spec.model_dump(mode="json"),
            "content_hash": f"{generation:064x}",
            "files": {},
        }
        (folder / "manifest.json").write_text(json.dumps(document))
        return spec

    def spec(self, generation: int) -> ServingSpec:
        return self._specs[generation]

    def path(self, generation: int) -> Path:
        return generation_dir(self._root, generation)

    def open(self, path: Path) -> Snapshot:
        """Return a generation as a router opens it."""
        number = int(path.name.rpartition("-")[2])
        spec = self._specs[number]
        return Snapshot(path, Manifest.model_construct(spec=spec, content_hash=f"{number:064x}"))

    def say(self, *words: object) -> None:
        """Write an event down."""
        text = f"{self.loop.now_s:.6f} {' '.join(map(str, words))}"
        self._hash.update(text.encode())
        self._events.append(text)

    def publish(self, made: ShardMap) -> None:
        self.board.add(made, self.loop.now_s)
        entries = " ".join(f"{one.shard}.{one.replica}@{one.epoch}" for one in made.entries)
        self.say("map", made.version, "generation", made.generation, "names", entries)

    def kill(self, process: ShardProcess, why: str) -> None:
        self.say("kill", process.name, why)
        process.die()
        self.engine.died(process)

    def restart_supervisor(self) -> None:
        """Let another supervisor take over, whatever became of the one before."""
        if self.store.is_down:
            self.loop.call_later(TICK_S, self.restart_supervisor)
            return
        self.lives += 1
        self.say("supervisor", self.lives, "starts")
        live = self.store.read().live or GENERATIONS[0]
        self.supervisor = Supervisor(self, self.lives, live)
        self.supervisors.append(self.supervisor)

    def new_router(self, at: int) -> RouterNode:
        self._routers += 1
        return RouterNode(self, f"router{at}.{self._routers}")

    def run(self) -> Outcome:
        """Return what becomes of it all."""
        level, thresholds = logging.root.manager.disable, gc.get_threshold()
        logging.disable(logging.CRITICAL)
        # Little of what is made lives on, and what does is never alone.
        gc.set_threshold(20_000, 20, 50)
        asyncio.set_event_loop(self.loop)
        try:
            self.loop.run_until_complete(self._run())
        finally:
            gc.unfreeze()
            gc.set_threshold(*thresholds)
            self.loop.close()
            asyncio.set_event_loop(None)
            logging.disable(level)
        return Outcome(
            self.plan,
            self._hash.hexdigest(),
            self.sent,
            self.checks.answers,
            self.checks.judged,
            self.faults.counts,
            self.checks.codes,
            self.checks.unverified,
            self.loop.now_s - 1000.0,
            self.shape,
            len(self.board.maps),
            self.board.num_cuts - 1,
            self.board.term - 1,
            self.checks.violations,
            self._last(),
        )

    def _last(self) -> list[str]:
        if not self.checks.violations:
            return []
        first = self.checks.violations[0]
        within = [
            one for one in self._events if first.from_s - 1.0 <= float(one.split()[0]) <= first.at_s
        ]
        return within[-120:]

    async def _run(self) -> None:
        self.engine = Engine(self, GENERATIONS[0])
        self.lives = 0
        self.supervisors: list[Supervisor] = []
        self.restart_supervisor()
        self.nodes = [self.new_router(at) for at in range(self._num_routers)]
        self.faults = Faults(self)
        await self._until_whole()
        gc.collect()
        gc.freeze()
        clients = asyncio.create_task(self._send_all())
        breaking = asyncio.create_task(self.faults.run())
        writing = asyncio.create_task(self._write())
        await clients
        self.is_over = True
        await breaking
        await self._until_idle()
        await asyncio.sleep(RECOVERY_S)
        await self._ask_again()
        writing.cancel()
        await asyncio.sleep(RECOVERY_S)
        self.checks.quiescence()
        await self._end()

    async def _until_whole(self) -> None:
        until_s = self.loop.now_s + 10
        while not self.board.maps or not all(one.map for one in self.nodes):
            if self.loop.now_s > until_s:
                raise RuntimeError("the cluster does not start")
            await asyncio.sleep(0.05)
        await asyncio.sleep(2.0)

    async def _until_idle(self) -> None:
        """Wait until what was wanted of the cluster is done, or was given up."""
        until_s = self.loop.now_s + OPERATION_S
        while self.store.read().current is not None:
            if self.loop.now_s > until_s:
                self.checks.violated(BOUNDED_RECOVERY, f"{self.store.read().current}")
                return
            await asyncio.sleep(TICK_S)

    async def _end(self) -> None:
        for one in self.supervisors:
            one.die()
        for node in self.nodes:
            await node.die()
        for process in list(self.engine.all):
            process.die()
        await asyncio.sleep(RECOVERY_S)
        self.checks.ended()

    async def _write(self) -> None:
        """Write to the update log."""
        log = self.catalogue.log
        while log is not None:
            await asyncio.sleep(self.draw.expovariate(8.0))
            log.toggle(self.draw.randrange(len(self.catalogue.ids)), self.loop.now_s)
            for process in self.engine.all:
                for tail in list(process.tails):
                    tail.hurry()

    async def _send_all(self) -> None:
        """Send requests, whether or not the ones before are answered."""
        asking: set[asyncio.Task[None]] = set()
        while self.sent < self.plan.requests:
            await asyncio.sleep(self.draw.expovariate(_GROUPS_PER_S * self.rate))
            task = self._send_group()
            asking.add(task)
            task.add_done_callback(asking.discard)
        while asking:
            await asyncio.wait(list(asking))

    def _send_group(self) -> "asyncio.Task[None]":
        draw, node = self.draw, self.draw.choice(self.nodes)
        size = 1 if draw.random() < 0.2 else draw.randint(2, 2 * _GROUP)
        limit_s = draw.choices((DEFAULT_S, 0.5, 0.08, 0.005), (80, 10, 7, 3))[0]
        asked = [self._drawn(node, limit_s) for _ in range(size)]
        cancel_s = draw.random() * 0.01 if draw.random() < 0.02 else None
        if cancel_s is not None:
            self.faults.counts["cancelled request"] += size
        elif limit_s < 0.01:
            self.faults.counts["expired request"] += size
        return self._ask(node, asked, cancel_s)

    def _drawn(self, node: RouterNode, limit_s: float) -> Asked:
        draw = self.draw
        self.sent += 1
        session = draw.randrange(40)
        after: tuple[int, ...] = ()
        if draw.random() < 0.04:
            after = self.sessions.get(session, ())
        count = len(self.catalogue.ids)
        excluded = tuple(
            int(self.catalogue.ids[draw.randrange(count)])
            for _ in range(draw.choice((0, 0, 0, 0, 3)))
        )
        return Asked(
            number=self.sent,
            node=node,
            user=draw.randrange(NUM_USERS),
            text=draw.choice(FILTERS) if draw.random() < 0.3 else "",
            k=draw.choice((5, 10, 16)),
            exact=draw.random() < 0.05,
            excluded=excluded,
            titles=draw.random() < 0.01,
            min_coverage=draw.choices((None, 0.0, 1.0), (6, 3, 1))[0],
            session=session,
            after=after,
            limit_s=limit_s,
            sent_s=self.loop.now_s,
        )

    def _ask(
        self, node: RouterNode, asked: list[Asked], cancel_s: float | None
    ) -> "asyncio.Task[None]":
        task = asyncio.create_task(self._ask_now(node, asked))
        node.asking[task] = None
        task.add_done_callback(lambda one: node.asking.pop(one, None))
        limit_s = asked[0].limit_s
        if limit_s != DEFAULT_S:
            # A client that stated its limit waits no longer, and its connection says so.
            cancel_s = limit_s if cancel_s is None else min(limit_s, cancel_s)
        if cancel_s is not None:
            self.loop.call_later(cancel_s, task.cancel)
        return task

    async def _ask_now(self, node: RouterNode, asked: list[Asked]) -> None:
        node.take_note()
        asked = [replace(one, map=node.map) for one in asked]
        limit_s = asked[0].limit_s
        # Who states no limit has that of the router, which nobody else enforces.
        context = Context(limit_s if limit_s != DEFAULT_S else None)
        first, last = asked[0].number, asked[-1].number
        self.say("ask", f"{first}..{last}", node.name, f"{asked[0].limit_s} s")
        try:
            if len(asked) == 1:
                handler = node.server.handler(f"{_SERVICE}/Retrieve")
                response = await handler.unary_unary(asked[0].message(), context)
                self.checks.answered(asked[0], response)
                return
            batch = retrieval_pb2.RetrieveBatchRequest(requests=[one.message() for one in asked])
            handler = node.server.handler(f"{_SERVICE}/RetrieveBatch")
            reply = await handler.unary_unary(batch, context)
            for one, item in zip(asked, reply.items, strict=True):
                if item.HasField("response"):
                    self.checks.answered(one, item.response)
                else:
                    self.checks.failed(one, item.code, item.reason)
        except Aborted as error:
            for one in asked:
                self.checks.failed(one, error.code.value[0], error.details)
        except asyncio.CancelledError:
            self.checks.codes["cancelled"] += len(asked)
            self.say("cancelled", f"{first}..{last}")
        except Exception as error:  # noqa: BLE001  # whatever it is, it is a violation
            trace = "".join(traceback.format_exception(error))
            self.checks.violated(NO_UNKNOWN_FAILURE, trace, asked[0])

    async def _ask_again(self) -> None:
        """Ask when everything has had time to recover: each request must be answered in full."""
        self.checks.is_recovered = True
        for _ in range(20):
            for node in self.nodes:
                await self._ask(node, [self._drawn(node, DEFAULT_S) for _ in range(4)], None)

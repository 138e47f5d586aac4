"""A shard process: the real server of a shard over a pipeline whose answers are known.

Its model thread computes in virtual time: a function runs at the moment at which it gets the
thread, sees a clock that goes on by what it spends, and its result is there when that has passed.
"""

import asyncio
import random
from collections import deque
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from simulation.catalogue import FILTERS, LOG_ID, Catalogue, Cut
from simulation.network import Deliver, Server, host_of
from simulation.virtual_time import Inline, SimulatedLoop
from torch import Tensor

from silvershard.cluster.follower import UpdateCounts
from silvershard.cluster.freshness import Lag
from silvershard.cluster.hosting import Loaded
from silvershard.cluster.shard_map import ShardEntry
from silvershard.cluster.shard_server import ShardServer
from silvershard.model.compiled_request import compile_request
from silvershard.model.request import Request
from silvershard.model.spec import ServingSpec
from silvershard.model.stages import Proceed, always
from silvershard.model.two_tower import Encoded
from silvershard.model.types import Cutoffs, RoundOne, RoundTwo, Work
from silvershard.shard.errors import CandidatesExpired
from silvershard.shard.page_pool import PoolUsage


class Place(NamedTuple):
    """What a process is there for, whichever incarnation it is."""

    shard: int
    copy: int
    num_shards: int

    @property
    def named(self) -> tuple[int, int]:
        """Return what the map calls it."""
        return self.shard, self.copy


class Condition:
    """Since when nothing is wrong with something."""

    def __init__(self, loop: SimulatedLoop) -> None:
        self._loop = loop
        self._troubles = 0
        self._bad_s = float("-inf")

    def worsen(self) -> None:
        self._troubles += 1

    def better(self) -> None:
        """Take one trouble back."""
        self._troubles -= 1
        self._bad_s = max(self._bad_s, self._loop.now_s)

    def hurt_until(self, until_s: float) -> None:
        self._bad_s = max(self._bad_s, until_s)

    def is_good_since(self, since_s: float) -> bool:
        return not self._troubles and self._bad_s < since_s


@dataclass(slots=True)
class Origin:
    """One second round of one process: what every item of an answer says it comes from."""

    process: "ShardProcess"
    generation: int
    cut: Cut
    received_s: float = float("inf")
    """When the router received it."""


class Origins:
    """All origins, by a number that a float32 holds exactly."""

    def __init__(self) -> None:
        self._all: dict[int, Origin] = {}
        self._next = 0

    def add(self, origin: Origin) -> int:
        # Answers live for seconds; so many are not made in that time.
        self._next = self._next % (1 << 20) + 1
        self._all[self._next] = origin
        return self._next

    def __getitem__(self, number: int) -> Origin:
        return self._all[number]


class ModelThread(Inline):
    """The one thread that owns the model, in virtual time."""

    def __init__(self, process: "ShardProcess", loop: SimulatedLoop) -> None:
        self.spent_s = 0.0
        """By the function that runs at this moment."""
        self._process = process
        self._loop = loop
        self._waiting: deque[tuple[asyncio.Future[Any], Callable[..., Any], tuple[Any, ...]]] = (
            deque()
        )
        self._is_busy = False
        self._running: asyncio.Future[Any] | None = None

    def run(self, work: Callable[..., Any], *args: Any) -> "asyncio.Future[Any]":
        done = self._loop.create_future()
        if self._process.is_dead:
            done.cancel()
            return done
        self._waiting.append((done, work, args))
        if not self._is_busy:
            self._next()
        return done

    def submit(self, work: Callable[..., Any], /, *args: Any, **_: Any) -> "Future[Any]":
        self.run(work, *args)
        return Future()

    def spend(self, seconds: float) -> None:
        """Let the function that runs take so long."""
        self.spent_s += seconds * self._process.slowness

    def die(self) -> None:
        for done, _, _ in self._waiting:
            done.cancel()
        self._waiting.clear()
        if self._running is not None:
            self._running.cancel()

    def _next(self) -> None:
        self._is_busy = bool(self._waiting)
        if not self._waiting:
            return
        if self._process.is_stopped:
            self._process.inbox.append(self._next)
            return
        done, work, args = self._waiting.popleft()
        self._running = done
        self.spent_s = 0.0
        result, error = None, None
        try:
            result = work(*args)
        except Exception as raised:  # noqa: BLE001  # told to whoever waits
            error = raised
        spent_s, self.spent_s = self.spent_s, 0.0
        if spent_s:
            self._loop.call_later(spent_s, self._end, done, result, error)
        else:
            self._end(done, result, error)

    def _end(self, done: "asyncio.Future[Any]", result: Any, error: Exception | None) -> None:
        if self._process.is_dead:
            done.cancel()
            return
        if self._process.is_stopped:
            self._process.inbox.append(lambda: self._end(done, result, error))
            return
        if not done.done():
            if error is not None:
                done.set_exception(error)
            else:
                done.set_result(result)
        if self._waiting:
            # Whoever waits on the loop goes first, as the thread and the loop run side by side.
            self._loop.call_soon(self._next)
        else:
            self._is_busy = False


class _Open(NamedTuple):
    """Candidates of B requests, R of each, best first."""

    places: NDArray[np.int64]
    """``(B, R)``"""
    is_one: NDArray[np.bool_]
    """``(B, R)``; False is padding, which comes last."""
    users: NDArray[np.int64]
    """``(B, 1)``"""
    cut: Cut
    expires_at_s: float
    ks: NDArray[np.int64]
    """``(B, 1)``"""


class Costs(NamedTuple):
    """Seconds that a call takes, without chance."""

    encode: float = 0.0004
    count: float = 0.0003
    open: float = 0.0012
    close: float = 0.0008
    fields: float = 0.0003


class Pipeline:
    """The part of a generation that one process holds, as its server uses it."""

    def __init__(self, process: "ShardProcess", generation: int) -> None:
        self.spec: ServingSpec = process.world.spec(generation)
        self.shard, _, self.num_shards = process.place
        self._process = process
        self._catalogue: Catalogue = process.world.catalogue
        self._scores = self._catalogue.scores(generation)
        self._mine = self._catalogue.cut_into(self.num_shards).masks[self.shard]
        self._open: dict[str, _Open] = {}
        log = self._catalogue.log
        self.cut: Cut = (0,) * len(log.end) if log is not None else ()
        self.documents = 0
        self.move(self.cut)

    @property
    def num_open(self) -> int:
        return len(self._open)

    def is_open(self, key: str) -> bool:
        return key in self._open

    def move(self, cut: Cut) -> None:
        """Apply the log up to a cut."""
        self.cut = cut
        self.documents = self._catalogue.documents(self.num_shards, self.shard, cut)

    def usage(self) -> PoolUsage:
        return PoolUsage(8, 4, self.documents, 0, 64, 1, 1.0, 0)

    def encode(self, users: Sequence[Mapping[str, Any]]) -> Encoded:
        self._spend(self._process.world.costs.encode)
        rows = [[float(one["user"][0])] for one in users]
        embedding = torch.tensor(rows).view(len(rows), 1, 1)
        return Encoded(embedding, torch.zeros(len(rows), 1), ((),) * len(rows))

    def count(self, scan: Tensor) -> Tensor:
        self._spend(self._process.world.costs.count)
        alive = self._catalogue.alive(self.cut) & self._mine
        texts = self._texts(scan)
        counts = [int((alive & self._catalogue.passes[text]).sum()) for text in texts]
        return torch.tensor(counts)

    def open(
        self, key: str, work: Work, expires_at_s: float, proceed: Proceed = always
    ) -> RoundOne:
        self.expire()
        self._spend(self._process.world.costs.open * 0.7)
        proceed("scan")
        self._spend(self._process.world.costs.open * 0.3)
        users = work.embedding[:, 0, :].numpy().astype(np.int64)
        alive = self._catalogue.alive(self.cut) & self._mine
        there = np.stack([alive & self._catalogue.passes[text] for text in self._texts(work.scan)])
        for row, out in enumerate(work.exclude.tolist()):
            for one in out:
                if one in self._catalogue.place_of:
                    there[row, self._catalogue.place_of[one]] = False
        order = self._scores.order[users[:, 0]]
        found = np.take_along_axis(there, order, axis=1)
        found &= np.cumsum(found, axis=1) <= work.ann_k.numpy()[:, None]
        counts = found.sum(axis=1, keepdims=True)
        is_one = np.arange(counts.max()) < counts
        places = np.zeros(is_one.shape, dtype=np.int64)
        places[is_one] = order[found]
        self._open[key] = _Open(
            places, is_one, users, self.cut, expires_at_s, work.k.numpy()[:, None]
        )
        scores = np.where(is_one, self._scores.scan[users, places], np.float32(-np.inf))
        none = torch.zeros(len(places), dtype=torch.int64)
        return RoundOne(
            torch.from_numpy(scores[:, None, :]),
            torch.from_numpy(np.where(is_one, self._catalogue.ids[places], -1)[:, None, :]),
            none + self.documents,
            none + places.shape[1],
            torch.zeros(len(places), 0),
            torch.zeros(len(places), 0, dtype=torch.int64),
            {"scan": 1000},
        )

    def close(self, key: str, cutoffs: Cutoffs, proceed: Proceed = always) -> RoundTwo:
        self.expire()
        query = self._open.get(key)
        if query is None:
            raise CandidatesExpired(key)
        self._spend(self._process.world.costs.close * 0.5)
        proceed("rerank")
        self._spend(self._process.world.costs.close * 0.5)
        origin = self._process.world.origins.add(
            Origin(self._process, self.spec.generation, query.cut)
        )
        least, last = cutoffs.scores[:, :1].numpy(), cutoffs.item_ids[:, :1].numpy()
        scan, ids = self._scores.scan[query.users, query.places], self._catalogue.ids[query.places]
        passed = query.is_one & ((scan > least) | ((scan == least) & (ids <= last)))
        worth = np.where(passed, self._scores.worth[query.users, query.places], len(self._mine))
        best = np.argsort(worth, axis=1)[:, : max(int(query.ks.max()), 1)]
        kept = passed.sum(axis=1, keepdims=True)
        is_one = np.arange(best.shape[1]) < np.minimum(kept, query.ks)
        width = int(is_one.sum(axis=1).max())
        best, is_one = best[:, :width], is_one[:, :width]
        places = np.take_along_axis(query.places, best, axis=1)
        values = np.where(is_one, self._scores.value[query.users, places], np.float32(-np.inf))
        found, counts = torch.from_numpy(values), torch.from_numpy(kept[:, 0])
        return RoundTwo(
            torch.from_numpy(np.where(is_one, self._catalogue.ids[places], -1)),
            found,
            found,
            torch.full((*values.shape, 1), float(origin)),
            counts,
            torch.zeros(len(kept), dtype=torch.int64),
            counts,
            {"rerank": 1000},
        )

    def release(self, key: str) -> None:
        self._open.pop(key, None)

    def expire(self) -> None:
        now_s = self._process.clock()
        for key in [key for key, one in self._open.items() if one.expires_at_s <= now_s]:
            del self._open[key]

    def fields(
        self, item_ids: Sequence[int], names: Sequence[str], key: str | None = None
    ) -> dict[str, list[Any]]:
        self._spend(self._process.world.costs.fields)
        query = self._open[key or ""]
        alive = self._catalogue.alive(query.cut) & self._mine
        titles = [
            f"{self.spec.generation}/{one}" if alive[self._catalogue.place_of[one]] else None
            for one in item_ids
        ]
        return {name: list(titles) for name in names}

    def _texts(self, scan: Tensor) -> list[str]:
        known = self._process.world.programs
        return [known[row.tobytes().rstrip(b"\0")] for row in scan.numpy()]

    def _spend(self, seconds: float) -> None:
        self._process.thread.spend(seconds * self._process.draw.lognormvariate(0.0, 0.25))


def programs_of(spec: ServingSpec) -> dict[bytes, str]:
    """Return which filter a compiled program is of."""
    made = {
        compile_request(Request(features={"user": [0.0]}, k=1, filter=text), spec)
        .scan.numpy()
        .tobytes()
        .rstrip(b"\0"): text
        for text in FILTERS
    }
    assert len(made) == len(FILTERS)
    return made


class Tail:
    """Follows the log for one pipeline, each at its own pace; what ``Hosting`` takes a follower
    for."""

    log_id = LOG_ID
    failure = ""
    trouble = ""

    def __init__(self, process: "ShardProcess", pipeline: Pipeline) -> None:
        self.counts = UpdateCounts()
        self._process = process
        self._pipeline = pipeline
        log = process.world.catalogue.log
        assert log is not None
        self._log = log
        self._looked_s = float("-inf")
        self._ends: Cut = log.end
        self._tell: Callable[[], None] = lambda: None
        self._is_on = self._is_due = False

    @property
    def lag(self) -> Lag:
        return Lag(self._pipeline.cut, self._ends, self._looked_s, float("inf"), self._looked_s)

    @property
    def staleness_s(self) -> float:
        oldest_s = min(
            (
                written[position]
                for written, position in zip(self._log.written_s, self._pipeline.cut, strict=True)
                if position < len(written)
            ),
            default=self._process.world.loop.now_s,
        )
        return self._process.world.loop.now_s - oldest_s

    def catch_up(self) -> None:
        self._pipeline.move(self._log.end)

    def start(self, tell: Callable[[], None]) -> None:
        self._tell, self._is_on = tell, True
        self._process.tails[self] = None
        self.hurry()

    def stop(self) -> None:
        self._is_on = False
        self._process.tails.pop(self, None)

    def hurry(self) -> None:
        """Look at the log soon."""
        if not self._is_due and self._is_on:
            self._is_due = True
            pause_s = 0.001 + 0.03 * self._process.draw.random()
            self._process.world.loop.call_later(pause_s, self._look)

    def _look(self) -> None:
        self._is_due = False
        process = self._process
        if not self._is_on or process.is_dead:
            return
        if process.is_stopped:
            process.inbox.append(self._look)
        elif not process.is_stalled:
            self._looked_s, self._ends = process.clock(), self._log.end
            process.thread.submit(self._apply, self._ends)

    def _apply(self, cut: Cut) -> None:
        self._process.thread.spend(0.0001)
        if self._is_on:
            self._pipeline.move(tuple(map(max, cut, self._pipeline.cut)))
            self._tell()


@dataclass(eq=False)
class ShardProcess:
    """One incarnation of a copy of a shard."""

    world: Any
    place: Place
    address: str
    epoch: int
    pid: int
    is_dead: bool = False
    is_stopped: bool = False
    is_stalled: bool = False
    """Whether it does not get at the log."""
    slowness: float = 1.0
    clock_offset_s: float = 0.0
    entry: ShardEntry | None = None
    """Once it serves."""
    inbox: list[Deliver] = field(default_factory=list)
    streams: dict[Any, None] = field(default_factory=dict)
    tails: dict[Tail, None] = field(default_factory=dict)
    tasks: dict[asyncio.Task[Any], None] = field(default_factory=dict)
    prepared_s: dict[int, float] = field(default_factory=dict)
    """When each generation was loaded."""

    def __post_init__(self) -> None:
        loop: SimulatedLoop = self.world.loop
        shard, copy, num_shards = self.place
        self.name = f"shard {shard}.{copy} of {num_shards} epoch {self.epoch}"
        self.draw = random.Random(f"{self.world.seed}/{self.name}")
        self.condition = Condition(loop)
        self.log_condition = Condition(loop)
        self.thread = ModelThread(self, loop)
        self.server = Server()
        self.clock_offset_s = self.draw.uniform(-500, 500)
        self.shard_server: ShardServer | None = None

    @property
    def host(self) -> str:
        return host_of(self.address)

    def clock(self) -> float:
        return self.world.loop.now_s + self.clock_offset_s + self.thread.spent_s

    def start(self, work: Coroutine[Any, Any, Any]) -> "asyncio.Task[Any]":
        """Run something in this process; it ends with it."""
        task = self.world.loop.create_task(work)
        self.tasks[task] = None
        task.add_done_callback(lambda one: self.tasks.pop(one, None))
        return task

    async def serve(self, generation: int, path: Path) -> None:
        """Load the first generation and serve."""
        loaded = self._load(path, lambda: None)
        if loaded.follow is not None:
            loaded.follow(lambda *_: ()).catch_up()
        self.shard_server = ShardServer(
            loaded,  # type: ignore[arg-type]
            snapshot=str(path),
            load=self._load,
            replica=self.place.copy,
            epoch=self.epoch,
            clock=self.clock,
            model_thread=self.thread,
            spawn=self._spawn,
        )
        await self.shard_server.serve(self.server)  # type: ignore[arg-type]
        self.entry = ShardEntry(
            shard=self.place.shard,
            replica=self.place.copy,
            address=self.address,
            epoch=self.epoch,
            documents=self.world.catalogue.documents(self.place.num_shards, self.place.shard, ()),
            pid=self.pid,
        )

    def _load(self, path: Path, check: Callable[[], None]) -> Loaded:
        check()
        generation = int(path.name.rpartition("-")[2])
        pipeline = Pipeline(self, generation)
        self.prepared_s[generation] = self.world.loop.now_s
        if self.world.catalogue.log is None:
            return Loaded(pipeline)  # type: ignore[arg-type]
        return Loaded(pipeline, lambda _: Tail(self, pipeline))  # type: ignore[arg-type,return-value]

    def _spawn(self, work: Callable[[], None], name: str) -> None:
        """Run what would have a thread of its own."""
        delay_s = self.draw.uniform(0.05, 0.6) if name.startswith("prepare") else 0.001

        def run() -> None:
            if self.is_stopped:
                self.inbox.append(run)
            elif not self.is_dead:
                work()

        self.world.loop.call_later(delay_s, run)

    def serves(self, generation: int, since_s: float) -> bool:
        """Return whether it has served a generation at least since then."""
        if self.shard_server is None or self.is_dead:
            return False
        served = {one.generation for one in self.shard_server.hosting.served}
        return generation in served and self.prepared_s.get(generation, 1e18) <= since_s

    def stop(self) -> None:
        """Let it stand still."""
        self.condition.worsen()
        self.is_stopped = True
        self.world.network.stood_still(self)

    def resume(self) -> None:
        self.condition.better()
        self.is_stopped = False
        inbox, self.inbox = self.inbox, []
        for deliver in inbox:
            if not self.is_dead:
                deliver()

    def die(self) -> None:
        """End at once."""
        if self.is_dead:
            return
        self.condition.worsen()
        self.is_dead = True
        network = self.world.network
        if network.processes.get(self.address) is self:
            del network.processes[self.address]
        for call in list(self.streams):
            call.reset()
        self.thread.die()
        for tail in list(self.tails):
            tail.stop()
        for task in list(self.tasks):
            task.cancel()
        self.inbox.clear()

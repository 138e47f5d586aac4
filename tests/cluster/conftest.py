import asyncio
import itertools
import random
import secrets
import tempfile
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch

from silvershard.cluster import coordinator
from silvershard.cluster.client import Client, Query
from silvershard.cluster.config import (
    AdmissionSection,
    ConcurrencySection,
    DegradeSection,
    HealthSection,
    HedgingSection,
    ListenSection,
    PingSection,
    QuerySection,
    RetriesSection,
    RouterConfig,
)
from silvershard.cluster.consistency import ANY, Consistency
from silvershard.cluster.coordinator import Coordinator
from silvershard.cluster.extra_calls import ExtraCalls
from silvershard.cluster.faults import FaultRecord, Faults, write_faults
from silvershard.cluster.freshness import ANYTHING, Demand, Seen
from silvershard.cluster.replica_choice import ReplicaChoice
from silvershard.cluster.rounds import Served
from silvershard.cluster.router import Router
from silvershard.cluster.shard_link import LinkState
from silvershard.cluster.shard_map import ShardEntry, ShardMap
from silvershard.cluster.shard_server import ShardServer
from silvershard.deploy.runtime import start_ray
from silvershard.model.answer import Answer
from silvershard.model.compiled_request import compile_request
from silvershard.model.merge import Merge
from silvershard.model.request import Request
from silvershard.model.retriever import Retriever, assemble
from silvershard.shard.errors import CandidatesExpired, DeadlineExceeded
from silvershard.shard.executor import ShardExecutor
from silvershard.shard.fields import FieldStore
from silvershard.shard.load import load_retriever

T = TypeVar("T")
Work = Coroutine[Any, Any, T]

HANG = "hang"


class InOrder(random.Random):
    """Chance that always takes what comes first."""

    def random(self) -> float:
        return 0.0


def choice_of(
    clock: Callable[[], float],
    *,
    rng: random.Random | None = None,
    health: HealthSection | None = None,
    hedging: HedgingSection | None = None,
    retries: RetriesSection | None = None,
    retry_burst: int = 64,
    **options: Any,
) -> ReplicaChoice:
    extra = ExtraCalls(
        hedging or HedgingSection(),
        retries or RetriesSection(),
        retry_burst=retry_burst,
        **options,
    )
    return ReplicaChoice(health or HealthSection(), extra, clock, rng or InOrder())


class FakeLink:
    """A link to an executor in this process, with faults on demand.

    ``faults[op]`` is what happens at the next calls of ``op``, one after the other: an error,
    ``HANG``, seconds of delay, or None for nothing; a callable is called first.
    """

    def __init__(self, executor: ShardExecutor, replica: int = 0) -> None:
        self.executor = executor
        self.shard = executor.shard
        self.replica = replica
        self.state = LinkState.UP
        self.faults: dict[str, list[Any]] = {}
        self.calls: list[str] = []
        self.sizes: list[int] = []
        self.released: list[str] = []
        self.opened: list[str] = []
        self.demands: list[Demand] = []
        self.seen: Seen | None = None

    @property
    def _saw(self) -> Seen:
        return self.seen or Seen(0, (), 0.0, self.executor.documents)

    def _own(self, key: str) -> str:
        """Return the name of a key on an executor that replicas share."""
        return f"{key}@{self.replica}"

    async def _call(self, op: str, remaining_s: float, work: Callable[[], T]) -> T:
        self.calls.append(op)
        faults = self.faults.get(op, [])
        fault = faults.pop(0) if faults else None
        if callable(fault):
            fault = fault()
        if isinstance(fault, Exception):
            raise fault
        await asyncio.sleep(0)
        try:
            async with asyncio.timeout(remaining_s):
                if fault == HANG:
                    await asyncio.Event().wait()
                elif fault is not None:
                    await asyncio.sleep(fault)
        except TimeoutError:
            raise DeadlineExceeded(f"shard {self.shard} did not answer") from None
        return work()

    async def encode(self, users: Any, remaining_s: float, demand: Demand = ANYTHING) -> Any:
        self.demands.append(demand)
        return await self._call(
            "encode", remaining_s, lambda: (self.executor.encode(users), self._saw)
        )

    async def count(self, scan: Any, remaining_s: float, demand: Demand = ANYTHING) -> Any:
        self.demands.append(demand)
        return await self._call("count", remaining_s, lambda: self.executor.count(scan))

    async def open(self, key: str, work: Any, remaining_s: float, demand: Demand = ANYTHING) -> Any:
        key = self._own(key)
        self.sizes.append(len(work.k))
        self.opened.append(key)
        self.demands.append(demand)
        expires_at_s = asyncio.get_running_loop().time() + remaining_s
        return await self._call(
            "open",
            remaining_s,
            lambda: (self.executor.open(key, work, expires_at_s), self._saw),
        )

    async def close(self, key: str, cutoffs: Any, remaining_s: float) -> Any:
        return await self._call(
            "close", remaining_s, lambda: self.executor.close(self._own(key), cutoffs)
        )

    async def fields(self, key: str, item_ids: Any, names: Any, remaining_s: float) -> Any:
        key = self._own(key)

        def look_up() -> Any:
            if not self.executor.is_open(key):
                raise CandidatesExpired(key)
            return self.executor.fields(item_ids, names, key)

        return await self._call("fields", remaining_s, look_up)

    def release(self, key: str) -> None:
        self.released.append(self._own(key))
        self.executor.release(self._own(key))


class Bench:
    """A coordinator over fake links, on a loop whose time passes only while everybody waits."""

    def __init__(
        self, loop: Any, generation: Any, executors: Any, replicas: int, **options: Any
    ) -> None:
        self.loop = loop
        self.generation = generation
        self.executors = executors
        self.links = [
            [FakeLink(executor, copy) for copy in range(replicas)] for executor in executors
        ]
        self.coordinator = Coordinator(
            executors[0].spec,
            len(executors),
            lambda shard: self.links[shard],
            clock=loop.time,
            **{"choice": choice_of(loop.time), **options},
        )

    @property
    def all_links(self) -> list[FakeLink]:
        return list(itertools.chain.from_iterable(self.links))

    def request(self, **more: Any) -> Request:
        history = self.generation.catalogue.item_ids[:6].tolist()
        return Request(**{"features": {"history": history}, "k": 20, **more})

    def query(
        self,
        request: Request,
        *,
        min_coverage: float = 0.0,
        deadline_s: float = 2.0,
        consistency: Consistency = ANY,
    ) -> coordinator.Query:
        now_s = self.loop.time()
        return coordinator.Query(request, min_coverage, now_s + deadline_s, now_s, consistency)

    def ask_all(self, requests: list[Request], **objective: Any) -> list[Any]:
        queries = [self.query(request, **objective) for request in requests]
        return self.loop.run_until_complete(self.coordinator.answer(queries))

    def ask(self, request: Request, **objective: Any) -> Any:
        return self.ask_all([request], **objective)[0]

    def share(self, shards: list[int]) -> float:
        documents = [self.executors[shard].documents for shard in shards]
        return sum(documents) / self.executors[0].spec.documents

    def assert_is(self, fate: Any, expected: tuple[list[int], list[float]]) -> None:
        assert isinstance(fate, Served), fate
        assert fate.answer.item_ids.tolist() == expected[0]
        assert fate.answer.scores.tolist() == expected[1]

    def assert_nothing_is_open(self) -> None:
        assert [executor.num_open for executor in self.executors] == [0] * len(self.executors)
        for link in self.all_links:
            assert set(link.opened) <= set(link.released)


class LoopThread:
    """An event loop that runs on a thread of its own, for servers beside blocking clients."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()

    def submit(self, work: Work[T]) -> Future[T]:
        return asyncio.run_coroutine_threadsafe(work, self.loop)

    def call(self, work: Work[T], timeout_s: float = 60) -> T:
        return self.submit(work).result(timeout_s)

    def close(self) -> None:
        async def finish() -> None:
            own = asyncio.current_task()
            left = [task for task in asyncio.all_tasks() if task is not own]
            for task in left:
                task.cancel()
            await asyncio.gather(*left, return_exceptions=True)

        self.call(finish())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(10)
        self.loop.close()


class LocalCluster:
    """Shard servers and a router in this process, on free loopback ports."""

    def __init__(self, thread: LoopThread, directory: Path) -> None:
        self.thread = thread
        self.map_path = directory / "map.json"
        self.servers: list[ShardServer] = []
        self.router: Router | None = None

    def start(
        self,
        executors: Sequence[ShardExecutor],
        snapshot: Path,
        *,
        ping: Any = None,
        admission: Any = None,
        degrade: Any = None,
        **query: Any,
    ) -> "LocalCluster":
        self.servers = [ShardServer(executor, epoch=7) for executor in executors]
        for server in self.servers:
            self.thread.call(server.start())
        self.publish_map(snapshot)
        self.router = Router(
            RouterConfig(
                map_path=str(self.map_path),
                poll_ms=5,
                drain_s=1.0,
                listen=ListenSection(port=0),
                query=QuerySection(**{"default_deadline_ms": 10_000, **query}),
                admission=admission or AdmissionSection(),
                degrade=degrade or DegradeSection(),
                ping=ping or PingSection(every_ms=20, suspect_after=20, eject_after=50),
            )
        )
        self.thread.call(self.router.start())
        return self

    def publish_map(
        self, snapshot: Path, *, version: int = 1, leave_out: Sequence[int] = ()
    ) -> None:
        entries = tuple(
            entry_of(server) for server in self.servers if server.executor.shard not in leave_out
        )
        ShardMap(
            version=version,
            generation=self.servers[0].generation,
            snapshot=str(snapshot),
            num_shards=self.servers[0].executor.num_shards,
            entries=entries,
        ).write_atomic(self.map_path)

    def client(self, **options: Any) -> Client:
        assert self.router is not None
        return Client(self.router.address, **options)

    def close(self) -> None:
        if self.router is not None:
            self.thread.call(self.router.stop())
        for server in self.servers:
            self.thread.call(server.stop(0))


def entry_of(server: ShardServer) -> ShardEntry:
    return ShardEntry(
        shard=server.executor.shard,
        replica=server.replica,
        address=server.address,
        epoch=server.epoch,
        documents=server.executor.documents,
        pid=1,
    )


def two_rounds(
    executors: Sequence[ShardExecutor], request: Request
) -> tuple[list[int], list[float]]:
    """Ids and scores that these shards give together, whatever other shards there are."""
    spec, merge = executors[0].spec, Merge()
    compiled = compile_request(request, spec)
    count = sum(int(one.count(compiled.scan[None])) for one in executors)
    plan = compiled.plan(spec, count if compiled.needs_count else None)
    encoded = executors[0].encode([compiled.features])
    work = assemble([compiled], [plan], encoded.embedding, encoded.user_state)
    firsts = [one.open("expected", work, float("inf")) for one in executors]
    cutoffs = merge.cutoffs(firsts, work.ann_k, work.semantic_k)
    best = merge([one.close("expected", cutoffs) for one in executors], request.k)
    for one in executors:
        one.release("expected")
    found = best.item_ids[0] >= 0
    return best.item_ids[0][found].tolist(), best.values[0][found].tolist()


def query_of(request: Request, **more: Any) -> Query:
    names = Request.__dataclass_fields__
    return Query(**{**{name: getattr(request, name) for name in names}, **more})


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def whole(generation: Any) -> Retriever:
    """The generation in one process: what every cluster must answer."""
    return load_retriever(generation.path)[0]


@pytest.fixture(scope="session")
def ask_whole(whole: Retriever) -> Callable[[Request], Answer]:
    return lambda request: whole([request])[0]


@pytest.fixture(scope="session")
def _parts(generation: Any) -> Callable[[int, int], tuple[Retriever, FieldStore]]:
    loaded: dict[tuple[int, int], tuple[Retriever, FieldStore]] = {}

    def part(shard: int, num_shards: int) -> tuple[Retriever, FieldStore]:
        key = (shard, num_shards)
        if key not in loaded:
            loaded[key] = load_retriever(generation.path, shard=shard, num_shards=num_shards)
        return loaded[key]

    return part


@pytest.fixture
def make_executors(_parts: Any) -> Callable[..., list[ShardExecutor]]:
    """``make_executors(num_shards, clock=...)`` gives fresh executors of all shards."""

    def make(num_shards: int, **options: Any) -> list[ShardExecutor]:
        return [
            ShardExecutor(*_parts(shard, num_shards), shard=shard, num_shards=num_shards, **options)
            for shard in range(num_shards)
        ]

    return make


@pytest.fixture
def make_choice(virtual: Any) -> Callable[..., ReplicaChoice]:
    """``make_choice(**sections)`` gives a choice that leaves nothing to chance."""
    return lambda **options: choice_of(virtual.time, **options)


@pytest.fixture
def run() -> Callable[[Awaitable[T]], T]:
    """Runs a coroutine on a real event loop, for at most ten seconds."""

    def run_now(work: Awaitable[T]) -> T:
        async def bounded() -> T:
            async with asyncio.timeout(10):
                return await work

        return asyncio.run(bounded())

    return run_now


@pytest.fixture
def loop_thread() -> Iterator[LoopThread]:
    thread = LoopThread()
    yield thread
    thread.close()


@pytest.fixture
def make_cluster(
    loop_thread: LoopThread, tmp_path: Path, generation: Any, make_executors: Any
) -> Iterator[Callable[..., LocalCluster]]:
    """``make_cluster(num_shards, **query)`` starts servers and a router; all end with the test."""
    clusters: list[LocalCluster] = []

    def make(
        num_shards: int, *, executors: Any = None, snapshot: Path | None = None, **options: Any
    ) -> LocalCluster:
        cluster = LocalCluster(loop_thread, tmp_path)
        clusters.append(cluster)
        path = snapshot or generation.path
        return cluster.start(executors or make_executors(num_shards), path, **options)

    yield make
    for cluster in clusters:
        cluster.close()


@pytest.fixture
def admitting() -> Callable[..., AdmissionSection]:
    """``admitting(queue, running)`` admits so many requests and runs so many batches."""

    def make(queue: int, running: int = 16, **more: Any) -> AdmissionSection:
        concurrency = ConcurrencySection(mode="fixed", min=1, max=running)
        return AdmissionSection(queue=queue, concurrency=concurrency, **more)

    return make


@pytest.fixture
def fake_link() -> type[FakeLink]:
    return FakeLink


@pytest.fixture
def make_bench(virtual: Any, generation: Any, make_executors: Any) -> Callable[..., Bench]:
    """``make_bench(num_shards, replicas=1, **options)`` gives a coordinator on a virtual clock."""

    def make(num_shards: int, replicas: int = 1, **options: Any) -> Bench:
        executors = make_executors(num_shards, clock=virtual.time)
        return Bench(virtual, generation, executors, replicas, **options)

    return make


@pytest.fixture
def suffer(tmp_path: Path) -> Callable[..., Faults]:
    """``suffer(kind, target, **more)`` makes this process suffer one fault from now on."""
    faults = Faults(tmp_path, lambda _: True)

    def order(kind: Any, target: str, *, state: Any = "active", **more: Any) -> Faults:
        record = FaultRecord(
            name="a",
            kind=kind,
            target=target,
            seconds=3600,
            state=state,
            began_unix_s=time.time(),
            **more,
        )
        write_faults(tmp_path, (record,))
        faults.look()
        return faults

    return order


@pytest.fixture
def expect() -> Callable[..., tuple[list[int], list[float]]]:
    return two_rounds


@pytest.fixture
def as_query() -> Callable[..., Query]:
    return query_of


@pytest.fixture
def map_entry() -> Callable[[ShardServer], ShardEntry]:
    return entry_of


@pytest.fixture(scope="session")
def ray() -> Iterator[Any]:
    """A Ray of these tests alone, whatever else runs on the machine.

    A process starts but one: Ray keeps the token and the processes of the first.
    """
    ray = pytest.importorskip("ray")
    with tempfile.TemporaryDirectory(prefix="ray") as home:
        token = Path(home) / "token"
        token.write_text(secrets.token_hex(32))
        # Tests that start a Ray in other processes must not find these settings.
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("RAY_AUTH_MODE", "token")
            patch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
            patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
            patch.setenv("RAY_gcs_server_port_wait_time_s", "120")
            patch.delenv("RAY_ADDRESS", raising=False)
            start_ray(
                # Without it Ray would join any other Ray that it finds here.
                address="local",
                num_cpus=2,
                include_dashboard=False,
                object_store_memory=100_000_000,
                _temp_dir=home,
                log_to_driver=False,
                configure_logging=False,
            )
        yield ray
        ray.shutdown()

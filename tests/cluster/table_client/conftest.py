import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from silvershard.cluster.config import PingSection
from silvershard.cluster.table_client import RemoteTable
from silvershard.cluster.table_config import RemoteTableSection
from silvershard.cluster.table_map import TableEntry, TableShardMap
from silvershard.cluster.table_server import TableServer
from silvershard.shard.table import TableShard
from silvershard.shard.table_plan import TablePlan
from silvershard.shard.table_rows import dequantize_rows, quantize_rows

ROWS, DIM = 5000, 16
PATIENT = PingSection(every_ms=20, suspect_after=50, eject_after=500)


class Tables:
    """The servers of a table, each on an event loop of its own, and clients of them."""

    def __init__(self, new_loop: Callable[[], Any], plan: TablePlan, values: np.ndarray) -> None:
        self.plan = plan
        self.values = values
        self.first = values.copy()
        self.changes: list[Any] = []
        self._new_loop = new_loop
        self.loops = [new_loop() for _ in range(plan.num_shards)]
        self.shards = [self._load(shard) for shard in range(plan.num_shards)]
        self.servers: list[Any] = [None] * plan.num_shards
        self.clients: list[RemoteTable] = []
        self.version = 0
        self.asked: list[int] = []
        for shard in range(plan.num_shards):
            self.start(shard)

    def _load(self, shard: int) -> TableShard:
        return TableShard.from_blocks(self.plan, shard, [self.first])

    def change(self, ids: Any, values: Any, *, shards: Any = None) -> int:
        """Change rows as a log does, in some shards at first; return the version."""
        ids = np.asarray(ids)
        self.values[ids] = values
        self.changes.append((len(self.changes) + 1, ids, self.values[ids]))
        for shard in range(self.plan.num_shards) if shards is None else shards:
            self.replay(shard)
        return len(self.changes)

    def replay(self, shard: int) -> None:
        """Let a shard apply what it has not applied yet."""
        for change in self.changes:
            self.shards[shard].apply(*change)
        self.servers[shard].advanced()

    def start(self, shard: int) -> None:
        """Serve a shard as another incarnation, which replays all changes."""
        table = self.shards[shard] = self._load(shard)
        for change in self.changes:
            table.apply(*change)
        take = table.take

        def counted(positions: Any, at: int) -> Any:
            self.asked += self.plan.rows(positions).tolist()
            return take(positions, at)

        table.take = counted  # type: ignore[method-assign]
        server = self.servers[shard] = TableServer(table)
        self.loops[shard].call(server.start())

    def stop(self, shard: int) -> None:
        self.loops[shard].call(self.servers[shard].stop(0))

    def map(self, *leave_out: int, **more: Any) -> TableShardMap:
        self.version += 1
        entries = tuple(
            TableEntry(
                shard=shard,
                address=server.address,
                epoch=server.epoch,
                rows=len(self.plan.span(shard)),
                pid=1,
            )
            for shard, server in enumerate(self.servers)
            if shard not in leave_out
        )
        return TableShardMap(version=self.version, plan=self.plan, entries=entries, **more)

    def client(self, *, table_map: Any = None, clock: Any = time.monotonic, **more: Any) -> Any:
        config = RemoteTableSection(**{"deadline_ms": 10_000, "ping": PATIENT, **more})
        client = RemoteTable(table_map or self.map(), config, clock=clock)
        self.clients.append(client)
        if table_map is None:
            client.wait_until_ready(10)
        return client

    def rows_of(self, shard: int) -> np.ndarray:
        span = self.plan.span(shard)
        return self.plan.rows(np.arange(span.start, span.stop))

    def local(self, ids: Any) -> np.ndarray:
        """The rows as a table in this process gives them."""
        return dequantize_rows(quantize_rows(self.values, self.plan.dim))[np.asarray(ids)]

    def hold(self, shard: int) -> Callable[[], None]:
        """Make a server hang, and return what lets it go on."""
        let_go, reached = threading.Event(), threading.Event()

        def wait() -> None:
            reached.set()
            assert let_go.wait(30)

        self.loops[shard].loop.call_soon_threadsafe(wait)
        assert reached.wait(10)
        return let_go.set

    def close(self) -> None:
        for client in self.clients:
            client.close()
        for shard in range(self.plan.num_shards):
            self.stop(shard)

    @staticmethod
    def settle(client: RemoteTable) -> None:
        """Put what came last into the cache now, not with the next call or beat."""

        async def keep() -> None:
            client._keep()

        client._call(keep())

    @staticmethod
    def until(condition: Callable[[], bool], timeout_s: float = 10) -> None:
        end_s = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < end_s, "it never came true"
            time.sleep(0.002)

    @staticmethod
    def assert_found(lookup: Any, expected: np.ndarray) -> None:
        assert lookup.values.dtype == np.float32
        np.testing.assert_array_equal(lookup.values, expected)
        assert lookup.defaulted.shape == (len(expected),)
        assert not lookup.defaulted.any()
        assert lookup.reasons == ()


@pytest.fixture
def make_tables(loop_thread: Any) -> Iterator[Callable[..., Tables]]:
    """``make_tables(num_shards=2, placement="hashed")`` serves a table of random rows."""
    made: list[Tables] = []
    loops: list[Any] = []

    def new_loop() -> Any:
        loops.append(type(loop_thread)())
        return loops[-1]

    def make(num_shards: int = 2, placement: Any = "hashed", seed: int = 0) -> Tables:
        plan = TablePlan(
            name="users", num_rows=ROWS, dim=DIM, num_shards=num_shards, placement=placement
        )
        generator = np.random.default_rng(seed)
        values = generator.standard_normal((ROWS, DIM)).astype(np.float32)
        made.append(Tables(new_loop, plan, values))
        return made[-1]

    yield make
    for one in made:
        one.close()
    for loop in loops:
        loop.close()

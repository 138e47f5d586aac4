import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from silvershard.cluster import table_client
from silvershard.cluster.config import PingSection
from silvershard.cluster.table_client import EMBEDDING_FALLBACK, RemoteTable
from silvershard.cluster.table_config import RemoteTableSection
from silvershard.cluster.table_map import TableEntry, TableShardMap
from silvershard.cluster.table_server import TableServer
from silvershard.model.request import RequestError
from silvershard.shard.errors import ConfigError, DeadlineExceeded, ShardUnavailable, StateError
from silvershard.shard.table import CHANGES_KEPT, TableShard
from silvershard.shard.table_plan import TablePlan
from silvershard.shard.table_rows import dequantize_rows, quantize_rows

ROWS, DIM = 5000, 16
PATIENT = PingSection(every_ms=20, suspect_after=50, eject_after=500)
RARE = PingSection(every_ms=100_000)
"""Beats that never come, so that only answers tell of changes."""


class Tables:
    """The servers of a table, each on an event loop of its own, and clients of them."""

    def __init__(self, new_loop: Callable[[], Any], plan: TablePlan, values: np.ndarray) -> None:
        self.plan = plan
        self.values = values
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
        return TableShard.from_blocks(self.plan, shard, [self.values])

    def start(self, shard: int) -> None:
        """Serve a shard as another incarnation, with the rows of the source."""
        table = self.shards[shard] = self._load(shard)
        read = table.read

        def counted(positions: Any, seen_version: int) -> Any:
            self.asked += self.plan.rows(positions).tolist()
            return read(positions, seen_version)

        table.read = counted  # type: ignore[method-assign]
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
        config = RemoteTableSection(
            **{"deadline_ms": 10_000, "max_stale_ms": 10**9, "ping": PATIENT, **more}
        )
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


def settle(client: RemoteTable) -> None:
    """Put what came last into the cache now, not with the next call or beat."""

    async def keep() -> None:
        client._keep()

    client._call(keep())


def until(condition: Callable[[], bool], timeout_s: float = 10) -> None:
    end_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end_s, "it never came true"
        time.sleep(0.002)


def assert_found(lookup: Any, expected: np.ndarray) -> None:
    assert lookup.values.dtype == np.float32
    np.testing.assert_array_equal(lookup.values, expected)
    assert lookup.defaulted.shape == (len(expected),)
    assert not lookup.defaulted.any()
    assert lookup.reasons == ()


@pytest.mark.parametrize("cache_mib", [0, 1])
@pytest.mark.parametrize("placement", ["contiguous", "hashed"])
@pytest.mark.parametrize("num_shards", [1, 2, 3])
def test_rows_equal_those_of_a_local_table_bit_for_bit(
    make_tables: Any, num_shards: int, placement: str, cache_mib: int
) -> None:
    tables = make_tables(num_shards, placement)
    client, generator = tables.client(cache_mib=cache_mib), np.random.default_rng(1)
    for size in (0, 1, 2, 7, 100, 1000, 4000, 1000, 1):
        ids = generator.integers(0, ROWS, size)
        assert_found(client.lookup(ids), tables.local(ids))
    everything = np.arange(ROWS)[::-1].copy()
    assert_found(client.lookup(everything), tables.local(everything))


def test_a_row_is_asked_for_once_however_often_it_repeats(make_tables: Any) -> None:
    tables = make_tables()
    client = tables.client(cache_mib=0)
    ids = np.array([7, 3, 7, 7, 4999, 3])
    assert_found(client.lookup(ids), tables.local(ids))
    assert sorted(tables.asked) == [3, 7, 4999]
    assert client.counts().rows == 3


def test_rows_in_the_cache_are_not_asked_for_again(make_tables: Any) -> None:
    tables = make_tables()
    client, ids = tables.client(), np.arange(0, 600, 2)
    client.lookup(ids)
    settle(client)
    tables.asked.clear()
    assert_found(client.lookup(ids[::-1].copy()), tables.local(ids[::-1]))
    assert tables.asked == []
    more = np.arange(600)
    assert_found(client.lookup(more), tables.local(more))
    assert sorted(tables.asked) == list(range(1, 600, 2))
    counts = client.counts()
    assert (counts.lookups, counts.rows) == (3, 1200)
    assert (counts.cached, counts.fetched, counts.defaulted) == (600, 600, 0)
    assert counts.failures == {}


def test_what_came_is_in_the_cache_after_the_next_beat_or_call(make_tables: Any) -> None:
    tables = make_tables(1)
    beaten, asked = tables.client(), tables.client(ping=RARE)
    for client in (beaten, asked):
        client.lookup(np.arange(10))
    until(lambda: len(beaten._cache) == 10)
    assert len(asked._cache) == 0
    asked.lookup(np.array([4000]))
    until(lambda: len(asked._cache) == 10)


def test_long_lists_are_cut_into_calls_that_the_server_takes(
    make_tables: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(table_client, "MAX_CALL_ROWS", 16)
    monkeypatch.setattr(table_client, "_PUT_ROWS", 16)
    tables = make_tables()
    client, ids = tables.client(), np.arange(1000)
    assert_found(client.lookup(ids), tables.local(ids))
    tables.values[:1000] += 1
    client.update(ids, tables.values[:1000])
    assert_found(client.lookup(ids), tables.local(ids))


def test_rows_of_a_lost_shard_are_default_rows_with_the_reason(make_tables: Any) -> None:
    tables, default = make_tables(), np.linspace(-1, 1, DIM, dtype=np.float32)
    client = tables.client(table_map=tables.map(default_row=default.tolist()), cache_mib=0)
    client.wait_until_ready(10)
    ids = np.concatenate([np.arange(200), np.arange(50)])
    tables.stop(1)
    until(lambda: not client._links[1].reached)
    lookup = client.lookup(ids)
    lost = np.isin(ids, tables.rows_of(1))
    assert lost.any()
    assert not lost.all()
    np.testing.assert_array_equal(lookup.defaulted, lost)
    np.testing.assert_array_equal(lookup.values[~lost], tables.local(ids[~lost]))
    np.testing.assert_array_equal(lookup.values[lost], np.tile(default, (lost.sum(), 1)))
    assert lookup.reasons == (EMBEDDING_FALLBACK,)
    counts = client.counts()
    assert counts.defaulted == len(np.unique(ids[lost]))
    assert counts.failures == {"UNAVAILABLE": 1}


def test_a_shard_that_is_not_in_the_map_is_lost(make_tables: Any) -> None:
    tables = make_tables()
    client = tables.client(table_map=tables.map(0))
    lookup = client.lookup(np.arange(100))
    np.testing.assert_array_equal(lookup.defaulted, np.isin(np.arange(100), tables.rows_of(0)))
    assert not lookup.values[lookup.defaulted].any()
    with pytest.raises(DeadlineExceeded, match=r"shards \[0\] of table users cannot be asked yet"):
        client.wait_until_ready(0.01)


def test_a_shard_that_hangs_costs_the_deadline_until_it_is_noticed_and_comes_back(
    make_tables: Any,
) -> None:
    tables = make_tables()
    ping = PingSection(every_ms=20, suspect_after=2, eject_after=15)
    client, ids = tables.client(ping=ping, deadline_ms=50, cache_mib=0), np.arange(100)
    let_go = tables.hold(0)
    began = time.monotonic()
    lookup = client.lookup(ids)
    assert time.monotonic() - began >= 0.05
    np.testing.assert_array_equal(lookup.defaulted, np.isin(ids, tables.rows_of(0)))
    assert lookup.reasons == (EMBEDDING_FALLBACK,)
    assert client.counts().failures == {"DEADLINE_EXCEEDED": 1}
    until(lambda: client._links[0].hung)
    assert client.lookup(ids, timeout_s=60).reasons == (EMBEDDING_FALLBACK,)
    assert client.counts().failures == {"DEADLINE_EXCEEDED": 1, "UNAVAILABLE": 1}
    let_go()
    client.wait_until_ready(10)
    assert_found(client.lookup(ids, timeout_s=10), tables.local(ids))


def test_an_answer_of_another_size_is_not_used(make_tables: Any) -> None:
    tables = make_tables(1)
    client, server = tables.client(cache_mib=0), tables.servers[0]
    run = server._run

    def short(job: Any) -> Any:
        reply = run(job)
        reply.records = reply.records[:-1]
        return reply

    server._run = short
    lookup = client.lookup(np.array([4, 2]))
    assert lookup.defaulted.all()
    assert client.counts().failures == {"DATA_LOSS": 1}


def test_a_refused_call_gives_default_rows_and_its_code(make_tables: Any) -> None:
    tables = make_tables(1)
    client = tables.client(cache_mib=0)
    tables.servers[0]._max_queue = 0
    assert client.lookup(np.array([4, 2])).defaulted.all()
    assert client.counts().failures == {"RESOURCE_EXHAUSTED": 1}


def test_a_client_sees_its_own_update_at_once(make_tables: Any) -> None:
    tables = make_tables()
    client, ids = tables.client(ping=RARE), np.arange(0, ROWS, 7)
    generator = np.random.default_rng(5)
    for _ in range(5):
        everything = np.arange(ROWS)
        assert_found(client.lookup(everything), tables.local(everything))
        settle(client)
        shuffled = generator.permutation(ids)
        tables.values[shuffled] = generator.standard_normal((len(ids), DIM))
        client.update(shuffled, tables.values[shuffled])
        assert_found(client.lookup(everything), tables.local(everything))


def test_an_update_drops_only_the_rows_it_replaced(make_tables: Any) -> None:
    tables = make_tables()
    client, ids = tables.client(ping=RARE), np.arange(300)
    client.lookup(ids)
    settle(client)
    tables.values[10:15] = 3
    client.update(np.arange(10, 15), tables.values[10:15])
    tables.asked.clear()
    assert_found(client.lookup(ids), tables.local(ids))
    assert sorted(tables.asked) == list(range(10, 15))


def test_beats_tell_other_clients_of_an_update(make_tables: Any) -> None:
    tables = make_tables()
    writer, reader = tables.client(), tables.client()
    ids = np.arange(100)
    reader.lookup(ids)
    settle(reader)
    tables.values[:50] += 1
    writer.update(ids[:50], tables.values[:50])
    until(lambda: np.array_equal(reader.lookup(ids).values, tables.local(ids)))


def test_any_answer_of_a_shard_tells_of_an_update(make_tables: Any) -> None:
    tables = make_tables(1)
    writer, reader = tables.client(), tables.client(ping=RARE)
    ids = np.arange(100)
    reader.lookup(ids)
    settle(reader)
    old = tables.local(ids)
    tables.values[:50] += 1
    writer.update(ids[:50], tables.values[:50])
    assert_found(reader.lookup(ids), old)
    reader.lookup(np.array([4000]))
    assert_found(reader.lookup(ids), tables.local(ids))


def test_who_missed_too_many_changes_forgets_the_whole_shard(make_tables: Any) -> None:
    tables = make_tables(2)
    reader, ids = tables.client(ping=RARE), np.arange(200)
    reader.lookup(ids)
    settle(reader)
    held = tables.rows_of(0)
    positions = tables.plan.positions(np.resize(held, CHANGES_KEPT + 1))
    tables.shards[0].put(positions, tables.shards[0].take(positions))
    reader.lookup(held[held > 1000][:1])
    tables.asked.clear()
    assert_found(reader.lookup(ids), tables.local(ids))
    assert sorted(tables.asked) == sorted(set(ids.tolist()) & set(held.tolist()))


def test_a_row_in_the_cache_is_used_only_while_its_shard_was_heard_of(make_tables: Any) -> None:
    tables, now_s = make_tables(2), [1000.0]
    client = tables.client(
        ping=PingSection(every_ms=5000), max_stale_ms=20_000, clock=lambda: now_s[0]
    )
    ids = np.arange(100)
    client.lookup(ids)
    settle(client)
    tables.asked.clear()
    now_s[0] += 19.9
    assert_found(client.lookup(ids), tables.local(ids))
    assert tables.asked == []
    now_s[0] += 0.2
    tables.stop(0)
    lookup = client.lookup(ids)
    np.testing.assert_array_equal(lookup.defaulted, np.isin(ids, tables.rows_of(0)))
    # What the other shard confirmed meanwhile counts again.
    tables.asked.clear()
    now_s[0] += 19.0
    assert not client.lookup(tables.rows_of(1)[:5]).defaulted.any()


def test_rows_read_before_an_update_do_not_enter_the_cache_after_it(make_tables: Any) -> None:
    tables = make_tables(1)
    client, ids = tables.client(ping=RARE), np.arange(20)
    pending = client.submit(ids)
    until(lambda: len(tables.asked) == 20)
    tables.values[:10] += 1
    client.update(ids[:10], tables.values[:10])
    pending.result()
    settle(client)
    assert len(client._cache) == 0
    assert_found(client.lookup(ids), tables.local(ids))


def test_another_incarnation_brings_the_rows_of_the_source_and_an_empty_cache(
    make_tables: Any,
) -> None:
    tables = make_tables(2)
    client, ids = tables.client(), np.arange(400)
    client.update(ids, tables.values[:400] + 1)
    client.lookup(ids)
    settle(client)
    tables.stop(0)
    tables.start(0)
    client.update_map(tables.map())
    client.wait_until_ready(10)
    lookup = client.lookup(ids)
    assert lookup.reasons == ()
    back = np.isin(ids, tables.rows_of(0))
    np.testing.assert_array_equal(lookup.values[back], tables.local(ids[back]))
    assert (lookup.values[~back] != tables.local(ids[~back])).any(axis=1).all()


def test_a_shard_that_leaves_the_map_takes_its_rows_out_of_the_cache(make_tables: Any) -> None:
    tables = make_tables(2)
    client, ids = tables.client(), np.arange(100)
    client.lookup(ids)
    settle(client)
    client.update_map(tables.map(1))
    np.testing.assert_array_equal(client.lookup(ids).defaulted, np.isin(ids, tables.rows_of(1)))


def test_a_map_of_another_table_is_refused(make_tables: Any) -> None:
    tables, other = make_tables(2), make_tables(3)
    client = tables.client()
    with pytest.raises(ConfigError, match="must be of the plan of table users that is in use"):
        client.update_map(other.map())
    assert_found(client.lookup(np.arange(9)), tables.local(np.arange(9)))


def test_a_followed_map_is_taken_over_and_a_bad_one_is_not(
    make_tables: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tables, path = make_tables(2), tmp_path / "users.json"
    with pytest.raises(StateError, match=r"table map .*users\.json: No such file"):
        RemoteTable.follow(path)
    tables.map(1).write_atomic(path)
    config = RemoteTableSection(poll_ms=5, ping=PATIENT, deadline_ms=10_000)
    ids = np.arange(50)
    with RemoteTable.follow(path, config) as client:
        assert client.lookup(ids).reasons == (EMBEDDING_FALLBACK,)
        tables.map().write_atomic(path)
        client.wait_until_ready(10)
        assert_found(client.lookup(ids), tables.local(ids))
        path.write_text("{")
        until(lambda: "the last good table map is kept" in caplog.text)
        caplog.clear()
        make_tables(3).map().write_atomic(path)
        until(lambda: "must be of the plan" in caplog.text)
        assert_found(client.lookup(ids), tables.local(ids))
        tables.map(0).write_atomic(path)
        until(lambda: client.lookup(ids).reasons == (EMBEDDING_FALLBACK,))


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (np.array([5, -1]), "ids: must be from 0 to 4999 in table users, got -1 to 5"),
        (np.array([ROWS]), "ids: must be from 0 to 4999 in table users, got 5000 to 5000"),
        (np.array([1.0]), r"ids: must be \(n,\) int64, got \(1,\) float64"),
        (np.array([[1]]), r"ids: must be \(n,\) int64, got \(1, 1\) int64"),
    ],
)
def test_bad_row_numbers_are_refused_by_name(
    make_tables: Any, ids: np.ndarray, message: str
) -> None:
    client = make_tables(1).client()
    with pytest.raises(RequestError, match=message):
        client.lookup(ids)
    with pytest.raises(RequestError, match=message):
        client.update(ids, np.zeros((len(ids), DIM), dtype=np.float32))


def test_bad_updates_are_refused_by_name_and_change_nothing(make_tables: Any) -> None:
    tables = make_tables()
    client = tables.client()
    zeros = np.zeros((2, DIM), dtype=np.float32)
    bad = zeros.copy()
    bad[1, 3] = np.nan
    with pytest.raises(RequestError, match="values: must be finite"):
        client.update(np.array([1, 2]), bad)
    with pytest.raises(RequestError, match=r"values: must be of shape \(n, 16\)"):
        client.update(np.array([1, 2]), zeros[:, :3])
    with pytest.raises(RequestError, match="values: must be of 3 rows, got 2"):
        client.update(np.array([1, 2, 3]), zeros)
    with pytest.raises(RequestError, match="ids: must not repeat, got 4321 more than once"):
        client.update(np.array([4321, 4321]), zeros)
    assert [one.version for one in tables.shards] == [0, 0]
    client.update(np.empty(0, dtype=np.int64), zeros[:0])


def test_an_update_that_a_shard_does_not_take_is_an_error_and_can_be_done_again(
    make_tables: Any,
) -> None:
    tables = make_tables()
    ids = np.arange(100)
    client = tables.client(table_map=tables.map(1))
    tables.values[:100] += 1
    with pytest.raises(ShardUnavailable, match="shard 1: UNAVAILABLE: shard 1 is not in the map"):
        client.update(ids, tables.values[:100])
    client.update_map(tables.map())
    let_go = tables.hold(0)
    with pytest.raises(DeadlineExceeded, match=r"shard 0 did not confirm .* within 0\.020 s"):
        client.update(ids, tables.values[:100], timeout_s=0.02)
    let_go()
    client.update(ids, tables.values[:100])
    assert_found(client.lookup(ids), tables.local(ids))


def test_several_lookups_can_be_on_their_way_at_once(make_tables: Any) -> None:
    first, second = make_tables(2), make_tables(1, seed=1)
    one, other = first.client(), second.client()
    ids = np.arange(100)
    let_go = first.hold(0)
    pending = [one.submit(ids), other.submit(ids), one.submit(ids[:5])]
    until(lambda: len(second.asked) == 100)
    let_go()
    assert_found(pending[2].result(), first.local(ids[:5]))
    assert_found(pending[1].result(), second.local(ids))
    assert_found(pending[0].result(), first.local(ids))


def test_a_closed_table_refuses_and_ends_what_is_on_its_way(make_tables: Any) -> None:
    tables = make_tables(2)
    client = tables.client()
    let_go = tables.hold(0)
    pending = client.submit(np.arange(50))
    until(lambda: bool(client._links[0]._connection.pending))
    client.close()
    assert pending.result().reasons == (EMBEDDING_FALLBACK,)
    let_go()
    client.close()
    assert not client._thread.is_alive()
    for work in (
        lambda: client.lookup(np.arange(5)),
        lambda: client.update(np.arange(5), np.zeros((5, DIM), dtype=np.float32)),
        lambda: client.update_map(tables.map()),
    ):
        with pytest.raises(StateError, match="table users was closed"):
            work()


def test_readers_on_many_threads_see_whole_rows_of_some_update_and_then_the_last(
    make_tables: Any,
) -> None:
    tables = make_tables(2)
    writer = tables.client(cache_mib=0)
    readers = [tables.client(cache_mib=1), tables.client(cache_mib=0)]
    ids, ended = np.arange(200), threading.Event()
    failures: list[str] = []
    # A row of version v is v everywhere, so a mixture of two versions shows.
    writer.update(ids, np.zeros((200, DIM), dtype=np.float32))

    def read(client: RemoteTable) -> None:
        generator = np.random.default_rng(threading.get_ident() % 1000)
        while not ended.is_set():
            lookup = client.lookup(generator.choice(ids, 150))
            if lookup.reasons or (lookup.values != lookup.values[:, :1]).any():
                failures.append(f"{lookup.reasons} {lookup.values[:, 0]}")

    threads = [threading.Thread(target=read, args=(one,)) for one in readers * 2]
    for thread in threads:
        thread.start()
    try:
        for version in range(1, 60):
            writer.update(ids, np.full((200, DIM), version, dtype=np.float32))
    finally:
        ended.set()
        for thread in threads:
            thread.join(30)
    assert failures == []
    for reader in readers:
        until(lambda reader=reader: bool((reader.lookup(ids).values == 59).all()))


def test_distinct_positions_are_those_of_numpy() -> None:
    generator = np.random.default_rng(0)
    for size, most in ((0, 5), (1, 5), (100, 3), (1000, 1 << 31), (1000, 900)):
        positions = generator.integers(0, most, size)
        found, back = table_client._distinct(positions)
        expected, expected_back = np.unique(positions, return_inverse=True)
        np.testing.assert_array_equal(found, expected)
        np.testing.assert_array_equal(back, expected_back)

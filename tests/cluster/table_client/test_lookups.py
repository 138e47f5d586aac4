import time
from typing import Any

import numpy as np
import pytest

from silvershard.cluster import table_client
from silvershard.cluster.config import PingSection
from silvershard.cluster.table_lookup import EMBEDDING_FALLBACK
from silvershard.model.request import RequestError
from silvershard.shard.errors import DeadlineExceeded, StateError
from silvershard.shard.table_rows import quantize_rows

ROWS, DIM = 5000, 16
RARE = PingSection(every_ms=100_000)
"""Beats that never come, so that what came is kept with the next call only."""


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
        tables.assert_found(client.lookup(ids), tables.local(ids))
    everything = np.arange(ROWS)[::-1].copy()
    tables.assert_found(client.lookup(everything), tables.local(everything))


def test_a_row_is_asked_for_once_however_often_it_repeats(make_tables: Any) -> None:
    tables = make_tables()
    client = tables.client(cache_mib=0)
    ids = np.array([7, 3, 7, 7, 4999, 3])
    tables.assert_found(client.lookup(ids), tables.local(ids))
    assert sorted(tables.asked) == [3, 7, 4999]
    assert client.counts().rows == 3


def test_rows_in_the_cache_are_not_asked_for_again(make_tables: Any) -> None:
    tables = make_tables()
    client, ids = tables.client(), np.arange(0, 600, 2)
    client.lookup(ids)
    tables.settle(client)
    tables.asked.clear()
    tables.assert_found(client.lookup(ids[::-1].copy()), tables.local(ids[::-1]))
    assert tables.asked == []
    more = np.arange(600)
    tables.assert_found(client.lookup(more), tables.local(more))
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
    tables.until(lambda: len(beaten._cache) == 10)
    assert len(asked._cache) == 0
    asked.lookup(np.array([4000]))
    tables.until(lambda: len(asked._cache) == 10)


def test_long_lists_are_cut_into_calls_that_the_server_takes(
    make_tables: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(table_client, "MAX_CALL_ROWS", 16)
    tables = make_tables()
    client, ids = tables.client(), np.arange(1000)
    tables.assert_found(client.lookup(ids), tables.local(ids))


def test_rows_of_a_lost_shard_are_default_rows_with_the_reason(make_tables: Any) -> None:
    tables, default = make_tables(), np.linspace(-1, 1, DIM, dtype=np.float32)
    client = tables.client(table_map=tables.map(default_row=default.tolist()), cache_mib=0)
    client.wait_until_ready(10)
    ids = np.concatenate([np.arange(200), np.arange(50)])
    tables.stop(1)
    tables.until(lambda: not client._links[1].reached)
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


def test_records_are_the_stored_rows_and_the_default_row_where_they_are_lost(
    make_tables: Any,
) -> None:
    tables, default = make_tables(), np.linspace(-1, 1, DIM, dtype=np.float32)
    client = tables.client(table_map=tables.map(1, default_row=default.tolist()))
    tables.until(lambda: client._links[0].reached)
    ids = np.concatenate([np.arange(60), np.arange(20)])
    found = client.submit(ids).records()
    expected = quantize_rows(tables.values[ids], DIM)
    lost = np.isin(ids, tables.rows_of(1))
    expected[lost] = quantize_rows(default[None], DIM)
    np.testing.assert_array_equal(found.records, expected)
    np.testing.assert_array_equal(found.defaulted, lost)


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
    ping = PingSection(every_ms=20, suspect_after=2, eject_after=40)
    client, ids = tables.client(ping=ping, deadline_ms=200, cache_mib=0), np.arange(100)
    let_go = tables.hold(0)
    began = time.monotonic()
    lookup = client.lookup(ids)
    assert time.monotonic() - began >= 0.2
    np.testing.assert_array_equal(lookup.defaulted, np.isin(ids, tables.rows_of(0)))
    assert lookup.reasons == (EMBEDDING_FALLBACK,)
    assert client.counts().failures == {"DEADLINE_EXCEEDED": 1}
    tables.until(lambda: client._links[0].hung)
    assert client.lookup(ids, timeout_s=60).reasons == (EMBEDDING_FALLBACK,)
    assert client.counts().failures == {"DEADLINE_EXCEEDED": 1, "UNAVAILABLE": 1}
    let_go()
    client.wait_until_ready(10)
    tables.assert_found(client.lookup(ids, timeout_s=10), tables.local(ids))


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


def test_several_lookups_can_be_on_their_way_at_once(make_tables: Any) -> None:
    first, second = make_tables(2), make_tables(1, seed=1)
    one, other = first.client(), second.client()
    ids = np.arange(100)
    let_go = first.hold(0)
    pending = [one.submit(ids), other.submit(ids), one.submit(ids[:5])]
    first.until(lambda: len(second.asked) == 100)
    let_go()
    first.assert_found(pending[2].result(), first.local(ids[:5]))
    first.assert_found(pending[1].result(), second.local(ids))
    first.assert_found(pending[0].result(), first.local(ids))


def test_a_closed_table_refuses_and_ends_what_is_on_its_way(make_tables: Any) -> None:
    tables = make_tables(2)
    client = tables.client()
    let_go = tables.hold(0)
    pending = client.submit(np.arange(50))
    tables.until(lambda: bool(client._links[0]._connection.pending))
    client.close()
    assert pending.result().reasons == (EMBEDDING_FALLBACK,)
    let_go()
    client.close()
    assert not client._thread.is_alive()
    for work in (
        lambda: client.lookup(np.arange(5)),
        lambda: client.update_map(tables.map()),
    ):
        with pytest.raises(StateError, match="table users was closed"):
            work()

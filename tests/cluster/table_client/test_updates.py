import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from silvershard.cluster.config import PingSection
from silvershard.cluster.table_client import RemoteTable
from silvershard.cluster.table_config import RemoteTableSection
from silvershard.cluster.table_lookup import EMBEDDING_FALLBACK
from silvershard.model.request import RequestError
from silvershard.shard.errors import ConfigError, DeadlineExceeded, ShardUnavailable, StateError
from silvershard.shard.table import CHANGES_KEPT

ROWS, DIM = 5000, 16
PATIENT = PingSection(every_ms=20, suspect_after=50, eject_after=500)
RARE = PingSection(every_ms=100_000)
"""Beats that never come, so that only answers tell of changes."""


def test_a_client_sees_its_own_update_at_once(make_tables: Any) -> None:
    tables = make_tables()
    client, ids = tables.client(ping=RARE), np.arange(0, ROWS, 7)
    generator = np.random.default_rng(5)
    for _ in range(5):
        everything = np.arange(ROWS)
        tables.assert_found(client.lookup(everything), tables.local(everything))
        tables.settle(client)
        shuffled = generator.permutation(ids)
        tables.values[shuffled] = generator.standard_normal((len(ids), DIM))
        client.update(shuffled, tables.values[shuffled])
        tables.assert_found(client.lookup(everything), tables.local(everything))


def test_an_update_drops_only_the_rows_it_replaced(make_tables: Any) -> None:
    tables = make_tables()
    client, ids = tables.client(ping=RARE), np.arange(300)
    client.lookup(ids)
    tables.settle(client)
    tables.values[10:15] = 3
    client.update(np.arange(10, 15), tables.values[10:15])
    tables.asked.clear()
    tables.assert_found(client.lookup(ids), tables.local(ids))
    assert sorted(tables.asked) == list(range(10, 15))


def test_beats_tell_other_clients_of_an_update(make_tables: Any) -> None:
    tables = make_tables()
    writer, reader = tables.client(), tables.client()
    ids = np.arange(100)
    reader.lookup(ids)
    tables.settle(reader)
    tables.values[:50] += 1
    writer.update(ids[:50], tables.values[:50])
    tables.until(lambda: np.array_equal(reader.lookup(ids).values, tables.local(ids)))


def test_any_answer_of_a_shard_tells_of_an_update(make_tables: Any) -> None:
    tables = make_tables(1)
    writer, reader = tables.client(), tables.client(ping=RARE)
    ids = np.arange(100)
    reader.lookup(ids)
    tables.settle(reader)
    old = tables.local(ids)
    tables.values[:50] += 1
    writer.update(ids[:50], tables.values[:50])
    tables.assert_found(reader.lookup(ids), old)
    reader.lookup(np.array([4000]))
    tables.assert_found(reader.lookup(ids), tables.local(ids))


def test_who_missed_too_many_changes_forgets_the_whole_shard(make_tables: Any) -> None:
    tables = make_tables(2)
    reader, ids = tables.client(ping=RARE), np.arange(200)
    reader.lookup(ids)
    tables.settle(reader)
    held = tables.rows_of(0)
    positions = tables.plan.positions(np.resize(held, CHANGES_KEPT + 1))
    tables.shards[0].put(positions, tables.shards[0].take(positions))
    reader.lookup(held[held > 1000][:1])
    tables.asked.clear()
    tables.assert_found(reader.lookup(ids), tables.local(ids))
    assert sorted(tables.asked) == sorted(set(ids.tolist()) & set(held.tolist()))


def test_rows_read_before_an_update_do_not_enter_the_cache_after_it(make_tables: Any) -> None:
    tables = make_tables(1)
    client, ids = tables.client(ping=RARE), np.arange(20)
    pending = client.submit(ids)
    tables.until(lambda: len(tables.asked) == 20)
    tables.values[:10] += 1
    client.update(ids[:10], tables.values[:10])
    pending.result()
    tables.settle(client)
    assert len(client._cache) == 0
    tables.assert_found(client.lookup(ids), tables.local(ids))


def test_another_incarnation_brings_the_rows_of_the_source_and_an_empty_cache(
    make_tables: Any,
) -> None:
    tables = make_tables(2)
    client, ids = tables.client(), np.arange(400)
    client.update(ids, tables.values[:400] + 1)
    client.lookup(ids)
    tables.settle(client)
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
    tables.settle(client)
    client.update_map(tables.map(1))
    np.testing.assert_array_equal(client.lookup(ids).defaulted, np.isin(ids, tables.rows_of(1)))


def test_a_map_of_another_table_is_refused(make_tables: Any) -> None:
    tables, other = make_tables(2), make_tables(3)
    client = tables.client()
    with pytest.raises(ConfigError, match="must be of the plan of table users that is in use"):
        client.update_map(other.map())
    tables.assert_found(client.lookup(np.arange(9)), tables.local(np.arange(9)))


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
        tables.assert_found(client.lookup(ids), tables.local(ids))
        path.write_text("{")
        tables.until(lambda: "the last good table map is kept" in caplog.text)
        caplog.clear()
        make_tables(3).map().write_atomic(path)
        tables.until(lambda: "must be of the plan" in caplog.text)
        tables.assert_found(client.lookup(ids), tables.local(ids))
        tables.map(0).write_atomic(path)
        tables.until(lambda: client.lookup(ids).reasons == (EMBEDDING_FALLBACK,))


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
    tables.assert_found(client.lookup(ids), tables.local(ids))


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
        tables.until(lambda reader=reader: bool((reader.lookup(ids).values == 59).all()))


def test_a_row_in_the_cache_is_used_only_while_its_shard_was_heard_of(make_tables: Any) -> None:
    tables, now_s = make_tables(2), [1000.0]
    client = tables.client(
        ping=PingSection(every_ms=5000), max_stale_ms=20_000, clock=lambda: now_s[0]
    )
    ids = np.arange(100)
    client.lookup(ids)
    tables.settle(client)
    tables.asked.clear()
    now_s[0] += 19.9
    tables.assert_found(client.lookup(ids), tables.local(ids))
    assert tables.asked == []
    now_s[0] += 0.2
    tables.stop(0)
    lookup = client.lookup(ids)
    np.testing.assert_array_equal(lookup.defaulted, np.isin(ids, tables.rows_of(0)))
    # What the other shard confirmed meanwhile counts again.
    tables.asked.clear()
    now_s[0] += 19.0
    assert not client.lookup(tables.rows_of(1)[:5]).defaulted.any()

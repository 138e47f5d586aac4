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
from silvershard.shard.errors import ConfigError, StateError

ROWS, DIM = 5000, 16
PATIENT = PingSection(every_ms=20, suspect_after=50, eject_after=500)
RARE = PingSection(every_ms=100_000)
"""Beats that never come, so that what came is kept with the next call only."""


def test_every_version_gives_its_own_rows_however_far_the_shards_are(make_tables: Any) -> None:
    tables = make_tables()
    client, ids = tables.client(ping=RARE), np.arange(0, ROWS, 7)
    behind = tables.client(ping=RARE, cache_mib=0)
    generator, everything = np.random.default_rng(5), np.arange(ROWS)
    first = tables.local(everything)
    for _ in range(5):
        tables.assert_found(client.lookup(everything), tables.local(everything))
        tables.settle(client)
        shuffled = generator.permutation(ids)
        version = tables.change(shuffled, generator.standard_normal((len(ids), DIM)))
        client.advance(version, shuffled)
        tables.assert_found(client.lookup(everything), tables.local(everything))
    tables.assert_found(behind.lookup(everything), first)


def test_a_change_drops_only_the_rows_it_replaced(make_tables: Any) -> None:
    tables = make_tables()
    client, ids = tables.client(ping=RARE), np.arange(300)
    client.lookup(ids)
    tables.settle(client)
    client.advance(tables.change(np.arange(10, 15), 3), np.arange(10, 15))
    tables.asked.clear()
    tables.assert_found(client.lookup(ids), tables.local(ids))
    assert sorted(tables.asked) == list(range(10, 15))


def test_rows_of_a_version_to_come_are_waited_for(make_tables: Any) -> None:
    tables = make_tables()
    client, ids = tables.client(cache_mib=0), np.arange(100)
    version = tables.change(ids[:50], 4, shards=[0])
    client.advance(version, ids[:50])
    pending = client.submit(ids)
    tables.until(lambda: bool(tables.servers[1]._waiting))
    tables.replay(1)
    tables.assert_found(pending.result(), tables.local(ids))


def test_a_shard_that_stays_behind_costs_the_deadline_and_gives_default_rows(
    make_tables: Any,
) -> None:
    tables = make_tables()
    client, ids = tables.client(), np.arange(100)
    client.lookup(ids)
    tables.settle(client)
    client.advance(tables.change(ids[:50], 4, shards=[0]), ids[:50])
    lookup = client.lookup(ids, timeout_s=0.5)
    lost = np.isin(ids, tables.rows_of(1)) & (ids < 50)
    np.testing.assert_array_equal(lookup.defaulted, lost)
    assert lookup.reasons == (EMBEDDING_FALLBACK,)
    # What did not change is right in the cache, wherever its shard is.
    np.testing.assert_array_equal(lookup.values[~lost], tables.local(ids)[~lost])
    tables.replay(1)
    tables.assert_found(client.lookup(ids), tables.local(ids))


def test_versions_only_grow(make_tables: Any) -> None:
    tables = make_tables(1)
    client, ids = tables.client(cache_mib=0), np.arange(20)
    for value in (1, 2):
        client.advance(tables.change(ids, value), ids)
    client.advance(1, ids)
    tables.assert_found(client.lookup(ids), tables.local(ids))
    with pytest.raises(RequestError, match="ids: must be from 0 to 4999"):
        client.advance(3, np.array([ROWS]))


def test_rows_read_before_a_change_do_not_enter_the_cache_after_it(make_tables: Any) -> None:
    tables = make_tables(1)
    client, ids = tables.client(ping=RARE), np.arange(20)
    pending = client.submit(ids)
    tables.until(lambda: len(tables.asked) == 20)
    old = tables.local(ids)
    client.advance(tables.change(ids[:10], 5), ids[:10])
    tables.assert_found(pending.result(), old)
    tables.settle(client)
    assert len(client._cache) == 0
    tables.assert_found(client.lookup(ids), tables.local(ids))


def test_another_incarnation_gives_the_same_rows_and_the_cache_stays(make_tables: Any) -> None:
    tables = make_tables(2)
    client, ids = tables.client(), np.arange(400)
    client.advance(tables.change(ids, 7), ids)
    client.lookup(ids[:200])
    tables.settle(client)
    tables.stop(0)
    tables.start(0)
    client.update_map(tables.map())
    client.wait_until_ready(10)
    tables.asked.clear()
    tables.assert_found(client.lookup(ids), tables.local(ids))
    assert sorted(tables.asked) == list(range(200, 400))


def test_a_shard_that_leaves_the_map_leaves_what_is_in_the_cache(make_tables: Any) -> None:
    tables = make_tables(2)
    client, ids = tables.client(), np.arange(100)
    client.lookup(ids[:60])
    tables.settle(client)
    client.update_map(tables.map(1))
    lost = np.isin(ids, tables.rows_of(1)) & (ids >= 60)
    lookup = client.lookup(ids)
    np.testing.assert_array_equal(lookup.defaulted, lost)
    np.testing.assert_array_equal(lookup.values[~lost], tables.local(ids)[~lost])


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
    config = RemoteTableSection(poll_ms=5, ping=PATIENT, deadline_ms=10_000, cache_mib=0)
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


def test_readers_see_their_version_whole_while_shards_run_ahead_and_lag(make_tables: Any) -> None:
    tables = make_tables(2)
    readers = [tables.client(cache_mib=1), tables.client(cache_mib=0)]
    ids, ended = np.arange(200), threading.Event()
    failures: list[str] = []
    log: list[int] = []

    def read(client: RemoteTable, seed: int) -> None:
        generator, version = np.random.default_rng(seed), 0
        while not ended.is_set():
            if version < len(log) and generator.random() < 0.5:
                version += 1
                client.advance(version, ids)
            lookup = client.lookup(generator.choice(ids, 150))
            if lookup.reasons or (version and (lookup.values != version).any()):
                failures.append(f"{lookup.reasons} {version} {lookup.values[:, 0]}")

    threads = [threading.Thread(target=read, args=(one, at)) for at, one in enumerate(readers)]
    for thread in threads:
        thread.start()
    try:
        for version in range(1, 60):
            # A row of version v is v everywhere, so a mixture of two versions shows.
            tables.change(ids, version, shards=[version % 2])
            log.append(version)
            tables.replay((version + 1) % 2)
    finally:
        ended.set()
        for thread in threads:
            thread.join(30)
    assert failures == []

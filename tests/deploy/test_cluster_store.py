from collections.abc import Callable, Iterator
from typing import Any

import pytest

from silvershard.deploy.cluster_store import (
    ClusterStore,
    Freshness,
    HostReport,
    Launched,
    Superseded,
)
from silvershard.deploy.progress import Progress
from silvershard.shard.errors import StateError

Launch = Callable[..., Launched]


@pytest.fixture
def store(make_redis: Callable[..., Any]) -> Iterator[ClusterStore]:
    made = ClusterStore(make_redis().url())
    yield made
    made.close()


def test_one_cluster_runs_at_a_time(store: ClusterStore, launched: Launch) -> None:
    assert store.read(Launched, "launch") is None
    assert store.begin(launched())
    assert not store.begin(launched().model_copy(update={"generation": 4}))
    found = store.read(Launched, "launch")
    assert found == launched()
    store.stopping(launched())
    assert store.read(Launched, "launch") == launched().model_copy(update={"stopping": True})
    store.clear()
    assert store.read(Launched, "launch") is None
    assert store.begin(launched())


def test_who_was_superseded_can_write_nothing(store: ClusterStore) -> None:
    first = store.take_over()
    store.write(first, "progress", Progress(phase="shards").model_dump_json())
    second = store.take_over()
    assert second > first
    with pytest.raises(Superseded, match="another supervisor"):
        store.write(first, "map", "late")
    assert store.text("map") == ""
    store.check(second)
    with pytest.raises(Superseded, match="another supervisor"):
        store.check(first)
    store.write(second, "map", "new")
    # Also after the cluster was ended.
    store.clear()
    with pytest.raises(Superseded):
        store.write(first, "map", "late")
    assert store.take_over() > second


def test_hosts_say_what_they_have(store: ClusterStore) -> None:
    assert store.reports() == {}
    store.report(HostReport(host="a", beat=1, generations=(3,)))
    store.report(HostReport(host="b", beat=7))
    store.report(HostReport(host="a", beat=2, generations=(3, 4)))
    found = store.reports()
    assert {name: (one.beat, one.generations) for name, one in found.items()} == {
        "a": (2, (3, 4)),
        "b": (7, ()),
    }
    store.clear()
    assert store.reports() == {}


def test_a_store_that_is_away_or_damaged_is_an_error_that_names_it(
    make_redis: Callable[..., Any],
) -> None:
    server = make_redis()
    store = ClusterStore(server.url(), timeout_s=0.2)
    store.write(store.take_over(), "launch", '{"generation": 0}')
    with pytest.raises(StateError, match=r"control store redis://127.0.0.1:\d+/0.*: "):
        store.read(Launched, "launch")
    server.kill()
    with pytest.raises(StateError, match=r"control store redis://.* cannot be reached"):
        store.text("map")
    store.close()


def test_silence_is_counted_by_our_own_clock() -> None:
    now_s = 100.0
    freshness = Freshness(lambda: now_s)
    assert freshness.silent_s(HostReport(host="a", beat=5)) == 0.0
    now_s = 103.0
    assert freshness.silent_s(HostReport(host="a", beat=5)) == 3.0
    # An agent that started again counts from the beginning.
    assert freshness.silent_s(HostReport(host="a", beat=1)) == 0.0


def test_what_was_launched_says_what_is_where(launched: Launch) -> None:
    made = launched()
    assert made.host("b").address == "10.0.0.2"
    assert made.own_config(made.host("b")).listen.host == "10.0.0.2"
    listed = made.host("a").listed()
    assert (listed.name, listed.address, listed.memory_bytes) == ("a", "10.0.0.1", 1 << 30)

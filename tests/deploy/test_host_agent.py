import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from silvershard.cluster.shard_map import ShardEntry, ShardMap
from silvershard.deploy.cluster_store import ClusterStore, HostReport, Launched, RouterOrder
from silvershard.deploy.host_agent import HangWatch, HostAgent, NotLaunched, clear_mirror, end_left
from silvershard.deploy.processes import Process, identify, is_alive, myself
from silvershard.deploy.state import ClusterRecord, RouterRecord, ShardRecord, StateDir
from silvershard.shard.errors import SnapshotError
from silvershard.shard.generations import generation_dir


class FakeRouter:
    def __init__(self, place: Any, config: Any) -> None:
        self.place = place
        self.config = config
        self.http = "127.0.0.1:8002"
        self.address = "10.0.0.1:8001"
        self.did: list[str] = []
        self.is_replacing = False
        self.refused = ""

    def replace(self) -> None:
        self.did.append("replace")
        self.is_replacing = True

    @property
    def record(self) -> RouterRecord:
        return RouterRecord(state="serving", pid=7)

    def start(self) -> None:
        self.did.append("start")

    def poll(self) -> None:
        self.did.append("poll")

    def stop(self) -> None:
        self.did.append("stop")


class FakePulse:
    def __init__(self, address: str = "") -> None:
        self.silent_s = 0.0
        self.closed = False

    def poll(self) -> None:
        assert not self.closed

    def close(self) -> None:
        self.closed = True


def shard_map(version: int) -> ShardMap:
    entry = ShardEntry(shard=0, replica=0, address="10.0.0.1:9", epoch=5, documents=3, pid=9)
    return ShardMap(
        version=version, generation=3, snapshot="/gen-000003", num_shards=1, entries=(entry,)
    )


def record(**shard: Any) -> ClusterRecord:
    return ClusterRecord(
        guard=myself(),
        driver=myself(),
        address="10.0.0.1:8001",
        model="films",
        generation=3,
        documents=3,
        router=RouterRecord(state="serving"),
        shards=(ShardRecord(shard=0, state="serving", documents=3, **shard),),
        ray="10.0.0.9:6379",
        ray_dir="",
        since_unix_s=1.0,
    )


@pytest.fixture
def server(make_redis: Callable[..., Any]) -> Any:
    return make_redis()


@pytest.fixture
def store(server: Any) -> Iterator[ClusterStore]:
    made = ClusterStore(server.url(), timeout_s=0.2)
    yield made
    made.close()


def no_way(host: str) -> Any:
    raise SnapshotError("generation", f"{host} is not reached in this test")


@pytest.fixture
def agent(store: ClusterStore, launched: Callable[..., Launched], tmp_path: Path) -> HostAgent:
    store.begin(launched(tmp_path / "state", **{"runtime.hang_s": 2.0}))
    return HostAgent(
        store, "a", reach=no_way, make_router=FakeRouter, clock=iter(range(99)).__next__
    )


def test_without_a_cluster_there_is_nothing_to_do(
    store: ClusterStore, launched: Callable[..., Launched], tmp_path: Path
) -> None:
    with pytest.raises(NotLaunched):
        HostAgent(store, "a", reach=no_way, make_router=FakeRouter)
    store.begin(launched(tmp_path))
    store.stopping(launched(tmp_path))
    with pytest.raises(NotLaunched):
        HostAgent(store, "a", reach=no_way, make_router=FakeRouter)


def test_the_router_binds_the_address_of_its_host(agent: HostAgent, store: ClusterStore) -> None:
    router = agent.router
    assert isinstance(router, FakeRouter)
    assert router.config.listen.host == "10.0.0.1"
    assert router.place.place == agent.state.root / "hosts" / "a"
    agent.start()
    agent.tick()
    assert router.did == ["start", "poll"]
    assert agent.state.control_url_file.read_text() == store.url
    assert agent.state.root.stat().st_mode & 0o077 == 0


def test_map_and_record_are_copied_and_stay_while_the_store_is_away(
    agent: HostAgent, store: ClusterStore, server: Any
) -> None:
    term = store.take_over()
    store.write(term, "map", shard_map(4).model_dump_json())
    store.write(term, "record", record().model_dump_json())
    agent.tick()
    assert ShardMap.read(agent.state.shard_map_file) == shard_map(4)
    assert agent.state.read_record() == record()
    stamp = agent.state.shard_map_file.stat().st_mtime_ns
    agent.tick()
    assert agent.state.shard_map_file.stat().st_mtime_ns == stamp
    server.kill()
    agent.tick()
    assert ShardMap.read(agent.state.shard_map_file) == shard_map(4)
    router = agent.router
    assert isinstance(router, FakeRouter)
    # It is looked after all the same.
    assert router.did == ["poll"] * 3
    server.start()
    store.write(term, "map", shard_map(5).model_dump_json())
    agent.tick()
    assert ShardMap.read(agent.state.shard_map_file).version == 5


def test_a_host_says_what_it_has(agent: HostAgent, store: ClusterStore) -> None:
    generation_dir(agent.state.generations, 3).mkdir(parents=True)
    store.write(store.take_over(), "wanted", "[3, 4]")
    agent.tick()
    agent.tick()
    report = store.reports()["a"]
    assert (report.beat, report.generations) == (2, (3,))
    assert report.staging == "generation 4 is on no host"
    assert report.router == RouterRecord(state="serving", pid=7, host="a", address="10.0.0.1:8001")
    store.report(HostReport(host="b", beat=1, generations=(4,)))
    while "b is not reached" not in store.reports()["a"].staging:
        agent.tick()


def test_a_router_is_replaced_once_where_that_is_ordered(
    agent: HostAgent, store: ClusterStore
) -> None:
    term = store.take_over()
    router = agent.router
    assert isinstance(router, FakeRouter)

    def told() -> tuple[int, str]:
        agent._next_report_s = 0.0
        agent.tick()
        report = store.reports()["a"]
        return report.ordered, report.refused

    store.write(term, "order", RouterOrder(host="b", number=6).model_dump_json())
    assert told() == (0, "")
    store.write(term, "order", RouterOrder(host="a", number=7).model_dump_json())
    assert (told(), told()) == ((0, ""), (0, ""))
    assert router.did.count("replace") == 1
    router.is_replacing, router.refused = False, "no room"
    assert told() == (7, "no room")
    store.write(term, "order", "")
    assert told() == (7, "no room")
    assert router.did.count("replace") == 1


def test_a_damaged_record_keeps_nobody_from_work(agent: HostAgent, store: ClusterStore) -> None:
    agent.state.record_file.write_text("{")
    agent.tick()
    assert store.reports()["a"].beat == 1
    assert isinstance(agent.router, FakeRouter)
    assert agent.router.did == ["poll"]


def test_a_process_of_this_host_that_hangs_is_killed(
    store: ClusterStore, launched: Callable[..., Launched], tmp_path: Path
) -> None:
    pulses: dict[str, FakePulse] = {}

    def feel(address: str) -> Any:
        return pulses.setdefault(address, FakePulse())

    store.begin(launched(tmp_path / "state"))
    agent = HostAgent(store, "a", reach=no_way, make_router=FakeRouter, hangs=HangWatch(2.0, feel))
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        term = store.take_over()
        elsewhere = record(host="b", pid=child.pid, address="10.0.0.2:9")
        store.write(term, "record", elsewhere.model_dump_json())
        agent.tick()
        agent.tick()
        # Numbers of processes on other hosts mean nothing here.
        assert pulses == {}
        mine = record(host="a", pid=child.pid, address="10.0.0.1:9")
        store.write(term, "record", mine.model_dump_json())
        agent.tick()
        agent.tick()
        assert child.poll() is None
        pulses["10.0.0.1:9"].silent_s = 2.0
        agent.tick()
        assert child.wait(10) == -signal.SIGKILL
        agent.stop()
        assert pulses["10.0.0.1:9"].closed
    finally:
        child.kill()
        child.wait()


def test_what_is_gone_from_the_record_is_not_watched_any_more() -> None:
    pulse = FakePulse()
    made: Any = lambda address: pulse  # noqa: E731
    watch = HangWatch(2.0, made)
    mine = myself()
    assert watch.poll([("x:1", mine.pid)]) == []
    assert not pulse.closed
    assert watch.poll([]) == []
    assert pulse.closed


def test_at_the_end_router_and_map_are_gone(agent: HostAgent, store: ClusterStore) -> None:
    term = store.take_over()
    store.write(term, "map", shard_map(4).model_dump_json())
    store.write(term, "record", record().model_dump_json())
    agent.tick()
    agent.stop()
    router = agent.router
    assert isinstance(router, FakeRouter)
    assert router.did[-1] == "stop"
    assert not agent.state.shard_map_file.exists()
    assert not agent.state.record_file.exists()
    assert agent.state.control_url_file.exists()


def test_a_router_that_was_left_is_ended(tmp_path: Path) -> None:
    # A host that never had any of it.
    end_left(tmp_path / "none", "a")
    assert not (tmp_path / "none").exists()
    state = StateDir(tmp_path / "state")
    state.create()
    shard_map(4).write_atomic(state.shard_map_file)
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    found = identify(child.pid)
    assert isinstance(found, Process)
    place = state.root / "hosts" / "a"
    place.mkdir(parents=True)
    (place / "router.pid").write_text(found.model_dump_json())
    waiter = threading.Thread(target=child.wait)
    waiter.start()
    end_left(state.root, "a")
    waiter.join(10)
    assert not is_alive(found)
    assert not state.shard_map_file.exists()
    clear_mirror(state)

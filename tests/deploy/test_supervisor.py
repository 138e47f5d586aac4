import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from silvershard.cluster.shard_map import ShardEntry, ShardMap
from silvershard.deploy.cluster_store import ClusterStore, HostReport, Launched
from silvershard.deploy.control_store import Control
from silvershard.deploy.errors import TimedOut
from silvershard.deploy.host_site import Actors, HostSite
from silvershard.deploy.progress import Progress
from silvershard.deploy.state import StateDir
from silvershard.deploy.supervisor import Supervisor
from silvershard.shard.errors import LogUnavailable, StateError
from silvershard.shard.generations import generation_dir


class FakeCluster:
    """A cluster that fails when the test says so."""

    def __init__(self) -> None:
        self.did: list[str] = []
        self.generation = 0
        self.site: HostSite | None = None
        self.errors: dict[str, Exception] = {}
        self.polled = threading.Event()

    def _do(self, name: str) -> None:
        self.did.append(name)
        if name in self.errors:
            raise self.errors.pop(name)

    def start_router(self) -> None:
        self._do("start_router")

    def start_shards(self) -> None:
        self._do("start_shards")

    def wait_until_ready(self, timeout_s: float) -> None:
        self._do("wait")

    def adopt(self) -> None:
        self._do("adopt")

    def poll(self) -> None:
        if "poll" not in self.did:
            self.did.append("poll")
        if "poll" in self.errors:
            raise self.errors.pop("poll")
        self.polled.set()

    def stop(self) -> None:
        self._do("stop")


class Setup:
    def __init__(self, store: ClusterStore, made: Launched) -> None:
        self.store = store
        self.launched = made
        self.state = StateDir(Path(made.root))
        self.cluster = FakeCluster()
        self.threads: list[threading.Thread] = []

    def make(self) -> Supervisor:
        def made(launched: Launched, generation: int, site: HostSite, report: Any) -> FakeCluster:
            report("shards")
            self.cluster.generation, self.cluster.site = generation, site
            return self.cluster

        actors = Actors(lambda name: None, lambda: ["10.0.0.1", "10.0.0.2"], *[lambda _: None] * 2)
        return Supervisor(self.store, actors, "10.0.0.1", reach=no_way, make=made)

    def run(self, supervisor: Supervisor) -> threading.Thread:
        thread = threading.Thread(target=supervisor.run)
        thread.start()
        self.threads.append(thread)
        return thread

    def told(self) -> Progress:
        return self.store.read(Progress, "progress") or Progress()


def no_way(host: str) -> Any:
    raise OSError(f"{host} is not reached in this test")


def until(true: Callable[[], object]) -> None:
    give_up_s = time.monotonic() + 60
    while not true():
        assert time.monotonic() < give_up_s
        time.sleep(0.005)


@pytest.fixture
def setup(
    make_redis: Callable[..., Any], launched: Callable[..., Launched], tmp_path: Path
) -> Iterator[Setup]:
    url = make_redis().url()
    store = ClusterStore(url)
    made = Setup(store, launched(tmp_path / "state", **{"control.store": url}))
    generation_dir(made.state.generations, 3).mkdir(parents=True)
    yield made
    store.close()


def write_map(store: ClusterStore) -> None:
    entry = ShardEntry(shard=0, replica=0, address="x:9", epoch=5, documents=3, pid=9)
    made = ShardMap(version=4, generation=3, snapshot="/g", num_shards=1, entries=(entry,))
    store.write(store.take_over(), "map", made.model_dump_json())


def test_what_was_launched_is_started_and_ended(setup: Setup) -> None:
    setup.store.begin(setup.launched)
    supervisor = setup.make()
    thread = setup.run(supervisor)
    assert setup.cluster.polled.wait(30)
    assert setup.told().ready
    assert setup.store.text("wanted") == "[3]"
    assert supervisor.stop(30.0)
    thread.join(10)
    assert setup.cluster.did == ["start_router", "start_shards", "wait", "poll", "stop"]


def test_one_that_has_left_leaves_all_to_the_next_one(setup: Setup) -> None:
    setup.store.begin(setup.launched)
    supervisor = setup.make()
    ended: list[bool] = []
    thread = threading.Thread(target=lambda: ended.append(supervisor.run()))
    thread.start()
    try:
        assert setup.cluster.polled.wait(30)
        assert setup.cluster.site is not None
        setup.cluster.site.leave()
        thread.join(30)
    finally:
        supervisor.stop(30.0)
    assert ended == [False]
    assert "stop" not in setup.cluster.did
    # That it was superseded or ended is nothing that another one must know of.
    setup.store.stopping(setup.launched)
    assert setup.make().run()


def test_nothing_is_done_where_nothing_is_launched(setup: Setup) -> None:
    setup.make().run()
    setup.store.begin(setup.launched)
    setup.store.stopping(setup.launched)
    setup.make().run()
    assert setup.cluster.did == []


def test_what_runs_already_is_adopted_in_the_generation_that_is_live_by_now(setup: Setup) -> None:
    setup.store.begin(setup.launched)
    write_map(setup.store)
    setup.state.create()
    setup.state.control_url_file.write_text(setup.store.url)
    setup.state.control.write(Control(live=4))
    generation_dir(setup.state.generations, 4).mkdir()
    supervisor = setup.make()
    setup.run(supervisor)
    assert setup.cluster.polled.wait(30)
    assert setup.cluster.generation == 4
    assert supervisor.stop(30.0)
    assert setup.cluster.did == ["adopt", "poll", "stop"]


def test_why_it_cannot_start_is_told_and_nothing_is_left(setup: Setup) -> None:
    setup.store.begin(setup.launched)
    setup.cluster.errors["wait"] = TimedOut("not ready after 1 s")
    setup.make().run()
    assert (setup.told().error, setup.told().exit_code) == ("not ready after 1 s", 5)
    assert setup.cluster.did[-1] == "stop"


def test_what_fails_while_it_adopts_is_tried_again(setup: Setup) -> None:
    setup.store.begin(setup.launched)
    write_map(setup.store)
    setup.cluster.errors["adopt"] = LogUnavailable("redis://", "cannot be reached")
    supervisor = setup.make()
    setup.run(supervisor)
    assert setup.cluster.polled.wait(30)
    assert supervisor.stop(30.0)
    assert setup.cluster.did == ["adopt", "adopt", "poll", "stop"]


def test_while_the_store_is_away_all_stays_as_it_is(setup: Setup) -> None:
    setup.store.begin(setup.launched)
    setup.cluster.errors["poll"] = StateError("control store: cannot be reached")
    supervisor = setup.make()
    setup.run(supervisor)
    assert setup.cluster.polled.wait(30)
    assert "stop" not in setup.cluster.did
    assert supervisor.stop(30.0)


def test_whoever_was_superseded_ends_nothing(setup: Setup) -> None:
    setup.store.begin(setup.launched)
    first = setup.make()
    thread = setup.run(first)
    assert setup.cluster.polled.wait(30)
    setup.store.take_over()
    site = setup.cluster.site
    assert site is not None

    def poll() -> None:
        site.write_map(ShardMap.model_validate_json(MAP))

    setup.cluster.poll = poll  # type: ignore[method-assign]
    thread.join(30)
    assert not thread.is_alive()
    assert setup.store.text("map") == ""
    assert "stop" not in setup.cluster.did


MAP = (
    '{"version": 1, "generation": 3, "snapshot": "/g", "num_shards": 1, "entries": '
    '[{"shard": 0, "replica": 0, "address": "x:9", "epoch": 5, "documents": 3, "pid": 9}]}'
)


def test_a_supervisor_on_a_node_that_is_no_host_waits_for_the_generation(setup: Setup) -> None:
    setup.store.begin(setup.launched)
    generation_dir(setup.state.generations, 3).rmdir()
    setup.store.report(HostReport(host="a", beat=1, generations=()))
    supervisor = setup.make()
    setup.run(supervisor)
    until(lambda: setup.store.text("wanted") == "[3]")
    assert setup.cluster.did == []
    generation_dir(setup.state.generations, 3).mkdir()
    assert setup.cluster.polled.wait(30)
    assert setup.state.control_url_file.read_text() == setup.store.url
    assert supervisor.stop(30.0)


def test_it_can_be_ended_while_it_waits(setup: Setup) -> None:
    setup.store.begin(setup.launched)
    generation_dir(setup.state.generations, 3).rmdir()
    supervisor = setup.make()
    thread = setup.run(supervisor)
    until(lambda: setup.store.text("wanted") == "[3]")
    assert supervisor.stop(30.0)
    thread.join(10)
    assert setup.cluster.did == []

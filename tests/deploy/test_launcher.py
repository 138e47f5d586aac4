import json
import os
import subprocess
import sys
import threading
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from silvershard.cluster.dialer import PLAIN, Dialer
from silvershard.cluster.shard_map import ShardEntry, ShardMap
from silvershard.cluster.table_map import TableEntry, map_path
from silvershard.cluster.update_log import open_log
from silvershard.deploy import launcher
from silvershard.deploy.cluster_size import ClusterSize, Scaled, size_of
from silvershard.deploy.config import Config, load
from silvershard.deploy.control_store import wanted
from silvershard.deploy.errors import CommandError, TimedOut
from silvershard.deploy.launcher import LocalCluster
from silvershard.deploy.layout import Place
from silvershard.deploy.places import HerePlaces
from silvershard.deploy.processes import is_alive
from silvershard.deploy.sequencer_watch import SequencerEntry
from silvershard.deploy.shard_host import Held
from silvershard.deploy.shard_watch import ShardDead
from silvershard.deploy.site import ThisMachine
from silvershard.deploy.state import ClusterRecord, RouterPhase, RouterRecord, StateDir
from silvershard.deploy.table_tier import TableHost
from silvershard.shard.generations import generation_dir


class FakeRouter:
    """A router that does what the test says."""

    def __init__(self, state: StateDir, config: Config, dialer: Dialer = PLAIN) -> None:
        self.phase: RouterPhase = "serving"
        self.address = "127.0.0.1:8001"
        self.http = "127.0.0.1:8002"
        self.has_failed = False
        self.stopped = 0
        self.polled = 0

    @property
    def record(self) -> RouterRecord:
        return RouterRecord(state=self.phase)

    @property
    def records(self) -> tuple[RouterRecord, ...]:
        return ()

    def follow(self, control: Any) -> None:
        pass

    def start(self) -> None:
        pass

    def poll(self) -> None:
        self.polled += 1

    def last_words(self) -> str:
        return "port in use"

    def stop(self) -> None:
        self.stopped += 1


class FakeHost:
    """A shard process that holds whatever it is asked for."""

    def __init__(self, address: str) -> None:
        self.held = {3: Held("prepared", "", 9, (), (), 0.0, 0, 0, 0)}

    def poll(self) -> None:
        pass

    def prepare(self, generation: int, snapshot: str) -> None:
        self.held[generation] = self.held[3]

    def retire(self, generation: int) -> None:
        del self.held[generation]

    def close(self) -> None:
        pass


class FakeShard:
    def __init__(self, shard: int, replica: int = 0) -> None:
        self.shard = shard
        self.replica = replica
        self.count = 0
        self.said: Any = None
        self.ended = False

    def serve(self, epoch: int = 1) -> None:
        self.said = ShardEntry(
            shard=self.shard,
            replica=self.replica,
            address=f"127.0.0.1:{9000 + self.shard + 10 * self.replica}",
            epoch=epoch,
            documents=99,
            pid=os.getpid(),
        )

    def restarts(self) -> int:
        return self.count

    def entry(self) -> Any:
        if isinstance(self.said, ShardDead):
            raise self.said
        return self.said

    def ask_again(self) -> None:
        self.said = None

    def end(self) -> None:
        self.ended = True


# Partitions 0 to 31 belong to the first of two shards.
MANIFEST = {
    "spec": {
        "generation": 3,
        "model": "films",
        "partition_documents": [10, *[0] * 31, 11, *[0] * 31],
    },
    "content_hash": "a" * 64,
    "files": {},
}


class Setup:
    def __init__(self, root: Path, settings: dict[str, Any] | None = None, **options: Any) -> None:
        self.state = StateDir(root)
        self.state.create()
        snapshot = generation_dir(self.state.generations, 3)
        snapshot.mkdir(parents=True)
        (snapshot / "manifest.json").write_text(json.dumps(MANIFEST))
        self.shards = [FakeShard(0), FakeShard(1)]
        self.copies = [FakeShard(0, 1), FakeShard(1, 1)]
        self.phases: list[str] = []
        self.asked: list[str] = []
        self.others: list[FakeShard] = []
        """Those of another number of shards than two."""
        self.checked: list[tuple[ShardMap, ShardMap]] = []
        self.ended = 0
        self.sequencer = FakeShard(0)
        self.cluster = LocalCluster(
            self.state,
            load(None, environ={}, options=settings or {"updates.enabled": False}),
            generation=3,
            snapshot=snapshot,
            start_shard=self.start,
            start_check=self.check,
            start_sequencer=lambda name: self.sequencer,
            connect=FakeHost,
            canary=self.asked.append,
            report=self.phases.append,
            **options,
        )
        router = self.cluster._router
        assert isinstance(router, FakeRouter)
        self.router = router

    def start(self, num_shards: int, shard: int, replica: int) -> FakeShard:
        if num_shards == 2:
            return (self.shards, self.copies)[replica][shard]
        self.others.append(FakeShard(shard, replica))
        return self.others[-1]

    def check(self, old: Path, new: Path) -> Any:
        self.checked.append((ShardMap.read(old), ShardMap.read(new)))
        return self

    def poll(self) -> str:
        """Return what differs: nothing."""
        return ""

    def end(self) -> None:
        self.ended += 1

    @property
    def map(self) -> ShardMap:
        return ShardMap.read(self.state.shard_map_file)


def served(shard_map: ShardMap) -> list[int]:
    return [entry.shard for entry in shard_map.entries]


@pytest.fixture
def setup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Setup]:
    monkeypatch.setattr(launcher, "LocalRouters", FakeRouter)
    made = Setup(tmp_path)
    yield made
    made.cluster.stop()


def test_the_first_map_is_whole(setup: Setup) -> None:
    setup.cluster.start_shards()
    setup.shards[0].serve()
    setup.cluster.poll()
    assert not setup.state.shard_map_file.exists()
    setup.shards[1].serve()
    setup.cluster.poll()
    assert (setup.map.version, setup.map.generation, setup.map.num_shards) == (1, 3, 2)
    assert served(setup.map) == [0, 1]
    assert setup.map.snapshot == str(setup.state.generations / "gen-000003")
    assert (setup.map.sequencer, setup.map.log_url) == ("", "")
    # What an entry serves is what its generation has, whatever the process loaded first.
    assert [entry.documents for entry in setup.map.entries] == [10, 11]


def test_a_lost_shard_leaves_the_map_and_returns_to_it(setup: Setup) -> None:
    setup.cluster.start_shards()
    for shard in setup.shards:
        shard.serve()
    setup.cluster.poll()
    setup.shards[1].count = 1
    setup.cluster.poll()
    assert (setup.map.version, served(setup.map)) == (2, [0])
    record = setup.state.read_record()
    assert record is not None
    assert (record.coverage, record.map_version) == (10 / 21, 2)
    setup.shards[1].serve(epoch=2)
    setup.cluster.poll()
    assert (setup.map.version, served(setup.map)) == (3, [0, 1])
    assert setup.map.replicas(1)[0].epoch == 2


def test_nothing_is_written_while_nothing_changes(setup: Setup) -> None:
    setup.cluster.start_shards()
    for shard in setup.shards:
        shard.serve()
    setup.cluster.poll()
    written = setup.state.shard_map_file.stat().st_mtime_ns
    for _ in range(5):
        setup.cluster.poll()
    assert setup.state.shard_map_file.stat().st_mtime_ns == written
    assert setup.router.polled == 6


def test_ready_means_all_shards_and_the_router(setup: Setup) -> None:
    setup.cluster.start_shards()
    setup.shards[0].serve()
    with pytest.raises(TimedOut, match="1 of 2 shards serve, 0 in the map, the router"):
        setup.cluster.wait_until_ready(0.0)
    setup.shards[1].serve()
    setup.router.phase = "starting"
    with pytest.raises(TimedOut, match="2 in the map, the router is starting"):
        setup.cluster.wait_until_ready(0.0)
    setup.router.phase = "serving"
    assert setup.asked == []
    setup.cluster.wait_until_ready(0.0)
    assert setup.asked == ["127.0.0.1:8001"]


def test_a_shard_that_cannot_start_ends_the_wait_with_its_reason(setup: Setup) -> None:
    setup.cluster.start_shards()
    setup.shards[1].said = ShardDead("snapshot x: tables/a is missing")
    with pytest.raises(CommandError, match="shard 1 could not start: snapshot x: tables/a is"):
        setup.cluster.wait_until_ready(10.0)


def test_ready_means_all_processes_of_tables_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launcher, "LocalRouters", FakeRouter)
    hosts: list[FakeShard] = []

    def start(shard: int, holding: Path) -> Any:
        assert holding.is_file()
        hosts.append(FakeShard(shard))
        return hosts[-1]

    setup = Setup(tmp_path, start_tables=start)
    snapshot = generation_dir(setup.state.generations, 3)
    (snapshot / "rows").mkdir()
    save_file({"records": np.zeros((10, 8), np.uint8)}, snapshot / "rows" / "users.safetensors")
    files = {"rows/users.safetensors": {"sha256": "0" * 64, "size": 80}}
    (snapshot / "manifest.json").write_text(json.dumps(MANIFEST | {"files": files}))
    setup.cluster.start_shards()
    for shard in setup.shards:
        shard.serve()
    with pytest.raises(TimedOut, match="0 of 2 table processes and 2 of 2 shards serve"):
        setup.cluster.wait_until_ready(0.0)
    record = setup.state.read_record()
    assert record is not None
    assert [one.state for one in record.tables] == ["starting", "starting"]
    assert not record.is_whole
    for host in hosts:
        entry = TableEntry(
            shard=host.shard, address="127.0.0.1:1", epoch=1, rows=5, pid=os.getpid()
        )
        host.said = TableHost(shard=host.shard, pid=os.getpid(), tables={"users": entry})
    setup.cluster.wait_until_ready(0.0)
    assert map_path(setup.state.tables_dir, 3, "users").exists()
    hosts[0].count = 1
    setup.cluster.poll()
    hosts[0].said = ShardDead("users.safetensors: no such file")
    with pytest.raises(CommandError, match=r"table process 0 could not start: users\.safe"):
        setup.cluster.wait_until_ready(0.0)
    setup.cluster.stop()
    assert [host.ended for host in hosts] == [True, True]


def test_a_router_that_cannot_start_ends_the_wait_with_its_reason(setup: Setup) -> None:
    setup.router.has_failed = True
    with pytest.raises(CommandError, match="the router could not start: port in use"):
        setup.cluster.wait_until_ready(10.0)


def test_a_failed_start_ends_everything(setup: Setup) -> None:
    setup.shards[0].said = ShardDead("broken")
    store = setup.state.control
    with pytest.raises(CommandError), setup.cluster:
        pass
    assert store.read().live == 0
    assert setup.router.stopped == 1
    assert all(shard.ended for shard in setup.shards)


def test_the_context_ends_everything(setup: Setup) -> None:
    for shard in setup.shards:
        shard.serve()
    with setup.cluster as cluster:
        assert setup.state.control.read().live == 3
        assert [shard.state for shard in cluster.shards] == ["serving", "serving"]
        assert setup.phases[0] == "router"
    assert setup.router.stopped == 1
    assert all(shard.ended for shard in setup.shards)


def test_the_record_says_where_the_admin_plane_is(setup: Setup) -> None:
    setup.cluster.announce()
    record = setup.state.read_record()
    assert record is not None
    assert record.admin == ""
    setup.cluster.admin = "127.0.0.1:9"
    setup.cluster.announce()
    record = setup.state.read_record()
    assert record is not None
    assert record.admin == "127.0.0.1:9"


def test_the_record_names_all_processes_below(setup: Setup) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE
    ) as child:
        setup.cluster.announce()
        record = setup.state.read_record()
        assert record is not None
        (own,) = [process for process in record.processes if process.pid == child.pid]
        assert record.driver.pid == os.getpid()
        setup.cluster.kill_leftovers()
        child.wait()
        assert not is_alive(own)


def test_watching_ends_when_told(setup: Setup) -> None:
    stop = threading.Event()
    stop.set()
    setup.cluster.run(stop)
    assert setup.router.polled == 0


def test_every_replica_of_every_shard_is_in_the_map(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launcher, "LocalRouters", FakeRouter)
    setup = Setup(tmp_path, {"updates.enabled": False, "sharding.replicas": 2})
    setup.cluster.start_shards()
    for shard in (*setup.shards, setup.copies[0]):
        shard.serve()
    with pytest.raises(TimedOut, match="3 of 4 shards serve"):
        setup.cluster.wait_until_ready(0.0)
    setup.copies[1].serve()
    setup.cluster.wait_until_ready(0.0)
    assert [(one.shard, one.replica) for one in setup.map.entries] == [
        *((0, 0), (0, 1)),
        *((1, 0), (1, 1)),
    ]
    record = setup.state.read_record()
    assert record is not None
    assert [one.replica for one in record.shards] == [0, 0, 1, 1]
    assert (record.documents, record.coverage) == (21, 1.0)
    setup.copies[1].count = 1
    setup.cluster.poll()
    record = setup.state.read_record()
    assert record is not None
    assert (record.coverage, record.is_whole) == (1.0, False)
    setup.cluster.stop()
    assert all(one.ended for one in (*setup.shards, *setup.copies))


def test_the_log_is_made_and_the_map_names_it_and_the_sequencer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launcher, "LocalRouters", FakeRouter)
    setup = Setup(tmp_path, {"updates.partitions": 4})
    setup.cluster.start_shards()
    for shard in setup.shards:
        shard.serve()
    with pytest.raises(TimedOut, match="the sequencer does not serve"):
        setup.cluster.wait_until_ready(0.0)
    assert setup.map.sequencer == ""
    setup.sequencer.said = SequencerEntry(address="127.0.0.1:7", pid=os.getpid())
    setup.cluster.wait_until_ready(0.0)
    assert setup.map.sequencer == "127.0.0.1:7"
    assert setup.map.log_url == f"sqlite:///{setup.state.updates_file}"
    assert setup.map.log_partitions == 4
    log = open_log(setup.map.log_url, None, create=False)
    control = setup.state.control.read()
    pinned = {f"{control.state_id}/gen-000003": (0, 0, 0, 0)}
    assert (log.num_partitions, log.pins(), log.log_id) == (4, pinned, control.log_id)
    log.close()
    record = setup.state.read_record()
    assert record is not None
    assert record.sequencer is not None
    assert record.sequencer.address == "127.0.0.1:7"
    setup.sequencer.count = 1
    setup.cluster.poll()
    assert setup.map.sequencer == ""
    record = setup.state.read_record()
    assert record is not None
    assert not record.is_whole
    setup.cluster.stop()
    assert setup.sequencer.ended


def test_the_map_follows_a_swap_with_one_change(setup: Setup) -> None:
    other = generation_dir(setup.state.generations, 4)
    other.mkdir()
    (other / "manifest.json").write_text(
        json.dumps({**MANIFEST, "spec": {**MANIFEST["spec"], "generation": 4}})
    )
    setup.cluster.start_shards()
    for shard in setup.shards:
        shard.serve()
    store = setup.state.control
    setup.cluster.wait_until_ready(0.0)
    operation = wanted("activate", 4, "live")
    store.change(lambda now: now.with_operation(operation))
    maps = {setup.map.version: setup.map}
    for _ in range(4):
        setup.cluster.poll()
        maps[setup.map.version] = setup.map
    assert [(one.generation, one.snapshots) for one in maps.values()] == [
        (3, {}),
        (4, {3: str(setup.state.generations / "gen-000003")}),
    ]
    assert setup.map.snapshot == str(other)
    record = setup.state.read_record()
    assert record is not None
    assert record.generation == 4
    assert [(one.generation, one.role) for one in record.generations] == [
        (3, "previous"),
        (4, "live"),
    ]


def test_the_map_follows_a_new_number_of_shards_with_one_change(setup: Setup) -> None:
    setup.cluster.start_shards()
    for shard in setup.shards:
        shard.serve()
    setup.cluster.wait_until_ready(0.0)
    store, config = setup.state.control, load(None, environ={})
    size = ClusterSize(shards=3, replicas=1)
    scaled = Scaled(size=size, instead_of=size_of(config))
    operation = wanted("scale", 0, "live").model_copy(update={"scaled": scaled})
    store.change(lambda now: now.with_operation(operation))
    setup.cluster.poll()
    for number, other in enumerate(setup.others):
        other.serve()
        other.said = other.said.model_copy(update={"address": f"127.0.0.1:{9100 + number}"})
    maps = {setup.map.version: setup.map}
    for _ in range(4):
        setup.cluster.poll()
        maps[setup.map.version] = setup.map
    assert [(one.num_shards, len(one.entries)) for one in maps.values()] == [(2, 2), (3, 3)]
    assert sum(one.documents for one in setup.map.entries) == 21
    ((old, new),) = setup.checked
    assert (old, new.num_shards, new.entries) == (maps[1], 3, setup.map.entries)
    assert setup.ended == 1
    assert store.read().scaled == scaled
    record = setup.state.read_record()
    assert record is not None
    assert (record.size, len(record.shards), record.documents) == (size, 3, 21)
    assert record.is_whole
    # The old ones end when nobody can be waiting for them any more, or with the cluster.
    assert not any(shard.ended for shard in setup.shards)
    setup.cluster.stop()
    assert all(shard.ended for shard in (*setup.shards, *setup.others))


def test_the_driver_of_a_cluster_needs_no_torch() -> None:
    code = "import sys, silvershard.deploy.launcher\nprint('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, check=False
    )
    assert (done.stdout.strip(), done.stderr) == ("False", "")


def test_the_first_map_names_no_standby_and_is_whole_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launcher, "LocalRouters", FakeRouter)
    setup = Setup(tmp_path, {"updates.enabled": False, "sharding.standby": 1})
    setup.cluster.start_shards()
    for one in (*setup.shards, *setup.copies):
        one.serve()
    setup.cluster.poll()
    assert sorted((one.shard, one.replica) for one in setup.map.entries) == [(0, 0), (1, 0)]
    standby = [(one.shard, one.replica) for one in setup.cluster.shards if one.standby]
    assert standby == [(0, 1), (1, 1)]
    setup.cluster.stop()


class FakePlaces(HerePlaces):
    def where(self, place: Place) -> str:
        return f"host of {place.shard}-{place.replica} of {place.num_shards}"


class FakeSite(ThisMachine):
    """Several hosts whose routers follow a map already."""

    ray = "10.0.0.9:6379"
    name = "h1"

    def __init__(self, state: StateDir, found: ShardMap | None) -> None:
        super().__init__(state)
        self.places = FakePlaces()
        self.feel = None
        self.found = found
        self.maps: list[ShardMap] = []
        self.records: list[ClusterRecord] = []
        self.kept: set[int] = set()

    def poll(self, kept: Collection[int]) -> None:
        self.kept = set(kept)

    def read_map(self) -> ShardMap | None:
        return self.found

    def write_map(self, shard_map: ShardMap) -> None:
        self.maps.append(shard_map)

    def write_record(self, record: ClusterRecord) -> None:
        self.records.append(record)


def found_map() -> ShardMap:
    entries = tuple(
        ShardEntry(shard=one, replica=0, address=f"x:{one}", epoch=7, documents=9, pid=1)
        for one in range(2)
    )
    return ShardMap(version=8, generation=3, snapshot="/g", num_shards=2, entries=entries)


def test_a_cluster_that_is_adopted_keeps_its_map_until_everybody_has_spoken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launcher, "LocalRouters", FakeRouter)
    now_s = 1000.0
    monkeypatch.setattr(launcher.time, "monotonic", lambda: now_s)
    site = FakeSite(StateDir(tmp_path), found_map())
    setup = Setup(tmp_path, site=site)
    # It was started again before, which is no reason to give it up.
    setup.shards[0].count = 9
    setup.cluster.adopt()
    assert setup.state.control.read().live == 3
    assert site.kept == set()
    setup.cluster.poll()
    setup.shards[0].serve(epoch=7)
    setup.cluster.poll()
    assert site.maps == []
    assert site.kept == {3}
    setup.shards[1].serve(epoch=8)
    setup.cluster.poll()
    assert [one.version for one in site.maps] == [9]
    assert [(one.shard, one.epoch) for one in site.maps[0].entries] == [(0, 7), (1, 8)]
    record = site.records[-1]
    assert [(one.host, one.restarts) for one in record.shards] == [
        ("host of 0-0 of 2", 9),
        ("host of 1-0 of 2", 0),
    ]
    assert (record.ray, record.host) == ("10.0.0.9:6379", "h1")
    assert not setup.state.record_file.exists()
    setup.cluster.stop()


def test_who_has_not_spoken_in_time_leaves_the_map(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launcher, "LocalRouters", FakeRouter)
    now_s = 1000.0
    monkeypatch.setattr(launcher.time, "monotonic", lambda: now_s)
    site = FakeSite(StateDir(tmp_path), found_map())
    setup = Setup(tmp_path, site=site)
    setup.cluster.adopt()
    setup.shards[1].serve(epoch=7)
    setup.cluster.poll()
    assert site.maps == []
    now_s += 31.0
    setup.cluster.poll()
    assert [served(one) for one in site.maps] == [[1]]
    setup.cluster.stop()

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from silvershard.cluster.config import RouterConfig
from silvershard.cluster.shard_map import ShardEntry, ShardMap
from silvershard.deploy.cluster_size import ClusterSize, Scaled, size_of
from silvershard.deploy.cluster_store import (
    ClusterStore,
    HostReport,
    Launched,
    RouterOrder,
    Superseded,
)
from silvershard.deploy.control_store import Control
from silvershard.deploy.host_site import NAMESPACE, Actors, HostRouters, HostSite, MovingHandle
from silvershard.deploy.layout import Layout
from silvershard.deploy.placement import Copy, Move
from silvershard.deploy.processes import myself
from silvershard.deploy.sequencer_watch import SequencerEntry
from silvershard.deploy.staging import Stager
from silvershard.deploy.state import ClusterRecord, RouterRecord, SequencerRecord, StateDir
from silvershard.shard.generations import generation_dir


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


class Setup:
    def __init__(self, store: ClusterStore, made: Launched) -> None:
        self.store = store
        self.launched = made
        self.clock = Clock()
        self.up = {"10.0.0.1", "10.0.0.2"}
        self.running: dict[str, str] = {}
        self.ended: list[Any] = []
        self.restarted: list[Any] = []
        self.control = Control(live=3)
        self.term = store.take_over()
        self.site = self.make(self.term)

    def make(self, term: int, address: str = "10.0.0.2") -> HostSite:
        return HostSite(
            self.store,
            self.launched,
            term,
            Actors(self.running.get, lambda: self.up, self.ended.append, self.restarted.append),
            address=address,
            stager=Stager(Path(self.launched.root) / "generations", "supervisor", no_way),
            control=lambda: self.control,
            clock=self.clock,
        )


def no_way(host: str) -> Any:
    raise OSError(f"{host} is not reached in this test")


@pytest.fixture
def setup(
    make_redis: Callable[..., Any], launched: Callable[..., Launched], tmp_path: Path
) -> Iterator[Setup]:
    store = ClusterStore(make_redis().url())
    yield Setup(store, launched(tmp_path))
    store.close()


def report(host: str, beat: int, state: str = "serving", *generations: int) -> HostReport:
    address = f"{host}:8001"
    router = RouterRecord.model_validate({"state": state, "host": host, "address": address})
    return HostReport(
        host=host, beat=beat, generations=generations, router=router, http=f"{host}:8002"
    )


def test_an_actor_is_tied_to_the_host_of_its_copy(setup: Setup) -> None:
    site = setup.site
    assert (site.host_of("shard-0-1-2"), site.name, site.ray) == ("b", "b", "10.0.0.9:6379")
    options = site.options("shard-0-1-2")
    assert options["resources"] == {"node:10.0.0.2": 0.001}
    assert (options["lifetime"], options["namespace"]) == ("detached", NAMESPACE)
    bound = {"host": "10.0.0.2", "epochs": setup.store.url}
    assert site.binding("shard-0-1-2") == bound
    setup.running["shard-0-1-2"] = "the actor"
    assert (site.find("shard-0-1-2"), site.find("shard-0-0-1")) == ("the actor", None)
    # Where the supervisor is no host, people see its address.
    assert setup.make(setup.term, "10.0.0.9").name == "10.0.0.9"


def test_what_an_earlier_supervisor_had_begun_is_ended_when_no_map_names_it(setup: Setup) -> None:
    move = Move(Copy(0, 0), "a", "b")
    setup.site.places.begin([move], setup.launched.config.sharding)
    setup.running["shard-0-0-5"] = "the second one"
    site = setup.make(setup.store.take_over())
    site.poll({3})
    # The first settings have one replica only, and the second ones are left of others.
    assert site.places.strays == ["shard-0-1-2", "shard-1-1-4", "shard-0-0-5"]
    setup.clock.now_s += 34.0
    site.poll({3})
    assert setup.ended == []
    setup.clock.now_s += 60.0
    site.poll({3})
    assert setup.ended == ["the second one"]
    setup.clock.now_s += 1.0
    site.poll({3})
    layout = setup.store.read(Layout, "layout")
    assert layout is not None
    assert [one.actor for one in layout.copies] == ["shard-0-0-1", "shard-1-0-3"]
    assert setup.ended == ["the second one"]


def test_a_host_that_does_not_come_back_counts_as_down(setup: Setup) -> None:
    def states() -> list[str]:
        setup.site.poll({3})
        return [one.state for one in setup.site.places.hosts]

    assert states() == ["up", "up"]
    setup.up.discard("10.0.0.2")
    setup.clock.now_s += 1.0
    assert states() == ["up", "up"]
    setup.clock.now_s += 599.0
    assert states() == ["up", "up"]
    setup.clock.now_s += 1.0
    assert states() == ["up", "down"]
    # A host that a person has in maintenance comes back.
    setup.control = Control(live=3, host_states={"b": "maintenance"})
    setup.clock.now_s += 1.0
    assert states() == ["up", "maintenance"]
    setup.control = Control(live=3)
    setup.up.add("10.0.0.2")
    setup.clock.now_s += 1.0
    assert states() == ["up", "up"]
    # The time begins anew.
    setup.up.discard("10.0.0.2")
    setup.clock.now_s += 1.0
    assert states() == ["up", "up"]


def test_what_scale_left_is_in_force(setup: Setup) -> None:
    size = ClusterSize(shards=3, replicas=1)
    scaled = Scaled(size=size, instead_of=size_of(setup.launched.config))
    setup.control = Control(live=3, scaled=scaled)
    site = setup.make(setup.store.take_over())
    assert size_of(site.config) == size
    setup.control = Control(live=3, scaled=scaled.model_copy(update={"instead_of": size}))
    assert setup.make(setup.store.take_over()).config == setup.launched.config


def test_map_and_record_go_to_the_hosts_and_only_from_the_newest_supervisor(setup: Setup) -> None:
    assert setup.site.read_map() is None
    entry = ShardEntry(shard=0, replica=0, address="x:9", epoch=5, documents=3, pid=9)
    made = ShardMap(version=1, generation=3, snapshot="/gen-000003", num_shards=1, entries=(entry,))
    setup.site.write_map(made)
    next_one = setup.make(setup.store.take_over())
    assert next_one.read_map() == made
    # Where the supervisor runs it is beside that of the host, with the settings of a router.
    assert ShardMap.read(next_one.maps.shard_map_file) == made
    assert next_one.maps.shard_map_file != StateDir(Path(setup.launched.root)).shard_map_file
    found = RouterConfig.model_validate_json(next_one.maps.router_file.read_text())
    assert found.map_path == str(next_one.maps.shard_map_file)
    with pytest.raises(Superseded):
        setup.site.write_map(made.model_copy(update={"version": 2}))
    assert next_one.read_map() == made


def test_who_was_superseded_does_not_look_again(setup: Setup) -> None:
    setup.site.poll({3})
    other = setup.make(setup.store.take_over())
    # Between two looks it does not know.
    setup.site.poll({3})
    setup.clock.now_s += 1.0
    with pytest.raises(Superseded):
        setup.site.poll({3})
    # Nor does it forget that it has to look.
    with pytest.raises(Superseded):
        setup.site.poll({3})
    other.poll({3})


def test_a_generation_is_lacking_until_every_host_with_copies_has_it(setup: Setup) -> None:
    site = setup.site
    assert site.lacking(4) == ("generation 4 is not where the supervisor runs: ")
    generation_dir(Path(setup.launched.root) / "generations", 4).mkdir(parents=True)
    assert site.lacking(4) == "generation 4 is not on a yet"
    setup.store.report(report("a", 1, "serving", 3, 4))
    fetching = report("b", 1, "serving", 3)
    setup.store.report(fetching.model_copy(update={"staging": "generation 4 is fetched from a"}))
    site.poll({3, 4})
    assert setup.store.text("wanted") == "[3, 4]"
    assert site.lacking(4) == "generation 4 is not on b yet (generation 4 is fetched from a)"
    setup.store.report(report("b", 2, "serving", 3, 4))
    # Nobody is asked all the time.
    site.poll({3, 4})
    assert site.lacking(4) != ""
    setup.clock.now_s += 1.0
    site.poll({3, 4})
    assert site.lacking(4) == ""
    # To let go of an alias takes no generation.
    assert setup.site.lacking(0) == ""


def test_the_agents_of_hosts_that_are_there_are_restarted_in_turn(setup: Setup) -> None:
    site = setup.site
    setup.running |= {"host-a": "actor a", "host-b": "actor b"}
    site.agents.replace()

    def look(incarnation: int) -> None:
        setup.clock.now_s += 1.0
        setup.store.report(HostReport(host="a", beat=1, incarnation=incarnation))
        site.poll({3})

    look(1)
    look(1)
    assert setup.restarted == ["actor a"]
    # The other one is lost meanwhile, and will start anew by itself.
    setup.up = {"10.0.0.1"}
    look(2)
    look(2)
    assert not site.agents.is_replacing
    assert setup.restarted == ["actor a"]
    assert setup.ended == []


def test_routers_are_as_their_hosts_say() -> None:
    clock = Clock()
    routers = HostRouters(["a", "b"], clock)
    assert (routers.phase, routers.address, routers.has_failed) == ("starting", "", False)
    routers.take({"a": report("a", 1, "starting"), "b": report("b", 1)})
    assert (routers.phase, routers.address, routers.http) == ("starting", "b:8001", "b:8002")
    routers.take({"a": report("a", 2), "b": report("b", 2)})
    assert (routers.phase, routers.record.host) == ("serving", "a")
    clock.now_s += 6.0
    routers.take({"a": report("a", 2), "b": report("b", 3)})
    assert (routers.phase, routers.address) == ("restarting", "b:8001")
    assert routers.records[0].reason == "its host has said nothing for 6 s"
    assert routers.last_words() == "its host has said nothing for 6 s"
    routers.take({"a": report("a", 3), "b": report("b", 4)})
    assert routers.phase == "serving"


def test_routers_are_replaced_one_host_after_the_other() -> None:
    orders: list[str] = []
    routers = HostRouters(["a", "b"], Clock(), orders.append)
    routers.replace()

    def ordered() -> RouterOrder:
        return RouterOrder.model_validate_json(orders[-1])

    def done(host: str, number: int, refused: str = "") -> dict[str, HostReport]:
        made = report(host, number).model_copy(update={"ordered": number, "refused": refused})
        return {"a": report("a", 1), "b": report("b", 1), host: made}

    first = ordered()
    assert (first.host, routers.is_replacing) == ("a", True)
    routers.take(done("a", first.number - 1))
    assert orders == [first.model_dump_json()]
    routers.take(done("a", first.number))
    second = ordered()
    assert (second.host, second.number > first.number) == ("b", True)
    routers.take(done("b", second.number))
    # Who starts anew shall not carry it out again.
    assert (routers.is_replacing, routers.refused, orders[-1]) == (False, "", "")
    routers.replace()
    routers.take(done("a", ordered().number, "no room"))
    assert (routers.is_replacing, routers.refused) == (False, "a: no room")
    assert (len(orders), orders[-1]) == (5, "")


class FakeSequencer:
    def __init__(self, host: str) -> None:
        self.host = host
        self.count = 0
        self.ended = False
        self.asked = 0

    def restarts(self) -> int:
        return self.count

    def entry(self) -> SequencerEntry | None:
        return SequencerEntry(address=f"{self.host}:9", pid=7)

    def ask_again(self) -> None:
        self.asked += 1

    def end(self) -> None:
        self.ended = True


def test_a_sequencer_moves_when_its_host_is_lost_and_only_then(setup: Setup) -> None:
    started: list[FakeSequencer] = []
    site = setup.site

    def start() -> FakeSequencer:
        started.append(FakeSequencer(site.host_of("sequencer")))
        return started[-1]

    handle: MovingHandle[Any] = MovingHandle(site, "sequencer", start, clock=setup.clock)
    assert site.binding("sequencer") == {"host": "10.0.0.1", "patient": True}
    started[0].count = 2
    setup.clock.now_s += 2.0
    assert (handle.restarts(), [one.host for one in started]) == (2, ["a"])
    # Without another host it stays: that one may come back.
    setup.up.clear()
    setup.clock.now_s += 2.0
    assert (handle.restarts(), len(started)) == (2, 1)
    setup.up.add("10.0.0.2")
    setup.clock.now_s += 2.0
    assert handle.restarts() == 3
    assert ([one.host for one in started], started[0].ended) == (["a", "b"], True)
    found = handle.entry()
    assert found is not None
    assert found.address == "b:9"
    # Whoever comes back takes nothing back.
    setup.up.add("10.0.0.1")
    setup.clock.now_s += 2.0
    assert (handle.restarts(), site.host_of("sequencer")) == (3, "b")
    handle.ask_again()
    handle.end()
    assert (started[1].asked, started[1].ended) == (1, True)


def test_an_adopted_sequencer_stays_where_it_is(setup: Setup) -> None:
    setup.running["sequencer"] = "the actor"
    setup.site.write_record(
        ClusterRecord(
            guard=myself(),
            driver=myself(),
            address="",
            model="films",
            generation=3,
            documents=3,
            router=RouterRecord(state="serving"),
            shards=(),
            sequencer=SequencerRecord(state="serving", host="b"),
            ray_dir="",
            since_unix_s=1.0,
        )
    )
    started: list[FakeSequencer] = []

    def start() -> FakeSequencer:
        started.append(FakeSequencer(setup.site.host_of("sequencer")))
        return started[-1]

    handle: MovingHandle[Any] = MovingHandle(setup.site, "sequencer", start, clock=setup.clock)
    assert setup.site.host_of("sequencer") == "b"
    setup.up.discard("10.0.0.1")
    setup.clock.now_s += 2.0
    assert (handle.restarts(), len(started)) == (0, 1)
    # It is lost; the next one is started as soon as Ray has given its name free.
    setup.up.add("10.0.0.1")
    setup.up.discard("10.0.0.2")
    setup.clock.now_s += 2.0
    assert (handle.restarts(), handle.entry(), started[0].ended) == (1, None, True)
    del setup.running["sequencer"]
    setup.clock.now_s += 2.0
    assert (handle.restarts(), [one.host for one in started]) == (1, ["b", "a"])

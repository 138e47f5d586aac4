import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from silvershard.cluster import wire
from silvershard.cluster.shard_map import ShardEntry
from silvershard.deploy.config import load
from silvershard.deploy.control_store import Operation, wanted
from silvershard.deploy.errors import Refused
from silvershard.deploy.generation_watch import GenerationWatch
from silvershard.deploy.rolling import Rolling
from silvershard.deploy.scaling import Scaling
from silvershard.deploy.shard_host import Held
from silvershard.deploy.shard_watch import ShardDead
from silvershard.deploy.state import StateDir
from silvershard.shard.errors import StateError
from silvershard.shard.generations import generation_dir


class FakeHost:
    """A process that holds all it is wished for."""

    def __init__(self, cut: int) -> None:
        self.cut = cut
        self.numbers = {1}

    @property
    def held(self) -> Mapping[int, Held]:
        held = Held("prepared", "", 9, (self.cut,), (), 0.0, 0, 0, 0)
        return dict.fromkeys(self.numbers, held)

    def poll(self) -> None:
        pass

    def prepare(self, generation: int, snapshot: str) -> None:
        self.numbers.add(generation)

    def retire(self, generation: int) -> None:
        self.numbers.discard(generation)

    def close(self) -> None:
        pass


class FakeShard:
    """A process of a shard, which is this one."""

    def __init__(self, number: int, shard: int, replica: int) -> None:
        self.number = number
        self.place = shard, replica
        self.serves = True
        self.dead = ""
        self.ended = False
        self.wire = wire.VERSION

    def restarts(self) -> int:
        return 0

    def entry(self) -> ShardEntry | None:
        if self.dead:
            raise ShardDead(self.dead)
        if not self.serves:
            return None
        shard, replica = self.place
        return ShardEntry(
            shard=shard,
            replica=replica,
            address=f"127.0.0.1:{9000 + self.number}",
            epoch=1 + self.number,
            documents=1,
            pid=os.getpid(),
            release="9.0",
            wire=self.wire,
        )

    def ask_again(self) -> None:
        pass

    def end(self) -> None:
        self.ended = True


class FakeFront:
    """Something that is replaced as soon as the test says so."""

    def __init__(self) -> None:
        self.replaced = 0
        self.is_replacing = False
        self.refused = ""

    def replace(self) -> None:
        self.replaced += 1


class Setup:
    """A driver whose shard processes are all in this one."""

    def __init__(self, state: StateDir, **options: Any) -> None:
        self.now_s = 1000.0
        settings = {"sharding.shards": 2, "query.deadline_max_ms": 2000, "swap.drain_ms": 1000}
        self.config = load(None, environ={}, options={**settings, **options})
        self.shards: list[FakeShard] = []
        self.hosts: dict[str, FakeHost] = {}
        self.cut = 5
        self.serves = True
        self.fewest: dict[int, int] = {}
        """The least number of copies of a shard that the map ever named."""
        self.store = state.control
        self.generations = GenerationWatch(
            state, self.config, 1, connect=self.connect, clock=lambda: self.now_s
        )
        self.scaling = Scaling(
            state,
            self.config,
            self.generations,
            self.start,
            connect=self.connect,
            draw_map=self.never,
            start_check=self.never,
            clock=lambda: self.now_s,
        )
        self.routers, self.sequencer = FakeFront(), FakeFront()
        self.left: list[float] = []
        self.rolling = Rolling(
            state,
            self.config,
            self.generations,
            self.scaling,
            {"routers": self.routers, "sequencer": self.sequencer},
            leave=lambda: self.left.append(self.now_s),
            clock=lambda: self.now_s,
        )
        self.generations.started()
        self.scaling.start()
        self.poll(2)
        self.fewest.clear()

    def connect(self, address: str) -> FakeHost:
        self.hosts[address] = FakeHost(self.cut)
        return self.hosts[address]

    def never(self, *_: Any) -> Any:
        raise AssertionError

    def start(self, num_shards: int, shard: int, replica: int) -> FakeShard:
        made = FakeShard(len(self.shards), shard, replica)
        made.serves = self.serves
        self.shards.append(made)
        return made

    def poll(self, times: int = 1, forward_s: float = 0.0) -> None:
        for _ in range(times):
            self.now_s += forward_s
            self.scaling.current.poll()
            self.generations.poll(self.scaling.current.watches)
            self.scaling.poll()
            self.rolling.poll()
            for shard in range(2):
                named = sum(one == shard for one, _ in self.named)
                self.fewest[shard] = min(named, self.fewest.get(shard, named))
            # Nobody is named who has ended.
            assert set(self.named) <= set(self.living)

    @property
    def named(self) -> list[tuple[int, int]]:
        return sorted((one.shard, one.replica) for one in self.generations.in_service)

    @property
    def living(self) -> list[tuple[int, int]]:
        return sorted(one.place for one in self.shards if not one.ended)

    def ask(self) -> str:
        operation = wanted("restart", 0, "live")
        self.store.change(lambda now: now.with_operation(operation))
        return operation.operation_id

    def operation(self, operation_id: str) -> Operation:
        found = self.store.read().operation(operation_id)
        assert found is not None
        return found

    def until_ended(self, operation_id: str) -> Operation:
        for _ in range(200):
            if self.operation(operation_id).has_ended:
                break
            self.poll(1, forward_s=0.5)
        return self.operation(operation_id)


@pytest.fixture
def state(tmp_path: Path, generation: Any) -> StateDir:
    made = StateDir(tmp_path / "s")
    made.create()
    made.generations.mkdir()
    for number in (1, 2):
        generation_dir(made.generations, number).symlink_to(generation.path)
    return made


@pytest.fixture
def make(state: StateDir) -> Iterator[Any]:
    made: list[Setup] = []

    def setup(**options: Any) -> Setup:
        made.append(Setup(state, **options))
        return made[-1]

    yield setup
    for one in made:
        one.scaling.close()
        one.generations.close()
        assert one.living == []


def test_without_room_for_a_further_copy_nothing_is_restarted(
    make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup = make()

    def refused(sharding: Any) -> None:
        raise Refused("shard 0 replica 1 needs 9 GiB")

    monkeypatch.setattr(setup.scaling, "resize", refused)
    ended = setup.until_ended(setup.ask())
    assert ended.state == "failed"
    assert ended.reason == "a further copy has no room: shard 0 replica 1 needs 9 GiB"
    assert setup.living == setup.named == [(0, 0), (1, 0)]


def test_a_restart_that_cannot_be_written_down_is_tried_again(
    make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup = make(**{"sharding.replicas": 2})
    start, failures = setup.start, iter((True, False))

    def away(*place: int) -> Any:
        if next(failures, False):
            raise StateError("the store is away")
        return start(*place)

    monkeypatch.setattr(setup.scaling.current, "_start", away)
    assert setup.until_ended(setup.ask()).state == "done"
    assert len(setup.shards) == 8


COPIES = [(0, 0), (0, 1), (1, 0), (1, 1)]


def test_every_process_is_restarted_while_another_copy_serves(make: Any) -> None:
    setup = make(**{"sharding.replicas": 2})
    before = list(setup.shards)
    asked = setup.ask()
    assert setup.until_ended(asked).state == "done"
    assert all(one.ended for one in before)
    assert [one.place for one in setup.shards[4:]] == COPIES
    assert setup.fewest == {0: 1, 1: 1}
    setup.poll(2)
    assert setup.named == setup.living == COPIES
    assert (setup.routers.replaced, setup.sequencer.replaced) == (1, 1)


def test_routers_and_sequencer_are_replaced_when_every_process_is_back(make: Any) -> None:
    setup = make(**{"sharding.replicas": 2})
    setup.routers.is_replacing = True
    asked = setup.ask()
    assert setup.until_ended(asked).state == "running"
    assert setup.routers.replaced == 1
    assert setup.operation(asked).progress == "4 processes are restarted, now routers"
    assert [one.place for one in setup.shards[4:]] == COPIES
    assert setup.sequencer.replaced == 0
    setup.routers.is_replacing, setup.sequencer.is_replacing = False, True
    setup.poll(5)
    assert setup.operation(asked).progress == "4 processes are restarted, now sequencer"
    setup.sequencer.is_replacing = False
    setup.poll(2)
    assert setup.operation(asked).state == "done"
    assert (setup.routers.replaced, setup.sequencer.replaced) == (1, 1)


def test_the_driver_goes_last_and_once(make: Any) -> None:
    setup = make()
    asked = setup.ask()
    assert setup.until_ended(asked).state == "done"
    # The further copies are still to end, and whatever comes then is to be done.
    setup.poll(2)
    assert setup.left == []
    setup.poll(8, forward_s=1.0)
    assert len(setup.left) == 1
    asked = setup.ask()
    setup.shards[0].dead = "for the test"
    setup.poll(1)
    operation = setup.operation(asked)
    setup.store.change(lambda now: now.replaced(operation.ended("cancelled")))
    setup.poll(8, forward_s=1.0)
    assert len(setup.left) == 1


@pytest.mark.parametrize("copies", [1, 2])
def test_a_release_that_no_router_asks_stays_where_it_began(make: Any, copies: int) -> None:
    setup = make(**{"sharding.replicas": copies})
    start = setup.start

    def start_next(*place: int) -> FakeShard:
        made: FakeShard = start(*place)
        made.wire = wire.VERSION + 1
        return made

    setup.scaling.current._start = start_next
    ended = setup.until_ended(setup.ask())
    assert ended.state == "failed"
    assert "runs release 9.0, and routers of " in ended.reason
    assert f"wire version {wire.VERSION + 1}, but {wire.VERSION}: install" in ended.reason
    setup.poll(8, forward_s=1.0)
    # The others are as they were, and somebody is left to ask.
    others = [one for one in setup.shards if one.wire == wire.VERSION and not one.ended]
    assert {one.place[0] for one in others} == {0, 1}
    assert setup.left == []
    assert (setup.routers.replaced, setup.sequencer.replaced) == (0, 0)


def test_a_router_that_is_not_replaced_ends_it(make: Any) -> None:
    setup = make(**{"sharding.replicas": 2})
    setup.routers.refused = "the one in its place ended: port in use"
    ended = setup.until_ended(setup.ask())
    assert (ended.state, ended.reason) == (
        "failed",
        "routers: the one in its place ended: port in use",
    )
    setup.routers.refused, setup.routers.is_replacing = "", True
    asked = setup.ask()
    setup.until_ended(asked)
    setup.poll(2, forward_s=901.0)
    assert setup.operation(asked).reason == ("routers not ready after 900 s, swap.timeout_s")
    assert setup.named == COPIES


def test_a_process_ends_once_nobody_can_be_waiting_for_it(make: Any) -> None:
    setup = make(**{"sharding.replicas": 2})
    setup.ask()
    setup.poll(3)
    assert setup.named == COPIES[1:]
    # The longest deadline, and what routers take to follow the map.
    setup.poll(1, forward_s=2.9)
    assert not any(one.ended for one in setup.shards)
    setup.poll(1, forward_s=0.2)
    assert [one.place for one in setup.shards if one.ended] == [(0, 0)]


def test_the_only_copy_is_helped_out_by_a_further_one(make: Any) -> None:
    setup = make()
    setup.serves = False
    asked = setup.ask()
    setup.poll(4, forward_s=1.0)
    assert setup.named == [(0, 0), (1, 0)]
    assert setup.operation(asked).progress == "waits for another copy of shard 0"
    assert setup.living == COPIES
    setup.serves = True
    for one in setup.shards:
        one.serves = True
    assert setup.until_ended(asked).state == "done"
    assert setup.fewest == {0: 1, 1: 1}
    setup.poll(3, forward_s=3.0)
    assert setup.named == setup.living == [(0, 0), (1, 0)]
    # They are other processes than at first.
    assert all(one.ended for one in setup.shards[:4])


def test_the_next_one_waits_until_the_last_one_is_prepared_and_level(make: Any) -> None:
    setup = make(**{"sharding.replicas": 2})
    setup.serves = False
    asked = setup.ask()
    setup.poll(20, forward_s=1.0)
    assert setup.living == COPIES
    assert len(setup.shards) == 5
    setup.cut = 3
    setup.shards[4].serves = True
    setup.poll(10, forward_s=1.0)
    assert setup.named == COPIES[1:]
    setup.hosts["127.0.0.1:9004"].cut = 5
    setup.poll(2)
    assert setup.operation(asked).progress == "1 of 4 processes are restarted"
    assert setup.named == COPIES
    setup.serves, setup.cut = True, 5
    assert setup.until_ended(asked).state == "done"


def test_a_process_that_does_not_start_again_ends_it(make: Any) -> None:
    setup = make(**{"sharding.replicas": 2})
    setup.serves = False
    asked = setup.ask()
    setup.poll(4, forward_s=1.5)
    setup.shards[4].dead = "p-00003 is damaged"
    setup.poll(2)
    ended = setup.operation(asked)
    assert (ended.state, ended.reason) == (
        "failed",
        "shard 0 could not start again: p-00003 is damaged",
    )
    assert setup.named == COPIES[1:]
    assert len(setup.shards) == 5


def test_a_process_that_takes_too_long_ends_it(make: Any) -> None:
    setup = make(**{"sharding.replicas": 2})
    setup.serves = False
    asked = setup.ask()
    setup.poll(4, forward_s=1.5)
    setup.poll(2, forward_s=901.0)
    assert setup.operation(asked).reason == (
        "shard 0 replica 0 not ready after 900 s, swap.timeout_s"
    )
    setup.shards[4].serves = True
    setup.poll(3)
    assert setup.named == COPIES


@pytest.mark.parametrize("polls", [1, 3, 6])
def test_whoever_calls_it_off_leaves_all_serving(make: Any, polls: int) -> None:
    setup = make()
    asked = setup.ask()
    setup.poll(polls, forward_s=1.0)
    setup.store.call_off(asked, "a person did")
    setup.poll(10, forward_s=2.0)
    assert setup.operation(asked).state == "cancelled"
    assert setup.named == setup.living == [(0, 0), (1, 0)]


def test_a_store_that_cannot_be_used_restarts_nothing(
    make: Any, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    setup = make(**{"sharding.replicas": 2})
    asked = setup.ask()

    class Broken:
        def change(self, make: Any) -> Any:
            raise StateError("no space left")

    monkeypatch.setattr(setup.rolling, "_store", Broken())
    setup.poll(20, forward_s=1.0)
    assert len(setup.shards) == 4
    assert capfd.readouterr().err.count("no space left") == 1
    monkeypatch.undo()
    assert setup.until_ended(asked).state == "done"

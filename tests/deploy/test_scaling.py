import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from silvershard.cluster.shard_map import ShardEntry, ShardMap
from silvershard.deploy.cluster_size import ClusterSize, Scaled, size_of
from silvershard.deploy.config import load
from silvershard.deploy.control_store import Operation, wanted
from silvershard.deploy.errors import Refused
from silvershard.deploy.generation_watch import GenerationWatch
from silvershard.deploy.scaling import Scaling
from silvershard.deploy.shard_host import Held
from silvershard.deploy.shard_watch import ShardDead
from silvershard.deploy.state import StateDir
from silvershard.shard.errors import StateError
from silvershard.shard.generations import generation_dir


class FakeHost:
    """A process that holds at once what it is wished for, and has applied what the test says."""

    def __init__(self, cut: int) -> None:
        self.cut = cut
        self.states = {1: ("prepared", "")}
        self.closed = False

    @property
    def held(self) -> Mapping[int, Held]:
        return {
            number: Held(state, reason, 9, (self.cut,), (), 0.0, 0, 0, 0)
            for number, (state, reason) in self.states.items()
        }

    def poll(self) -> None:
        pass

    def prepare(self, generation: int, snapshot: str) -> None:
        assert Path(snapshot).is_dir()
        self.states.setdefault(generation, ("prepared", ""))

    def retire(self, generation: int) -> None:
        del self.states[generation]

    def close(self) -> None:
        self.closed = True


class FakeShard:
    """A process of a shard, which is this one."""

    def __init__(self, number: int, num_shards: int, shard: int, replica: int) -> None:
        self.place = num_shards, shard, replica
        self.address = f"127.0.0.1:{9000 + number}"
        self.count = 0
        self.serves = True
        self.dead = ""
        self.ended = False

    def restarts(self) -> int:
        return self.count

    def entry(self) -> ShardEntry | None:
        if self.dead:
            raise ShardDead(self.dead)
        if not self.serves:
            return None
        _, shard, replica = self.place
        return ShardEntry(
            shard=shard,
            replica=replica,
            address=self.address,
            epoch=1 + self.count,
            documents=1,
            pid=os.getpid(),
        )

    def ask_again(self) -> None:
        pass

    def end(self) -> None:
        self.ended = True


class FakeCheck:
    def __init__(self, old: Path, new: Path) -> None:
        self.old = old
        self.map = ShardMap.read(new)
        self.found: str | None = None
        self.ended = False

    def poll(self) -> str | None:
        return self.found

    def end(self) -> None:
        self.ended = True


class Setup:
    """A driver whose shard processes are all in this one."""

    def __init__(self, state: StateDir, **options: Any) -> None:
        self.state = state
        self.now_s = 1000.0
        settings = {"sharding.shards": 2, "query.deadline_max_ms": 2000, "swap.drain_ms": 1000}
        self.config = load(None, environ={}, options={**settings, **options})
        self.shards: list[FakeShard] = []
        self.hosts: dict[str, FakeHost] = {}
        self.checks: list[FakeCheck] = []
        self.cut = 5
        """What a process has applied when it is met."""
        self.serves = True
        self.maps: list[ShardMap] = []
        self.store = state.control
        self.generations = GenerationWatch(
            state,
            self.config,
            1,
            connect=self.connect,
            free_bytes=lambda: 1 << 40,
            clock=lambda: self.now_s,
        )
        self.scaling = Scaling(
            state,
            self.config,
            self.generations,
            self.start,
            connect=self.connect,
            draw_map=self.draw,
            start_check=self.check,
            clock=lambda: self.now_s,
        )
        self.generations.started()
        self.scaling.start()
        self.poll(2)

    def connect(self, address: str) -> FakeHost:
        self.hosts[address] = FakeHost(self.cut)
        return self.hosts[address]

    def start(self, num_shards: int, shard: int, replica: int) -> FakeShard:
        made = FakeShard(len(self.shards), num_shards, shard, replica)
        made.serves = self.serves
        self.shards.append(made)
        return made

    def check(self, old: Path, new: Path) -> FakeCheck:
        self.checks.append(FakeCheck(old, new))
        return self.checks[-1]

    def draw(self, entries: tuple[ShardEntry, ...], num_shards: int) -> ShardMap:
        live = self.generations.live
        return ShardMap(
            version=1,
            generation=live,
            snapshot=str(self.generations.path(live)),
            num_shards=num_shards,
            entries=entries,
            snapshots=self.generations.snapshots,
        )

    def poll(self, times: int = 1, forward_s: float = 0.0) -> None:
        for _ in range(times):
            self.now_s += forward_s
            self.scaling.current.poll()
            self.generations.poll(self.scaling.current.watches)
            self.scaling.poll()
            found = self.map
            if not self.maps or found != self.maps[-1]:
                self.maps.append(found)

    @property
    def map(self) -> ShardMap:
        """What the launcher would write now."""
        return self.draw(self.generations.in_service, self.scaling.current.sharding.shards)

    @property
    def named(self) -> list[tuple[int, int, int]]:
        entries = self.map.entries
        return sorted((self.map.num_shards, one.shard, one.replica) for one in entries)

    @property
    def living(self) -> list[tuple[int, int, int]]:
        return sorted(one.place for one in self.shards if not one.ended)

    def of(self, *place: int) -> FakeShard:
        return next(one for one in reversed(self.shards) if one.place == place)

    def host(self, *place: int) -> FakeHost:
        return self.hosts[self.of(*place).address]

    def ask(self, shards: int, replicas: int, standby: int = 0) -> str:
        size = ClusterSize(shards=shards, replicas=replicas, standby=standby)
        scaled = Scaled(size=size, instead_of=size_of(self.config))
        operation = wanted("scale", 0, "live").model_copy(update={"scaled": scaled})
        self.store.change(lambda now: now.with_operation(operation))
        return operation.operation_id

    def operation(self, operation_id: str) -> Operation:
        found = self.store.read().operation(operation_id)
        assert found is not None
        return found


def cut(shards: int, replicas: int = 1) -> list[tuple[int, int, int]]:
    return [(shards, shard, replica) for shard in range(shards) for replica in range(replicas)]


@pytest.fixture
def state(tmp_path: Path, generation: Any) -> StateDir:
    """A state directory with three generations, which are the same but for their numbers."""
    made = StateDir(tmp_path / "s")
    made.create()
    made.generations.mkdir()
    for number in (1, 2, 3):
        generation_dir(made.generations, number).symlink_to(generation.path)
    return made


@pytest.fixture
def setup(state: StateDir) -> Iterator[Setup]:
    made = Setup(state)
    assert made.named == made.living == cut(2)
    yield made
    made.scaling.close()
    made.generations.close()
    assert made.living == []
    assert not state.coming_map_file.exists()
    assert all(one.ended for one in made.checks)


def test_a_new_set_takes_over_by_one_change_once_it_answers_as_the_old_one(setup: Setup) -> None:
    asked = setup.ask(3, 1)
    setup.poll(3)
    assert setup.named == cut(2)
    assert setup.living == [*cut(2), *cut(3)]
    assert setup.operation(asked).progress == "answers are compared"
    (check,) = setup.checks
    assert check.old == setup.state.shard_map_file
    assert sorted((3, one.shard, one.replica) for one in check.map.entries) == cut(3)
    assert sum(one.documents for one in check.map.entries) == 600
    maps = len(setup.maps)
    check.found = ""
    setup.poll()
    assert setup.operation(asked).state == "done"
    assert setup.named == cut(3)
    assert len(setup.maps) == maps + 1
    assert sum(one.documents for one in setup.map.entries) == 600
    scaled = setup.store.read().scaled
    assert scaled is not None
    assert scaled.size == ClusterSize(shards=3, replicas=1)
    assert check.ended
    assert not setup.state.coming_map_file.exists()


def test_a_set_that_has_no_room_is_refused_and_nothing_starts(
    setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(sharding: Any) -> None:
        raise Refused("3 shards x 1 replicas need 9 GiB")

    monkeypatch.setattr(setup.scaling._places, "lay_out", refused)
    asked = setup.ask(3, 1)
    setup.poll(2)
    ended = setup.operation(asked)
    assert (ended.state, ended.reason) == ("failed", "3 shards x 1 replicas need 9 GiB")
    assert setup.living == cut(2)
    with pytest.raises(Refused):
        setup.scaling.resize(setup.scaling.current.sharding.model_copy(update={"replicas": 2}))
    assert setup.living == cut(2)


def test_the_old_set_ends_once_nobody_can_be_waiting_for_it(setup: Setup) -> None:
    setup.ask(3, 1)
    setup.poll(3)
    setup.checks[0].found = ""
    setup.poll()
    # The longest deadline, and what routers take to meet the new set; swap.drain_ms is shorter.
    setup.poll(1, forward_s=4.9)
    assert setup.living == [*cut(2), *cut(3)]
    setup.poll(1, forward_s=0.2)
    assert setup.living == cut(3)


def test_a_long_drain_is_kept_to(state: StateDir) -> None:
    setup = Setup(state, **{"swap.drain_ms": 60_000})
    setup.ask(1, 1)
    setup.poll(3)
    setup.checks[0].found = ""
    setup.poll(1)
    setup.poll(1, forward_s=59.0)
    assert setup.living == [*cut(1), *cut(2)]
    again = setup.ask(2, 1)
    setup.poll(2)
    assert setup.operation(again).state == "waiting"
    assert setup.living == [*cut(1), *cut(2)]
    setup.poll(2, forward_s=1.1)
    assert setup.operation(again).state == "running"
    setup.scaling.close()
    setup.generations.close()


def test_a_set_that_answers_otherwise_is_torn_down_and_the_difference_is_named(
    setup: Setup,
) -> None:
    asked = setup.ask(3, 1)
    setup.poll(3)
    setup.checks[0].found = "question 3 of 25: place 0 is item 7"
    setup.poll()
    ended = setup.operation(asked)
    assert ended.state == "failed"
    assert ended.reason == ("the new set answers otherwise: question 3 of 25: place 0 is item 7")
    assert setup.named == setup.living == cut(2)
    assert setup.store.read().scaled is None
    again = setup.ask(3, 1)
    setup.poll(3)
    setup.checks[1].found = ""
    setup.poll()
    assert setup.operation(again).state == "done"


def test_nobody_takes_over_before_all_are_prepared_and_level(setup: Setup) -> None:
    setup.cut = 3
    asked = setup.ask(3, 2)
    setup.poll(20, forward_s=0.2)
    assert setup.operation(asked).progress == "prepared 6 of 6; catches up"
    assert setup.checks == []
    for place in cut(3, 2)[1:]:
        setup.host(*place).cut = 5
    setup.poll(20, forward_s=0.2)
    assert setup.checks == []
    setup.host(3, 0, 0).cut = 6
    setup.of(3, 1, 1).serves = False
    setup.of(3, 1, 1).count = 1
    setup.poll(2)
    assert setup.operation(asked).progress == "prepared 5 of 6"
    assert setup.checks == []
    # It was killed, and Ray has started it again.
    setup.of(3, 1, 1).serves = True
    setup.cut = 5
    setup.poll(2)
    assert len(setup.checks) == 1
    setup.checks[0].found = ""
    setup.poll()
    assert setup.operation(asked).state == "done"
    assert setup.named == cut(3, 2)


def test_a_process_that_cannot_start_fails_it(setup: Setup) -> None:
    setup.serves = False
    asked = setup.ask(3, 1)
    setup.poll()
    setup.of(3, 1, 0).dead = "p-00003 is damaged"
    setup.poll(2)
    ended = setup.operation(asked)
    assert (ended.state, ended.reason) == ("failed", "shard 1 could not start: p-00003 is damaged")
    assert setup.named == setup.living == cut(2)


def test_what_takes_too_long_ends_with_what_was_missing(setup: Setup) -> None:
    setup.serves = False
    asked = setup.ask(3, 1)
    setup.poll(2)
    setup.of(3, 1, 0).serves = True
    setup.poll(2)
    setup.poll(1, forward_s=901.0)
    ended = setup.operation(asked)
    assert ended.state == "failed"
    assert ended.reason == "1 of 3 processes were prepared after 900 s, swap.timeout_s"
    assert setup.named == setup.living == cut(2)


@pytest.mark.parametrize("polls", [1, 2, 3])
def test_whoever_calls_it_off_leaves_the_old_set_and_no_process(setup: Setup, polls: int) -> None:
    before = setup.store.read().scaled
    asked = setup.ask(3, 1)
    setup.poll(polls)
    assert setup.living == [*cut(2), *cut(3)]
    setup.store.call_off(asked, "a person did")
    setup.poll()
    assert setup.named == setup.living == cut(2)
    assert setup.operation(asked).state == "cancelled"
    assert setup.store.read().scaled == before


def test_what_is_called_off_in_the_last_moment_does_not_take_over(setup: Setup) -> None:
    asked = setup.ask(3, 1)
    setup.poll(3)
    setup.checks[0].found = ""
    change, commits = setup.store.change, []

    def called_off_before(make: Any) -> Any:
        if not commits:
            commits.append(make)
            setup.store.call_off(asked, "a person did")
        return change(make)

    setup.scaling._store = type("Store", (), {"change": staticmethod(called_off_before)})()
    setup.poll(2)
    assert commits
    assert setup.operation(asked).state == "cancelled"
    assert setup.named == setup.living == cut(2)
    assert setup.store.read().scaled is None


def test_more_copies_of_the_same_set(setup: Setup) -> None:
    setup.serves = False
    asked = setup.ask(2, 2, standby=1)
    setup.poll(2)
    assert setup.operation(asked).progress == "prepared 2 of 6"
    assert setup.named == cut(2)
    # They load one copy of every shard after the other, beside those that serve.
    assert setup.living == cut(2, 2)
    setup.of(2, 0, 1).serves = True
    setup.poll(3)
    assert setup.living == cut(2, 2)
    setup.of(2, 1, 1).serves = True
    setup.poll(2)
    assert setup.living == cut(2, 3)
    assert setup.operation(asked).progress == "prepared 4 of 6"
    for place in cut(2, 3):
        setup.of(*place).serves = True
    setup.poll(2)
    assert setup.operation(asked).state == "done"
    assert setup.checks == []
    setup.poll()
    assert setup.named == cut(2, 2)
    assert setup.living == cut(2, 3)
    assert setup.generations.is_standby((0, 2))
    fewer = setup.ask(2, 1)
    setup.poll(2)
    assert setup.operation(fewer).state == "done"
    setup.poll()
    assert setup.named == cut(2)
    assert setup.living == cut(2, 3)
    setup.poll(1, forward_s=5.1)
    assert setup.named == setup.living == cut(2)


def test_copies_go_only_if_those_that_stay_serve(state: StateDir) -> None:
    setup = Setup(state, **{"sharding.replicas": 2})
    setup.of(2, 1, 0).serves = False
    setup.of(2, 1, 0).count = 1
    asked = setup.ask(2, 1)
    setup.poll(3, forward_s=10.0)
    assert setup.operation(asked).progress == "prepared 1 of 2"
    assert setup.living == cut(2, 2)
    assert setup.named == [(2, 0, 0), (2, 0, 1), (2, 1, 1)]
    setup.of(2, 1, 0).serves = True
    setup.poll(3, forward_s=3.0)
    assert setup.operation(asked).state == "done"
    assert setup.named == setup.living == cut(2)
    setup.scaling.close()
    setup.generations.close()


def test_added_copies_end_when_it_is_called_off(setup: Setup) -> None:
    setup.cut = 3
    asked = setup.ask(2, 3)
    setup.poll(3)
    assert setup.operation(asked).progress == "prepared 6 of 6; catches up"
    setup.store.call_off(asked, "a person did")
    setup.poll()
    assert setup.named == setup.living == cut(2)


def test_the_new_set_holds_what_the_old_one_holds_so_that_a_rollback_needs_no_load(
    setup: Setup,
) -> None:
    for swap in (wanted("activate", 3, "canary"), wanted("activate", 2, "live")):
        setup.store.change(lambda now, swap=swap: now.with_operation(swap))
        setup.poll(4, forward_s=10.0)
    assert setup.map.hosted.keys() == {1, 2, 3}
    asked = setup.ask(3, 1)
    setup.poll(4)
    assert setup.checks[0].map.hosted.keys() == {1, 2, 3}
    setup.checks[0].found = ""
    setup.poll()
    assert setup.operation(asked).state == "done"
    for place in cut(3):
        assert setup.host(*place).states.keys() == {1, 2, 3}
    assert (setup.map.generation, setup.map.hosted.keys()) == (2, {1, 2, 3})
    back = wanted("rollback", 1, "live")
    setup.store.change(lambda now: now.with_operation(back))
    setup.poll()
    assert setup.operation(back.operation_id).state == "done"
    assert (setup.map.generation, setup.named) == (1, cut(3))


def test_a_generation_that_a_new_process_cannot_hold_fails_it(setup: Setup) -> None:
    swap = wanted("activate", 2, "live")
    setup.store.change(lambda now: now.with_operation(swap))
    setup.poll(4)
    setup.serves = False
    asked = setup.ask(3, 1)
    setup.poll()
    for place in cut(3):
        setup.of(*place).serves = True
    setup.poll()
    setup.host(3, 2, 0).states[1] = "failed", "too little room"
    setup.poll()
    assert setup.operation(asked).reason == (
        "shard 2 replica 0 cannot hold generation 1: too little room"
    )
    assert setup.living == cut(2)


def test_it_waits_for_a_swap_that_is_not_over(state: StateDir) -> None:
    setup = Setup(state, **{"sharding.replicas": 2, "swap.memory_mib": 1})
    swap = wanted("activate", 2, "live")
    setup.generations._free_bytes = lambda: 0
    setup.store.change(lambda now: now.with_operation(swap))
    for _ in range(40):
        setup.poll(1, forward_s=0.2)
        if setup.operation(swap.operation_id).state == "done":
            break
    assert not setup.generations.is_steady
    asked = setup.ask(2, 1)
    setup.poll(1)
    assert setup.operation(asked).state == "waiting"
    setup.poll(6, forward_s=2.0)
    assert setup.operation(asked).state == "done"
    setup.scaling.close()
    setup.generations.close()


def test_a_store_that_cannot_be_used_leaves_all_as_it_is(
    setup: Setup, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    asked = setup.ask(3, 1)
    setup.poll(2)
    setup.checks[0].found = ""

    class Broken:
        def change(self, make: Any) -> Any:
            raise StateError("no space left")

    monkeypatch.setattr(setup.scaling, "_store", Broken())
    setup.poll(3)
    assert setup.named == cut(2)
    assert setup.living == [*cut(2), *cut(3)]
    assert capfd.readouterr().err.count("no space left") == 1
    monkeypatch.undo()
    setup.poll()
    assert setup.operation(asked).state == "done"


def test_another_cluster_abandons_what_was_going_on(setup: Setup) -> None:
    asked = setup.ask(3, 1)
    setup.poll(2)
    setup.scaling.close()
    setup.generations.close()
    later = Setup(setup.state)
    assert later.operation(asked).state == "abandoned"
    assert later.named == later.living == cut(2)
    later.scaling.close()
    later.generations.close()

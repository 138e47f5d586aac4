import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from silvershard.cluster.shard_map import ShardEntry
from silvershard.deploy.config import load
from silvershard.deploy.control_store import Control, Operation, wanted
from silvershard.deploy.generation_watch import GenerationWatch
from silvershard.deploy.memory_plan import MemoryPlan
from silvershard.deploy.readiness import REMEMBERED
from silvershard.deploy.shard_host import Held
from silvershard.deploy.shard_watch import ShardWatch
from silvershard.deploy.state import StateDir
from silvershard.shard.errors import StateError
from silvershard.shard.generations import generation_dir

MIB = 1 << 20


class FakeHost:
    """A process that loads what it is wished for when the test says so."""

    def __init__(self, address: str, boot: int) -> None:
        self.address = address
        self.boot = boot
        self.states: dict[int, tuple[str, str]] = {boot: ("prepared", "")}
        self.cuts: dict[int, tuple[int, ...]] = {}
        self.refused: dict[int, tuple[tuple[int, str], ...]] = {}
        self.wishes: list[tuple[str, int]] = []
        self.leaving: set[int] = set()
        self.answers = True
        self.loads = True
        self.closed = False

    @property
    def held(self) -> Mapping[int, Held] | None:
        if not self.answers:
            return None
        return {
            number: Held(
                *(state, reason, 9, self.cuts.get(number, ()), (), 0.0, 0, 0, 0),
                self.refused.get(number, ()),
            )
            for number, (state, reason) in self.states.items()
        }

    def poll(self) -> None:
        # What it lets go of it still holds when it is told so.
        for number in self.leaving & self.states.keys():
            del self.states[number]
        self.leaving.clear()
        if self.loads:
            for number, (state, reason) in self.states.items():
                self.states[number] = "prepared" if state == "loading" else state, reason

    def prepare(self, generation: int, snapshot: str) -> None:
        assert Path(snapshot).name == f"gen-{generation:06d}"
        self.wishes.append(("prepare", generation))
        if self.states.get(generation, ("failed", ""))[0] == "failed":
            self.states[generation] = "loading", ""

    def retire(self, generation: int) -> None:
        self.wishes.append(("retire", generation))
        self.leaving.add(generation)

    def close(self) -> None:
        self.closed = True


class FakeHandle:
    def __init__(self, shard: int, replica: int) -> None:
        self.shard, self.replica, self.epoch = shard, replica, 1
        self.count = 0
        self.serves = True

    def restarts(self) -> int:
        return self.count

    def entry(self) -> ShardEntry | None:
        if not self.serves:
            return None
        return ShardEntry(
            shard=self.shard,
            replica=self.replica,
            address=f"127.0.0.1:{9000 + 10 * self.replica + self.shard}",
            epoch=self.epoch,
            documents=1,
            pid=os.getpid(),
        )

    def ask_again(self) -> None:
        pass

    def end(self) -> None:
        pass


class Setup:
    def __init__(self, state: StateDir, **options: Any) -> None:
        self.state = state
        self.now_s = 1000.0
        self.free_bytes = 1000 * MIB
        self.lacking = ""
        self.plan: Any = None
        settings = {"sharding.shards": 2, "query.deadline_max_ms": 2000, **options}
        self.config = load(None, environ={}, options=settings)
        self.hosts: dict[str, FakeHost] = {}
        self.all_hosts: list[FakeHost] = []
        self.store = state.control
        self.handles = [
            FakeHandle(shard, replica)
            for replica in range(self.config.sharding.copies)
            for shard in range(2)
        ]
        self.watches = [
            ShardWatch(one.shard, one, self.config.runtime, replica=one.replica)
            for one in self.handles
        ]
        self.watch = self.make(1)
        self.watch.started()

    def make(self, generation: int) -> GenerationWatch:
        return GenerationWatch(
            self.state,
            self.config,
            generation,
            connect=self.connect,
            free_bytes=lambda: self.free_bytes,
            lacking=lambda generation: self.lacking,
            plan=self.plan,
            clock=lambda: self.now_s,
        )

    def connect(self, address: str) -> FakeHost:
        host = FakeHost(address, self.store.read().live)
        self.hosts[address] = host
        self.all_hosts.append(host)
        return host

    def host(self, shard: int, replica: int = 0) -> FakeHost:
        return self.hosts[f"127.0.0.1:{9000 + 10 * replica + shard}"]

    def poll(self, times: int = 1, forward_s: float = 0.0) -> None:
        for _ in range(times):
            self.now_s += forward_s
            for one in self.watches:
                one.poll()
            self.watch.poll(self.watches)

    def ask(self, generation: int, **changes: Any) -> str:
        operation = wanted("activate", generation, "live").model_copy(update=changes)
        self.store.change(lambda now: now.with_operation(operation))
        return operation.operation_id

    def operation(self, operation_id: str) -> Operation:
        found = self.store.read().operation(operation_id)
        assert found is not None
        return found

    @property
    def served(self) -> list[tuple[int, int]]:
        return sorted((one.shard, one.replica) for one in self.watch.in_service)

    def held(self) -> set[int]:
        return {number for one in self.hosts.values() for number in one.states}


@pytest.fixture
def state(tmp_path: Path, generation: Any) -> StateDir:
    """A state directory with four generations, which are the same but for their numbers."""
    made = StateDir(tmp_path / "s")
    made.create()
    made.generations.mkdir()
    for number in (1, 2, 3, 4):
        generation_dir(made.generations, number).symlink_to(generation.path)
    return made


@pytest.fixture
def setup(state: StateDir) -> Iterator[Setup]:
    made = Setup(state)
    made.poll()
    yield made
    made.watch.close()
    assert all(one.closed for one in made.all_hosts)


def test_what_a_cluster_starts_with_is_live(setup: Setup) -> None:
    assert setup.store.read() == Control(version=2, live=1)
    assert setup.served == [(0, 0), (1, 0)]
    assert setup.watch.aliases == {}
    assert setup.watch.snapshots == {}
    (record,) = setup.watch.records
    assert (record.generation, record.role, record.prepared, record.processes) == (1, "live", 2, 2)
    documents = [one.documents for one in setup.watch.in_service]
    assert sum(documents) == 600


def test_the_live_generation_changes_once_every_process_has_the_new_one_prepared(
    setup: Setup,
) -> None:
    setup.host(1).loads = False
    asked = setup.ask(2)
    setup.poll(5)
    assert setup.watch.live == 1
    assert setup.served == [(0, 0), (1, 0)]
    assert setup.operation(asked).state == "running"
    assert setup.operation(asked).progress == "prepared 1 of 2; loading"
    version = setup.store.read().version
    setup.host(1).loads = True
    setup.poll()
    assert setup.watch.live == 2
    assert setup.store.read().version == version + 1
    assert setup.operation(asked).state == "done"
    assert setup.served == [(0, 0), (1, 0)]
    assert (setup.store.read().live, setup.store.read().previous) == (2, 1)


def test_the_previous_generation_stays_for_a_rollback_which_loads_nothing(setup: Setup) -> None:
    setup.ask(2)
    setup.poll(3)
    setup.poll(3, forward_s=3600.0)
    assert setup.held() == {1, 2}
    assert setup.watch.snapshots == {1: str(setup.watch.path(1))}
    wishes = list(setup.host(0).wishes)
    back = setup.ask(1, kind="rollback")
    setup.poll()
    assert setup.operation(back).state == "done"
    assert (setup.watch.live, setup.store.read().previous) == (1, 2)
    assert setup.host(0).wishes == wishes


def test_the_previous_generation_is_given_up_after_its_drain_where_the_settings_say_so(
    state: StateDir,
) -> None:
    setup = Setup(state, **{"swap.keep_previous": False, "swap.drain_ms": 3000})
    setup.poll()
    setup.ask(2)
    setup.poll(3)
    setup.poll(1, forward_s=2.9)
    assert setup.held() == {1, 2}
    setup.poll(2, forward_s=0.2)
    assert setup.held() == {2}
    assert setup.store.read().previous == 1
    back = setup.ask(1, kind="rollback")
    setup.poll(3)
    assert setup.operation(back).state == "done"
    assert setup.watch.live == 1


def test_at_most_two_generations_are_held(setup: Setup) -> None:
    most = 0
    for generation in (2, 3, 4):
        asked = setup.ask(generation)
        for _ in range(12):
            setup.poll(1, forward_s=2.0)
            most = max(most, *(len(one.states) for one in setup.hosts.values()))
        assert setup.operation(asked).state == "done"
    assert most == 2
    assert (setup.store.read().live, setup.store.read().previous) == (4, 3)


def test_a_process_that_cannot_hold_it_fails_the_swap_and_changes_nothing(setup: Setup) -> None:
    before = setup.store.read()
    setup.host(0).loads = False
    asked = setup.ask(2)
    setup.poll(2)
    setup.host(0).states[2] = "failed", "snapshot gen-000002: p-00003 is damaged"
    setup.poll(2)
    ended = setup.operation(asked)
    assert ended.state == "failed"
    assert ended.reason == (
        "a shard process cannot hold it: snapshot gen-000002: p-00003 is damaged"
    )
    assert (setup.watch.live, setup.store.read().previous) == (before.live, before.previous)
    setup.poll()
    assert setup.held() == {1}
    assert setup.served == [(0, 0), (1, 0)]
    setup.host(0).loads = True
    again = setup.ask(2)
    setup.poll(4)
    assert setup.operation(again).state == "done"


def test_the_failure_of_an_earlier_try_is_not_taken_for_this_one(setup: Setup) -> None:
    setup.host(0).states[2] = "failed", "of yesterday"
    asked = setup.ask(2)
    setup.poll(5)
    assert setup.operation(asked).state == "done"


def test_a_swap_that_takes_too_long_ends_with_what_was_missing(setup: Setup) -> None:
    setup.host(1).loads = False
    asked = setup.ask(2)
    setup.poll(3)
    setup.poll(1, forward_s=901.0)
    assert setup.operation(asked).state == "failed"
    assert "1 of 2 processes had it prepared after 900 s" in setup.operation(asked).reason
    setup.poll()
    assert setup.held() == {1}


def test_a_generation_that_is_behind_the_live_one_waits(setup: Setup) -> None:
    for shard in (0, 1):
        setup.host(shard).cuts = {1: (5, 9), 2: (5, 8)}
    asked = setup.ask(2)
    setup.poll(20, forward_s=0.2)
    assert setup.watch.live == 1
    assert setup.operation(asked).progress == "prepared 2 of 2; catches up with the live one"
    setup.host(0).cuts[2] = (5, 9)
    setup.poll(20, forward_s=0.2)
    assert setup.watch.live == 1
    setup.host(1).cuts[2] = (6, 9)
    setup.poll()
    assert setup.operation(asked).state == "done"
    assert setup.watch.live == 2


def test_a_generation_that_stays_behind_ends_the_swap_with_its_numbers(setup: Setup) -> None:
    setup.host(1).cuts = {1: (5,), 2: (4,)}
    asked = setup.ask(2)
    setup.poll(3)
    setup.poll(1, forward_s=901.0)
    assert setup.operation(asked).state == "failed"
    assert setup.operation(asked).reason.endswith(
        "swap.timeout_s; shard 1.0 is at position 4 of the update log, the live generation at 5"
    )
    assert setup.watch.live == 1


def test_a_canary_may_be_behind(setup: Setup) -> None:
    setup.host(1).cuts = {1: (5,), 2: (4,)}
    asked = setup.ask(2, alias="canary")
    setup.poll(4)
    assert setup.operation(asked).state == "done"


def test_a_generation_that_refused_what_the_live_one_took_is_not_swapped_to(setup: Setup) -> None:
    both = (7, "no embedding"), (8, "no embedding")
    setup.host(0).refused = {1: both, 2: (*both, (9, "too many values"))}
    asked = setup.ask(2)
    setup.poll(3)
    assert setup.operation(asked).state == "failed"
    assert setup.operation(asked).reason == (
        "it refused updates of 1 items that the live one took; item 9: too many values; "
        "--allow-schema lets it through"
    )
    assert setup.watch.live == 1
    setup.poll(3)
    again = setup.ask(2, allow_refused=True)
    setup.poll(4)
    assert setup.operation(again).state == "done"
    # The way back is always open.
    setup.host(0).refused[1] = (*both, (10, "too many values"))
    back = setup.ask(1, kind="rollback")
    setup.poll(2)
    assert setup.operation(back).state == "done"


def test_a_cancelled_swap_is_undone(setup: Setup) -> None:
    setup.host(1).loads = False
    asked = setup.ask(2)
    setup.poll(3)
    assert setup.held() == {1, 2}
    going = setup.operation(asked)
    setup.store.change(lambda now: now.with_operation(going.ended("cancelled")))
    setup.host(1).loads = True
    setup.poll(3)
    assert setup.held() == {1}
    assert setup.watch.live == 1


def test_a_swap_that_is_cancelled_while_it_commits_is_not_made(
    setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = setup.ask(2)
    setup.poll()
    read = setup.watch._store.read

    def cancelled_after() -> Control:
        found = read()
        going = found.operation(asked)
        if going is not None and not going.has_ended and setup.host(1).states.get(2):
            ended = going.ended("cancelled")
            setup.state.control.change(lambda now: now.with_operation(ended))
        return found

    monkeypatch.setattr(setup.watch._store, "read", cancelled_after)
    setup.poll(3)
    assert setup.watch.live == 1
    assert setup.operation(asked).state == "cancelled"


def test_what_an_earlier_cluster_had_begun_is_abandoned(setup: Setup) -> None:
    setup.host(1).loads = False
    asked = setup.ask(2)
    setup.poll(3)
    setup.make(1)
    assert setup.operation(asked).state == "abandoned"
    assert setup.operation(asked).reason == "the cluster ended before it was done"
    assert setup.store.read().live == 1


def test_a_process_that_dies_in_the_middle_is_waited_for(setup: Setup) -> None:
    setup.host(1).loads = False
    asked = setup.ask(2)
    setup.poll(3)
    handle = setup.handles[1]
    handle.serves, handle.count, handle.epoch = False, 1, 2
    setup.poll(3)
    assert setup.served == [(0, 0)]
    assert setup.operation(asked).progress.startswith("prepared 1 of 2")
    handle.serves = True
    setup.poll(4)
    assert setup.operation(asked).state == "done"
    assert setup.served == [(0, 0), (1, 0)]


def test_a_process_that_starts_again_holds_what_it_shall_before_it_is_in_service(
    setup: Setup,
) -> None:
    setup.ask(2)
    setup.poll(3)
    handle = setup.handles[0]
    handle.serves, handle.count, handle.epoch = False, 1, 2
    setup.poll()
    handle.serves = True
    setup.poll()
    assert setup.host(0).boot == 2
    setup.host(0).states = {1: ("prepared", "")}
    setup.host(0).loads = False
    setup.poll(3)
    assert setup.served == [(1, 0)]
    setup.host(0).loads = True
    setup.poll()
    assert setup.served == [(0, 0), (1, 0)]


def test_a_process_whose_live_generation_fails_leaves_service_and_tries_again(
    setup: Setup,
) -> None:
    setup.host(0).loads = False
    setup.host(0).states[1] = "failed", "the log was trimmed"
    assert setup.watch.records[0].reason == "the log was trimmed"
    setup.poll()
    assert setup.served == [(1, 0)]
    assert ("prepare", 1) in setup.host(0).wishes
    setup.host(0).loads = True
    setup.poll(2)
    assert setup.served == [(0, 0), (1, 0)]


def test_nothing_is_in_service_before_it_has_said_what_it_holds(setup: Setup) -> None:
    setup.host(0).answers = False
    setup.poll()
    assert setup.served == [(1, 0)]


def test_a_canary_is_held_and_named_and_takes_the_place_of_nothing(setup: Setup) -> None:
    asked = setup.ask(2, alias="canary")
    setup.poll(4)
    assert setup.operation(asked).state == "done"
    assert (setup.watch.live, setup.watch.aliases) == (1, {"canary": 2})
    assert setup.watch.snapshots == {2: str(setup.watch.path(2))}
    assert [one.role for one in setup.watch.records] == ["live", "canary"]
    setup.store.change(lambda now: now.model_copy(update={"previous": 2}))
    setup.poll(3, forward_s=3600.0)
    assert [one.role for one in setup.watch.records] == ["live", "canary"]
    assert setup.held() == {1, 2}
    setup.ask(0, alias="canary")
    setup.poll()
    # Requests that named it are still answered.
    assert setup.watch.aliases == {}
    assert setup.watch.snapshots == {2: str(setup.watch.path(2))}
    setup.poll(1, forward_s=setup.config.swap.drain_ms / 1e3 - 0.1)
    assert setup.held() == {1, 2}
    setup.poll(2, forward_s=0.2)
    assert setup.watch.snapshots == {}
    assert setup.held() == {1}


def test_what_is_warm_is_held_where_nobody_can_name_it_and_is_live_at_once(setup: Setup) -> None:
    asked = setup.ask(2, alias="warm")
    setup.poll(4)
    assert setup.operation(asked).state == "done"
    assert (setup.watch.live, setup.watch.aliases, setup.watch.snapshots) == (1, {}, {})
    assert [one.role for one in setup.watch.records] == ["live", "staged"]
    setup.poll(3, forward_s=3600.0)
    assert setup.held() == {1, 2}
    live = setup.ask(2)
    setup.poll(2)
    assert setup.operation(live).state == "done"
    assert setup.host(0).wishes.count(("prepare", 2)) == 1
    assert setup.store.read().warm == 0


def test_what_is_warm_can_be_given_up_and_ends_with_its_cluster(setup: Setup) -> None:
    setup.ask(2, alias="warm")
    setup.poll(4)
    setup.ask(0, alias="warm")
    setup.poll(3)
    assert setup.held() == {1}
    setup.ask(2, alias="warm")
    setup.poll(4)
    assert setup.store.read().warm == 2
    again = Setup(setup.state)
    again.poll(3)
    assert again.store.read().warm == 0
    assert again.held() == {1}


def test_content_that_changed_since_it_was_checked_is_refused(setup: Setup) -> None:
    asked = setup.ask(2, content_hash="0" * 64)
    setup.poll(2)
    assert setup.operation(asked).state == "failed"
    assert "not the content that was checked" in setup.operation(asked).reason


def test_a_generation_that_is_not_there_is_refused(setup: Setup) -> None:
    asked = setup.ask(9)
    setup.poll(2)
    assert setup.operation(asked).state == "failed"
    assert "manifest.json is missing" in setup.operation(asked).reason


def test_without_room_for_both_one_replica_is_refused_before_anything_is_loaded(
    setup: Setup,
) -> None:
    setup.free_bytes = 0
    asked = setup.ask(2)
    setup.poll(3)
    assert setup.operation(asked).state == "failed"
    assert "and 0.0 MiB are free" in setup.operation(asked).reason
    assert setup.host(0).wishes == []


def test_without_room_for_both_two_replicas_change_one_after_the_other(state: StateDir) -> None:
    setup = Setup(state, **{"sharding.replicas": 2})
    setup.free_bytes = 0
    setup.poll()
    assert setup.served == [(0, 0), (0, 1), (1, 0), (1, 1)]
    asked = setup.ask(2)
    setup.poll()
    # The map leaves them out first, then requests in flight end, then they change.
    assert setup.served == [(0, 1), (1, 1)]
    setup.poll(1, forward_s=1.9)
    assert setup.host(0).wishes == []
    seen = []
    while setup.watch.live == 1:
        setup.poll(1, forward_s=0.2)
        assert all(len(one.states) <= 1 for one in setup.hosts.values())
        assert {shard for shard, _ in setup.served} == {0, 1}
        seen.append((setup.watch.live, len(setup.served), *setup.watch.snapshots))
    # Routers meet the new ones before they depend on them.
    assert sorted(set(seen)) == [(1, 2), (1, 4, 2), (2, 2)]
    assert seen.count((1, 4, 2)) == 5
    assert setup.operation(asked).state == "done"
    assert setup.served == [(0, 0), (1, 0)]
    assert setup.host(0, 1).wishes == []
    setup.poll(1, forward_s=1.9)
    assert setup.host(0, 1).wishes == []
    for _ in range(4):
        setup.poll(1, forward_s=0.2)
    assert setup.served == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert setup.held() == {2}
    back = setup.ask(1, kind="rollback")
    for _ in range(40):
        setup.poll(1, forward_s=0.2)
        assert all(len(one.states) <= 1 for one in setup.hosts.values())
        assert {shard for shard, _ in setup.served} == {0, 1}
    assert setup.operation(back).state == "done"
    assert setup.held() == {1}


def test_a_standby_takes_the_place_of_a_process_that_ends(state: StateDir) -> None:
    setup = Setup(state, **{"sharding.standby": 1})
    setup.poll()
    assert setup.served == [(0, 0), (1, 0)]
    assert setup.watch.is_standby((0, 1))
    assert not setup.watch.is_standby((0, 0))
    ended = setup.handles[0]
    assert (ended.shard, ended.replica) == (0, 0)
    ended.serves, ended.count = False, 1
    setup.poll()
    assert setup.served == [(0, 1), (1, 0)]
    ended.serves, ended.epoch = True, 2
    setup.poll(2)
    # Nothing changes twice.
    assert setup.served == [(0, 1), (1, 0)]
    assert setup.watch.is_standby((0, 0))


def test_a_standby_that_is_not_prepared_takes_no_place(state: StateDir) -> None:
    setup = Setup(state, **{"sharding.standby": 1})
    setup.poll()
    setup.host(0, 1).states[1] = "failed", "no space"
    setup.handles[0].serves, setup.handles[0].count = False, 1
    setup.poll()
    assert setup.served == [(1, 0)]
    assert not setup.watch.is_standby((0, 1))


def test_a_standby_changes_with_the_others(state: StateDir) -> None:
    setup = Setup(state, **{"sharding.standby": 1})
    setup.poll()
    asked = setup.ask(2)
    setup.poll(4)
    assert setup.operation(asked).state == "done"
    assert setup.served == [(0, 0), (1, 0)]
    assert 2 in setup.host(0, 1).states
    setup.handles[0].serves, setup.handles[0].count = False, 1
    setup.poll()
    assert setup.served == [(0, 1), (1, 0)]


def test_with_a_standby_one_replica_has_room_for_a_wave(state: StateDir) -> None:
    setup = Setup(state, **{"sharding.standby": 1})
    setup.free_bytes = 0
    setup.poll()
    asked = setup.ask(2)
    seen = set()
    for _ in range(40):
        setup.poll(1, forward_s=0.2)
        assert all(len(one.states) <= 1 for one in setup.hosts.values())
        assert {shard for shard, _ in setup.served} == {0, 1}
        seen.add((setup.watch.live, *setup.watch.snapshots, *setup.served))
    assert setup.operation(asked).state == "done"
    assert setup.held() == {2}
    old, new = ((0, 1), (1, 1)), ((0, 0), (1, 0))
    # Routers meet those that change first before they depend on them.
    assert seen == {(1, *old), (1, 2, *sorted(old + new)), (2, *new)}


def test_a_wave_that_fails_brings_the_replicas_back(state: StateDir) -> None:
    setup = Setup(state, **{"sharding.replicas": 2})
    setup.free_bytes = 0
    setup.poll()
    asked = setup.ask(2)
    setup.poll(2, forward_s=1.5)
    setup.host(0).loads = False
    setup.poll()
    setup.host(0).states[2] = "failed", "no space"
    setup.poll()
    assert setup.operation(asked).state == "failed"
    setup.host(0).loads = True
    setup.poll(4)
    assert setup.held() == {1}
    assert setup.served == [(0, 0), (0, 1), (1, 0), (1, 1)]


def test_a_canary_never_comes_in_waves(state: StateDir) -> None:
    setup = Setup(state, **{"sharding.replicas": 2})
    setup.free_bytes = 0
    setup.poll()
    asked = setup.ask(2, alias="canary")
    setup.poll(2)
    assert setup.operation(asked).state == "failed"


def test_a_store_that_cannot_be_read_leaves_all_as_it_is(
    setup: Setup, capsys: pytest.CaptureFixture[str]
) -> None:
    content = setup.state.control_file.read_bytes()
    setup.state.control_file.write_bytes(b"no database at all, but long enough to look at" * 9)
    setup.poll(3)
    assert setup.served == [(0, 0), (1, 0)]
    assert capsys.readouterr().err.count("cannot be used, all stays as it is") == 1
    setup.state.control_file.write_bytes(content)
    asked = setup.ask(2)
    setup.poll(4)
    assert setup.operation(asked).state == "done"


def test_a_way_back_that_failed_in_one_process_is_loaded_there_again(setup: Setup) -> None:
    setup.ask(2)
    setup.poll(4)
    setup.host(0).states[1] = "failed", "it is full"
    wishes = len(setup.host(1).wishes)
    back = setup.ask(1, kind="rollback")
    setup.poll(5)
    assert setup.operation(back).state == "done"
    assert setup.host(1).wishes[wishes:] == []
    setup.poll(2)
    assert setup.served == [(0, 0), (1, 0)]


def test_a_canary_that_failed_in_one_process_can_be_activated(setup: Setup) -> None:
    setup.ask(2, alias="canary")
    setup.poll(4)
    setup.host(0).states[2] = "failed", "it is full"
    setup.poll(3)
    assert setup.host(0).states[2][0] == "failed"
    live = setup.ask(2)
    setup.poll(5)
    assert setup.operation(live).state == "done"


@pytest.mark.parametrize("alias", ["canary", "warm"])
def test_the_one_before_may_be_held_under_another_name_too(setup: Setup, alias: str) -> None:
    setup.ask(2)
    setup.poll(4)
    setup.ask(1, alias=alias)
    setup.poll(4)
    live = setup.ask(3)
    setup.poll(60, forward_s=1.0)
    assert setup.operation(live).state == "done"
    assert setup.watch.live == 3


def test_what_cannot_begin_in_time_ends_and_says_what_was_in_the_way(setup: Setup) -> None:
    setup.host(0).states[2] = "failed", "of yesterday"
    setup.host(0).retire = lambda generation: None  # type: ignore[method-assign]
    asked = setup.ask(2)
    setup.poll(3, forward_s=300.0)
    assert setup.operation(asked).state == "waiting"
    setup.poll(2, forward_s=300.0)
    assert setup.operation(asked).state == "failed"
    assert setup.operation(asked).reason == (
        "generation 2 failed earlier and is still held after 900 s, swap.timeout_s"
    )


@pytest.mark.parametrize("is_written", [False, True])
@pytest.mark.parametrize("written", ["running", "done", "failed"])
def test_a_write_of_the_store_that_fails_once_is_made_good(
    setup: Setup, monkeypatch: pytest.MonkeyPatch, written: str, is_written: bool
) -> None:
    """A write that fails may have come through all the same."""
    write, failed = setup.watch._store.write, []

    def flaky(control: Control) -> Control:
        if not failed and control.operations[-1].state == written:
            failed.append(written)
            if is_written:
                write(control)
            raise StateError("database or disk is full")
        return write(control)

    monkeypatch.setattr(setup.watch._store, "write", flaky)
    setup.host(0).loads = False
    asked = setup.ask(2)
    setup.poll(3)
    if written == "failed":
        setup.host(0).states[2] = "failed", "damaged"
    setup.host(0).loads = True
    setup.poll(4)
    assert failed == [written]
    assert setup.operation(asked).state == ("failed" if written == "failed" else "done")
    setup.poll(3, forward_s=3600.0)
    assert setup.held() == ({1} if written == "failed" else {1, 2})
    again = setup.ask(3)
    setup.poll(6)
    assert setup.operation(again).state == "done"


def test_after_a_wave_the_late_replicas_hold_what_the_others_hold(state: StateDir) -> None:
    setup = Setup(state, **{"sharding.replicas": 2})
    setup.free_bytes = 0
    setup.poll()
    asked = setup.ask(2)
    setup.poll(40, forward_s=0.2)
    assert setup.operation(asked).state == "done"
    setup.free_bytes = 1000 * MIB
    for alias, generation in (("canary", 4), ("live", 3)):
        beside = setup.ask(generation, alias=alias)
        setup.poll(8)
        assert setup.operation(beside).state == "done"
    assert all(one.states.keys() == {2, 3, 4} for one in setup.hosts.values())


def test_nothing_begins_while_a_wave_is_under_way(state: StateDir) -> None:
    setup = Setup(state, **{"sharding.replicas": 2})
    setup.free_bytes = 0
    setup.poll()
    setup.ask(2)
    while setup.watch.live == 1:
        setup.poll(1, forward_s=0.2)
    back = setup.ask(1, kind="rollback")
    for _ in range(60):
        setup.poll(1, forward_s=0.2)
        assert {shard for shard, _ in setup.served} == {0, 1}
    assert setup.operation(back).state == "done"


def test_what_made_room_for_a_swap_that_failed_is_loaded_again(setup: Setup) -> None:
    setup.ask(2)
    setup.poll(4)
    for is_room in (True, False):
        setup.host(1).loads = False
        asked = setup.ask(3)
        setup.poll(4, forward_s=20.0)
        assert setup.held() == {2, 3}
        setup.host(1).states[3] = "failed", "damaged"
        setup.host(1).loads = True
        setup.free_bytes = 1000 * MIB if is_room else 0
        setup.poll(6)
        assert setup.operation(asked).state == "failed"
        assert setup.held() == ({1, 2} if is_room else {2})
        setup.free_bytes = 1000 * MIB


def test_a_canary_that_is_replaced_drains_before_it_is_let_go_of(setup: Setup) -> None:
    setup.ask(2, alias="canary")
    setup.poll(4)
    moved = setup.ask(3, alias="canary")
    setup.poll(3)
    assert setup.operation(moved).state == "done"
    assert setup.watch.aliases == {"canary": 3}
    assert setup.watch.snapshots.keys() == {2, 3}
    assert ("retire", 2) not in setup.host(0).wishes
    setup.poll(2, forward_s=setup.config.swap.drain_ms / 1e3)
    assert setup.held() == {1, 3}


def test_what_still_drains_is_kept_when_the_next_one_becomes_live(setup: Setup) -> None:
    setup.ask(3, alias="canary")
    setup.poll(4)
    setup.ask(2)
    setup.poll(4)
    assert setup.watch.live == 2
    setup.ask(3)
    setup.poll(4)
    assert setup.watch.live == 3
    # Requests that were stamped with the first one may still be on their way.
    assert ("retire", 1) not in setup.host(0).wishes
    assert 1 in setup.watch.snapshots
    setup.poll(3, forward_s=setup.config.swap.drain_ms / 1e3)
    assert setup.held() == {2, 3}


def test_a_cluster_that_does_not_come_up_leaves_the_live_generation(setup: Setup) -> None:
    failing = setup.make(3)
    failing.poll(setup.watches)
    control = setup.store.read()
    assert (failing.live, control.live, control.previous) == (3, 1, 0)
    # It is not to be removed while it is being loaded.
    assert 3 in control.kept
    again = setup.make(3)
    again.started()
    control = setup.store.read()
    assert (again.live, control.live, control.previous, control.warm) == (3, 3, 1, 0)
    failing.close()


def test_what_a_replica_of_another_wave_refused_too_is_not_lacking(state: StateDir) -> None:
    setup = Setup(state, **{"sharding.replicas": 2})
    setup.free_bytes = 0
    setup.poll()
    for replica, generation in ((0, 2), (1, 1)):
        setup.host(0, replica).refused = {generation: ((7, "too many values"),)}
    asked = setup.ask(2)
    setup.poll(40, forward_s=0.2)
    assert setup.operation(asked).state == "done"


def test_what_cannot_be_compared_is_said_and_does_not_end_a_swap(setup: Setup) -> None:
    many = tuple((item, "too many values") for item in range(REMEMBERED))
    setup.host(0).refused = {1: many, 2: ((999, "too many values"),)}
    asked = setup.ask(2)
    setup.poll(4)
    assert setup.operation(asked).state == "done"
    assert "took what shards 0 refused is not known" in setup.operation(asked).progress


def test_a_generation_that_a_host_does_not_have_yet_is_waited_for(setup: Setup) -> None:
    setup.lacking = "generation 2 is not on h2 yet"
    asked = setup.ask(2)
    setup.poll(5)
    assert (setup.watch.live, setup.operation(asked).state) == (1, "waiting")
    assert setup.held() == {1}
    assert setup.watch.kept == {1, 2}
    setup.lacking = ""
    setup.poll(5)
    assert (setup.watch.live, setup.operation(asked).state) == (2, "done")


def test_a_generation_that_a_host_never_gets_is_given_up_with_the_reason(setup: Setup) -> None:
    setup.lacking = "generation 2 is not on h2 yet"
    asked = setup.ask(2)
    setup.poll(2)
    setup.poll(2, forward_s=901.0)
    assert setup.operation(asked).state == "failed"
    assert setup.operation(asked).reason.startswith("generation 2 is not on h2 yet after 900 s")


def test_several_hosts_decide_by_their_own_plan(state: StateDir) -> None:
    setup = Setup(state)
    seen: list[tuple[str, str]] = []

    def plan(live: Any, new: Any) -> MemoryPlan:
        seen.append((live.path.name, new.path.name))
        return MemoryPlan("refused", 0, 0, 0, 0, 0, "h2 has no room")

    setup.plan = plan
    setup.watch = setup.make(1)
    setup.watch.started()
    setup.poll()
    asked = setup.ask(2)
    setup.poll(3)
    assert (setup.operation(asked).state, setup.operation(asked).reason) == (
        "failed",
        "h2 has no room",
    )
    assert seen == [("gen-000001", "gen-000002")]

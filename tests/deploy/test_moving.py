import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from silvershard.cluster.shard_map import ShardEntry
from silvershard.deploy.config import load
from silvershard.deploy.config_sections import ShardingSection
from silvershard.deploy.control_store import Operation
from silvershard.deploy.generation_watch import GenerationWatch
from silvershard.deploy.moving import AGAIN_S, Moving, next_batch
from silvershard.deploy.placement import Copy, Move
from silvershard.deploy.places import HerePlaces
from silvershard.deploy.scaling import Scaling
from silvershard.deploy.shard_host import Held
from silvershard.deploy.shard_watch import ShardDead, ShardHandle, ShardWatch
from silvershard.deploy.state import StateDir
from silvershard.shard.errors import StateError
from silvershard.shard.generations import generation_dir


class FakePlaces(HerePlaces):
    """Hosts of which the test says what shall be where."""

    def __init__(self) -> None:
        super().__init__()
        self.wanted: list[Move] = []
        self.did: list[str] = []
        self.error = ""

    def moves(self, sharding: ShardingSection) -> Sequence[Move]:
        return self.wanted

    def begin(self, moves: Sequence[Move], sharding: ShardingSection) -> None:
        if self.error:
            raise StateError(self.error)
        self.did.append(f"begin {len(moves)}")

    def commit(self) -> None:
        if self.error:
            raise StateError(self.error)
        self.did.append("commit")
        self.wanted = []


class FakeHost:
    """A process that holds all it is wished for."""

    def __init__(self, cut: int, state: str) -> None:
        self.cut = cut
        self.state = state
        self.numbers = {1}
        self.closed = False

    @property
    def held(self) -> Mapping[int, Held]:
        return dict.fromkeys(
            self.numbers, Held(self.state, "too large", 9, (self.cut,), (), 0.0, 0, 0, 0)
        )

    def poll(self) -> None:
        assert not self.closed

    def prepare(self, generation: int, snapshot: str) -> None:
        self.numbers.add(generation)

    def retire(self, generation: int) -> None:
        self.numbers.discard(generation)

    def close(self) -> None:
        self.closed = True


class FakeShard:
    """A process of a shard, which is this one."""

    def __init__(self, number: int, shard: int, replica: int, *, serves: bool) -> None:
        self.number = number
        self.place = shard, replica
        self.serves = serves
        self.dead = ""
        self.ended = False

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
        )

    def ask_again(self) -> None:
        pass

    def end(self) -> None:
        self.ended = True


class Setup:
    """A driver whose shard processes are all in this one."""

    def __init__(self, state: StateDir) -> None:
        self.now_s = 1000.0
        self.config = load(
            None,
            environ={},
            options={
                **{"sharding.shards": 2, "query.deadline_max_ms": 2000, "swap.drain_ms": 1000},
                "swap.timeout_s": 60,
            },
        )
        self.shards: list[FakeShard] = []
        self.hosts: dict[str, FakeHost] = {}
        self.cut, self.state, self.serves = 5, "prepared", True
        self.store = state.control
        self.places = FakePlaces()
        self.generations = GenerationWatch(
            state, self.config, 1, connect=self.connect, clock=self.clock
        )
        self.scaling = Scaling(
            state,
            self.config,
            self.generations,
            self.start,
            connect=self.connect,
            draw_map=self.never,
            start_check=self.never,
            watch=self.watch,
            clock=self.clock,
        )
        self.moving = Moving(
            state,
            self.config,
            self.generations,
            self.scaling,
            self.start,
            connect=self.connect,
            watch=self.watch,
            places=self.places,
            clock=self.clock,
        )
        self.generations.started()
        self.scaling.start()
        self.poll(2)

    def clock(self) -> float:
        return self.now_s

    def connect(self, address: str) -> FakeHost:
        self.hosts[address] = FakeHost(self.cut, self.state)
        return self.hosts[address]

    def never(self, *_: Any) -> Any:
        raise AssertionError

    def watch(self, num_shards: int, shard: int, replica: int, handle: ShardHandle) -> ShardWatch:
        runtime = self.config.runtime
        return ShardWatch(shard, handle, runtime, replica=replica, feel=None, clock=self.clock)

    def start(self, num_shards: int, shard: int, replica: int) -> FakeShard:
        self.shards.append(FakeShard(len(self.shards), shard, replica, serves=self.serves))
        return self.shards[-1]

    def poll(self, times: int = 1, forward_s: float = 0.0) -> None:
        for _ in range(times):
            self.now_s += forward_s
            self.scaling.current.poll()
            self.generations.poll(self.scaling.current.watches)
            self.scaling.poll()
            self.moving.poll()
            assert {shard for shard, _ in self.named} == {0, 1}
            assert {number for _, number in self.named} <= set(self.living)

    @property
    def named(self) -> list[tuple[int, int]]:
        """The shards of the map and the numbers of their processes."""
        return [(one.shard, one.epoch - 1) for one in self.generations.in_service]

    @property
    def living(self) -> list[int]:
        return [one.number for one in self.shards if not one.ended]

    @property
    def operations(self) -> list[Operation]:
        return [one for one in self.store.read().operations if one.kind == "move"]


@pytest.fixture
def setup(tmp_path: Path, generation: Any) -> Iterator[Setup]:
    state = StateDir(tmp_path / "s")
    state.create()
    state.generations.mkdir()
    for number in (1, 2):
        generation_dir(state.generations, number).symlink_to(generation.path)
    made = Setup(state)
    assert made.named == [(0, 0), (1, 1)]
    yield made
    made.moving.close()
    made.scaling.close()
    made.generations.close()
    assert made.living == []


MOVE = Move(Copy(1, 0), "a", "b")


def test_a_copy_takes_over_elsewhere_before_the_first_one_ends(setup: Setup) -> None:
    setup.places.wanted = [MOVE]
    setup.serves = False
    setup.poll(3)
    assert setup.store.read().current is not None
    assert setup.named == [(0, 0), (1, 1)]
    setup.shards[2].serves = True
    setup.poll(3)
    assert setup.named == [(0, 0), (1, 2)]
    # It follows the one before in order, which may end what it was asked.
    assert [one.relieves for one in setup.generations.in_service] == [0, 2]
    assert setup.places.did == ["begin 1", "commit"]
    assert [one.state for one in setup.operations] == ["done"]
    assert setup.living == [0, 1, 2]
    assert setup.hosts["127.0.0.1:9001"].closed
    # The longest deadline, and the time in which routers take a map.
    setup.poll(1, forward_s=4.9)
    assert setup.living == [0, 1, 2]
    setup.poll(1, forward_s=0.2)
    assert setup.living == [0, 2]
    assert setup.store.read().current is None


def test_it_holds_every_generation_and_is_level_before_it_takes_over(setup: Setup) -> None:
    setup.store.change(lambda now: now.model_copy(update={"canary": 2}))
    setup.poll(3)
    setup.places.wanted, setup.cut = [MOVE], 3
    setup.poll(5)
    assert setup.hosts["127.0.0.1:9002"].numbers == {1, 2}
    assert setup.named == [(0, 0), (1, 1)]
    assert setup.operations[0].progress == "prepared 1 of 1; catches up"
    setup.hosts["127.0.0.1:9002"].cut = 5
    setup.poll(2)
    assert setup.named == [(0, 0), (1, 2)]


def test_a_process_that_cannot_start_leaves_all_as_it_was(setup: Setup) -> None:
    setup.places.wanted, setup.serves = [MOVE], False
    setup.poll(2)
    setup.shards[2].dead = "no memory"
    setup.poll(2)
    (operation,) = setup.operations
    assert (operation.state, operation.reason) == ("failed", "shard 1 could not start: no memory")
    assert setup.named == [(0, 0), (1, 1)]
    assert setup.living == [0, 1]
    # It is tried again after a while.
    setup.poll(3)
    assert len(setup.operations) == 1
    setup.serves = True
    setup.poll(3, forward_s=AGAIN_S)
    assert [one.state for one in setup.operations] == ["failed", "done"]


def test_one_that_cannot_hold_a_generation_ends(setup: Setup) -> None:
    setup.places.wanted, setup.state = [MOVE], "failed"
    setup.poll(4)
    assert setup.operations[0].reason == "shard 1 replica 0 cannot hold generation 1: too large"
    assert setup.living == [0, 1]


def test_it_takes_no_longer_than_a_swap_may(setup: Setup) -> None:
    setup.places.wanted, setup.serves = [MOVE], False
    setup.poll(2)
    setup.poll(1, forward_s=61.0)
    assert setup.operations[0].reason == (
        "0 of 1 processes were prepared after 60 s, swap.timeout_s"
    )
    assert setup.living == [0, 1]


def test_what_is_called_off_ends_the_second_processes_only(setup: Setup) -> None:
    setup.places.wanted, setup.serves = [MOVE], False
    setup.poll(2)
    setup.store.call_off(setup.operations[0].operation_id, "a rollback")
    setup.poll(2)
    assert setup.living == [0, 1]
    assert setup.places.did == ["begin 1"]


def test_nothing_moves_while_something_else_goes_on(setup: Setup) -> None:
    setup.places.wanted = [MOVE]
    other = Operation(operation_id="x", kind="restart", began_unix_s=1.0)
    setup.store.change(lambda now: now.with_operation(other))
    setup.poll(3)
    assert setup.operations == []
    assert setup.living == [0, 1]


def test_while_the_store_is_away_it_neither_begins_nor_takes_over(
    setup: Setup, capsys: pytest.CaptureFixture[str]
) -> None:
    setup.places.wanted, setup.places.error = [MOVE], "the store is away"
    setup.poll(1)
    assert "the store is away" in capsys.readouterr().err
    assert setup.living == [0, 1]
    setup.places.error, setup.serves = "", False
    setup.poll(2, forward_s=AGAIN_S)
    assert [one.state for one in setup.operations] == ["failed", "running"]
    setup.places.error, setup.shards[2].serves = "the store is away", True
    setup.poll(3)
    assert setup.named == [(0, 0), (1, 1)]
    setup.places.error = ""
    setup.poll(2)
    assert setup.named == [(0, 0), (1, 2)]


def test_hosts_that_hand_nothing_over_receive_first() -> None:
    to_c = Move(Copy(0, 0), "a", "c")
    to_b, from_b = Move(Copy(1, 0), "a", "b"), Move(Copy(2, 0), "b", "c")
    assert next_batch([to_c, to_b, from_b]) == [to_c, from_b]
    around = [Move(Copy(0, 0), "a", "b"), Move(Copy(1, 0), "b", "a")]
    assert next_batch(around) == around[:1]

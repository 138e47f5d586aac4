from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pytest

from silvershard.deploy.cluster_store import ClusterStore, Launched, Superseded
from silvershard.deploy.config_sections import ShardingSection
from silvershard.deploy.errors import Refused
from silvershard.deploy.host_places import Beside, HostPlaces
from silvershard.deploy.layout import Layout, Place
from silvershard.deploy.placement import Copy, Host, Move

TWO = ShardingSection(shards=2, replicas=2)
THREE = ShardingSection(shards=3, replicas=1)


class Setup:
    def __init__(self, store: ClusterStore, made: Launched) -> None:
        self.store = store
        self.launched = made
        self.states: dict[str, Any] = {}
        self.at: dict[Copy, str] = {}
        self.refused = ""
        self.plans: list[tuple[Mapping[Copy, str], Sequence[Beside]]] = []
        self.places = self.make()

    def make(self, sharding: ShardingSection = TWO) -> HostPlaces:
        term = self.store.take_over()
        return HostPlaces(self.store, self.launched, term, sharding, self.plan, lambda: self.states)

    def plan(
        self,
        sharding: ShardingSection,
        hosts: Sequence[Host],
        present: Mapping[Copy, str],
        beside: Sequence[Beside],
    ) -> Mapping[Copy, str]:
        self.plans.append((dict(present), list(beside)))
        if self.refused:
            raise Refused(self.refused)
        return self.at

    @property
    def written(self) -> list[tuple[str, str, str]]:
        found = self.store.read(Layout, "layout")
        assert found is not None
        return [(one.actor, one.host, one.role) for one in found.copies]


@pytest.fixture
def setup(make_redis: Callable[..., Any], launched: Callable[..., Launched]) -> Iterator[Setup]:
    store = ClusterStore(make_redis().url())
    yield Setup(store, launched())
    store.close()


FIRST = [
    ("shard-0-0-1", "a", "serving"),
    ("shard-0-1-2", "b", "serving"),
    ("shard-1-0-3", "b", "serving"),
    ("shard-1-1-4", "a", "serving"),
]


class Handle:
    def __init__(self) -> None:
        self.did: list[str] = []

    def restarts(self) -> int:
        return 5

    def entry(self) -> Any:
        return "there"

    def ask_again(self) -> None:
        self.did.append("asked")

    def end(self) -> None:
        self.did.append("ended")


def test_what_was_launched_is_written_down_and_found_again(setup: Setup) -> None:
    assert setup.written == FIRST
    setup.places.lay_out(TWO)
    assert setup.plans == []
    assert setup.places.name(Place(2, 1, 1)) == "shard-1-1-4"
    assert setup.places.where(Place(2, 1, 1)) == "a"
    found = setup.make()
    assert (found.name(Place(2, 1, 1)), found.strays) == ("shard-1-1-4", [])
    # Whoever was superseded writes nothing.
    setup.at = dict.fromkeys((Copy(0, 0), Copy(1, 0), Copy(2, 0)), "a")
    with pytest.raises(Superseded):
        setup.places.lay_out(THREE)
    assert setup.written == FIRST


def test_a_copy_that_starts_again_has_another_name_on_the_same_host(setup: Setup) -> None:
    handle = Handle()
    kept = setup.places.kept("shard-0-1-2", handle)
    assert (kept.restarts(), kept.entry()) == (5, "there")
    kept.ask_again()
    kept.end()
    assert handle.did == ["asked", "ended"]
    assert setup.places.where(Place(2, 0, 1)) == ""
    assert setup.places.name(Place(2, 0, 1)) == "shard-0-1-5"
    assert setup.places.where(Place(2, 0, 1)) == "b"
    assert setup.written == [FIRST[0], *FIRST[2:], ("shard-0-1-5", "b", "serving")]
    # It is ended once.
    kept.end()
    assert setup.places.name(Place(2, 0, 1)) == "shard-0-1-5"


def test_a_new_set_is_planned_beside_the_old_one(setup: Setup) -> None:
    setup.at = {Copy(0, 0): "a", Copy(1, 0): "b", Copy(2, 0): "a"}
    setup.places.lay_out(THREE)
    ((present, beside),) = setup.plans
    assert present == {}
    assert sorted((one.num_shards, one.host) for one in beside) == [(2, "a")] * 2 + [(2, "b")] * 2
    assert setup.written[4:] == [
        ("shard-0-0-5", "a", "serving"),
        ("shard-1-0-6", "b", "serving"),
        ("shard-2-0-7", "a", "serving"),
    ]
    # What has ended is written when that is due, and makes room.
    setup.places.ended("shard-0-0-1")
    assert len(setup.written) == 7
    setup.places.flush()
    assert len(setup.written) == 6
    # Whoever takes over finds which set serves, and what of the other is left.
    assert setup.make(THREE).strays == ["shard-0-1-2", "shard-1-0-3", "shard-1-1-4"]


def test_what_has_no_room_is_written_nowhere(setup: Setup) -> None:
    setup.refused = "no room"
    with pytest.raises(Refused, match="no room"):
        setup.places.lay_out(THREE)
    assert setup.written == FIRST


def test_more_copies_come_beside_those_that_are_there(setup: Setup) -> None:
    setup.at = {Copy(shard, number): "a" for shard in range(2) for number in range(3)}
    setup.places.lay_out(TWO.model_copy(update={"replicas": 3}))
    ((present, beside),) = setup.plans
    assert len(present) == 4
    assert beside == []
    assert setup.written[4:] == [
        ("shard-0-2-5", "a", "serving"),
        ("shard-1-2-6", "a", "serving"),
    ]


def test_a_host_that_goes_hands_over_and_the_plan_is_made_once(setup: Setup) -> None:
    assert setup.places.moves(TWO) == ()
    assert setup.plans == []
    setup.states = {"b": "retired"}
    setup.at = {Copy(shard, number): "a" for shard in range(2) for number in range(2)}
    moves = [Move(Copy(0, 1), "b", "a"), Move(Copy(1, 0), "b", "a")]
    for _ in range(3):
        assert list(setup.places.moves(TWO)) == moves
    assert len(setup.plans) == 1
    setup.places.begin(moves, TWO)
    assert setup.written[4:] == [("shard-0-1-5", "a", "coming"), ("shard-1-0-6", "a", "coming")]
    # While they come, the first ones count: whoever takes over then ends the others.
    assert setup.make().strays == ["shard-0-1-5", "shard-1-0-6"]


def test_who_came_counts_when_that_is_written_down(setup: Setup) -> None:
    setup.places.begin([Move(Copy(0, 1), "b", "a")], TWO)
    assert setup.places.name(Place(2, 0, 1)) == "shard-0-1-5"
    setup.places.commit()
    assert setup.written == [
        FIRST[0],
        ("shard-0-1-2", "b", "leaving"),
        *FIRST[2:],
        ("shard-0-1-5", "a", "serving"),
    ]
    found = setup.make()
    assert (found.strays, found.where(Place(2, 0, 1))) == (["shard-0-1-2"], "a")
    found.ended("shard-0-1-2")
    assert found.where(Place(2, 0, 1)) == "a"


def test_a_host_in_maintenance_keeps_what_it_has(setup: Setup) -> None:
    setup.states = {"b": "maintenance"}
    assert setup.places.moves(TWO) == ()
    assert setup.plans == []


def test_why_nothing_can_move_is_said(setup: Setup) -> None:
    setup.states, setup.refused = {"b": "down"}, "no room for shard 0"
    assert setup.places.moves(TWO) == ()
    assert setup.places.said == "no room for shard 0"
    setup.states = {}
    assert setup.places.moves(TWO) == ()
    assert setup.places.said == ""


def test_a_copy_that_was_given_up_is_not_started_elsewhere(setup: Setup) -> None:
    setup.places.ended("shard-0-1-2")
    setup.states = {"b": "retired"}
    setup.at = {Copy(shard, number): "a" for shard in range(2) for number in range(2)}
    assert [one.copy for one in setup.places.moves(TWO)] == [Copy(1, 0)]

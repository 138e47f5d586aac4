import socket
from dataclasses import dataclass, field
from typing import Any

import pytest

from silvershard.deploy.errors import CommandError, Refused
from silvershard.deploy.fleet import (
    Holding,
    OneMachine,
    change_state,
    check_new_copies,
    listing,
    render_change,
    render_listing,
)
from silvershard.deploy.placement import Copy, Host, Need, Wanted, place
from silvershard.deploy.state import ShardRecord, StateDir

HERE = socket.gethostname()
WANTED = Wanted((Need(100, 1 << 20),) * 3, 2)


@dataclass
class FakeFleet:
    """Some hosts with two copies of each of three shards."""

    hosts: list[Host]
    wanted: Wanted = WANTED
    gone: set[Copy] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.present = dict(place(self.hosts, self.wanted).at)

    def holding(self) -> Holding:
        serving = self.present.keys() - self.gone
        return Holding(tuple(self.hosts), self.wanted, self.present, serving)

    def set_state(self, name: str, state: Any) -> None:
        self.hosts = [one._replace(state=state) if one.name == name else one for one in self.hosts]


@pytest.fixture
def fleet() -> FakeFleet:
    return FakeFleet([Host(f"h{at}", 4.0, 1 << 30) for at in range(3)])


def states(fleet: FakeFleet) -> list[str]:
    return [one.state for one in fleet.hosts]


def test_a_host_is_drained_and_comes_back(fleet: FakeFleet) -> None:
    found = change_state(fleet, "h1", "retired")
    assert states(fleet) == ["up", "retired", "up"]
    assert len(found["moves"]) == sum(at == "h1" for at in fleet.present.values())
    assert all(" from h1 to " in one for one in found["moves"])
    assert render_change(found).splitlines()[0] == "host h1 is retired, it was up"
    found = change_state(fleet, "h1", "up")
    assert states(fleet) == ["up"] * 3
    assert (found["before"], found["moves"]) == ("retired", [])


def test_a_dry_run_changes_nothing(fleet: FakeFleet) -> None:
    found = change_state(fleet, "h1", "retired", dry_run=True)
    assert not found["done"]
    assert found["moves"]
    assert render_change(found).startswith("host h1 would be retired, it was up")
    assert states(fleet) == ["up"] * 3


def test_the_last_copy_is_kept_unless_it_is_forced(fleet: FakeFleet) -> None:
    at_h1 = next(copy for copy, at in fleet.present.items() if at == "h1")
    fleet.gone = {one for one in fleet.present if one.shard == at_h1.shard and one != at_h1}
    words = f"shard {at_h1.shard} would lose its last copy that answers, of 2"
    with pytest.raises(Refused, match=words):
        change_state(fleet, "h1", "maintenance")
    assert states(fleet) == ["up"] * 3
    found = change_state(fleet, "h1", "maintenance", force=True)
    assert states(fleet) == ["up", "maintenance", "up"]
    assert words in render_change(found)


def test_who_takes_new_copies(fleet: FakeFleet) -> None:
    check_new_copies(fleet)
    for name in ("h0", "h1"):
        change_state(fleet, name, "maintenance", force=True)
    check_new_copies(fleet)
    change_state(fleet, "h2", "maintenance", force=True)
    with pytest.raises(Refused, match="no host takes new copies: h0 is in maintenance, h1 is in"):
        check_new_copies(fleet)


def test_hosts_are_listed_with_what_they_hold(fleet: FakeFleet) -> None:
    fleet.gone = {next(copy for copy, at in fleet.present.items() if at == "h2")}
    found = listing(fleet)
    assert [one["host"] for one in found["hosts"]] == ["h0", "h1", "h2"]
    assert sum(one["copies"] for one in found["hosts"]) == 6
    assert [one["copies"] - one["serving"] for one in found["hosts"]] == [0, 0, 1]
    assert render_listing(found).splitlines()[0].split() == ["host", "state", "copies", "serving"]


@pytest.fixture
def machine(idle_state: StateDir) -> OneMachine:
    record = idle_state.read_record()
    assert record is not None
    shards = tuple(
        ShardRecord(shard=shard, replica=replica, state=state, documents=300)
        for shard, replica, state in ((0, 0, "serving"), (0, 1, "restarting"), (1, 0, "serving"))
    )
    return OneMachine(idle_state, record.model_copy(update={"shards": shards}))


def test_the_only_host_cannot_hand_anything_over(machine: OneMachine, idle_state: StateDir) -> None:
    assert listing(machine)["hosts"] == [{"host": HERE, "state": "up", "copies": 3, "serving": 2}]
    with pytest.raises(Refused, match=f"host {HERE} cannot be set to retired"):
        change_state(machine, HERE, "retired")
    with pytest.raises(Refused, match="shard 0 would lose its last copy that answers, of 2"):
        change_state(machine, HERE, "maintenance")
    with pytest.raises(CommandError, match=f"there is no host nobody; known are {HERE}"):
        change_state(machine, "nobody", "up")
    assert idle_state.control.read().host_states == {}


def test_the_state_of_the_only_host_is_durable(machine: OneMachine, idle_state: StateDir) -> None:
    change_state(machine, HERE, "maintenance", force=True)
    assert idle_state.control.read().host_states == {HERE: "maintenance"}
    assert listing(machine)["hosts"][0]["state"] == "maintenance"
    with pytest.raises(Refused, match="silvershard undrain"):
        check_new_copies(machine)
    change_state(machine, HERE, "up")
    assert idle_state.control.read().host_states == {}
    check_new_copies(machine)

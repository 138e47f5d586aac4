from typing import Any

import pytest

from silvershard.deploy.errors import CommandError, ExitCode, Refused
from silvershard.deploy.host_state import HOST_STATES
from silvershard.deploy.nodes import NodeChange, set_node_state
from silvershard.deploy.placement import Copy, Host, Need, Wanted, place

GIB = 1 << 30


def hosts_of(count: int, memory_bytes: int = 16 * GIB) -> list[Host]:
    return [Host(f"h{at}", 4.0, memory_bytes) for at in range(count)]


def wanted_of(shards: int, replicas: int) -> Wanted:
    return Wanted((Need(1000, 4 * GIB, standby_bytes=4 * GIB),) * shards, replicas)


def change(hosts: list[Host], wanted: Wanted, name: str, state: Any, **options: Any) -> NodeChange:
    present = options.pop("present", None) or place(hosts, wanted).at
    return set_node_state(hosts, wanted, present, name, state, **options)


def test_maintenance_is_safe_while_other_copies_answer() -> None:
    hosts, wanted = hosts_of(3), wanted_of(3, 2)
    done = change(hosts, wanted, "h1", "maintenance")
    assert [host.state for host in done.hosts] == ["up", "maintenance", "up"]
    assert done.before == "up"
    assert done.placement is not None
    assert done.placement.moves == ()
    assert done.warnings == ()


def test_maintenance_that_takes_the_last_copy_is_refused_in_words() -> None:
    hosts, wanted = hosts_of(3), wanted_of(3, 1)
    with pytest.raises(Refused) as refusal:
        change(hosts, wanted, "h1", "maintenance")
    assert str(refusal.value) == (
        "host h1 cannot be set to maintenance: shard 1 would lose its last copy that answers, of "
        "1: there is no other"
    )
    assert refusal.value.exit_code == ExitCode.REFUSED


def test_a_copy_that_does_not_answer_is_no_other_copy() -> None:
    hosts, wanted = hosts_of(2), wanted_of(1, 2)
    present = {Copy(0, 0): "h0", Copy(0, 1): "h1"}
    with pytest.raises(Refused) as refusal:
        change(hosts, wanted, "h0", "maintenance", present=present, serving=[Copy(0, 0)])
    assert "of 2: replica 1 on h1 does not answer" in str(refusal.value)
    # Its host has nothing that answers, so that nothing is lost with it.
    change(hosts, wanted, "h1", "maintenance", present=present, serving=[Copy(0, 0)])


def test_two_hosts_with_both_copies_are_not_in_maintenance_at_once() -> None:
    hosts, wanted = hosts_of(2), wanted_of(2, 2)
    first = change(hosts, wanted, "h0", "maintenance")
    with pytest.raises(Refused, match=r"replica \d on h0 is in maintenance \(and 1 more\)"):
        change([*first.hosts], wanted, "h1", "maintenance", present=place(hosts, wanted).at)


def test_a_standby_is_no_copy_that_answers() -> None:
    hosts = hosts_of(2)
    wanted = wanted_of(1, 1)._replace(standbys=1)
    present = {Copy(0, 0): "h0", Copy(0, 0, standby=True): "h1"}
    with pytest.raises(Refused, match="shard 0 would lose its last copy"):
        change(hosts, wanted, "h0", "maintenance", present=present)
    change(hosts, wanted, "h1", "maintenance", present=present)


def test_retirement_moves_what_a_host_holds() -> None:
    hosts, wanted = hosts_of(4), wanted_of(4, 2)
    present = place(hosts, wanted).at
    done = change(hosts, wanted, "h2", "retired", present=present)
    assert done.placement is not None
    assert done.placement.on("h2") == []
    assert {move.source for move in done.placement.moves} == {"h2"}


def test_retirement_without_room_elsewhere_is_refused_with_numbers() -> None:
    hosts, wanted = hosts_of(2, 8 * GIB), wanted_of(4, 1)
    with pytest.raises(Refused) as refusal:
        change(hosts, wanted, "h0", "retired")
    assert str(refusal.value) == (
        "host h0 cannot be set to retired: 4 shards x 1 replicas need 16.0 GiB of host memory, and "
        "the 1 hosts that can take copies have 8.0 GiB: 8.0 GiB are missing"
    )


def test_down_needs_other_copies_and_room() -> None:
    hosts = hosts_of(3, 8 * GIB)
    with pytest.raises(Refused, match="would lose its last copy"):
        change(hosts, wanted_of(3, 1), "h0", "down")
    with pytest.raises(Refused, match=r"host memory.*are missing"):
        change(hosts, wanted_of(3, 2), "h0", "down")
    roomy = hosts_of(3, 16 * GIB)
    done = change(roomy, wanted_of(3, 2), "h0", "down")
    assert done.placement is not None
    assert done.placement.on("h0") == []
    # After retirement nothing is left on it, and it may go at once.
    retired = change(roomy, wanted_of(3, 1), "h0", "retired")
    assert retired.placement is not None
    change([*retired.hosts], wanted_of(3, 1), "h0", "down", present=retired.placement.at)


def test_force_does_it_and_says_what_is_lost() -> None:
    hosts = hosts_of(2, 8 * GIB)
    done = change(hosts, wanted_of(4, 1), "h0", "down", force=True)
    assert done.placement is None
    assert [line.split(" would ")[0] for line in done.warnings[:2]] == ["shard 0", "shard 2"]
    assert "8.0 GiB are missing" in done.warnings[2]
    kept = change(hosts, wanted_of(4, 1), "h0", "retired", force=True)
    assert kept.placement is not None
    assert len(kept.placement.staying) == 2


def test_up_is_always_safe_and_takes_its_share() -> None:
    hosts = hosts_of(3)
    hosts[2] = hosts[2]._replace(state="down")
    present = place(hosts, wanted_of(4, 1)).at
    done = change(hosts, wanted_of(4, 1), "h2", "up", present=present)
    assert done.before == "down"
    assert done.placement is not None
    assert {move.target for move in done.placement.moves} == {"h2"}
    small = hosts_of(2, 1 * GIB)
    small[1] = small[1]._replace(state="down")
    again = change(small, wanted_of(1, 1), "h1", "up", present={Copy(0, 0): "h0"})
    assert again.placement is None
    assert "no host that is up has so much" in again.warnings[0]


def test_copies_that_come_to_share_a_host_are_said() -> None:
    done = change(hosts_of(2), wanted_of(1, 2), "h1", "retired")
    assert done.warnings == ("2 copies of shard 0 share host h0",)


def test_the_state_that_a_host_has_is_no_change() -> None:
    hosts, wanted = hosts_of(1), wanted_of(1, 1)
    hosts[0] = hosts[0]._replace(state="maintenance")
    done = change(hosts, wanted, "h0", "maintenance", present={Copy(0, 0): "h0"})
    assert done.before == "maintenance"
    assert done.placement is not None
    assert done.placement.moves == ()


@pytest.mark.parametrize(
    ("name", "state", "said"),
    [("x", "up", "there is no host x; known are h0"), ("h0", "gone", ", ".join(HOST_STATES))],
)
def test_unknown_names_are_wrong_usage(name: str, state: Any, said: str) -> None:
    with pytest.raises(CommandError, match=said) as refusal:
        change(hosts_of(1), wanted_of(1, 1), name, state)
    assert refusal.value.exit_code == ExitCode.USAGE

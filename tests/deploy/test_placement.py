import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from silvershard.deploy.errors import Refused
from silvershard.deploy.placement import (
    Copy,
    Host,
    Need,
    Placement,
    Wanted,
    place,
    size,
)

GIB = 1 << 30
STATES = (*["up"] * 7, "maintenance", "retired", "down")

PROPERTIES = settings(deadline=None, max_examples=150, derandomize=True)


class Case(NamedTuple):
    hosts: tuple[Host, ...]
    wanted: Wanted
    present: dict[Copy, str]


class Cost(NamedTuple):
    """What an assignment costs, the worst first."""

    staying: int
    hosts_shared: int
    zones_shared: int
    moves: int


def cost(case: Case, at: Mapping[Copy, str]) -> Cost | None:
    """Return what an assignment costs, written down once more; None where it is not allowed."""
    hosts = {host.name: host for host in case.hosts}
    memory: Counter[str] = Counter()
    devices: Counter[str] = Counter()
    for copy, name in at.items():
        host, need = hosts[name], case.wanted.needs[copy.shard]
        stays = case.present.get(copy) == name and host.state in ("maintenance", "retired")
        if host.state != "up" and not stays:
            return None
        memory[name] += need.standby_bytes if copy.standby else need.memory_bytes
        if not copy.standby:
            devices[name] += need.num_devices
            if need.num_devices and host.device_bytes < need.device_bytes:
                return None
    for name, host in hosts.items():
        if memory[name] > host.memory_bytes or devices[name] > host.num_devices:
            return None
    pairs = [
        (at[one], at[other])
        for one, other in itertools.combinations(at, 2)
        if one.shard == other.shard
    ]
    zones = {name: host.zone or f"own {name}" for name, host in hosts.items()}
    moves = sum(
        name in hosts and hosts[name].state in ("up", "maintenance") and at[copy] != name
        for copy, name in case.present.items()
        if copy in at
    )
    return Cost(
        staying=sum(hosts[name].state == "retired" for name in at.values()),
        hosts_shared=sum(one == other for one, other in pairs),
        zones_shared=sum(zones[one] == zones[other] for one, other in pairs)
        if case.wanted.spread == "zone"
        else 0,
        moves=moves,
    )


def least_cost(case: Case) -> Cost | None:
    """Return the least cost of all assignments, tried one by one; None where none is allowed."""
    copies = case.wanted.copies()
    names = [host.name for host in case.hosts]
    tried = (
        cost(case, dict(zip(copies, chosen, strict=True)))
        for chosen in itertools.product(names, repeat=len(copies))
    )
    return min((one for one in tried if one is not None), default=None)


@st.composite
def cases(draw: st.DrawFn, *, equal: bool, devices: bool = False) -> Case:
    shards, replicas = draw(st.sampled_from([(1, 2), (1, 3), (2, 1), (2, 2), (3, 1), (5, 1)]))
    standbys = draw(st.sampled_from([0, 0, 1])) if shards * replicas <= 2 else 0
    size_of = st.just(1) if equal else st.integers(1, 4)
    needs = tuple(
        Need(
            documents=draw(st.integers(90, 110)),
            memory_bytes=(need := draw(size_of)),
            num_devices=1 if devices else 0,
            device_bytes=draw(st.integers(1, 3)) if devices else 0,
            standby_bytes=need if equal else draw(size_of),
        )
        for _ in range(shards)
    )
    wanted = Wanted(needs, replicas, standbys, draw(st.sampled_from(["host", "zone"])))
    hosts = tuple(
        Host(
            name=f"h{at}",
            cpus=draw(st.integers(1, 4)),
            memory_bytes=draw(st.integers(1, 3) if equal else st.integers(2, 10)),
            num_devices=draw(st.integers(0, 3)) if devices else 0,
            device_bytes=draw(st.integers(1, 3)) if devices else 0,
            zone=draw(st.sampled_from(["", "a", "b"])),
            state=draw(st.sampled_from(STATES)),
        )
        for at in range(draw(st.sampled_from([1, 2, 3, 3, 4, 4])))
    )
    present: dict[Copy, str] = {}
    left = {host.name: host.memory_bytes for host in hosts}
    for copy in wanted.copies():
        host = draw(st.sampled_from([None, *hosts]))
        if host is not None and left[host.name] >= wanted.need_of(copy)[0]:
            present[copy] = host.name
            left[host.name] -= wanted.need_of(copy)[0]
    return Case(hosts, wanted, present)


def placed(case: Case, **options: bool) -> Placement | None:
    try:
        return place(case.hosts, case.wanted, case.present, **options)
    except Refused:
        return None


def settled(case: Case) -> bool:
    """Return whether no host is new, so that nothing moves only to even the load."""
    return {host.name for host in case.hosts if host.state == "up"} <= {*case.present.values()}


@PROPERTIES
@given(case=cases(equal=True))
def test_of_equal_copies_the_best_assignment_is_found_whenever_there_is_one(case: Case) -> None:
    found, least = placed(case), least_cost(case)
    assert (found is None) == (least is None)
    if found is not None and least is not None:
        got = cost(case, found.at)
        assert got is not None
        assert got[:3] == least[:3]
        if settled(case):
            assert got == least


@PROPERTIES
@given(case=cases(equal=False))
def test_of_unequal_copies_an_assignment_that_shares_least_is_found_whenever_there_is_one(
    case: Case,
) -> None:
    found, least = placed(case), least_cost(case)
    assert (found is None) == (least is None)
    if found is not None and least is not None:
        got = cost(case, found.at)
        assert got is not None
        assert got[:3] == least[:3]


# A copy in the way that would stop to share its host has yet no host to go to.
NO_WAY_OUT = Case(
    hosts=(
        Host("h0", 1.0, 2, 1, device_bytes=1),
        Host("h1", 1.0, 2, 1, device_bytes=2),
        Host("h3", 1.0, 2, 1, device_bytes=2),
    ),
    wanted=Wanted((Need(90, 1, num_devices=1, device_bytes=2, standby_bytes=1),), replicas=3),
    present={Copy(0, 0): "h3", Copy(0, 1): "h3"},
)


@PROPERTIES
@example(case=NO_WAY_OUT)
@given(case=cases(equal=False, devices=True))
def test_devices_are_taken_whole_and_are_large_enough(case: Case) -> None:
    present = {
        copy: name
        for copy, name in case.present.items()
        if cost(case._replace(present={copy: name}), {copy: name}) is not None
    }
    case = case._replace(present=present)
    found, least = placed(case), least_cost(case)
    assert (found is None) == (least is None)
    if found is not None:
        assert cost(case, found.at) is not None


@PROPERTIES
@given(case=cases(equal=False), order=st.randoms(use_true_random=False))
def test_the_order_of_hosts_and_copies_decides_nothing(case: Case, order: object) -> None:
    hosts, present = [*case.hosts], [*case.present.items()]
    order.shuffle(hosts)  # type: ignore[attr-defined]
    order.shuffle(present)  # type: ignore[attr-defined]
    other = case._replace(hosts=tuple(hosts), present=dict(present))
    assert placed(case) == placed(other)


@PROPERTIES
@given(case=cases(equal=False))
def test_what_is_placed_stays_as_it_is(case: Case) -> None:
    found = placed(case)
    assume(found is not None and not found.staying)
    assert found is not None
    again = place(case.hosts, case.wanted, found.at)
    assert again.at == found.at
    assert again.moves == ()


def hosts_of(count: int, memory_bytes: int = 64 * GIB, zones: int = 0) -> list[Host]:
    return [
        Host(f"h{at:02}", 8.0, memory_bytes, zone=f"z{at % zones}" if zones else "")
        for at in range(count)
    ]


def wanted_of(shards: int, replicas: int, standbys: int = 0, **options: object) -> Wanted:
    needs = tuple(Need(1000 + at % 3, 4 * GIB, standby_bytes=4 * GIB) for at in range(shards))
    return Wanted(needs, replicas, standbys)._replace(**options)


def loads(placement: Placement, hosts: Sequence[Host]) -> list[int]:
    return [sum(not copy.standby for copy in placement.on(host.name)) for host in hosts]


@pytest.mark.parametrize(
    ("shards", "replicas", "standbys", "hosts"),
    [(8, 2, 0, 4), (8, 2, 1, 4), (5, 3, 0, 7), (16, 2, 0, 3), (12, 1, 1, 5)],
)
def test_copies_never_share_a_host_and_the_load_is_even(
    shards: int, replicas: int, standbys: int, hosts: int
) -> None:
    machines = hosts_of(hosts)
    found = place(machines, wanted_of(shards, replicas, standbys))
    assert found.shared == ()
    for shard in range(shards):
        used = [name for copy, name in found.at.items() if copy.shard == shard]
        assert len(used) == len(set(used)) == replicas + standbys
    assert max(loads(found, machines)) - min(loads(found, machines)) <= 1


def test_a_stronger_host_takes_more() -> None:
    machines = [Host("big", 12.0, 64 * GIB), Host("small", 4.0, 64 * GIB)]
    found = place(machines, wanted_of(8, 1))
    assert loads(found, machines) == [6, 2]


def test_copies_lie_in_different_zones_where_that_is_asked_for_and_possible() -> None:
    machines = hosts_of(6, zones=3)
    zone_of = {host.name: host.zone for host in machines}
    found = place(machines, wanted_of(9, 2, 1, spread="zone"))
    for shard in range(9):
        used = [zone_of[name] for copy, name in found.at.items() if copy.shard == shard]
        assert len(set(used)) == 3
    crowded = place(machines, wanted_of(2, 2, 2, spread="zone"))
    assert [line[:28] for line in crowded.shared] == [
        "2 copies of shard 0 share zo",
        "2 copies of shard 1 share zo",
    ]


def test_one_machine_holds_all_copies_and_says_so() -> None:
    found = place(hosts_of(1), wanted_of(2, 2))
    assert set(found.at.values()) == {"h00"}
    assert found.shared == (
        "2 copies of shard 0 share host h00",
        "2 copies of shard 1 share host h00",
    )


def test_a_host_that_goes_moves_only_what_it_held() -> None:
    machines = hosts_of(6)
    first = place(machines, wanted_of(12, 2))
    for gone in machines:
        rest = [host for host in machines if host != gone]
        found = place(rest, wanted_of(12, 2), first.at)
        assert {move.copy for move in found.moves} == {*first.on(gone.name)}
        assert found.shared == ()
        assert max(loads(found, rest)) - min(loads(found, rest)) <= 1
        # The one that went says that it holds nothing: what moved comes from nowhere.
        assert {move.source for move in found.moves} == {""}


def test_a_host_that_comes_gets_its_share_and_nothing_else_moves() -> None:
    machines = hosts_of(5)
    first = place(machines[:4], wanted_of(10, 2))
    found = place(machines, wanted_of(10, 2), first.at)
    assert {move.target for move in found.moves} == {"h04"}
    assert loads(found, machines) == [4, 4, 4, 4, 4]
    assert len(found.moves) == 4
    assert found.shared == ()


def test_a_host_that_comes_parts_copies_that_shared_one() -> None:
    alone = place(hosts_of(1), wanted_of(3, 2))
    found = place(hosts_of(2), wanted_of(3, 2), alone.at)
    assert found.shared == ()
    assert len(found.moves) == 3


def test_maintenance_keeps_retirement_hands_over_and_down_holds_nothing() -> None:
    machines = hosts_of(4)
    first = place(machines, wanted_of(6, 2))

    def after(state: str) -> Placement:
        changed = [one._replace(state=state) if one.name == "h01" else one for one in machines]
        return place(changed, wanted_of(6, 2), first.at)

    assert after("maintenance").at == first.at
    for state in ("retired", "down"):
        found = after(state)
        assert found.on("h01") == []
        assert {move.copy for move in found.moves} == {*first.on("h01")}
        assert {move.source for move in found.moves} == {"h01" if state == "retired" else ""}
    grown = [one._replace(state="maintenance") if one.name == "h01" else one for one in machines]
    more = place(grown, wanted_of(9, 2), first.at)
    assert {*more.on("h01")} == {*first.on("h01")}


def test_what_has_room_nowhere_else_stays_on_a_retired_host() -> None:
    machines = hosts_of(2, 8 * GIB)
    first = place(machines, wanted_of(4, 1))
    retired = [machines[0]._replace(state="retired"), machines[1]]
    found = place(retired, wanted_of(4, 1), first.at)
    assert found.at == first.at
    assert [*found.staying] == first.on("h00")


def test_the_load_is_evened_among_old_hosts_when_asked() -> None:
    machines = hosts_of(2)
    present = {Copy(0, 0): "h01"} | {Copy(shard, 0): "h00" for shard in range(1, 6)}
    assert place(machines, wanted_of(6, 1), present).moves == ()
    found = place(machines, wanted_of(6, 1), present, even=True)
    assert loads(found, machines) == [3, 3]
    assert len(found.moves) == 2


def test_hosts_without_the_wanted_labels_get_nothing() -> None:
    machines = hosts_of(3)
    machines[1] = machines[1]._replace(labels={"role": "shard", "rack": "7"})
    found = place(machines, wanted_of(4, 1, labels={"role": "shard"}))
    assert set(found.at.values()) == {"h01"}
    with pytest.raises(Refused, match="none of the 3 that are up is role=router"):
        place(machines, wanted_of(4, 1, labels={"role": "router"}))


def test_refusals_say_what_is_needed_and_what_there_is() -> None:
    with pytest.raises(Refused) as refusal:
        place(hosts_of(3, 2 * GIB), wanted_of(4, 2))
    assert str(refusal.value) == (
        "shard 0 replica 0 needs 4.0 GiB of host memory, and no host that is up has so much: "
        "the largest, h00, has 2.0 GiB"
    )
    with pytest.raises(Refused) as refusal:
        place(hosts_of(3, 8 * GIB), wanted_of(4, 2, 1))
    assert str(refusal.value) == (
        "4 shards x 2 replicas and 1 standbys each need 48.0 GiB of host memory, and the 3 hosts "
        "that can take copies have 24.0 GiB: 24.0 GiB are missing"
    )
    with pytest.raises(Refused) as refusal:
        place(hosts_of(3, 6 * GIB), wanted_of(4, 1))
    assert str(refusal.value) == (
        "shard 3 replica 0 needs 4.0 GiB, and beside the other copies these are left: h00 2.0 GiB, "
        "h01 2.0 GiB, h02 2.0 GiB"
    )
    down = [host._replace(state="down") for host in hosts_of(2)]
    with pytest.raises(Refused, match="shard 0 replica 0 has no host: h00 is down, h01 is down"):
        place(down, wanted_of(1, 1))
    with pytest.raises(Refused, match="has no host: there are none"):
        place([], wanted_of(1, 1))


def test_refusals_name_devices() -> None:
    needs = (Need(10, GIB, num_devices=2, device_bytes=70 * GIB),) * 2
    gpus = Host("g", 8.0, 64 * GIB, num_devices=2, device_bytes=40 * GIB)
    with pytest.raises(Refused) as refusal:
        place([gpus], Wanted(needs))
    assert str(refusal.value) == (
        "shard 0 replica 0 needs 2 devices of 70.0 GiB each, and g has 2 of 40.0 GiB"
    )
    with pytest.raises(Refused) as refusal:
        place([gpus._replace(device_bytes=80 * GIB)], Wanted(needs))
    assert str(refusal.value) == (
        "2 shards x 1 replicas need 4 devices, and the 1 hosts that can take copies have 2: "
        "2 are missing"
    )


def test_names_must_differ() -> None:
    with pytest.raises(ValueError, match="names must differ, got h00 twice"):
        place([*hosts_of(1), *hosts_of(1)], wanted_of(1, 1))


def test_256_copies_are_placed_on_64_hosts_that_are_just_large_enough() -> None:
    machines = hosts_of(64, 16 * GIB, zones=4)
    wanted = wanted_of(128, 2, spread="zone")
    first = place(machines, wanted)
    rest = [host._replace(memory_bytes=20 * GIB) for host in machines[1:]]
    found = place(rest, wanted, first.at)
    assert first.shared == found.shared == ()
    assert loads(first, machines) == [4] * 64
    assert {move.copy for move in found.moves} == {*first.on("h00")}


def test_unequal_copies_fill_hosts_to_the_brim() -> None:
    # Pairs of 5 + 3 fill a host of 8; four copies of 4 would not leave room for the 5s.
    needs = tuple(Need(10, bytes_) for bytes_ in (3, 5, 4, 4, 3, 5, 4, 4))
    machines = [Host(f"h{at}", 1.0, 8) for at in range(4)]
    found = place(machines, Wanted(needs))
    for host in machines:
        assert sum(needs[copy.shard].memory_bytes for copy in found.on(host.name)) == 8


def test_sizes_are_in_the_unit_that_suits_them() -> None:
    assert [size(one) for one in (5, 2048, 3 << 20, 1536 << 20)] == [
        "5 bytes",
        "2.0 KiB",
        "3.0 MiB",
        "1.5 GiB",
    ]

"""Which host holds which copy of which shard; without I/O, so that a simulation can run it.

What holds for every assignment:

* no host holds more than it has room for, in host memory and in devices, which a copy takes whole;
* copies of a shard lie on different hosts, and with ``spread: zone`` in different zones, wherever
  an assignment exists in which they do; else as few pairs as can be share one;
* of the copies that may stay where they are, as few move as can be; a host that is new takes over
  what evens the load, and nothing else moves for it;
* hosts in maintenance keep what they have and get nothing new; retired ones hand everything over
  that has room elsewhere; those that are down hold nothing;
* equal input gives equal output, whatever the order of the hosts: ties go to the smaller name.

Shapes: S shards, n copies, m hosts.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Literal, NamedTuple

import numpy as np

from silvershard.deploy.errors import Refused
from silvershard.deploy.host_state import HostState
from silvershard.deploy.placement_search import Found, search, spread_load
from silvershard.deploy.placement_state import NOWHERE, STAYS, Problem

Spread = Literal["host", "zone"]

_STANDBY_SHARE = 8
"""A standby applies updates and answers nothing: it counts as so small a part of its documents."""
_LISTED = 6
"""Hosts that a refusal names one by one."""


class Host(NamedTuple):
    """A machine that can hold copies."""

    name: str
    cpus: float = 1.0
    memory_bytes: int = 0
    """What copies may take of its memory."""
    num_devices: int = 0
    device_bytes: int = 0
    """Memory of each device."""
    zone: str = ""
    """What fails together; empty: a zone of its own."""
    labels: Mapping[str, str] = {}
    state: HostState = "up"
    address: str = ""


class Need(NamedTuple):
    """What a copy of one shard takes of its host."""

    documents: int
    memory_bytes: int
    """Host memory of a copy that answers."""
    num_devices: int = 0
    """Devices that a copy that answers takes whole."""
    device_bytes: int = 0
    """What each of them must hold."""
    standby_bytes: int = 0
    """Host memory of a standby, which takes no device."""


class Copy(NamedTuple):
    """One process that holds a shard: a replica, which answers, or a standby, which waits."""

    shard: int
    replica: int
    """Numbers the replicas of the shard from 0, and so its standbys."""
    standby: bool = False

    def __str__(self) -> str:
        return f"shard {self.shard} {'standby' if self.standby else 'replica'} {self.replica}"


class Wanted(NamedTuple):
    """What shall be held."""

    needs: tuple[Need, ...]
    """``(S,)``."""
    replicas: int = 1
    standbys: int = 0
    spread: Spread = "host"
    labels: Mapping[str, str] = {}
    """Labels that a host must have to get copies."""

    def copies(self) -> list[Copy]:
        """Return every copy, shard by shard, replicas first."""
        return [
            Copy(shard, number, standby)
            for shard in range(len(self.needs))
            for standby, count in ((False, self.replicas), (True, self.standbys))
            for number in range(count)
        ]

    def need_of(self, copy: Copy) -> tuple[int, int]:
        """Return host memory and devices of a copy."""
        need = self.needs[copy.shard]
        return (need.standby_bytes, 0) if copy.standby else (need.memory_bytes, need.num_devices)


class Move(NamedTuple):
    """A copy that changes its place."""

    copy: Copy
    source: str
    """Empty where it is new."""
    target: str


class Placement(NamedTuple):
    """Where everything goes."""

    at: dict[Copy, str]
    """The host of every copy, in the order of ``Wanted.copies``."""
    moves: tuple[Move, ...]
    shared: tuple[str, ...]
    """In words, which copies share a host or a zone although they should not."""
    staying: tuple[Copy, ...]
    """Copies on retired hosts that have room nowhere else."""

    def on(self, host: str) -> list[Copy]:
        """Return the copies of one host in order."""
        return [copy for copy, name in self.at.items() if name == host]


def place(
    hosts: Iterable[Host],
    wanted: Wanted,
    present: Mapping[Copy, str] | None = None,
    *,
    even: bool = False,
) -> Placement:
    """Return a place for every copy.

    Of copies of equal needs an assignment is found whenever one exists, with the fewest pairs that
    share and the fewest moves; where needs differ, which is bin packing, whenever one is met within
    a bounded search, and a refusal says whether the search came to its end.

    Args:
        hosts: all of them, in any order.
        wanted: what shall be held.
        present: where copies are; those that are not wanted any more are left out.
        even: also move copies among the hosts that have some, as long as that evens the load.

    Raises:
        Refused: if there is no room, saying in numbers what is needed and what there is.
        ValueError: if two hosts have the same name.
    """
    ordered = sorted(hosts, key=lambda host: host.name)
    names = [host.name for host in ordered]
    for name, after in pairwise(names):
        if name == after:
            raise ValueError(f"hosts: names must differ, got {name} twice")
    copies = wanted.copies()
    number = {name: at for at, name in enumerate(names)}
    before = {
        copy: number[host]
        for copy, host in (present or {}).items()
        if host in number and ordered[number[host]].state != "down"
    }
    problem = _problem(ordered, wanted, copies, before)
    _check_each(ordered, wanted, copies, problem)
    found = search(problem)
    if (found.at == NOWHERE).any():
        raise Refused(_why(ordered, wanted, copies, problem, found))
    held = set(before.values())
    is_first = not any(copy in before for copy in copies)
    sources = np.array([host.state != "maintenance" for host in ordered], dtype=np.bool_)
    at = found.at
    # A host that gives all its copies to a new one is as empty as that was, and gets others.
    for _ in ordered:
        targets = [
            host.state == "up" and (even or is_first or one not in held)
            for one, host in enumerate(ordered)
        ]
        spread = spread_load(problem, at, sources, np.array(targets, dtype=np.bool_))
        if (spread == at).all():
            break
        at, held, is_first = spread, set(spread.tolist()), False
    placed = {copy: names[one] for copy, one in zip(copies, at.tolist(), strict=True)}
    origins = {copy: names[one] for copy, one in before.items()}
    states = {host.name: host.state for host in ordered}
    return Placement(
        at=placed,
        moves=tuple(
            Move(copy, origins.get(copy, ""), target)
            for copy, target in placed.items()
            if origins.get(copy, "") != target
        ),
        shared=_shared(placed, ordered, wanted.spread),
        staying=tuple(copy for copy, target in placed.items() if states[target] == "retired"),
    )


def _problem(
    hosts: Sequence[Host], wanted: Wanted, copies: Sequence[Copy], before: Mapping[Copy, int]
) -> Problem:
    """Return the numbers that a search works on."""
    home = np.array([before.get(copy, NOWHERE) for copy in copies], dtype=np.int64)
    devices = np.array([wanted.needs[copy.shard].device_bytes for copy in copies], dtype=np.int64)
    needs = np.array([wanted.need_of(copy) for copy in copies], dtype=np.int64).reshape(-1, 2)
    rooms = np.array([[one.memory_bytes, one.num_devices] for one in hosts], dtype=np.int64)
    rooms = rooms.reshape(-1, 2)
    of_device = np.array([one.device_bytes for one in hosts], dtype=np.int64)
    open_to_all = np.array(
        [one.state == "up" and wanted.labels.items() <= one.labels.items() for one in hosts],
        dtype=np.bool_,
    )
    large_enough = (needs[:, 1:] == 0) | (of_device[None, :] >= devices[:, None])
    fits_alone = (needs[:, None, :] <= rooms[None, :, :]).all(2) & large_enough
    here = np.zeros((len(copies), len(hosts)), dtype=np.bool_)
    has_home = np.flatnonzero(home != NOWHERE)
    here[has_home, home[has_home]] = True
    leaves = np.array([one.state == "retired" for one in hosts], dtype=np.bool_)
    usable = fits_alone & (open_to_all[None, :] | here)
    stays = (usable & here & ~leaves[None, :]).any(1)
    costs = ((home != NOWHERE)[:, None] & ~here).astype(np.int64)
    costs[:, leaves] = STAYS
    zones = {zone: at for at, zone in enumerate(dict.fromkeys(_zone(one) for one in hosts))}
    weights = [
        max(wanted.needs[copy.shard].documents * (1 if copy.standby else _STANDBY_SHARE), 1)
        for copy in copies
    ]
    takes_devices = any(need.num_devices for need in wanted.needs)
    strengths = [one.num_devices if takes_devices else one.cpus for one in hosts]
    return Problem(
        shards=np.array([copy.shard for copy in copies], dtype=np.int64),
        needs=needs,
        weights=np.array(weights, dtype=np.int64),
        rooms=rooms,
        strengths=np.maximum(np.array(strengths, dtype=np.float64), 1e-3),
        zones=np.array([zones[_zone(one)] for one in hosts], dtype=np.int64),
        zones_count=wanted.spread == "zone",
        usable=usable,
        costs=costs,
        at=np.where(stays, home, NOWHERE),
    )


def _zone(host: Host) -> str:
    return host.zone or f"host {host.name}"


def _check_each(
    hosts: Sequence[Host], wanted: Wanted, copies: Sequence[Copy], problem: Problem
) -> None:
    """Check that every copy has a host that could hold it alone.

    Raises:
        Refused: naming the copy, what it needs and what the hosts have.
    """
    for copy, usable in zip(copies, problem.usable, strict=True):
        if usable.any():
            continue
        ready = [host for host in hosts if host.state == "up"]
        if not ready:
            listed = ", ".join(f"{host.name} is {host.state}" for host in hosts[:_LISTED])
            raise Refused(f"{copy} has no host: {listed or 'there are none'}")
        fitting = [host for host in ready if wanted.labels.items() <= host.labels.items()]
        if not fitting:
            labels = ", ".join(f"{name}={value}" for name, value in wanted.labels.items())
            raise Refused(f"{copy} has no host: none of the {len(ready)} that are up is {labels}")
        need = wanted.needs[copy.shard]
        memory, devices = wanted.need_of(copy)
        if devices and not any(
            host.num_devices >= devices and host.device_bytes >= need.device_bytes
            for host in fitting
        ):
            best = max(fitting, key=lambda host: (host.device_bytes, host.num_devices))
            raise Refused(
                f"{copy} needs {devices} devices of {size(need.device_bytes)} each, and {best.name}"
                f" has {best.num_devices} of {size(best.device_bytes)}"
            )
        largest = max(fitting, key=lambda host: host.memory_bytes)
        raise Refused(
            f"{copy} needs {size(memory)} of host memory, and no host that is up has so much: "
            f"the largest, {largest.name}, has {size(largest.memory_bytes)}"
        )


def _why(
    hosts: Sequence[Host],
    wanted: Wanted,
    copies: Sequence[Copy],
    problem: Problem,
    found: Found,
) -> str:
    """Return in words why not all copies have room."""
    needed = problem.needs.sum(0)
    ready = np.flatnonzero(problem.usable.any(0))
    have = problem.rooms[ready].sum(0)
    counted = f"{len(wanted.needs)} shards x {wanted.replicas} replicas" + (
        f" and {wanted.standbys} standbys each" if wanted.standbys else ""
    )
    if needed[0] > have[0]:
        return (
            f"{counted} need {size(int(needed[0]))} of host memory, and the {len(ready)} hosts that"
            f" can take copies have {size(int(have[0]))}: {size(int(needed[0] - have[0]))} are "
            "missing"
        )
    if needed[1] > have[1]:
        return (
            f"{counted} need {needed[1]} devices, and the {len(ready)} hosts that can take copies "
            f"have {have[1]}: {needed[1] - have[1]} are missing"
        )
    left_out = np.flatnonzero(found.at == NOWHERE)
    copy = copies[int(left_out[0])]
    memory, devices = wanted.need_of(copy)
    free = problem.rooms.copy()
    for one in np.flatnonzero(found.at != NOWHERE).tolist():
        free[found.at[one]] -= problem.needs[one]
    order = sorted(ready.tolist(), key=lambda at: -int(free[at, 0]))
    rest = ", ".join(
        f"{hosts[at].name} {size(int(free[at, 0]))}"
        + (f" and {free[at, 1]} devices" if devices else "")
        for at in order[:_LISTED]
    )
    more = f" and less on {len(order) - _LISTED} more" if len(order) > _LISTED else ""
    others = f", and {len(left_out) - 1} more copies have none either" if len(left_out) > 1 else ""
    proven = "" if found.is_proven else "; a longer search might find room"
    return (
        f"{copy} needs {size(memory)}{f' and {devices} devices' if devices else ''}, and beside "
        f"the other copies these are left: {rest}{more}{others}{proven}"
    )


def _shared(at: Mapping[Copy, str], hosts: Sequence[Host], spread: Spread) -> tuple[str, ...]:
    """Return in words which copies of a shard share a host, or a zone where that counts."""
    places = {"host": {host.name: host.name for host in hosts}}
    if spread == "zone":
        places["zone"] = {host.name: _zone(host) for host in hosts}
    counts = Counter(
        (kind, copy.shard, place_of[name])
        for kind, place_of in places.items()
        for copy, name in at.items()
    )
    return tuple(
        f"{count} copies of shard {shard} share {kind} {where}"
        for (kind, shard, where), count in counts.items()
        if count > 1
    )


def size(num_bytes: int) -> str:
    """Return a size for people, in the unit that suits it."""
    for unit, shift in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if abs(num_bytes) >= 1 << shift:
            return f"{num_bytes / (1 << shift):,.1f} {unit}"
    return f"{num_bytes} bytes"

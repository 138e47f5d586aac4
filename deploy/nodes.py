"""What may be done to a host, and what follows: ``up``, ``maintenance``, ``retired``, ``down``.

Without I/O. A change that is not safe is refused in words with numbers; ``force`` makes it all the
same and says what is lost.

| state | its copies | new copies |
|---|---|---|
| up | answer | come |
| maintenance | stay, and are gone for a while when it is rebooted | do not come |
| retired | answer until they are moved | do not come |
| down | are gone for good | do not come |

Source: the node states of Vespa's cluster controller (``/cluster/v2``, "set node state").
"""

from collections.abc import Collection, Iterable, Mapping
from typing import NamedTuple

from silvershard.deploy.errors import CommandError, ExitCode, Refused
from silvershard.deploy.host_state import HOST_STATES, HostState
from silvershard.deploy.placement import Copy, Host, Placement, Wanted, place

_LISTED = 4


class NodeChange(NamedTuple):
    """A change of state, and what follows from it."""

    hosts: tuple[Host, ...]
    """All hosts, the one with its new state, by name."""
    before: HostState
    placement: Placement | None
    """Where everything goes then; None where not all of it has room, which only force allows."""
    warnings: tuple[str, ...]
    """In words, what speaks against it; without force only what is no reason to refuse it."""


def set_node_state(
    hosts: Iterable[Host],
    wanted: Wanted,
    present: Mapping[Copy, str],
    name: str,
    state: HostState,
    *,
    serving: Collection[Copy] | None = None,
    force: bool = False,
) -> NodeChange:
    """Return what follows if a host gets a state.

    It is safe to set a host to ``up``; to ``maintenance`` if every shard of it has a copy that
    answers on another host that stays; to ``retired`` if the others have room for what it holds; to
    ``down`` if both hold.

    Args:
        hosts: all of them, in their present states.
        wanted: what shall be held.
        present: where copies are.
        name: of the host.
        state: that it shall get.
        serving: copies that answer now; None: all of ``present`` on hosts that are not down.
        force: do it although it is not safe.

    Raises:
        Refused: if it is not safe, saying what would be lost or is missing.
        CommandError: if there is no such host or state.
    """
    listed = sorted(hosts, key=lambda host: host.name)
    found = {host.name: host for host in listed}
    if name not in found:
        known = ", ".join(found) or "none"
        raise CommandError(f"there is no host {name}; known are {known}", ExitCode.USAGE)
    if state not in HOST_STATES:
        raise CommandError(
            f"state of a host must be one of {', '.join(HOST_STATES)}, got {state!r}",
            ExitCode.USAGE,
        )
    before = found[name].state
    changed = tuple(one._replace(state=state) if one.name == name else one for one in listed)
    if serving is None:
        serving = present.keys()
    answering = {
        copy
        for copy in serving
        if not copy.standby and present.get(copy) in found and found[present[copy]].state != "down"
    }
    problems: list[str] = []
    if state in ("maintenance", "down"):
        problems += _last_copies(found, present, answering, name)
    placement: Placement | None = None
    try:
        placement = place(changed, wanted, present)
    except Refused as error:
        problems.append(str(error))
    if placement is not None and state == "retired" and placement.staying:
        problems.append(_no_room_elsewhere(changed, wanted, present, name, placement.staying))
    if problems and not force and state != "up" and state != before:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise Refused(f"host {name} cannot be set to {state}: {problems[0]}{more}")
    shared = placement.shared if placement is not None else ()
    return NodeChange(changed, before, placement, (*problems, *shared))


def _last_copies(
    hosts: Mapping[str, Host],
    present: Mapping[Copy, str],
    answering: Collection[Copy],
    name: str,
) -> list[str]:
    """Return in words which shards would have no copy that answers without a host."""
    lost = []
    for shard in sorted({copy.shard for copy in answering if present[copy] == name}):
        copies = [copy for copy in present if copy.shard == shard and not copy.standby]
        left = [
            copy
            for copy in copies
            if copy in answering
            and present[copy] != name
            and hosts[present[copy]].state in ("up", "retired")
        ]
        if left:
            continue
        others = [
            f"replica {copy.replica} on {present[copy]} {_trouble(hosts, present, answering, copy)}"
            for copy in sorted(copies)
            if present[copy] != name
        ]
        listed = "; ".join(others[:_LISTED]) or "there is no other"
        lost.append(
            f"shard {shard} would lose its last copy that answers, of {len(copies)}: {listed}"
        )
    return lost


def _trouble(
    hosts: Mapping[str, Host],
    present: Mapping[Copy, str],
    answering: Collection[Copy],
    copy: Copy,
) -> str:
    """Return why a copy does not count."""
    if copy not in answering:
        return "does not answer"
    return f"is in {hosts[present[copy]].state}"


def _no_room_elsewhere(
    hosts: Iterable[Host],
    wanted: Wanted,
    present: Mapping[Copy, str],
    name: str,
    staying: Collection[Copy],
) -> str:
    """Return in words why some copies of a host have room nowhere else."""
    without = [one._replace(state="down") if one.name == name else one for one in hosts]
    try:
        place(without, wanted, present)
    except Refused as error:
        return str(error)
    listed = ", ".join(map(str, sorted(staying)[:_LISTED]))
    return f"{len(staying)} copies have no room elsewhere: {listed}"

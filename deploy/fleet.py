"""The hosts of a running cluster and what they hold, and changes of their states."""

import socket
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple, Protocol

from silvershard.deploy.carry_out import Report
from silvershard.deploy.cluster_size import ClusterSize
from silvershard.deploy.config import Config
from silvershard.deploy.control_store import Control, ControlStore
from silvershard.deploy.errors import Refused
from silvershard.deploy.host_state import HostState
from silvershard.deploy.memory_plan import free_memory, held_by
from silvershard.deploy.nodes import set_node_state
from silvershard.deploy.placement import Copy, Host, Need, Wanted
from silvershard.deploy.scale_plan import ScalePlan, plan_scale
from silvershard.deploy.state import ClusterRecord, StateDir
from silvershard.deploy.tables import table
from silvershard.shard.outline import Outline


class Holding(NamedTuple):
    """What is where."""

    hosts: tuple[Host, ...]
    wanted: Wanted
    present: Mapping[Copy, str]
    """The host of every copy."""
    serving: Collection[Copy]
    """Copies that answer now."""


class Fleet(Protocol):
    """The hosts of a cluster."""

    def holding(self) -> Holding:
        """Return what is where now."""
        ...

    def set_state(self, name: str, state: HostState) -> None:
        """Write down the state of a host; what follows from it is done by the driver."""
        ...

    def await_empty(self, name: str, *, timeout_s: float | None, report: Report) -> None:
        """Wait until a host that hands over what it holds has no process of a shard any more.

        Args:
            name: of the host.
            timeout_s: longest wait; None: as long as a swap may take.
            report: hears how far it is, a line at a time.

        Raises:
            CommandError: if a copy cannot be moved.
            TimedOut: if it is not done in time; it goes on.
        """
        ...

    def settings(self, config: Config) -> Config:
        """Return the settings that the cluster was started with, given those of a command."""
        ...

    def plan_scale(
        self,
        config: Config,
        before: ClusterSize,
        after: ClusterSize,
        outlines: Mapping[int, Outline],
    ) -> ScalePlan:
        """Return what happens when the cluster is scaled.

        Args:
            config: its settings.
            before: how large it is.
            after: how large it shall be.
            outlines: the generations that its processes hold.
        """
        ...


class OneMachine:
    """The fleet of a cluster that runs on this machine only."""

    def __init__(self, state: StateDir, record: ClusterRecord) -> None:
        """Use the record of a running cluster and the control store of its state directory."""
        self._store = state.control
        self._record = record

    def holding(self) -> Holding:
        """Return what the processes of this machine are."""
        name = socket.gethostname()
        shards = self._record.shards
        documents = {one.shard: one.documents for one in shards}
        # They run here already, so room is no question.
        needs = tuple(Need(documents[one], 0) for one in sorted(documents))
        replicas = max((one.replica for one in shards), default=0) + 1
        present = {Copy(one.shard, one.replica): name for one in shards}
        serving = {Copy(one.shard, one.replica) for one in shards if one.state == "serving"}
        host = Host(name, state=self._store.read().host_states.get(name, "up"))
        return Holding((host,), Wanted(needs, replicas), present, serving)

    def set_state(self, name: str, state: HostState) -> None:
        """Write the state into the control store."""
        write_state(self._store, name, state)

    def await_empty(self, name: str, *, timeout_s: float | None, report: Report) -> None:
        """Do nothing: there is no other host."""

    def settings(self, config: Config) -> Config:
        """Return those of the command."""
        return config

    def plan_scale(
        self,
        config: Config,
        before: ClusterSize,
        after: ClusterSize,
        outlines: Mapping[int, Outline],
    ) -> ScalePlan:
        """Plan with the memory that this machine has left."""
        return plan_scale(
            config,
            before,
            after,
            outlines,
            held_bytes=held_by(one.pid for one in self._record.shards if one.pid),
            free_bytes=free_memory(),
        )


def write_state(store: ControlStore, name: str, state: HostState, listed: HostState = "up") -> None:
    """Write the state of a host into a control store.

    Args:
        store: where it is written.
        name: of the host.
        state: that it shall have.
        listed: that it has as long as nothing is written.

    Raises:
        StateError: if it cannot be written.
    """

    def make(now: Control) -> Control:
        others = {one: was for one, was in now.host_states.items() if one != name}
        states = others if state == listed else {**others, name: state}
        return now.model_copy(update={"host_states": states})

    store.change(make)


def change_state(
    fleet: Fleet, name: str, state: HostState, *, force: bool = False, dry_run: bool = False
) -> dict[str, Any]:
    """Give a host a state, if that is safe; return what follows.

    Args:
        fleet: all hosts.
        name: of the host.
        state: that it shall get.
        force: do it although it is not safe.
        dry_run: say what would follow, and change nothing.

    Raises:
        Refused: if it is not safe, saying what would be lost or is missing.
        CommandError: if there is no such host or state.
    """
    holding = fleet.holding()
    change = set_node_state(
        holding.hosts,
        holding.wanted,
        holding.present,
        name,
        state,
        serving=holding.serving,
        force=force,
    )
    moves = change.placement.moves if change.placement is not None else ()
    if not dry_run:
        fleet.set_state(name, state)
    return {
        "host": name,
        "before": change.before,
        "state": state,
        "moves": [f"{one.copy} from {one.source} to {one.target}" for one in moves],
        "warnings": list(change.warnings),
        "done": not dry_run,
    }


def listing(fleet: Fleet) -> dict[str, Any]:
    """Return every host with its state and how many copies it holds."""
    holding = fleet.holding()
    return {
        "hosts": [
            {
                "host": host.name,
                "state": host.state,
                "copies": sum(at == host.name for at in holding.present.values()),
                "serving": sum(holding.present[one] == host.name for one in holding.serving),
            }
            for host in holding.hosts
        ]
    }


def check_new_copies(fleet: Fleet) -> None:
    """Return if some host takes new copies.

    Raises:
        Refused: if none does.
    """
    states = [f"{host.name} is in {host.state}" for host in fleet.holding().hosts]
    if not any(host.state == "up" for host in fleet.holding().hosts):
        raise Refused(f"no host takes new copies: {', '.join(states)}; `silvershard undrain` it")


def render_change(document: Mapping[str, Any]) -> str:
    """Return what became of a host for people."""
    verb = "is" if document["done"] else "would be"
    lines = [f"host {document['host']} {verb} {document['state']}, it was {document['before']}"]
    lines += [f"  moves: {one}" for one in document["moves"]]
    lines += [f"  lost: {one}" for one in document["warnings"]]
    return "\n".join(lines)


def render_listing(document: Mapping[str, Any]) -> str:
    """Return the hosts for people."""
    headers = ("host", "state", "copies", "serving")
    rows = [tuple(one[name] for name in headers) for one in document["hosts"]]
    return table(headers, rows)

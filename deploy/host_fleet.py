"""The hosts of a cluster of several, as commands see them."""

import time
from collections.abc import Mapping
from pathlib import Path

from silvershard.deploy.carry_out import Report
from silvershard.deploy.cluster_size import ClusterSize, in_force, sharding_of
from silvershard.deploy.cluster_store import ClusterStore, Launched
from silvershard.deploy.config import Config
from silvershard.deploy.errors import CommandError, Refused, TimedOut
from silvershard.deploy.fleet import Fleet, Holding, OneMachine, write_state
from silvershard.deploy.host_places import beside_in, first_layout, present_in
from silvershard.deploy.host_state import HostState
from silvershard.deploy.hosts_launch import launched_on
from silvershard.deploy.layout import Layout, Place, copy_of
from silvershard.deploy.placement import Copy, Host, Wanted
from silvershard.deploy.scale_plan import ScalePlan, changed
from silvershard.deploy.state import ClusterRecord, StateDir
from silvershard.shard.generations import generation_dir
from silvershard.shard.outline import Outline

_POLL_S = 0.05


def fleet_of(state: StateDir, record: ClusterRecord) -> Fleet:
    """Return the hosts of a running cluster.

    Args:
        state: the directory that it runs on.
        record: what runs.

    Raises:
        StateError: if the control store cannot be read.
    """
    found = launched_on(state) if record.ray else None
    return HostFleet(state, record, *found) if found is not None else OneMachine(state, record)


class HostFleet:
    """The fleet of a cluster of several hosts."""

    def __init__(
        self, state: StateDir, record: ClusterRecord, store: ClusterStore, launched: Launched
    ) -> None:
        """Read nothing yet.

        Args:
            state: the directory that it runs on.
            record: what runs.
            store: of the cluster.
            launched: what was started.
        """
        self._state = state
        self._record = record
        self._store = store
        self._launched = launched

    def settings(self, config: Config) -> Config:
        """Return what the cluster was started with."""
        return self._launched.config

    def set_state(self, name: str, state: HostState) -> None:
        """Write the state into the control store, which the supervisor reads."""
        write_state(self._state.control, name, state, self._launched.host(name).state)

    def await_empty(self, name: str, *, timeout_s: float | None, report: Report) -> None:
        """Wait until the supervisor has moved all, and what was relieved has ended."""
        limit_s = timeout_s or self._launched.config.swap.timeout_s
        give_up_s = time.monotonic() + limit_s
        store, said = self._state.control, ""
        known = {one.operation_id for one in store.read().operations if one.has_ended}
        while left := sum(one.host == name for one in self._layout.copies):
            moves = [one for one in store.read().operations if one.kind == "move"]
            last = moves[-1] if moves and moves[-1].operation_id not in known else None
            if last is not None and last.state == "failed":
                raise CommandError(
                    f"{left} shard processes are still on {name}: {last.reason}; it is tried again"
                )
            going = f"; {last.progress}" if last is not None and not last.has_ended else ""
            text = f"{left} shard processes are still on {name}{going}"
            if text != said:
                said = text
                report(text)
            if time.monotonic() > give_up_s:
                raise TimedOut(f"{text} after {limit_s:g} s: it goes on, see `silvershard status`")
            time.sleep(_POLL_S)

    def holding(self) -> Holding:
        """Return what is where now."""
        from silvershard.deploy.host_plan import wanted_now

        sharding = in_force(self._launched.config, self._state.control.read().scaled).sharding
        present = present_in(self._layout, sharding)
        answering = {
            copy_of(Place(sharding.shards, one.shard, one.replica), sharding.replicas)
            for one in self._record.shards
            if one.state == "serving"
        }
        hosts, wanted = wanted_now(self._launched.config, self._snapshot, sharding, self._hosts)
        return Holding(hosts, wanted, present, answering & present.keys())

    def plan_scale(
        self,
        config: Config,
        before: ClusterSize,
        after: ClusterSize,
        outlines: Mapping[int, Outline],
    ) -> ScalePlan:
        """Plan with the room that the hosts were listed with."""
        from silvershard.deploy.host_plan import plan_beside, wanted_now

        layout, hosts, snapshot = self._layout, self._hosts, self._snapshot
        old, new = (sharding_of(config.sharding, size) for size in (before, after))
        room, wanted = wanted_now(config, snapshot, old, hosts)
        _, wanted_then = wanted_now(config, snapshot, new, hosts)
        held = _taken(wanted, present_in(layout, old))
        kept = present_in(layout, new)
        added = {copy: "" for copy in wanted_then.copies() if copy not in kept}
        starts, ends = changed(before, after)
        reason = ""
        if starts:
            try:
                plan_beside(
                    config,
                    snapshot,
                    new,
                    hosts,
                    kept,
                    beside_in(layout, new),
                    generations=len(outlines),
                )
            except Refused as error:
                reason = str(error)
        free = sum(one.memory_bytes for one in room if one.state == "up") - held
        return ScalePlan(
            before=before,
            after=after,
            starts=starts,
            ends=ends,
            held_bytes=held,
            new_bytes=_taken(wanted_then, added),
            free_bytes=max(free, 0),
            reason=reason,
        )

    @property
    def _layout(self) -> Layout:
        return self._store.read(Layout, "layout") or first_layout(self._launched)

    @property
    def _hosts(self) -> list[Host]:
        states = self._state.control.read().host_states
        listed = [one.listed() for one in self._launched.hosts]
        return [one._replace(state=states.get(one.name, one.state)) for one in listed]

    @property
    def _snapshot(self) -> Path:
        return generation_dir(self._state.generations, self._record.generation)


def _taken(wanted: Wanted, copies: Mapping[Copy, str]) -> int:
    """Return the host memory that some copies take."""
    return sum(wanted.need_of(one)[0] for one in copies)

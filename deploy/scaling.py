"""What the driver does when a cluster is scaled: processes come, are checked, take over, and go.

Other numbers of copies come from the same cut of the catalogue. Another number of shards is a new
set of processes beside the old one, from snapshot and log; when all of it is prepared, level with
the old one and gives the same answers, one change of the control store and of the map lets it take
over. Until then everything is as it was, and whatever goes wrong ends the new set only.

Nothing here waits, and time is read from one clock.

Shapes: S shards, R replicas.
"""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from silvershard.cluster.shard_map import ShardEntry, ShardMap
from silvershard.deploy.check_watch import Check, StartCheck
from silvershard.deploy.cluster_size import sharding_of
from silvershard.deploy.config import Config
from silvershard.deploy.config_sections import ShardingSection
from silvershard.deploy.control_store import Control, Operation
from silvershard.deploy.errors import Refused
from silvershard.deploy.generation_watch import GenerationWatch
from silvershard.deploy.places import HerePlaces, Places
from silvershard.deploy.readiness import Readiness, Reports, is_prepared
from silvershard.deploy.shard_host import Connect
from silvershard.deploy.shard_hosts import ShardHosts
from silvershard.deploy.shard_set import ShardSet, StartShard, WatchShard
from silvershard.deploy.state import StateDir
from silvershard.shard.errors import RetrievalError

MEET_S = 3.0
"""Time in which routers take a map with another number of shards, once it is written."""

DrawMap = Callable[[tuple[ShardEntry, ...], int], ShardMap]
"""Returns a map of these processes, which serve one of so many shards each."""


@dataclass
class _Going:
    """What is being done."""

    operation: Operation
    coming: ShardSet
    """The new processes, among others where the number of shards stays."""
    added: range
    """The numbers of the new copies."""
    hosts: ShardHosts | None
    """The ways to a new set; None: the number of shards stays."""
    give_up_s: float
    readiness: Readiness = field(default_factory=Readiness)
    check: Check | None = None


class _Leaving(NamedTuple):
    """Processes that no map names any more."""

    processes: ShardSet
    replicas: range
    end_s: float
    """When nobody can be waiting for an answer of them."""


class Scaling:
    """Holds the shard processes of a cluster, and changes how many there are."""

    def __init__(
        self,
        state: StateDir,
        config: Config,
        generations: GenerationWatch,
        start: StartShard,
        *,
        connect: Connect,
        draw_map: DrawMap,
        start_check: StartCheck,
        watch: WatchShard | None = None,
        places: Places | None = None,
        maps: StateDir | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Start nothing yet.

        Args:
            state: of the cluster.
            config: settings that it starts with.
            generations: what its processes hold.
            start: starts a shard process.
            connect: opens the way to one.
            draw_map: makes the map by which a new set is checked.
            start_check: compares the answers by two maps.
            watch: watches a shard process; None: on this machine.
            places: where processes go; None: to this machine.
            maps: where the map that routers follow is; None: where ``state`` has it.
            clock: for limits and drains.
        """
        self.current = ShardSet(config.sharding, start, config.runtime, watch=watch)
        """The processes that serve."""
        self._config = config
        self._generations = generations
        self._start = start
        self._connect = connect
        self._draw_map = draw_map
        self._start_check = start_check
        self._watch = watch
        self._places = places or HerePlaces()
        self._maps = maps or state
        self._clock = clock
        self._store = state.control
        self._going: _Going | None = None
        self._leaving: _Leaving | None = None
        self._waiting = "", 0.0
        """The operation that has not begun, and since when."""
        self._said = ""

    def start(self) -> None:
        """Start all processes at once.

        Raises:
            Refused: if they have no room.
        """
        self._places.lay_out(self.current.sharding)
        self.current.start(range(self.current.sharding.copies))

    def poll(self) -> None:
        """Take the next step; ``generations`` has looked at ``current`` just before."""
        try:
            self._let_go()
            going = self._generations.control.current
            wanted = going if going is not None and going.scaled is not None else None
            if self._going is not None and (
                wanted is None or wanted.operation_id != self._going.operation.operation_id
            ):
                # Whoever called it off has said so in the store.
                self._undo(self._going)
            if wanted is None or not self._generations.is_steady:
                return
            if self._going is None:
                self._begin(wanted)
            else:
                self._advance(self._going)
        except RetrievalError as error:
            self._say(f"the control store cannot be used, all stays as it is: {error}")

    def _begin(self, operation: Operation) -> None:
        assert operation.scaled is not None
        now_s, timeout_s = self._clock(), self._config.swap.timeout_s
        if operation.operation_id != self._waiting[0]:
            self._waiting = operation.operation_id, now_s
        if self._leaving is not None:
            if now_s > self._waiting[1] + timeout_s:
                self._end(operation, f"the last processes have not left after {timeout_s:g} s")
            return
        sharding = sharding_of(self.current.sharding, operation.scaled.size)
        running = operation.model_copy(update={"state": "running", "progress": "starting"})
        if not self._write(running):
            return
        try:
            self._places.lay_out(sharding)
        except Refused as error:
            self._end(running, str(error))
            return
        if sharding.shards == self.current.sharding.shards:
            coming, hosts = self.current, None
            added = range(self.current.sharding.copies, sharding.copies)
        else:
            coming = ShardSet(sharding, self._start, self._config.runtime, watch=self._watch)
            hosts, added = ShardHosts(self._connect), range(sharding.copies)
        self._going = _Going(running, coming, added, hosts, now_s + timeout_s)
        coming.start(added[:1])

    def _advance(self, going: _Going) -> None:
        """Look at the new processes once, and let them take over when that is due."""
        if going.hosts is not None:
            going.coming.poll()
            going.hosts.follow(going.coming.watches)
            self._generations.guide(going.hosts)
        self._start_more(going)
        assert going.operation.scaled is not None
        size, generations = going.operation.scaled.size, self._generations
        reports = generations.reports if going.hosts is None else going.hosts.reports
        added = {key: held for key, held in reports.items() if key[1] in going.added}
        wanted = generations.wanted
        lost = [one for one in going.coming.of(going.added) if one.state == "failed"]
        broken = [
            f"shard {shard} replica {replica} cannot hold generation {one}: {held[one].reason}"
            for (shard, replica), held in sorted(added.items())
            for one in sorted(wanted & held.keys())
            if held[one].state == "failed"
        ]
        needed = [
            (shard, replica) for shard in range(size.shards) for replica in range(size.copies)
        ]
        prepared = sum(all(is_prepared(reports.get(key), one) for one in wanted) for key in needed)
        behind = self._behind(going, added)
        if lost:
            self._end(going.operation, f"{lost[0].name} could not start: {lost[0].reason}")
        elif broken:
            self._end(going.operation, broken[0])
        elif self._clock() > going.give_up_s:
            self._end(
                going.operation,
                f"{prepared} of {len(needed)} processes were prepared after "
                f"{self._config.swap.timeout_s:g} s, swap.timeout_s{behind and f'; {behind}'}",
            )
        elif prepared == len(needed) and not behind:
            self._finish(going)
        else:
            doing = "; catches up" if behind else ""
            self._report(going, f"prepared {prepared} of {len(needed)}{doing}")

    def _start_more(self, going: _Going) -> None:
        """Start a copy more of every shard when the last ones have loaded.

        To load takes processors from those that serve: all of them at once took as much as there
        was, and requests ran out of time.
        """
        coming = going.coming.of(going.added)
        left = [one for one in going.added if one not in {it.replica for it in coming}]
        if left and all(one.entry is not None for one in coming):
            going.coming.start(left[:1])
            going.give_up_s = self._clock() + self._config.swap.timeout_s

    def _behind(self, going: _Going, added: Reports) -> str:
        """Return in words which new process has not applied what the old ones have."""
        live = self._generations.live
        before = [
            held[live]
            for key, held in self._generations.reports.items()
            if live in held and (going.hosts is not None or key[1] not in going.added)
        ]
        new = {key: held[live] for key, held in added.items() if live in held}
        return going.readiness.observe_new(new, before, self._clock())

    def _finish(self, going: _Going) -> None:
        """Let new processes take over; a new set only if it answers as the old one does."""
        if going.hosts is not None:
            if going.check is None:
                going.check = self._start_checking(going, going.hosts)
                self._report(going, "answers are compared")
            found = going.check.poll()
            if found:
                self._end(going.operation, f"the new set answers otherwise: {found}")
            if found != "":
                return
        self._commit(going)

    def _start_checking(self, going: _Going, hosts: ShardHosts) -> Check:
        num_shards, replicas = going.coming.sharding.shards, going.coming.sharding.replicas
        named = {key for key in hosts.entries if key[1] < replicas}
        entries = self._generations.entries_of(hosts, named, num_shards)
        path = self._maps.coming_map_file
        self._draw_map(entries, num_shards).write_atomic(path)
        return self._start_check(self._maps.shard_map_file, path)

    def _commit(self, going: _Going) -> None:
        """Let the new processes take over, unless that was called off meanwhile."""
        operation = going.operation

        def make(now: Control) -> Control:
            done = now.replaced(operation.ended("done"))
            if done is now:
                return now
            return done.model_copy(update={"scaled": operation.scaled})

        done = self._store.change(make).operation(operation.operation_id)
        if done is None or done.state != "done":
            return
        assert operation.scaled is not None
        if going.hosts is None:
            self.resize(sharding_of(self.current.sharding, operation.scaled.size))
        else:
            copies = range(self.current.sharding.copies)
            self._leaving = _Leaving(self.current, copies, self._clock() + self.drain_s)
            self.current = going.coming
            self._generations.take_over(going.hosts, going.coming.sharding)
        self._forget(going)

    @property
    def is_idle(self) -> bool:
        """Return whether no process is on its way in or out."""
        return self._going is None and self._leaving is None

    @property
    def drain_s(self) -> float:
        """Return for how long somebody may be waiting for processes that the map names no more."""
        longest_s = self._config.query.deadline_max_ms / 1e3
        return max(self._config.swap.drain_ms / 1e3, longest_s + MEET_S)

    def resize(self, sharding: ShardingSection) -> None:
        """Have another number of copies of the same shards; those that leave end after a drain.

        Raises:
            Refused: if those that come have no room; nothing is changed then.
        """
        self._places.lay_out(sharding)
        before, now = self.current.sharding.copies, sharding.copies
        there = {one.replica for one in self.current.watches}
        self.current.start([one for one in range(before, now) if one not in there])
        if now < before:
            self._leaving = _Leaving(self.current, range(now, before), self._clock() + self.drain_s)
        self.current.sharding = sharding
        self._generations.resize(sharding)

    def _let_go(self) -> None:
        """End the processes that have left, once nobody can be waiting for them."""
        if self._leaving is not None and self._clock() >= self._leaving.end_s:
            leaving, self._leaving = self._leaving, None
            leaving.processes.end(leaving.replicas)

    def _undo(self, going: _Going) -> None:
        """End what had been started."""
        self._forget(going)
        if going.hosts is not None:
            going.hosts.close()
        going.coming.end(going.added)

    def _forget(self, going: _Going) -> None:
        self._going = None
        if going.check is not None:
            going.check.end()
        self._maps.coming_map_file.unlink(missing_ok=True)

    def _end(self, operation: Operation, reason: str) -> None:
        """End an operation that cannot be done."""
        self._write(operation.ended("failed", reason))
        if self._going is not None:
            self._undo(self._going)

    def _report(self, going: _Going, progress: str) -> None:
        if going.operation.progress != progress:
            going.operation = going.operation.model_copy(update={"progress": progress})
            self._write(going.operation)

    def _write(self, operation: Operation) -> bool:
        """Write how far an operation is; return False if it has been called off."""
        now = self._store.change(lambda now: now.replaced(operation))
        return now.operation(operation.operation_id) == operation

    def close(self) -> None:
        """End all processes."""
        try:
            if self._going is not None:
                self._undo(self._going)
        finally:
            try:
                if self._leaving is not None:
                    self._leaving.processes.end(self._leaving.replicas)
            finally:
                self._leaving = None
                self.current.end()

    def _say(self, text: str) -> None:
        if text != self._said:
            self._said = text
            print(json.dumps({"event": "scaling", "message": text}), file=sys.stderr)

"""Which generations the shard processes hold, and which one is live: what the store says, made so.

A swap loads a generation in every process, waits until all of them have it prepared, and then makes
one change of the control store, which the map follows. Until that change everything is as it was;
whoever ends before has changed nothing. Nothing here waits, and time is read from one clock.

Shapes: R replicas.
"""

import json
import sys
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

from silvershard.cluster.shard_map import ShardEntry
from silvershard.deploy import readiness
from silvershard.deploy.config import Config
from silvershard.deploy.config_sections import ShardingSection
from silvershard.deploy.control_store import CANARY, LIVE, WARM, Control, Operation
from silvershard.deploy.memory_plan import MemoryPlan, free_memory, plan_swap
from silvershard.deploy.outlines import Outlines
from silvershard.deploy.readiness import Lacking, Readiness
from silvershard.deploy.roster import Key, Roster
from silvershard.deploy.shard_host import Connect, Held, ShardHost
from silvershard.deploy.shard_hosts import ShardHosts, reconcile
from silvershard.deploy.shard_watch import ShardWatch
from silvershard.deploy.state import GenerationRecord, StateDir
from silvershard.deploy.swap import Swap
from silvershard.shard.errors import RetrievalError, SnapshotError
from silvershard.shard.outline import Outline

_MEET_S = 1.0
"""Time for routers to connect to processes before they depend on them."""


class GenerationWatch:
    """Makes the processes hold what they shall, and decides which of them are in service."""

    def __init__(
        self,
        state: StateDir,
        config: Config,
        generation: int,
        *,
        connect: Connect = ShardHost,
        free_bytes: Callable[[], int] = free_memory,
        lacking: Callable[[int], str] = lambda _: "",
        plan: Callable[[Outline | None, Outline], MemoryPlan] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Serve a generation, which the store names as the live one after ``started``.

        What an earlier cluster had begun and not ended is abandoned.

        Args:
            state: where generations and store are.
            config: settings.
            generation: what the processes load when they start.
            connect: opens the way to a shard process.
            free_bytes: returns the memory that the machine has left.
            lacking: returns in words which host a generation is not on yet; empty: it is on all.
            plan: returns how one comes in beside the live one; None: this machine decides.
            clock: for pauses and limits.
        """
        self._state = state
        self._config = config
        self._free_bytes = free_bytes
        self._lacking_host = lacking
        self._planned = plan
        self._clock = clock
        self._store = state.control
        self.hosts = ShardHosts(connect)
        self.roster = Roster(config.sharding.replicas)
        self._starting = generation
        """What is live as soon as the cluster has started; 0 from then on."""
        self._swap: Swap | None = None
        self._waiting = "", 0.0
        """The operation that has not begun, and since when."""
        self._readiness = Readiness()
        self._parked = False
        """Whether the previous generation stays in memory."""
        self._gave_way = ""
        """The operation for which it was given up."""
        self._leaving: dict[int, float] = {}
        """What was canary or live, and until when somebody can be waiting for an answer of it."""
        self._drained_s = 0.0
        """When nobody can be waiting for an answer of the previous generation any more."""
        self._is_late = range(0)
        """Replicas that change after the map did."""
        self._outlines = Outlines(state.generations)
        self._said = ""

        def begin(now: Control) -> Control:
            going = now.current
            if going is not None:
                reason = "the cluster ended before it was done"
                now = now.with_operation(going.ended("abandoned", reason))
            # What was warm is not any more. What is being started is, so that it is kept.
            return now.pointed(WARM, generation if generation != now.live else 0)

        self._control = self._store.change(begin).pointed(LIVE, generation)

    def started(self) -> None:
        """Make the generation the live one of the store: it is served now.

        Raises:
            StateError: if the store cannot be written.
        """
        generation = self._starting
        control = self._store.change(lambda now: now.pointed(LIVE, generation))
        self._starting = 0
        self._accept(control)

    @property
    def control(self) -> Control:
        """Return the document of the store as it was read last."""
        return self._control

    @property
    def is_steady(self) -> bool:
        """Return whether all processes hold the same, and nothing of that is about to change."""
        return not (self._starting or self._swap or self._is_late)

    @property
    def reports(self) -> dict[Key, Mapping[int, Held]]:
        """Return what every process said last that it holds."""
        return self.hosts.reports

    @property
    def live(self) -> int:
        """Return the generation that the map shall name."""
        return self._control.live

    @property
    def aliases(self) -> dict[str, int]:
        """Return the generations beside the live one that requests can name by an alias."""
        canary = self._control.canary
        return {CANARY: canary} if canary == self.live or canary in self.snapshots else {}

    @property
    def snapshots(self) -> dict[int, str]:
        """Return the directories of what is served beside the live generation."""
        beside = {self._control.canary, self._control.previous, *self._leaving} - {0, self.live}
        if self._swap is not None and self._swap.commit_s is not None:
            beside.add(self._swap.operation.generation)
        return {
            one: str(self.path(one)) for one in sorted(beside) if self._covers(self._named_for(one))
        }

    @property
    def wanted(self) -> set[int]:
        """Return the generations that some process shall hold."""
        copies = range(self._config.sharding.copies)
        return set().union(*(self._wanted(replica) for replica in copies))

    @property
    def kept(self) -> set[int]:
        """Return the generations that must stay on disk."""
        return self._control.kept

    @property
    def records(self) -> tuple[GenerationRecord, ...]:
        """Return every generation that a process holds, as status shows it."""
        return readiness.records_of(self.hosts.reports, self._control)

    def path(self, generation: int) -> Path:
        """Return the directory of a generation."""
        return self._outlines.path(generation)

    def poll(self, watches: Sequence[ShardWatch]) -> None:
        """Look at everything once and take the next step."""
        self.hosts.follow(watches)
        try:
            self._take(self._store.read())
            if self._swap is not None:
                self._advance(self._swap, watches)
            self._settle()
        except RetrievalError as error:
            self._say(f"the control store cannot be used, all stays as it is: {error}")
        for (_, replica), host in self.hosts.by_key.items():
            if host.held is not None:
                wanted = self._wanted(replica) - self._retried(host.held)
                reconcile(host, host.held, wanted, live=self.live, path=self.path)
        self.roster.fill(map(self._ready_for, sorted(self._offered)))

    @property
    def in_service(self) -> tuple[ShardEntry, ...]:
        """Return the entries of the processes that answer for the live generation.

        Those that are about to answer for the next one instead are named a moment before, so that
        routers are connected to them by then.
        """
        return self.entries_of(self.hosts, self.roster.named, self._config.sharding.shards)

    def entries_of(
        self, hosts: ShardHosts, named: Collection[Key], num_shards: int
    ) -> tuple[ShardEntry, ...]:
        """Return the entries of some processes, which serve one of so many shards each."""
        documents = partial(self._outlines.documents, self.live, num_shards=num_shards)
        return hosts.entries_of(named, documents)

    def guide(self, hosts: ShardHosts) -> None:
        """Let processes that no map names yet hold what all the others hold."""
        for host in hosts.by_key.values():
            if host.held is not None:
                reconcile(host, host.held, self.wanted, live=self.live, path=self.path)

    def resize(self, sharding: ShardingSection) -> None:
        """Name another number of copies of every shard from now on."""
        self._config = self._config.model_copy(update={"sharding": sharding})
        self.roster.resize(sharding.replicas)

    def take_over(self, hosts: ShardHosts, sharding: ShardingSection) -> None:
        """Name the processes of another cut of the catalogue from now on; they hold all wanted."""
        self.hosts.close()
        self.hosts = hosts
        self.roster = Roster(sharding.replicas)
        self._config = self._config.model_copy(update={"sharding": sharding})
        self.roster.fill(map(self._ready_for, sorted(self._offered)))

    def close(self) -> None:
        """Leave the processes alone."""
        self.hosts.close()

    def _take(self, control: Control) -> None:
        self._accept(control)
        going = self._control.current
        if going is None or self._swap is not None or self._starting:
            return
        if going.kind not in ("activate", "rollback"):
            # That is done by others.
            return
        if going.operation_id != self._waiting[0]:
            self._waiting = going.operation_id, self._clock()
        self._begin(going)

    def _accept(self, control: Control) -> None:
        """Take the document as it is now, and follow what changed."""
        before, now_s = self._control, self._clock()
        if self._starting:
            control = control.pointed(LIVE, self._starting)
        self._control = control
        if control.live != before.live:
            is_wave = self._swap is not None and self._swap.mode == "wave"
            late = range(len(self._first_wave), self._config.sharding.copies)
            self._parked = self._config.swap.keep_previous and not is_wave
            self._gave_way = ""
            if before.previous and now_s < self._drained_s:
                self._leaving[before.previous] = self._drained_s
            self._is_late = late if is_wave else range(0)
            self._drained_s = now_s + self._drain_s(is_wave=is_wave)
        if before.canary not in (0, control.canary):
            self._leaving[before.canary] = now_s + self._drain_s(is_wave=False)
        going, swap = control.current, self._swap
        if swap is not None and (
            going is None or going.operation_id != swap.operation.operation_id
        ):
            self._swap = None

    def _begin(self, operation: Operation) -> None:
        """Start a swap, refuse it, or leave it waiting until the way is free."""
        if operation.generation == 0:
            self._commit(operation)
            return
        obstacle = self._lacking_host(operation.generation) or self._obstacle(operation)
        if obstacle:
            self._leave_waiting(operation, obstacle)
            return
        try:
            found = self._outlines.outline(operation.generation).content_hash
            if operation.content_hash and operation.content_hash != found:
                self._end(operation, "it is not the content that was checked any more")
                return
            plan = self._plan(operation.generation)
        except SnapshotError as error:
            self._end(operation, str(error))
            return
        if plan.mode == "refused" or (plan.mode == "wave" and operation.alias != LIVE):
            self._end(operation, plan.reason)
            return
        others = (key for key in self._ready_for(self.live) if key[1] not in self._first_wave)
        if plan.mode == "wave" and not self._covers(others):
            self._leave_waiting(operation, "no part of the replicas can be spared")
            return
        now_s = self._clock()
        # Requests that are in flight on processes which the map no longer names must end first.
        load_s = now_s + self._drain_s(is_wave=True) if plan.mode == "wave" else now_s
        running = operation.model_copy(update={"state": "running", "progress": "loading"})
        self._accept(self._store.change(lambda now: now.replaced(running)))
        self._swap = Swap(running, plan.mode, now_s + self._config.swap.timeout_s, load_s)
        self._readiness = Readiness()

    def _leave_waiting(self, operation: Operation, obstacle: str) -> None:
        """End an operation that could not begin in time."""
        timeout_s = self._config.swap.timeout_s
        if self._clock() > self._waiting[1] + timeout_s:
            self._end(operation, f"{obstacle} after {timeout_s:g} s, swap.timeout_s")

    def _obstacle(self, operation: Operation) -> str:
        """Return in words what is in the way, empty if nothing is; it is on its way out then."""
        generation, control = operation.generation, self._control
        held = self.hosts.reports.values()
        if any(generation in one and one[generation].state == "failed" for one in held):
            # The last try is let go of first, so that it is not taken for this one.
            return f"generation {generation} failed earlier and is still held"
        if self._is_late:
            return f"not every replica has changed to generation {control.live}"
        if held and all(generation in one for one in held):
            return ""
        # At most two generations are held beside a canary.
        if self._parked or self._gave_way:
            self._parked, self._gave_way = False, operation.operation_id
        others = set().union(*held) - {control.live, control.canary, control.warm, generation}
        return f"generation {min(others)} is still held" if others else ""

    def _plan(self, generation: int) -> MemoryPlan:
        """Return how to bring a generation in; the processes that hold it need no room for it."""
        live, new = self._outlines.outline(self.live), self._outlines.outline(generation)
        holding = [generation in one for one in self.hosts.reports.values()]
        if self._planned is not None:
            return self._planned(None if all(holding) else live, new)
        return plan_swap(
            self._config,
            live,
            new,
            holding,
            (entry.pid for entry in self.hosts.entries.values()),
            free_bytes=self._free_bytes(),
        )

    def _settle(self) -> None:
        """Notice what is over: drains, the second half of a wave, what a failed swap displaced."""
        now_s = self._clock()
        self._leaving = {one: end_s for one, end_s in self._leaving.items() if now_s < end_s}
        late = [held for key, held in self.hosts.reports.items() if key[1] in self._is_late]
        states = {held[self.live].state if self.live in held else "" for held in late}
        if now_s >= self._drained_s and states <= {"prepared", "failed"}:
            self._is_late = range(0)
        if self._gave_way and self._control.current is None:
            self._take_back()

    def _take_back(self) -> None:
        """Load the previous generation again, if it made room for what was not done."""
        control = self._control
        previous, ended = control.previous, control.operation(self._gave_way)
        held = set().union(*self.hosts.reports.values())
        is_lost = ended is None or ended.state == "done" or not self.path(previous).is_dir()
        if not is_lost and held - {control.live, control.canary, control.warm, previous}:
            # What failed is let go of first.
            return
        self._gave_way = ""
        self._parked = not is_lost and self._plan(previous).mode == "beside"

    def _advance(self, swap: Swap, watches: Sequence[ShardWatch]) -> None:
        """Commit a swap when every process that counts has the generation prepared and level."""
        generation = swap.operation.generation
        is_wave = swap.mode == "wave" and self.live != generation
        counted = [
            one
            for one in watches
            if one.state != "failed" and (not is_wave or one.replica in self._first_wave)
        ]
        reports = self.hosts.reports
        held = [reports.get((one.shard, one.replica), {}).get(generation) for one in counted]
        broken = [one.reason for one in held if one is not None and one.state == "failed"]
        prepared = sum(one is not None and one.state == "prepared" for one in held)
        shards = {one.shard for one in counted}
        is_whole = prepared == len(counted) and shards == set(range(self._config.sharding.shards))
        lacking, behind = self._lacking(swap.operation) if is_whole else (readiness.NOTHING, "")
        if broken:
            self._end(swap.operation, f"a shard process cannot hold it: {broken[0]}")
        elif lacking.refused:
            self._end(swap.operation, f"{lacking.refused}; --allow-schema lets it through")
        elif is_whole and not behind:
            if is_wave and swap.commit_s is None:
                self._swap = swap._replace(commit_s=self._clock() + _MEET_S)
            elif swap.commit_s is None or self._clock() >= swap.commit_s:
                changes = {"progress": lacking.unknown or swap.operation.progress}
                self._commit(swap.operation.model_copy(update=changes))
        elif self._clock() > swap.give_up_s:
            self._end(
                swap.operation,
                f"{prepared} of {len(counted)} processes had it prepared after "
                f"{self._config.swap.timeout_s:g} s, swap.timeout_s{behind and f'; {behind}'}",
            )
        else:
            states = sorted({one.state for one in held if one is not None} - {"prepared"})
            doing = f"; {', '.join(states)}" if states else ""
            # Positions change all the time, and every change of the store is one of a file.
            doing = "; catches up with the live one" if behind else doing
            self._report(swap, f"prepared {prepared} of {len(counted)}{doing}")

    def _lacking(self, operation: Operation) -> tuple[Lacking, str]:
        """Return which updates the next live generation refused, and where it is behind."""
        coming = operation.generation
        if operation.alias != LIVE or coming == self.live:
            return readiness.NOTHING, ""
        behind = self._readiness.observe(self.hosts.reports, self.live, coming, self._clock())
        if operation.allow_refused or operation.kind == "rollback":
            return readiness.NOTHING, behind
        lacking = readiness.refusals(self.hosts.reports, self.live, coming)
        return lacking, behind or lacking.early

    def _report(self, swap: Swap, progress: str) -> None:
        if swap.operation.progress == progress:
            return
        running = swap.operation.model_copy(update={"progress": progress})
        self._accept(self._store.change(lambda now: now.replaced(running)))
        if self._swap is not None:
            self._swap = swap._replace(operation=running)

    def _commit(self, operation: Operation) -> None:
        """Make the one change that a swap is, unless it was cancelled meanwhile."""

        def make(now: Control) -> Control:
            done = now.replaced(operation.ended("done"))
            return now if done is now else done.pointed(operation.alias, operation.generation)

        self._accept(self._store.change(make))

    def _end(self, operation: Operation, reason: str) -> None:
        failed = operation.ended("failed", reason)
        self._accept(self._store.change(lambda now: now.replaced(failed)))

    def _drain_s(self, *, is_wave: bool) -> float:
        """Return how long requests may still be answered by what the map names no more."""
        longest_s = self._config.query.deadline_max_ms / 1e3
        return longest_s if is_wave else self._config.swap.drain_ms / 1e3

    def _out_of_service(self) -> range:
        """Return the replicas that a swap has taken out of service."""
        swap = self._swap
        is_out = swap is not None and swap.mode == "wave" and swap.commit_s is None
        return self._first_wave if is_out else range(0)

    @property
    def _offered(self) -> set[int]:
        """Return the generations that make a process one of the map."""
        swap = self._swap
        coming = {swap.operation.generation} if swap is not None and swap.commit_s else set()
        return {self.live} | coming

    @property
    def _first_wave(self) -> range:
        """Return the replicas that change before the map does; the others change after it."""
        return range(max(self._config.sharding.copies // 2, 1))

    def _wanted(self, replica: int) -> set[int]:
        """Return the generations that a process shall hold."""
        control, swap = self._control, self._swap
        if swap is not None and swap.mode == "wave":
            if replica in self._first_wave and self._clock() >= swap.load_s:
                return {swap.operation.generation}
            return {control.live}
        if replica in self._is_late:
            is_drained = self._clock() >= self._drained_s
            return {control.live if is_drained else control.previous}
        wanted = {control.live, control.canary, control.warm, *self._leaving}
        if not self._is_late and (self._parked or self._clock() < self._drained_s):
            wanted.add(control.previous)
        if swap is not None:
            wanted.add(swap.operation.generation)
        return {one for one in wanted if one and self.path(one).is_dir()}

    def _retried(self, held: Mapping[int, Held]) -> set[int]:
        """Return what failed in a process and is to be tried again."""
        going = self._control.current
        if going is None or self._swap is not None or going.generation == self.live:
            return set()
        tried = held.get(going.generation)
        return {going.generation} if tried is not None and tried.state == "failed" else set()

    def _ready_for(self, generation: int) -> list[Key]:
        """Return the processes that the map may name for a generation."""
        out, copies = self._out_of_service(), self._config.sharding.copies
        prepared = self.hosts.prepared(generation)
        return [key for key in prepared if key[1] not in out and key[1] < copies]

    def is_standby(self, key: Key) -> bool:
        """Return whether a process could be asked for the live generation and is not."""
        return key not in self.roster.named and key in self._ready_for(self.live)

    def _named_for(self, generation: int) -> Iterable[Key]:
        """Return the processes that the map names and that could answer from a generation."""
        return self.roster.named.intersection(self.hosts.prepared(generation))

    def _covers(self, keys: Iterable[Key]) -> bool:
        """Return whether every shard is among those of some processes."""
        return len({shard for shard, _ in keys}) == self._config.sharding.shards

    def documents(self, shard: int) -> int:
        """Return the documents of a shard in the snapshot of the live generation."""
        return self._outlines.documents(self.live, shard, self._config.sharding.shards)

    def _say(self, text: str) -> None:
        if text != self._said:
            self._said = text
            print(json.dumps({"event": "generations", "message": text}), file=sys.stderr)

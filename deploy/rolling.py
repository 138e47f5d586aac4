"""What the driver does when the processes of a cluster are restarted, one after the other.

A process leaves the map while another copy of its shard serves, ends when nobody can be waiting for
it any more, and starts again; the next one follows when it is prepared and level with the others.
Where a shard has one copy only, a further one is started first, and ends when all is done. Routers
and sequencer are replaced at the end, each by a process that takes its place while it serves; on
several hosts their agents follow, and the driver of the cluster is the last one.

Nothing here waits, and time is read from one clock.
"""

import json
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from silvershard.cluster import wire
from silvershard.cluster.document import RELEASE
from silvershard.deploy.config import Config
from silvershard.deploy.control_store import Control, Operation
from silvershard.deploy.errors import Refused
from silvershard.deploy.generation_watch import GenerationWatch
from silvershard.deploy.readiness import Readiness, is_prepared
from silvershard.deploy.roster import Key
from silvershard.deploy.scaling import Scaling
from silvershard.deploy.site import Replaceable
from silvershard.deploy.state import StateDir
from silvershard.shard.errors import RetrievalError

_LEFT_S = 1.0
"""Time in which routers take a map that names a process no more."""


@dataclass
class _Going:
    """What is being done."""

    operation: Operation
    left: list[Key]
    """Processes that are still to be restarted, the next one first."""
    total: int
    extra: bool
    """Whether a further copy of every shard was started for this."""
    give_up_s: float
    """When the present step has taken too long."""
    readiness: Readiness = field(default_factory=Readiness)
    resting: Key | None = None
    """The process that the map does not name, or that starts."""
    end_s: float | None = None
    """When it may be ended; None: it has been."""
    replacing: str = ""
    """What is being replaced; empty: the processes of shards are not done."""
    fronts: list[str] = field(default_factory=list)
    """What is still to be replaced."""


class Rolling:
    """Restarts the shard processes of a cluster that goes on serving."""

    def __init__(
        self,
        state: StateDir,
        config: Config,
        generations: GenerationWatch,
        scaling: Scaling,
        fronts: Mapping[str, Replaceable],
        *,
        leave: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Restart nothing yet.

        Args:
            state: of the cluster.
            config: its settings.
            generations: what its processes hold.
            scaling: holds the processes.
            fronts: what else is replaced, by its name, in this order.
            leave: lets the next driver take over, where there can be one.
            clock: for limits and drains.
        """
        self._config = config
        self._generations = generations
        self._scaling = scaling
        self._fronts = fronts
        self._leave = leave
        self._shall_leave = False
        self._clock = clock
        self._store = state.control
        self._going: _Going | None = None
        self._said = ""

    def poll(self) -> None:
        """Take the next step; ``generations`` and ``scaling`` have taken theirs just before."""
        try:
            going = self._generations.control.current
            wanted = going if going is not None and going.kind == "restart" else None
            if self._going is not None and (
                wanted is None or wanted.operation_id != self._going.operation.operation_id
            ):
                # Whoever called it off has said so in the store.
                self._stop(self._going)
            elif self._going is not None:
                self._advance(self._going)
            elif wanted is not None and self._generations.is_steady and self._scaling.is_idle:
                self._begin(wanted)
            elif self._shall_leave and going is None and self._scaling.is_idle:
                self._shall_leave = False
                self._leave()
        except RetrievalError as error:
            self._say(f"the control store cannot be used, all stays as it is: {error}")

    def _begin(self, operation: Operation) -> None:
        current = self._scaling.current
        running = operation.model_copy(update={"state": "running", "progress": "starting"})
        now = self._store.change(lambda now: now.replaced(running))
        if now.operation(operation.operation_id) != running:
            return
        left = sorted((one.shard, one.replica) for one in current.watches)
        extra = current.sharding.copies == 1
        if extra:
            more = current.sharding.model_copy(update={"standby": 1})
            try:
                self._scaling.resize(more)
            except Refused as error:
                refused = running.ended("failed", f"a further copy has no room: {error}")
                self._store.change(lambda now: now.replaced(refused))
                return
        give_up_s = self._clock() + self._config.swap.timeout_s
        fronts = list(self._fronts)
        self._going = _Going(running, left, len(left), extra, give_up_s, fronts=fronts)

    def _advance(self, going: _Going) -> None:
        """Look at the process whose turn it is, and let it come to the next step."""
        now_s, resting = self._clock(), going.resting
        if strange := self._strange:
            self._end(going, strange)
        elif now_s > going.give_up_s:
            where = f"shard {resting[0]} replica {resting[1]}" if resting else "the next process"
            where = going.replacing or where
            limit_s = self._config.swap.timeout_s
            self._end(going, f"{where} not ready after {limit_s:g} s, swap.timeout_s")
        elif resting is None:
            self._rest_next(going)
        elif going.end_s is not None:
            if now_s >= going.end_s:
                self._scaling.current.restart(*resting)
                going.end_s = None
        elif failed := self._failure(resting):
            self._end(going, failed)
        elif self._is_back(going, resting):
            going.resting, going.left = None, going.left[1:]
            going.give_up_s = now_s + self._config.swap.timeout_s
            self._generations.roster.resting = frozenset()
            done = going.total - len(going.left)
            self._report(going, f"{done} of {going.total} processes are restarted")

    def _rest_next(self, going: _Going) -> None:
        """Take the next process out of the map, if another copy of its shard serves."""
        if not going.left:
            self._replace_fronts(going)
            return
        key = going.left[0]
        others = [one for one in self._ready if one[0] == key[0] and one != key]
        if not others:
            self._report(going, f"waits for another copy of shard {key[0]}")
            return
        going.resting = key
        longest_s = self._config.query.deadline_max_ms / 1e3
        going.end_s = self._clock() + longest_s + _LEFT_S
        going.readiness = Readiness()
        self._generations.roster.resting = frozenset({key})

    def _replace_fronts(self, going: _Going) -> None:
        """Let new processes take the places of routers and sequencer; then all is done."""
        front = self._fronts.get(going.replacing)
        if front is not None and front.is_replacing:
            return
        if front is not None and front.refused:
            self._end(going, f"{going.replacing}: {front.refused}")
        elif not going.fronts:
            self._commit(going)
        else:
            self._fronts[going.fronts[0]].replace()
            going.replacing = going.fronts.pop(0)
            going.give_up_s = self._clock() + self._config.swap.timeout_s
            self._report(going, f"{going.total} processes are restarted, now {going.replacing}")

    @property
    def _ready(self) -> list[Key]:
        """Return the processes that could be asked for every generation."""
        wanted = self._generations.wanted
        return [
            key
            for key, held in self._generations.reports.items()
            if all(is_prepared(held, one) for one in wanted)
        ]

    @property
    def _strange(self) -> str:
        """Return in words which process no router of this release asks; empty if there is none."""
        for one in self._scaling.current.watches:
            if one.entry is not None and one.entry.wire not in (0, wire.VERSION):
                return (
                    f"{one.name} runs release {one.entry.release}, and routers of {RELEASE} do not "
                    f"speak its wire version {one.entry.wire}, but {wire.VERSION}: install "
                    f"{RELEASE} again, or end the cluster and start it with the other release"
                )
        return ""

    def _failure(self, key: Key) -> str:
        """Return in words why a process will not come back, empty if it may."""
        for one in self._scaling.current.watches:
            if (one.shard, one.replica) == key and one.state == "failed":
                return f"{one.name} could not start again: {one.reason}"
        return ""

    def _is_back(self, going: _Going, key: Key) -> bool:
        """Return whether a process is prepared and level with the others."""
        live, reports = self._generations.live, self._generations.reports
        if key not in self._ready:
            return False
        before = [held[live] for one, held in reports.items() if one != key and live in held]
        return not going.readiness.observe_new({key: reports[key][live]}, before, self._clock())

    def _commit(self, going: _Going) -> None:
        def make(now: Control) -> Control:
            return now.replaced(going.operation.ended("done"))

        self._store.change(make)
        self._stop(going)
        self._shall_leave = True

    def _end(self, going: _Going, reason: str) -> None:
        """End an operation that cannot be done."""
        failed = going.operation.ended("failed", reason)
        self._store.change(lambda now: now.replaced(failed))
        self._stop(going)

    def _stop(self, going: _Going) -> None:
        """Let every process be asked again, and the further copies go."""
        self._generations.roster.resting = frozenset()
        self._going = None
        if going.extra:
            fewer = self._scaling.current.sharding.model_copy(update={"standby": 0})
            self._scaling.resize(fewer)

    def _report(self, going: _Going, progress: str) -> None:
        if going.operation.progress != progress:
            going.operation = going.operation.model_copy(update={"progress": progress})
            running = going.operation
            self._store.change(lambda now: now.replaced(running))

    def _say(self, text: str) -> None:
        if text != self._said:
            self._said = text
            print(json.dumps({"event": "restart", "message": text}), file=sys.stderr)

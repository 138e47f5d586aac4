"""What the driver does when copies shall be on other hosts: they come, take over, and go.

A copy gets a second process where it shall be. When that one is prepared and level with the others,
one map names it instead of the first, which ends when nobody can be waiting for it any more. Until
then everything is as it was, and whatever goes wrong ends the second one only.

Nothing here waits, and time is read from one clock.
"""

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from silvershard.cluster.shard_map import ShardEntry
from silvershard.deploy.config import Config
from silvershard.deploy.control_store import Control, Operation, wanted
from silvershard.deploy.generation_watch import GenerationWatch
from silvershard.deploy.layout import number_of
from silvershard.deploy.placement import Move
from silvershard.deploy.places import Places
from silvershard.deploy.readiness import Readiness, is_prepared
from silvershard.deploy.scaling import Scaling
from silvershard.deploy.shard_host import Connect
from silvershard.deploy.shard_hosts import ShardHosts
from silvershard.deploy.shard_set import ShardSet, StartShard, WatchShard
from silvershard.deploy.shard_watch import ShardHandle, ShardWatch
from silvershard.deploy.state import StateDir
from silvershard.shard.errors import RetrievalError

AGAIN_S = 30.0
"""Time between a move that could not be done and the next try."""


@dataclass
class _Going:
    """What is being done."""

    operation: Operation
    coming: ShardSet
    hosts: ShardHosts
    give_up_s: float
    readiness: Readiness = field(default_factory=Readiness)


@dataclass
class _Leaving:
    """Processes that were relieved."""

    watches: list[ShardWatch]
    end_s: float


class Relief:
    """An actor that takes the place of another one while that still answers what it was asked."""

    def __init__(self, handle: ShardHandle, epoch: int) -> None:
        """Relieve the incarnation of an epoch; 0: there is none that answers."""
        self._handle = handle
        self._epoch = epoch

    def restarts(self) -> int:
        """Return how often it was started again."""
        return self._handle.restarts()

    def entry(self) -> ShardEntry | None:
        """Return where it serves, None while it loads."""
        found = self._handle.entry()
        return found.model_copy(update={"relieves": self._epoch}) if found is not None else None

    def ask_again(self) -> None:
        """Forget what it said."""
        self._handle.ask_again()

    def end(self) -> None:
        """End it for good."""
        self._handle.end()


def next_batch(moves: Sequence[Move]) -> list[Move]:
    """Return the moves that have room at once: to hosts that hand nothing over; else the first.

    Where everything is when all is done has room for it, so a host that only receives has, too.
    """
    sources = {one.source for one in moves}
    return [one for one in moves if one.target not in sources] or list(moves[:1])


class Moving:
    """Brings copies to the hosts where they shall be, in a cluster that goes on serving."""

    def __init__(
        self,
        state: StateDir,
        config: Config,
        generations: GenerationWatch,
        scaling: Scaling,
        start: StartShard,
        *,
        connect: Connect,
        watch: WatchShard,
        places: Places,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Move nothing yet.

        Args:
            state: of the cluster.
            config: its settings.
            generations: what its processes hold.
            scaling: holds the processes.
            start: starts a shard process.
            connect: opens the way to one.
            watch: watches one.
            places: says what shall be where.
            clock: for limits and drains.
        """
        self._config = config
        self._generations = generations
        self._scaling = scaling
        self._start = start
        self._connect = connect
        self._watch = watch
        self._places = places
        self._clock = clock
        self._store = state.control
        self._going: _Going | None = None
        self._leaving: _Leaving | None = None
        self._ended: Operation | None = None
        """What has ended and is not written down yet."""
        self._next_s = clock()
        """When the next move may begin."""
        self._said = ""

    def poll(self) -> None:
        """Take the next step; ``generations`` and ``scaling`` have taken theirs just before."""
        try:
            self._let_go()
            self._write_end()
            now = self._generations.control.current
            if self._going is not None:
                if now is None or now.operation_id != self._going.operation.operation_id:
                    # Whoever called it off has said so in the store.
                    self._undo(self._going)
                else:
                    self._advance(self._going)
                self._write_end()
            elif now is None and self._is_free:
                moves = self._places.moves(self._scaling.current.sharding)
                if moves:
                    self._begin(next_batch(moves))
        except RetrievalError as error:
            self._say(f"copies stay where they are: {error}")

    @property
    def _is_free(self) -> bool:
        is_settled = self._leaving is None and self._clock() >= self._next_s
        return is_settled and self._generations.is_steady and self._scaling.is_idle

    def _begin(self, moves: Sequence[Move]) -> None:
        sharding = self._scaling.current.sharding
        operation = wanted("move", 0, "live").model_copy(
            update={"state": "running", "progress": "starting"}
        )

        def make(now: Control) -> Control:
            return now if now.current is not None else now.with_operation(operation)

        if self._store.change(make).operation(operation.operation_id) is None:
            return
        self._ended = operation.ended("failed", "it could not begin")
        self._next_s = self._clock() + AGAIN_S
        self._places.begin(moves, sharding)
        coming = ShardSet(sharding, self._started, self._config.runtime, watch=self._watch)
        give_up_s = self._clock() + self._config.swap.timeout_s
        self._going = _Going(operation, coming, ShardHosts(self._connect), give_up_s)
        for one in moves:
            coming.add(one.copy.shard, number_of(one.copy, sharding.replicas))
        self._ended = None

    def _started(self, num_shards: int, shard: int, replica: int) -> ShardHandle:
        epochs = [
            one.entry.epoch
            for one in self._scaling.current.watches
            if (one.shard, one.replica) == (shard, replica) and one.entry is not None
        ]
        return Relief(self._start(num_shards, shard, replica), sum(epochs))

    def _advance(self, going: _Going) -> None:
        """Look at the second processes once, and let them take over when that is due."""
        going.coming.poll()
        going.hosts.follow(going.coming.watches)
        self._generations.guide(going.hosts)
        reports, needed = going.hosts.reports, self._generations.wanted
        lost = [one for one in going.coming.watches if one.state == "failed"]
        broken = [
            f"shard {shard} replica {replica} cannot hold generation {one}: {held[one].reason}"
            for (shard, replica), held in sorted(reports.items())
            for one in sorted(needed & held.keys())
            if held[one].state == "failed"
        ]
        total = len(going.coming.watches)
        prepared = sum(all(is_prepared(one, it) for it in needed) for one in reports.values())
        behind = self._behind(going)
        if lost:
            self._end(going, f"{lost[0].name} could not start: {lost[0].reason}")
        elif broken:
            self._end(going, broken[0])
        elif self._clock() > going.give_up_s:
            limit_s = self._config.swap.timeout_s
            self._end(
                going,
                f"{prepared} of {total} processes were prepared after {limit_s:g} s, "
                f"swap.timeout_s{behind and f'; {behind}'}",
            )
        elif prepared == total and not behind:
            self._commit(going)
        else:
            self._report(going, f"prepared {prepared} of {total}{'; catches up' * bool(behind)}")

    def _behind(self, going: _Going) -> str:
        """Return in words which second process has not applied what the first ones have."""
        live = self._generations.live
        first, second = (
            {key: held[live] for key, held in reports.items() if live in held}
            for reports in (self._generations.reports, going.hosts.reports)
        )
        return going.readiness.observe_new(second, list(first.values()), self._clock())

    def _commit(self, going: _Going) -> None:
        # From here on it can be called off no more.
        self._places.commit()
        self._going, self._ended = None, going.operation.ended("done")
        self._next_s = self._clock()
        before = self._scaling.current.relieve(going.coming.watches)
        self._generations.hosts.relieve(going.hosts)
        self._leaving = _Leaving(before, self._clock() + self._scaling.drain_s)

    def _let_go(self) -> None:
        """End the processes that were relieved, once nobody can be waiting for them."""
        if self._leaving is not None and self._clock() >= self._leaving.end_s:
            leaving, self._leaving = self._leaving, None
            for one in leaving.watches:
                one.end()

    def _end(self, going: _Going, reason: str) -> None:
        """End a move that cannot be done."""
        self._ended = going.operation.ended("failed", reason)
        self._undo(going)

    def _write_end(self) -> None:
        if self._ended is not None:
            ended = self._ended
            self._store.change(lambda now: now.replaced(ended))
            self._ended = None

    def _undo(self, going: _Going) -> None:
        """End what had been started."""
        self._going = None
        self._next_s = self._clock() + AGAIN_S
        going.hosts.close()
        going.coming.end()

    def _report(self, going: _Going, progress: str) -> None:
        if going.operation.progress != progress:
            going.operation = going.operation.model_copy(update={"progress": progress})
            running = going.operation
            self._store.change(lambda now: now.replaced(running))

    def close(self) -> None:
        """End the processes that no map names."""
        if self._going is not None:
            self._undo(self._going)
        if self._leaving is not None:
            leaving, self._leaving = self._leaving, None
            for one in leaving.watches:
                one.end()

    def _say(self, text: str) -> None:
        if text != self._said:
            self._said = text
            print(json.dumps({"event": "moving", "message": text}), file=sys.stderr)

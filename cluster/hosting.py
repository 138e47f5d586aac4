"""The generations that one process of a shard holds: loading, catching up, serving, letting go."""

import asyncio
import contextlib
import gc
import logging
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from silvershard.cluster import shard_pb2
from silvershard.cluster.consistency import Consistency
from silvershard.cluster.follower import Follower, Rejected
from silvershard.cluster.freshness import Cut, Demand, Seen, check_end, check_tokens, is_met
from silvershard.model.dtypes import ValueType
from silvershard.shard.errors import (
    GenerationError,
    Overloaded,
    ReplicaStale,
    RetrievalError,
    ShardUnavailable,
    StateError,
)
from silvershard.shard.executor import ShardExecutor

_MAX_US = (1 << 63) - 1

# Calls that wait for updates leave places in the queue of the server to those that need not.
_MAX_WAITING = 256
_MAX_WAITING_BYTES = 64 << 20
_RETRY_S = 0.1

_log = logging.getLogger(__name__)


class HostState(Enum):
    """How far a generation is."""

    LOADING = shard_pb2.GENERATION_STATE_LOADING
    CATCHING_UP = shard_pb2.GENERATION_STATE_CATCHING_UP
    PREPARED = shard_pb2.GENERATION_STATE_PREPARED
    """It answers what it is asked."""
    FAILED = shard_pb2.GENERATION_STATE_FAILED
    """It left service, or never came into it."""


Commit = Callable[[Any, Cut | None], Rejected]


class Loaded(NamedTuple):
    """A shard of a generation in memory."""

    executor: ShardExecutor
    follow: Callable[[Commit], Follower[Any]] | None = None
    """Makes what keeps it up to date; None: it never changes."""


Load = Callable[[Path, Callable[[], None]], Loaded]
"""Loads this process' shard of the generation in a directory and warms it; may take long.

Between its parts it calls the function, whose exceptions call it off.
"""

RunOnModel = Callable[..., "Future[Any]"]
"""Runs a function on the thread of the model."""


Spawn = Callable[[Callable[[], None], str], None]
"""Runs a function, which may take long, beside everything else, under a name."""


def spawn(work: Callable[[], None], name: str) -> None:
    """Run a function on a thread of its own."""
    threading.Thread(target=work, name=name, daemon=True).start()


class _Retired(Exception):
    """What is being loaded is not wanted any more."""


@dataclass(eq=False)
class Hosted:
    """One generation of one shard in this process."""

    generation: int
    snapshot: str
    state: HostState = HostState.LOADING
    reason: str = ""
    executor: ShardExecutor | None = None
    follower: Follower[Any] | None = None
    retired: bool = False

    @property
    def serves(self) -> bool:
        """Return whether it answers what it is asked."""
        return self.state is HostState.PREPARED

    @property
    def executor_in_service(self) -> ShardExecutor:
        """Return the shard itself, which is there from the moment it is loaded."""
        assert self.executor is not None
        return self.executor

    @property
    def seen(self) -> Seen:
        """Return what it has applied; exact on the thread of the model, never ahead elsewhere."""
        executor, follower = self.executor, self.follower
        documents = executor.documents if executor is not None else 0
        if executor is None or follower is None:
            return Seen(0, (), 0.0, documents)
        # A snapshot that holds no updates has an empty cut.
        cut = executor.cut or (0,) * len(follower.lag.cut)
        return Seen(follower.log_id, cut, follower.staleness_s, documents)

    @property
    def dtypes(self) -> dict[str, ValueType]:
        """Return the types of its stored fields."""
        fields = self.executor_in_service.spec.item_schema.fields
        return {one.name: one.dtype for one in fields}

    def report(self) -> shard_pb2.GenerationReport:
        """Return how far it is, for the supervisor."""
        report = shard_pb2.GenerationReport(
            generation=self.generation,
            snapshot=self.snapshot,
            state=self.state.value,
            reason=self.reason,
            seen=seen_to(self.seen),
        )
        executor, follower = self.executor, self.follower
        if follower is None or executor is None:
            return report
        report.reason = self.reason or follower.trouble
        lag = follower.lag
        # What was refused up to a cut is known with that cut, which may be behind what is applied.
        report.seen.cut[:] = lag.cut
        report.ends.extend(lag.ends)
        counts, usage = follower.counts, executor.usage()
        report.updates.CopyFrom(
            shard_pb2.UpdateReport(
                batches=counts.batches,
                records=counts.records,
                urgent=counts.urgent,
                rejected=counts.rejected,
                longest_commit_us=int(counts.longest_commit_s * 1e6),
            )
        )
        report.refused.extend(
            shard_pb2.RefusedUpdate(item_id=item_id, reason=reason)
            for item_id, reason in lag.refused
        )
        report.pool.CopyFrom(shard_pb2.PoolReport(**usage._asdict()))
        return report


class Hosting:
    """Holds the generations of one shard; every method is for the thread of the server's loop."""

    def __init__(
        self,
        shard: int,
        run_on_model: RunOnModel,
        clock: Callable[[], float],
        load: Load | None = None,
        changed: Callable[[], None] = lambda: None,
        spawn: Spawn = spawn,
    ) -> None:
        """Make a hosting without a generation.

        Args:
            shard: index of the shard.
            run_on_model: runs a function on the thread of the model.
            clock: the clock of the executors.
            load: loads further generations; None: there will be none.
            changed: is told, on any thread, when a generation comes into service or leaves it.
            spawn: runs what loads a generation, or waits for the model to let go of one.
        """
        self._spawn = spawn
        self._shard = shard
        self._run_on_model = run_on_model
        self._clock = clock
        self._load = load
        self._changed = changed
        self._held: dict[int, Hosted] = {}
        self._progress = asyncio.Event()
        """Set, and replaced, whenever somebody who waits for updates shall look again."""
        self._num_waiting = 0
        self._waiting_bytes = 0
        self._loading = threading.Lock()
        """Memory is planned for one generation more, not for what was called off beside it."""
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def all(self) -> list[Hosted]:
        """Return what is held, by generation."""
        return [self._held[number] for number in sorted(self._held)]

    @property
    def served(self) -> list[Hosted]:
        """Return what is in service, by generation."""
        return [one for one in self.all if one.serves]

    def find(self, generation: int) -> Hosted:
        """Return a generation that is in service.

        Raises:
            GenerationError: if it is not held, or not ready yet.
            ShardUnavailable: if it left service.
        """
        found = self._held.get(generation)
        if found is not None and found.serves:
            return found
        if found is not None and found.state is HostState.FAILED:
            reason = f"generation {generation} left service: {found.reason}"
            raise ShardUnavailable(self._shard, reason)
        served = self.served
        raise GenerationError(generation, served[-1].generation if served else 0)

    def add(self, loaded: Loaded, snapshot: str = "") -> Hosted:
        """Take a loaded generation into service; it must have caught up already."""
        hosted = Hosted(loaded.executor.spec.generation, snapshot)
        self._held[hosted.generation] = hosted
        self._adopt(hosted, loaded)
        self._serve(hosted)
        return hosted

    def prepare(self, generation: int, snapshot: str) -> Hosted:
        """Begin to load a generation on a thread of its own, unless it is held or on its way.

        One that failed is tried again.

        Raises:
            StateError: if this process cannot load, or holds another snapshot of that number.
        """
        held = self._held.get(generation)
        if held is not None and held.state is not HostState.FAILED:
            if held.snapshot and Path(held.snapshot) != Path(snapshot):
                raise StateError(
                    f"generation {generation} is held from {held.snapshot}, "
                    f"{snapshot} was asked for: retire it first"
                )
            return held
        if self._load is None:
            raise StateError(f"shard {self._shard} was started for its generations alone")
        if held is not None:
            self.retire(generation)
        hosted = self._held[generation] = Hosted(generation, snapshot)
        self._spawn(partial(self._prepare, hosted), f"prepare-{generation}")
        return hosted

    def retire(self, generation: int) -> None:
        """Let go of a generation; what runs on it ends first."""
        hosted = self._held.pop(generation, None)
        if hosted is None:
            return
        hosted.retired = True
        self._wake()
        # It may be waiting for the model, which this thread must not wait for.
        self._spawn(partial(_let_go, hosted.follower), f"retire-{generation}")
        self._changed()

    def attach(self, loop: asyncio.AbstractEventLoop) -> None:
        """Name the loop on which calls wait for updates."""
        self._loop = loop

    def close(self) -> None:
        """Let go of everything; returns once nothing follows the log any more."""
        for hosted in self.all:
            hosted.retired = True
        for hosted in self.all:
            if hosted.follower is not None:
                hosted.follower.stop()

    async def wait(self, hosted: Hosted, demand: Demand, arrived_s: float, size: int = 0) -> None:
        """Wait until a generation is as fresh as a call demands, which holds up nobody else.

        Args:
            hosted: the generation.
            demand: of the call.
            arrived_s: reading of the clock when the call came in.
            size: bytes of the call.

        Raises:
            Overloaded: if too many wait already.
            ReplicaStale: if it is not in time.
            Refusal: if the demand is not of the log that it follows.
            RequestError: if the demand is beyond the end of that log.
            ShardUnavailable: if the generation leaves service meanwhile.
        """
        consistency = demand.consistency
        follower = hosted.follower
        check_tokens(
            consistency,
            follower.log_id if follower is not None else 0,
            len(follower.lag.cut) if follower is not None else 0,
        )
        if self._is_met(hosted, consistency, arrived_s):
            return
        until_s = arrived_s + demand.wait_s
        with self._place(size):
            while True:
                progress = self._progress
                if self._is_met(hosted, consistency, arrived_s):
                    return
                if follower is not None:
                    follower.hurry()
                if hosted.retired:
                    raise GenerationError(hosted.generation, 0)
                if not hosted.serves:
                    reason = f"generation {hosted.generation} left service: {hosted.reason}"
                    raise ShardUnavailable(self._shard, reason)
                if follower is not None:
                    lag = follower.lag
                    if lag.looked_s >= arrived_s:
                        check_end(consistency, lag.ends)
                try:
                    async with asyncio.timeout(until_s - self._clock()):
                        await progress.wait()
                except TimeoutError:
                    raise ReplicaStale(
                        self._shard,
                        f"generation {hosted.generation} is at cut {list(hosted.seen.cut)}, "
                        f"{hosted.seen.staleness_s:.3f} s behind, after {demand.wait_s:.3f} s",
                    ) from None

    @contextlib.contextmanager
    def _place(self, size: int) -> Iterator[None]:
        """Count a call of ``size`` bytes among those that wait.

        Raises:
            Overloaded: if there is no room for it.
        """
        held = self._waiting_bytes
        if self._num_waiting >= _MAX_WAITING or (held and held + size > _MAX_WAITING_BYTES):
            raise Overloaded(
                f"{self._num_waiting} calls of {held} bytes wait for updates", _RETRY_S
            )
        self._num_waiting += 1
        self._waiting_bytes += size
        try:
            yield
        finally:
            self._num_waiting -= 1
            self._waiting_bytes -= size

    def _is_met(self, hosted: Hosted, consistency: Consistency, arrived_s: float) -> bool:
        """Return whether a generation is as fresh as it had to be when the call arrived."""
        waited_s = self._clock() - arrived_s
        seen = hosted.seen
        return is_met(consistency, seen._replace(staleness_s=seen.staleness_s - waited_s))

    def _prepare(self, hosted: Hosted) -> None:
        """Load, catch up and serve; runs on a thread of its own."""
        self._bring_up(hosted)
        if hosted.retired:
            # It was loaded after what was let go of had been given back.
            hosted.executor = hosted.follower = None
            gc.collect()

    def _bring_up(self, hosted: Hosted) -> None:
        assert self._load is not None

        def check() -> None:
            if hosted.retired:
                raise _Retired

        try:
            with self._loading:
                check()
                loaded = self._load(Path(hosted.snapshot), check)
            found = loaded.executor.spec.generation
            if found != hosted.generation:
                raise StateError(
                    f"{hosted.snapshot} holds generation {found}, not {hosted.generation}"
                )
            self._adopt(hosted, loaded)
            hosted.state = HostState.CATCHING_UP
            if hosted.follower is not None:
                hosted.follower.catch_up()
            if not hosted.retired:
                self._serve(hosted)
        except _Retired:
            _log.info("loading generation %d was called off", hosted.generation)
        except RetrievalError as error:
            _log.error("generation %d cannot be prepared: %s", hosted.generation, error)
            self._fail(hosted, str(error))
        except Exception as error:  # noqa: BLE001  # a thread's border; logged
            _log.exception("generation %d cannot be prepared", hosted.generation)
            self._fail(hosted, f"internal error: {type(error).__name__}: {error}")

    def _adopt(self, hosted: Hosted, loaded: Loaded) -> None:
        hosted.executor = loaded.executor
        if loaded.follow is not None:
            hosted.follower = loaded.follow(partial(self._commit, hosted))
            if hosted.retired:
                hosted.follower.stop()

    def _commit(self, hosted: Hosted, prepared: Any, cut: Cut | None) -> Rejected:
        """Apply a batch on the thread of the model, or here while nobody is served yet."""
        executor = hosted.executor_in_service
        if not hosted.serves:
            return executor.apply(prepared, cut)
        committed: Future[Rejected] = self._run_on_model(executor.commit, prepared, cut)
        try:
            rejected = committed.result()
            # A query that waits goes first.
            self._run_on_model(executor.tidy_up).result()
            return rejected
        except (CancelledError, RuntimeError):
            if hosted.retired:
                return ()
            raise

    def _serve(self, hosted: Hosted) -> None:
        hosted.state = HostState.PREPARED
        self._changed()
        if hosted.follower is not None:
            hosted.follower.start(lambda: self._progressed(hosted))

    def _progressed(self, hosted: Hosted) -> None:
        """Tell those that wait; runs on the thread of a follower."""
        assert hosted.follower is not None
        if hosted.follower.failure:
            self._fail(hosted, hosted.follower.failure)
        if self._num_waiting and self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._wake)

    def _fail(self, hosted: Hosted, reason: str) -> None:
        hosted.state, hosted.reason = HostState.FAILED, reason
        self._changed()

    def _wake(self) -> None:
        self._progress.set()
        self._progress = asyncio.Event()


def ready(loaded: Loaded) -> Loaded:
    """Return a loaded generation once it has caught up; nobody may be served by it yet.

    Raises:
        RetrievalError: if the log cannot be followed.
    """
    if loaded.follow is not None:
        loaded.follow(loaded.executor.apply).catch_up()
    return loaded


def seen_to(seen: Seen) -> shard_pb2.Seen:
    """Return what was applied as a message."""
    staleness_us = min(max(int(seen.staleness_s * 1e6), 0), _MAX_US)
    return shard_pb2.Seen(
        log_id=seen.log_id, cut=seen.cut, staleness_us=staleness_us, documents=seen.documents
    )


def seen_from(message: shard_pb2.Seen) -> Seen:
    """Return what was applied, from its message."""
    return Seen(message.log_id, tuple(message.cut), message.staleness_us / 1e6, message.documents)


def _let_go(follower: Follower[Any] | None) -> None:
    """End a follower and give back the memory of what nobody holds any more."""
    if follower is not None:
        follower.stop()
    # An index and what watches it refer to each other.
    gc.collect()

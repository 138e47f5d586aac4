"""One actor, watched: where it is, what has become of it, and when to give it up.

Ray starts the actor again when the process ends, and says how often, also while it loads. The watch
reads no clock but the one it is given, so that a test can be quicker than time.
"""

import time
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

from silvershard.cluster.shard_map import ShardEntry
from silvershard.deploy.config_sections import RuntimeSection
from silvershard.deploy.crash_loop import CrashLoop
from silvershard.deploy.processes import Process, Processes
from silvershard.deploy.pulse import Feel, Pulse
from silvershard.deploy.state import ShardPhase, ShardRecord


class ShardDead(Exception):
    """An actor that will not come back by itself; the text is the reason."""


class Entry(Protocol):
    """What an actor says of itself once it serves."""

    @property
    def pid(self) -> int:
        """Return its process."""
        ...

    @property
    def address(self) -> str:
        """Return ``host:port`` of its gRPC server, or of one of them."""
        ...


E = TypeVar("E", bound=Entry)
E_co = TypeVar("E_co", bound=Entry, covariant=True)


class Handle(Protocol[E_co]):
    """What the watch needs of an actor; ``ray_shard.RayShard`` is one."""

    def restarts(self) -> int:
        """Return how often it was started again."""
        ...

    def entry(self) -> E_co | None:
        """Return where it serves, None while it loads; raise ``ShardDead`` if it never will."""
        ...

    def ask_again(self) -> None:
        """Forget what it said."""
        ...

    def end(self) -> None:
        """End it for good."""
        ...


ShardHandle = Handle[ShardEntry]


class ActorWatch(Generic[E]):
    """The state of one actor; ``poll`` moves it on."""

    kind = "actor"
    """What people call it."""

    def __init__(
        self,
        shard: int,
        handle: Handle[E],
        runtime: RuntimeSection,
        *,
        feel: Feel | None = Pulse,
        clock: Callable[[], float] = time.monotonic,
        processes: Processes | None = None,
        restarts: int = 0,
    ) -> None:
        """Watch an actor.

        Args:
            shard: its number among those of its kind.
            handle: the actor.
            runtime: limits.
            feel: takes the pulse of the process at an address; None where the process may be on
                another host: there its host looks whether it hangs, and Ray says when it ended.
            clock: measures its lives.
            processes: those of its machine; None: of this one.
            restarts: how often it had been started again before it was watched.
        """
        self._processes = processes or Processes()
        self.shard = shard
        self.state: ShardPhase = "starting"
        self.reason = ""
        self.restarts = restarts
        self.entry: E | None = None
        """Where it serves; None while it does not."""
        self.last: E | None = None
        """Where it served last."""
        self._handle = handle
        self._feel = feel
        self._pulse: Pulse | None = None
        self._hang_s = runtime.hang_s
        self._clock = clock
        self._process: Process | None = None
        self._crashes = CrashLoop(runtime.crash_limit, runtime.crash_window_s)
        self._window_s = runtime.crash_window_s
        self._began_s = clock()

    @property
    def name(self) -> str:
        """Return what people call this one."""
        return f"{self.kind} {self.shard}"

    def poll(self) -> None:
        """Look once, without waiting."""
        if self.state == "failed":
            return
        if self.entry is not None and self._feel is not None and not self._is_alive():
            self._lost(f"process {self.entry.pid} ended")
        self._count_restarts()
        self._kill_if_hung()
        if self.state in ("starting", "restarting"):
            self._look_for_entry()

    def _is_alive(self) -> bool:
        return self._process is not None and self._processes.is_alive(self._process)

    def _lost(self, reason: str) -> None:
        self.state, self.reason = "restarting", reason
        self._forget()
        self._handle.ask_again()

    def _forget(self) -> None:
        self.entry = self._process = None
        if self._pulse is not None:
            self._pulse.close()
            self._pulse = None

    def _kill_if_hung(self) -> None:
        """Kill a process that stands still, which Ray would never notice."""
        if self._pulse is None or self._process is None:
            return
        self._pulse.poll()
        silent_s = self._pulse.silent_s
        if silent_s >= self._hang_s and self._processes.kill(self._process):
            self._lost(f"process {self._process.pid} hung for {silent_s:g} s and was killed")

    def _count_restarts(self) -> None:
        restarts = self._handle.restarts()
        while self.restarts < restarts and self.state != "failed":
            now_s = self._clock()
            self.restarts += 1
            if self.entry is not None:
                self._lost(f"process {self.entry.pid} ended")
            if self._crashes.died(now_s - self._began_s):
                self._give_up(
                    f"gave up after {self._crashes.quick_deaths} deaths in a row, each within "
                    f"{self._window_s:g} s of its start"
                )
            self._began_s = now_s

    def _look_for_entry(self) -> None:
        try:
            found = self._handle.entry()
        except ShardDead as error:
            self._give_up(str(error))
            return
        if found is not None:
            self.entry = self.last = found
            if self._feel is not None:
                self._process = self._processes.identify(found.pid)
                self._pulse = self._feel(found.address)
            self.state, self.reason = "serving", ""

    def _give_up(self, reason: str) -> None:
        self.end()
        self.state, self.reason = "failed", reason

    def end(self) -> None:
        """End the actor for good."""
        self._forget()
        self._handle.end()


class ShardWatch(ActorWatch[ShardEntry]):
    """The state of one process of a shard."""

    kind = "shard"

    def __init__(
        self,
        shard: int,
        handle: Handle[ShardEntry],
        runtime: RuntimeSection,
        *,
        replica: int = 0,
        feel: Feel | None = Pulse,
        clock: Callable[[], float] = time.monotonic,
        processes: Processes | None = None,
        restarts: int = 0,
        host: str = "",
    ) -> None:
        """Watch a process of a shard.

        ``replica`` is the number of the copy, and ``host`` where it is, if there are several.
        """
        super().__init__(
            shard,
            handle,
            runtime,
            feel=feel,
            clock=clock,
            processes=processes,
            restarts=restarts,
        )
        self.replica = replica
        self.host = host

    @property
    def name(self) -> str:
        """Return what people call this one."""
        return f"{super().name} replica {self.replica}" if self.replica else super().name

    @property
    def record(self) -> ShardRecord:
        """Return the shard as status shows it."""
        return ShardRecord(
            shard=self.shard,
            replica=self.replica,
            host=self.host,
            state=self.state,
            pid=self.entry.pid if self.entry else 0,
            epoch=self.entry.epoch if self.entry else 0,
            address=self.entry.address if self.entry else "",
            documents=self.last.documents if self.last else 0,
            release=self.entry.release if self.entry else "",
            restarts=self.restarts,
            reason=self.reason,
        )

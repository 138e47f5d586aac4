"""The agent of a host: it keeps the map file true, runs the router, brings generations, ends hangs.

It needs the control store only, and while that is away everything stays as it is. Nothing here
waits for another host but the thread that brings generations.
"""

import json
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from silvershard.cluster.dialer import peer_dialer
from silvershard.cluster.document import RELEASE
from silvershard.deploy.cluster_store import (
    ClusterStore,
    DocumentName,
    HostReport,
    Launched,
    PlacedHost,
    RouterOrder,
)
from silvershard.deploy.config import Config
from silvershard.deploy.host_router import HostRouter, RouterDir
from silvershard.deploy.processes import Process, identify, send_signal
from silvershard.deploy.pulse import Feel, Pulse
from silvershard.deploy.staging import Reach, Stager
from silvershard.deploy.state import ClusterRecord, RouterRecord, StateDir, write_atomic
from silvershard.shard.errors import RetrievalError, StateError
from silvershard.shard.generations import list_generations

TICK_S = 0.1
_REPORT_S = 0.5


class NotLaunched(StateError):
    """The store knows of no cluster: it was ended."""


class Router(Protocol):
    """What the agent needs of a router; ``HostRouter`` is one."""

    http: str
    address: str
    refused: str

    @property
    def is_replacing(self) -> bool:
        """Return whether a process is taking the place of another one."""
        ...

    def replace(self) -> None:
        """Let a process take the place of the one that serves."""
        ...

    @property
    def record(self) -> RouterRecord:
        """Return the router as status shows it."""
        ...

    def start(self) -> None:
        """Start it, or adopt the one that runs."""
        ...

    def poll(self) -> None:
        """Look once."""
        ...

    def stop(self) -> None:
        """End it in order."""
        ...


class HangWatch:
    """Kills processes of this host that stand still, which Ray would never notice.

    The host itself looks, so that one which is only cut off is never taken for one that hangs.
    """

    def __init__(self, hang_s: float, feel: Feel = Pulse) -> None:
        self._hang_s = hang_s
        self._feel = feel
        self._watched: dict[tuple[str, int], tuple[Process, Pulse]] = {}

    def poll(self, places: Iterable[tuple[str, int]]) -> list[Process]:
        """Look at the processes with these addresses and pids; return those that were killed."""
        wanted = set(places)
        for key in [one for one in self._watched if one not in wanted]:
            self._watched.pop(key)[1].close()
        for key in wanted - self._watched.keys():
            found = identify(key[1])
            if found is not None:
                self._watched[key] = found, self._feel(key[0])
        killed = []
        for process, pulse in self._watched.values():
            pulse.poll()
            if pulse.silent_s >= self._hang_s and send_signal(process, signal.SIGKILL):
                killed.append(process)
        return killed

    def close(self) -> None:
        """Look at nobody any more."""
        self.poll(())


class HostAgent:
    """What one host does for a cluster; ``tick`` does it once."""

    def __init__(
        self,
        store: ClusterStore,
        name: str,
        *,
        reach: Reach,
        make_router: Callable[[RouterDir, Any], Router] = HostRouter,
        hangs: HangWatch | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Prepare the state directory of this host for what was launched.

        Args:
            store: of the cluster.
            name: of this host.
            reach: ways to other hosts.
            make_router: makes the router of this host from its directory and settings.
            hangs: kills what hangs; by default according to the settings.
            clock: for the pauses.

        Raises:
            NotLaunched: if the cluster was ended.
            StateError: if the store cannot be used.
            Refused: if the state directory cannot be used.
        """
        self._store = store
        launched = store.read(Launched, "launch")
        if launched is None or launched.stopping:
            raise NotLaunched(f"control store {store.url}: nothing is launched")
        self.host: PlacedHost = launched.host(name)
        self.state = StateDir(Path(launched.root))
        self._config = launched.own_config(self.host)
        self._clock = clock
        dialer = peer_dialer(self._config.security.peers)
        self._hangs = hangs or HangWatch(self._config.runtime.hang_s, partial(Pulse, dialer=dialer))
        self._incarnation = time.time_ns()
        self._beat = 0
        self._next_report_s = 0.0
        self._stager = Stager(self.state.generations, name, reach)
        self._said = ""
        self._ordered = 0
        """The order that is being carried out, or was last."""
        self._mirrored: dict[Path, str] = {}
        self.state.create()
        if not self.state.control_url_file.is_file():
            write_atomic(self.state.control_url_file, store.url.encode())
        self.router: Router | None = None
        if self.host.router:
            self.router = make_router(RouterDir(self.state, name), self._config)

    def start(self) -> None:
        """Start what this host runs by itself."""
        if self.router is not None:
            self._mirror()
            self.router.start()

    def tick(self) -> None:
        """Do everything once; what the store is needed for waits while it is away."""
        for duty in (self._look_after_router, self._end_hangs, self._talk):
            try:
                duty()
            except (RetrievalError, OSError) as error:
                self._say(str(error))

    def _look_after_router(self) -> None:
        if self.router is not None:
            self.router.poll()

    def _talk(self) -> None:
        """Read what the store says, and write what this host has."""
        self._mirror()
        self._stage()
        self._obey()
        self._report()

    def run(self, stop: threading.Event) -> None:
        """Go on until told to stop."""
        while not stop.wait(TICK_S):
            self.tick()

    def stop(self) -> None:
        """End the router in order, and remove what described the cluster here."""
        self._hangs.close()
        if self.router is not None:
            self.router.stop()
        clear_mirror(self.state)

    def _mirror(self) -> None:
        """Copy the map and the record into files where they differ."""
        files: tuple[tuple[DocumentName, Path], ...] = (
            ("map", self.state.shard_map_file),
            ("record", self.state.record_file),
        )
        for name, path in files:
            text = self._store.text(name)
            if text and text != self._mirrored.get(path):
                write_atomic(path, text.encode())
                self._mirrored[path] = text

    def _end_hangs(self) -> None:
        record = self.state.read_record()
        for process in self._hangs.poll(self._own_places(record) if record else ()):
            self._say(f"process {process.pid} hung and was killed")

    def _own_places(self, record: ClusterRecord) -> Iterable[tuple[str, int]]:
        """Return address and pid of every process of this host that Ray runs."""
        for one in (*record.shards, *((record.sequencer,) if record.sequencer else ())):
            if one.pid and one.host == self.host.name:
                yield one.address, one.pid

    def _stage(self) -> None:
        """Fetch what shall be here and is not."""
        wanted = json.loads(self._store.text("wanted") or "[]")
        self._stager.poll(wanted, self._store.reports())
        if self._stager.said:
            self._say(self._stager.said)

    def _obey(self) -> None:
        """Replace the router where that is ordered."""
        order = self._store.read(RouterOrder, "order")
        if self.router is None or order is None or order.host != self.host.name:
            return
        if order.number != self._ordered:
            self._ordered = order.number
            self.router.replace()

    def _report(self) -> None:
        now_s = self._clock()
        if now_s < self._next_report_s:
            return
        self._next_report_s = now_s + _REPORT_S
        self._beat += 1
        router = self.router
        self._store.report(
            HostReport(
                host=self.host.name,
                beat=self._beat,
                incarnation=self._incarnation,
                release=RELEASE,
                generations=tuple(list_generations(self.state.generations)),
                staging=self._stager.said,
                router=router.record.model_copy(
                    update={"host": self.host.name, "address": router.address}
                )
                if router is not None
                else None,
                http=router.http if router is not None else "",
                ordered=self._ordered if router is not None and not router.is_replacing else 0,
                refused=router.refused if router is not None else "",
            )
        )

    def _say(self, text: str) -> None:
        if text != self._said:
            self._said = text
            print(json.dumps({"event": "host", "message": text}), file=sys.stderr, flush=True)


def end_left(root: Path, host: str) -> None:
    """End the router that a cluster left on a host which was away when it was ended.

    Args:
        root: state directory.
        host: its name.
    """
    state = StateDir(root)
    if state.root.is_dir():
        HostRouter(RouterDir(state, host), Config()).stop()
        clear_mirror(state)


def clear_mirror(state: StateDir) -> None:
    """Remove what describes a running cluster on a host."""
    for path in (state.shard_map_file, state.record_file):
        path.unlink(missing_ok=True)

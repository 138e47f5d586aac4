"""The supervisor of a cluster of several hosts: it starts everything, or adopts what runs already.

Whoever takes over fences all earlier ones. Requests never pass through it.
"""

import json
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from silvershard.deploy.cluster_store import ClusterStore, Launched, Superseded
from silvershard.deploy.errors import CommandError, ExitCode
from silvershard.deploy.host_site import Actors, HostSite
from silvershard.deploy.launcher import TICK_S, LocalCluster
from silvershard.deploy.progress import Progress
from silvershard.deploy.staging import Reach, Stager
from silvershard.deploy.state import StateDir, write_atomic
from silvershard.shard.errors import RetrievalError, StateError
from silvershard.shard.generations import generation_dir

_RETRY_S = 1.0


class Cluster(Protocol):
    """What a supervisor runs; ``LocalCluster`` is one."""

    def start_router(self) -> None:
        """Start the routers."""

    def start_shards(self) -> None:
        """Start everything else."""

    def wait_until_ready(self, timeout_s: float) -> None:
        """Wait until it serves."""

    def adopt(self) -> None:
        """Watch what runs already."""

    def poll(self) -> None:
        """Look at everything once and repair it."""

    def stop(self) -> None:
        """End everything."""


class Supervisor:
    """Runs the cluster that the store describes."""

    def __init__(
        self,
        store: ClusterStore,
        actors: Actors,
        address: str,
        *,
        reach: Reach,
        make: Callable[[Launched, int, HostSite, Callable[[str], None]], Cluster] | None = None,
    ) -> None:
        """Prepare.

        Args:
            store: of the cluster.
            actors: what Ray knows.
            address: IP address of the node that this runs on, which may be no host.
            reach: ways to read generations of hosts.
            make: makes the cluster of what was launched, given who hears of its progress.
        """
        self._store = store
        self._actors = actors
        self._address = address
        self._reach = reach
        self._make = make or _made
        self._stop = threading.Event()
        self._ended = threading.Event()
        self._said = ""

    def run(self) -> bool:
        """Run until told to stop, or until another one has taken over.

        Returns:
            Whether that is so; else the next one shall take over.
        """
        try:
            while not self._stop.is_set():
                try:
                    return self._run_once()
                except Superseded as error:
                    self._say(str(error))
                    return True
                except RetrievalError as error:
                    self._say(f"all stays as it is: {error}")
                self._stop.wait(_RETRY_S)
            return True
        finally:
            self._ended.set()

    def stop(self, timeout_s: float) -> bool:
        """End all processes of shards and the sequencer; return whether that was done in time."""
        self._stop.set()
        return self._ended.wait(timeout_s)

    def _run_once(self) -> bool:
        """Start or adopt the cluster and watch it; return as ``run`` does."""
        launched = self._store.read(Launched, "launch")
        if launched is None or launched.stopping:
            return True
        term = self._store.take_over()
        state = StateDir(Path(launched.root))
        state.create()
        if not state.control_url_file.is_file():
            write_atomic(state.control_url_file, self._store.url.encode())
        control = state.control
        site = HostSite(
            self._store,
            launched,
            term,
            self._actors,
            address=self._address,
            stager=Stager(state.generations, "supervisor", self._reach),
            control=control.read,
        )
        adopting = site.read_map() is not None

        def tell(progress: Progress) -> None:
            self._store.write(term, "progress", progress.model_dump_json())

        generation = (control.read().live if adopting else 0) or launched.generation
        site.poll({generation})
        while not generation_dir(state.generations, generation).is_dir():
            if self._stop.wait(TICK_S):
                return True
            site.poll({generation})
        cluster = self._make(launched, generation, site, lambda phase: tell(Progress(phase=phase)))
        if adopting:
            cluster.adopt()
        else:
            try:
                cluster.start_router()
                cluster.start_shards()
                cluster.wait_until_ready(launched.config.runtime.start_timeout_s)
            except RetrievalError as error:
                code = error.exit_code if isinstance(error, CommandError) else ExitCode.FAILED
                tell(Progress(error=str(error), exit_code=code))
                cluster.stop()
                return True
        tell(Progress(ready=True))
        self._watch(cluster, site)
        if site.has_left:
            return False
        cluster.stop()
        return True

    def _say(self, text: str) -> None:
        if text != self._said:
            self._said = text
            print(json.dumps({"event": "supervisor", "message": text}), file=sys.stderr, flush=True)

    def _watch(self, cluster: Cluster, site: HostSite) -> None:
        """Look at everything again and again; while the store is away all stays as it is."""
        while not self._stop.wait(TICK_S) and not site.has_left:
            try:
                cluster.poll()
            except Superseded:
                raise
            except StateError as error:
                self._say(str(error))


def _made(
    launched: Launched, generation: int, site: HostSite, report: Callable[[str], None]
) -> Cluster:
    state = StateDir(Path(launched.root))
    return LocalCluster(
        state,
        site.config,
        generation=generation,
        snapshot=generation_dir(state.generations, generation),
        model=launched.model,
        site=site,
        routers=site.site_routers,
        report=report,
    )

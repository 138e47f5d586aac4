"""A cluster on one machine: shard actors, the shard map and a router, watched and repaired.

Ray starts the actors again when they end; the launcher notices, gives the router their new place,
and stops what keeps crashing. It is never on the path of a request.

Shapes: S shards.
"""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

import grpc
import ray
import ray.exceptions
from grpc_health.v1 import health_pb2, health_pb2_grpc

from silvershard.cluster.config import RouterConfig
from silvershard.cluster.shard_map import ShardEntry, ShardMap
from silvershard.deploy.config import Config
from silvershard.deploy.crash_loop import CrashLoop
from silvershard.deploy.errors import CommandError, TimedOut
from silvershard.deploy.processes import (
    Process,
    descendants,
    identify,
    is_alive,
    kill_all,
    myself,
)
from silvershard.deploy.runtime import threads_per_shard
from silvershard.deploy.state import (
    ClusterRecord,
    RouterPhase,
    RouterRecord,
    ShardPhase,
    ShardRecord,
    StateDir,
)

TICK_S = 0.1
_CENSUS_S = 1.0
_STEADY_S = 30.0

StartActor = Callable[[int], Any]
"""Starts the actor of a shard and returns its handle, whose ``describe`` says where it is."""


class ShardWatch:
    """One shard actor: where it is, and what has become of it."""

    def __init__(self, shard: int, actor: Any, config: Config) -> None:
        self.shard = shard
        self.state: ShardPhase = "starting"
        self.reason = ""
        self.restarts = 0
        self.documents = 0
        self.entry: ShardEntry | None = None
        self._actor = actor
        self._process: Process | None = None
        self._crashes = CrashLoop(config.runtime.crash_limit, config.runtime.crash_window_s)
        self._window_s = config.runtime.crash_window_s
        self._began_s = time.monotonic()
        self._described = actor.describe.remote()

    @property
    def record(self) -> ShardRecord:
        """Return the shard as status shows it."""
        return ShardRecord(
            shard=self.shard,
            state=self.state,
            pid=self.entry.pid if self.entry else 0,
            epoch=self.entry.epoch if self.entry else 0,
            address=self.entry.address if self.entry else "",
            documents=self.documents,
            restarts=self.restarts,
            reason=self.reason,
        )

    def poll(self) -> None:
        """Look once, without waiting."""
        if self.state == "failed":
            return
        if self._process is not None and not is_alive(self._process):
            self._lost(f"process {self._process.pid} ended")
        self._count_restarts()
        if self.state in ("starting", "restarting"):
            self._look_for_description()

    def _lost(self, reason: str) -> None:
        self.state, self.reason = "restarting", reason
        self.entry = self._process = None
        self._described = self._actor.describe.remote()

    def _count_restarts(self) -> None:
        """Learn from Ray how often the actor was started again, also while it was loading."""
        from ray._private.state import state as ray_state

        table = ray_state.actor_table(self._actor._actor_id.hex()) or {}
        restarts = int(table.get("NumRestarts", 0))
        while self.restarts < restarts and self.state != "failed":
            now_s = time.monotonic()
            self.restarts += 1
            if self.state == "serving":
                self._lost("the process ended")
            if self._crashes.died(now_s - self._began_s):
                self._give_up(
                    f"gave up after {self._crashes.quick_deaths} deaths in a row, each within "
                    f"{self._window_s:g} s of its start; see the log directory"
                )
            self._began_s = now_s

    def _look_for_description(self) -> None:
        done, _ = ray.wait([self._described], timeout=0)
        if not done:
            return
        try:
            found = ray.get(self._described)
        except ray.exceptions.ActorDiedError as error:
            self._give_up(_cause(error))
        except (ray.exceptions.RayActorError, ray.exceptions.RayTaskError) as error:
            self.reason = _cause(error)
            self._described = self._actor.describe.remote()
        else:
            self._process = identify(found["pid"])
            self.entry = ShardEntry(**{name: found[name] for name in ShardEntry.model_fields})
            self.documents = self.entry.documents
            self.state, self.reason = "serving", ""
            self._began_s = time.monotonic()

    def _give_up(self, reason: str) -> None:
        self.state, self.reason = "failed", reason
        self.entry = self._process = None
        self.end()

    def end(self) -> None:
        """End the actor for good."""
        ray.kill(self._actor, no_restart=True)


def _cause(error: Exception) -> str:
    """Return the innermost error of a Ray failure as one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    for line in reversed(lines):
        name, colon, message = line.partition(": ")
        if colon and name.startswith("silvershard.") and name.rpartition(".")[2].isidentifier():
            return message
    return lines[-1] if lines else type(error).__name__


class RouterWatch:
    """The router process: started, watched, and started again when it ends."""

    def __init__(self, state: StateDir, config: Config) -> None:
        self.phase: RouterPhase = "starting"
        self.address = ""
        self.reason = ""
        self.restarts = 0
        self._state = state
        self._config = config
        self._port = config.listen.port
        self._crashes = CrashLoop(1 << 30, _STEADY_S)
        self._process: subprocess.Popen[str] | None = None
        self._began_s = 0.0
        self._next_start_s = 0.0
        """When to start it again; 0 while it runs or was never started."""
        self._stub: health_pb2_grpc.HealthStub | None = None
        self._channel: grpc.Channel | None = None

    @property
    def record(self) -> RouterRecord:
        """Return the router as status shows it."""
        running = self._process is not None and self._process.poll() is None
        return RouterRecord(
            state=self.phase,
            pid=self._process.pid if self._process and running else 0,
            restarts=self.restarts,
            reason=self.reason,
        )

    def start(self) -> None:
        """Start the process; call it on a thread that lives as long as the router shall."""
        listen = self._config.listen.model_copy(update={"port": self._port})
        settings = RouterConfig(
            map_path=str(self._state.shard_map_file),
            drain_s=self._config.runtime.drain_s,
            listen=listen,
            query=self._config.query,
            ping=self._config.ping,
        )
        self._state.router_file.write_text(settings.model_dump_json(indent=1))
        with self._state.router_log.open("ab") as log:
            self._process = subprocess.Popen(
                [
                    *(sys.executable, "-P", "-m", "silvershard.cluster.router"),
                    *("--config", str(self._state.router_file)),
                ],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        self._began_s = time.monotonic()
        threading.Thread(
            target=self._read_address, args=(self._process,), daemon=True, name="router-stdout"
        ).start()

    def _read_address(self, process: "subprocess.Popen[str]") -> None:
        assert process.stdout is not None
        for line in process.stdout:
            address = json.loads(line).get("address", "")
            if address:
                self._port = int(address.rpartition(":")[2])
                self.address = address

    def poll(self) -> None:
        """Look once; start the router again when it has ended and its pause is over."""
        if self._process is None:
            if self._next_start_s and time.monotonic() >= self._next_start_s:
                self.restarts += 1
                self.start()
            return
        code = self._process.poll()
        if code is not None:
            self.phase = "restarting"
            self.reason = f"exit code {code}: {self.last_words()}"
            self._process = None
            self._disconnect()
            self._crashes.died(time.monotonic() - self._began_s)
            self._next_start_s = time.monotonic() + self._crashes.backoff_s
        elif self.phase != "serving" and self.is_ready():
            self.phase, self.reason = "serving", ""

    def is_ready(self) -> bool:
        """Return whether the router says that it serves."""
        if not self.address:
            return False
        if self._stub is None:
            self._channel = grpc.insecure_channel(self.address)
            self._stub = health_pb2_grpc.HealthStub(self._channel)
        try:
            answer = self._stub.Check(health_pb2.HealthCheckRequest(service=""), timeout=1.0)
        except grpc.RpcError:
            return False
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

    def last_words(self) -> str:
        """Return what the router wrote last, or that it wrote nothing."""
        try:
            lines = self._state.router_log.read_text(errors="replace").splitlines()
        except OSError:
            lines = []
        last = next((line for line in reversed(lines) if line.strip()), "it wrote nothing")
        try:
            document = json.loads(last)
        except ValueError:
            return last
        said = document if isinstance(document, dict) else {}
        return str(said.get("message") or said.get("error") or last)

    @property
    def has_failed(self) -> bool:
        """Return whether the process has ended by itself."""
        return self._process is not None and self._process.poll() is not None

    def stop(self) -> None:
        """End the process in order: requests in flight are finished, within the time to drain."""
        self._disconnect()
        if self._process is None:
            return
        self._next_start_s = 0.0
        self._process.terminate()
        try:
            self._process.wait(self._config.runtime.drain_s + 2.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._process = None

    def _disconnect(self) -> None:
        if self._channel is not None:
            self._channel.close()
        self._channel = self._stub = None


class LocalCluster:
    """Shards, map and router of one generation; a context that ends everything it started.

    Ray must be running. Start, poll and stop it on the same thread.
    """

    def __init__(
        self,
        state: StateDir,
        config: Config,
        *,
        generation: int,
        snapshot: Path,
        guard: Process | None = None,
        ray_dir: str = "",
        start_actor: StartActor | None = None,
        report: Callable[[str], None] = lambda _: None,
    ) -> None:
        """Prepare a cluster.

        Args:
            state: where map, settings, record and logs go.
            config: settings.
            generation: number of the generation.
            snapshot: its directory.
            guard: the process that cleans up after this one; this process if there is none.
            ray_dir: temporary directory of Ray, for the record.
            start_actor: makes the actor of a shard; by default one that serves ``snapshot``.
            report: hears what is being waited for.
        """
        self._state = state
        self._config = config
        self._generation = generation
        self._snapshot = snapshot
        self._driver = myself()
        self._guard = guard or self._driver
        self._ray_dir = ray_dir
        self._start_actor = start_actor or self._start_shard
        self._report = report
        self._router = RouterWatch(state, config)
        self._shards: list[ShardWatch] = []
        self._map: ShardMap | None = None
        self._written: ClusterRecord | None = None
        self._family: dict[int, Process] = {}
        self._next_census_s = 0.0
        self._since_unix_s = time.time()

    @property
    def address(self) -> str:
        """Return ``host:port`` of the router, empty before it listens."""
        return self._router.address

    @property
    def shards(self) -> list[ShardRecord]:
        """Return every shard as the launcher sees it now."""
        return [one.record for one in self._shards]

    def start_router(self) -> None:
        """Start the router, which waits for its shards, so that both can start side by side."""
        self._report("router")
        self._router.start()

    def start_shards(self) -> None:
        """Start one actor per shard, all at once."""
        self._report("shards")
        self._shards = [
            ShardWatch(shard, self._start_actor(shard), self._config)
            for shard in range(self._config.sharding.shards)
        ]

    def _start_shard(self, shard: int) -> Any:
        from silvershard.cluster.shard_actor import ShardActor

        return ShardActor.options(name=f"shard-{shard}").remote(
            str(self._snapshot),
            shard,
            self._config.sharding.shards,
            devices=self._config.sharding.devices,
            num_threads=threads_per_shard(self._config.sharding),
        )

    def wait_until_ready(self, timeout_s: float) -> None:
        """Wait until the router has reached every shard.

        Raises:
            CommandError: if a shard or the router cannot start, with its reason.
            TimedOut: if it takes too long, naming what is missing.
        """
        give_up_s = time.monotonic() + timeout_s
        while True:
            if self._router.has_failed:
                raise CommandError(f"the router could not start: {self._router.last_words()}")
            self.poll()
            for one in self._shards:
                if one.state == "failed":
                    raise CommandError(f"shard {one.shard} could not start: {one.reason}")
            serving = sum(one.state == "serving" for one in self._shards)
            if serving == len(self._shards) and self._router.phase == "serving":
                return
            if time.monotonic() > give_up_s:
                raise TimedOut(
                    f"not ready after {timeout_s:g} s: {serving} of {len(self._shards)} shards "
                    f"serve, the router is {self._router.phase}; see {self._state.root / 'log'}"
                )
            self._report(f"shards {serving}/{len(self._shards)}")
            time.sleep(TICK_S)

    def poll(self) -> None:
        """Look at everything once, repair the router, and keep map and record true."""
        for one in self._shards:
            one.poll()
        self._router.poll()
        self._write_map()
        self._write_record()

    def announce(self) -> None:
        """Write the record, so that what is started from now on can be cleaned up after a crash."""
        self._write_record()

    def _write_map(self) -> None:
        entries = tuple(one.entry for one in self._shards if one.entry is not None)
        if not self._shards or (self._map is not None and self._map.entries == entries):
            return
        if self._map is None and len(entries) < len(self._shards):
            # The first map is whole, so that the router never believes in a smaller catalogue.
            return
        self._map = ShardMap(
            version=self._map.version + 1 if self._map else 1,
            generation=self._generation,
            snapshot=str(self._snapshot),
            num_shards=len(self._shards),
            entries=entries,
        )
        self._map.write_atomic(self._state.shard_map_file)

    def _write_record(self) -> None:
        now_s = time.monotonic()
        if now_s >= self._next_census_s:
            self._next_census_s = now_s + _CENSUS_S
            living = {one.pid: one for one in descendants(self._driver.pid)}
            self._family = living | {p: o for p, o in self._family.items() if is_alive(o)}
        record = ClusterRecord(
            guard=self._guard,
            driver=self._driver,
            address=self._router.address,
            model=self._config.model.name,
            generation=self._generation,
            documents=sum(one.documents for one in self._shards),
            map_version=self._map.version if self._map else 0,
            router=self._router.record,
            shards=tuple(one.record for one in self._shards),
            ray_dir=self._ray_dir,
            processes=tuple(self._family.values()),
            since_unix_s=self._since_unix_s,
        )
        if record != self._written:
            self._state.write_record(record)
            self._written = record

    def run(self, stop: threading.Event) -> None:
        """Watch and repair until told to stop."""
        while not stop.wait(TICK_S):
            self.poll()

    def stop(self) -> None:
        """End the router, then the actors."""
        self._router.stop()
        with ExitStack() as rest:
            for one in self._shards:
                rest.callback(one.end)
        self._shards = []

    def kill_leftovers(self) -> list[Process]:
        """Kill what this cluster started and still runs; return what cannot be killed."""
        return kill_all(one for one in self._family.values() if is_alive(one))

    def __enter__(self) -> Self:
        """Start everything and wait until it serves."""
        try:
            self.start_router()
            self.start_shards()
            self.wait_until_ready(self._config.runtime.start_timeout_s)
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """End everything."""
        self.stop()

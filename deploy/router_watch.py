"""The router process, watched: started, and started again after a pause when it ends."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from typing import Protocol

from grpc_health.v1 import health_pb2

from silvershard.cluster.config import RouterConfig
from silvershard.cluster.dialer import PLAIN, Dialer
from silvershard.deploy.config import Config
from silvershard.deploy.crash_loop import CrashLoop
from silvershard.deploy.fault_plan import faults_dir
from silvershard.deploy.pulse import Pulse
from silvershard.deploy.state import RouterPhase, RouterRecord, StateDir

_LOOK_S = 0.1


class RouterProcess(Protocol):
    """What the watch needs of the process; ``subprocess.Popen`` is one."""

    @property
    def pid(self) -> int:
        """Return its number."""
        ...

    def poll(self) -> int | None:
        """Return its exit code, None while it runs."""
        ...

    def kill(self) -> None:
        """Kill it."""
        ...

    def terminate(self) -> None:
        """Tell it to end."""
        ...

    def wait(self, timeout: float | None = None) -> int:
        """Wait until it has ended; raise ``subprocess.TimeoutExpired`` if that takes too long."""
        ...


_STEADY_S = 30.0
"""A router that lived this long was no part of a crash loop."""


def http_wanted(config: Config) -> str:
    """Return where a router shall answer over HTTP: as configured, or at any port of that host."""
    http = config.observability.http
    if not http or config.listen.port:
        return http
    return f"{http.rpartition(':')[0]}:0"


class RouterWatch:
    """The router process: started, watched, and started again when it ends."""

    def __init__(self, state: StateDir, config: Config, dialer: Dialer = PLAIN) -> None:
        self.phase: RouterPhase = "starting"
        self.address = ""
        self.http = ""
        """``host:port`` of probes and metrics; empty: there are none."""
        self.reason = ""
        self.restarts = 0
        self._state = state
        self._config = config
        self._dialer = dialer
        self._port = config.listen.port
        self._http = http_wanted(config)
        self._crashes = CrashLoop(1 << 30, _STEADY_S)
        self._process: RouterProcess | None = None
        self._reader: threading.Thread | None = None
        self._began_s = 0.0
        self._next_start_s = 0.0
        """When to start it again; 0 while it runs or was never started."""
        self._pulse: Pulse | None = None
        self._hang_s = config.runtime.hang_s

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
        self._state.router_file.write_text(self.settings().model_dump_json(indent=1))
        self._process = self._spawn()
        self._began_s = time.monotonic()

    def settings(self) -> RouterConfig:
        """Return what the process is told."""
        listen = self._config.listen.model_copy(update={"port": self._port})
        return RouterConfig(
            map_path=str(self._state.shard_map_file),
            drain_s=self._config.runtime.drain_s,
            listen=listen,
            security=self._config.security,
            query=self._config.query,
            ping=self._config.ping,
            health=self._config.health,
            hedging=self._config.hedging,
            retries=self._config.retries,
            observability=self._config.observability.model_copy(update={"http": self._http}),
            admission=self._config.admission,
            degrade=self._config.degrade,
            faults_dir=faults_dir(self._state, self._config),
        )

    def _spawn(self) -> RouterProcess:
        """Start the process, which ends with this one."""
        with self._state.router_log.open("ab") as log:
            process = subprocess.Popen(
                [
                    *(sys.executable, "-P", "-m", "silvershard.deploy.router_process"),
                    *("--config", str(self._state.router_file), "--parent", str(os.getpid())),
                ],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        self._reader = threading.Thread(
            target=self._read_address, args=(process,), daemon=True, name="router-stdout"
        )
        self._reader.start()
        return process

    def _read_address(self, process: "subprocess.Popen[str]") -> None:
        assert process.stdout is not None
        with process.stdout as lines:
            for line in lines:
                self._hear(line)

    def _hear(self, line: str) -> None:
        """Take what the process says of where it listens."""
        told = json.loads(line)
        address = told.get("address", "")
        if address:
            self._port = int(address.rpartition(":")[2])
            self.http = self._http = told.get("http", "")
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
            self._ended(
                f"exit code {code}: {self.last_words()}"
                if code >= 0
                else f"ended by {signal.Signals(-code).name}"
            )
            return
        silent_s = self._feel()
        if silent_s >= self._hang_s:
            self._process.kill()
            self._process.wait()
            self._ended(f"hung for {silent_s:g} s and was killed")
        elif self.phase != "serving" and self._is_ready():
            self.phase, self.reason = "serving", ""

    def _ended(self, reason: str) -> None:
        self.phase, self.reason = "restarting", reason
        self._process = None
        self._disconnect()
        self._crashes.died(time.monotonic() - self._began_s)
        self._next_start_s = time.monotonic() + self._crashes.backoff_s

    def _feel(self) -> float:
        """Take the pulse; return for how long the router has been silent."""
        if self._pulse is None:
            if not self.address:
                return 0.0
            self._pulse = Pulse(self.address, self._dialer, every_s=_LOOK_S)
        self._pulse.poll()
        return self._pulse.silent_s

    def _is_ready(self) -> bool:
        """Return whether the router says that it serves.

        The first time it must have reached every shard; after a restart it is enough that it
        answers, because a shard may be lost for longer.
        """
        status = self._pulse.status if self._pulse is not None else None
        reached_all = bool(status == health_pb2.HealthCheckResponse.SERVING)
        return reached_all or (status is not None and self._may_lack_shards)

    @property
    def _may_lack_shards(self) -> bool:
        """Return whether it may serve before it has reached every shard."""
        return self.restarts > 0

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
        if self._reader is not None:
            self._reader.join(1.0)
        self._process = None

    def _disconnect(self) -> None:
        if self._pulse is not None:
            self._pulse.close()
            self._pulse = None

"""The router process, watched: started, and started again after a pause when it ends."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, Protocol

from grpc_health.v1 import health_pb2

from silvershard.cluster.config import RouterConfig
from silvershard.cluster.dialer import PLAIN, Dialer
from silvershard.deploy.config import Config
from silvershard.deploy.crash_loop import CrashLoop
from silvershard.deploy.fault_plan import faults_dir
from silvershard.deploy.pulse import Pulse
from silvershard.deploy.state import RouterPhase, RouterRecord, StateDir

_LOOK_S = 0.1
_REPLACE_S = 60.0
"""Within this time a process that takes the place of another one must be ready."""


_GRACE_S = 2.0
"""What a process has beside the time to drain before it is killed."""


class RouterProcess(Protocol):
    """What the watch needs of the process."""

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

    def leave(self) -> None:
        """Tell it to end because another one has taken its place."""
        ...

    def wait(self, timeout: float | None = None) -> int:
        """Wait until it has ended; raise ``subprocess.TimeoutExpired`` if that takes too long."""
        ...


_STEADY_S = 30.0
"""A router that lived this long was no part of a crash loop."""


def http_wanted(config: Config, number: int = 0) -> str:
    """Return where a router shall answer over HTTP: as configured, or at any port of that host.

    The further ones of a machine, from ``number`` 1 on, do so at the ports above.
    """
    http = config.observability.http
    if not http:
        return http
    host, _, port = http.rpartition(":")
    return f"{host}:{int(port) + number}" if config.listen.port and int(port) else f"{host}:0"


class Child(subprocess.Popen[str]):
    """A router process of this one."""

    def leave(self) -> None:
        """Tell it to end because another one has taken its place."""
        self.send_signal(signal.SIGUSR1)


class Told(NamedTuple):
    """What a process says of itself once it listens."""

    address: str
    own: str
    http: str
    release: str


def _told(line: str) -> Told | None:
    told = json.loads(line)
    address = told.get("address", "")
    own, http, release = (told.get(name, "") for name in ("own", "http", "release"))
    return Told(address, own, http, release) if address else None


def _numbered(path: Path, number: int) -> Path:
    """Return the file of the router of a number, where the first one has ``path``."""
    return path.with_stem(f"{path.stem}-{number}") if number else path


class RouterWatch:
    """The router process: started, watched, and started again when it ends."""

    def __init__(
        self, state: StateDir, config: Config, dialer: Dialer = PLAIN, *, number: int = 0
    ) -> None:
        """Start nothing yet; ``number`` is that of the router among those of the machine."""
        self.phase: RouterPhase = "starting"
        self.address = ""
        self.http = ""
        """``host:port`` of probes and metrics; empty: there are none."""
        self.reason = ""
        self.restarts = 0
        self.refused = ""
        """Why the process was not replaced when it was last asked for; empty: it was."""
        self._release = ""
        self._own = ""
        """Where health checks reach this process and no other one at its port."""
        self._number = number
        self._state = state
        self._config = config
        self._dialer = dialer
        self._port = config.listen.port
        self._http = http_wanted(config, number)
        self._crashes = CrashLoop(1 << 30, _STEADY_S)
        self._process: RouterProcess | None = None
        self._next: RouterProcess | None = None
        """The one that shall take its place."""
        self._next_told: Told | None = None
        self._leaving: RouterProcess | None = None
        """The one whose place was taken, as long as it answers what it was asked."""
        self._reader: threading.Thread | None = None
        self._began_s = 0.0
        self._replace_until_s = 0.0
        self._stop_until_s = 0.0
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
            release=self._release if running else "",
            restarts=self.restarts,
            reason=self.reason,
        )

    def start(self) -> None:
        """Start the process; call it on a thread that lives as long as the router shall."""
        self._write_settings()
        self._process = self._spawn(self._hear)
        self._began_s = time.monotonic()

    def replace(self) -> None:
        """Start a process in the place of the one that serves, which then ends in order.

        The new one shares the ports from when it has reached every shard; no request is refused.
        It is no error if none serves: then one starts anyhow.
        """
        self.refused = ""
        if self.phase == "serving" and not self.is_replacing:
            self._write_settings()
            self._next_told = None
            self._next = self._spawn(self._hear_next, f"--ready-within-s={_REPLACE_S:g}")
            self._replace_until_s = time.monotonic() + _REPLACE_S + _STEADY_S

    @property
    def is_replacing(self) -> bool:
        """Return whether a process is taking the place of another one."""
        return self._next is not None or self._leaving is not None

    def _write_settings(self) -> None:
        self._settings_file.write_text(self.settings().model_dump_json(indent=1))

    @property
    def _settings_file(self) -> Path:
        return _numbered(self._state.router_file, self._number)

    @property
    def _log_file(self) -> Path:
        return _numbered(self._state.router_log, self._number)

    def settings(self) -> RouterConfig:
        """Return what the process is told."""
        listen = self._config.listen.model_copy(update={"port": self._port})
        return RouterConfig(
            map_path=str(self._state.shard_map_file),
            drain_s=self._config.runtime.drain_s,
            listen=listen,
            shared=True,
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

    def _spawn(self, hear: Callable[[str], None], *more: str) -> RouterProcess:
        """Start a process, which ends with this one, and hear what it says."""
        with self._log_file.open("ab") as log:
            process = Child(
                [
                    *(sys.executable, "-P", "-m", "silvershard.deploy.router_process"),
                    *("--config", str(self._settings_file), "--parent", str(os.getpid()), *more),
                ],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        self._reader = threading.Thread(
            target=self._read_lines, args=(process, hear), daemon=True, name="router-stdout"
        )
        self._reader.start()
        return process

    @staticmethod
    def _read_lines(process: "subprocess.Popen[str]", hear: Callable[[str], None]) -> None:
        assert process.stdout is not None
        with process.stdout as lines:
            for line in lines:
                hear(line)

    def _hear(self, line: str) -> None:
        """Take what the process says of where it listens."""
        told = _told(line)
        if told is not None:
            self._take(told)

    def _hear_next(self, line: str) -> None:
        """Note what the next process says of where it listens."""
        self._next_told = _told(line) or self._next_told

    def _take(self, told: Told) -> None:
        self._port = int(told.address.rpartition(":")[2])
        self.http = self._http = told.http
        self._own = told.own
        self._release = told.release
        self.address = told.address

    def _poll_replacing(self) -> None:
        """Let the next process take the place of the present one, and that one end."""
        leaving, coming, now_s = self._leaving, self._next, time.monotonic()
        if leaving is not None:
            if leaving.poll() is None and now_s > self._replace_until_s:
                leaving.kill()
            if leaving.poll() is not None:
                self._leaving = None
            return
        if coming is None:
            return
        code = coming.poll()
        if code is None and now_s > self._replace_until_s:
            coming.kill()
            coming.wait()
            self._next, self.refused = None, "the one in its place hung and was killed"
        elif code is not None:
            self._next, self.refused = None, f"the one in its place ended: {self.last_words()}"
        elif self._next_told is not None:
            self._take_over(self._next_told)

    def _take_over(self, told: Told) -> None:
        """Let the next process be the one, and the present one end."""
        self._take(told)
        self._disconnect()
        self._leaving, self._process, self._next = self._process, self._next, None
        self._began_s = time.monotonic()
        self._replace_until_s = self._began_s + self._config.runtime.drain_s + _GRACE_S
        if self._leaving is not None:
            self._leaving.leave()

    def poll(self) -> None:
        """Look once; start the router again when it has ended and its pause is over."""
        self._poll_replacing()
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
        self._own = ""
        self._disconnect()
        self._crashes.died(time.monotonic() - self._began_s)
        self._next_start_s = time.monotonic() + self._crashes.backoff_s

    def _feel(self) -> float:
        """Take the pulse; return for how long the router has been silent."""
        if self._pulse is None:
            if not self._own:
                return 0.0
            self._pulse = Pulse(self._own, self._dialer, every_s=_LOOK_S)
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
            lines = self._log_file.read_text(errors="replace").splitlines()
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
        self.begin_stop()
        self.end_stop()

    def begin_stop(self) -> None:
        """Tell the process to end; ``end_stop`` waits for it."""
        self._disconnect()
        self._next_start_s = 0.0
        self._stop_until_s = time.monotonic() + self._config.runtime.drain_s + _GRACE_S
        for process in self._processes:
            if process.poll() is None:
                process.terminate()

    def has_stopped(self) -> bool:
        """Return whether the process has ended after ``begin_stop``; kill it once it must have."""
        now_s = time.monotonic()
        living = [one for one in self._processes if one.poll() is None]
        for process in living if now_s > self._stop_until_s else ():
            process.kill()
        return not living

    @property
    def _processes(self) -> list[RouterProcess]:
        found = (self._next, self._leaving, self._process)
        return [one for one in found if one is not None]

    def end_stop(self) -> None:
        """Wait until the process has ended, and kill it if that takes too long."""
        for process in self._processes:
            try:
                process.wait(max(self._stop_until_s - time.monotonic(), 0.0))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if self._reader is not None:
            self._reader.join(1.0)
        self._next = self._leaving = self._process = None

    def _disconnect(self) -> None:
        if self._pulse is not None:
            self._pulse.close()
            self._pulse = None

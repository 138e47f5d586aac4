"""The router of one host of several: it outlives who started it, and whoever comes next adopts it.

Ray ends what runs under it, such as an agent, when its node starts again or loses its head; the
router goes on meanwhile, with the last shard map that it found.
"""

import contextlib
import json
import signal
import subprocess
import sys
from pathlib import Path

import pydantic

from silvershard.cluster.dialer import peer_dialer
from silvershard.deploy.config import Config
from silvershard.deploy.processes import Process, is_alive, send_signal, wait_gone
from silvershard.deploy.router_watch import RouterProcess, RouterWatch
from silvershard.deploy.state import StateDir

_START_S = 30.0
_FOREVER_S = 1e9


class RouterDir(StateDir):
    """The state directory of a host, in which its router has a place of its own.

    The directory may be the same one on several hosts: all that they share there is what they would
    have written alike.
    """

    def __init__(self, state: StateDir, host: str) -> None:
        """Make the place of the router of a host."""
        super().__init__(state.root)
        self.place = state.root / "hosts" / host
        self.place.mkdir(mode=0o700, parents=True, exist_ok=True)

    @property
    def router_file(self) -> Path:
        """Return the settings of the router process."""
        return self.place / "router.json"

    @property
    def router_log(self) -> Path:
        """Return the log of the router."""
        return self.place / "router.log"


class Detached:
    """A process that is no child of this one."""

    def __init__(self, process: Process) -> None:
        self._process = process

    @property
    def pid(self) -> int:
        """Return its number."""
        return self._process.pid

    def poll(self) -> int | None:
        """Return None while it runs; nobody but its parent learns an exit code, so 1 then."""
        return None if is_alive(self._process) else 1

    def kill(self) -> None:
        """Kill it."""
        send_signal(self._process, signal.SIGKILL)

    def terminate(self) -> None:
        """Tell it to end."""
        send_signal(self._process, signal.SIGTERM)

    def wait(self, timeout: float | None = None) -> int:
        """Wait until it has ended."""
        if wait_gone([self._process], _FOREVER_S if timeout is None else timeout):
            raise subprocess.TimeoutExpired("router", timeout or 0.0)
        return 1


class HostRouter(RouterWatch):
    """The router process of a host, which need not be started by who watches it."""

    def __init__(self, place: RouterDir, config: Config) -> None:
        """Prepare; nothing runs yet, or an earlier agent has started it."""
        super().__init__(place, config, peer_dialer(config.security.peers))
        self._place = place
        self._pid_file = place.place / "router.pid"
        self._said_file = place.place / "router.said"
        self._adopted = False

    def start(self) -> None:
        """Start the process, or adopt the one that runs with the same settings."""
        running = self._running()
        if running is not None and self._is_same():
            self._adopted = True
            self._process = Detached(running)
            return
        self.stop()
        super().start()

    def _is_same(self) -> bool:
        """Return whether the settings in the file are those that it would be started with."""
        try:
            return self._place.router_file.read_text() == self.settings().model_dump_json(indent=1)
        except OSError:
            return False

    def poll(self) -> None:
        """Look once; start the router again when it has ended and its pause is over."""
        self._read_said()
        super().poll()

    def stop(self) -> None:
        """End the process in order, also one that was not adopted yet."""
        running = self._running()
        if self._process is None and running is not None:
            self._process = Detached(running)
        super().stop()
        for path in (self._pid_file, self._said_file, self._place.router_file):
            path.unlink(missing_ok=True)

    def _spawn(self) -> RouterProcess:
        self._pid_file.unlink(missing_ok=True)
        with self._place.router_log.open("ab") as log, self._said_file.open("wb") as said:
            subprocess.run(
                [
                    *(sys.executable, "-P", "-m", "silvershard.deploy.router_process"),
                    *("--config", str(self._place.router_file)),
                    *("--detach", str(self._pid_file)),
                ],
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=log,
                check=False,
                timeout=_START_S,
            )
        running = self._running()
        if running is None:
            # It ended at once, with its reason in the log.
            return Detached(Process(pid=1 << 22, started=0, boot=""))
        return Detached(running)

    def _running(self) -> Process | None:
        with contextlib.suppress(OSError, pydantic.ValidationError):
            found = Process.model_validate_json(self._pid_file.read_bytes())
            if is_alive(found):
                return found
        return None

    def _read_said(self) -> None:
        if self._process is None or self.address:
            return
        with contextlib.suppress(OSError, json.JSONDecodeError):
            for line in self._said_file.read_text().splitlines():
                self._hear(line)

    @property
    def _may_lack_shards(self) -> bool:
        return self._adopted or super()._may_lack_shards

"""The router of one host of several: it outlives who started it, and whoever comes next adopts it.

Ray ends what runs under it, such as an agent, when its node starts again or loses its head; the
router goes on meanwhile, with the last shard map that it found.
"""

import contextlib
import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pydantic

from silvershard.cluster.config import RouterConfig
from silvershard.cluster.dialer import peer_dialer
from silvershard.deploy.config import Config
from silvershard.deploy.processes import Process, is_alive, send_signal, wait_gone
from silvershard.deploy.router_watch import RouterProcess, RouterWatch, Told
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

    def leave(self) -> None:
        """Tell it to end because another one has taken its place."""
        send_signal(self._process, signal.SIGUSR1)

    def wait(self, timeout: float | None = None) -> int:
        """Wait until it has ended."""
        if wait_gone([self._process], _FOREVER_S if timeout is None else timeout):
            raise subprocess.TimeoutExpired("router", timeout or 0.0)
        return 1


class _Files(NamedTuple):
    """What a router that is no child of its watch leaves behind."""

    pid: Path
    said: Path

    def running(self) -> Process | None:
        """Return the process, None if it does not run."""
        with contextlib.suppress(OSError, pydantic.ValidationError):
            found = Process.model_validate_json(self.pid.read_bytes())
            if is_alive(found):
                return found
        return None

    def read(self, hear: Callable[[str], None]) -> None:
        """Take what it has said so far."""
        with contextlib.suppress(OSError, json.JSONDecodeError):
            for line in self.said.read_text().splitlines():
                hear(line)

    def end(self) -> None:
        """Kill it, if it still runs."""
        running = self.running()
        if running is not None:
            send_signal(running, signal.SIGKILL)
        self.remove()

    def remove(self) -> None:
        """Forget it."""
        self.pid.unlink(missing_ok=True)
        self.said.unlink(missing_ok=True)


class HostRouter(RouterWatch):
    """The router process of a host, which need not be started by who watches it."""

    def __init__(self, place: RouterDir, config: Config) -> None:
        """Prepare; nothing runs yet, or an earlier agent has started it."""
        super().__init__(place, config, peer_dialer(config.security.peers))
        self._place = place
        self._files = _Files(place.place / "router.pid", place.place / "router.said")
        self._coming_files = _Files(place.place / "coming.pid", place.place / "coming.said")
        self._adopted = False

    def start(self) -> None:
        """Start the process, or adopt the one that runs with the same settings."""
        running = self._files.running()
        if running is not None and self._is_same():
            self._adopted = True
            self._process = Detached(running)
            return
        self.stop()
        super().start()

    def _is_same(self) -> bool:
        """Return whether the settings in the file are those that it would be started with."""
        try:
            # Another release may have written them.
            text = self._place.router_file.read_bytes()
            return RouterConfig.model_validate_json(text) == self.settings()
        except (OSError, pydantic.ValidationError):
            return False

    def poll(self) -> None:
        """Look once; start the router again when it has ended and its pause is over."""
        if self._process is not None and not self._own:
            self._files.read(self._hear)
        if self._next is None:
            # One that an agent had started which has ended since.
            self._coming_files.end()
        elif self._next_told is None:
            self._coming_files.read(self._hear_next)
        super().poll()

    def stop(self) -> None:
        """End the process in order, also one that was not adopted yet."""
        running = self._files.running()
        if self._process is None and running is not None:
            self._process = Detached(running)
        super().stop()
        self._coming_files.end()
        self._files.remove()
        self._place.router_file.unlink(missing_ok=True)

    def _spawn(self, hear: Callable[[str], None], *more: str) -> RouterProcess:
        files = self._coming_files if hear == self._hear_next else self._files
        files.pid.unlink(missing_ok=True)
        with self._place.router_log.open("ab") as log, files.said.open("wb") as said:
            subprocess.run(
                [
                    *(sys.executable, "-P", "-m", "silvershard.deploy.router_process"),
                    *("--config", str(self._place.router_file), *more),
                    *("--detach", str(files.pid)),
                ],
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=log,
                check=False,
                timeout=_START_S,
            )
        running = files.running()
        if running is None:
            # It ended at once, with its reason in the log.
            return Detached(Process(pid=1 << 22, started=0, boot=""))
        return Detached(running)

    def _take_over(self, told: Told) -> None:
        self._coming_files.pid.replace(self._files.pid)
        self._coming_files.said.replace(self._files.said)
        super()._take_over(told)

    @property
    def _may_lack_shards(self) -> bool:
        return self._adopted or super()._may_lack_shards

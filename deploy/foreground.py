"""A cluster that runs as long as its command: what containers and service managers start.

Source: systemd, sd_notify(3), "Notifications".
"""

import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any

from silvershard.deploy import launch, operate
from silvershard.deploy.config import Config
from silvershard.deploy.errors import ExitCode
from silvershard.deploy.state import StateDir

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_SOCKET_VARIABLE = "NOTIFY_SOCKET"


def run(
    state: StateDir,
    config: Config,
    *,
    generation: int | None,
    ready: Callable[[dict[str, Any]], None],
    environ: Mapping[str, str] = os.environ,
) -> ExitCode:
    """Run a cluster until it is told to stop or ends; then no process of it is left.

    SIGTERM, SIGINT and SIGHUP stop it in order: requests in flight are finished.

    Args:
        state: the directory to run on.
        config: settings.
        generation: its number, or 0 or None as for ``launch.choose_generation``.
        ready: hears what runs once every document is served.
        environ: where a service manager says how it wants to be told.

    Returns:
        OK if it was told to stop, here or by ``down``; FAILED if it ended by itself.

    Raises:
        CommandError: if it cannot start, or a process cannot be ended.
    """
    over = threading.Event()
    ended: list[int] = []

    def note_end(code: int) -> None:
        ended.append(code)
        over.set()

    record, seconds = operate.start(
        state, config, generation=generation, detached=False, ended=note_end
    )
    with _signals_set(over):
        try:
            ready({**operate.described(record), "seconds": round(seconds, 1)})
            notify(environ, f"READY=1\nSTATUS=serving generation {record.generation}")
            over.wait()
            failed = bool(ended and ended[0])
            notify(environ, "STOPPING=1")
        finally:
            # Of a cluster that has ended it cleans up what is left.
            launch.stop(state, timeout_s=config.runtime.stop_timeout_s)
    return ExitCode.FAILED if failed else ExitCode.OK


def notify(environ: Mapping[str, str], text: str) -> None:
    """Tell systemd, if it started this process and wants to know.

    Args:
        environ: names its socket.
        text: assignments as sd_notify(3) defines them, one per line.
    """
    path = environ.get(_SOCKET_VARIABLE, "")
    if not path:
        return
    # A name that begins with @ stands for one outside the file system.
    address = f"\0{path[1:]}" if path.startswith("@") else path
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
        sender.connect(address)
        sender.sendall(text.encode())


@contextmanager
def _signals_set(event: threading.Event) -> Iterator[None]:
    """Set an event at every signal to stop, instead of what they did before."""

    def note(number: int, frame: FrameType | None) -> None:
        event.set()

    before = {one: signal.signal(one, note) for one in _SIGNALS}
    try:
        yield
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)

"""The guard of a cluster: it starts the driver, passes signals on, and leaves no process behind.

It is the parent of every process of the cluster, also of those whose own parent was killed, so it
knows what to clean up. If the guard itself is killed, the kernel tells the driver to stop, and the
driver cleans up. If both are killed at once, the next ``up`` or ``down`` does, from the record.

It needs no setting: the driver reads what to launch from the standard input that both share.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from silvershard.deploy.processes import (
    Process,
    adopt_orphans,
    descendants,
    die_with_parent,
    identify,
    kill_all,
    send_signal,
    wait_until,
)
from silvershard.deploy.state import StateDir, remove_ray_dir

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_TICK_S = 1.0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="silvershard.deploy.guard", description=__doc__)
    parser.add_argument("--state", type=Path, required=True)
    parser.add_argument("--lock-fd", type=int, required=True)
    parser.add_argument("--status-fd", type=int, required=True)
    parser.add_argument("--ray-dir", required=True)
    parser.add_argument("--stop-timeout-s", type=float, required=True)
    parser.add_argument("--parent", type=int, default=0, help="end with this process")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a driver until it ends; return its exit code."""
    options = _parse(argv)
    # Signals wait in a queue that the loop below reads; the driver undoes this for itself.
    signal.pthread_sigmask(signal.SIG_BLOCK, {*_SIGNALS, signal.SIGCHLD})
    if options.parent:
        die_with_parent(options.parent)
    code, left = run_guarded(
        [
            *(sys.executable, "-P", "-m", "silvershard.deploy.serve"),
            *("--state", str(options.state), "--lock-fd", str(options.lock_fd)),
            *("--status-fd", str(options.status_fd), "--ray-dir", options.ray_dir),
            *("--guard", str(os.getpid())),
        ],
        lock_fd=options.lock_fd,
        status_fd=options.status_fd,
        stop_timeout_s=options.stop_timeout_s,
    )
    for process in left:
        print(f"process {process.pid} could not be ended", file=sys.stderr)
    remove_ray_dir(options.ray_dir)
    if not left:
        StateDir(options.state).clear_record()
    return code


def run_guarded(
    command: Sequence[str], *, lock_fd: int, status_fd: int, stop_timeout_s: float
) -> tuple[int, list[Process]]:
    """Run a driver and end whatever is left of its descendants when it has ended.

    SIGTERM, SIGINT and SIGHUP, which must be blocked, are passed on as SIGTERM.

    Args:
        command: of the driver.
        lock_fd: descriptor that driver and guard both hold.
        status_fd: descriptor that only the driver holds.
        stop_timeout_s: how long a driver that was told to stop may take before it is killed.

    Returns:
        The exit code of the driver, and the processes that could not be ended.
    """
    adopt_orphans()
    driver = subprocess.Popen(command, pass_fds=(lock_fd, status_fd))
    identity = identify(driver.pid)
    # Only the driver may hold the pipe, so that its reader sees the end when the driver ends.
    os.close(status_fd)
    code = _wait(driver, identity, stop_timeout_s)
    own = os.getpid()
    return code, wait_until(lambda: _kill_descendants(own), 10.0)


def _wait(driver: subprocess.Popen[bytes], identity: Process | None, grace_s: float) -> int:
    """Wait for the driver to end, passing signals on; kill it if it does not end when told to."""
    kill_at_s: float | None = None
    while True:
        received = signal.sigtimedwait({*_SIGNALS, signal.SIGCHLD}, _TICK_S)
        if received is not None and received.si_signo in _SIGNALS and identity is not None:
            send_signal(identity, signal.SIGTERM)
            kill_at_s = kill_at_s or time.monotonic() + grace_s
        if driver.poll() is not None:
            return driver.returncode if driver.returncode >= 0 else 128 - driver.returncode
        _reap(driver.pid)
        if kill_at_s is not None and identity is not None and time.monotonic() > kill_at_s:
            send_signal(identity, signal.SIGKILL)


def _reap(driver: int) -> None:
    """Collect adopted children that have ended; the driver's own end is left to its owner."""
    for entry in Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split():
        pid = int(entry)
        if pid != driver:
            try:
                os.waitpid(pid, os.WNOHANG)
            except ChildProcessError:
                continue


def _kill_descendants(own: int) -> list[Process]:
    """Kill what is left below the guard; return what was there."""
    left = descendants(own)
    kill_all(left, 1.0)
    _reap(0)
    return left


if __name__ == "__main__":
    sys.exit(main())

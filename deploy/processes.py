"""Processes of this machine, identified so that a number that was reused is never mistaken.

A process is its pid, the tick of its start and the boot that it belongs to. Signals go through a
pidfd that is opened before the identity is checked, so the check cannot go stale. Linux only.
"""

import contextlib
import ctypes
import os
import signal
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from pydantic import Field

from silvershard.cluster.document import Document

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_POLL_S = 0.01
_NICENESS = 10


class Process(Document):
    """One process, told apart from any other that had or will have its pid."""

    pid: int = Field(gt=0, description="process id")
    started: int = Field(ge=0, description="clock ticks from boot to the start of the process")
    boot: str = Field(description="id of the boot that the ticks count from")


def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _stat(pid: int) -> tuple[int, int] | None:
    """Return parent and start ticks of a process, or None where there is none; zombies are none."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The name in parentheses may itself hold spaces and parentheses.
    fields = text[text.rindex(")") + 2 :].split()
    # A process whose first thread has ended holds its files until the last one has.
    if fields[0] in "ZX" and int(fields[17]) <= 1:
        return None
    return int(fields[1]), int(fields[19])


def step_back() -> None:
    """Take what others leave of the processors from now on, as long as they need them."""
    os.nice(_NICENESS)
    # What is loaded from now on computes on one thread.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if os.getsid(0) == os.getpid():
        # Where the kernel shares processors among sessions first, each has a niceness of its own.
        with contextlib.suppress(OSError):
            Path("/proc/self/autogroup").write_text(str(_NICENESS))


def identify(pid: int) -> Process | None:
    """Return the identity of the process that has ``pid`` now, or None; zombies are gone."""
    found = _stat(pid)
    return None if found is None else Process(pid=pid, started=found[1], boot=_boot_id())


def myself() -> Process:
    """Return the identity of this process."""
    mine = identify(os.getpid())
    assert mine is not None
    return mine


def is_alive(process: Process) -> bool:
    """Return whether the process still runs."""
    return identify(process.pid) == process


def send_signal(process: Process, number: signal.Signals) -> bool:
    """Send a signal to exactly this process; return whether it was there to receive it."""
    try:
        handle = os.pidfd_open(process.pid)
    except ProcessLookupError:
        return False
    try:
        if not is_alive(process):
            return False
        signal.pidfd_send_signal(handle, number)
    except ProcessLookupError:
        return False
    finally:
        os.close(handle)
    return True


class Processes:
    """The processes of this machine, as those see them who watch some."""

    def identify(self, pid: int) -> Process | None:
        """Return the identity of the process that has ``pid`` now, or None."""
        return identify(pid)

    def is_alive(self, process: Process) -> bool:
        """Return whether the process still runs."""
        return is_alive(process)

    def kill(self, process: Process) -> bool:
        """Kill exactly this process; return whether it was there."""
        return send_signal(process, signal.SIGKILL)


def descendants(pid: int) -> list[Process]:
    """Return the living children of ``pid``, their children and so on, parents first."""
    parents: dict[int, list[tuple[int, int]]] = {}
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            found = _stat(int(entry.name))
            if found is not None:
                parents.setdefault(found[0], []).append((int(entry.name), found[1]))
    boot = _boot_id()
    tree: list[Process] = []
    level = [pid]
    while level:
        born = sorted(child for parent in level for child in parents.get(parent, ()))
        tree += [Process(pid=child, started=started, boot=boot) for child, started in born]
        level = [child for child, _ in born]
    return tree


def wait_gone(processes: Iterable[Process], timeout_s: float) -> list[Process]:
    """Wait until the processes have ended; return those that still run when the time is up."""
    return wait_until(lambda: [one for one in processes if is_alive(one)], timeout_s)


def wait_until(remaining: Callable[[], list[Process]], timeout_s: float) -> list[Process]:
    """Wait until ``remaining`` returns nothing; return what it gave when the time is up."""
    give_up_s = time.monotonic() + timeout_s
    while left := remaining():
        if time.monotonic() >= give_up_s:
            return left
        time.sleep(_POLL_S)
    return []


def kill_all(processes: Iterable[Process], timeout_s: float = 5.0) -> list[Process]:
    """Kill the processes; return those that still run when the time is up."""
    doomed = list(processes)
    for process in doomed:
        send_signal(process, signal.SIGKILL)
    return wait_gone(doomed, timeout_s)


def die_with_parent(parent: int, number: signal.Signals = signal.SIGTERM) -> None:
    """Have the kernel send ``number`` to this process when its parent ends.

    Args:
        parent: pid that the parent had when it started this process; if it is gone already, the
            signal is raised here at once.
        number: the signal.
    """
    _prctl(_PR_SET_PDEATHSIG, int(number))
    if os.getppid() != parent:
        signal.raise_signal(number)


def adopt_orphans() -> None:
    """Make this process the parent of every descendant whose own parent ends.

    Without it they would belong to init, and nobody could prove whose they were.
    """
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def _prctl(option: int, value: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, value, 0, 0, 0):
        code = ctypes.get_errno()
        raise OSError(code, f"prctl({option}, {value}): {os.strerror(code)}")

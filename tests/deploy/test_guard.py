import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from silvershard.deploy.processes import descendants, wait_gone

Guard = Callable[..., "tuple[subprocess.Popen[str], str]"]

# A driver of the given behaviour with a child and an orphan whose own parent is gone.
FAMILY = """
import os, signal, subprocess, sys, time
sleep = [sys.executable, '-c', 'import time; time.sleep(60)']
fork = f'import subprocess; subprocess.Popen({sleep!r}, start_new_session=True)'
subprocess.Popen(sleep)
subprocess.run([sys.executable, '-c', fork])
"""
READY = "\nos.write(int(sys.argv[1]), b'ready\\n')\n"

PROGRAM = """
import os, signal, sys
from silvershard.deploy.guard import run_guarded
signals = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD}
signal.pthread_sigmask(signal.SIG_BLOCK, signals)
lock_fd, status_fd = int(sys.argv[1]), int(sys.argv[2])
code, left = run_guarded(
    [sys.executable, '-P', '-c', sys.argv[3], str(status_fd)],
    lock_fd=lock_fd, status_fd=status_fd, stop_timeout_s=float(sys.argv[4]),
)
print(code, len(left))
"""
UNBLOCK = "\nsignal.pthread_sigmask(signal.SIG_SETMASK, set())\n"


@pytest.fixture
def guard() -> Iterator[Guard]:
    """Start a guard over a driver; the second value is what the driver said before its end."""
    with ExitStack() as stack:

        def start(driver: str, *, grace_s: float = 20.0) -> "tuple[subprocess.Popen[str], str]":
            readable, writable = os.pipe()
            lock = os.open(os.devnull, os.O_RDONLY)
            process = subprocess.Popen(
                [
                    *(sys.executable, "-P", "-c", PROGRAM),
                    *(str(lock), str(writable), driver, str(grace_s)),
                ],
                stdout=subprocess.PIPE,
                text=True,
                pass_fds=(lock, writable),
            )
            stack.enter_context(process)
            stack.callback(process.terminate)
            os.close(writable)
            os.close(lock)
            with os.fdopen(readable) as told:
                said = told.readline()
            return process, said

        yield start


def ended(process: "subprocess.Popen[str]") -> str:
    out, _ = process.communicate(timeout=30)
    return out.strip()


def test_whatever_a_killed_driver_leaves_is_ended(guard: Guard) -> None:
    process, said = guard(FAMILY + READY + "os.kill(os.getpid(), signal.SIGSTOP)")
    assert said == "ready\n"
    family = descendants(process.pid)
    assert len(family) == 3
    os.kill(family[0].pid, signal.SIGKILL)
    assert ended(process) == f"{128 + signal.SIGKILL} 0"
    assert wait_gone(family, 1.0) == []


def test_the_exit_code_of_the_driver_is_that_of_the_guard(guard: Guard) -> None:
    process, said = guard("import os, sys" + READY + "sys.exit(4)")
    assert (said, ended(process)) == ("ready\n", "4 0")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_stops_the_driver_in_order(guard: Guard, number: signal.Signals) -> None:
    driver = "signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))" + UNBLOCK
    process, _ = guard(FAMILY + driver + READY + "time.sleep(60)")
    family = descendants(process.pid)
    process.send_signal(number)
    assert ended(process) == "7 0"
    assert wait_gone(family, 1.0) == []


def test_a_driver_that_does_not_stop_is_killed(guard: Guard) -> None:
    stubborn = "signal.signal(signal.SIGTERM, signal.SIG_IGN)" + UNBLOCK
    process, _ = guard(FAMILY + stubborn + READY + "time.sleep(60)", grace_s=0.1)
    process.terminate()
    assert ended(process) == f"{128 + signal.SIGKILL} 0"


def test_the_status_ends_when_the_driver_ends(guard: Guard) -> None:
    # Reading the first line only returns because nobody but the driver holds the other end.
    process, said = guard(FAMILY + "sys.exit(1)")
    assert (said, ended(process)) == ("", "1 0")

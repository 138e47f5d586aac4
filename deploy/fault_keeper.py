"""The process that keeps up a fault which its victim cannot undo: a stop, or a damaged file.

It undoes it when the time is over by its own clock, when the fault is cleared, or when it is told
to end. So whoever ordered the fault may be gone by then.
"""

import argparse
import os
import shutil
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from silvershard.cluster.faults import FaultRecord, Faults, read_faults
from silvershard.cluster.logs import log_to_stderr
from silvershard.deploy.processes import Process, is_alive, send_signal

_LOOK_S = 0.05


def keep_up(directory: Path, name: str, victim: Process | None, ended: threading.Event) -> bool:
    """Do a fault, wait until it is over, and undo it; return False if it is not written down.

    Args:
        directory: where it is written down.
        name: of the fault.
        victim: process that is stopped, where it is one.
        ended: ends it before its time.
    """
    found = [one for one in read_faults(directory) if one.name == name and one.state == "active"]
    if not found:
        return False
    began_unix_s = found[0].began_unix_s
    # Its time begins with it, however long this process took to start.
    faults = Faults(directory, lambda fault: fault.name == name, unix_clock=lambda: began_unix_s)
    with stopped(victim) if victim is not None else damaged(found[0]):
        # What it says is that the fault is there.
        faults.look()
        while faults.holds(name) and (victim is None or is_alive(victim)):
            if ended.wait(_LOOK_S):
                break
            faults.look()
    return True


@contextmanager
def stopped(victim: Process) -> Iterator[None]:
    """Let a process stand still."""
    try:
        send_signal(victim, signal.SIGSTOP)
        yield
    finally:
        send_signal(victim, signal.SIGCONT)


@contextmanager
def damaged(fault: FaultRecord) -> Iterator[None]:
    """Change a byte of a file, but of no other that is linked to it."""
    path = Path(fault.path)
    if path.stat().st_nlink > 1:
        own = path.with_name(f".{path.name}.own")
        shutil.copy2(path, own)
        own.replace(path)
    try:
        _swap_byte(fault, fault.byte, fault.byte ^ 0xFF)
        yield
    finally:
        repair(fault)


def repair(fault: FaultRecord) -> None:
    """Write a byte of a file as it was, where it is damaged; repairing twice is harmless."""
    _swap_byte(fault, fault.byte ^ 0xFF, fault.byte)


def _swap_byte(fault: FaultRecord, old: int, new: int) -> None:
    """Replace the byte that a fault is about; another byte, or a file that is gone, stays so."""
    try:
        descriptor = os.open(fault.path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        if os.pread(descriptor, 1, fault.offset) == bytes((old,)):
            os.pwrite(descriptor, bytes((new,)), fault.offset)
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def main(argv: Sequence[str] | None = None) -> int:
    """Keep up one fault; return the exit code."""
    parser = argparse.ArgumentParser(prog="silvershard.deploy.fault_keeper", description=__doc__)
    parser.add_argument("--directory", type=Path, required=True)
    parser.add_argument("--fault", required=True)
    parser.add_argument("--victim", default="", help="Process as JSON")
    parser.add_argument("--after-s", type=float, default=0.0)
    options = parser.parse_args(argv)
    ended = threading.Event()
    signal.signal(signal.SIGTERM, lambda number, frame: ended.set())
    log_to_stderr()
    if ended.wait(options.after_s):
        return 0
    victim = Process.model_validate_json(options.victim) if options.victim else None
    return 0 if keep_up(options.directory, options.fault, victim, ended) else 1


if __name__ == "__main__":
    sys.exit(main())

"""How a command waits for the driver, which does what is wanted in the control store."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from silvershard.deploy.control_store import Control, ControlStore, Operation
from silvershard.deploy.errors import CommandError, Refused, TimedOut
from silvershard.deploy.state import StateDir

_POLL_S = 0.05

Report = Callable[[str], None]


def refuse_if_busy(control: Control) -> None:
    """Return if nothing is going on in a cluster.

    Raises:
        Refused: if something is.
    """
    going = control.current
    if going is not None:
        raise Refused(
            f"{going.what} is going on since {time.time() - going.began_unix_s:.0f} s: "
            "wait until it has ended"
        )


def awaited(
    state: StateDir,
    store: ControlStore,
    operation: Operation,
    *,
    until_s: float,
    report: Report,
    unless: str,
) -> Operation:
    """Wait until what was wanted has ended, and return what became of it.

    Args:
        state: of the cluster.
        store: its control store.
        operation: what was wanted, and is in the store.
        until_s: reading of the monotonic clock at which the wait ends.
        report: hears how far it is.
        unless: what is so in words as long as it is not done.

    Raises:
        CommandError: if the cluster ends meanwhile.
        TimedOut: if it is not done in time; it goes on.
    """
    with _called_off_if_interrupted(store, operation.operation_id):
        return _wait(state, store, operation, until_s, report, unless)


def _wait(
    state: StateDir,
    store: ControlStore,
    operation: Operation,
    until_s: float,
    report: Report,
    unless: str,
) -> Operation:
    said = ""
    while True:
        found = store.read().operation(operation.operation_id)
        if found is not None and found.progress and found.progress != said:
            said = found.progress
            report(said)
        if found is None or found.has_ended:
            return found or operation.ended("abandoned", "it was forgotten")
        record = state.read_record()
        if record is None or not record.runs:
            raise CommandError("the cluster ended before it was done; what it served is as was")
        if time.monotonic() > until_s:
            raise TimedOut(
                f"{unless} yet{f', {said}' if said else ''}: it goes on, see `silvershard status`"
            )
        time.sleep(_POLL_S)


@contextmanager
def _called_off_if_interrupted(store: ControlStore, operation_id: str) -> Iterator[None]:
    """End an operation whose command a person ends; one that times out goes on."""
    try:
        yield
    except Exception:
        raise
    except BaseException:
        store.call_off(operation_id, "its command was interrupted")
        raise

"""Changing how many routers a machine has: ``scale --routers``."""

import time
from collections.abc import Mapping
from typing import Any

from silvershard.deploy.activate import running
from silvershard.deploy.errors import CommandError, ExitCode, Refused, TimedOut
from silvershard.deploy.state import ClusterRecord, StateDir

_POLL_S = 0.1
_MOST = 64


def scale_routers(
    state: StateDir, number: int, *, dry_run: bool = False, timeout_s: float
) -> dict[str, Any]:
    """Give a running cluster of one machine another number of routers; return what was done.

    They share their port. One that is too many ends after the requests that it has. The next
    ``up`` starts as many as the settings say.

    Args:
        state: of the cluster.
        number: how many there shall be.
        dry_run: change nothing.
        timeout_s: longest wait.

    Raises:
        Refused: if the cluster has several hosts.
        CommandError: if none runs, or the number is out of bounds.
        TimedOut: if not all of them serve in time; they go on starting.
    """
    began_s = time.monotonic()
    if not 1 <= number <= _MOST:
        raise CommandError(f"routers must be in 1..{_MOST}, got {number}", ExitCode.USAGE)
    record = running(state)
    if record.ray:
        raise Refused(
            "the number of routers is not changed: on which of several hosts there is one is said "
            "by `up --routers`"
        )
    document = {"before": _number(record), "after": number}
    if not dry_run:
        state.control.change(lambda now: now.model_copy(update={"routers": number}))
        while not _is_done(running(state), number):
            if time.monotonic() > began_s + timeout_s:
                raise TimedOut(f"not {number} routers serve after {timeout_s:g} s: it goes on")
            time.sleep(_POLL_S)
    return {**document, "done": not dry_run, "seconds": round(time.monotonic() - began_s, 2)}


def _number(record: ClusterRecord) -> int:
    return len(record.routers) or 1


def _is_done(record: ClusterRecord, number: int) -> bool:
    routers = record.routers or (record.router,)
    return len(routers) == number and all(one.state == "serving" for one in routers)


def render(document: Mapping[str, Any]) -> str:
    """Return what was done for people."""
    before, after = document["before"], document["after"]
    if not document["done"]:
        return f"would go from {before} to {after} routers"
    return f"scaled from {before} to {after} routers in {document['seconds']} s"

"""Restarting the processes of a running cluster one by one: ``restart``."""

import time
from collections.abc import Mapping
from typing import Any

from silvershard.deploy.activate import running
from silvershard.deploy.carry_out import Report, awaited, refuse_if_busy
from silvershard.deploy.control_store import Control, wanted
from silvershard.deploy.errors import CommandError
from silvershard.deploy.state import StateDir


def restart(
    state: StateDir, *, dry_run: bool = False, timeout_s: float, report: Report
) -> dict[str, Any]:
    """Restart shard processes, routers and sequencer of a cluster that serves on.

    Args:
        state: of the cluster.
        dry_run: say what would be done, and change nothing.
        timeout_s: longest wait.
        report: hears how far it is, a line at a time.

    Raises:
        Refused: if something else is going on.
        CommandError: if no cluster runs, or it could not be done; what was restarted stays so.
        TimedOut: if it is not done in time; it goes on.
    """
    began_s = time.monotonic()
    record = running(state)
    extra = len({one.replica for one in record.shards}) == 1
    routers = len(record.routers) or 1
    document = {"processes": len(record.shards), "routers": routers, "extra": extra}
    if dry_run:
        return {**document, "done": False, "seconds": 0.0}
    store = state.control
    operation = wanted("restart", 0, "live")

    def make(now: Control) -> Control:
        refuse_if_busy(now)
        return now.with_operation(operation)

    store.change(make)
    ended = awaited(
        state,
        store,
        operation,
        until_s=began_s + timeout_s,
        report=report,
        unless="not every process is restarted",
    )
    if ended.state != "done":
        raise CommandError(f"not every process is restarted: {ended.reason or ended.state}")
    return {**document, "done": True, "seconds": round(time.monotonic() - began_s, 2)}


def render(document: Mapping[str, Any]) -> str:
    """Return what was done for people."""
    routers, seconds = document["routers"], document["seconds"]
    number = f"{document['processes']} shard processes and {routers} router{'s' * (routers > 1)}"
    if document["done"]:
        return f"restarted {number} one after the other in {seconds} s"
    extra = ", with a further copy of every shard meanwhile" if document["extra"] else ""
    return f"would restart {number} one after the other{extra}"

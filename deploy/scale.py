"""Changing how many shard processes a running cluster has: ``scale`` as commands see it.

A command plans and writes what it wants into the control store; the driver of the cluster does it.

Shapes: S shards, R replicas.
"""

import time
from collections.abc import Mapping
from typing import Any

from silvershard.deploy.activate import running
from silvershard.deploy.carry_out import Report, awaited, refuse_if_busy
from silvershard.deploy.cluster_size import SIZE_LIMITS, ClusterSize, Scaled, size_of
from silvershard.deploy.config import Config
from silvershard.deploy.control_store import Control, wanted
from silvershard.deploy.errors import CommandError, ExitCode, Refused
from silvershard.deploy.fleet import check_new_copies
from silvershard.deploy.host_fleet import fleet_of
from silvershard.deploy.scale_plan import render
from silvershard.deploy.state import StateDir
from silvershard.shard.generations import generation_dir
from silvershard.shard.outline import Outline, read_outline


def scale(
    state: StateDir,
    config: Config,
    *,
    shards: int | None = None,
    replicas: int | None = None,
    standby: int | None = None,
    dry_run: bool = False,
    timeout_s: float,
    report: Report,
    operation_id: str = "",
) -> dict[str, Any]:
    """Give a running cluster another number of shard processes; return what was done.

    Args:
        state: of the cluster.
        config: its settings.
        shards: S; None: as now. Also below.
        replicas: processes of each shard that are asked.
        standby: further ones, kept warm.
        dry_run: plan, and change nothing.
        timeout_s: longest wait.
        report: hears the plan and how far it is, a line at a time.
        operation_id: names it in the control store; empty: a new name.

    Raises:
        Refused: if there is no room for what is started, or something else is going on.
        CommandError: if no cluster runs, a number is out of bounds, or it could not be done; the
            cluster is as it was then.
        TimedOut: if it is not done in time; it goes on.
    """
    began_s = time.monotonic()
    record = running(state)
    store = state.control
    control = store.read()
    before = record.size
    if before is None:
        raise CommandError(f"the cluster on {state.root} is still starting: wait for it")
    given = {"shards": shards, "replicas": replicas, "standby": standby}
    after = _checked(before, {name: one for name, one in given.items() if one is not None})
    numbers = {record.generation, *(one.generation for one in record.generations)}
    numbers |= {one for one in (control.previous, control.canary, control.warm) if one}
    outlines = _outlines(state, numbers, after)
    fleet = fleet_of(state, record)
    config = fleet.settings(config)
    plan = fleet.plan_scale(config, before, after, outlines)
    for line in render(plan):
        report(line)
    if plan.starts:
        check_new_copies(fleet)
    if plan.reason:
        raise Refused(f"the cluster is not scaled: {plan.reason}")
    document = {
        "before": before.model_dump(),
        "after": after.model_dump(),
        "starts": plan.starts,
        "ends": plan.ends,
        "new_bytes": plan.new_bytes,
        "free_bytes": plan.free_bytes,
    }
    if dry_run or before == after:
        return {**document, "done": before == after, "seconds": 0.0}
    scaled = Scaled(size=after, instead_of=size_of(config))
    operation = wanted("scale", 0, "live", "", operation_id).model_copy(update={"scaled": scaled})

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
        unless=f"the cluster has not {after}",
    )
    if ended.state != "done":
        raise CommandError(f"the cluster has {before} as before: {ended.reason or ended.state}")
    return {**document, "done": True, "seconds": round(time.monotonic() - began_s, 2)}


def _checked(before: ClusterSize, given: Mapping[str, int]) -> ClusterSize:
    """Return a size with other numbers.

    Raises:
        CommandError: if a number is out of bounds.
    """
    for name, number in given.items():
        least, most = SIZE_LIMITS[name]
        if not least <= number <= most:
            text = f"{name} must be in {least}..{most}, got {number}"
            raise CommandError(text, ExitCode.USAGE)
    if not given:
        raise CommandError("say what to change: --shards, --replicas or --standby", ExitCode.USAGE)
    return before.model_copy(update=dict(given))


def _outlines(state: StateDir, numbers: set[int], after: ClusterSize) -> dict[int, Outline]:
    """Return the generations that the new processes shall hold.

    Raises:
        CommandError: if one of them has fewer partitions than there shall be shards.
        SnapshotError: if one cannot be read.
    """
    outlines = {}
    for number in sorted(numbers):
        path = generation_dir(state.generations, number)
        if not path.is_dir():
            # It was removed, so no process holds it, and nothing returns to it.
            continue
        outlines[number] = read_outline(path)
        most = outlines[number].num_partitions
        if after.shards > most:
            raise CommandError(
                f"shards must be at most {most}, the partitions of generation {number}, got "
                f"{after.shards}: publish with a larger index.planned_shards",
                ExitCode.USAGE,
            )
    return outlines


def render_done(document: Mapping[str, Any]) -> str:
    """Return what was done for people."""
    before, after = (ClusterSize(**document[name]) for name in ("before", "after"))
    if not document["done"]:
        return f"would scale from {before} to {after}"
    if before == after:
        return f"the cluster has {after} already"
    return f"scaled from {before} to {after} in {document['seconds']} s"

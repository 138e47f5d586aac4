"""Changing how many shard processes a running cluster has: ``scale`` as commands see it.

A command plans and writes what it wants into the control store; the driver of the cluster does it.

Shapes: S shards, R replicas.
"""

import time
from collections.abc import Mapping
from typing import Any, NamedTuple

from silvershard.deploy.activate import running_here
from silvershard.deploy.carry_out import Report, awaited, refuse_if_busy
from silvershard.deploy.cluster_size import SIZE_LIMITS, ClusterSize, Scaled, resized, size_of
from silvershard.deploy.config import Config
from silvershard.deploy.control_store import Control, wanted
from silvershard.deploy.errors import CommandError, ExitCode, Refused
from silvershard.deploy.fleet import OneMachine, check_new_copies
from silvershard.deploy.footprint import PROCESS_BYTES
from silvershard.deploy.memory_plan import free_memory, held_by, loaded_bytes, mib
from silvershard.deploy.state import StateDir
from silvershard.shard.generations import generation_dir
from silvershard.shard.outline import Outline, read_outline


class ScalePlan(NamedTuple):
    """What happens when a cluster is scaled."""

    before: ClusterSize
    after: ClusterSize
    starts: int
    """Processes that are started."""
    ends: int
    """Processes that end once the others have taken over."""
    held_bytes: int
    """What the shard processes take now."""
    new_bytes: int
    """What those that are started take at most while they load, beside all others."""
    free_bytes: int
    """What is left, of the machine or of ``swap.memory_mib``."""
    reason: str
    """Why it is refused; empty if it is not."""


def plan_scale(
    config: Config,
    before: ClusterSize,
    after: ClusterSize,
    outlines: Mapping[int, Outline],
    *,
    held_bytes: int,
    free_bytes: int,
) -> ScalePlan:
    """Return what happens when a cluster is scaled.

    Args:
        config: settings of the cluster.
        before: how large it is.
        after: how large it shall be.
        outlines: the generations that its processes hold.
        held_bytes: what all shard processes take now.
        free_bytes: what the machine has left for this cluster.
    """
    if config.swap.memory_mib:
        free_bytes = min(free_bytes, max((config.swap.memory_mib << 20) - held_bytes, 0))
    is_new_cut = before.shards != after.shards
    added = after.copies if is_new_cut else max(after.copies - before.copies, 0)
    ended = before.copies if is_new_cut else max(before.copies - after.copies, 0)
    # Of one copy of every shard; there may be none to start.
    each = resized(config, after.model_copy(update={"replicas": 1, "standby": 0}))
    copy_bytes = sum(loaded_bytes(each, one) for one in outlines.values())
    copy_bytes += after.shards * PROCESS_BYTES
    new_bytes = added * copy_bytes
    reason = ""
    if new_bytes > free_bytes:
        generations = ", ".join(map(str, sorted(outlines)))
        reason = (
            f"{added * after.shards} new processes with generations {generations} take "
            f"{mib(new_bytes)} beside the {mib(held_bytes)} that are held, and {mib(free_bytes)} "
            "are free: free memory, raise swap.memory_mib, or take a smaller step"
        )
    return ScalePlan(
        before=before,
        after=after,
        starts=added * after.shards,
        ends=ended * before.shards,
        held_bytes=held_bytes,
        new_bytes=new_bytes,
        free_bytes=free_bytes,
        reason=reason,
    )


def render(plan: ScalePlan) -> list[str]:
    """Return a plan for people, a line per number."""
    return [
        f"{plan.before} now, {plan.after} then: {plan.starts} processes start, {plan.ends} end",
        f"memory held by the shard processes {mib(plan.held_bytes)}, of the new ones at most "
        f"{mib(plan.new_bytes)}, free {mib(plan.free_bytes)}",
    ]


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
    record = running_here(state, "scale")
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
    plan = plan_scale(
        config,
        before,
        after,
        outlines,
        held_bytes=held_by(one.pid for one in record.shards if one.pid),
        free_bytes=free_memory(),
    )
    for line in render(plan):
        report(line)
    if plan.starts:
        check_new_copies(OneMachine(state, record))
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

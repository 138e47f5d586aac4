"""What it takes to give a running cluster another number of shard processes.

Shapes: S shards, R replicas.
"""

from collections.abc import Mapping
from typing import NamedTuple

from silvershard.deploy.cluster_size import ClusterSize, resized
from silvershard.deploy.config import Config
from silvershard.deploy.memory_plan import loaded_bytes, mib
from silvershard.shard.outline import Outline


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
    """What is left, of the machine or of ``swap.memory_mib``, or of all hosts."""
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
    # It loads torch, which listing hosts does not need.
    from silvershard.deploy.footprint import PROCESS_BYTES

    if config.swap.memory_mib:
        free_bytes = min(free_bytes, max((config.swap.memory_mib << 20) - held_bytes, 0))
    starts, ends = changed(before, after)
    # Of one copy of every shard; there may be none to start.
    each = resized(config, after.model_copy(update={"replicas": 1, "standby": 0}))
    copy_bytes = sum(loaded_bytes(each, one) for one in outlines.values())
    copy_bytes += after.shards * PROCESS_BYTES
    new_bytes = starts // after.shards * copy_bytes
    reason = ""
    if new_bytes > free_bytes:
        generations = ", ".join(map(str, sorted(outlines)))
        reason = (
            f"{starts} new processes with generations {generations} take "
            f"{mib(new_bytes)} beside the {mib(held_bytes)} that are held, and {mib(free_bytes)} "
            "are free: free memory, raise swap.memory_mib, or take a smaller step"
        )
    return ScalePlan(
        before=before,
        after=after,
        starts=starts,
        ends=ends,
        held_bytes=held_bytes,
        new_bytes=new_bytes,
        free_bytes=free_bytes,
        reason=reason,
    )


def changed(before: ClusterSize, after: ClusterSize) -> tuple[int, int]:
    """Return how many processes start and how many end."""
    is_new_cut = before.shards != after.shards
    added = after.copies if is_new_cut else max(after.copies - before.copies, 0)
    ended = before.copies if is_new_cut else max(before.copies - after.copies, 0)
    return added * after.shards, ended * before.shards


def render(plan: ScalePlan) -> list[str]:
    """Return a plan for people, a line per number."""
    return [
        f"{plan.before} now, {plan.after} then: {plan.starts} processes start, {plan.ends} end",
        f"memory held by the shard processes {mib(plan.held_bytes)}, of the new ones at most "
        f"{mib(plan.new_bytes)}, free {mib(plan.free_bytes)}",
    ]

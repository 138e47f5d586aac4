"""What a second generation takes beside the first one, and how it can be brought in.

The plan is made from the manifests, the memory that the shard processes take now, and what the
machine has left, before anything is loaded.

Shapes: S shards, R replicas.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from silvershard.deploy.config import Config
from silvershard.shard.assignment import shard_partitions
from silvershard.shard.outline import Outline, partition_path

_LAYING_OUT = 2
"""A partition lies in memory twice while its pages are filled: as it was read, and laid out."""

_ELSEWHERE = ("partitions/", "rows/", "golden.json")
"""Files that a shard process does not hold whole: the items of others, rows of table processes."""

_PAGE_BYTES = 4096

_CGROUPS = (
    ("memory.max", "memory.current"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
)

Mode = Literal["beside", "wave", "refused"]


class MemoryPlan(NamedTuple):
    """How a generation can be brought in."""

    mode: Mode
    """``beside``: every process holds both; ``wave``: one half of the replicas after the other
    exchanges them; ``refused``: neither is possible."""
    held_bytes: int
    """What the shard processes take now."""
    old_bytes: int
    """What giving up the live generation frees, in all processes."""
    new_bytes: int
    """What the new generation takes at most while it is loaded, in all processes, with those that
    serve its remote tables."""
    check_bytes: int
    """What one process takes that loads all of it to check it."""
    free_bytes: int
    """What is left, of the machine or of ``swap.memory_mib``."""
    reason: str
    """Why it is refused, or why it goes in waves."""

    @property
    def checks_fit(self) -> bool:
        """Return whether the generation can be loaded whole to be checked."""
        return self.check_bytes <= self.free_bytes


def plan_memory(
    config: Config, live: Outline | None, new: Outline, *, held_bytes: int, free_bytes: int
) -> MemoryPlan:
    """Return how a generation can be brought in beside the live one.

    Args:
        config: settings of the cluster.
        live: the generation that is served; None if the processes hold the new one already.
        new: the other one.
        held_bytes: what all shard processes take now.
        free_bytes: what the machine has left for this cluster.
    """
    if config.swap.memory_mib:
        free_bytes = min(free_bytes, max((config.swap.memory_mib << 20) - held_bytes, 0))
    new_bytes = loaded_bytes(config, new) + row_bytes(live, new) if live is not None else 0
    old_bytes = min(loaded_bytes(config, live), held_bytes) if live is not None else 0
    mode: Mode = "beside"
    reason = ""
    if new_bytes > free_bytes:
        numbers = (
            f"generation {new.generation} takes {mib(new_bytes)} beside the "
            f"{mib(held_bytes)} that are held, and {mib(free_bytes)} are free"
        )
        if config.sharding.copies == 1:
            mode = "refused"
            reason = (
                f"{numbers}: free memory, raise swap.memory_mib, or serve with "
                "sharding.replicas 2 or more, one of which then changes at a time"
            )
        elif new_bytes > free_bytes + old_bytes:
            mode = "refused"
            reason = f"{numbers}; giving up the live one would free {mib(old_bytes)} only"
        else:
            mode, reason = "wave", f"{numbers}: the replicas change one part after the other"
    return MemoryPlan(
        mode=mode,
        held_bytes=held_bytes,
        old_bytes=old_bytes,
        new_bytes=new_bytes,
        check_bytes=swap_bytes(new, range(new.num_partitions), 0.0),
        free_bytes=free_bytes,
        reason=reason,
    )


def plan_swap(
    config: Config,
    live: Outline,
    new: Outline,
    holding: Sequence[bool],
    pids: Iterable[int],
    *,
    free_bytes: int,
) -> MemoryPlan:
    """Return how to bring a generation in; the processes that hold it need no room for it.

    Args:
        config: settings of the cluster.
        live: the generation that is served.
        new: the other one.
        holding: of every process, whether it holds the other one.
        pids: of the same processes.
        free_bytes: what the machine has left for this cluster.
    """
    held = held_by(pids)
    room = min(loaded_bytes(config, new) * sum(holding) // max(len(holding), 1), held)
    return plan_memory(
        config,
        None if all(holding) else live,
        new,
        held_bytes=held - room,
        free_bytes=free_bytes + room,
    )


def loaded_bytes(config: Config, outline: Outline) -> int:
    """Return what all shard processes take at most while they load a generation."""
    shards = config.sharding.shards
    headroom = config.updates.headroom if config.updates.enabled else 0.0
    each = [
        swap_bytes(outline, shard_partitions(at, shards, outline.num_partitions), headroom)
        for at in range(shards)
    ]
    return config.sharding.copies * sum(each)


def row_bytes(live: Outline, new: Outline) -> int:
    """Return what the rows of remote tables take that no table process has yet."""
    held, wanted = (
        {name: one.checksums[name] for name in one.sizes if name.startswith("rows/")}
        for one in (live, new)
    )
    return 0 if held == wanted else sum(new.sizes[name] for name in wanted)


def swap_bytes(outline: Outline, partitions: Iterable[int], headroom: float) -> int:
    """Return what a process takes at most while it loads some partitions of a generation.

    Args:
        outline: the generation.
        partitions: those that it serves.
        headroom: free pages for updates, as a share of those in use.
    """
    sizes = outline.sizes
    own = [sizes[name] for name in map(partition_path, partitions) if name in sizes]
    shared = [size for name, size in sizes.items() if not name.startswith(_ELSEWHERE)]
    return round(_LAYING_OUT * sum(own) * (1 + headroom)) + sum(shared)


def held_by(pids: Iterable[int]) -> int:
    """Return the memory that processes have for themselves; those that are gone have none."""
    total = 0
    for pid in pids:
        try:
            _, resident, shared, *_ = Path(f"/proc/{pid}/statm").read_text().split()
        except (OSError, ValueError):
            continue
        total += (int(resident) - int(shared)) * _PAGE_BYTES
    return total


def free_memory(root: Path = Path("/")) -> int:
    """Return what may still be used, of the machine and of the control group of this process.

    Args:
        root: the root directory, for tests.
    """
    lines = (root / "proc/meminfo").read_text().splitlines()
    kib = {name: int(rest.split()[0]) for name, _, rest in (one.partition(":") for one in lines)}
    free = kib["MemAvailable"] << 10
    for limit_name, used_name in _CGROUPS:
        try:
            limit = (root / "sys/fs/cgroup" / limit_name).read_text().strip()
            used = (root / "sys/fs/cgroup" / used_name).read_text().strip()
        except OSError:
            continue
        if limit.isdecimal():
            free = min(free, max(int(limit) - int(used), 0))
    return free


def mib(size: int) -> str:
    """Return a size for people."""
    return f"{size / (1 << 20):,.1f} MiB"


def render(plan: MemoryPlan) -> list[str]:
    """Return the plan for people, a line per number."""
    how = {
        "beside": "both generations are held until the old one is given up",
        "wave": "one part of the replicas after the other",
        "refused": "refused",
    }
    return [
        f"memory held by the shard processes {mib(plan.held_bytes)}, "
        f"of the live generation at most {mib(plan.old_bytes)}",
        f"memory of the new generation at most {mib(plan.new_bytes)}, free {mib(plan.free_bytes)}",
        f"memory plan: {how[plan.mode]}{f': {plan.reason}' if plan.reason else ''}",
    ]

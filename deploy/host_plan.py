"""The plan of copies on hosts that hold others already. It loads torch.

Shapes: S shards.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from silvershard.deploy.cluster_size import sharding_of, size_from
from silvershard.deploy.config import Config
from silvershard.deploy.config_sections import ShardingSection
from silvershard.deploy.errors import Refused
from silvershard.deploy.footprint import Footprint, Swap, read_footprint
from silvershard.deploy.host_places import Beside
from silvershard.deploy.placement import Copy, Host, Wanted
from silvershard.deploy.plan import ClusterPlan, after_control_plane, plan_cluster, wanted_of


def plan_beside(
    config: Config,
    snapshot: Path,
    sharding: ShardingSection,
    hosts: Sequence[Host],
    present: Mapping[Copy, str],
    beside: Sequence[Beside],
    *,
    generations: int,
) -> ClusterPlan:
    """Return where every copy goes on hosts that also hold others.

    Args:
        config: settings of the cluster.
        snapshot: directory of the live generation.
        sharding: the copies that there shall be.
        hosts: all of them, in their states.
        present: where copies are.
        beside: what takes room and is not planned.
        generations: how many the processes hold.

    Raises:
        Refused: if there is no room, with numbers.
        SnapshotError: if the generation cannot be read.
    """
    swap: Swap = "beside" if generations > 1 else "wave"
    wanted: dict[int, Wanted] = {}
    left = {one.name: one for one in after_control_plane(hosts)}
    for one in beside:
        if one.num_shards not in wanted:
            wanted[one.num_shards] = _wanted(config, snapshot, one.num_shards, swap)
        memory, devices = wanted[one.num_shards].need_of(one.copy)
        host = left.get(one.host)
        if host is not None:
            left[one.host] = host._replace(
                memory_bytes=max(host.memory_bytes - memory, 0),
                num_devices=max(host.num_devices - devices, 0),
            )
    config = _with(config, sharding)
    return plan_cluster(
        config, read_footprint(snapshot, config), list(left.values()), present, reserved=False
    )


def wanted_now(
    config: Config, snapshot: Path, sharding: ShardingSection, hosts: Sequence[Host]
) -> tuple[tuple[Host, ...], Wanted]:
    """Return the hosts with the room that they have for copies, and what a set of copies takes.

    Room for a second generation is asked for where there is some.

    Args:
        config: settings of the cluster.
        snapshot: directory of the live generation.
        sharding: the copies that there are.
        hosts: all of them, in any state.

    Raises:
        SnapshotError: if the generation cannot be read.
    """
    config = _with(config, sharding)
    footprint = read_footprint(snapshot, config)
    try:
        made = plan_cluster(config, footprint, [one._replace(state="up") for one in hosts])
    except Refused:
        return after_control_plane(hosts), _wanted_of(config, footprint, "wave")
    return after_control_plane(hosts), made.wanted


def _wanted(config: Config, snapshot: Path, num_shards: int, swap: Swap) -> Wanted:
    size = size_from(config.sharding).model_copy(update={"shards": num_shards})
    config = _with(config, sharding_of(config.sharding, size))
    return _wanted_of(config, read_footprint(snapshot, config), swap)


def _wanted_of(config: Config, footprint: Footprint, swap: Swap) -> Wanted:
    devices = sum(device != "cpu" for device in config.sharding.devices)
    return wanted_of(config, footprint, swap, devices)


def _with(config: Config, sharding: ShardingSection) -> Config:
    return config.model_copy(update={"sharding": sharding})

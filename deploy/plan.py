"""The plan of a cluster before anything is started: what it takes, where it goes, what it gives.

Shapes: S shards, R replicas.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from silvershard.deploy.config import Config
from silvershard.deploy.errors import CommandError, ExitCode, Refused
from silvershard.deploy.footprint import Footprint, Swap, component_table, read_footprint
from silvershard.deploy.hosts import hosts_of, this_machine
from silvershard.deploy.launch import choose_generation
from silvershard.deploy.memory_plan import free_memory, held_by, plan_memory
from silvershard.deploy.placement import Copy, Host, Placement, Wanted, place, size
from silvershard.deploy.plan_speed import Expected, Speed, SpeedTask, expected, measure
from silvershard.deploy.state import StateDir
from silvershard.deploy.tables import pairs, table
from silvershard.shard.outline import read_outline

Report = Callable[[str], None]

HEAD_BYTES = 1100 << 20
"""What is kept for the control plane on its host: some 400 MiB that an idle Ray head was measured
to take, and an allowance for driver, guard, router and sequencer."""
NODE_BYTES = 200 << 20
"""What is kept for Ray on every other host: an idle node was measured to take 182 MiB."""

SECONDS = 2.0
"""How long the speed of this machine is measured."""
_BATCHES = (1, 8)


class ClusterPlan(NamedTuple):
    """A placement, and what it was made from."""

    footprint: Footprint
    hosts: tuple[Host, ...]
    """With the memory that is left for copies."""
    wanted: Wanted
    swap: Swap
    placement: Placement


def plan_cluster(
    config: Config,
    footprint: Footprint,
    hosts: Sequence[Host],
    present: Mapping[Copy, str] | None = None,
    *,
    reserved: bool = True,
) -> ClusterPlan:
    """Return where every copy goes.

    A host has room for a copy if it can also hold and load a second generation beside the first;
    where that is too much and shards have several replicas, if it can exchange the one for the
    other, one part of the replicas after the other.

    Args:
        config: shards, replicas, standbys and how they are spread.
        footprint: what each copy takes.
        hosts: the machines.
        present: where copies are, as for ``place``.
        reserved: keep back what Ray and the control plane take; the first host by name that is up
            has the control plane.

    Raises:
        Refused: if it is impossible, with numbers.
    """
    usable = after_control_plane(hosts) if reserved else tuple(hosts)
    devices = sum(device != "cpu" for device in config.sharding.devices)
    refused: Refused | None = None
    modes: tuple[Swap, ...] = ("beside", "wave") if config.sharding.copies > 1 else ("beside",)
    for swap in modes:
        wanted = wanted_of(config, footprint, swap, devices)
        try:
            return ClusterPlan(footprint, usable, wanted, swap, place(usable, wanted, present))
        except Refused as error:
            refused = error
    assert refused is not None
    if len(modes) == 1 and _fits(usable, wanted_of(config, footprint, "wave", devices)):
        raise Refused(
            f"there is no room to swap generations: {refused}; without a second generation beside "
            "the first everything has room, which takes two copies of each shard to swap"
        )
    raise refused


def wanted_of(config: Config, footprint: Footprint, swap: Swap, num_devices: int) -> Wanted:
    """Return what shall be held, given how generations are swapped, and the GPUs of a copy."""
    placement = config.replicas.placement
    return Wanted(
        needs=tuple(one.need(swap, num_devices=num_devices) for one in footprint.shards),
        replicas=config.sharding.replicas,
        standbys=config.sharding.standby,
        spread=placement.spread,
        labels=placement.labels,
    )


def _fits(hosts: Sequence[Host], wanted: Wanted) -> bool:
    try:
        place(hosts, wanted)
    except Refused:
        return False
    return True


def after_control_plane(hosts: Sequence[Host]) -> tuple[Host, ...]:
    """Return hosts with the memory that is left beside Ray and the control plane."""
    head = min((host.name for host in hosts if host.state == "up"), default="")
    return tuple(
        host._replace(
            memory_bytes=max(
                host.memory_bytes - (HEAD_BYTES if host.name == head else NODE_BYTES), 0
            )
        )
        for host in hosts
    )


def plan(
    state: StateDir,
    config: Config,
    generation: int | None,
    *,
    hosts: str | None = None,
    machines: Sequence[Host] | None = None,
    seconds: float = SECONDS,
    report: Report = lambda _: None,
) -> dict[str, Any]:
    """Return the plan of a generation as a document.

    Args:
        state: where it is published.
        config: settings in force.
        generation: as for ``choose_generation``.
        hosts: as for ``read_hosts``; None: those of the settings, else this machine.
        machines: the hosts themselves, which decide alone.
        seconds: how long its speed is measured; 0: not at all.
        report: hears what takes a while.

    Returns:
        What is needed, and where it goes; ``refused`` says why not, if it is impossible.

    Raises:
        CommandError: if there is no such generation, or more shards than it has partitions.
        ConfigError: if a host cannot be used as written.
    """
    number, path = choose_generation(state, generation)
    listed = list(machines or ()) or hosts_of(config.hosts, hosts)
    own = not listed
    machines = listed or [_this_machine(state, config)]
    most = read_outline(path).num_partitions
    if config.sharding.shards > most:
        raise CommandError(
            f"shards: must be at most {most}, the partitions of {path.name}, got "
            f"{config.sharding.shards}; publish with a larger index.planned_shards",
            ExitCode.USAGE,
        )
    footprint = read_footprint(path, config)
    document: dict[str, Any] = {
        "generation": number,
        "documents": footprint.spec.documents,
        "shards": config.sharding.shards,
        "replicas": config.sharding.replicas,
        "standbys": config.sharding.standby,
        "spread": config.replicas.placement.spread,
        "possible": True,
        "refused": "",
    }
    made: ClusterPlan | None = None
    try:
        made = plan_cluster(config, footprint, machines)
    except Refused as error:
        document |= {"possible": False, "refused": str(error)}
    document |= _described(config, footprint, machines, made)
    document["checks_bytes"] = plan_memory(
        config, None, footprint.outline, held_bytes=0, free_bytes=0
    ).check_bytes
    document["notes"] = _notes(made, own=own)
    document["speed"] = None
    if made is not None and seconds:
        document["speed"] = _speed(made, config, path, seconds, report)
    return document


def _this_machine(state: StateDir, config: Config) -> Host:
    record = state.read_record() if state.root.is_dir() else None
    free = free_memory()
    if record is not None and record.runs and not record.ray:
        # What runs on this directory would be replaced.
        free += held_by(
            [one.pid for one in record.shards if one.pid] + [record.guard.pid, record.driver.pid]
        )
    if config.swap.memory_mib:
        free = min(free, (config.swap.memory_mib << 20) + HEAD_BYTES)
    return this_machine(free)


def _described(
    config: Config, footprint: Footprint, hosts: Sequence[Host], made: ClusterPlan | None
) -> dict[str, Any]:
    """Return components, shards and hosts of a plan, or of what was refused."""
    devices = sum(device != "cpu" for device in config.sharding.devices)
    swap: Swap = made.swap if made is not None else "beside"
    counts = {"replicas": config.sharding.replicas, "standbys": config.sharding.standby}
    components = component_table(footprint, **counts, swap=swap, num_devices=devices)
    needs = [one.need(swap, num_devices=devices) for one in footprint.shards]
    at = made.placement.at if made is not None else {}
    left = {host.name: host.memory_bytes for host in (made.hosts if made is not None else ())}
    return {
        "swap": swap if made is not None else "refused",
        "components": components,
        "total_bytes": {
            tier: sum(one["bytes"] for one in components if one["tier"] == tier)
            for tier in ("host", "device")
        },
        "per_shard": [
            {
                "shard": one.shard,
                "documents": one.documents,
                "pages": one.pages,
                "host_bytes": need.memory_bytes,
                "device_bytes": need.device_bytes * need.num_devices,
                "standby_bytes": need.standby_bytes if counts["standbys"] else 0,
                "hosts": [name for copy, name in at.items() if copy.shard == one.shard],
            }
            for one, need in zip(footprint.shards, needs, strict=True)
        ],
        "hosts": [_host_row(host, made, left.get(host.name, host.memory_bytes)) for host in hosts],
    }


def _host_row(host: Host, made: ClusterPlan | None, left_bytes: int) -> dict[str, Any]:
    copies = made.placement.on(host.name) if made is not None else []
    wanted = made.wanted if made is not None else None
    taken = sum(wanted.need_of(copy)[0] for copy in copies) if wanted else 0
    return {
        "host": host.name,
        "zone": host.zone,
        "state": host.state,
        "cpus": host.cpus,
        "memory_bytes": host.memory_bytes,
        "control_bytes": host.memory_bytes - left_bytes,
        "taken_bytes": taken,
        "devices": host.num_devices,
        "devices_taken": sum(wanted.need_of(copy)[1] for copy in copies) if wanted else 0,
        "documents": sum(
            wanted.needs[copy.shard].documents for copy in copies if wanted and not copy.standby
        ),
        "replicas": [copy.shard for copy in copies if not copy.standby],
        "standbys": [copy.shard for copy in copies if copy.standby],
    }


def _notes(made: ClusterPlan | None, *, own: bool) -> list[str]:
    """Return in words what an operator should know of a plan."""
    if made is None:
        return []
    notes = list(made.placement.shared)
    if made.swap == "wave":
        notes.append(
            "there is no room for two generations beside each other: `activate` exchanges them one "
            "part of the replicas after the other"
        )
    if own:
        notes.append("memory is what this machine has left now")
    return notes


def _speed(
    made: ClusterPlan, config: Config, path: Path, seconds: float, report: Report
) -> dict[str, Any]:
    """Return what was measured and what it lets expect, or why nothing was."""
    shards = made.footprint.shards
    serving = {host.name: 0 for host in made.hosts}
    for copy, name in made.placement.at.items():
        serving[name] += not copy.standby
    fullest = max(made.hosts, key=lambda host: (serving[host.name], host.name))
    threads = config.sharding.threads or max(int(fullest.cpus) // serving[fullest.name], 1)
    cores = len(os.sched_getaffinity(0))
    threads = min(threads, cores)
    processes = max(min(serving[fullest.name], cores // threads), 1)
    largest = max(shards, key=lambda one: one.documents)
    room = free_memory()
    parts, part = len(shards), largest.shard
    each = largest.serving + largest.loading
    if processes * each > room:
        processes = 1
    while each > room and parts < made.footprint.spec.num_partitions:
        # A smaller part is measured; the scan is taken to cost in proportion to its documents.
        parts, part, each = 2 * parts, 0, each // 2
        parts = min(parts, made.footprint.spec.num_partitions)
    if each > room:
        return {"skipped": f"{size(each)} are needed to measure, and {size(room)} are free here"}
    report(
        f"measuring {processes} process{'es' if processes > 1 else ''} of {threads} "
        f"thread{'s' if threads > 1 else ''} for {seconds:g} s"
    )
    task = SpeedTask(
        snapshot=str(path),
        num_shards=parts,
        shard=part,
        share=len(shards),
        devices=config.sharding.devices,
        headroom=config.updates.headroom if config.updates.enabled else 0.0,
        batches=tuple(sorted({*_BATCHES, config.query.max_batch})),
        seconds=seconds,
    )
    speed = measure(task, processes=processes, threads=threads)
    found = expected(speed, made.hosts, made.placement.at, [one.documents for one in shards])
    return _speed_document(speed, found, largest.serving)


def _speed_document(speed: Speed, found: Sequence[Expected], planned_bytes: int) -> dict[str, Any]:
    return {
        "processes": speed.processes,
        "threads": speed.threads,
        "documents": speed.documents,
        "process_bytes": speed.process_bytes,
        "loaded_bytes": speed.loaded_bytes,
        "planned_bytes": planned_bytes,
        "batches": [
            {
                "batch": times.batch,
                "runs": times.runs,
                "encode_ms": round(1e3 * times.encode_s, 3),
                "rounds_ms": round(1e3 * times.rounds_s, 3),
                "expected_qps": round(one.qps, 1),
                "bound": one.bound,
            }
            for times, one in zip(speed.times, found, strict=True)
        ],
    }


def render(document: Mapping[str, Any]) -> str:
    """Return a plan for people."""
    hosts = document["hosts"]
    lines = [
        f"generation {document['generation']}, {document['documents']:,} documents: "
        f"{document['shards']} shards x {document['replicas']} replicas"
        + (f" and {document['standbys']} standbys each" if document["standbys"] else ""),
        "",
        table(
            ("component", "tier", "largest copy", "all copies"),
            [
                (one["component"], one["tier"], size(one["largest_copy"]), size(one["bytes"]))
                for one in document["components"]
            ],
        ),
        "",
        pairs(
            [
                (f"together, {tier} memory", size(total))
                for tier, total in document["total_bytes"].items()
                if total
            ]
            + [("checks of `activate`, once", size(document["checks_bytes"]))]
        ),
        "",
        table(
            ("host", "zone", "state", "cpus", "memory", "control", "copies", "shards", "standbys"),
            [
                (
                    one["host"],
                    one["zone"] or "-",
                    one["state"],
                    f"{one['cpus']:g}",
                    size(one["memory_bytes"]),
                    size(one["control_bytes"]),
                    size(one["taken_bytes"]),
                    _ranges(one["replicas"]),
                    _ranges(one["standbys"]),
                )
                for one in hosts
            ],
        ),
    ]
    if document["speed"] is not None:
        lines += ["", _render_speed(document["speed"])]
    if document["notes"]:
        lines += ["", *document["notes"]]
    if not document["possible"]:
        lines += ["", f"impossible: {document['refused']}"]
    return "\n".join(lines)


def _ranges(shards: Sequence[int]) -> str:
    """Return shards for people: ``0-3, 7``; one that is there twice is named twice."""
    runs: list[list[int]] = []
    for shard in sorted(shards):
        if runs and shard == runs[-1][1] + 1:
            runs[-1][1] = shard
        else:
            runs.append([shard, shard])
    texts = [f"{first}" if first == last else f"{first}-{last}" for first, last in runs]
    return ", ".join(texts) or "-"


def _render_speed(speed: Mapping[str, Any]) -> str:
    if "skipped" in speed:
        return f"speed was not measured: {speed['skipped']}"
    rows = [
        (
            one["batch"],
            f"{one['encode_ms']:.2f} ms",
            f"{one['rounds_ms']:.2f} ms",
            f"{one['expected_qps']:,.0f}",
            one["bound"],
        )
        for one in speed["batches"]
    ]
    measured = table(
        ("batch", "user tower", "both rounds", "expected QPS", "bound by"), rows, max_width=60
    )
    loaded, before = size(speed["loaded_bytes"]), size(speed["process_bytes"])
    return (
        f"{measured}\n"
        f"an estimate: {speed['processes']} processes of {speed['threads']} threads ran batches "
        f"here at once, each on {speed['documents']:,} documents; routers and network are not in "
        "it\n"
        f"a process took {loaded}, {before} of it before it had loaded anything; the plan has "
        f"{size(speed['planned_bytes'])} for the largest shard while it serves"
    )

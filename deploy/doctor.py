"""Judges whether a machine can run a cluster or join one, and says what to do about what it finds.

Facts come in, verdicts go out; nothing here reads anything. Measured memory of processes: a Ray
head 0.7 GB, a Ray node 0.3 GB, a process with torch 0.4 GB.
"""

import functools
from collections.abc import Iterable, Mapping
from typing import Literal, NamedTuple

from silvershard.deploy.config import Config
from silvershard.deploy.machine import Clock, Cpu, Disk, Kernel, Listener, Memory
from silvershard.deploy.memory_plan import mib

Verdict = Literal["ok", "warn", "fail"]

_MIB = 1 << 20
RAY_HEAD_BYTES = 700 * _MIB
RAY_NODE_BYTES = 300 * _MIB
TORCH_PROCESS_BYTES = 400 * _MIB
OBJECT_STORE_LEAST_BYTES = 75 * _MIB
_FREE_DISK_FAIL, _FREE_DISK_WARN = 256 * _MIB, 2048 * _MIB
_SLOW_FSYNC_S = 0.02
_FILES_FAIL, _FILES_WARN = 1024, 4096
_CLOCK_ERROR_WARN_S = 1.0
_OLDEST_KERNEL = (5, 4)

RAY_PORTS = {6379: "the GCS of a Ray head", 10001: "clients of a Ray head"}
"""Fixed ports of a Ray that others join; the embedded one takes free ports."""


class Check(NamedTuple):
    """One thing that was looked at."""

    name: str
    verdict: Verdict
    found: str
    advice: str = ""
    """What to do about it; empty where nothing need be done."""


class Machine(NamedTuple):
    """What a machine has, apart from its software."""

    cpu: Cpu
    memory: Memory
    kernel: Kernel
    disk: Disk
    clock: Clock
    shm_free: int | None
    """Bytes free under /dev/shm; None where there is none."""
    open_files: int
    listeners: Mapping[int, Listener]


class Stock(NamedTuple):
    """What a state directory holds and runs."""

    is_running: bool = False
    pids: frozenset[int] = frozenset()
    """Processes of the cluster that runs on it."""
    ports: frozenset[int] = frozenset()
    """Ports of that cluster."""
    loaded_bytes: int = 0
    """What the shard processes take at most that load its newest generation; 0: there is none."""


def machine_checks(machine: Machine, config: Config, stock: Stock, *, joins: bool) -> list[Check]:
    """Return a verdict on everything but software.

    Args:
        machine: what it has.
        config: what shall run on it.
        stock: what its state directory holds.
        joins: it shall become a node of another machine's Ray, not run a cluster of its own.
    """
    return [
        _cpu(machine.cpu),
        _threads(machine.cpu, config),
        _memory(machine.memory, config, stock, joins=joins),
        _shm(machine.shm_free, config.runtime.object_store_bytes),
        _open_files(machine.open_files),
        *_disk(machine.disk, stock),
        _clock(machine.clock),
        _kernel(machine.kernel),
        *_kernel_settings(machine.kernel, machine.memory),
        *_ports(machine.listeners, config, stock, joins=joins),
    ]


def worst(checks: Iterable[Check]) -> Verdict:
    """Return the worst verdict."""
    order: tuple[Verdict, ...] = ("ok", "warn", "fail")
    return max((one.verdict for one in checks), key=order.index, default="ok")


def _cpu(cpu: Cpu) -> Check:
    known = {
        "avx2": "AVX2",
        "avx512_vnni": "AVX-512 VNNI",
        "avx_vnni": "AVX-VNNI",
        "asimd": "NEON",
    }
    has = ", ".join(name for flag, name in known.items() if flag in cpu.flags)
    found = f"{cpu.model}, {has or 'no vector instructions that are used'}"
    if "avx2" in cpu.flags:
        return Check("cpu", "ok", found)
    return Check(
        "cpu",
        "warn",
        found,
        "operators run in scalar code, several times slower; choose a CPU with AVX2 or AVX-512 "
        "VNNI, or let the hypervisor pass them on",
    )


def _threads(cpu: Cpu, config: Config) -> Check:
    sharding = config.sharding
    processes = sharding.shards * sharding.replicas
    threads = processes * (sharding.threads or max(cpu.usable // processes, 1))
    found = (
        f"{cpu.usable} processors on {cpu.cores} cores, "
        f"{processes} shard processes with {threads // processes} threads each"
    )
    if cpu.quota and cpu.quota < min(cpu.usable, threads):
        return Check(
            "threads",
            "warn",
            f"{found}, but the control group grants {cpu.quota:g}",
            f"threads beyond the quota are stopped in the middle of queries: set sharding.threads "
            f"to {max(int(cpu.quota // processes), 1)} or raise the quota",
        )
    if threads > cpu.usable:
        return Check(
            "threads",
            "warn",
            found,
            "shard processes wait for each other: use fewer sharding.shards or sharding.threads, "
            "or more processors",
        )
    return Check("threads", "ok", found)


def needed_memory(config: Config, stock: Stock, *, joins: bool) -> int:
    """Return the bytes that a cluster takes here, as measured and as its newest generation needs.

    Args:
        config: how many processes there are.
        stock: holds the size of the generation.
        joins: Ray's head is elsewhere.
    """
    sharding, tables = config.sharding, config.tables
    processes = sharding.shards * sharding.copies + 1 + config.updates.enabled
    processes += tables.shards if tables.remote else 0
    ray = RAY_NODE_BYTES if joins else RAY_HEAD_BYTES
    store = config.runtime.object_store_bytes
    return ray + store + processes * TORCH_PROCESS_BYTES + stock.loaded_bytes


def _memory(memory: Memory, config: Config, stock: Stock, *, joins: bool) -> Check:
    limit = memory.cgroup_limit if 0 < memory.cgroup_limit < memory.total else 0
    found = f"{mib(memory.available)} of {mib(memory.total)} available"
    found += f", limited to {mib(limit)} by the control group" if limit else ""
    if stock.is_running:
        return Check("memory", "ok", f"{found}, beside the cluster that runs here")
    needed = needed_memory(config, stock, joins=joins)
    plan = "the newest generation and " if stock.loaded_bytes else ""
    found += f", {mib(needed)} needed for {plan}the processes"
    room = min(memory.available, limit or memory.available)
    if room < needed:
        return Check(
            "memory",
            "fail",
            found,
            "free memory, raise the limit, or serve fewer sharding.shards and sharding.replicas",
        )
    if room < needed + needed // 4:
        return Check(
            "memory",
            "warn",
            found,
            "queries and updates need room beside that: leave a quarter more",
        )
    return Check("memory", "ok", found)


def _shm(free: int | None, store: int) -> Check:
    if free is None:
        return Check(
            "shared memory",
            "warn",
            "there is no /dev/shm",
            "Ray's object store goes to the disk: mount a tmpfs at /dev/shm",
        )
    found = f"{mib(free)} free under /dev/shm, {mib(store)} for Ray's object store"
    if free >= store:
        return Check("shared memory", "ok", found)
    lowest = (
        ""
        if free >= OBJECT_STORE_LEAST_BYTES
        else f"; Ray takes no store below {mib(OBJECT_STORE_LEAST_BYTES)}"
    )
    return Check(
        "shared memory",
        "warn",
        found,
        f"the store goes to the disk{lowest}: start the container with --shm-size 256m, or mount "
        "a memory volume at /dev/shm",
    )


def _open_files(limit: int) -> Check:
    found = f"{limit:,} open files per process"
    if limit >= _FILES_WARN:
        return Check("open files", "ok", found)
    return Check(
        "open files",
        "fail" if limit < _FILES_FAIL else "warn",
        found,
        f"every connection takes one: raise it to {_FILES_WARN * 16:,} with ulimit -n, or "
        "LimitNOFILE of the unit",
    )


def _disk(disk: Disk, stock: Stock) -> list[Check]:
    if disk.problem:
        problem = f"{disk.path} cannot be written to: {disk.problem}"
        advice = "choose another directory with --state, or give this user the right to write"
        return [Check("disk", "fail", problem, advice)]
    found = f"{mib(disk.free)} free at {disk.path}"
    needed = max(_FREE_DISK_WARN, 2 * stock.loaded_bytes)
    verdict: Verdict = "ok"
    if disk.free < needed:
        verdict = "fail" if disk.free < _FREE_DISK_FAIL else "warn"
    room = Check(
        "disk",
        verdict,
        found,
        ""
        if verdict == "ok"
        else f"generations and the update log need {mib(needed)}: free some, remove old "
        "generations with `silvershard snapshots --prune`, or choose another --state",
    )
    took = f"a synced write takes {disk.fsync_s * 1e3:.1f} ms at {disk.path}"
    if disk.fsync_s <= _SLOW_FSYNC_S:
        return [room, Check("fsync", "ok", took)]
    advice = "every acknowledged update waits for one: keep updates.log on a local SSD, or in Redis"
    return [room, Check("fsync", "warn", took, advice)]


def _clock(clock: Clock) -> Check:
    if not clock.is_monotonic:
        return Check(
            "clock",
            "fail",
            "the monotonic clock is not monotonic",
            "deadlines cannot be kept: use another clock source of the kernel",
        )
    if clock.is_synchronized is None:
        return Check("clock", "ok", "monotonic; whether it is synchronised is not known")
    found = f"monotonic, time of day within {clock.error_s:.3f} s"
    if clock.is_synchronized and clock.error_s <= _CLOCK_ERROR_WARN_S:
        return Check("clock", "ok", found)
    if not clock.is_synchronized:
        found = "monotonic, but the time of day is not synchronised"
    return Check(
        "clock",
        "warn",
        found,
        "`now` in filters and the expiry of items follow it: run an NTP client such as chrony",
    )


def _kernel(kernel: Kernel) -> Check:
    oldest = ".".join(map(str, _OLDEST_KERNEL))
    if kernel.version >= _OLDEST_KERNEL:
        return Check("kernel", "ok", f"Linux {kernel.release}")
    return Check(
        "kernel",
        "fail",
        f"Linux {kernel.release}",
        f"{oldest} or newer is needed: processes are watched through pidfds",
    )


def _kernel_settings(kernel: Kernel, memory: Memory) -> list[Check]:
    settings = f"overcommit {kernel.overcommit}, huge pages {kernel.huge_pages or 'not there'}"
    swap = f"{mib(memory.swap)} of swap" if memory.swap else "no swap"
    if kernel.overcommit == 2:
        paging = Check(
            "paging",
            "warn",
            f"vm.overcommit_memory is 2, {swap}",
            "processes reserve more than they use and may be refused: set it to 0",
        )
    elif memory.swap and kernel.swappiness > 10:
        paging = Check(
            "paging",
            "warn",
            f"{swap}, vm.swappiness {kernel.swappiness}",
            "an index that was paged out answers late: set vm.swappiness to 1, or turn swap off",
        )
    elif kernel.huge_pages == "always":
        paging = Check(
            "paging",
            "warn",
            f"huge pages always, {swap}",
            "the kernel may stop a query to compact memory: choose madvise in "
            "/sys/kernel/mm/transparent_hugepage/enabled",
        )
    else:
        paging = Check("paging", "ok", f"{swap}, {settings}")
    return [paging]


def _ports(
    listeners: Mapping[int, Listener], config: Config, stock: Stock, *, joins: bool
) -> list[Check]:
    http = config.observability.http
    wanted = {
        "gRPC, listen.port": config.listen.port,
        "HTTP, observability.http": int(http.rpartition(":")[2])
        if http and config.listen.port
        else 0,
        "admin plane, admin.port": config.admin.port if config.admin.enabled else 0,
    }
    port_of = functools.partial(_port, listeners, stock)
    found = [
        port_of(port, what, "fail", "stop it, or choose another port in the settings")
        for what, port in wanted.items()
        if port
    ]
    if joins:
        return found
    return found + [
        port_of(port, what, "warn", "it stands in the way of `ray start --head` only")
        for port, what in RAY_PORTS.items()
    ]


def _port(
    listeners: Mapping[int, Listener],
    stock: Stock,
    port: int,
    what: str,
    taken: Verdict,
    advice: str,
) -> Check:
    name, one = f"port {port}", listeners.get(port)
    if one is None:
        return Check(name, "ok", f"free ({what})")
    found = f"{what}: {one.owner} listens there"
    if one.pid in stock.pids or (stock.is_running and port in stock.ports):
        return Check(name, "ok", f"{found}, of the cluster that runs here")
    return Check(name, taken, found, advice)

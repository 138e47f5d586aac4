"""What a machine has and how it is set up, as far as a cluster depends on it.

Everything is read, nothing judged and nothing changed but one small file that is written to see how
long the disk takes, and removed. Linux only.
"""

import ctypes
import os
import platform
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

_CPU_QUOTA = "sys/fs/cgroup/cpu.max"
_CGROUP_MEMORY = ("sys/fs/cgroup/memory.max", "sys/fs/cgroup/memory/memory.limit_in_bytes")
_NO_LIMIT = 1 << 60
"""What the first version of control groups shows where there is no limit, or more."""
_FSYNCS = 16
_LISTENING = "0A"


class Cpu(NamedTuple):
    """The processors that this process may use."""

    model: str
    flags: frozenset[str]
    usable: int
    """Logical processors of the affinity mask."""
    cores: int
    """Physical cores of the machine; as many as processors where it does not say."""
    quota: float
    """Processors that the control group grants; 0: no limit."""


class Memory(NamedTuple):
    """Memory of the machine, in bytes."""

    total: int
    available: int
    swap: int
    cgroup_limit: int
    """0: none."""


class Kernel(NamedTuple):
    """The kernel and its settings of memory."""

    release: str
    overcommit: int
    swappiness: int
    huge_pages: str
    """``always``, ``madvise``, ``never``, or empty where it has none."""

    @property
    def version(self) -> tuple[int, int]:
        """Return major and minor version; zeros if the release does not say."""
        major, _, rest = self.release.partition(".")
        minor = rest.partition(".")[0]
        known = major.isdecimal() and minor.isdecimal()
        return (int(major), int(minor)) if known else (0, 0)


class Disk(NamedTuple):
    """The disk that a directory lies on, or would lie on."""

    path: str
    """The directory, or the nearest one above it that is there."""
    free: int
    fsync_s: float
    """Median time of writing 4 KiB and syncing them."""
    problem: str
    """Why nothing can be written there; empty if it can."""


class Clock(NamedTuple):
    """The clocks of this machine."""

    is_monotonic: bool
    is_synchronized: bool | None
    """None if the kernel does not say."""
    error_s: float
    """The most that the kernel believes the time of day to be off."""


class Listener(NamedTuple):
    """Who listens on a port."""

    port: int
    owner: str
    """``name (pid 7)``, or ``another user's process``."""
    pid: int
    """0 if unknown."""


def read_cpu(root: Path = Path("/")) -> Cpu:
    """Return the processors; ``root`` is the root directory, for tests."""
    blocks = [
        dict(_pairs(block.splitlines()))
        for block in (root / "proc/cpuinfo").read_text(errors="replace").split("\n\n")
        if block.strip()
    ]
    first = blocks[0] if blocks else {}
    usable = len(os.sched_getaffinity(0))
    cores = {(one["physical id"], one["core id"]) for one in blocks if "core id" in one}
    quota, period = [*_words(root / _CPU_QUOTA), "", ""][:2]
    return Cpu(
        model=first.get("model name", platform.machine()),
        flags=frozenset(first.get("flags", first.get("Features", "")).split()),
        usable=usable,
        cores=len(cores) or len(blocks) or usable,
        quota=int(quota) / int(period) if quota.isdecimal() and period.isdecimal() else 0.0,
    )


def read_memory(root: Path = Path("/")) -> Memory:
    """Return the memory; ``root`` is the root directory, for tests."""
    lines = (root / "proc/meminfo").read_text().splitlines()
    found = {name: int(rest.split()[0]) << 10 for name, rest in _pairs(lines)}
    limits = [
        int(limit)
        for name in _CGROUP_MEMORY
        if (limit := "".join(_words(root / name)[:1])).isdecimal() and int(limit) < _NO_LIMIT
    ]
    return Memory(
        total=found["MemTotal"],
        available=found["MemAvailable"],
        swap=found.get("SwapTotal", 0),
        cgroup_limit=min(limits, default=0),
    )


def read_kernel(root: Path = Path("/")) -> Kernel:
    """Return the kernel; ``root`` is the root directory, for tests."""
    pages = " ".join(_words(root / "sys/kernel/mm/transparent_hugepage/enabled"))
    chosen = pages.partition("[")[2].partition("]")[0]
    return Kernel(
        release="".join(_words(root / "proc/sys/kernel/osrelease")[:1]),
        overcommit=_int_of(root / "proc/sys/vm/overcommit_memory"),
        swappiness=_int_of(root / "proc/sys/vm/swappiness"),
        huge_pages=chosen,
    )


def read_disk(directory: Path, *, clock: Callable[[], float] = time.perf_counter) -> Disk:
    """Return the disk of a directory that need not be there yet."""
    path = directory.absolute()
    while not path.is_dir() and path != path.parent:
        path = path.parent
    status = os.statvfs(path)
    free = status.f_bavail * status.f_frsize
    spent = []
    try:
        with tempfile.TemporaryFile(dir=path, prefix=".silvershard-doctor-") as file:
            for _ in range(_FSYNCS):
                file.write(bytes(4096))
                file.flush()
                began_s = clock()
                os.fsync(file.fileno())
                spent.append(clock() - began_s)
    except OSError as error:
        return Disk(str(path), free, 0.0, (error.strerror or str(error)).lower())
    return Disk(str(path), free, statistics.median(spent), "")


def free_of(path: Path) -> int | None:
    """Return the free bytes of a file system; None where the path does not exist."""
    try:
        status = os.statvfs(path)
    except OSError:
        return None
    return status.f_bavail * status.f_frsize


def open_files() -> int:
    """Return how many files a process may open, which a program may raise to the hard limit."""
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


class Timex(ctypes.Structure):
    """The head of ``struct timex`` on a 64-bit machine, and room for its rest."""

    _fields_ = (
        ("modes", ctypes.c_uint),
        ("offset", ctypes.c_long),
        ("freq", ctypes.c_long),
        ("maxerror", ctypes.c_long),
        ("esterror", ctypes.c_long),
        ("status", ctypes.c_int),
        ("rest", ctypes.c_byte * 256),
    )


def read_clock(ask: Callable[[Timex], int] | None = None) -> Clock:
    """Return the clocks as the kernel keeps them.

    Source: adjtimex(2); STA_UNSYNC is bit 6 of the status.

    Args:
        ask: fills in what the kernel knows; less than 0 if it refuses.
    """
    is_monotonic = time.get_clock_info("monotonic").monotonic
    timex = Timex()
    if (ask or _adjtimex)(timex) < 0:
        return Clock(is_monotonic, None, 0.0)
    return Clock(is_monotonic, not timex.status & 0x40, timex.maxerror / 1e6)


def _adjtimex(timex: Timex) -> int:
    return int(ctypes.CDLL(None).adjtimex(ctypes.byref(timex)))


def read_listeners(root: Path = Path("/")) -> dict[int, Listener]:
    """Return who listens on which TCP port; ``root`` is the root directory, for tests."""
    ports: dict[str, int] = {}
    for name in ("tcp", "tcp6"):
        for line in _lines(root / "proc/net" / name)[1:]:
            fields = line.split()
            if fields[3] == _LISTENING:
                ports[fields[9]] = int(fields[1].rpartition(":")[2], 16)
    owners = dict(_owners(root, ports))
    return {
        port: Listener(port, *owners.get(inode, ("another user's process", 0)))
        for inode, port in ports.items()
    }


def _owners(root: Path, inodes: Mapping[str, int]) -> Iterable[tuple[str, tuple[str, int]]]:
    for process in (root / "proc").iterdir():
        if not process.name.isdecimal():
            continue
        try:
            descriptors = list((process / "fd").iterdir())
        except OSError:
            continue
        links = map(_target, descriptors)
        for link in links:
            inode = link.removeprefix("socket:[").removesuffix("]")
            if inode in inodes:
                name = "".join(_lines(process / "comm")[:1]) or "a process"
                yield inode, (f"{name} (pid {process.name})", int(process.name))


def _target(link: Path) -> str:
    """Return what a link points to; empty if it is gone."""
    try:
        return os.readlink(link)
    except OSError:
        return ""


def _pairs(lines: Iterable[str]) -> Iterable[tuple[str, str]]:
    for line in lines:
        name, colon, value = line.partition(":")
        if colon:
            yield name.strip(), value.strip()


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(errors="replace").splitlines()
    except OSError:
        return []


def _words(path: Path) -> list[str]:
    return " ".join(_lines(path)).split()


def _int_of(path: Path) -> int:
    text = "".join(_words(path)[:1])
    return int(text) if text.isdecimal() else 0

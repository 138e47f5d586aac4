import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from silvershard.deploy import machine
from silvershard.deploy.machine import (
    Kernel,
    Timex,
    free_of,
    open_files,
    read_clock,
    read_cpu,
    read_disk,
    read_kernel,
    read_listeners,
    read_memory,
)

Files = Callable[..., Path]

PROCESSORS = """processor\t: 0
model name\t: A CPU
physical id\t: 0
core id\t\t: 0
flags\t\t: fpu avx2 avx512_vnni

processor\t: 1
model name\t: A CPU
physical id\t: 0
core id\t\t: 0
flags\t\t: fpu avx2 avx512_vnni

"""
MEMINFO = """MemTotal:       1000 kB
MemFree:         100 kB
MemAvailable:    600 kB
SwapTotal:        50 kB
HugePages_Total:       0
"""


@pytest.fixture
def files(tmp_path: Path) -> Files:
    """``files(proc_cpuinfo="...")`` writes files below a root; an underscore is a slash."""

    def write(contents: dict[str, str]) -> Path:
        for name, text in contents.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return tmp_path

    return write


def test_two_threads_of_a_core_are_one_core(files: Files) -> None:
    found = read_cpu(
        files({"proc/cpuinfo": PROCESSORS, "sys/fs/cgroup/cpu.max": "150000 100000\n"})
    )
    assert (found.model, found.cores, found.quota) == ("A CPU", 1, 1.5)
    assert {"avx2", "avx512_vnni"} <= found.flags
    assert found.usable == len(os.sched_getaffinity(0))


@pytest.mark.parametrize("quota", ["max 100000\n", "", "max\n"])
def test_a_machine_that_tells_less_has_no_quota_and_a_core_per_processor(
    files: Files, quota: str
) -> None:
    text = "processor: 0\nFeatures: asimd\n\nprocessor: 1\nFeatures: asimd\n"
    found = read_cpu(files({"proc/cpuinfo": text, "sys/fs/cgroup/cpu.max": quota}))
    assert (found.cores, found.quota, found.flags) == (2, 0.0, {"asimd"})
    assert read_cpu(files({"proc/cpuinfo": ""})).cores == found.usable


@pytest.mark.parametrize(
    ("contents", "limit"),
    [
        ({}, 0),
        ({"sys/fs/cgroup/memory.max": "max\n"}, 0),
        ({"sys/fs/cgroup/memory.max": "4096\n"}, 4096),
        ({"sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n"}, 0),
        ({"sys/fs/cgroup/memory/memory.limit_in_bytes": "8192\n"}, 8192),
    ],
)
def test_memory_is_in_bytes_with_the_limit_of_the_control_group(
    files: Files, contents: dict[str, str], limit: int
) -> None:
    found = read_memory(files({"proc/meminfo": MEMINFO, **contents}))
    assert found == (1000 << 10, 600 << 10, 50 << 10, limit)


def test_the_kernel_says_what_it_does_with_memory(files: Files) -> None:
    root = files(
        {
            "proc/sys/kernel/osrelease": "6.1.0-13-cloud\n",
            "proc/sys/vm/overcommit_memory": "2\n",
            "proc/sys/vm/swappiness": "60\n",
            "sys/kernel/mm/transparent_hugepage/enabled": "always [madvise] never\n",
        }
    )
    found = read_kernel(root)
    assert found == Kernel("6.1.0-13-cloud", 2, 60, "madvise")
    assert found.version == (6, 1)


@pytest.mark.parametrize(
    ("release", "version"), [("5.15", (5, 15)), ("x", (0, 0)), ("", (0, 0)), ("6.x", (0, 0))]
)
def test_a_release_is_two_numbers_or_none(release: str, version: tuple[int, int]) -> None:
    assert Kernel(release, 0, 0, "").version == version


def test_a_kernel_that_says_nothing_is_no_error(tmp_path: Path) -> None:
    assert read_kernel(tmp_path) == Kernel("", 0, 0, "")


def test_a_directory_that_is_not_there_lies_on_the_disk_of_the_one_above(tmp_path: Path) -> None:
    clock = iter(range(100))
    found = read_disk(tmp_path / "a" / "b", clock=lambda: float(next(clock)))
    assert (found.path, found.problem, found.fsync_s) == (str(tmp_path), "", 1.0)
    assert found.free > 0
    assert (free_of(tmp_path) or 0) > 0
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_cannot_be_written_to_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(machine.tempfile, "TemporaryFile", refuse)
    assert read_disk(tmp_path).problem == "permission denied"


def test_a_file_system_that_is_not_there_has_no_free_bytes(tmp_path: Path) -> None:
    assert free_of(tmp_path / "none") is None


@pytest.mark.parametrize(
    ("code", "status", "expected"),
    [
        (0, 0x1, (True, 0.25)),
        (5, 0x40, (False, 0.25)),
        (5, 0x2041, (False, 0.25)),
        (-1, 0, (None, 0.0)),
    ],
)
def test_the_kernel_says_whether_the_time_of_day_is_synchronised(
    code: int, status: int, expected: tuple[bool | None, float]
) -> None:
    def ask(timex: Timex) -> int:
        assert timex.modes == 0, "it would be changed"
        timex.status, timex.maxerror = status, 250_000
        return code

    assert read_clock(ask)[1:] == expected


def test_this_machine_can_be_read() -> None:
    assert read_cpu().usable > 0
    assert 0 < read_memory().available <= read_memory().total
    assert read_kernel().version >= (3, 0)
    clock = read_clock()
    assert clock.is_monotonic
    assert clock.error_s >= 0
    assert open_files() > 0


@pytest.fixture(params=["127.0.0.1", "::1"])
def listening(request: pytest.FixtureRequest) -> Iterator[int]:
    family = socket.AF_INET6 if ":" in request.param else socket.AF_INET
    with socket.create_server((request.param, 0), family=family) as server:
        yield server.getsockname()[1]


def test_who_listens_on_a_port_is_known(listening: int) -> None:
    found = read_listeners()[listening]
    assert found.pid == os.getpid()
    assert found.owner.endswith(f"(pid {os.getpid()})")


def test_a_port_of_another_user_has_an_owner_without_a_name(files: Files) -> None:
    line = "0: 0100007F:1F41 00000000:0000 {} 00:0 00:0 0 0 0 7777 1"
    header = "sl local rem st\n"
    root = files({"proc/net/tcp": header + line.format("0A") + "\n"})
    assert read_listeners(root) == {8001: (8001, "another user's process", 0)}
    # A connection is no listener.
    assert read_listeners(files({"proc/net/tcp": header + line.format("01") + "\n"})) == {}

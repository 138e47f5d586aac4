from collections.abc import Callable
from typing import Any

import pytest

from silvershard.deploy.config import Config, load
from silvershard.deploy.doctor import (
    RAY_HEAD_BYTES,
    RAY_NODE_BYTES,
    TORCH_PROCESS_BYTES,
    Check,
    Machine,
    Stock,
    machine_checks,
    needed_memory,
    worst,
)
from silvershard.deploy.machine import Clock, Cpu, Disk, Kernel, Listener, Memory

MIB = 1 << 20
GIB = 1 << 30

GOOD = Machine(
    cpu=Cpu("A CPU", frozenset({"avx2", "avx512_vnni"}), usable=8, cores=4, quota=0.0),
    memory=Memory(total=32 * GIB, available=16 * GIB, swap=0, cgroup_limit=0),
    kernel=Kernel("6.1.0", overcommit=0, swappiness=60, huge_pages="madvise"),
    disk=Disk("/state", free=100 * GIB, fsync_s=0.001, problem=""),
    clock=Clock(is_monotonic=True, is_synchronized=True, error_s=0.01),
    shm_free=GIB,
    open_files=65536,
    listeners={},
)

Judge = Callable[..., dict[str, Check]]


def config(**options: object) -> Config:
    keys = {name.replace("__", "."): value for name, value in options.items()}
    return load(None, environ={}, options=keys)


def judge(
    machine: Machine = GOOD,
    settings: Config | None = None,
    stock: Stock = Stock(),  # noqa: B008
    *,
    joins: bool = False,
) -> dict[str, Check]:
    """Return the checks by name; every one that complains says what to do."""
    checks = machine_checks(machine, settings or config(), stock, joins=joins)
    assert all(one.advice for one in checks if one.verdict != "ok"), checks
    assert len({one.name for one in checks}) == len(checks)
    return {one.name: one for one in checks}


def test_a_good_machine_has_nothing_to_complain_of() -> None:
    checks = judge()
    assert {one.verdict for one in checks.values()} == {"ok"}
    assert worst(checks.values()) == "ok"
    assert set(checks) == {
        *("cpu", "threads", "memory", "shared memory", "open files", "disk", "fsync"),
        *("clock", "kernel", "paging"),
        *("port 8001", "port 8002", "port 6379", "port 10001"),
    }


@pytest.mark.parametrize(
    ("name", "change", "verdict", "found", "advice"),
    [
        (
            "cpu",
            {"cpu": GOOD.cpu._replace(flags=frozenset({"sse2"}))},
            *("warn", "no vector instructions", "AVX-512"),
        ),
        (
            "threads",
            {"cpu": GOOD.cpu._replace(quota=2.0)},
            *("warn", "the control group grants 2", "sharding.threads to 1"),
        ),
        (
            "threads",
            {"cpu": GOOD.cpu._replace(usable=1)},
            *("warn", "1 processors", "fewer sharding.shards"),
        ),
        (
            "memory",
            {"memory": GOOD.memory._replace(available=2 * GIB)},
            *("fail", "2,380.0 MiB needed", "free memory"),
        ),
        (
            "memory",
            {"memory": GOOD.memory._replace(cgroup_limit=GIB)},
            *("fail", "limited to 1,024.0 MiB", "raise the limit"),
        ),
        (
            "memory",
            {"memory": GOOD.memory._replace(available=2400 * MIB)},
            *("warn", "needed for the processes", "a quarter more"),
        ),
        ("shared memory", {"shm_free": 78 * MIB}, "warn", "78.0 MiB free", "--shm-size"),
        ("shared memory", {"shm_free": 64 * MIB}, "warn", "64.0 MiB free", "below 75.0 MiB"),
        ("shared memory", {"shm_free": None}, "warn", "there is no /dev/shm", "mount a tmpfs"),
        ("open files", {"open_files": 2048}, "warn", "2,048", "LimitNOFILE"),
        ("open files", {"open_files": 256}, "fail", "256", "ulimit -n"),
        (
            "disk",
            {"disk": GOOD.disk._replace(problem="read-only file system")},
            *("fail", "/state cannot be written to: read-only", "--state"),
        ),
        ("disk", {"disk": GOOD.disk._replace(free=GIB)}, "warn", "1,024.0 MiB", "--prune"),
        ("disk", {"disk": GOOD.disk._replace(free=100 * MIB)}, "fail", "100.0 MiB", "free some"),
        ("fsync", {"disk": GOOD.disk._replace(fsync_s=0.05)}, "warn", "50.0 ms", "local SSD"),
        (
            "clock",
            {"clock": GOOD.clock._replace(is_monotonic=False)},
            *("fail", "not monotonic", "clock source"),
        ),
        (
            "clock",
            {"clock": GOOD.clock._replace(is_synchronized=False)},
            *("warn", "not synchronised", "NTP"),
        ),
        ("clock", {"clock": GOOD.clock._replace(error_s=16.0)}, "warn", "within 16.000 s", "NTP"),
        (
            "clock",
            {"clock": GOOD.clock._replace(is_synchronized=None)},
            *("ok", "is not known", ""),
        ),
        ("kernel", {"kernel": GOOD.kernel._replace(release="4.19.0")}, "fail", "4.19.0", "pidfds"),
        (
            "paging",
            {"kernel": GOOD.kernel._replace(overcommit=2)},
            *("warn", "vm.overcommit_memory is 2", "set it to 0"),
        ),
        (
            "paging",
            {"memory": GOOD.memory._replace(swap=GIB)},
            *("warn", "1,024.0 MiB of swap, vm.swappiness 60", "turn swap off"),
        ),
        (
            "paging",
            {"kernel": GOOD.kernel._replace(huge_pages="always")},
            *("warn", "huge pages always", "madvise"),
        ),
    ],
)
def test_what_is_wrong_is_found_with_what_to_do(
    name: str, change: dict[str, Any], verdict: str, found: str, advice: str
) -> None:
    checks = judge(GOOD._replace(**change))
    assert checks[name].verdict == verdict
    assert found in checks[name].found
    assert advice in checks[name].advice
    others = {one.verdict for other, one in checks.items() if other != name}
    assert others == {"ok"}


def test_swap_that_is_hardly_used_is_no_complaint() -> None:
    kernel, memory = GOOD.kernel._replace(swappiness=1), GOOD.memory._replace(swap=GIB)
    assert judge(GOOD._replace(kernel=kernel, memory=memory))["paging"].verdict == "ok"


@pytest.mark.parametrize(("port", "what"), [(8001, "listen.port"), (8002, "observability.http")])
def test_a_port_that_another_holds_is_a_failure(port: int, what: str) -> None:
    machine = GOOD._replace(listeners={port: Listener(port, "nginx (pid 7)", 7)})
    check = judge(machine)[f"port {port}"]
    assert (check.verdict, check.advice != "") == ("fail", True)
    assert what in check.found
    assert "nginx (pid 7) listens there" in check.found


def test_a_port_of_the_cluster_that_runs_here_is_none() -> None:
    machine = GOOD._replace(listeners={8001: Listener(8001, "python (pid 7)", 7)})
    running = Stock(is_running=True, pids=frozenset({7}))
    assert judge(machine, stock=running)["port 8001"].verdict == "ok"
    # Another user sees no pid there.
    hidden = GOOD._replace(listeners={8001: Listener(8001, "another user's process", 0)})
    by_port = Stock(is_running=True, ports=frozenset({8001}))
    assert judge(hidden, stock=by_port)["port 8001"].verdict == "ok"
    assert judge(hidden, stock=Stock())["port 8001"].verdict == "fail"


def test_ports_of_a_ray_head_matter_where_one_may_be_started() -> None:
    machine = GOOD._replace(listeners={6379: Listener(6379, "redis-server (pid 7)", 7)})
    check = judge(machine)["port 6379"]
    assert check.verdict == "warn"
    assert "ray start --head" in check.advice
    assert "port 6379" not in judge(machine, joins=True)


def test_ports_that_the_system_chooses_and_what_is_off_are_not_looked_at() -> None:
    def ports(settings: Config) -> list[str]:
        return [name for name in judge(settings=settings, joins=True) if name.startswith("port ")]

    assert ports(config(listen__port=0)) == []
    assert ports(config(observability__http="")) == ["port 8001"]
    assert ports(config(admin__port=9000)) == ["port 8001", "port 8002", "port 9000"]
    assert ports(config(admin__port=9000, admin__enabled=False)) == ["port 8001", "port 8002"]


def test_the_memory_that_is_needed_counts_every_process_and_the_generation() -> None:
    small = config(sharding__shards=1, updates__enabled=False)
    store = small.runtime.object_store_bytes
    alone = needed_memory(small, Stock(), joins=False)
    # A shard and the router.
    assert alone == RAY_HEAD_BYTES + store + 2 * TORCH_PROCESS_BYTES
    assert needed_memory(small, Stock(loaded_bytes=GIB), joins=False) == alone + GIB
    assert alone - needed_memory(small, Stock(), joins=True) == RAY_HEAD_BYTES - RAY_NODE_BYTES
    large = config(sharding__shards=4, sharding__replicas=2, sharding__standby=1)
    # Twelve shards and a sequencer.
    assert needed_memory(large, Stock(), joins=False) == alone + 12 * TORCH_PROCESS_BYTES
    remote = config(sharding__shards=1, updates__enabled=False, tables__remote=["history"])
    # Two processes of tables.
    assert needed_memory(remote, Stock(), joins=False) == alone + 2 * TORCH_PROCESS_BYTES


def test_a_machine_whose_cluster_runs_already_has_room_for_it() -> None:
    tight = GOOD._replace(memory=GOOD.memory._replace(available=100 * MIB))
    assert judge(tight)["memory"].verdict == "fail"
    running = judge(tight, stock=Stock(is_running=True))["memory"]
    assert (running.verdict, "beside the cluster" in running.found) == ("ok", True)


def test_a_large_generation_needs_more_disk() -> None:
    large = Stock(loaded_bytes=60 * GIB)
    roomy = GOOD._replace(memory=Memory(512 * GIB, 512 * GIB, 0, 0))
    assert judge(roomy)["disk"].verdict == "ok"
    assert judge(roomy, stock=large)["disk"].verdict == "warn"


def test_the_worst_verdict_counts() -> None:
    ok, warn, fail = (Check("x", verdict, "") for verdict in ("ok", "warn", "fail"))  # type: ignore[arg-type]
    assert (worst([]), worst([ok]), worst([warn, ok]), worst([fail, warn])) == (
        *("ok", "ok", "warn"),
        "fail",
    )

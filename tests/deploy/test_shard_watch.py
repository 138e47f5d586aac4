import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from silvershard.cluster.shard_map import ShardEntry
from silvershard.deploy.config_sections import RuntimeSection
from silvershard.deploy.shard_watch import ShardDead, ShardWatch


class FakeShard:
    """A shard whose life the test decides."""

    def __init__(self) -> None:
        self.count = 0
        self.said: ShardEntry | ShardDead | None = None
        self.asked = 0
        self.ended = False

    def restarts(self) -> int:
        return self.count

    def entry(self) -> ShardEntry | None:
        if isinstance(self.said, ShardDead):
            raise self.said
        return self.said

    def ask_again(self) -> None:
        self.asked += 1
        self.said = None

    def end(self) -> None:
        self.ended = True


class FakePulse:
    """The pulse of a process that is silent as long as the test says."""

    def __init__(self, address: str = "") -> None:
        self.address = address
        self.silent_s = 0.0
        self.closed = False

    def poll(self) -> None:
        assert not self.closed

    def close(self) -> None:
        self.closed = True


class Clock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def shard() -> FakeShard:
    return FakeShard()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def pulses() -> list[FakePulse]:
    return []


@pytest.fixture
def watch(shard: FakeShard, clock: Clock, pulses: list[FakePulse]) -> ShardWatch:
    def feel(address: str) -> Any:
        pulses.append(FakePulse(address))
        return pulses[-1]

    runtime = RuntimeSection(crash_limit=3, crash_window_s=60, hang_s=7)
    return ShardWatch(1, shard, runtime, feel=feel, clock=clock)


@pytest.fixture
def process() -> Iterator["subprocess.Popen[bytes]"]:
    with subprocess.Popen(
        [sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE
    ) as child:
        yield child
        child.kill()


def entry(pid: int, epoch: int = 1) -> ShardEntry:
    return ShardEntry(shard=1, replica=0, address="127.0.0.1:1", epoch=epoch, documents=7, pid=pid)


def test_a_shard_serves_as_soon_as_it_says_where(watch: ShardWatch, shard: FakeShard) -> None:
    watch.poll()
    assert watch.record.state == "starting"
    shard.said = entry(os.getpid(), epoch=5)
    watch.poll()
    record = watch.record
    assert (record.state, record.epoch, record.documents) == ("serving", 5, 7)
    assert (record.pid, record.address) == (os.getpid(), "127.0.0.1:1")


def test_a_shard_whose_process_ended_is_lost_at_once(
    watch: ShardWatch, shard: FakeShard, process: "subprocess.Popen[bytes]"
) -> None:
    shard.said = entry(process.pid)
    watch.poll()
    process.kill()
    process.wait()
    watch.poll()
    record = watch.record
    assert (record.state, record.pid, record.reason) == (
        "restarting",
        0,
        f"process {process.pid} ended",
    )
    assert watch.entry is None
    assert record.documents == 7
    assert shard.asked == 1


def test_a_shard_that_comes_back_has_its_new_place(
    watch: ShardWatch, shard: FakeShard, process: "subprocess.Popen[bytes]"
) -> None:
    shard.said = entry(process.pid, epoch=1)
    watch.poll()
    process.kill()
    process.wait()
    shard.count = 1
    watch.poll()
    shard.said = entry(os.getpid(), epoch=2)
    watch.poll()
    record = watch.record
    assert (record.state, record.epoch, record.restarts) == ("serving", 2, 1)
    assert record.reason == ""


def test_a_restart_that_nobody_saw_happen_is_noticed(watch: ShardWatch, shard: FakeShard) -> None:
    shard.said = entry(os.getpid())
    watch.poll()
    shard.count = 1
    watch.poll()
    assert watch.record.state == "restarting"
    assert shard.asked == 1


def test_quick_deaths_in_a_row_are_given_up(
    watch: ShardWatch, shard: FakeShard, clock: Clock
) -> None:
    for deaths in (1, 2, 3):
        assert watch.record.state == "starting" or deaths == 1
        clock.now_s += 1
        shard.count = deaths
        watch.poll()
    record = watch.record
    assert record.state == "failed"
    assert record.reason == "gave up after 3 deaths in a row, each within 60 s of its start"
    assert shard.ended
    shard.said = entry(os.getpid())
    watch.poll()
    assert watch.record.state == "failed"


def test_deaths_far_apart_are_no_crash_loop(
    watch: ShardWatch, shard: FakeShard, clock: Clock
) -> None:
    for deaths in range(1, 10):
        clock.now_s += 61
        shard.count = deaths
        watch.poll()
    assert watch.record.state == "starting"
    assert not shard.ended


def test_a_shard_that_cannot_start_says_why(watch: ShardWatch, shard: FakeShard) -> None:
    shard.said = ShardDead("snapshot x: tables/a is missing")
    watch.poll()
    assert watch.record.state == "failed"
    assert watch.record.reason == "snapshot x: tables/a is missing"


def test_a_copy_of_a_shard_has_a_name_and_a_record_of_its_own() -> None:
    watches = [ShardWatch(1, FakeShard(), RuntimeSection(), replica=replica) for replica in (0, 1)]
    assert [one.name for one in watches] == ["shard 1", "shard 1 replica 1"]
    assert [one.record.replica for one in watches] == [0, 1]


def test_a_process_that_hangs_is_killed(
    watch: ShardWatch,
    shard: FakeShard,
    process: "subprocess.Popen[bytes]",
    pulses: list[FakePulse],
) -> None:
    shard.said = entry(process.pid)
    watch.poll()
    assert [one.address for one in pulses] == ["127.0.0.1:1"]
    os.kill(process.pid, signal.SIGSTOP)
    pulses[0].silent_s = 6.9
    watch.poll()
    assert watch.record.state == "serving"
    assert process.poll() is None
    pulses[0].silent_s = 7.0
    watch.poll()
    assert process.wait(10) == -signal.SIGKILL
    record = watch.record
    assert record.state == "restarting"
    assert record.reason == f"process {process.pid} hung for 7 s and was killed"
    assert pulses[0].closed
    assert shard.asked == 1
    shard.said = entry(os.getpid(), epoch=2)
    shard.count = 1
    watch.poll()
    assert (watch.record.state, watch.record.restarts, len(pulses)) == ("serving", 1, 2)


def test_nobody_feels_the_pulse_of_what_has_ended(
    watch: ShardWatch, shard: FakeShard, pulses: list[FakePulse]
) -> None:
    shard.said = entry(os.getpid())
    watch.poll()
    watch.end()
    assert shard.ended
    assert [one.closed for one in pulses] == [True]


def test_a_process_of_another_host_is_neither_looked_for_nor_killed_here(
    shard: FakeShard, clock: Clock, process: "subprocess.Popen[bytes]"
) -> None:
    runtime = RuntimeSection(crash_limit=3, crash_window_s=60, hang_s=7)
    shard.count = 5
    watch = ShardWatch(1, shard, runtime, feel=None, clock=clock, restarts=5, host="h2")
    # Here this number belongs to nobody.
    shard.said = entry(1 << 22)
    watch.poll()
    watch.poll()
    assert (watch.state, watch.restarts, watch.record.host) == ("serving", 5, "h2")
    # Ray says when it has ended.
    shard.count = 6
    watch.poll()
    assert (watch.state, watch.restarts) == ("restarting", 6)
    assert watch.reason == f"process {1 << 22} ended"
    # One that has this number here is left alone.
    shard.said = entry(process.pid)
    watch.poll()
    assert watch.state == "serving"
    watch.end()
    assert process.poll() is None

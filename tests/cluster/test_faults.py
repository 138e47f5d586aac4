import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from silvershard.cluster import shard_pb2
from silvershard.cluster.faults import (
    FaultRecord,
    Faults,
    faults_of_router,
    faults_of_sequencer,
    faults_of_shard,
    forget_said,
    read_faults,
    suffering,
    write_faults,
)
from silvershard.shard.errors import LogUnavailable, StateError

UNIX_S = 5000.0


def fault(kind: Any, target: str, seconds: float = 10.0, **more: Any) -> FaultRecord:
    return FaultRecord(
        **{
            "name": f"{kind} {target}",
            "kind": kind,
            "target": target,
            "seconds": seconds,
            "began_unix_s": UNIX_S,
            **more,
        }
    )


class Process:
    """A process whose clocks the test moves."""

    def __init__(self, directory: Path) -> None:
        self.now_s = 100.0
        self.unix_s = UNIX_S
        self.directory = directory
        self.faults = self.begin()

    def begin(self) -> Faults:
        return Faults(
            self.directory,
            lambda fault: "router" not in fault.target,
            clock=lambda: self.now_s,
            unix_clock=lambda: self.unix_s,
        )

    def order(self, *faults: FaultRecord) -> None:
        write_faults(self.directory, faults)
        self.faults.look()


@pytest.fixture
def process(tmp_path: Path) -> Process:
    return Process(tmp_path)


def test_without_faults_nothing_happens(process: Process) -> None:
    process.faults.look()
    assert process.faults.delay_s() == 0.0
    assert not process.faults.loses(0, 0, "127.0.0.1:1")
    process.faults.check_log("redis://log")
    assert list(process.directory.iterdir()) == []


def test_a_fault_is_over_by_the_clock_of_who_suffers_it(process: Process) -> None:
    process.order(fault("slow", "shard 0.0", delay_ms=30), fault("slow", "x", 4.0, delay_ms=5))
    assert process.faults.delay_s() == pytest.approx(0.035)
    process.now_s += 4.0
    # Nobody had to look again, and the clock on the wall counts only at the beginning.
    process.unix_s -= 1000.0
    assert process.faults.delay_s() == pytest.approx(0.030)
    process.now_s += 6.0
    assert process.faults.delay_s() == 0.0
    process.faults.look()
    assert process.faults.delay_s() == 0.0


def test_a_process_that_starts_suffers_only_what_is_left(process: Process) -> None:
    process.order(fault("slow", "shard 0.0", delay_ms=30))
    process.unix_s += 9.0
    process.faults = process.begin()
    process.faults.look()
    assert process.faults.holds("slow shard 0.0")
    process.now_s += 1.0
    assert not process.faults.holds("slow shard 0.0")
    # A clock on the wall that went back makes it no longer than it was ordered.
    process.unix_s = UNIX_S - 1000.0
    process.faults = process.begin()
    process.faults.look()
    process.now_s += 10.0
    assert not process.faults.holds("slow shard 0.0")


def test_what_is_cleared_or_of_others_is_not_suffered(process: Process) -> None:
    mine = fault("slow", "shard 0.0", delay_ms=30)
    process.order(mine, fault("slow", "router", delay_ms=30))
    assert process.faults.delay_s() == pytest.approx(0.030)
    process.order(mine.model_copy(update={"state": "cleared"}))
    assert process.faults.delay_s() == 0.0


def test_a_process_says_what_it_suffers(process: Process) -> None:
    process.order(fault("slow", "shard 0.0", delay_ms=30))
    assert suffering(process.directory, os.getpid()) == ("slow shard 0.0",)
    process.now_s += 10.0
    process.faults.look()
    assert suffering(process.directory, os.getpid()) == ()
    assert suffering(process.directory, 1) == ()
    (process.directory / "said-1.json").write_text(json.dumps(["a"]))
    forget_said(process.directory, lambda pid: pid == os.getpid())
    assert [one.name for one in process.directory.glob("said-*")] == [f"said-{os.getpid()}.json"]


def test_a_file_that_cannot_be_read_changes_nothing(
    process: Process, caplog: pytest.LogCaptureFixture
) -> None:
    process.order(fault("slow", "shard 0.0", delay_ms=30))
    (process.directory / "faults.json").write_text("{")
    process.faults.look()
    process.faults.look()
    assert process.faults.delay_s() == pytest.approx(0.030)
    assert sum("cannot be read" in one.getMessage() for one in caplog.records) == 1
    with pytest.raises(StateError, match=r"faults\.json cannot be read"):
        read_faults(process.directory)
    process.now_s += 10.0
    assert process.faults.delay_s() == 0.0


def test_a_log_is_stalled(process: Process) -> None:
    process.order(fault("stall", "sequencer"))
    with pytest.raises(LogUnavailable, match="redis://log: stalled by fault stall sequencer"):
        process.faults.check_log("redis://log")


@pytest.mark.parametrize("target", ["shard 1.0", "host 10.0.0.2"])
def test_links_lose_what_a_partition_separates(process: Process, target: str) -> None:
    process.order(fault("partition", target))
    assert process.faults.loses(1, 0, "10.0.0.2:77")
    assert not process.faults.loses(0, 1, "10.0.0.1:77")
    assert not process.faults.loses(10, 0, "10.0.0.22:77")


def test_an_address_of_six_parts_is_a_host(process: Process) -> None:
    process.order(fault("partition", "host fd00::2"))
    assert process.faults.loses(1, 0, "[fd00::2]:77")


def test_a_share_of_the_messages_is_dropped(process: Process) -> None:
    process.order(fault("drop", "shard 1.0", share=0.25))
    lost = sum(process.faults.loses(1, 0, "10.0.0.2:77") for _ in range(4000))
    assert 880 < lost < 1120
    assert not any(process.faults.loses(1, 1, "10.0.0.2:77") for _ in range(100))


def test_free_slots_count_as_taken(process: Process) -> None:
    def filled() -> tuple[int, int, int]:
        report = shard_pb2.ShardReport()
        one = report.generations.add()
        one.pool.live_slots, one.pool.retired_slots = 100, 3
        one.pool.dead_slots, one.pool.free_pages = 40, 8
        process.faults.fill(report)
        assert one.pool.live_slots == 100
        return one.pool.retired_slots, one.pool.dead_slots, one.pool.free_pages

    assert filled() == (3, 40, 8)
    process.order(fault("fill", "shard 0.0", share=0.5))
    assert filled() == (23, 20, 4)


@pytest.mark.parametrize(
    ("begin", "suffered"),
    [
        (lambda path: faults_of_shard(path, 1, 0), {"slow shard 1.0", "stall shard 1.0"}),
        (faults_of_sequencer, {"stall sequencer"}),
        (faults_of_router, {"partition shard 1.0", "drop host a"}),
    ],
)
def test_every_process_follows_what_it_can_suffer(
    tmp_path: Path, begin: Callable[[str], Faults | None], suffered: set[str]
) -> None:
    assert begin("") is None
    faults = begin(str(tmp_path))
    assert faults is not None
    try:
        many = [
            fault("slow", "shard 1.0", began_unix_s=4e9),
            fault("slow", "shard 1.1", began_unix_s=4e9),
            fault("stall", "shard 1.0", began_unix_s=4e9),
            fault("stall", "sequencer", began_unix_s=4e9),
            fault("partition", "shard 1.0", began_unix_s=4e9),
            fault("drop", "host a", began_unix_s=4e9),
            fault("hang", "shard 1.0", began_unix_s=4e9),
        ]
        write_faults(tmp_path, tuple(many))
        looked = threading.Event()
        for _ in range(1000):
            if set(suffering(tmp_path, os.getpid())) == suffered:
                break
            looked.wait(0.01)
        assert set(suffering(tmp_path, os.getpid())) == suffered
    finally:
        faults.stop()

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from silvershard.deploy import plan_speed
from silvershard.deploy.errors import CommandError, TimedOut
from silvershard.deploy.placement import Copy, Host
from silvershard.deploy.plan_speed import BatchTimes, Speed, SpeedTask, expected, measure, run
from silvershard.deploy.processes import descendants


@pytest.fixture
def task(generation: Any) -> SpeedTask:
    return SpeedTask(
        snapshot=str(generation.path),
        num_shards=2,
        shard=1,
        share=2,
        devices=("cpu",),
        headroom=0.1,
        batches=(1, 4),
        seconds=0.01,
    )


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    before = set(descendants(os.getpid()))
    yield
    assert set(descendants(os.getpid())) <= before


def test_real_batches_of_a_real_shard_are_timed(task: SpeedTask) -> None:
    waited: list[None] = []
    found = run(task, 5, lambda: waited.append(None))
    assert waited == [None]
    assert found.process_bytes == 5
    assert 200 < found.documents < 400
    assert [one.batch for one in found.times] == [1, 4]
    for one in found.times:
        assert one.runs >= 3
        assert one.encode_s > 0
        assert one.rounds_s > 0


def test_a_generation_without_golden_requests_is_measured_with_an_empty_user(
    task: SpeedTask, generation: Any
) -> None:
    from silvershard.shard.snapshot import GOLDEN, open_snapshot

    has_golden = GOLDEN in open_snapshot(generation.path).manifest.files
    requests = plan_speed._requests(Path(task.snapshot))
    assert (requests[0].features == {}) == (not has_golden)
    assert {one.k for one in requests} == {100}


@pytest.mark.slow
def test_processes_measure_at_once_and_end(task: SpeedTask) -> None:
    found = measure(task, processes=2, threads=1)
    assert (found.processes, found.threads) == (2, 1)
    assert 200 < found.documents < 400
    assert found.loaded_bytes > found.process_bytes > 30 << 20
    assert len(found.times) == 2


def test_a_process_that_cannot_load_says_why(task: SpeedTask, tmp_path: Path) -> None:
    missing = task.model_copy(update={"snapshot": str(tmp_path)})
    with pytest.raises(CommandError, match=r"cannot be measured: .*manifest.json is missing"):
        measure(missing, processes=1, threads=1)


def test_a_process_that_hangs_is_given_up(
    task: SpeedTask, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    sleeper = tmp_path / "python"
    sleeper.write_text("#!/bin/sh\nexec sleep 60\n")
    sleeper.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(sleeper))
    monkeypatch.setattr(plan_speed, "_PAUSES_S", 0.01)
    began_s = time.monotonic()
    with pytest.raises(TimedOut, match="use --no-measure"):
        measure(task, processes=1, threads=1, timeout_s=0.05)
    assert time.monotonic() - began_s < 30


def speed_of(rounds_s: float, encode_s: float, *, threads: int = 1, batch: int = 1) -> Speed:
    times = BatchTimes(batch=batch, runs=9, encode_s=encode_s, rounds_s=rounds_s)
    return Speed(1, threads, 1000, 0, 0, (times,))


def hosts_of(*cpus: float) -> list[Host]:
    return [Host(f"h{at}", one) for at, one in enumerate(cpus)]


def test_one_process_bounds_a_host_with_cores_to_spare() -> None:
    (found,) = expected(speed_of(0.01, 0.0), hosts_of(8), {Copy(0, 0): "h0"}, [1000])
    assert found.qps == pytest.approx(100)
    assert found.bound == "shard 0 replica 0, which runs one batch at a time"


def test_cores_bound_a_host_with_many_processes() -> None:
    at = {Copy(shard, 0): "h0" for shard in range(4)}
    (found,) = expected(speed_of(0.01, 0.0), hosts_of(2), at, [1000] * 4)
    assert found.qps == pytest.approx(50)
    assert found.bound == "the 2 cores of h0"
    (wide,) = expected(speed_of(0.01, 0.0, threads=2), hosts_of(2), at, [1000] * 4)
    assert wide.qps == pytest.approx(25)


def test_replicas_share_the_queries_of_a_shard_and_standbys_answer_none() -> None:
    at = {Copy(0, 0): "h0", Copy(0, 1): "h1", Copy(0, 0, standby=True): "h2"}
    (found,) = expected(speed_of(0.01, 0.0), hosts_of(1, 1, 1), at, [1000])
    assert found.qps == pytest.approx(200)


def test_documents_batches_and_the_user_tower_count() -> None:
    at = {Copy(0, 0): "h0", Copy(1, 0): "h1"}
    (found,) = expected(speed_of(0.08, 0.016, batch=8), hosts_of(1, 1), at, [2000, 1000])
    # The larger shard takes 20 ms a query, and half of the queries are encoded there, for 2 ms.
    assert found.qps == pytest.approx(1 / (0.02 + 0.001))
    assert found.batch == 8


def test_a_process_whose_parent_is_gone_ends_at_once() -> None:
    found = subprocess.run(
        [sys.executable, "-P", "-m", "silvershard.deploy.plan_speed", "1"],
        input="",
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == -signal.SIGTERM
    assert found.stdout == ""

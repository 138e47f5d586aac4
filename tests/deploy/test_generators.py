import json
import os
import re
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from silvershard.cluster import Query
from silvershard.cluster.arrivals import Stretch
from silvershard.deploy.bench_requests import prepare
from silvershard.deploy.errors import CommandError, TimedOut
from silvershard.deploy.generators import Generators, Load, Target
from silvershard.deploy.processes import Process, descendants, is_alive, wait_gone


def target_of(*addresses: str) -> Target:
    made = prepare("here", [(Query(k=k), {"user": k}) for k in (3, 4)])
    return Target(addresses, made.messages, made.described)


def load(seconds: float = 0.3, **more: Any) -> Load:
    return Load(stretches=(Stretch(seconds, 100, 100),), poisson=False, **more)


@pytest.fixture
def nobody_is_left() -> Iterator[None]:
    before = descendants(os.getpid())
    yield
    # What multiprocessing keeps beside its processes ends with this one.
    left = [one for one in descendants(os.getpid()) if one not in before and not _tracks(one)]
    assert wait_gone(left, 10.0) == []


def _tracks(process: Process) -> bool:
    try:
        command = Path(f"/proc/{process.pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return b"resource_tracker" in command


@pytest.mark.usefixtures("nobody_is_left")
def test_processes_share_a_load_and_their_record_is_one(fake_router: Any, tmp_path: Path) -> None:
    record = tmp_path / "record.jsonl"
    cpu = min(os.sched_getaffinity(0))
    with Generators(target_of(fake_router.address), processes=2, cpus=[cpu]) as generators:
        generators.connect()
        report, interrupted = generators.run(load(warmup_s=0.1, record=record, deadline_s=20.0))
        again, _ = generators.run(load(deadline_s=20.0))
    assert not interrupted
    assert report.total.count() == again.total.count() == 30
    assert report.total.outcomes == {"ok": 30}
    assert len(report.generators) == 2
    assert len(fake_router.asked) == 70
    lines = [json.loads(line) for line in record.read_text().splitlines()]
    assert [one["number"] for one in lines] == list(range(40))
    assert [one["at_s"] for one in lines] == pytest.approx([(n - 10) / 100 for n in range(40)])
    for one in lines:
        assert one["request"] == {
            "index": one["number"] % 2,
            "user": 3 + one["number"] % 2,
            "k": 3 + one["number"] % 2,
        }
        assert one["at_s"] <= one["sent_s"] <= one["done_s"]
        assert (one["kind"], one["code"], one["coverage"]) == ("query", "OK", 1.0)
        assert (one["generation"], one["shard_map_version"]) == (1, 3)
        assert one["cut"] == one["ids"][:1]
        assert one["router"] == fake_router.address
    assert list(tmp_path.iterdir()) == [record]


@pytest.fixture
def may_be_interrupted() -> Iterator[None]:
    # Whoever is started in the background of a shell ignores it.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("nobody_is_left", "may_be_interrupted")
def test_a_ctrl_c_ends_a_load_with_what_was_measured(fake_router: Any, tmp_path: Path) -> None:
    record = tmp_path / "record.jsonl"

    def interrupt() -> None:
        # Some are answered, and one is in flight then.
        while len(fake_router.asked) < 20:
            fake_router.reached.wait(0.01)
        fake_router.hold.clear()
        while len(fake_router.asked) < 25:
            fake_router.reached.wait(0.01)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    with Generators(target_of(fake_router.address)) as generators:
        generators.connect()
        thread = threading.Thread(target=interrupt)
        thread.start()
        report, interrupted = generators.run(load(3600.0, record=record, deadline_s=20.0))
        thread.join()
    assert interrupted
    assert 15 <= report.total.outcomes["ok"] <= 25
    assert report.generators[0].cut_short >= 1
    assert 0 < report.measured_s < 30
    assert len(record.read_text().splitlines()) == report.total.count()


@pytest.mark.usefixtures("nobody_is_left")
def test_a_router_that_is_not_there_is_named() -> None:
    with (
        Generators(target_of("127.0.0.1:9"), connect_s=0.2) as generators,
        pytest.raises(TimedOut, match=r"the router at 127\.0\.0\.1:9 could not be reached"),
    ):
        generators.connect()


@pytest.mark.usefixtures("nobody_is_left")
def test_a_process_that_dies_is_said_to_have(fake_router: Any) -> None:
    with Generators(target_of(fake_router.address)) as generators:
        generators.connect()
        (worker,) = [one for one in descendants(os.getpid()) if _works(one)]
        os.kill(worker.pid, signal.SIGKILL)
        with pytest.raises(CommandError, match="a process of the load generator has died"):
            generators.run(load())
    assert not is_alive(worker)


def _works(process: Process) -> bool:
    return b"spawn_main" in Path(f"/proc/{process.pid}/cmdline").read_bytes()


@pytest.mark.usefixtures("nobody_is_left")
def test_a_record_that_cannot_be_written_is_an_error(fake_router: Any, tmp_path: Path) -> None:
    record = tmp_path / "none" / "record"
    with Generators(target_of(fake_router.address)) as generators:
        generators.connect()
        with pytest.raises(FileNotFoundError, match=re.escape(str(record))):
            generators.run(load(record=record))
    assert fake_router.asked == []


def test_a_processor_that_is_not_there_is_refused(fake_router: Any) -> None:
    with pytest.raises(CommandError, match=r"cpu must be one of \[.*\], got 100000"):
        Generators(target_of(fake_router.address), cpus=[100_000])

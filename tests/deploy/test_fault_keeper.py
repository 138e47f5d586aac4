import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from silvershard.cluster.faults import FaultRecord, suffering, write_faults
from silvershard.deploy.fault_keeper import keep_up, main, repair, stopped
from silvershard.deploy.processes import Process, identify

WAIT_S = 60.0


def until(true: Callable[[], object], what: str) -> None:
    give_up_s = time.monotonic() + WAIT_S
    while not true():
        assert time.monotonic() < give_up_s, what
        time.sleep(0.005)


def order(directory: Path, seconds: float, **more: object) -> FaultRecord:
    fault = FaultRecord.model_validate(
        {
            "name": "a",
            "kind": "hang",
            "target": "shard 0.0",
            "seconds": seconds,
            "began_unix_s": time.time(),
            **more,
        }
    )
    write_faults(directory, (fault,))
    return fault


def state_of(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


@pytest.fixture
def victim() -> Iterator[Process]:
    child = subprocess.Popen(["sleep", "600"])
    try:
        found = identify(child.pid)
        assert found is not None
        yield found
    finally:
        child.kill()
        child.wait()


def test_a_process_stands_still_until_the_time_is_over(tmp_path: Path, victim: Process) -> None:
    order(tmp_path, 3.0)
    thread = threading.Thread(target=keep_up, args=(tmp_path, "a", victim, threading.Event()))
    thread.start()
    until(lambda: suffering(tmp_path, os.getpid()) == ("a",), "it is not there")
    until(lambda: state_of(victim.pid) == "T", "it does not stand still")
    thread.join(WAIT_S)
    assert state_of(victim.pid) == "S"


def test_it_goes_on_when_the_fault_is_cleared_or_the_keeper_shall_end(
    tmp_path: Path, victim: Process
) -> None:
    for clears in (True, False):
        fault, ended = order(tmp_path, 600.0), threading.Event()
        thread = threading.Thread(target=keep_up, args=(tmp_path, "a", victim, ended))
        thread.start()
        until(lambda: state_of(victim.pid) == "T", "it does not stand still")
        if clears:
            write_faults(tmp_path, (fault.model_copy(update={"state": "cleared"}),))
        else:
            ended.set()
        thread.join(WAIT_S)
        assert state_of(victim.pid) == "S"


def test_a_fault_that_is_not_written_down_does_not_happen(tmp_path: Path, victim: Process) -> None:
    assert not keep_up(tmp_path, "a", victim, threading.Event())
    fault = order(tmp_path, 600.0)
    write_faults(tmp_path, (fault.model_copy(update={"state": "cleared"}),))
    assert not keep_up(tmp_path, "a", victim, threading.Event())
    assert main(["--directory", str(tmp_path), "--fault", "a"]) == 1


def test_the_end_of_the_victim_ends_the_keeper(tmp_path: Path) -> None:
    order(tmp_path, 600.0)
    child = subprocess.Popen(["sleep", "600"])
    found = identify(child.pid)
    assert found is not None
    thread = threading.Thread(target=keep_up, args=(tmp_path, "a", found, threading.Event()))
    thread.start()
    until(lambda: state_of(child.pid) == "T", "it does not stand still")
    child.kill()
    child.wait()
    thread.join(WAIT_S)
    assert not thread.is_alive()


def test_the_keeper_outlives_whoever_ordered_the_fault(tmp_path: Path, victim: Process) -> None:
    order(tmp_path, 3.0)
    command = [sys.executable, "-P", "-m", "silvershard.deploy.fault_keeper"]
    command += ["--directory", str(tmp_path), "--fault", "a"]
    command += ["--victim", victim.model_dump_json()]
    # The orderer starts the keeper and is gone at once.
    orderer = (
        "import json, subprocess, sys; "
        "print(subprocess.Popen(json.loads(sys.argv[1]), start_new_session=True, "
        "stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).pid)"
    )
    done = subprocess.run(
        [sys.executable, "-c", orderer, json.dumps(command)],
        capture_output=True,
        text=True,
        check=True,
    )
    keeper = int(done.stdout)
    try:
        until(lambda: state_of(victim.pid) == "T", "it does not stand still")
        until(lambda: state_of(victim.pid) == "S", "it stands still for ever")
    finally:
        until(lambda: identify(keeper) is None, "the keeper stays")


def test_a_byte_is_another_one_for_a_while(tmp_path: Path) -> None:
    path = tmp_path / "items"
    path.write_bytes(b"abc")
    fault = order(tmp_path, 600.0, kind="corrupt", path=str(path), offset=1, byte=ord("b"))
    ended = threading.Event()
    thread = threading.Thread(target=keep_up, args=(tmp_path, "a", None, ended))
    thread.start()
    until(lambda: path.read_bytes() == b"a\x9dc", "it is whole")
    ended.set()
    thread.join(WAIT_S)
    assert path.read_bytes() == b"abc"
    # What has been written there since is left alone.
    path.write_bytes(b"xyz")
    repair(fault)
    assert path.read_bytes() == b"xyz"
    path.unlink()
    repair(fault)
    assert not path.exists()


def test_a_process_goes_on_also_after_an_error(victim: Process) -> None:
    def fail() -> None:
        with stopped(victim):
            until(lambda: state_of(victim.pid) == "T", "it does not stand still")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    until(lambda: state_of(victim.pid) == "S", "it stands still")

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from silvershard.deploy.config import Config, load
from silvershard.deploy.host_router import Detached, HostRouter, RouterDir
from silvershard.deploy.processes import Process, identify, is_alive, kill_all
from silvershard.deploy.state import StateDir


def until(true: Callable[[], object]) -> None:
    give_up_s = time.monotonic() + 60
    while not true():
        assert time.monotonic() < give_up_s
        time.sleep(0.01)


def config(**options: object) -> Config:
    return load(None, environ={}, options={"listen.port": 0, **options})


@pytest.fixture
def place(tmp_path: Path) -> Iterator[RouterDir]:
    state = StateDir(tmp_path)
    state.create()
    made = RouterDir(state, "h1")
    yield made
    HostRouter(made, config()).stop()


def test_hosts_that_share_a_directory_have_places_of_their_own(tmp_path: Path) -> None:
    state = StateDir(tmp_path)
    first, second = RouterDir(state, "h1"), RouterDir(state, "h2")
    assert first.router_file != second.router_file
    assert first.router_log != second.router_log
    assert first.shard_map_file == second.shard_map_file == state.shard_map_file


def test_a_router_is_adopted_by_the_next_agent_and_ended_by_it(place: RouterDir) -> None:
    first = HostRouter(place, config())
    first.start()
    until(lambda: first.poll() or first.address)
    pid = first.record.pid
    process = identify(pid)
    assert process is not None
    # It is no child of this process, so that it does not end with whatever Ray ends.
    assert os.getpid() not in parents(pid)
    second = HostRouter(place, config())
    second.start()
    until(lambda: second.poll() or second.record.state == "serving")
    assert (second.record.pid, second.address) == (pid, first.address)
    assert second.record.restarts == 0
    second.stop()
    assert not is_alive(process)
    assert not place.router_file.exists()


def parents(pid: int) -> set[int]:
    found: set[int] = set()
    while pid > 1:
        text = Path(f"/proc/{pid}/stat").read_text()
        pid = int(text[text.rindex(")") + 2 :].split()[1])
        found.add(pid)
    return found


@pytest.mark.slow
def test_a_router_with_other_settings_is_replaced(place: RouterDir) -> None:
    first = HostRouter(place, config())
    first.start()
    until(lambda: first.poll() or first.address)
    before = identify(first.record.pid)
    assert before is not None
    second = HostRouter(place, config(**{"admission.queue": 7}))
    second.start()
    until(lambda: second.poll() or second.address)
    assert not is_alive(before)
    assert second.record.pid != before.pid
    second.stop()


@pytest.mark.slow
def test_a_router_that_ends_is_started_again(place: RouterDir) -> None:
    router = HostRouter(place, config())
    router.start()
    until(lambda: router.poll() or router.address)
    address, pid = router.address, router.record.pid
    os.kill(pid, signal.SIGKILL)
    until(lambda: router.poll() or router.record.restarts == 1)
    until(lambda: router.poll() or router.record.state == "serving")
    assert router.address == address
    assert router.record.pid != pid
    router.stop()


def test_a_detached_process_is_waited_for_and_ended() -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    found = identify(child.pid)
    assert found is not None
    detached = Detached(found)
    assert (detached.pid, detached.poll()) == (child.pid, None)
    with pytest.raises(subprocess.TimeoutExpired):
        detached.wait(0.01)
    detached.terminate()
    assert detached.wait(10.0) == 1
    assert detached.poll() == 1
    child.wait()
    detached.kill()
    assert kill_all([found]) == []


def test_a_number_that_another_process_has_by_now_is_left_alone() -> None:
    mine = identify(os.getpid())
    assert mine is not None
    other = Detached(Process(pid=mine.pid, started=mine.started + 1, boot=mine.boot))
    other.kill()
    assert other.poll() == 1

import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from silvershard.cluster.config import RouterConfig
from silvershard.deploy.config import Config, load
from silvershard.deploy.router_watch import RouterWatch
from silvershard.deploy.state import StateDir


@pytest.fixture
def state(tmp_path: Path) -> StateDir:
    directory = StateDir(tmp_path)
    directory.create()
    return directory


@pytest.fixture
def watch(state: StateDir) -> Iterator[RouterWatch]:
    router = RouterWatch(state, config(0))
    yield router
    router.stop()


def config(port: int) -> Config:
    return load(None, environ={}, options={"listen.port": port, "admission.queue": 7})


def until(true: Callable[[], bool]) -> None:
    give_up_s = time.monotonic() + 60
    while not true():
        assert time.monotonic() < give_up_s
        time.sleep(0.01)


def test_a_router_that_was_never_started_is_left_alone(watch: RouterWatch) -> None:
    watch.poll()
    assert (watch.record.state, watch.record.pid, watch.record.restarts) == ("starting", 0, 0)
    watch.stop()


def test_a_router_comes_back_on_its_port_and_ends_when_told(
    watch: RouterWatch, state: StateDir
) -> None:
    watch.start()
    until(lambda: bool(watch.address))
    settings = RouterConfig.model_validate_json(state.router_file.read_bytes())
    assert settings.admission.queue == 7
    assert settings.map_path == str(state.shard_map_file)
    # No shard was ever reached, so it does not serve yet.
    watch.poll()
    assert watch.record.state == "starting"
    first, address = watch.record.pid, watch.address
    os.kill(first, signal.SIGKILL)
    until(lambda: watch.has_failed)
    watch.poll()
    assert watch.record.state == "restarting"
    assert watch.record.reason == "ended by SIGKILL"
    until(lambda: watch.poll() or watch.record.state == "serving")
    assert (watch.record.restarts, watch.address) == (1, address)
    assert watch.record.pid != first
    watch.stop()
    with socket.create_server(("127.0.0.1", int(address.rpartition(":")[2]))):
        pass


def test_the_reason_of_a_router_that_cannot_start_is_known(state: StateDir) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        watch = RouterWatch(state, config(port))
        watch.start()
        until(lambda: watch.has_failed)
        assert f"127.0.0.1:{port}" in watch.last_words()
        watch.stop()


def test_last_words_are_those_of_the_last_line(watch: RouterWatch, state: StateDir) -> None:
    assert watch.last_words() == "it wrote nothing"
    state.router_log.write_text('plain\n{"message": "port in use"}\n\n')
    assert watch.last_words() == "port in use"
    state.router_log.write_text('{"message": "x"}\nSegmentation fault\n')
    assert watch.last_words() == "Segmentation fault"

import http.client
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from silvershard.cluster.config import RouterConfig
from silvershard.deploy.config import Config, load
from silvershard.deploy.router_watch import RouterWatch, http_wanted
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


def ask_http(address: str) -> int:
    """The status of the readiness probe, of a router that does not serve yet."""
    connection = http.client.HTTPConnection(address, timeout=10)
    connection.request("GET", "/readyz")
    status = connection.getresponse().status
    connection.close()
    return status


def until(true: Callable[[], object]) -> None:
    give_up_s = time.monotonic() + 60
    while not true():
        assert time.monotonic() < give_up_s
        time.sleep(0.01)


def test_a_router_that_was_never_started_is_left_alone(watch: RouterWatch) -> None:
    watch.poll()
    assert (watch.record.state, watch.record.pid, watch.record.restarts) == ("starting", 0, 0)
    watch.stop()


@pytest.mark.slow
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
    first, address, probed = watch.record.pid, watch.address, watch.http
    assert ask_http(probed) == 503
    os.kill(first, signal.SIGKILL)
    until(lambda: watch.has_failed)
    watch.poll()
    assert watch.record.state == "restarting"
    assert watch.record.reason == "ended by SIGKILL"
    until(lambda: watch.poll() or watch.record.state == "serving")
    assert (watch.record.restarts, watch.address, watch.http) == (1, address, probed)
    assert ask_http(probed) == 503
    assert watch.record.pid != first
    watch.stop()
    for one in (address, probed):
        with socket.create_server(("127.0.0.1", int(one.rpartition(":")[2]))):
            pass


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, "127.0.0.1:8002"),
        ({"listen.port": 0}, "127.0.0.1:0"),
        ({"observability.http": ""}, ""),
        ({"observability.http": "", "listen.port": 0}, ""),
        ({"observability.http": "[::1]:9000", "listen.port": 0}, "[::1]:0"),
        ({"observability.http": "[::1]:9000"}, "[::1]:9000"),
    ],
)
def test_where_no_port_is_fixed_http_has_none_either(
    options: dict[str, object], expected: str
) -> None:
    assert http_wanted(load(None, environ={}, options=options)) == expected


@pytest.mark.slow
def test_a_router_that_hangs_is_killed_and_comes_back(state: StateDir) -> None:
    watch = RouterWatch(state, load(None, environ={}, options={"runtime.hang_s": 1}))
    try:
        watch.start()
        until(lambda: watch.poll() or (watch._pulse is not None and watch._pulse.status))
        first = watch.record.pid
        os.kill(first, signal.SIGSTOP)
        until(lambda: watch.poll() or watch.record.state == "restarting")
        assert watch.record.reason.startswith("hung for ")
        assert watch.record.reason.endswith(" s and was killed")
        until(lambda: watch.poll() or watch.record.state == "serving")
        assert watch.record.pid not in (0, first)
    finally:
        watch.stop()


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

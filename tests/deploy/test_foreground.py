import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from silvershard.deploy import foreground, launch, operate
from silvershard.deploy.config import Config, load
from silvershard.deploy.errors import ExitCode
from silvershard.deploy.processes import is_alive, wait_gone
from silvershard.deploy.state import StateDir
from silvershard.shard.generations import generation_dir


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[socket.socket]:
    """The socket of a service manager."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as bound:
        bound.bind(str(tmp_path / "notify"))
        bound.settimeout(10)
        yield bound


class Fake:
    """A cluster that starts and stops by word; ``events`` is what happened, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.events: list[str] = []
        self.ended: Callable[[int], None] = lambda _: None
        monkeypatch.setattr(operate, "start", self.start)
        monkeypatch.setattr(operate, "described", lambda record: {"state": "up"})
        monkeypatch.setattr(launch, "stop", self.stop)

    def start(self, state: StateDir, config: Config, **options: Any) -> tuple[Any, float]:
        assert options["detached"] is False
        self.ended = options["ended"]
        self.events.append("start")
        return SimpleNamespace(generation=3), 1.25

    def stop(self, state: StateDir, *, timeout_s: float) -> None:
        self.events.append(f"stop {timeout_s:g}")


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Fake:
    return Fake(monkeypatch)


def run(fake: Fake, tmp_path: Path, ready: Callable[[], object]) -> ExitCode:
    def told(document: dict[str, Any]) -> None:
        assert document == {"state": "up", "seconds": 1.2}
        fake.events.append("ready")
        ready()

    return foreground.run(
        StateDir(tmp_path), load(None, environ={}), generation=None, ready=told, environ={}
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_stops_it_in_order_and_is_no_failure(
    fake: Fake, tmp_path: Path, number: signal.Signals
) -> None:
    before = signal.getsignal(number)
    assert run(fake, tmp_path, lambda: os.kill(os.getpid(), number)) == ExitCode.OK
    assert fake.events == ["start", "ready", "stop 20"]
    assert signal.getsignal(number) is before


@pytest.mark.parametrize(
    ("code", "expected"), [(0, ExitCode.OK), (1, ExitCode.FAILED), (-9, ExitCode.FAILED)]
)
def test_a_cluster_that_ends_by_itself_has_failed_and_one_that_was_stopped_has_not(
    fake: Fake, tmp_path: Path, code: int, expected: ExitCode
) -> None:
    end = lambda: threading.Thread(target=fake.ended, args=(code,)).start()  # noqa: E731
    assert run(fake, tmp_path, end) == expected
    # Also then something may be left to clean up.
    assert fake.events[-1] == "stop 20"


def test_an_answer_that_cannot_be_shown_leaves_nothing_running(fake: Fake, tmp_path: Path) -> None:
    def fail() -> None:
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        run(fake, tmp_path, fail)
    assert fake.events == ["start", "ready", "stop 20"]


def test_a_service_manager_is_told_and_nobody_else(manager: socket.socket, tmp_path: Path) -> None:
    foreground.notify({"NOTIFY_SOCKET": str(tmp_path / "notify")}, "READY=1")
    assert manager.recv(100) == b"READY=1"
    foreground.notify({}, "READY=1")
    foreground.notify({"NOTIFY_SOCKET": ""}, "READY=1")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as hidden:
        name = f"silvershard-test-{os.getpid()}"
        hidden.bind(f"\0{name}")
        hidden.settimeout(10)
        foreground.notify({"NOTIFY_SOCKET": f"@{name}"}, "STOPPING=1")
        assert hidden.recv(100) == b"STOPPING=1"


@pytest.mark.ray
@pytest.mark.slow
def test_the_command_serves_says_so_and_leaves_nothing_when_told_to_stop(
    manager: socket.socket, tmp_path: Path, generation: Any
) -> None:
    state = StateDir(tmp_path / "s")
    state.create()
    state.generations.mkdir()
    generation_dir(state.generations, 1).symlink_to(generation.path)
    manager.settimeout(120)
    with subprocess.Popen(
        [
            *(sys.executable, "-P", "-m", "silvershard.deploy.cli", "up", "--foreground"),
            *("--state", str(state.root), "--listen", "127.0.0.1:0", "--shards", "1"),
            *("--output", "json"),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"NOTIFY_SOCKET": str(tmp_path / "notify")},
    ) as process:
        try:
            assert manager.recv(100).startswith(b"READY=1\nSTATUS=serving generation 1")
            assert process.stdout is not None
            document = json.loads(process.stdout.readline())
            assert document["state"] == "up"
            record = state.read_record()
            assert record is not None
            assert record.http == document["http"] != ""
            assert process.poll() is None
            process.send_signal(signal.SIGTERM)
            assert manager.recv(100) == b"STOPPING=1"
            assert process.wait(60) == 0
        finally:
            process.kill()
    assert wait_gone([record.guard, record.driver, *record.processes], 10.0) == []
    assert not any(map(is_alive, record.processes))
    give_up_s = time.monotonic() + 10
    while state.read_record() is not None:
        assert time.monotonic() < give_up_s
        time.sleep(0.01)

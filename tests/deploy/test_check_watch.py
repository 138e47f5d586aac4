import sys
import time
from pathlib import Path

import pytest

from silvershard.deploy import check_watch
from silvershard.deploy.check_watch import CheckWatch
from silvershard.deploy.processes import identify, is_alive
from silvershard.deploy.state import StateDir


@pytest.fixture
def watch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest):  # type: ignore[no-untyped-def]
    """A comparison that runs some Python instead."""
    start = check_watch.subprocess.Popen

    def popen(command: list[str], **options: object) -> object:
        assert command[1:6] == [
            *("-P", "-m", "silvershard.deploy.paired_check"),
            *("--config", str(tmp_path / "router.json")),
        ]
        assert command[6:10] == ["--old", str(tmp_path / "old"), "--new", str(tmp_path / "new")]
        return start([sys.executable, "-c", request.param], **options)  # type: ignore[call-overload]

    monkeypatch.setattr(check_watch.subprocess, "Popen", popen)
    made = CheckWatch(StateDir(tmp_path), tmp_path / "old", tmp_path / "new")
    yield made
    made.end()


def found(watch: CheckWatch) -> str:
    give_up_s = time.monotonic() + 60.0
    while (said := watch.poll()) is None:
        assert time.monotonic() < give_up_s
        time.sleep(0.001)
    assert watch.poll() == said
    return said


@pytest.mark.parametrize(
    ("watch", "said"),
    [
        ("pass", ""),
        ("import sys; print('item 7 differs'); sys.exit(1)", "item 7 differs"),
        ("import sys; sys.exit(3)", "the answers could not be compared: exit code 3"),
        (
            "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
            "the answers could not be compared: exit code -9",
        ),
    ],
    indirect=["watch"],
)
def test_what_it_found_is_told(watch: CheckWatch, said: str) -> None:
    assert found(watch) == said


@pytest.mark.parametrize("watch", ["import time; time.sleep(600)"], indirect=True)
def test_it_is_killed_when_nobody_wants_to_know_any_more(watch: CheckWatch) -> None:
    process = identify(watch._process.pid)
    assert process is not None
    assert is_alive(process)
    assert watch.poll() is None
    watch.end()
    assert not is_alive(process)
    assert watch.poll()
    watch.end()

import json
import socket
from typing import Any

import pytest

from silvershard.deploy import verbs
from silvershard.deploy.errors import ExitCode
from silvershard.deploy.state import StateDir

HERE = socket.gethostname()


def run(state: StateDir, *arguments: str) -> int:
    return verbs.run([*arguments, "--state", str(state.root)])


def states(state: StateDir) -> dict[str, Any]:
    return dict(state.control.read().host_states)


def test_hosts_are_listed(idle_state: StateDir, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(idle_state, "node", "list", "--output", "json") == ExitCode.OK
    assert json.loads(capsys.readouterr().out) == {
        "hosts": [{"host": HERE, "state": "up", "copies": 1, "serving": 1}]
    }


def test_what_would_lose_the_last_copy_is_refused(
    idle_state: StateDir, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(idle_state, "drain", HERE) == ExitCode.REFUSED
    assert f"host {HERE} cannot be set to retired" in capsys.readouterr().err
    assert run(idle_state, "node", "maintenance", HERE) == ExitCode.REFUSED
    assert "shard 0 would lose its last copy" in capsys.readouterr().err
    assert states(idle_state) == {}


def test_force_a_dry_run_and_the_way_back(
    idle_state: StateDir, capsys: pytest.CaptureFixture[str]
) -> None:
    forced = ("node", "maintenance", HERE, "--force")
    assert run(idle_state, *forced, "--dry-run") == ExitCode.OK
    assert f"host {HERE} would be maintenance, it was up" in capsys.readouterr().out
    assert states(idle_state) == {}
    assert run(idle_state, *forced) == ExitCode.OK
    assert states(idle_state) == {HERE: "maintenance"}
    # Nothing new comes to a host in maintenance.
    assert run(idle_state, "undrain", HERE) == ExitCode.OK
    assert states(idle_state) == {}
    assert run(idle_state, "drain", HERE, "--force") == ExitCode.OK
    assert states(idle_state) == {HERE: "retired"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("node", "list", "h1"), "node list takes no host, got h1"),
        (("node", "down"), "node down needs the name of a host"),
        (("undrain", "nobody"), "there is no host nobody"),
    ],
)
def test_wrong_usage(
    idle_state: StateDir,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    words: str,
) -> None:
    assert run(idle_state, *arguments) == ExitCode.USAGE
    assert words in capsys.readouterr().err

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from silvershard.deploy import verbs
from silvershard.deploy.errors import ExitCode
from silvershard.deploy.state import StateDir
from silvershard.shard.generations import generation_dir, list_generations


@pytest.fixture
def state(tmp_path: Path, generation: Any) -> StateDir:
    made = StateDir(tmp_path / "s")
    made.create()
    shutil.copytree(generation.path, generation_dir(made.generations, 1))
    return made


def run(state: StateDir, *words: str) -> int:
    try:
        return verbs.run([*words, "--state", str(state.root)])
    except SystemExit as error:
        return int(error.code or 0)


def test_generations_are_listed_copied_restored_and_removed(
    state: StateDir, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url = f"file://{tmp_path}/copies"
    assert run(state, "snapshots") == ExitCode.OK
    assert "generation" in capsys.readouterr().out
    assert run(state, "snapshots", "--output", "json") == ExitCode.OK
    (found,) = json.loads(capsys.readouterr().out)["snapshots"]
    assert found["generation"] == 1
    assert run(state, "snapshots", "--push", url, "--dry-run") == ExitCode.OK
    assert not (tmp_path / "copies").exists()
    assert run(state, "snapshots", "--push", url, "--generation", "latest") == ExitCode.OK
    other = StateDir(tmp_path / "other")
    assert run(other, "restore", url, "7") == ExitCode.FAILED
    assert "holds no generation 7; there is 1" in capsys.readouterr().err
    assert run(other, "restore", url, "latest", "--dry-run") == ExitCode.OK
    assert list_generations(other.generations) == []
    assert run(other, "restore", url, "latest") == ExitCode.OK
    assert list_generations(other.generations) == [1]
    assert run(other, "snapshots", "--prune", "0") == ExitCode.USAGE
    assert run(other, "snapshots", "--prune", "1") == ExitCode.OK
    assert "removed nothing, kept 1" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words",
    [
        ("activate",),
        ("activate", "1", "--alias", "other"),
        ("activate", "1", "--checks", "none"),
        ("snapshots", "--push", "x", "--prune", "1"),
        ("restore", "x"),
        ("verify", "0"),
    ],
)
def test_wrong_usage_has_its_exit_code(state: StateDir, words: tuple[str, ...]) -> None:
    assert run(state, *words) == ExitCode.USAGE


def test_what_needs_a_cluster_says_so(state: StateDir, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (
        ("activate", "latest"),
        ("activate", "none", "--alias", "canary"),
        ("rollback",),
        ("freshness",),
    ):
        assert run(state, *words) == ExitCode.FAILED
        assert "start one with `silvershard up`" in capsys.readouterr().err

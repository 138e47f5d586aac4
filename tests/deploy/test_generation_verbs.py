import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from silvershard.cluster.update_log import open_log
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


def test_a_dry_run_releases_no_pin(state: StateDir, capsys: pytest.CaptureFixture[str]) -> None:
    log = open_log(f"sqlite:///{state.updates_file}")
    log.pin("other/gen-000003", (0,) * log.num_partitions)
    words = ("snapshots", "--unpin", "other")
    assert run(state, *words, "--dry-run") == ExitCode.OK
    assert capsys.readouterr().out == "would release 1 pins of state directory other\n"
    assert list(log.pins()) == ["other/gen-000003"]
    # Not even the log becomes that of the directory.
    assert state.control.read().log_id == 0
    assert run(state, *words) == ExitCode.OK
    assert log.pins() == {}
    log.close()


@pytest.mark.parametrize(
    "words",
    [
        ("activate",),
        ("activate", "none"),
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


def test_checks_leave_the_processors_to_queries(state: StateDir, stepped_back: list[None]) -> None:
    assert run(state, "verify", "1", "--checks", "files") == ExitCode.OK
    assert len(stepped_back) == 1
    # No cluster runs; what would come before is the same.
    assert run(state, "activate", "1") == ExitCode.FAILED
    assert len(stepped_back) == 2

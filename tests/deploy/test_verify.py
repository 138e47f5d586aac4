import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from silvershard.deploy import verbs, verify
from silvershard.deploy.config import load
from silvershard.deploy.errors import CommandError, ExitCode
from silvershard.deploy.state import StateDir
from silvershard.shard.generations import generation_dir


@pytest.fixture
def state(tmp_path: Path, generation: Any) -> StateDir:
    made = StateDir(tmp_path / "s")
    made.create()
    shutil.copytree(generation.path, generation_dir(made.generations, 1))
    return made


def checked(state: StateDir, generation: int = 0, **options: Any) -> dict[str, Any]:
    given = {"load": True, "allow_schema": False, **options}
    return verify.verify(state, load(None, environ={}), generation, **given)


def test_the_newest_generation_is_checked_alone(state: StateDir) -> None:
    document = checked(state)
    assert (document["generation"], document["live"], document["passed"]) == (1, 0, True)
    names = [one["name"] for one in document["checks"]]
    assert names == ["checksums", "golden requests", "recall"]
    assert verify.render(document).endswith("generation 1 passes its checks")


def test_it_is_compared_with_the_live_one(state: StateDir) -> None:
    state.control.change(lambda now: now.pointed("live", 1))
    assert checked(state)["live"] == 0
    generation_dir(state.generations, 2).symlink_to(generation_dir(state.generations, 1))
    document = checked(state, 2)
    assert document["live"] == 1
    assert [one["name"] for one in document["checks"]] == ["checksums"]
    assert "it holds generation 1, not its own" in document["checks"][0]["text"]
    with pytest.raises(CommandError, match="generation 3 is not published"):
        checked(state, 3)


def test_what_is_wrong_is_an_exit_code(state: StateDir, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["verify", "1", "--checks", "files", "--state", str(state.root)]
    assert verbs.run(words) == ExitCode.OK
    os.truncate(state.generations / "gen-000001" / "dense.safetensors", 10)
    assert verbs.run(words) == ExitCode.FAILED
    out = capsys.readouterr().out
    assert "checksums: FAILED: " in out
    assert "generation 1 does not pass its checks" in out

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import peer_environment
from benchmarks.peer_environment import peer_python, run_job

SCRIPT = """
import json, sys
import numpy as np

with open(sys.argv[1]) as file:
    job = json.load(file)
if job["fails"]:
    sys.exit("no such model")
np.savez(job["out"], ranked=np.arange(job["k"]))
print("a line that is no report")
print(json.dumps({"seconds": 2.0}))
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    return path


def test_a_job_gives_its_last_line_and_its_arrays(script: Path, tmp_path: Path) -> None:
    report, rankings = run_job(Path(sys.executable), script, {"fails": 0, "k": 3}, tmp_path)
    assert report == {"seconds": 2.0}
    assert np.array_equal(rankings["ranked"], np.arange(3))


def test_a_job_that_fails_says_what_it_wrote(script: Path, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="no such model"):
        run_job(Path(sys.executable), script, {"fails": 1, "k": 3}, tmp_path)


def test_an_environment_that_was_left_half_made_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[list[str]] = []

    def run(command: list[str], **given: Any) -> subprocess.CompletedProcess[str]:
        calls.append(command)
        if "pip" in command and len(calls) == 2:
            raise subprocess.CalledProcessError(1, command)
        if "venv" in command:
            Path(command[-1]).mkdir(parents=True)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(peer_environment.subprocess, "run", run)
    with pytest.raises(subprocess.CalledProcessError):
        peer_python(tmp_path, ("one==1",))
    made = peer_python(tmp_path, ("one==1",))
    assert len(calls) == 4
    assert "one==1" in calls[-1]
    assert peer_python(tmp_path, ("one==1",)) == made
    assert len(calls) == 4
    assert peer_python(tmp_path, ("one==2",)) != made

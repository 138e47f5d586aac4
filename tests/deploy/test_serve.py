import os
import subprocess
import sys
from pathlib import Path

import pytest

from silvershard.deploy.config import Config
from silvershard.deploy.serve import Launch, Progress, _Teller


def drive(root: Path, launch: str) -> tuple[int, list[Progress]]:
    """Run a driver on this input; return its exit code and what it told."""
    readable, writable = os.pipe()
    with subprocess.Popen(
        [
            *(sys.executable, "-P", "-m", "silvershard.deploy.serve", "--state", str(root)),
            *("--lock-fd", str(writable), "--status-fd", str(writable)),
            *("--ray-dir", str(root), "--guard", str(os.getpid())),
        ],
        stdin=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        pass_fds=[writable],
        text=True,
    ) as driver:
        os.close(writable)
        assert driver.stdin is not None
        driver.stdin.write(launch)
        driver.stdin.close()
        with os.fdopen(readable) as told:
            lines = [Progress.model_validate_json(line) for line in told]
    return driver.returncode, lines


def test_an_input_that_is_no_launch_is_told_and_ends_the_driver(tmp_path: Path) -> None:
    code, told = drive(tmp_path, "{}")
    assert code == 1
    assert told[-1].exit_code == 1
    assert "internal error: ValidationError" in told[-1].error
    assert "daemon.log" in told[-1].error


def test_a_launch_is_read_as_it_was_written() -> None:
    launch = Launch(config=Config(), generation=2, snapshot="/s")
    assert Launch.model_validate_json(launch.model_dump_json()) == launch


def test_the_same_is_not_told_twice() -> None:
    readable, writable = os.pipe()
    teller = _Teller(writable)
    for phase in ("a", "a", "b"):
        teller.tell(Progress(phase=phase))
    teller.close()
    teller.close()
    teller.tell(Progress(phase="c"))
    with os.fdopen(readable) as told:
        assert [Progress.model_validate_json(line).phase for line in told] == ["a", "b"]


@pytest.mark.filterwarnings("default")
def test_a_reader_that_left_does_not_stop_the_driver() -> None:
    readable, writable = os.pipe()
    teller = _Teller(writable)
    os.close(readable)
    teller.tell(Progress(phase="a"))
    teller.tell(Progress(phase="b"))

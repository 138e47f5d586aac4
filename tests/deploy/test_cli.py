import subprocess
import sys

import pytest

from silvershard.deploy import cli

PROGRAM = """
import os, sys
from silvershard.deploy import cli
print("torch" in sys.modules, "silvershard.cluster" in sys.modules)
code = cli.main(["version"])
print(code, os.environ["OMP_WAIT_POLICY"])
print(os.environ["GRPC_EXPERIMENTS"])
"""


@pytest.mark.parametrize(("given", "expected"), [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")])
def test_the_environment_is_set_before_anything_heavy_is_imported(
    given: str | None, expected: str
) -> None:
    done = subprocess.run(
        [sys.executable, "-P", "-c", PROGRAM],
        capture_output=True,
        text=True,
        check=True,
        env={} if given is None else {"OMP_WAIT_POLICY": given},
    )
    assert done.stdout.splitlines() == [
        "False False",
        "silvershard 0.1.0",
        f"0 {expected}",
        "-event_engine_client,-event_engine_listener",
    ]


def test_the_console_script_is_this_one() -> None:
    from importlib.metadata import entry_points

    (script,) = entry_points(group="console_scripts", name="silvershard")
    assert script.load() is cli.main

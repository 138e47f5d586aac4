"""Every test belongs to one target of the Makefile, and CI runs every target within a budget."""

import json
import os
import re
import shlex
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
REPEATING = {"test-sanitized", "test-emulated"}
"""They run tests of other targets against libraries of their own making."""
LIMIT_S = 5280
"""Of all that CI runs, on two cores, if every target took all that it may; it takes an hour."""
FAST_S = 720
"""Of `make test`, on two cores, if it took all that it may; it takes ten minutes."""


def targets() -> set[str]:
    """Return the targets that test."""
    makefile = (ROOT / "Makefile").read_text()
    return set(re.findall(r"^(test(?:-\w+)?):", makefile, re.MULTILINE))


def budgets() -> dict[str, int]:
    """Return how many seconds CI gives each target."""
    script = (ROOT / ".ci" / "run").read_text()
    found = re.findall(r"^ *run (\d+) ([a-z-]+)", script, re.MULTILINE)
    assert len({target for _, target in found}) == len(found), "a target runs twice"
    return {target: int(budget_s) for budget_s, target in found}


def selection(target: str) -> list[str]:
    """Return the arguments that a target gives to pytest."""
    done = subprocess.run(
        ["make", "--dry-run", "--no-print-directory", target],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    (command,) = [line for line in done.stdout.splitlines() if "/pytest " in line]
    words = shlex.split(command)
    (program,) = [at for at, word in enumerate(words) if word.endswith("/pytest")]
    return words[program + 1 :]


COLLECT = """
import contextlib, io, json, sys
import pytest

class Finished:
    def pytest_collection_finish(self, session):
        # pytest escapes what is escaped once more in every collection of a process.
        self.tests = [item.nodeid.replace(chr(92), "") for item in session.items]

found = []
for arguments in json.load(sys.stdin):
    options = ["-n0", "--collect-only", "-q", "-p", "no:cacheprovider"]
    finished = Finished()
    with contextlib.redirect_stdout(io.StringIO()) as said:
        status = pytest.main([*arguments, *options], [finished])
    assert status == 0, said.getvalue()[-2000:]
    found.append(finished.tests)
json.dump(found, sys.stdout)
"""


def collected(*selections: list[str]) -> list[list[str]]:
    """Return the tests that pytest finds with each of these arguments."""
    done = subprocess.run(
        [sys.executable, "-P", "-c", COLLECT],
        input=json.dumps(selections),
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if "PYTEST" not in name},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: list[list[str]] = json.loads(done.stdout)
    return found


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_test_belongs_to_one_target() -> None:
    names = sorted(targets() - REPEATING)
    everything, *of_targets = collected([], *map(selection, names))
    assert len(everything) > 5000
    assert [name for name, tests in zip(names, of_targets, strict=True) if not tests] == []
    times = Counter(test for tests in of_targets for test in tests)
    assert [test for test in everything if times[test] != 1] == []
    assert times.keys() == {*everything}


def test_ci_runs_every_target_that_tests_and_each_within_its_budget() -> None:
    assert {target for target in budgets() if target.startswith("test")} == targets()
    assert budgets()["test"] <= FAST_S
    assert sum(budgets().values()) <= LIMIT_S


@pytest.fixture
def ci(tmp_path: Path) -> Callable[..., "subprocess.CompletedProcess[str]"]:
    """``ci(make, user=0, budgets={})`` runs the script with a shell script instead of make."""

    def run(
        make: str, *, user: int = 0, budgets: Mapping[str, int] = MappingProxyType({})
    ) -> "subprocess.CompletedProcess[str]":
        script = (ROOT / ".ci" / "run").read_text()
        for target, budget_s in budgets.items():
            script, changed = re.subn(rf"\brun \d+ {target}\b", f"run {budget_s} {target}", script)
            assert changed == 1
        programs = {
            ".ci/run": script.partition("\n")[2],
            "bin/make": make,
            "bin/id": f"echo {user}",
            # Whatever is missing here cannot be installed either.
            "bin/sudo": "exit 1",
            "bin/apt-get": "exit 1",
        }
        for name, text in programs.items():
            path = tmp_path / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(f"#!/usr/bin/env bash\n{text}\n")
            path.chmod(0o700)
        return subprocess.run(
            [tmp_path / ".ci" / "run"],
            env={**os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"},
            capture_output=True,
            text=True,
            check=False,
        )

    return run


def test_ci_goes_on_after_a_target_that_failed_and_fails_in_the_end(ci: Any) -> None:
    done = ci('[ "$1" != test-slow ]')
    assert done.returncode == 1
    said = {line.split()[0]: line for line in done.stderr.splitlines() if " s of " in line}
    assert "FAILED (1)" in said.pop("test-slow")
    assert {"test", "test-crash", "test-multihost", "demo"} <= said.keys()
    assert all(line.endswith("passed") for line in said.values())


def test_ci_ends_a_target_whose_budget_is_spent(ci: Any) -> None:
    done = ci('[ "$1" != demo ] || exec sleep 20', budgets={"demo": 1})
    assert done.returncode == 1
    assert re.search(r"^demo +[12] s of    1 s  FAILED \(124\)$", done.stderr, re.MULTILINE)


def test_ci_passes_and_says_what_it_could_not_run(ci: Any) -> None:
    done = ci("exit 0", user=1000)
    assert done.returncode == 0
    assert "NOT RUN: make test-multihost, because it needs root" in done.stderr
    assert "test-multihost " not in done.stderr.replace("make test-multihost", "")

"""Planted bugs in a copy of the tree: each must make the test fail that is there to notice it.

Each bug runs the one test that must notice it. Those tests pass where nothing is planted.
"""

import compileall
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from py_compile import PycInvalidationMode

import pytest
from mutants.guards import GUARDS
from mutants.planted import HISTORY, MUTANTS, SIMULATION, Mutant

pytestmark = [pytest.mark.mutants, pytest.mark.slow, pytest.mark.timeout(600)]

ROOT = Path(__file__).resolve().parents[2]
COPIED = ("kernels", "model", "shard", "cluster", "deploy", "tests", ".namespace")
ALL = (*MUTANTS, *GUARDS)
LIMIT_S = 280
FAILED = 1
"""Exit status of pytest whose tests ran, not all to their end, and of a seed that failed."""
_NOTICED = re.compile(r"^(?:FAILED|ERROR) (\S+)", re.MULTILINE)
_VIOLATED = re.compile(r"\d+ violations:\n(?:E +)?(\w+)")

Run = Callable[..., subprocess.CompletedProcess[str]]


def _together() -> dict[str, list[str]]:
    """Return who must notice a bug: tests that are run together, by a name of theirs."""
    found: dict[str, list[str]] = {}
    for who in sorted({one.caught_by for one in ALL}):
        alone = who == HISTORY or who.startswith(SIMULATION)
        name = who.rpartition("/")[2] if alone else "tests"
        found.setdefault(name.replace(" ", "-"), []).append(who)
    return found


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tree."""
    folder = tmp_path_factory.mktemp("mutants") / "tree"
    folder.mkdir()
    ignored = shutil.ignore_patterns("__pycache__", "*.pyc")
    for name in COPIED:
        shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", folder)
    # By content: a file that was changed twice in a second would have the code of the first change.
    compileall.compile_dir(folder, quiet=1, invalidation_mode=PycInvalidationMode.CHECKED_HASH)
    return folder


@pytest.fixture(scope="module")
def run(scratch: Path) -> Run:
    """``run(*tests)`` runs tests in the copy until the first one fails, or a seed."""

    def run_tests(*tests: str) -> subprocess.CompletedProcess[str]:
        environment = {
            **os.environ,
            "PYTHONPATH": str(scratch / ".namespace"),
            "PYTHONSAFEPATH": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        command = ["-m", "pytest", "-x", "-q", "-n0", "-p", "no:cacheprovider", *tests]
        if tests[0].startswith(SIMULATION):
            command = tests[0].split(" ")
        return subprocess.run(
            [sys.executable, *command],
            cwd=scratch,
            env=environment,
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
            check=False,
        )

    return run_tests


def test_every_planted_bug_still_has_its_place() -> None:
    gone = []
    for mutant in ALL:
        for edit in mutant.edits:
            count = (ROOT / edit.path).read_text().count(edit.before)
            if count != 1:
                gone.append(f"{mutant.name}: its text stands {count} times in {edit.path}")
    assert gone == []


def test_every_part_has_its_mutants() -> None:
    places = {edit.path for mutant in ALL for edit in mutant.edits[:1]}
    assert len(MUTANTS) >= 12
    assert len({mutant.name for mutant in ALL}) == len(ALL)
    for some in (
        {"cluster/rounds.py", "cluster/fanout.py", "cluster/freshness.py"},
        {"model/merge.py"},
        {"shard/live_index.py", "shard/executor.py", "shard/coalesce.py"},
        {"cluster/sqlite_log.py", "cluster/sequencer.py", "cluster/follower.py"},
        {"cluster/tokens.py", "cluster/security.py", "cluster/audit.py"},
        {"deploy/fault_injector.py", "deploy/fault_keeper.py"},
    ):
        assert some <= places
    assert sum(mutant.caught_by == HISTORY for mutant in MUTANTS) >= 5
    assert sum(mutant.caught_by.startswith(SIMULATION) for mutant in MUTANTS) >= 3


def test_it_is_the_copy_that_is_tested(scratch: Path) -> None:
    found = subprocess.run(
        [sys.executable, "-c", "import silvershard.cluster as one; print(one.__file__)"],
        env={**os.environ, "PYTHONPATH": str(scratch / ".namespace"), "PYTHONSAFEPATH": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert Path(found.stdout.strip()).resolve().is_relative_to(scratch.resolve())


@pytest.mark.parametrize("name", _together())
def test_where_nothing_is_planted_nobody_notices_anything(name: str, run: Run) -> None:
    done = run(*_together()[name])
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


@pytest.mark.parametrize("mutant", ALL, ids=lambda one: one.name.replace(" ", "-"))
def test_a_planted_bug_is_noticed(
    mutant: Mutant, scratch: Path, run: Run, record_property: Callable[[str, object], None]
) -> None:
    sound = {edit.path: (scratch / edit.path).read_text() for edit in mutant.edits}
    try:
        for edit in mutant.edits:
            text = (scratch / edit.path).read_text()
            assert text.count(edit.before) == 1, f"the text is not in {edit.path} any more"
            (scratch / edit.path).write_text(text.replace(edit.before, edit.after))
        done = run(mutant.caught_by)
    finally:
        for path, text in sound.items():
            (scratch / path).write_text(text)
    record_property("verdict", f"{mutant.name}: {_who(mutant, done)}")
    said = done.stdout[-4000:] + done.stderr[-2000:]
    assert done.returncode == FAILED, f"nobody noticed it:\n{said}"
    if mutant.is_watched:
        assert _VIOLATED.search(done.stdout), f"no property noticed it:\n{said}"
    else:
        assert _NOTICED.search(done.stdout), f"no test noticed it:\n{said}"


def _who(mutant: Mutant, done: subprocess.CompletedProcess[str]) -> str:
    """Return who noticed a planted bug."""
    if done.returncode != FAILED:
        return "SURVIVED"
    violated = _VIOLATED.search(done.stdout)
    if mutant.is_watched and violated:
        whole = "the history checker" if mutant.caught_by == HISTORY else "the simulation"
        return f"{whole}, {violated[1]}"
    noticed = _NOTICED.search(done.stdout)
    return noticed[1] if noticed else "NOBODY"

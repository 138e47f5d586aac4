"""Planted bugs in a copy of the tree: each must make the test fail that is there to notice it."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from mutants.planted import HISTORY, MUTANTS, Mutant

pytestmark = [pytest.mark.mutants, pytest.mark.slow, pytest.mark.timeout(600)]

ROOT = Path(__file__).resolve().parents[2]
COPIED = ("kernels", "model", "shard", "cluster", "deploy", "tests", ".namespace")
LIMIT_S = 280
FAILED = 1
"""Exit status of pytest whose tests ran, not all to their end."""
_NOTICED = re.compile(r"^(?:FAILED|ERROR) (\S+)", re.MULTILINE)
_VIOLATED = re.compile(r"\d+ violations:\n(?:E +)?(\w+)")

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tree."""
    folder = tmp_path_factory.mktemp("mutants") / "tree"
    folder.mkdir()
    ignored = shutil.ignore_patterns("__pycache__", "*.pyc")
    for name in COPIED:
        shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


@pytest.fixture(scope="module")
def run(scratch: Path) -> Run:
    """``run(*tests)`` runs tests in the copy, until the first one fails."""

    def run_tests(*tests: str) -> subprocess.CompletedProcess[str]:
        environment = {
            **os.environ,
            "PYTHONPATH": str(scratch / ".namespace"),
            "PYTHONSAFEPATH": "1",
            # A file that was changed twice in a second has the code of the first change else.
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-n0", "-p", "no:cacheprovider"]
        return subprocess.run(
            [*command, *tests],
            cwd=scratch,
            env=environment,
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
            check=False,
        )

    return run_tests


@pytest.fixture(scope="module")
def _healthy(scratch: Path, run: Run) -> None:
    """The tests that notice bugs pass where there are none, and it is the copy that they test."""
    found = subprocess.run(
        [sys.executable, "-c", "import silvershard.cluster as one; print(one.__file__)"],
        env={**os.environ, "PYTHONPATH": str(scratch / ".namespace"), "PYTHONSAFEPATH": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert Path(found.stdout.strip()).resolve().is_relative_to(scratch.resolve())
    done = run(*sorted({one.caught_by for one in MUTANTS}))
    assert done.returncode == 0, done.stdout[-4000:]


def test_every_planted_bug_still_has_its_place() -> None:
    gone = []
    for mutant in MUTANTS:
        for edit in mutant.edits:
            count = (ROOT / edit.path).read_text().count(edit.before)
            if count != 1:
                gone.append(f"{mutant.name}: its text stands {count} times in {edit.path}")
    assert gone == []


def test_router_merge_shard_and_log_have_their_mutants() -> None:
    places = [edit.path for mutant in MUTANTS for edit in mutant.edits[:1]]
    assert len(MUTANTS) >= 12
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)
    for some in (
        {"cluster/rounds.py", "cluster/fanout.py", "cluster/freshness.py"},
        {"model/merge.py"},
        {"shard/live_index.py", "shard/executor.py", "shard/coalesce.py"},
        {"cluster/sqlite_log.py", "cluster/sequencer.py", "cluster/follower.py"},
    ):
        assert some & set(places)
    assert sum(mutant.caught_by == HISTORY for mutant in MUTANTS) >= 5


@pytest.mark.usefixtures("_healthy")
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda one: one.name.replace(" ", "-"))
def test_a_planted_bug_is_noticed(
    mutant: Mutant, scratch: Path, run: Run, verdicts: list[str]
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
    verdicts.append(f"{mutant.name}: {_who(mutant, done)}")
    assert done.returncode == FAILED, f"nobody noticed it:\n{done.stdout[-4000:]}"
    if mutant.caught_by == HISTORY:
        assert _VIOLATED.search(done.stdout), f"the checker did not notice:\n{done.stdout[-4000:]}"


def _who(mutant: Mutant, done: subprocess.CompletedProcess[str]) -> str:
    """Return who noticed a planted bug."""
    if done.returncode != FAILED:
        return "SURVIVED"
    violated = _VIOLATED.search(done.stdout)
    if mutant.caught_by == HISTORY and violated:
        return f"the history checker, {violated[1]}"
    noticed = _NOTICED.search(done.stdout)
    return noticed[1] if noticed else "a test"

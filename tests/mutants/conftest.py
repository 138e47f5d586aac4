import sys
import types
from pathlib import Path
from typing import Any

import pytest

if "mutants" not in sys.modules:
    _package = types.ModuleType("mutants")
    _package.__path__ = [str(Path(__file__).parent)]
    sys.modules["mutants"] = _package

VERDICTS = pytest.StashKey[list[str]]()


@pytest.fixture(scope="session")
def verdicts(pytestconfig: pytest.Config) -> list[str]:
    """What is told at the end: of each mutant who noticed it."""
    return pytestconfig.stash.setdefault(VERDICTS, [])


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    told = config.stash.get(VERDICTS, [])
    if told:
        terminalreporter.section("mutants")
        for line in told:
            terminalreporter.write_line(line)

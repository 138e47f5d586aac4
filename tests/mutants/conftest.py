import sys
import types
from pathlib import Path
from typing import Any

import pytest

if "mutants" not in sys.modules:
    _package = types.ModuleType("mutants")
    _package.__path__ = [str(Path(__file__).parent)]
    sys.modules["mutants"] = _package


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Tell at the end who noticed each mutant."""
    told = [
        value
        for reports in terminalreporter.stats.values()
        for report in reports
        if isinstance(report, pytest.TestReport) and report.when == "call"
        for name, value in report.user_properties
        if name == "verdict"
    ]
    if told:
        terminalreporter.section("mutants")
        for line in told:
            terminalreporter.write_line(line)

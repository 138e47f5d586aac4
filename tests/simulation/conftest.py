import os
import sys
import types
from pathlib import Path

import pytest

if "simulation" not in sys.modules:
    _package = types.ModuleType("simulation")
    _package.__path__ = [str(Path(__file__).parent)]
    sys.modules["simulation"] = _package

RUN = 20_000
"""Requests of one seed."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "seed" in metafunc.fixturenames:
        total = int(os.environ.get("SILVERSHARD_SIMULATED_REQUESTS", "100000"))
        metafunc.parametrize("seed", range(1, max(total // RUN, 1) + 1))

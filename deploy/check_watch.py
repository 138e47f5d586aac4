"""The process that compares the answers of two sets of shards, as the driver starts and ends it."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from silvershard.deploy.state import StateDir


class Check(Protocol):
    """A comparison that is going on."""

    def poll(self) -> str | None:
        """Return what differs, empty if nothing does; None while it goes on."""
        ...

    def end(self) -> None:
        """End it."""
        ...


StartCheck = Callable[[Path, Path], Check]
"""Compares the answers by the map in one file with those by the map in another one."""


class CheckWatch:
    """The process of a comparison."""

    def __init__(self, state: StateDir, old: Path, new: Path) -> None:
        """Start it; call this on a thread that lives as long as the process shall.

        Args:
            state: of the cluster, whose first router has written its settings there.
            old: file of the map that is served.
            new: file of the other one.
        """
        self._process = subprocess.Popen(
            [
                *(sys.executable, "-P", "-m", "silvershard.deploy.paired_check"),
                *("--config", str(state.router_file), "--old", str(old), "--new", str(new)),
                *("--parent", str(os.getpid())),
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._found: str | None = None

    def poll(self) -> str | None:
        """Return what differs, empty if nothing does; None while it goes on."""
        if self._found is None and self._process.poll() is not None:
            said, _ = self._process.communicate()
            code = self._process.returncode
            self._found = said.strip()
            if code and not self._found:
                self._found = f"the answers could not be compared: exit code {code}"
        return self._found

    def end(self) -> None:
        """Kill it, if it still runs."""
        if self._found is None:
            self._process.kill()
            self._process.communicate()
            self._found = "it was ended"

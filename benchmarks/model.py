"""Runs what measures the model: quality of orders and trainings, embedding tables, text, ids.

Usage: ``python -P benchmarks/model.py [--quick] [--only PART ...]``. Every part is a benchmark of
its own, with its gate, its tables and its line in ``benchmarks/results/<machine>.jsonl``. Parts
that measure quality share the cores, parts that measure time run alone. The last line printed is
one JSON object with what every part found; the exit status is 1 if a part has no numbers.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_HERE = Path(__file__).resolve().parent
if "benchmarks" not in sys.modules:
    # The folder is no package and the root stays off sys.path, where `import model` would work.
    _PACKAGE = types.ModuleType("benchmarks")
    _PACKAGE.__path__ = [str(_HERE)]
    sys.modules["benchmarks"] = _PACKAGE

from benchmarks.run import machine  # noqa: E402

QUICK_LIMIT_S = 290.0
"""After which a quick run ends the parts that are left and says so."""


@dataclass(frozen=True)
class Part:
    """One benchmark script."""

    name: str
    quick: tuple[str, ...] = ("--quick",)
    """What it is told in a quick run."""
    timed: bool = True
    """It measures time, so nothing else may run beside it."""


PARTS = (
    Part("ordering", timed=False),
    Part("joint", timed=False),
    Part("tables"),
    Part("embeddings", ("--rows", "100000", "--rounds", "5", "--batches", "1", "16")),
    Part("text"),
    Part("semantic", ("--quick", "--items", "30000", "--rounds", "5")),
)


@dataclass
class Run:
    """A part that was started; its output goes to a file until it ends."""

    part: Part
    process: "subprocess.Popen[bytes]"
    output: Any
    began: float

    def finish(self, limit_s: float | None) -> dict[str, Any]:
        """Print what the part prints but for its last line, and return that line as JSON values.

        Args:
            limit_s: seconds to wait for it; None waits for ever.
        """
        ended = ""
        try:
            self.process.wait(limit_s)
        except subprocess.TimeoutExpired:
            self.process.terminate()
            self.process.wait()
            ended = "out of time"
        seconds = round(time.perf_counter() - self.began, 1)
        self.output.seek(0)
        lines = self.output.read().decode(errors="replace").splitlines()
        self.output.close()
        result: Any = None
        if not ended and self.process.returncode == 0:
            result = json.loads(lines.pop())
        else:
            ended = ended or f"exit status {self.process.returncode}"
        print(f"\n== {self.part.name}, {seconds:.0f} s{f', {ended}' if ended else ''}")
        print("\n".join(lines), flush=True)
        return {"seconds": seconds, "failure": ended, "result": result}


def start(part: Part, *, quick: bool) -> Run:
    """Start a part."""
    output = tempfile.TemporaryFile()  # noqa: SIM115 - the run closes it
    command = [sys.executable, "-P", str(_HERE / f"{part.name}.py"), *(part.quick if quick else ())]
    process = subprocess.Popen(command, stdout=output, cwd=_HERE.parent)
    return Run(part, process, output, time.perf_counter())


def run_parts(
    parts: Sequence[Part], *, quick: bool, limit_s: float | None = None
) -> dict[str, dict[str, Any]]:
    """Return what every part found by its name, the untimed ones first and side by side.

    Args:
        parts: what to run.
        quick: whether they are told to be quick.
        limit_s: after which those that are left are ended; None never.
    """
    began = time.perf_counter()
    found: dict[str, dict[str, Any]] = {}

    def left() -> float | None:
        return None if limit_s is None else max(began + limit_s - time.perf_counter(), 0.0)

    beside: list[Run] = []
    for part in parts:
        if part.timed:
            continue
        if len(beside) >= (os.cpu_count() or 1):
            run = beside.pop(0)
            found[run.part.name] = run.finish(left())
        beside.append(start(part, quick=quick))
    for run in beside:
        found[run.part.name] = run.finish(left())
    for part in parts:
        if part.timed:
            found[part.name] = start(part, quick=quick).finish(left())
    return found


def main() -> int:
    """Run the parts and the report."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="small sizes, within five minutes")
    names = [part.name for part in PARTS]
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="these parts")
    given = parser.parse_args()
    about = {**machine(), "quick": given.quick, "unix_s": int(time.time())}
    print(f"{about['cpu']}, {about['cores']} cores, torch {about['torch']}", flush=True)
    found = run_parts(
        [part for part in PARTS if part.name in given.only],
        quick=given.quick,
        limit_s=QUICK_LIMIT_S if given.quick else None,
    )
    failures = [name for name, one in found.items() if one["failure"]]
    print(json.dumps({"machine": about, "failures": failures, "parts": found}))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())

"""Measures cases beside their peers: correctness gate, interleaved rounds, report.

Usage: ``python -P benchmarks/run.py [--items N] [--rounds N] [--threads N]``. Each run appends one
JSON line per case to ``benchmarks/results/<machine>.jsonl``; the last line printed is one summary.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent


def load_cases(num_items: int) -> list[Any]:
    """Return the cases; `benchmarks/` is no package, so the module is loaded from its file."""
    spec = importlib.util.spec_from_file_location("benchmark_cases", ROOT / "benchmarks/films.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["benchmark_cases"] = module
    spec.loader.exec_module(module)
    cases: list[Any] = module.cases(num_items)
    return cases


def passes(gate: str) -> bool:
    """Return whether the tests of a case hold; nothing is measured before."""
    done = subprocess.run(
        [sys.executable, "-P", "-m", "pytest", "-q", str(ROOT / gate)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        print(done.stdout[-2000:], file=sys.stderr)
    return done.returncode == 0


def machine() -> dict[str, str]:
    """Return what the numbers belong to."""
    model = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.split(":", 1)[1].strip()
            break
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()
    dirty = subprocess.run(
        ["git", "status", "--porcelain"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.strip()
    return {
        "cpu": model,
        "cores": str(os.cpu_count()),
        "torch": importlib.metadata.version("torch"),
        "python": platform.python_version(),
        "commit": commit,
        "dirty": str(bool(dirty)),
    }


def measure(case: Any, rounds: int) -> dict[str, float]:
    """Return milliseconds and the median of the per-round ratios, ours and peer in turn."""
    for warm in (case.ours, case.peer, case.ours, case.peer):
        warm()
    ours: list[float] = []
    peer: list[float] = []
    for _ in range(rounds):
        for run, times in ((case.ours, ours), (case.peer, peer)):
            began = time.perf_counter()
            run()
            times.append(1e3 * (time.perf_counter() - began))
    low, middle, high = (
        statistics.quantiles(ours, n=5)[0],
        statistics.median(ours),
        statistics.quantiles(ours, n=5)[3],
    )
    return {
        "ours_p20_ms": low,
        "ours_p50_ms": middle,
        "ours_p80_ms": high,
        "peer_p50_ms": statistics.median(peer),
        "peer_over_ours": statistics.median(b / a for a, b in zip(ours, peer, strict=True)),
    }


def main() -> int:
    """Run the gate, the cases and the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--items", type=int, default=20_000, help="films in the catalogue")
    parser.add_argument("--rounds", type=int, default=15, help="measured rounds per case")
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    cases = load_cases(given.items)
    for gate in sorted({case.gate for case in cases}):
        if not passes(gate):
            print(f"gate {gate} is red: no number is printed", file=sys.stderr)
            return 1
    about = {**machine(), "threads": str(given.threads), "unix_s": str(int(time.time()))}
    print(
        f"{about['cpu']}, {about['cores']} cores, {given.threads} threads, torch {about['torch']}"
    )
    print(f"{'case':48} {'ours p50':>10} {'p20':>8} {'p80':>8} {'peer p50':>10} {'peer/ours':>10}")
    results = ROOT / "benchmarks" / "results"
    results.mkdir(exist_ok=True)
    name = "".join(one if one.isalnum() else "-" for one in about["cpu"].lower())
    lines = []
    for case in cases:
        numbers = measure(case, given.rounds)
        lines.append({"case": case.name, **{key: round(one, 3) for key, one in numbers.items()}})
        print(
            f"{case.name:48} {numbers['ours_p50_ms']:>7.2f} ms {numbers['ours_p20_ms']:>8.2f} "
            f"{numbers['ours_p80_ms']:>8.2f} {numbers['peer_p50_ms']:>7.2f} ms "
            f"{numbers['peer_over_ours']:>9.2f}x"
        )
    with (results / f"{name}.jsonl").open("a") as file:
        for line in lines:
            file.write(json.dumps({**line, **about}) + "\n")
    print(json.dumps({"machine": about, "cases": lines}))
    return 0


if __name__ == "__main__":
    sys.exit(main())

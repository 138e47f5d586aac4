"""Replays a seed of the simulation: ``python -P tests/simulation/run.py --seed 7``."""

import argparse
import sys
import tempfile
import time
import types
from pathlib import Path

_HERE = Path(__file__).resolve().parent
for _name, _folder in (("simulation", _HERE), ("history", _HERE.with_name("history"))):
    if _name not in sys.modules:
        _package = types.ModuleType(_name)
        _package.__path__ = [str(_folder)]
        sys.modules[_name] = _package


def main() -> int:
    """Run some seeds one after the other; return 1 if a property was violated."""
    import torch
    from simulation.world import Plan, World

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=1, help="the first seed")
    parser.add_argument("--seeds", type=int, default=1, help="how many seeds")
    parser.add_argument("--requests", type=int, default=20_000, help="virtual requests of each")
    parser.add_argument("--steps", type=int, default=0, help="most faults; 0: all")
    given = parser.parse_args()
    torch.set_num_threads(1)
    failed = 0
    for seed in range(given.seed, given.seed + given.seeds):
        began_s = time.process_time()
        with tempfile.TemporaryDirectory() as root:
            outcome = World(Plan(seed, given.requests, given.steps), Path(root)).run()
        print(outcome, f"\n  {time.process_time() - began_s:.1f} s of one core", flush=True)  # noqa: T201
        failed += bool(outcome.violations)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())

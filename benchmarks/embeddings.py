"""Measures lookups of embedding tables: float, int8, int4 and cut over two CPU devices.

Usage: ``python -P benchmarks/embeddings.py [--rows N] [--batches B ...] [--rounds N]``. The gate
are the tests of the tables and the equality of every cut: a red one prints no number. Each run
appends one JSON line per case to ``benchmarks/results/<machine>.jsonl``; the last line printed is
one JSON object. Times are those of the clock and, for a busy machine, of the process.

Shapes: B bags or sequences of each feature, D embedding dimension.
"""

import argparse
import json
import statistics
import sys
import time
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_HERE = Path(__file__).resolve().parent
if "benchmarks" not in sys.modules:
    # The folder is no package and the root stays off sys.path, where `import model` would work.
    _PACKAGE = types.ModuleType("benchmarks")
    _PACKAGE.__path__ = [str(_HERE)]
    sys.modules["benchmarks"] = _PACKAGE

from benchmarks.run import machine, passes  # noqa: E402
from silvershard.model.bags import Bags, Sequences  # noqa: E402
from silvershard.model.embeddings import (  # noqa: E402
    PooledTables,
    QuantizedSequences,
    QuantizedTables,
    SequenceTables,
    ShardedSequences,
    ShardedTables,
)
from silvershard.model.placement import (  # noqa: E402
    TableConstraint,
    TablePlan,
    TableTopology,
)
from silvershard.model.table_planner import plan_tables  # noqa: E402

GATES = ("tests/model/test_embeddings.py", "tests/model/test_table_planner.py")
CUTS = ("table", "row", "column")
UPDATES = (1, 100, 1000)
_CALLS = 20

Lookup = Callable[[], Mapping[str, Tensor]]


def plan(tables: Any, precision: Any, kind: Any, cut: Any, sizes: Mapping[str, int]) -> TablePlan:
    """Return the plan that cuts every table alike over two CPU devices."""
    return plan_tables(
        sizes,
        tables.dim,
        precision,
        TableTopology(device="cpu", num_devices=2, host_bytes=16 << 30),
        kind=kind,
        constraints=dict.fromkeys(sizes, TableConstraint(sharding=cut)),
    )


def bags(sizes: Mapping[str, int], batch: int, values: int) -> dict[str, Bags]:
    """Return B bags of that many random values for each table."""
    lengths = torch.full((batch,), values)
    count = batch * values
    return {
        name: Bags(torch.randint(rows, (count,)), torch.rand(count), lengths)
        for name, rows in sizes.items()
    }


def lookups(
    sizes: Mapping[str, int], dim: int
) -> tuple[dict[str, Any], dict[str, Any], dict[str, dict[str, float]]]:
    """Return the pooled tables and the sequence tables by name, and the size and error of each.

    Raises:
        AssertionError: if a cut holds other records than the whole tables.
    """
    floats, sequences = PooledTables(sizes, dim), SequenceTables(sizes, dim)
    pooled: dict[str, Any] = {"float": floats}
    unpooled: dict[str, Any] = {"float": sequences}
    about = {"float": {"bytes_per_row": 4.0 * dim, "max_error_steps": 0.0}}
    for precision, levels in (("int8", 255), ("int4", 15)):
        whole = QuantizedTables.from_float(floats, precision)
        pooled[precision] = whole
        unpooled[precision] = QuantizedSequences.from_float(sequences, precision)
        worst = 0.0
        for name, rows in sizes.items():
            weight = floats.weight(name).detach()
            error = (whole.take(name, torch.arange(rows)) - weight).abs().amax(1)
            worst = max(worst, float((error * levels / (weight.amax(1) - weight.amin(1))).max()))
        about[precision] = {
            "bytes_per_row": float(whole.records(next(iter(sizes))).shape[1]),
            "max_error_steps": round(worst, 3),
        }
        if precision == "int4":
            continue
        for cut in CUTS:
            sharded = ShardedTables(plan(whole, precision, "pooled", cut, sizes))
            sharded.load_state_dict(whole.state_dict())
            pooled[f"{precision} by {cut} over 2"] = sharded
        for cut in ("table", "row"):
            parts = ShardedSequences(plan(whole, precision, "sequence", cut, sizes))
            parts.load_state_dict(unpooled[precision].state_dict())
            unpooled[f"{precision} by {cut} over 2"] = parts
    return pooled, unpooled, about


def equal_cuts(cases: Mapping[str, Lookup]) -> bool:
    """Return whether every cut of a precision has the bits of the whole tables."""
    for name, case in cases.items():
        precision, _, cut = name.partition(" ")
        wanted, found = cases[precision](), case()
        if cut and not all(torch.equal(found[one], wanted[one]) for one in wanted):
            print(f"{name} differs from {precision}", file=sys.stderr)
            return False
    return True


def measure(cases: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, dict[str, float]]:
    """Return microseconds of a call of each case, all cases in turn in every round."""
    clocks: dict[str, list[float]] = {name: [] for name in cases}
    processes: dict[str, list[float]] = {name: [] for name in cases}
    for case in cases.values():
        case()
    for _ in range(rounds):
        for name, case in cases.items():
            began, used = time.perf_counter(), time.process_time()
            for _ in range(_CALLS):
                case()
            clocks[name].append(1e6 * (time.perf_counter() - began) / _CALLS)
            processes[name].append(1e6 * (time.process_time() - used) / _CALLS)
    found = {}
    for name, series in clocks.items():
        cuts = statistics.quantiles(series, n=5)
        found[name] = {
            "p20_us": round(cuts[0], 1),
            "p50_us": round(statistics.median(series), 1),
            "p80_us": round(cuts[3], 1),
            "process_p50_us": round(statistics.median(processes[name]), 1),
        }
    return found


def report(title: str, found: Mapping[str, Mapping[str, float]]) -> None:
    """Print one line for each case."""
    print(f"\n{title:44} {'p20 us':>9} {'p50 us':>9} {'p80 us':>9} {'process':>9}")
    for name, one in found.items():
        print(f"{name:44} " + " ".join(f"{number:>9.1f}" for number in one.values()))


def main() -> int:
    """Run the gate, the cases and the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000, help="rows of the largest table")
    parser.add_argument("--dim", type=int, default=64, help="embedding dimension D")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16, 64], help="B")
    parser.add_argument("--values", type=int, default=20, help="values of each bag")
    parser.add_argument("--rounds", type=int, default=15, help="measured rounds per case")
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    for gate in GATES:
        if not passes(gate):
            print(f"gate {gate} is red: no number is printed", file=sys.stderr)
            return 1
    sizes = {"films": given.rows, "tags": given.rows // 10 + 1, "genres": given.rows // 100 + 1}
    about = {**machine(), "threads": str(given.threads), "unix_s": str(int(time.time()))}
    cells: list[dict[str, Any]] = []
    with torch.inference_mode():
        pooled, unpooled, tables = lookups(sizes, given.dim)
        for kind, group in (("pooled", pooled), ("sequence", unpooled)):
            for batch in given.batches:
                asked = bags(sizes, batch, given.values)
                lists = {name: Sequences(one.rows, one.lengths) for name, one in asked.items()}
                question = asked if kind == "pooled" else lists
                cases = {
                    name: (lambda one=one, question=question: one(question))
                    for name, one in group.items()
                }
                if not equal_cuts(cases):
                    return 1
                found = measure(cases, given.rounds)
                report(f"{kind}, 3 features, B {batch}, {given.values} values each", found)
                cells += [
                    {"case": f"tables/{kind}/{name}", "batch": batch, **one}
                    for name, one in found.items()
                ]
        for count in UPDATES:
            rows, values = torch.randperm(given.rows)[:count], torch.randn(count, given.dim)
            writers = {
                name: (
                    lambda one=one, rows=rows, values=values: one.update_rows("films", rows, values)
                )
                for name, one in pooled.items()
                if name != "float"
            }
            found = measure(writers, given.rounds)
            report(f"update of {count} rows", found)
            cells += [
                {"case": f"tables/update/{name}", "updated": count, **one}
                for name, one in found.items()
            ]
    print(f"\n{'table':44} {'bytes/row':>9} {'largest error, steps':>22}")
    for name, one in tables.items():
        print(f"{name:44} {one['bytes_per_row']:>9.0f} {one['max_error_steps']:>22.3f}")
    results = _HERE / "results"
    results.mkdir(exist_ok=True)
    name = "".join(one if one.isalnum() else "-" for one in about["cpu"].lower())
    shape = {"rows": given.rows, "dim": given.dim, "values": given.values}
    with (results / f"{name}.jsonl").open("a") as file:
        for cell in cells:
            file.write(json.dumps({**cell, **shape, **about}) + "\n")
    result = {"machine": about, "sizes": sizes, **shape, "tables": tables, "cases": cells}
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())

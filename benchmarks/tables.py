"""Measures lookups in a remote embedding table beside the same rows in this process.

Usage: ``python -P benchmarks/tables.py [--quick] [--rows N] [--dim D] [--rounds N]``. The rows lie
in two processes that are reached over loopback. The gate compares every way of looking rows up, bit
for bit; then they take turns. Each run appends one JSON line per cell to
``benchmarks/results/<machine>.jsonl``; the last line printed is one JSON object.
"""

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import subprocess
import sys
import time
import types
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

_HERE = Path(__file__).resolve().parent
if "benchmarks" not in sys.modules:
    # The folder is no package and the root stays off sys.path, where `import model` would work.
    _PACKAGE = types.ModuleType("benchmarks")
    _PACKAGE.__path__ = [str(_HERE)]
    sys.modules["benchmarks"] = _PACKAGE

from silvershard.cluster.table_client import RemoteTable  # noqa: E402
from silvershard.cluster.table_config import RemoteTableSection  # noqa: E402
from silvershard.cluster.table_map import TableEntry, TableShardMap  # noqa: E402
from silvershard.cluster.table_server import TableServer  # noqa: E402
from silvershard.shard.table import TableShard  # noqa: E402
from silvershard.shard.table_plan import TablePlan  # noqa: E402
from silvershard.shard.table_rows import Floats, Ints, dequantize_rows  # noqa: E402

SIZES = (2, 100, 1_000, 10_000)
"""Ids per lookup; 2 is what asking costs at all."""

TURN = 10
"""Lookups in a row: a side that was just waited for starts with cold caches and sleeping cores."""

SHARDS = 2
SEED = 1
GOAL_MS = 1.0
"""Of the median of 1,000 ids with a cold cache."""

Look = Callable[[Ints], Floats]


@dataclass
class Side:
    """One way to look rows up, and how long it took."""

    name: str
    look: Look
    fresh: bool
    """Every lookup is of rows that were never asked for."""
    seconds: list[float] = field(default_factory=list)
    quiet: list[bool] = field(default_factory=list)
    """Whether nobody else wanted a core when it began."""


@dataclass(frozen=True)
class Cell:
    """The numbers of one way at one size, over all rounds and over the quiet ones."""

    side: str
    ids: int
    p20_ms: float
    p50_ms: float
    p99_ms: float
    rounds: int
    quiet_p50_ms: float | None
    quiet_rounds: int


def serve(plan: TablePlan, shard: int) -> None:
    """Serve a shard until the other end of the input is gone; print its address first."""
    table = TableShard.generated(plan, shard, SEED)

    async def run() -> None:
        server = TableServer(table)
        await server.start()
        print(server.address, server.epoch, os.getpid(), resident_mib(os.getpid()), flush=True)
        await asyncio.to_thread(sys.stdin.read)
        await server.stop(0)

    asyncio.run(run())


@contextlib.contextmanager
def served(plan: TablePlan) -> Iterator[tuple[TableShardMap, list[float]]]:
    """Run a process per shard; yield their map and what they take of memory in MiB."""
    command = [sys.executable, "-P", str(Path(__file__).resolve()), "--serve"]
    processes = [
        subprocess.Popen(
            [*command, str(shard), "--rows", str(plan.num_rows), "--dim", str(plan.dim)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for shard in range(plan.num_shards)
    ]
    try:
        entries, memory = [], []
        for shard, process in enumerate(processes):
            assert process.stdout is not None
            address, epoch, pid, mib = process.stdout.readline().split()
            memory.append(float(mib))
            entries.append(
                TableEntry(
                    shard=shard,
                    address=address,
                    epoch=int(epoch),
                    rows=len(plan.span(shard)),
                    pid=int(pid),
                )
            )
        yield TableShardMap(version=1, plan=plan, entries=tuple(entries)), memory
    finally:
        for process in processes:
            if process.stdin is not None:
                process.stdin.close()
            process.wait(30)


def resident_mib(pid: int) -> float:
    """Return the memory that a process holds."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return round(pages * os.sysconf("SC_PAGE_SIZE") / 2**20, 1)


def fbgemm_look(plan: TablePlan, local: TableShard) -> Look | None:
    """Return a lookup in an int8 table of FBGEMM with the same rows; None where it is missing."""
    try:
        import torch
        from fbgemm_gpu.split_embedding_configs import SparseType
        from fbgemm_gpu.split_table_batched_embeddings_ops_common import (
            EmbeddingLocation,
            PoolingMode,
        )
        from fbgemm_gpu.split_table_batched_embeddings_ops_inference import (
            IntNBitTableBatchedEmbeddingBagsCodegen,
        )
    except ImportError:
        return None
    torch.set_num_threads(1)
    table = IntNBitTableBatchedEmbeddingBagsCodegen(
        [("table", plan.num_rows, plan.dim, SparseType.INT8, EmbeddingLocation.HOST)],
        pooling_mode=PoolingMode.NONE,
        device="cpu",
        output_dtype=SparseType.FP32,
    )
    table.initialize_weights()
    weights = table.split_embedding_weights(split_scale_shifts=False)[0][0]
    for start in range(0, plan.num_rows, 1 << 18):
        rows = np.arange(start, min(start + (1 << 18), plan.num_rows))
        weights[start : start + len(rows)] = torch.from_numpy(local.take(rows))

    def look(ids: Ints) -> Floats:
        offsets = torch.tensor([0, len(ids)], dtype=torch.int32)
        found: Floats = table(torch.from_numpy(ids).int(), offsets).numpy()
        return found

    return look


def remote_look(table: RemoteTable) -> Look:
    """Return a lookup that must find every row."""

    def look(ids: Ints) -> Floats:
        lookup = table.lookup(ids)
        assert not lookup.reasons, f"{lookup.defaulted.sum()} rows are missing"
        return lookup.values

    return look


def gate(sides: list[Side], expected: Look, num_rows: int) -> list[str]:
    """Return the sides that give other bits than the definition, repeats and order included."""
    generator = np.random.default_rng(7)
    failures = []
    for size in SIZES:
        ids = generator.integers(0, num_rows, size)
        ids[size // 2 :] = ids[: size - size // 2]
        failures += [
            f"{side.name}, {size} ids"
            for side in sides
            for _ in range(2)
            if not np.array_equal(side.look(ids), expected(ids))
        ]
    return sorted(set(failures))


def measure(sides: list[Side], fresh_ids: Iterator[Ints], warm_ids: Ints, rounds: int) -> None:
    """Let the sides take turns of some lookups each, while there are rows never asked for."""
    from benchmarks.quiet import runnable

    for side in sides:
        for ids in itertools.islice(fresh_ids, 3):
            side.look(ids if side.fresh else warm_ids)
    for turn in range(0, rounds, TURN):
        lists = list(itertools.islice(fresh_ids, min(TURN, rounds - turn)))
        for side in sides:
            for fresh in lists:
                ids = fresh if side.fresh else warm_ids
                quiet = runnable() <= 1
                began = time.perf_counter()
                side.look(ids)
                side.seconds.append(time.perf_counter() - began)
                side.quiet.append(quiet)


def cell_of(side: Side, size: int) -> Cell:
    """Return the percentiles of what a side took."""
    times = np.array(side.seconds) * 1e3
    calm = times[np.array(side.quiet)]
    low, middle, high = np.percentile(times, [20, 50, 99]).round(4).tolist()
    quiet_p50 = round(float(np.median(calm)), 4) if len(calm) else None
    return Cell(side.name, size, low, middle, high, len(times), quiet_p50, len(calm))


def distinct_ids(num_rows: int, size: int, generator: np.random.Generator) -> Iterator[Ints]:
    """Yield lists of ids in random order, none of which comes twice."""
    order = generator.permutation(num_rows)
    for start in range(0, num_rows - size + 1, size):
        yield order[start : start + size]


def main() -> int:
    """Run the gate, the cells and the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="1 million rows, fewer rounds")
    parser.add_argument("--rows", type=int, default=0, help="rows of the table")
    parser.add_argument("--dim", type=int, default=64, help="embedding dimension")
    parser.add_argument("--rounds", type=int, default=0, help="lookups per cell")
    parser.add_argument("--serve", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    num_rows = given.rows or (1_000_000 if given.quick else 10_000_000)
    plan = TablePlan(name="bench", num_rows=num_rows, dim=given.dim, num_shards=SHARDS)
    if given.serve is not None:
        serve(plan, given.serve)
        return 0
    from benchmarks.run import ROOT, machine

    rounds = given.rounds or (100 if given.quick else 300)
    whole = TablePlan(
        name="bench", num_rows=num_rows, dim=given.dim, num_shards=1, placement="contiguous"
    )
    local = TableShard.generated(whole, 0, SEED)
    config = RemoteTableSection(deadline_ms=10_000)
    cells: list[Cell] = []

    def definition(ids: Ints) -> Floats:
        return dequantize_rows(local.take(ids))

    with (
        served(plan) as (table_map, memory),
        RemoteTable(table_map, config) as cold,
        RemoteTable(table_map, config) as warm,
    ):
        cold.wait_until_ready(60)
        warm.wait_until_ready(60)
        looks: list[tuple[str, Look | None, bool]] = [
            ("local, fbgemm int8", fbgemm_look(whole, local), True),
            ("local, our rows", definition, True),
            ("remote, cold cache", remote_look(cold), True),
            ("remote, warm cache", remote_look(warm), False),
        ]
        ways = [(name, look, fresh) for name, look, fresh in looks if look is not None]
        failures = gate([Side(*way) for way in ways], definition, num_rows)
        if failures:
            print(f"gate is red: {'; '.join(failures)}: no number is printed", file=sys.stderr)
            return 1
        about: dict[str, Any] = {**machine(), "unix_s": str(int(time.time()))}
        # Changes how gRPC waits for sockets, and by that a tenth of the time of a lookup.
        about["grpc_experiments"] = os.environ.get("GRPC_EXPERIMENTS", "")
        print(f"{about['cpu']}, {about['cores']} cores, {num_rows:,} rows x {plan.dim}")
        print(f"memory of the two processes: {memory} MiB")
        print(f"{'lookup':24} {'ids':>7} {'p20':>9} {'p50':>9} {'p99':>9} {'quiet p50':>11}")
        generator = np.random.default_rng(5)
        for size in SIZES:
            sides = [Side(*way) for way in ways]
            measure(
                sides,
                distinct_ids(num_rows, size, generator),
                generator.integers(0, num_rows, size),
                rounds,
            )
            for side in sides:
                cell = cell_of(side, size)
                cells.append(cell)
                calm = "-" if cell.quiet_p50_ms is None else f"{cell.quiet_p50_ms:.3f}"
                print(
                    f"{cell.side:24} {size:>7,} {cell.p20_ms:>6.3f} ms {cell.p50_ms:>6.3f} ms "
                    f"{cell.p99_ms:>6.3f} ms {calm:>8} ms"
                )
    results = ROOT / "benchmarks" / "results"
    results.mkdir(exist_ok=True)
    name = "".join(one if one.isalnum() else "-" for one in about["cpu"].lower())
    lines = [{"case": f"tables/{one.side}/{one.ids}", **asdict(one)} for one in cells]
    with (results / f"{name}.jsonl").open("a") as file:
        for line in lines:
            file.write(json.dumps({**line, **about, "rows": num_rows, "dim": plan.dim}) + "\n")
    judged = next(one for one in cells if one.ids == 1000 and one.side == "remote, cold cache")
    print(
        json.dumps(
            {
                "machine": about,
                "rows": num_rows,
                "dim": plan.dim,
                "server_mib": memory,
                "goal_ms": GOAL_MS,
                "reached": judged.p50_ms <= GOAL_MS,
                "cells": [asdict(one) for one in cells],
            }
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())

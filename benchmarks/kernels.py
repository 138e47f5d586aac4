"""Measures the operators beside the best public alternative: the rows of the speed table.

Usage: ``python -P benchmarks/kernels.py [--quick] [--items N] [--rows KEY ...] [--page-slots G]``.
Each cell passes its correctness gate or prints no number. Each run appends one JSON line to
``benchmarks/results/<machine>.jsonl``; the last line printed is one JSON object.
"""

import argparse
import gc
import json
import os
import sys
import time
import types
from collections.abc import Container, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

_HERE = Path(__file__).resolve().parent
if "benchmarks" not in sys.modules:
    # The folder is no package and the root stays off sys.path, where `import model` would work.
    _PACKAGE = types.ModuleType("benchmarks")
    _PACKAGE.__path__ = [str(_HERE)]
    sys.modules["benchmarks"] = _PACKAGE

from benchmarks import dram, ours, peers  # noqa: E402
from benchmarks.mixture import SELECTIVITIES, cache_root, data_set, progress  # noqa: E402
from benchmarks.pipeline_cases import (  # noqa: E402
    bandwidth_case,
    end_to_end_cases,
    filter_cases,
    streaming_case,
)
from benchmarks.quiet import Guard, busy_cores, interleave, ratio  # noqa: E402
from benchmarks.rows import ROWS, Case, Cell, Gate, Row, summary  # noqa: E402
from benchmarks.run import machine  # noqa: E402
from benchmarks.search_cases import Bench, hnsw_case, scan_case, selective_cases  # noqa: E402

FULL_ITEMS = 1_000_000
HNSW_QUICK_ITEMS = 100_000
UPDATES = 2_000
FILTERED_ROWS = ("filtered", "filtered_roaring")
SHAPE_ROWS = ("k100", "k2048", "k10000", *FILTERED_ROWS)
"""Rows that are measured on every shape; the others are on the first."""


@dataclass(frozen=True)
class Plan:
    """Which cells are measured, and how long each may take."""

    items: int
    page_slots: int
    shapes: tuple[tuple[int, int], ...]
    """(D, lists); the rows that name no shape use the first one."""
    probes: tuple[int, ...]
    batches: tuple[int, ...]
    threads: tuple[int, ...]
    filtered_probes: tuple[int, ...]
    rounds: int
    budget_s: float
    """Of the measured rounds of one cell; three are measured whatever they take."""
    gate_queries: int
    guard: Guard
    implementation: str
    hnsw_items: int
    quick: bool

    def lists(self, count: int) -> int:
        """Return the lists for a smaller set: as many items in each."""
        return max(16, count * self.items // FULL_ITEMS)

    def scaled(self, probes: int, count: int) -> int:
        """Return the probes for a smaller set: the same share of all lists."""
        return max(1, min(self.lists(count), round(probes * self.lists(count) / count)))

    def length(self, k: int) -> int:
        """Return the results for a smaller set: never more than the items."""
        return min(k, max(100, self.items))


def make_plan(given: argparse.Namespace) -> Plan:
    """Return the plan that the command line asks for."""
    quick: bool = given.quick
    items: int = given.items
    return Plan(
        items=items,
        page_slots=given.page_slots,
        shapes=((64, 1024),) if quick else ((64, 1024), (64, 4096), (128, 1024), (128, 4096)),
        probes=(16, 64),
        batches=(1, 64) if quick else (1, 8, 64),
        threads=tuple(given.threads or ((1,) if os.cpu_count() == 1 else (1, 2))),
        filtered_probes=(64,) if quick else (16, 64),
        rounds=given.rounds or (5 if quick else 7),
        budget_s=1.0 if quick else 10.0,
        gate_queries=128 if quick else 256,
        implementation=given.implementation,
        guard=Guard(max_tries=3, max_wait_s=0.05, budget_s=0.5) if quick else Guard(),
        hnsw_items=min(items, HNSW_QUICK_ITEMS) if quick else items,
        quick=quick,
    )


def open_bench(items: int, dim: int, lists: int, plan: Plan) -> Bench:
    """Return the data, the lists and our index of a shape; the peer is opened when first used."""
    data = data_set(items, dim)
    chosen = data.lists(lists)
    progress(f"longest list {chosen.imbalance:.1f} x the mean")
    index = ours.build(data, chosen, plan.page_slots)
    return Bench(data, chosen, index, peers.Peers(data, chosen), plan.gate_queries)


def shape_cases(bench: Bench, plan: Plan, count: int, rows: Container[str]) -> Iterator[Case]:
    """Return the cells of the rows that every shape has."""
    for threads in plan.threads:
        for batch in plan.batches:
            scan = partial(scan_case, bench, batch=batch, threads=threads)
            for row, k in (("k100", 100), ("k2048", 2048)):
                for probes in plan.probes if row in rows else ():
                    yield scan([row], k=plan.length(k), probes=plan.scaled(probes, count))
            if "k10000" in rows:
                k, probes = plan.length(10_000), plan.scaled(256, count)
                yield scan(["k10000"], k=k, probes=probes)
        # A short run filters on one thread only.
        if (plan.quick and threads > 1) or (not any(row in rows for row in FILTERED_ROWS)):
            continue
        for share in SELECTIVITIES:
            for probes in plan.filtered_probes:
                for k in (100, 2048):
                    yield scan_case(
                        bench,
                        ["filtered", "filtered_roaring"],
                        k=k,
                        probes=plan.scaled(probes, count),
                        batch=1,
                        threads=threads,
                        selectivity=share,
                    )


def single_cases(bench: Bench, plan: Plan, count: int, rows: Container[str]) -> Iterator[Case]:
    """Return the cells of the rows that are measured on the first shape."""
    narrow, wide = plan.scaled(64, count), plan.scaled(512, count)
    few = (1,) if plan.quick else plan.threads
    for threads in few:
        scan = partial(scan_case, bench, threads=threads)
        for probes in (wide, bench.lists.count) if "k100000" in rows else ():
            yield scan(["k100000"], k=plan.length(100_000), probes=probes, batch=1)
        for share in SELECTIVITIES if "own_filters" in rows else ():
            for k in (2048,) if plan.quick else (100, 2048):
                yield scan(["own_filters"], k=k, probes=narrow, batch=64, selectivity=share)
        if "selective" in rows or "selective_equal" in rows:
            yield from selective_cases(bench, k=2048, probes=narrow, threads=threads)
        if "end_to_end" in rows or "end_to_end_folded" in rows:
            for share in (0.1,) if plan.quick else SELECTIVITIES:
                yield from end_to_end_cases(
                    bench, k=2048, probes=narrow, selectivity=share, threads=threads
                )
    if "filter_alone" in rows:
        yield from filter_cases(bench)
    if "dram" in rows:
        cache = dram.last_level_cache_bytes()
        limit = dram.read_limit(1, num_bytes=max(1 << 28, 4 * cache))
        progress(f"DRAM read limit, 1 thread: {limit.bytes_per_s / 1e9:.1f} GB/s by {limit.how}")
        yield bandwidth_case(bench, probes=narrow, limit=limit, cache_bytes=cache)
    for k, probes in ((100, narrow), (2048, narrow), (10_000, plan.scaled(256, count))):
        if f"no_compiler_k{k}" in rows:
            yield scan_case(
                bench,
                [f"no_compiler_k{k}"],
                k=plan.length(k),
                probes=probes,
                batch=1,
                threads=1,
                implementation="reference",
            )
    # Last, because it changes where items lie.
    for threads in few if "streaming" in rows else ():
        yield streaming_case(bench, updates=UPDATES, threads=threads)


def hnsw_cases(bench: Bench, plan: Plan) -> Iterator[Case]:
    """Return cells of equal recall against HNSW."""
    points = [(100, 0.95, True), (100, 0.99, True), (2048, 0.9, False)]
    if not plan.quick:
        points += [(100, 0.9, False), (100, 0.98, True), (2048, 0.8, False), (2048, 0.95, False)]
    for k, target, refined in points:
        yield hnsw_case(bench, k=k, target=target, refined=refined)


def every_case(plan: Plan, rows: Container[str]) -> Iterator[Case]:
    """Return the cells of the chosen rows; one data set is held at a time."""
    single = [row.key for row in ROWS if row.key not in (*SHAPE_ROWS, "hnsw")]
    for number, (dim, count) in enumerate(plan.shapes):
        if any(row in rows for row in SHAPE_ROWS + (() if number else tuple(single))):
            bench = open_bench(plan.items, dim, plan.lists(count), plan)
            yield from shape_cases(bench, plan, count, rows)
            if not number:
                yield from single_cases(bench, plan, count, rows)
            del bench
            gc.collect()
    if "hnsw" in rows:
        dim, count = plan.shapes[0]
        lists = max(16, count * plan.hnsw_items // FULL_ITEMS)
        yield from hnsw_cases(open_bench(plan.hnsw_items, dim, lists, plan), plan)


def run_case(case: Case, plan: Plan) -> tuple[Gate, list[Cell]]:
    """Run the gate of a case, then measure it; a red gate gives no cells."""
    torch.set_num_threads(case.threads)
    peers.use_threads(case.threads)
    with ours.use_implementation(case.implementation or plan.implementation):
        gate = case.gate()
        return gate, [] if gate.failures else measure(case, gate, plan)


def measure(case: Case, gate: Gate, plan: Plan) -> list[Cell]:
    """Measure a case in turn with its peers; one cell per row."""
    sides = {"ours": case.ours}
    for row, calls in case.peers.items():
        sides |= {f"{row}: {mode}": call for mode, call in calls.items()}
    found = interleave(sides, rounds=plan.rounds, guard=plan.guard, budget_s=plan.budget_s)
    mine = found["ours"]
    tries = sum(series.tries for series in found.values())
    disturbed = sum(series.disturbed for series in found.values()) / tries
    unsettled = sum(series.unsettled for series in found.values())

    def cell(row: str, value: float, peer_s: float | None) -> Cell:
        return Cell(
            row,
            case.name,
            value,
            gate.recall,
            gate.peer_recall,
            1e6 * mine.median,
            None if peer_s is None else 1e6 * peer_s,
            disturbed,
            unsettled,
        )

    cells = []
    for row, calls in case.peers.items():
        parts = [found[f"{row}: {mode}"] for mode in calls]
        cells.append(cell(row, ratio(mine, parts), min(part.median for part in parts)))
    for row, convert in case.absolute.items():
        cells.append(cell(row, convert(mine.median), None))
    return cells


def report(row: Row, gate: Gate, cell: Cell) -> None:
    """Print one cell."""
    recall = "" if gate.recall is None else f"  recall {gate.recall:.4f}"
    if gate.peer_recall is not None:
        recall += f" peer {gate.peer_recall:.4f}"
    peer = "" if cell.peer_us is None else f" peer {cell.peer_us:>10.1f} us"
    note = f"  ({gate.note})" if gate.note else ""
    if cell.unsettled:
        note += f"  [{cell.unsettled} samples never undisturbed]"
    print(
        f"{row.key:18} {cell.value:>9.4g} {row.unit:8} ours {cell.ours_us:>10.1f} us{peer}{recall}"
        f"  disturbed {cell.disturbed:.0%}  {cell.case}{note}",
        flush=True,
    )


def about(plan: Plan) -> dict[str, Any]:
    """Return what the numbers belong to."""
    flags = ""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("flags"):
            flags = line
            break
    wanted = ("avx2", "avx_vnni", "avx512f", "avx512bw", "avx512_vnni", "avx512_vpopcntdq")
    with ours.use_implementation(plan.implementation) as implementation:
        pass
    return {
        **machine(),
        **peers.versions(),
        "isa": [flag for flag in wanted if flag in flags.split()],
        "last_level_cache_bytes": dram.last_level_cache_bytes(),
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY", ""),
        "implementation": implementation,
        "gather_linear": ours.gather_linear()[1],
        "benchmark": "kernels",
        "quick": plan.quick,
        "items": plan.items,
        "page_slots": plan.page_slots,
        "load_per_core": round(busy_cores(), 2),
        "unix_s": int(time.time()),
    }


def main() -> int:
    """Run the gates and the cells of the chosen rows, print and keep the numbers."""
    keys = [row.key for row in ROWS]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the same rows at fewer cells")
    parser.add_argument("--items", type=int, default=FULL_ITEMS, help="items; lists scale along")
    parser.add_argument("--page-slots", type=int, default=64, choices=(64, 128))
    parser.add_argument("--rows", nargs="+", default=keys, choices=keys, metavar="ROW")
    parser.add_argument("--threads", nargs="+", type=int, help="default: 1 and 2")
    parser.add_argument("--rounds", type=int, help="samples per cell; default 7, quick 5")
    parser.add_argument("--implementation", default="best", help="see use_implementation")
    parser.add_argument("--prepare", action="store_true", help="fill the cache, measure nothing")
    given = parser.parse_args()
    plan = make_plan(given)
    try:
        found = about(plan)
    except peers.MissingPeerError as error:
        print(error, file=sys.stderr)
        return 2
    if given.prepare:
        for dim, count in plan.shapes:
            bench = open_bench(plan.items, dim, plan.lists(count), plan)
            progress(f"Faiss holds {bench.peers.ivf.index.ntotal} items")
        if "hnsw" in given.rows:
            _ = peers.FaissHNSW(data_set(plan.hnsw_items, plan.shapes[0][0]))
        progress(f"cache at {cache_root()}")
        return 0
    print(json.dumps(found), flush=True)
    table = {row.key: row for row in ROWS}
    cells: dict[str, list[Cell]] = {key: [] for key in given.rows}
    red: dict[str, list[str]] = {key: [] for key in given.rows}
    began = time.perf_counter()
    for case in every_case(plan, given.rows):
        wanted = [row for row in (*case.peers, *case.absolute) if row in cells]
        if not wanted:
            continue
        gate, measured = run_case(case, plan)
        if gate.failures:
            for row in wanted:
                red[row].append(case.name)
            print(f"{wanted[0]:18} RED  {case.name}: {'; '.join(gate.failures)}", flush=True)
        for cell in measured:
            if cell.row in cells:
                cells[cell.row].append(cell)
                report(table[cell.row], gate, cell)
    found["seconds"] = round(time.perf_counter() - began)
    losses = [cell.case for cell in cells.get("hnsw", []) if cell.value < 1]
    if losses:
        print("HNSW is faster than IVF at equal recall: " + "; ".join(losses))
    rows = [summary(table[key], cells[key], red[key]) for key in given.rows]
    results = _HERE / "results"
    results.mkdir(exist_ok=True)
    name = "".join(one if one.isalnum() else "-" for one in found["cpu"].lower())
    listed = [cell.as_json() for row in cells.values() for cell in row]
    with (results / f"{name}.jsonl").open("a") as file:
        file.write(json.dumps({**found, "rows": rows, "cells": listed}) + "\n")
    print(json.dumps({"machine": found, "rows": rows, "ivf_loses_to_hnsw": losses}))
    return 1 if any(red.values()) else 0


if __name__ == "__main__":
    sys.exit(main())

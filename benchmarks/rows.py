"""The rows of the speed table, and what a case, its gate and its numbers are.

A ratio is the time of the peer over ours: above 1, ours is faster. *At least* is a bound on the
worst cell of a row, *goal* and *stretch* are bounds on the geometric mean.
"""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.quiet import Call


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    key: str
    title: str
    unit: str = "x"
    at_least: float | None = None
    goal: float | None = None
    stretch: float | None = None
    lower_is_better: bool = False


ROWS = (
    Row("k100", "k 100 against Faiss IVF SQ8", "x", 1.7, 3, 4),
    Row("k2048", "k 2,048", "x", 3, 6.5, 9),
    Row("k10000", "k 10,000, 256 probes", "x", 6.5, 13, 18),
    Row("k100000", "k 100,000, 1,024 lists, batch 1", "x", 7, 15, 25),
    Row("filtered", "filtered, verified, bitmap free for Faiss", "x", 2, 6, 9),
    Row("filtered_roaring", "the same, Faiss pays for Roaring to bitmap", "x", 3, 8, 14),
    Row("own_filters", "batch 64, a filter of its own per query", "x", 4, 10, 15),
    Row("selective", "1 % filter, recall 0.95, against Faiss at 64 probes", "x", 1, 2, 3),
    Row("selective_equal", "the same against Faiss at equal recall", "x", 4, 10, 15),
    Row("end_to_end", "filter + scan + MLP + value, identical MLP", "x", 1.6, 2, 2.5),
    Row("end_to_end_folded", "the same, first layer folded", "x", 2.5, 3.5, 5.5),
    Row("filter_alone", "filter alone, 3 x 4 Bloom rows", "ns/item", 0.04, 0.02, 0.015, True),
    Row("dram", "share of the DRAM read limit, k 100, batch 1", "", 0.5, 0.75, 0.9),
    Row("streaming", "2,000 updates into the index", "ms", 20, 8, 4, True),
    Row("hnsw", "against Faiss HNSW at equal recall"),
    Row("no_compiler_k100", "no compiler, k 100", "x", 0.5),
    Row("no_compiler_k2048", "no compiler, k 2,048", "x", 1),
    Row("no_compiler_k10000", "no compiler, k 10,000", "x", 2),
)


@dataclass(frozen=True)
class Gate:
    """What was checked before a number may be printed."""

    failures: tuple[str, ...] = ()
    """What is wrong; a case with any is red."""
    recall: float | None = None
    """Share of the exact float32 answer that ours returns."""
    peer_recall: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Case:
    """One cell: ours, the peers of one or more rows, and the gate."""

    name: str
    threads: int
    ours: Call
    gate: Callable[[], Gate]
    peers: Mapping[str, Mapping[str, Call]]
    """Row -> mode of the peer -> call; the fastest mode of each round counts."""
    absolute: Mapping[str, Callable[[float], float]]
    """Row -> its value from our seconds per call, where there is no peer."""
    implementation: str | None = None
    """None: what the run was asked for."""


@dataclass(frozen=True)
class Cell:
    """The numbers of a case in one row."""

    row: str
    case: str
    value: float
    recall: float | None
    peer_recall: float | None
    ours_us: float
    peer_us: float | None
    disturbed: float
    """Share of disturbed tries, both sides together."""
    unsettled: int
    """Samples for which no undisturbed try was had."""

    def as_json(self) -> dict[str, Any]:
        """Return the cell with few digits."""
        return {
            key: float(f"{value:.4g}") if isinstance(value, float) else value
            for key, value in vars(self).items()
        }


def not_below(ours: Sequence[float], peer: Sequence[float]) -> bool:
    """Return whether recall per query is not below the peer's, as far as the queries can tell.

    The mean of ours may lack at most two standard errors of the paired difference, and never more
    than 0.002.
    """
    difference = np.asarray(ours, dtype=np.float64) - np.asarray(peer, dtype=np.float64)
    spread = difference.std(ddof=1) / math.sqrt(len(difference)) if len(difference) > 1 else 0.0
    return bool(difference.mean() >= -min(2 * spread, 0.002))


def summary(row: Row, cells: Sequence[Cell], red: Sequence[str]) -> dict[str, Any]:
    """Return the geometric mean and the worst cell of a row beside its figures."""
    found: dict[str, Any] = {
        "row": row.key,
        "unit": row.unit,
        "at_least": row.at_least,
        "goal": row.goal,
        "stretch": row.stretch,
        "cells": len(cells),
        "red": list(red),
    }
    if not cells:
        return found
    values = [cell.value for cell in cells]
    worst = (max if row.lower_is_better else min)(cells, key=lambda cell: cell.value)
    mean = statistics.geometric_mean(values)
    recalls = [cell.recall for cell in cells if cell.recall is not None]
    others = [cell.peer_recall for cell in cells if cell.peer_recall is not None]
    found |= {
        "geometric_mean": float(f"{mean:.4g}"),
        "worst": float(f"{worst.value:.4g}"),
        "worst_case": worst.case,
        "recall": [round(min(recalls), 4), round(max(recalls), 4)] if recalls else None,
        "peer_recall": [round(min(others), 4), round(max(others), 4)] if others else None,
        "disturbed": round(statistics.fmean(cell.disturbed for cell in cells), 3),
        "unsettled": sum(cell.unsettled for cell in cells),
        "reached": reached(row, worst.value, mean),
    }
    return found


def reached(row: Row, worst: float, mean: float) -> list[str]:
    """Return which of the figures of a row are met."""
    sign = -1 if row.lower_is_better else 1
    figures = {
        "at_least": (worst, row.at_least),
        "goal": (mean, row.goal),
        "stretch": (mean, row.stretch),
    }
    return [
        name
        for name, (value, bound) in figures.items()
        if bound is not None and sign * value >= sign * bound
    ]

"""The verb ``evaluate``, and what an evaluation found as JSON values and as tables."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from silvershard.deploy import ask, recipe
from silvershard.deploy.access import dialer_within
from silvershard.deploy.config import Config
from silvershard.deploy.errors import CommandError
from silvershard.deploy.evaluate import DEPTHS, LONG, SHORT, Evaluation, Row, evaluate
from silvershard.deploy.state import StateDir
from silvershard.deploy.tables import Cell, pairs, table
from silvershard.model.catalogue import Catalogue
from silvershard.model.quality import Interval
from silvershard.shard.generations import generation_dir
from silvershard.shard.snapshot import open_snapshot

_METRICS = ("hit_rate", "ndcg", "recall")


def measure(
    state: StateDir,
    config: Config,
    *,
    data: Path | None = None,
    environ: Mapping[str, str] = os.environ,
    report: Callable[[str], None] = print,
) -> Evaluation:
    """Measure the cluster that runs on a state directory.

    The data set and the split are those that the model was trained on.

    Args:
        state: where it runs and its model is.
        config: its settings.
        data: folder or zip; None: where the training found it.
        environ: environment variables.
        report: hears where the data come from.

    Raises:
        CommandError: if nothing runs there, or its generation was published from other data or
            after another split.
        DataError: if the data cannot be used.
    """
    record = state.read_record() if state.root.is_dir() else None
    if record is None or not record.address:
        raise CommandError(f"no cluster runs on {state.root}: start one with `silvershard up`")
    description = recipe.load_model(state.model_dir).description
    source = description.data.path
    prepared = recipe.prepare(
        config,
        data=data or (Path(source) if source else None),
        environ=environ,
        report=report,
        training=description.training,
    )
    path = generation_dir(state.generations, record.generation)
    check_origin(path, prepared.catalogue)
    return evaluate(
        prepared,
        path,
        record.address,
        max_requests=config.admission.queue,
        min_rating=description.training.min_rating,
        dialer=dialer_within(record),
    )


def check_origin(path: Path, catalogue: Catalogue) -> None:
    """Compare the items of a generation with those that data and split give, signals included.

    Signals count the training interactions, so a generation of another split has other ones, and
    would be tested on what it was trained on.

    Raises:
        CommandError: if they differ.
    """
    snapshot = open_snapshot(path)
    row_of = {item: row for row, item in enumerate(catalogue.item_ids.tolist())}
    same = snapshot.spec.documents == len(catalogue)
    for number in range(snapshot.spec.num_partitions):
        data = snapshot.load_partition(number) if same else None
        if data is None:
            continue
        held = data.catalogue
        rows = [row_of.get(item, -1) for item in held.item_ids.tolist()]
        same = min(rows) >= 0 and np.array_equal(catalogue.signals[rows], held.signals)
    if not same:
        raise CommandError(
            f"{path} was published from other data, or trained on another split, than the model in "
            "the state directory: publish again"
        )


def document(evaluation: Evaluation) -> dict[str, Any]:
    """Return an evaluation as JSON values."""
    index = evaluation.index_quality
    return {
        "split": evaluation.split,
        "users": evaluation.users,
        "held_out": evaluation.held_out,
        "table": {row.name: _numbers(row) for row in evaluation.rows},
        "tasks": {
            one.task: {row.name: {"users": row.users, **_numbers(row)} for row in one.rows}
            for one in evaluation.tasks
        },
        "cold": {row.name: {"users": row.users, **_numbers(row)} for row in evaluation.cold},
        "lift_over_popularity": {
            "hit_rate_at_10": _interval(evaluation.lift_hit_rate),
            "ndcg_at_10": _interval(evaluation.lift_ndcg),
        },
        "scan_refine_recall": {
            f"at_{index.depth}": round(index.recall_deep, 6),
            f"at_{min(LONG, index.depth)}": round(index.recall_long, 6),
        },
        "ann_overlap_at_10": round(index.overlap, 6),
        "probes_per_head": index.probes,
        "ann_overlap_at_10_within_an_eighth": round(index.shared_overlap, 6),
        "probes_per_head_within_an_eighth": index.shared_probes,
        "clusters": index.clusters,
    }


def render(evaluation: Evaluation) -> str:
    """Return an evaluation for people."""
    index = evaluation.index_quality
    hit, ndcg = evaluation.lift_hit_rate, evaluation.lift_ndcg
    facts = [
        ("split", evaluation.split),
        (
            "over popularity",
            f"HitRate@10 {hit.mean:+.4f} (95 %: {hit.low:+.4f} to {hit.high:+.4f}), "
            f"NDCG@10 {ndcg.mean:+.4f} ({ndcg.low:+.4f} to {ndcg.high:+.4f})",
        ),
        (
            "scan + refine",
            f"recall@{index.depth} {index.recall_deep:.4f}, "
            f"recall@{min(LONG, index.depth)} {index.recall_long:.4f} "
            "of exact fp32 on the same probes",
        ),
        (
            "probing",
            f"top 10 overlaps brute force by {index.overlap:.4f} "
            f"with {index.probes} of {index.clusters} clusters per head, by "
            f"{index.shared_overlap:.4f} with {index.shared_probes} (all heads within an eighth)",
        ),
        ("plan", evaluation.served.plan),
    ]
    headers = ("HitRate@10", "NDCG@10", "Recall@20", "Recall@100", "coverage@10")
    parts = [
        f"Quality on {evaluation.held_out:,} held-out interactions of {evaluation.users:,} users",
        table(("ranking", *headers), [[row.name, *_cells(row)] for row in evaluation.rows]),
    ]
    if evaluation.tasks:
        rows: list[list[Cell]] = [
            [one.task, row.name, row.users, *_cells(row)]
            for one in evaluation.tasks
            for row in one.rows
        ]
        parts += [
            "Held-out items that are positive for one task",
            table(("positive for", "ordered by", "users", *headers), rows),
        ]
    if evaluation.cold:
        parts += [
            f"{evaluation.cold[0].users:,} users without a history",
            table(("ranking", *headers), [[row.name, *_cells(row)] for row in evaluation.cold]),
        ]
    parts += [
        pairs(facts),
        "  Median stage times, asked in batches of 64\n"
        + ask.stages_table(evaluation.served.timings_us),
    ]
    return "\n\n".join(parts)


def _cells(row: Row) -> list[Cell]:
    return [
        _mean(row.hit_rate, SHORT),
        _mean(row.ndcg, SHORT),
        _mean(row.recall, 20),
        _mean(row.recall, LONG),
        row.coverage[SHORT],
    ]


def _numbers(row: Row) -> dict[str, float | None]:
    """Return the mean of every metric; None where there is no user."""
    numbers: dict[str, float | None] = {}
    for metric in _METRICS:
        for k in DEPTHS:
            mean = _mean(getattr(row, metric), k)
            numbers[f"{metric}_at_{k}"] = None if mean is None else round(mean, 6)
    for k in DEPTHS:
        numbers[f"coverage_at_{k}"] = round(row.coverage[k], 6)
    return numbers


def _mean(metric: Mapping[int, Any], k: int) -> float | None:
    return float(metric[k].mean()) if len(metric[k]) else None


def _interval(interval: Interval) -> dict[str, float]:
    return {name: round(value, 6) for name, value in interval._asdict().items()}

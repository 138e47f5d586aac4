"""Measures what a reranker adds to the order of the index, and what more probes add.

Usage: ``python -P benchmarks/ordering.py [--quick] [--seeds N] [--only planted|movielens]``. The
towers are trained once for each seed and the rerankers on top of these very towers, so that the
arms differ in nothing but the order and the probes. Every arm is an answer of the whole pipeline
over a published generation; the value formula ``score`` gives the order of the index alone. No
number is printed before the tests hold (a quick run leaves them out) and the index over all
clusters equals brute force. MovieLens is where ``SILVERSHARD_DATA`` says, or downloaded. Each run
appends one JSON line per data set to ``benchmarks/results/<machine>.jsonl``; the last line printed
is one JSON object.

Shapes: U users with a held-out item, N items, D embedding dimension, K ranks.
"""

import argparse
import json
import sys
import tempfile
import time
import types
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

_HERE = Path(__file__).resolve().parent
if "benchmarks" not in sys.modules:
    # The folder is no package and the root stays off sys.path, where `import model` would work.
    _PACKAGE = types.ModuleType("benchmarks")
    _PACKAGE.__path__ = [str(_HERE)]
    sys.modules["benchmarks"] = _PACKAGE

from benchmarks.ordering_tasks import (  # noqa: E402
    CANDIDATES,
    PLANTED_DIM,
    PROBE_SHARES,
    Ids,
    Task,
    movielens_task,
    planted_task,
    train_rankers,
)
from benchmarks.planted import PlantedWorld, planted_world  # noqa: E402
from benchmarks.run import machine, passes  # noqa: E402
from silvershard.kernels import fixed_dot, select_topk  # noqa: E402
from silvershard.model.compiled_request import compile_request  # noqa: E402
from silvershard.model.quality import (  # noqa: E402
    Interval,
    overlap_at_k,
    paired_bootstrap,
    recall_at_k,
)
from silvershard.model.ranker_config import (  # noqa: E402
    MixtureOfLogitsConfig,
    MLPConfig,
    RankerConfig,
)
from silvershard.model.request import Request  # noqa: E402
from silvershard.model.retriever import Retriever  # noqa: E402
from silvershard.model.spec import SearchDefaults  # noqa: E402
from silvershard.model.two_tower import TwoTower  # noqa: E402
from silvershard.shard.load import load_retriever  # noqa: E402
from silvershard.shard.publish import publish_generation  # noqa: E402

RANKS = (20, 100)
RANKERS: Mapping[str, RankerConfig] = {"mlp": MLPConfig(), "mol": MixtureOfLogitsConfig()}
FULL, QUICK = (2000, 4000, 36), (1500, 3000, 32)
"""Users, items and interactions of a user in the generated data."""
SEEDS = {"planted": 3, "movielens": 5}
"""Of a full run."""
BATCH = 32
GATES = ("tests/model/test_retriever.py", "tests/model/test_ranker_training.py")


@contextmanager
def published(task: Task, model: TwoTower) -> Iterator[Retriever]:
    """Publish a model with the items and yield the pipeline over them."""
    with tempfile.TemporaryDirectory() as folder:
        generation = publish_generation(
            Path(folder),
            name=task.name,
            model=model,
            builder="two_tower",
            config=model.config.model_dump(mode="json"),
            catalogue=task.catalogue,
            schema=task.schema,
            defaults=SearchDefaults(probes=task.clusters, ann_k=CANDIDATES),
            num_clusters=task.clusters,
        )
        yield load_retriever(generation.path)[0]


def answers(retriever: Retriever, task: Task, *, probes: int, k: int, value: str = "") -> Ids:
    """Return the best unseen items of every user, ``(U, k)``, -1 where there is none.

    Args:
        retriever: the pipeline.
        task: its users.
        probes: clusters per head.
        k: ranks.
        value: formula of the order; the reranker's where empty.
    """
    ranked = np.full((len(task.histories), k), -1, dtype=np.int64)
    for start in range(0, len(ranked), BATCH):
        rows = range(start, min(start + BATCH, len(ranked)))
        requests = [
            Request(
                features=task.features[row],
                k=k,
                exclude_ids=task.histories[row],
                nprobe=probes,
                ann_k=CANDIDATES,
                value=value,
            )
            for row in rows
        ]
        for row, answer in enumerate(retriever(requests), start):
            ranked[row, : len(answer.item_ids)] = answer.item_ids.numpy()
    return ranked


@torch.inference_mode()
def brute_force(retriever: Retriever, model: TwoTower, task: Task, k: int) -> Ids:
    """Return the unseen items with the largest product with any head, ``(U, k)``, ties by id.

    Items have the half precision in which the pipeline keeps them.
    """
    items = model.embed_items(dict(task.catalogue.features)).half().float()
    item_ids = torch.from_numpy(task.catalogue.item_ids)
    row_of = {int(item_id): row for row, item_id in enumerate(task.catalogue.item_ids)}
    ranked = np.empty((len(task.histories), k), dtype=np.int64)
    for user, taken in enumerate(task.histories):
        compiled = compile_request(Request(features=task.features[user]), retriever.spec)
        query = retriever.encode([compiled.features]).embedding[0]  # (H, D)
        scores = fixed_dot(query[:, None], items[None]).amax(0)  # (N,)
        ids = item_ids.clone()
        ids[[row_of[one] for one in taken if one in row_of]] = -1
        ranked[user] = select_topk(scores[None], ids[None], k).item_ids[0].numpy()
    return ranked


def arms(task: Task, models: Mapping[str, TwoTower]) -> tuple[dict[str, Ids], list[str]]:
    """Return the answers of every arm by "order, probes", and what is wrong with them.

    The orders are ``ann`` and the rerankers; ``ann`` is as deep as its candidates.
    """
    found: dict[str, Ids] = {}
    first = next(iter(models.values()))
    with published(task, first) as retriever:
        for name, count in task.probes.items():
            found[f"ann, {name}"] = answers(
                retriever, task, probes=count, k=CANDIDATES, value="score"
            )
        exact = brute_force(retriever, first, task, max(RANKS))
    failures = []
    if not np.array_equal(found["ann, all"][:, : max(RANKS)], exact):
        failures.append("the index over all clusters differs from brute force")
    for ranker, model in models.items():
        if not same_towers(first, model):
            failures.append(f"the towers under {ranker} are others")
        with published(task, model) as retriever:
            for name, count in task.probes.items():
                found[f"{ranker}, {name}"] = answers(retriever, task, probes=count, k=max(RANKS))
    return found, failures


def same_towers(a: TwoTower, b: TwoTower) -> bool:
    """Return whether two models differ in nothing but the reranker."""
    left, right = (
        {name: one for name, one in model.state_dict().items() if not name.startswith("ranker.")}
        for model in (a, b)
    )
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


@dataclass(frozen=True, eq=False)
class Measured:
    """What the arms of one seed found: by arm and k, 1 for each user whose item is there."""

    seed: int
    hits: dict[tuple[str, int], NDArray[np.float64]]
    reference: dict[str, dict[str, float]]
    """Recall of orders that are told the truth, where there is one."""
    overlap: dict[str, float]
    """Share of the exact best 100 that the index finds, by probes."""
    ceiling: dict[str, float]
    """Share of users whose item is among the best 1,000 of the index, by probes."""
    seconds: dict[str, float]


def measure(task: Task, seed: int, world: PlantedWorld | None = None) -> Measured | list[str]:
    """Train, answer and judge; return what is wrong where the gate is red."""
    began = time.perf_counter()
    models = train_rankers(task, RANKERS, seed)
    trained = time.perf_counter()
    found, failures = arms(task, models)
    if failures:
        return failures
    deepest = max(RANKS)
    exact = found["ann, all"]
    reference: dict[str, dict[str, float]] = {}
    if world is not None:
        orders = {
            "truth": world.truth(deepest),
            f"best inner product of {PLANTED_DIM}": world.best_inner_product(PLANTED_DIM, deepest),
        }
        reference = {
            name: {f"at_{k}": _recall(order, task, k) for k in RANKS}
            for name, order in orders.items()
        }
    return Measured(
        seed=seed,
        hits={
            (name, k): recall_at_k(ranked, task.held_out, k)
            for name, ranked in found.items()
            for k in RANKS
        },
        reference=reference,
        overlap={
            name: round(float(overlap_at_k(found[f"ann, {name}"], exact, deepest).mean()), 4)
            for name in PROBE_SHARES
        },
        ceiling={name: _recall(found[f"ann, {name}"], task, CANDIDATES) for name in PROBE_SHARES},
        seconds={
            "training": round(trained - began, 1),
            "answers": round(time.perf_counter() - trained, 1),
        },
    )


def _recall(ranked: Ids, task: Task, k: int) -> float:
    return round(float(recall_at_k(ranked, task.held_out, k).mean()), 4)


def comparisons() -> dict[str, tuple[str, str]]:
    """Return the arms that each claim compares, by what it is about."""
    found = {"more probes": ("ann, all", "ann, few")}
    for ranker in RANKERS:
        for name in PROBE_SHARES:
            found[f"{ranker} over ann, {name} probes"] = (f"{ranker}, {name}", f"ann, {name}")
        found[f"{ranker} with few probes over ann with all"] = (f"{ranker}, few", "ann, all")
    return found


def compared(parts: Sequence[Measured], pair: tuple[str, str], k: int, *, paired: bool) -> Interval:
    """Return the gain of the first arm over the second with its interval over users.

    Args:
        parts: one per seed.
        pair: two arms.
        k: ranks.
        paired: the seeds have the same users, whose mean over the seeds counts; else the users of
            all seeds count.
    """
    left, right = (np.stack([part.hits[arm, k] for part in parts]) for arm in pair)
    if paired:
        return paired_bootstrap(left.mean(0), right.mean(0))
    return paired_bootstrap(left.flatten(), right.flatten())


def summary(parts: Sequence[Measured], *, paired: bool) -> dict[str, Any]:
    """Return recalls and gains of one data set as JSON values."""
    names = sorted({name for name, _ in parts[0].hits})
    gains = {
        claim: {
            f"at_{k}": {
                **_rounded(compared(parts, pair, k, paired=paired)),
                "seeds": [_rounded(compared([part], pair, k, paired=True)) for part in parts],
            }
            for k in RANKS
        }
        for claim, pair in comparisons().items()
    }
    return {
        "users": len(parts[0].hits[names[0], RANKS[0]]),
        "seeds": [part.seed for part in parts],
        "recall": {
            name: {
                f"at_{k}": [round(float(part.hits[name, k].mean()), 4) for part in parts]
                for k in RANKS
            }
            for name in names
        },
        "reference": [part.reference for part in parts],
        "overlap_with_exact_at_100": [part.overlap for part in parts],
        "recall_of_candidates": [part.ceiling for part in parts],
        "gains": gains,
        "seconds": [part.seconds for part in parts],
    }


def _rounded(interval: Interval) -> dict[str, float]:
    return {name: round(value, 4) for name, value in interval._asdict().items()}


def verdicts(found: Mapping[str, Any]) -> dict[str, dict[str, bool]]:
    """Return whether each claim of the paper holds at each k, in every seed and in all together.

    ``raises``: the gain of a reranker over the order of the index is above zero with few and with
    all probes; ``beats precision``: with few probes it is better than the exact order without it.
    """
    held: dict[str, dict[str, bool]] = {}
    for ranker in RANKERS:
        wanted = {
            "raises": [f"{ranker} over ann, {name} probes" for name in PROBE_SHARES],
            "beats precision": [f"{ranker} with few probes over ann with all"],
        }
        for claim, rows in wanted.items():
            held[f"{ranker} {claim}"] = {
                f"at_{k}": all(
                    gain["low"] > 0
                    for row in rows
                    for gain in (
                        found["gains"][row][f"at_{k}"],
                        *found["gains"][row][f"at_{k}"]["seeds"],
                    )
                )
                for k in RANKS
            }
    return held


def report(name: str, found: Mapping[str, Any]) -> None:
    """Print the tables of one data set."""
    print(f"\n{name}: {found['users']} users, seeds {found['seeds']}; mean over the seeds")
    print(f"{'order, probes':32} " + " ".join(f"{f'recall@{k}':>11}" for k in RANKS))
    for arm, recalls in found["recall"].items():
        print(f"{arm:32} " + " ".join(f"{np.mean(one):>11.4f}" for one in recalls.values()))
    for order in found["reference"][0]:
        means = [np.mean([part[order][f"at_{k}"] for part in found["reference"]]) for k in RANKS]
        print(f"{order:32} " + " ".join(f"{one:>11.4f}" for one in means))
    for title, rows in (
        ("exact best 100 found", found["overlap_with_exact_at_100"]),
        ("item in the best 1,000", found["recall_of_candidates"]),
    ):
        each = {name: np.mean([row[name] for row in rows]) for name in PROBE_SHARES}
        print(f"{title:32} " + ", ".join(f"{name} {mean:.4f}" for name, mean in each.items()))
    print(f"{'gain':40} " + " ".join(f"{f'recall@{k}, 95 %':>26}" for k in RANKS))
    for claim, gains in found["gains"].items():
        cells = [
            f"{one['mean']:+.4f} [{one['low']:+.4f}, {one['high']:+.4f}]" for one in gains.values()
        ]
        print(f"{claim:40} " + " ".join(f"{one:>26}" for one in cells))
    for claim, held in verdicts(found).items():
        print(f"{claim:40} {held}", flush=True)


def main() -> int:
    """Run the gates, the data sets and the report."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--quick",
        action="store_true",
        help="generated data alone, one seed, fewer users",
    )
    parser.add_argument("--seeds", type=int, default=0, help="seeds of each data set")
    parser.add_argument("--only", choices=("planted", "movielens"), help="one of the data sets")
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    for gate in () if given.quick else GATES:
        if not passes(gate):
            print(f"gate {gate} is red: no number is printed", file=sys.stderr)
            return 1
    about = {**machine(), "benchmark": "ordering", "unix_s": int(time.time())}
    print(
        f"{about['cpu']}, {about['cores']} cores, {given.threads} threads, torch {about['torch']}"
    )
    found: dict[str, Any] = {}
    names = [given.only] if given.only else ["planted"] if given.quick else list(SEEDS)
    for name in names:
        parts: list[Measured] = []
        count = given.seeds or (1 if given.quick else SEEDS[name])
        task = movielens_task() if name == "movielens" else None
        if name == "movielens" and task is None:
            print("movielens: not here and not to be had, so it is left out")
            continue
        for seed in range(count):
            world = None
            if name == "planted":
                world = planted_world(*(QUICK if given.quick else FULL), seed)
                steps = {"steps": 300, "ranker_steps": 200} if given.quick else {}
                task = planted_task(world, **steps)
            assert task is not None
            measured = measure(task, seed, world)
            if isinstance(measured, list):
                print(f"{name}, seed {seed}: gate is red: {'; '.join(measured)}", file=sys.stderr)
                return 1
            parts.append(measured)
            seconds = ", ".join(f"{what} {one:.0f} s" for what, one in measured.seconds.items())
            print(f"{name}, seed {seed}: {seconds}", flush=True)
        found[name] = summary(parts, paired=name == "movielens")
        report(name, found[name])
        found[name]["holds"] = verdicts(found[name])
    results = _HERE / "results"
    results.mkdir(exist_ok=True)
    file_name = "".join(one if one.isalnum() else "-" for one in str(about["cpu"]).lower())
    with (results / f"{file_name}.jsonl").open("a") as file:
        for name, one in found.items():
            file.write(json.dumps({"case": f"ordering/{name}", **one, **about}) + "\n")
    print(json.dumps({"machine": about, "data_sets": found}))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Measures an index that was trained with the towers beside one that was built after them.

Usage: ``python -P benchmarks/joint.py [--quick] [--seeds N] [--steps N] [--only DATA]``. All arms
train the same towers for as many steps on the same batches and have as many clusters:

* ``plain``: towers trained without a thought of the index, which k-means then makes;
* ``pulled``: the default recipe, which pulls items towards k-means centres; the index as above;
* ``joint``: towers and centroids trained together (``training.joint``);
* ``joint, k-means``: the same towers, but an index that k-means makes.

Recall is that of the product's scan and refine against exact search over the same embeddings. The
held-out items found through the probed lists stand beside it, so that embeddings which collapse
cannot look good, and so does the share of the catalogue that was read. No number is printed before
the tests hold and, for every model, the index over all clusters equals exact search. MovieLens is
where ``SILVERSHARD_DATA`` says, or downloaded; the generated films have planted tastes. Each run
appends one JSON line per data set to ``benchmarks/results/<machine>.jsonl``; the last line printed
is one JSON object.

Shapes: N items, D embedding dimension, C clusters, Q query rows, P probes, K results.
"""

import argparse
import json
import sys
import time
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_HERE = Path(__file__).resolve().parent
if "benchmarks" not in sys.modules:
    # The folder is no package and the root stays off sys.path, where `import model` would work.
    _PACKAGE = types.ModuleType("benchmarks")
    _PACKAGE.__path__ = [str(_HERE)]
    sys.modules["benchmarks"] = _PACKAGE

from benchmarks.run import machine, passes  # noqa: E402
from silvershard.deploy import movielens, synthetic  # noqa: E402
from silvershard.deploy.config import Config  # noqa: E402
from silvershard.deploy.recipe import DataSource, Prepared, interactions, prepare  # noqa: E402
from silvershard.kernels import IvfIndex, pack_bits, quantize_rows  # noqa: E402
from silvershard.model.clustering import (  # noqa: E402
    Clustering,
    assign_clusters,
    default_clusters,
    spherical_kmeans,
)
from silvershard.model.joint_config import JointConfig  # noqa: E402
from silvershard.model.quality import hit_rate_at_k, overlap_at_k  # noqa: E402
from silvershard.model.training import Trained, Watch, train  # noqa: E402
from silvershard.model.training_config import TrainingConfig  # noqa: E402

PROBES = (1, 2, 4, 8, 16, 32)
K = 100
SHORT = 10
CANDIDATES = 200
"""That pass the scan and are scored again in float32."""
PAGE_SLOTS = 64
BATCH = 64
LEAST = 0.999
"""Of the exact best items, that the index over all clusters must find."""
ARMS: Mapping[str, Mapping[str, Any]] = {
    "plain": {"cluster_pull": 0.0},
    "pulled": {},
    "joint": {"joint": JointConfig()},
}
GATES = (
    "tests/model/test_joint.py",
    "tests/kernels/test_ivf_search.py",
)

Rows = NDArray[np.int64]


class Line(NamedTuple):
    """What one index of one seed gives at one number of probes."""

    probes: int
    recall: float
    """Of the exact best 100, mean over users and heads."""
    read: float
    """Share of the catalogue that lies in the probed lists, mean over users and heads."""
    hit_rate: float
    """Of the held-out item among the best 10 that the first head finds."""
    found: float
    """Of the held-out item among its best 100."""


@dataclass(frozen=True, eq=False)
class World:
    """A data set, and the users whose held-out item is looked for."""

    prepared: Prepared
    histories: list[list[int]]
    seen: list[Rows]
    """Rows of the catalogue that each user has rated."""
    targets: Rows
    """Row of each user's held-out item."""


def load_world(name: str, seed: int, *, quick: bool) -> World:
    """Return a data set with its split; the generated films differ by seed."""
    prepared = _generated(seed, quick=quick) if name == "generated" else prepare(Config())
    split = prepared.split
    tested = np.flatnonzero(split.test_rows >= 0)
    histories = [split.test_histories.row(int(row)).tolist() for row in tested]
    return World(
        prepared,
        histories,
        [prepared.data.movie_rows(np.array(one, dtype=np.int64)) for one in histories],
        prepared.data.movie_rows(split.test_item_ids[tested]),
    )


def _generated(seed: int, *, quick: bool) -> Prepared:
    films, users = (3000, 300) if quick else (3000, 600)
    data = synthetic.generate(films, users, 60, seed=seed)
    split = movielens.split(data)
    popular = movielens.popularity(data, split)
    return Prepared(
        data,
        DataSource(path="", summary=data.summary, generated=True),
        split,
        popular,
        movielens.schema(),
        movielens.catalogue(data, popular.counts, popular.means),
    )


def train_arm(world: World, arm: str, seed: int, steps: int) -> Trained:
    """Return the towers of an arm; no arm trains a reranker."""
    prepared = world.prepared
    settings = {"clusters": default_clusters(len(prepared.catalogue)), "ranker_steps": 0}
    held_out = prepared.split.valid_rows[prepared.split.valid_rows >= 0]
    return train(
        prepared.schema,
        prepared.catalogue.features,
        prepared.catalogue.signals,
        interactions(prepared, prepared.split.train_rows),
        TrainingConfig(steps=steps, **settings, **ARMS[arm]),
        validation=interactions(prepared, held_out),
        seed=seed,
        watch=Watch(progress=False),
    )


class Lists:
    """The items of a model in the inverted lists of the product."""

    def __init__(self, embeddings: Tensor, clustering: Clustering) -> None:
        """Lay the items into pages, list by list.

        Args:
            embeddings: ``(N, D)`` float32.
            clustering: centroids and the list of every item.
        """
        self.embeddings = embeddings
        self.sizes = torch.bincount(clustering.assignment, minlength=len(clustering.centroids))
        pages = -(-self.sizes // PAGE_SLOTS)
        first = pages.cumsum(0) - pages
        column = torch.arange(max(int(pages.max()), 1))
        table = torch.where(column < pages[:, None], first[:, None] + column, -1)
        order = torch.argsort(clustering.assignment, stable=True)
        own = clustering.assignment[order]
        rank = torch.arange(len(order)) - (self.sizes.cumsum(0) - self.sizes)[own]
        self.slots = torch.empty_like(order)
        self.slots[order] = first[own] * PAGE_SLOTS + rank
        count = int(pages.sum()) * PAGE_SLOTS
        codes, scales = quantize_rows(embeddings)
        centroid_codes, centroid_scales = quantize_rows(clustering.centroids)
        self._index = IvfIndex(
            centroids=clustering.centroids,
            centroid_codes=centroid_codes,
            centroid_scales=centroid_scales,
            page_table=table.int(),
            codes=self._laid(codes, 0, count),
            scales=self._laid(scales, 0, count),
            item_ids=self._laid(torch.arange(len(embeddings)), -1, count),
            planes=pack_bits(
                self._laid(torch.ones(len(embeddings), dtype=torch.bool), 0, count)
            ).unsqueeze(0),
            columns=torch.zeros(0, count // PAGE_SLOTS, PAGE_SLOTS, dtype=torch.int64),
            terms=torch.zeros(count // PAGE_SLOTS, PAGE_SLOTS, 0, dtype=torch.int64),
        )

    def _laid(self, values: Tensor, fill: int, count: int) -> Tensor:
        laid = torch.full((count, *values.shape[1:]), fill, dtype=values.dtype)
        laid[self.slots] = values
        return laid.view(-1, PAGE_SLOTS, *values.shape[1:])

    def search(self, query: Tensor, probes: int, seen: list[Rows] | None) -> tuple[Rows, float]:
        """Return the best items ``(Q, K)`` by scan and refine, and the mean items read.

        Args:
            query: ``(Q, D)`` float32.
            probes: P.
            seen: rows that each query must not find; None: it may find all.
        """
        found, read = [], 0
        for start in range(0, len(query), BATCH):
            rows = query[start : start + BATCH]
            nothing = torch.zeros(len(rows), 0, 4, dtype=torch.int64)
            excluded = torch.zeros(len(rows), 0, dtype=torch.int64)
            if seen is not None:
                parts = [self.slots[torch.from_numpy(one)] for one in seen[start : start + BATCH]]
                excluded = torch.nn.utils.rnn.pad_sequence(
                    parts, batch_first=True, padding_value=-1
                )
            scan = self._index.search(rows, nothing, nothing, excluded, probes, CANDIDATES)
            read += int(scan.probed.sum())
            scores = (self.embeddings[scan.item_ids.clamp(min=0)] * rows[:, None]).sum(2)
            best = scores.masked_fill(scan.item_ids < 0, -torch.inf).topk(K, 1)
            ids = scan.item_ids.gather(1, best.indices)
            found.append(ids.masked_fill(best.values == -torch.inf, -1))
        return torch.cat(found).numpy(), read / len(query)


def exact(embeddings: Tensor, query: Tensor, seen: list[Rows] | None) -> Rows:
    """Return the best items ``(Q, K)`` by float32 product; arguments as for ``Lists.search``."""
    found = []
    for start in range(0, len(query), BATCH):
        scores = query[start : start + BATCH] @ embeddings.T
        if seen is not None:
            for row, own in zip(scores, seen[start : start + BATCH], strict=True):
                row[torch.from_numpy(own)] = -torch.inf
        found.append(scores.topk(K, 1).indices)
    return torch.cat(found).numpy()


@torch.inference_mode()
def measure(world: World, trained: Trained, clustering: Clustering) -> dict[str, Any] | None:
    """Return what an index gives at every number of probes; None where its gate is red."""
    embeddings = trained.model.embed_items(world.prepared.catalogue.features).clone()
    queries = trained.model.encode([{"history": one} for one in world.histories]).embedding
    rows, first = queries.flatten(0, 1), queries[:, 0].contiguous()
    lists = Lists(embeddings, clustering)
    truth, best = exact(embeddings, rows, None), exact(embeddings, first, world.seen)
    everything, _ = lists.search(rows, len(clustering.centroids), None)
    if overlap_at_k(everything, truth, K).mean() < LEAST:
        return None
    lines = []
    for probes in PROBES:
        found, read = lists.search(rows, probes, None)
        own, _ = lists.search(first, probes, world.seen)
        lines.append(
            Line(
                probes,
                float(overlap_at_k(found, truth, K).mean()),
                read / len(embeddings),
                float(hit_rate_at_k(own, world.targets, SHORT).mean()),
                float(hit_rate_at_k(own, world.targets, K).mean()),
            )
        )
    return {
        "ndcg": trained.tower_ndcg,
        "exact_hit_rate": float(hit_rate_at_k(best, world.targets, SHORT).mean()),
        "exact_found": float(hit_rate_at_k(best, world.targets, K).mean()),
        "longest_list": float(lists.sizes.max() / lists.sizes.double().mean()),
        "lines": [one._asdict() for one in lines],
    }


def indexes(
    trained: Trained, arm: str, world: World, seed: int
) -> Iterator[tuple[str, Clustering]]:
    """Yield the indexes that the towers of an arm are measured with, by name."""
    embeddings = trained.model.embed_items(world.prepared.catalogue.features)
    clusters = default_clusters(len(embeddings))
    if trained.centroids is not None:
        yield arm, assign_clusters(embeddings, trained.centroids)
    name = arm if trained.centroids is None else f"{arm}, k-means"
    yield name, spherical_kmeans(embeddings, clusters, seed=seed)


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the mean and the standard deviation over the seeds of every number of an arm."""

    def both(values: list[float]) -> list[float]:
        spread = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
        return [round(float(np.mean(values)), 4), round(spread, 4)]

    plain = [key for key in runs[0] if key != "lines"]
    return {key: both([run[key] for run in runs]) for key in plain} | {
        "lines": [
            {"probes": lines[0]["probes"]}
            | {key: both([one[key] for one in lines]) for key in Line._fields[1:]}
            for lines in zip(*(run["lines"] for run in runs), strict=True)
        ]
    }


def at_equal_reading(arm: Mapping[str, Any], other: Mapping[str, Any]) -> list[float]:
    """Return the recall of ``other`` where it reads as much as ``arm`` at each number of probes.

    Between its numbers of probes it is interpolated over the logarithm of the items read.
    """
    read = [np.log(line["read"][0]) for line in other["lines"]]
    recall = [line["recall"][0] for line in other["lines"]]
    asked = [np.log(line["read"][0]) for line in arm["lines"]]
    return [round(float(one), 4) for one in np.interp(asked, read, recall)]


def show(name: str, found: Mapping[str, Mapping[str, Any]]) -> None:
    """Print the table of a data set."""
    print(f"{name:16} exact NDCG@10 {'HR@10':>7} {'R@100':>7}  longest list  seconds")
    for arm, numbers in found.items():
        print(
            f"{arm:16} {numbers['ndcg'][0]:13.4f} {numbers['exact_hit_rate'][0]:7.4f} "
            f"{numbers['exact_found'][0]:7.4f} {numbers['longest_list'][0]:13.1f} "
            f"{numbers['seconds'][0]:8.0f}"
        )
    for title, key in (
        ("recall@100 of the index", "recall"),
        ("share of the items read", "read"),
        ("HitRate@10 of the held-out item", "hit_rate"),
        ("Recall@100 of the held-out item", "found"),
    ):
        print(f"{title + ', probes':40}" + "".join(f"{probes:>18}" for probes in PROBES))
        for arm, numbers in found.items():
            cells = [f"{line[key][0]:.4f} ± {line[key][1]:.4f}" for line in numbers["lines"]]
            print(f"{arm:40}" + "".join(f"{cell:>18}" for cell in cells), flush=True)


def run(name: str, seeds: int, steps: int, *, quick: bool) -> dict[str, Any] | None:
    """Return the summary of a data set; None where a gate is red."""
    runs: dict[str, list[dict[str, Any]]] = {}
    for seed in range(seeds):
        world = load_world(name, seed, quick=quick)
        for arm in ARMS:
            began = time.process_time()
            trained = train_arm(world, arm, seed, steps)
            seconds = time.process_time() - began
            for index, clustering in indexes(trained, arm, world, seed):
                measured = measure(world, trained, clustering)
                if measured is None:
                    print(f"{name}, {index}: all clusters lack items", file=sys.stderr)
                    return None
                runs.setdefault(index, []).append(measured | {"seconds": seconds})
                reached = " ".join(
                    f"{one['probes']}: {one['recall']:.3f}/{one['read']:.4f}"
                    for one in measured["lines"]
                )
                print(
                    f"{name}, seed {seed}, {index}: {seconds:.0f} CPU s, NDCG@10 "
                    f"{measured['ndcg']:.4f}; probes: recall/read {reached}",
                    flush=True,
                )
    found = {index: summary(each) for index, each in runs.items()}
    show(name, found)
    return {
        "data": name,
        "items": len(world.prepared.catalogue),
        "users": len(world.targets),
        "clusters": default_clusters(len(world.prepared.catalogue)),
        "arms": found,
        "pulled_at_equal_reading": at_equal_reading(found["joint"], found["pulled"]),
        "plain_at_equal_reading": at_equal_reading(found["joint"], found["plain"]),
    }


def main() -> int:
    """Run the gate, the trainings and the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one seed, short trainings, few films")
    parser.add_argument("--seeds", type=int, default=None, help="seeds per arm")
    parser.add_argument("--steps", type=int, default=None, help="steps of every training")
    parser.add_argument("--only", choices=("generated", "movielens"), help="one data set")
    given = parser.parse_args()
    torch.set_num_threads(1)
    seeds = given.seeds or (1 if given.quick else 3)
    steps = given.steps or (60 if given.quick else TrainingConfig().steps)
    for gate in GATES:
        if not passes(gate):
            print(f"gate {gate} is red: no number is printed", file=sys.stderr)
            return 1
    about = {
        **machine(),
        "benchmark": "joint",
        "threads": 1,
        "steps": steps,
        "seeds": seeds,
        "unix_s": int(time.time()),
    }
    results = _HERE / "results"
    results.mkdir(exist_ok=True)
    file = results / ("".join(c if c.isalnum() else "-" for c in about["cpu"].lower()) + ".jsonl")
    found = []
    for name in [given.only] if given.only else ["movielens", "generated"]:
        measured = run(name, seeds, steps, quick=given.quick)
        if measured is None:
            return 1
        found.append(measured)
        with file.open("a") as log:
            log.write(json.dumps({"machine": about, "joint": measured}) + "\n")
    print(json.dumps({"machine": about, "joint": found}))
    return 0


if __name__ == "__main__":
    sys.exit(main())

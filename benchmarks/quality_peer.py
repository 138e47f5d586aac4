"""Compares our sequence towers with SASRec and HSTU of RecTools on one split of MovieLens.

The peer runs in an environment of its own, which is made below the cache of the benchmarks. Both
sides learn the same interactions, choose their best epoch by the same validation items, know the
validation item when they rank for the test, leave seen items out, and are scored by one function.
The last line is one JSON object.

    python -P benchmarks/quality_peer.py --data FOLDER      # three seeds
    python -P benchmarks/quality_peer.py --quick            # one seed, few epochs

The exit status is 1 if a gate is red (no number is printed then) and 2 if the peer cannot be
installed.

Shapes: U users with held-out items, N items, K ranks.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from silvershard.deploy.config import Config
from silvershard.deploy.recipe import Prepared, prepare
from silvershard.model.quality import (
    hit_rate_at_k,
    ndcg_at_k,
    paired_bootstrap,
    popularity_ranking,
)

if "benchmarks" not in sys.modules:
    # The folder is no package and the root stays off sys.path, where `import model` would work.
    _PACKAGE = types.ModuleType("benchmarks")
    _PACKAGE.__path__ = [str(Path(__file__).resolve().parent)]
    sys.modules["benchmarks"] = _PACKAGE

from benchmarks.mixture import cache_root, progress
from benchmarks.peer_environment import peer_python, run_job, torch_requirement
from benchmarks.quality_ours import histories_of
from benchmarks.quiet import busy_cores
from benchmarks.run import machine

_HERE = Path(__file__).resolve().parent
RUNNER = _HERE / "rectools_runner.py"
OURS = _HERE / "quality_ours.py"
REQUIREMENTS = (
    "rectools[torch]==0.19.0",
    "pytorch-lightning==2.5.2",
    "numpy==1.26.4",
    "pandas==2.3.3",
    "scipy==1.17.1",
)
RANKS = 100
METRIC_K = 10
METRICS = {"hit_rate": hit_rate_at_k, "ndcg": ndcg_at_k}
MARGIN = 0.05
"""How much worse than the peer, relative to it, ours may at most be."""
SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Recipe:
    """How one model is trained."""

    name: str
    settings: Mapping[str, Any]
    epochs: int = 0
    """Most epochs of the peer; ours counts steps in its settings."""
    every: int = 1
    """Epochs between rankings of the validation items."""
    patience: int = 3
    """Rankings without a new best after which training ends."""


# Chosen by the validation items: a rate of 0.003 reached NDCG@10 .043, the default of 0.001 .028.
_PEER = {
    "n_factors": 64,
    "n_heads": 2,
    "n_blocks": 2,
    "session_max_len": 50,
    "batch_size": 32,
    "lr": 0.003,
}
PEERS = (
    Recipe("sasrec", _PEER, epochs=50, every=5, patience=2),
    # A softmax over cosines needs a temperature below the default of 1.
    Recipe(
        "hstu",
        {**_PEER, "lightning_module_kwargs": {"logits_t": 0.05}},
        epochs=50,
        every=5,
        patience=2,
    ),
)
_EVALUATED = {"steps": 300, "evaluate_every": 50}
OURS_RECIPES = (
    Recipe("attention", {**_EVALUATED, "encoder": {"kind": "attention"}}),
    Recipe("hstu", {**_EVALUATED, "encoder": {"kind": "hstu"}}),
)


@dataclass(frozen=True)
class Run:
    """One training, and what its rankings are worth."""

    side: str
    """``ours`` or ``peer``."""
    report: Mapping[str, Any]
    """Seconds, memory and validation."""
    values: Mapping[str, Mapping[str, NDArray[np.float64]]]
    """By ranking and metric, of every user, ``(U,)``."""


@dataclass(frozen=True)
class Outcome:
    """What the trainings of one model with several seeds gave."""

    name: str
    side: str
    """``ours`` or ``peer``."""
    values: Mapping[str, NDArray[np.float64]]
    """Metric of every user, the mean over the seeds, ``(U,)``."""
    by_seed: Mapping[str, Sequence[float]]
    """Mean over the users for each seed."""
    trainings: Sequence[Mapping[str, Any]] = field(default_factory=tuple)
    """Seconds, memory and validation of each training."""

    def as_json(self) -> dict[str, Any]:
        """Return the means with the spread over the seeds, and what training took."""
        means = {
            metric: {
                "mean": round(float(np.mean(values)), 5),
                "by_seed": [round(one, 5) for one in values],
            }
            for metric, values in self.by_seed.items()
        }
        costs = {
            key: round(float(np.mean([one[key] for one in self.trainings])), 1)
            for key in ("seconds", "cpu_s", "start_mib", "peak_mib", "step")
            if self.trainings
        }
        return {"model": self.name, "side": self.side, **means, **costs}


def export_split(prepared: Prepared, path: Path) -> None:
    """Write the interactions that train, validate and test, ids and seconds as they are."""
    data, split = prepared.data, prepared.split
    tested = split.test_rows >= 0
    rows = {"valid": split.valid_rows[tested], "test": split.test_rows[tested]}
    columns = {
        "users": split.user_ids[tested],
        "train_users": data.user_ids[split.train_rows],
        "train_items": data.rated_movie_ids[split.train_rows],
        "train_times": data.timestamps[split.train_rows],
    }
    for part, at in rows.items():
        columns[f"{part}_items"] = data.rated_movie_ids[at]
        columns[f"{part}_times"] = data.timestamps[at]
    np.savez(path, **columns)


class Judge:
    """The users with a held-out item, and what a ranking of theirs must look like."""

    def __init__(self, prepared: Prepared) -> None:
        split = prepared.split
        self.histories = histories_of(prepared)
        self.targets = split.test_item_ids[split.test_rows >= 0]
        self.item_ids = prepared.catalogue.item_ids
        self._popular = popularity_ranking(prepared.popularity.counts, self.item_ids)

    def popular(self) -> NDArray[np.int64]:
        """Return the most popular unseen items of every user, ``(U, RANKS)``."""
        ranked = np.full((len(self.histories), RANKS), -1, dtype=np.int64)
        for user, history in enumerate(self.histories):
            best = self._popular[~np.isin(self._popular, history)][:RANKS]
            ranked[user, : len(best)] = best
        return ranked

    def score(self, ranked: NDArray[np.int64]) -> dict[str, NDArray[np.float64]]:
        """Return each metric of every user, ``(U,)``."""
        return {name: of(ranked, self.targets, METRIC_K) for name, of in METRICS.items()}

    def problems(self, ranked: NDArray[np.int64]) -> list[str]:
        """Return what is wrong with a ranking: its shape, or seen, unknown or repeated items."""
        wanted = (len(self.histories), RANKS)
        if ranked.shape != wanted:
            return [f"the ranking must have shape {wanted}, got {ranked.shape}"]
        found = []
        if not np.isin(ranked[ranked >= 0], self.item_ids).all():
            found.append("a ranking holds an unknown item")
        for row, history in zip(ranked, self.histories, strict=True):
            items = row[row >= 0]
            if np.isin(items, history).any():
                found.append("a ranking holds an item that its user has seen")
            if len(np.unique(items)) < len(items):
                found.append("a ranking holds an item twice")
        return sorted(set(found))


def differing(scored: Mapping[str, float], values: Mapping[str, NDArray[np.float64]]) -> list[str]:
    """Return the metrics whose mean is not the one that the peer computed from the same lists."""
    return [
        f"{name} is {values[name].mean():.9f} here and {scored[name]:.9f} there"
        for name in METRICS
        if abs(float(values[name].mean()) - scored[name]) > 1e-9
    ]


class Red(Exception):
    """A gate is red; the message says which."""


class Contest:
    """Trains both sides and gathers what their rankings are worth."""

    def __init__(self, prepared: Prepared, python: Path, folder: Path) -> None:
        self._judge = Judge(prepared)
        self._data = prepared.source.path
        self._python = python
        self._folder = folder
        self._split = folder / "split.npz"
        export_split(prepared, self._split)

    def check_metrics(self) -> Outcome:
        """Return popularity as both sides score it.

        Raises:
            Red: if they differ.
        """
        ranked = self._judge.popular()
        given = self._folder / "popular.npz"
        np.savez(given, ranked=ranked)
        job = {"split": str(self._split), "k": RANKS, "model": "given", "ranking": str(given)}
        report, rankings = run_job(self._python, RUNNER, job, self._folder)
        values = self._scored(rankings["ranked"], report["scored"], "popularity")
        if not np.array_equal(rankings["ranked"], ranked):
            raise Red("popularity: the peer returned other lists than it was given")
        means = {metric: [float(values[metric].mean())] for metric in METRICS}
        return Outcome("popularity", "both", values, means)

    def train(self, recipe: Recipe, seed: int) -> Run:
        """Return what one training of either side is worth.

        Raises:
            Red: if a gate is red.
        """
        run = self._peer(recipe, seed) if recipe.epochs else self._ours(recipe, seed)
        for name, values in run.values.items():
            found = ", ".join(f"{metric} {one.mean():.4f}" for metric, one in values.items())
            progress(f"{run.side} {name}, seed {seed}: {found}, {run.report['cpu_s']:.0f} CPU s")
        return run

    def _peer(self, recipe: Recipe, seed: int) -> Run:
        job = {
            "split": str(self._split),
            "k": RANKS,
            "model": recipe.name,
            "seed": seed,
            "epochs": recipe.epochs,
            "every": recipe.every,
            "patience": recipe.patience,
            "settings": dict(recipe.settings),
        }
        report, rankings = run_job(self._python, RUNNER, job, self._folder)
        name = f"rectools {recipe.name}"
        values = self._scored(rankings["ranked"], report["scored"], name)
        return Run("peer", report, {name: values})

    def _ours(self, recipe: Recipe, seed: int) -> Run:
        job = {
            "data": self._data,
            "k": RANKS,
            "seed": seed,
            "training": dict(recipe.settings),
        }
        report, rankings = run_job(Path(sys.executable), OURS, job, self._folder)
        values = {
            f"{recipe.name}, {name}": self._scored(ranked, None, f"{recipe.name}, {name}")
            for name, ranked in rankings.items()
        }
        return Run("ours", report, values)

    def _scored(
        self, ranked: NDArray[np.int64], scored: Mapping[str, float] | None, name: str
    ) -> dict[str, NDArray[np.float64]]:
        problems = self._judge.problems(ranked)
        if problems:
            raise Red(f"{name}: {'; '.join(problems)}")
        values = self._judge.score(ranked)
        problems = differing(scored, values) if scored is not None else []
        if problems:
            raise Red(f"{name}: {'; '.join(problems)}")
        return values


def outcomes_of(runs: Sequence[Run]) -> list[Outcome]:
    """Return one outcome for each ranking of the runs of one model."""
    made = []
    for name in runs[0].values:
        values = [run.values[name] for run in runs]
        made.append(
            Outcome(
                name,
                runs[0].side,
                {metric: np.mean([one[metric] for one in values], axis=0) for metric in METRICS},
                {metric: [float(one[metric].mean()) for one in values] for metric in METRICS},
                [run.report for run in runs],
            )
        )
    return made


def compare(ours: Outcome, peer: Outcome) -> dict[str, Any]:
    """Return by how much ours is better, relative to the peer, with 95 % intervals over users.

    ``within`` says that ours is with that confidence not worse by more than ``MARGIN``, ``better``
    that it is better.
    """
    found: dict[str, Any] = {"ours": ours.name, "peer": peer.name}
    for metric in METRICS:
        a, b = ours.values[metric], peer.values[metric]
        mean = float(b.mean())
        lift = paired_bootstrap(a, b)
        found[metric] = {
            "relative": [round(one / mean, 4) if mean else None for one in lift],
            "within": paired_bootstrap(a, (1 - MARGIN) * b).low > 0,
            "better": lift.low > 0,
        }
    return found


def trained(
    contest: Contest, recipes: Sequence[Recipe], *, seeds: Sequence[int], jobs: int
) -> list[Outcome]:
    """Return the outcomes of all models, ``jobs`` trainings at a time.

    Raises:
        Red: if a gate is red.
    """
    with ThreadPoolExecutor(jobs) as pool:
        # One seed after the other, so that what is printed on the way compares.
        started = [[pool.submit(contest.train, one, seed) for one in recipes] for seed in seeds]
        try:
            runs = [[one.result() for one in row] for row in started]
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    return [one for of_recipe in zip(*runs, strict=True) for one in outcomes_of(of_recipe)]


def quick(recipe: Recipe) -> Recipe:
    """Return the recipe with few epochs or steps."""
    if recipe.epochs:
        return Recipe(recipe.name, recipe.settings, recipe.every, recipe.every)
    return Recipe(recipe.name, {**recipe.settings, "steps": 50, "ranker_steps": 20})


def show(outcomes: Sequence[Outcome], comparisons: Sequence[Mapping[str, Any]]) -> None:
    """Print both tables."""
    print(f"{'model':<32} {'HitRate@10':>10} {'NDCG@10':>8} {'wall s':>7} {'CPU s':>6} {'MiB':>6}")
    for one in outcomes:
        shown = one.as_json()
        costs = [f"{shown.get(key, 0):.0f}" for key in ("seconds", "cpu_s", "peak_mib")]
        print(
            f"{shown['side'] + ' ' + shown['model']:<32} {shown['hit_rate']['mean']:>10.4f} "
            f"{shown['ndcg']['mean']:>8.4f} {costs[0]:>7} {costs[1]:>6} {costs[2]:>6}"
        )
    for pair in comparisons:
        for metric in METRICS:
            mean, low, high = (one or 0.0 for one in pair[metric]["relative"])
            verdict = "within the margin" if pair[metric]["within"] else "not shown to be within"
            print(
                f"{pair['ours']:<20} over {pair['peer']:<16} {metric:<9} {mean:>+7.1%} "
                f"[{low:+.1%}, {high:+.1%}] {verdict}"
            )


def main() -> int:
    """Run the gates, the trainings and the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one seed and few epochs")
    parser.add_argument("--data", type=Path, help="MovieLens folder; else as the demo finds it")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS), help="of training")
    parser.add_argument("--jobs", type=int, default=1, help="trainings at a time, a thread each")
    given = parser.parse_args()
    seeds = given.seeds[:1] if given.quick else given.seeds
    try:
        python = peer_python(cache_root() / "peers", (*REQUIREMENTS, torch_requirement()))
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"the peer cannot be installed: {error}", file=sys.stderr)
        return 2
    began_s = time.perf_counter()
    prepared = prepare(Config(), data=given.data)
    if prepared.source.generated:
        print("MovieLens is needed: name its folder with --data", file=sys.stderr)
        return 2
    peers = [quick(one) if given.quick else one for one in PEERS]
    own = [quick(one) if given.quick else one for one in OURS_RECIPES]
    about = {
        **machine(),
        "benchmark": "quality_peer",
        "quick": given.quick,
        "requirements": [*REQUIREMENTS, torch_requirement()],
        "seeds": seeds,
        "jobs": given.jobs,
        "users": prepared.data.num_users,
        "items": len(prepared.catalogue),
        "interactions": len(prepared.data.ratings),
        "recipes": {
            "peer": {one.name: {**one.settings, "epochs": one.epochs} for one in peers},
            "ours": {one.name: one.settings for one in own},
        },
        "busy_cores": round(busy_cores(), 2),
        "unix_s": int(time.time()),
    }
    with tempfile.TemporaryDirectory() as folder:
        contest = Contest(prepared, python, Path(folder))
        try:
            popular = contest.check_metrics()
            found = trained(contest, [*peers, *own], seeds=seeds, jobs=given.jobs)
        except Red as error:
            print(f"gate is red: {error}", file=sys.stderr)
            return 1
    outcomes = [popular, *found]
    comparisons = [
        compare(one, other)
        for one in found
        for other in found
        if (one.side, other.side) == ("ours", "peer")
    ]
    show(outcomes, comparisons)
    report = {
        "machine": {**about, "seconds": round(time.perf_counter() - began_s)},
        "outcomes": [one.as_json() for one in outcomes],
        "comparisons": comparisons,
    }
    results = _HERE / "results"
    results.mkdir(exist_ok=True)
    name = "".join(one if one.isalnum() else "-" for one in about["cpu"].lower())
    with (results / f"{name}.jsonl").open("a") as file:
        file.write(json.dumps(report) + "\n")
    print(json.dumps(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())

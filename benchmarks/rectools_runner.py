"""Trains one model of RecTools and writes its best items of every user; runs in the peer's venv.

It knows nothing of the rest of the project: ``quality_peer.py`` writes the job and the split, and
reads the ranking and the JSON line. Every few epochs the validation items are ranked; the weights
of the best of those moments answer for the test.

    python rectools_runner.py JOB.json

A job names ``split`` (of ``quality_peer.export_split``), ``out`` (npz that gets ``ranked``), ``k``,
``model`` (``sasrec``, ``hstu``, or ``given``, which scores the ``ranked`` of ``ranking``) and, for
a model to train, ``seed``, ``epochs``, ``every``, ``patience`` and ``settings``.

Shapes: M interactions, U users with held-out items, K ranks.
"""

import copy
import json
import logging
import resource
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytorch_lightning
import torch
from numpy.typing import NDArray
from rectools import Columns
from rectools.dataset import Dataset
from rectools.metrics import NDCG, HitRate, calc_metrics
from rectools.models import HSTUModel, SASRecModel

MODELS = {"sasrec": SASRecModel, "hstu": HSTUModel}
METRIC_K = 10


class Split:
    """The interactions of the job as RecTools takes them."""

    def __init__(self, path: str) -> None:
        with np.load(path) as arrays:
            columns = {name: arrays[name] for name in arrays.files}
        self.users = columns["users"]
        self.train = self._frame(columns["train_users"], columns, "train")
        self.valid = self._frame(self.users, columns, "valid")
        self.test = self._frame(self.users, columns, "test")

    @staticmethod
    def _frame(
        users: NDArray[np.int64], columns: dict[str, NDArray[np.int64]], part: str
    ) -> pd.DataFrame:
        return pd.DataFrame(
            {
                Columns.User: users,
                Columns.Item: columns[f"{part}_items"],
                Columns.Weight: 1.0,
                Columns.Datetime: pd.to_datetime(columns[f"{part}_times"], unit="s"),
            }
        )


def recommend(model: Any, known: pd.DataFrame, wanted: pd.DataFrame, k: int) -> pd.DataFrame:
    """Return the recommendations to the users of ``wanted``, what they have seen left out."""
    context = wanted.copy() if model.require_recommend_context else None
    return model.recommend(
        wanted[Columns.User].to_numpy(),
        Dataset.construct(known),
        k=k,
        filter_viewed=True,
        context=context,
    )


def score(recommended: pd.DataFrame, wanted: pd.DataFrame) -> dict[str, float]:
    """Return the means over the users of ``wanted`` as RecTools computes them."""
    metrics = {
        "hit_rate": HitRate(k=METRIC_K),
        "ndcg": NDCG(k=METRIC_K, divide_by_achievable=True),
    }
    return {
        name: float(value)
        for name, value in calc_metrics(metrics, reco=recommended, interactions=wanted).items()
    }


def ranking_of(recommended: pd.DataFrame, users: NDArray[np.int64], k: int) -> NDArray[np.int64]:
    """Return item ids best first, ``(U, K)`` int64, -1 where there is none."""
    row = pd.Series(np.arange(len(users)), index=users)
    ranked = np.full((len(users), k), -1, dtype=np.int64)
    at = recommended[Columns.User].map(row).to_numpy()
    ranked[at, recommended[Columns.Rank].to_numpy() - 1] = recommended[Columns.Item].to_numpy()
    return ranked


def frame_of(ranked: NDArray[np.int64], users: NDArray[np.int64]) -> pd.DataFrame:
    """Return a ranking ``(U, K)`` as RecTools has recommendations."""
    row, rank = np.nonzero(ranked >= 0)
    return pd.DataFrame(
        {Columns.User: users[row], Columns.Item: ranked[row, rank], Columns.Rank: rank + 1}
    )


def fit(job: dict[str, Any], split: Split) -> tuple[Any, dict[str, Any]]:
    """Return the model as it ranked the validation items best, and how its training went."""
    model = MODELS[job["model"]](epochs=1, verbose=0, **job["settings"])
    train = Dataset.construct(split.train)
    best, best_epoch, kept, curve = -1.0, 0, None, []
    for epoch in range(job["every"], job["epochs"] + 1, job["every"]):
        model.fit_partial(train, job["every"], job["every"])
        found = score(recommend(model, split.train, split.valid, METRIC_K), split.valid)
        curve.append([epoch, round(found["ndcg"], 5), round(found["hit_rate"], 5)])
        if found["ndcg"] > best:
            best, best_epoch = found["ndcg"], epoch
            kept = copy.deepcopy(model.torch_model.state_dict())
        elif epoch - best_epoch >= job["patience"] * job["every"]:
            break
    model.torch_model.load_state_dict(kept)
    return model, {"validation_ndcg": best, "step": best_epoch, "curve": curve}


def peak_mib() -> float:
    """Return the most memory that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    """Run the job that the command line names."""
    warnings.simplefilter("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    job = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(1)
    split = Split(job["split"])
    report: dict[str, Any] = {}
    if job["model"] == "given":
        with np.load(job["ranking"]) as arrays:
            ranked = arrays["ranked"]
        recommended = frame_of(ranked, split.users)
    else:
        pytorch_lightning.seed_everything(job["seed"], verbose=False)
        start_mib, began_s, began_cpu_s = peak_mib(), time.perf_counter(), time.process_time()
        model, report = fit(job, split)
        report |= {
            "seconds": time.perf_counter() - began_s,
            "cpu_s": time.process_time() - began_cpu_s,
            "start_mib": start_mib,
            "peak_mib": peak_mib(),
        }
        known = pd.concat([split.train, split.valid])
        recommended = recommend(model, known, split.test, job["k"])
        ranked = ranking_of(recommended, split.users, job["k"])
    np.savez(job["out"], ranked=ranked)
    print(json.dumps(report | {"scored": score(recommended, split.test)}))


if __name__ == "__main__":
    main()

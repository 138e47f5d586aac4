"""Trains one of our models and writes its best items of every user, as ``rectools_runner.py`` does.

Two rankings come of one training: the towers alone, every item scored exactly in float32 and
ranked by its best head, and the pipeline as served: index, reranker and value.

    python -P benchmarks/quality_ours.py JOB.json

A job names ``data`` (empty: as the demo finds it), ``out`` (npz that gets ``towers`` and
``served``), ``k``, ``seed`` and ``training``, the settings that are not the defaults.

Shapes: U users with held-out items, N items, K ranks.
"""

import json
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from silvershard.deploy.config import Config
from silvershard.deploy.recipe import Prepared, load_model, prepare, publish, train_model
from silvershard.deploy.state import StateDir
from silvershard.model.request import Request
from silvershard.model.retriever import Retriever
from silvershard.shard.load import load_retriever

_BATCH = 64


def silent(_: str) -> None:
    """Say nothing."""


def histories_of(prepared: Prepared) -> list[list[int]]:
    """Return what is known of each user with a held-out item, oldest first."""
    split = prepared.split
    tested = np.flatnonzero(split.test_rows >= 0)
    return [split.test_histories.row(int(row)).tolist() for row in tested]


def towers_alone(
    retriever: Retriever, prepared: Prepared, histories: list[list[int]], k: int
) -> NDArray[np.int64]:
    """Return the unseen items with the largest product with any head, ``(U, K)``."""
    model: Any = retriever.model
    ids = prepared.catalogue.item_ids
    limit = retriever.spec.item_schema.user_features[0].max_length
    with torch.inference_mode():
        items = model.embed_items(dict(prepared.catalogue.features))  # (N, D)
        queries = torch.cat(
            [
                retriever.encode([{"history": one[-limit:]} for one in part]).embedding
                for part in _parts(histories)
            ]
        )  # (U, H, D)
    ranked = np.full((len(queries), k), -1, dtype=np.int64)
    for user, history in enumerate(histories):
        scores = (items @ queries[user].T).amax(1).numpy()  # (N,)
        order = ids[np.lexsort((ids, -scores))]
        best = order[~np.isin(order, history)][:k]
        ranked[user, : len(best)] = best
    return ranked


def served(retriever: Retriever, histories: list[list[int]], k: int) -> NDArray[np.int64]:
    """Return the answers of the whole pipeline, seen items excluded, ``(U, K)``."""
    limit = retriever.spec.item_schema.user_features[0].max_length
    ranked = np.full((len(histories), k), -1, dtype=np.int64)
    answers = [
        answer
        for part in _parts(histories)
        for answer in retriever(
            [
                Request(features={"history": one[-limit:]}, k=k, exclude_ids=tuple(one))
                for one in part
            ]
        )
    ]
    for user, answer in enumerate(answers):
        ranked[user, : len(answer.item_ids)] = answer.item_ids.numpy()
    return ranked


def _parts(histories: list[list[int]]) -> list[list[list[int]]]:
    return [histories[at : at + _BATCH] for at in range(0, len(histories), _BATCH)]


def peak_mib() -> float:
    """Return the most memory that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    """Run the job that the command line names."""
    job = json.loads(Path(sys.argv[1]).read_text())
    config = Config.model_validate({"model": {"seed": job["seed"]}, "training": job["training"]})
    prepared = prepare(config, data=Path(job["data"]) if job["data"] else None, report=silent)
    histories = histories_of(prepared)
    with tempfile.TemporaryDirectory() as folder:
        state = StateDir(Path(folder))
        state.create()
        start_mib, began_s, began_cpu_s = peak_mib(), time.perf_counter(), time.process_time()
        trained = train_model(state, config, prepared, progress=False)
        report = {
            "seconds": time.perf_counter() - began_s,
            "cpu_s": time.process_time() - began_cpu_s,
            "start_mib": start_mib,
            "peak_mib": peak_mib(),
            "validation_ndcg": {"towers": trained.tower_ndcg, "served": trained.ranker_ndcg},
            "step": trained.tower_step,
        }
        published = publish(state, config, prepared, load_model(state.model_dir))
        retriever, _ = load_retriever(published.path)
        np.savez(
            job["out"],
            towers=towers_alone(retriever, prepared, histories, job["k"]),
            served=served(retriever, histories, job["k"]),
        )
    print(json.dumps(report))


if __name__ == "__main__":
    main()

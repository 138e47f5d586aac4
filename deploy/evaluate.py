"""How good a generation is, through the cluster on held-out interactions and beside exact search.

One split everywhere: each user's last interaction is held out, the one before it validates.

Shapes: U users with a held-out item, N items, H heads, K ranks.
"""

import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from silvershard.cluster import Client, Query, Result
from silvershard.deploy.errors import CommandError
from silvershard.deploy.recipe import Prepared
from silvershard.model.audit import IndexAudit
from silvershard.model.quality import (
    Interval,
    hit_rate_at_k,
    ndcg_at_k,
    overlap_at_k,
    paired_bootstrap,
    popularity_ranking,
    recall_at_k,
)
from silvershard.model.retriever import Retriever
from silvershard.shard.load import load_retriever

SHORT, LONG, DEEP = 10, 100, 1000
_BATCH = 64
_ENCODE_BATCH = 256
_AUDITED_USERS = 100
"""Users whose scan is compared with exact search at depth 1000; all of them would take a minute."""


class Row(NamedTuple):
    """One line of the quality table, per user ``(U,)``."""

    name: str
    hit_rate: NDArray[np.float64]
    ndcg: NDArray[np.float64]
    recall: NDArray[np.float64]


class Served(NamedTuple):
    """What the cluster answered for every user."""

    item_ids: NDArray[np.int64]
    """``(U, LONG)``, -1 where there is none."""
    timings_us: dict[str, int]
    """Median of each stage over the requests, which ran in batches."""
    coverage: float
    """The smallest of all answers."""
    plan: str


class IndexQuality(NamedTuple):
    """The index against exact float32 search over the same embeddings."""

    recall_deep: float
    """Recall@1000 of scan + refine against exact search on the same probes."""
    recall_long: float
    """The same at 100."""
    overlap: float
    """Share of the brute-force top 10 that scan + refine has in its own, per head."""
    shared_overlap: float
    """The same where all heads together probe at most an eighth of the clusters."""
    depth: int
    """1000, or the number of items where there are fewer."""
    probes: int
    """Clusters per head."""
    shared_probes: int
    clusters: int


class Evaluation(NamedTuple):
    """Everything that the quality table shows."""

    rows: tuple[Row, ...]
    lift_hit_rate: Interval
    """Of the cluster over popularity, 95 %."""
    lift_ndcg: Interval
    index_quality: IndexQuality
    served: Served
    users: int


class Tested(NamedTuple):
    """The users with a held-out item."""

    histories: list[list[int]]
    """Everything before the held-out item, oldest first."""
    held_out: NDArray[np.int64]
    """``(U,)`` item ids."""


def tested_users(prepared: Prepared) -> Tested:
    """Return the users that have a held-out item."""
    split = prepared.split
    rows = np.flatnonzero(split.test_rows >= 0)
    return Tested(
        [split.test_histories.row(int(row)).tolist() for row in rows], split.test_item_ids[rows]
    )


def evaluate(
    prepared: Prepared, snapshot: Path, address: str, *, max_requests: int = _BATCH
) -> Evaluation:
    """Measure a generation through the cluster that serves it, and beside it.

    Args:
        prepared: the data set that it was trained on.
        snapshot: directory of the generation.
        address: of the router.
        max_requests: most requests in one call that the router accepts.

    Raises:
        CommandError: if the cluster refuses a request.
    """
    batch = min(max_requests, _BATCH)
    users = tested_users(prepared)
    retriever, _ = load_retriever(snapshot)
    items = _embed(retriever, prepared)
    queries = _encode(retriever, users)
    served = serve(address, users, "asking the cluster", batch=batch)
    everything = serve(
        address,
        users,
        "asking every cluster of the index",
        batch=batch,
        nprobe=retriever.spec.num_clusters,
    )
    popular = _popular(prepared, users)
    exact = _brute_force(items, queries, prepared.catalogue.item_ids, users)
    rows = tuple(
        _row(name, ranked, users.held_out)
        for name, ranked in (
            ("popularity", popular),
            ("brute force fp32, no reranker", exact),
            ("silvershard, all clusters", everything.item_ids),
            ("silvershard", served.item_ids),
        )
    )
    return Evaluation(
        rows=rows,
        lift_hit_rate=paired_bootstrap(rows[-1].hit_rate, rows[0].hit_rate),
        lift_ndcg=paired_bootstrap(rows[-1].ndcg, rows[0].ndcg),
        index_quality=audit(retriever, prepared, items, queries),
        served=served,
        users=len(users.held_out),
    )


def _row(name: str, ranked: NDArray[np.int64], held_out: NDArray[np.int64]) -> Row:
    return Row(
        name,
        hit_rate_at_k(ranked, held_out, SHORT),
        ndcg_at_k(ranked, held_out, SHORT),
        recall_at_k(ranked, held_out, LONG),
    )


def _bar(total: int, title: str) -> "tqdm[Any]":
    return tqdm(total=total, desc=title, delay=2, leave=False)


def serve(
    address: str, users: Tested, title: str, *, batch: int = _BATCH, nprobe: int = 0
) -> Served:
    """Ask the cluster for every user's best items, seen ones excluded, ``batch`` users a call."""
    ranked = np.full((len(users.histories), LONG), -1, dtype=np.int64)
    answers: list[Result] = []
    with Client(address, timeout_s=30.0) as client, _bar(len(ranked), title) as bar:
        for start in range(0, len(ranked), batch):
            histories = users.histories[start : start + batch]
            queries = [
                Query(
                    features={"history": history},
                    k=LONG,
                    exclude_ids=history,
                    nprobe=nprobe,
                    return_task_scores=False,
                )
                for history in histories
            ]
            for at, answer in enumerate(client.retrieve_batch(queries), start=start):
                if not isinstance(answer, Result):
                    raise CommandError(f"the cluster refused a request of the evaluation: {answer}")
                ranked[at, : len(answer.item_ids)] = answer.item_ids
                answers.append(answer)
            bar.update(len(histories))
    stages = sorted({stage for answer in answers for stage in answer.timings_us})
    return Served(
        item_ids=ranked,
        timings_us={
            stage: int(statistics.median(one.timings_us.get(stage, 0) for one in answers))
            for stage in stages
        },
        coverage=min((one.coverage.documents for one in answers), default=1.0),
        plan=statistics.mode(one.plan for one in answers) if answers else "",
    )


def _embed(retriever: Retriever, prepared: Prepared) -> Tensor:
    """Return the float32 embeddings of all items, ``(N, D)``, in catalogue order."""
    model: Any = retriever.model
    with torch.inference_mode():
        embeddings: Tensor = model.embed_items(dict(prepared.catalogue.features)).clone()
    return embeddings


def _encode(retriever: Retriever, users: Tested) -> Tensor:
    """Return the query embeddings of all users, ``(U, H, D)``."""
    limit = retriever.spec.item_schema.user_features[0].max_length
    features = [{"history": history[-limit:]} for history in users.histories]
    return torch.cat(
        [
            retriever.encode(features[start : start + _ENCODE_BATCH]).embedding
            for start in range(0, len(features), _ENCODE_BATCH)
        ]
    )


def _popular(prepared: Prepared, users: Tested) -> NDArray[np.int64]:
    """Return the most popular unseen items of every user, ``(U, LONG)``."""
    order = popularity_ranking(prepared.popularity.counts, prepared.catalogue.item_ids)
    return _first_unseen(lambda _: order, users)


def _brute_force(
    items: Tensor, queries: Tensor, item_ids: NDArray[np.int64], users: Tested
) -> NDArray[np.int64]:
    """Return the unseen items with the largest product with any head, ``(U, LONG)``."""

    def ranking(user: int) -> NDArray[np.int64]:
        scores = (items @ queries[user].T).amax(1).numpy()  # (N,)
        return item_ids[np.lexsort((item_ids, -scores))]

    return _first_unseen(ranking, users)


def _first_unseen(ranking: Any, users: Tested) -> NDArray[np.int64]:
    ranked = np.full((len(users.histories), LONG), -1, dtype=np.int64)
    for user, history in enumerate(users.histories):
        candidates = ranking(user)[: LONG + len(history)]
        unseen = candidates[~np.isin(candidates, history)][:LONG]
        ranked[user, : len(unseen)] = unseen
    return ranked


def audit(retriever: Retriever, prepared: Prepared, items: Tensor, queries: Tensor) -> IndexQuality:
    """Compare scan + refine with exact search over the same float32 embeddings."""
    spec = retriever.spec
    probes, ann_k = spec.defaults.probes, spec.defaults.ann_k
    depth = min(DEEP, spec.documents)
    checker = IndexAudit(retriever, torch.from_numpy(prepared.catalogue.item_ids), items)
    shared_probes = max(spec.num_clusters // (8 * queries.shape[1]), 1)
    overlaps: list[NDArray[np.float64]] = []
    shared: list[NDArray[np.float64]] = []
    deep: list[NDArray[np.float64]] = []
    long: list[NDArray[np.float64]] = []
    audited = _spread(len(queries), _AUDITED_USERS)
    with _bar(len(queries) + len(audited), "comparing the index with exact search") as bar:
        for rows in _slices(range(len(queries)), _BATCH):
            some = queries[rows]
            exact = checker.exact(some, SHORT)
            overlaps.append(_overlap(checker.indexed(some, probes, ann_k, SHORT), exact))
            shared.append(_overlap(checker.indexed(some, shared_probes, ann_k, SHORT), exact))
            bar.update(len(rows))
        for rows in _slices(audited, 10):
            some = queries[rows]
            for depths, width in ((deep, depth), (long, min(LONG, depth))):
                # Refine needs clearly more candidates than are wanted: 1.5 times as many.
                found = checker.indexed(some, probes, width * 3 // 2, width)
                depths.append(_overlap(found, checker.exact_in_probes(some, probes, width)))
            bar.update(len(rows))
    return IndexQuality(
        recall_deep=float(np.concatenate(deep).mean()),
        recall_long=float(np.concatenate(long).mean()),
        overlap=float(np.concatenate(overlaps).mean()),
        shared_overlap=float(np.concatenate(shared).mean()),
        depth=depth,
        probes=probes,
        shared_probes=shared_probes,
        clusters=spec.num_clusters,
    )


def _spread(count: int, wanted: int) -> list[int]:
    """Return at most ``wanted`` of ``count`` rows, evenly spread."""
    return (
        sorted({at * count // wanted for at in range(wanted)})
        if count > wanted
        else list(range(count))
    )


def _slices(rows: Sequence[int], size: int) -> Iterator[list[int]]:
    for start in range(0, len(rows), size):
        yield list(rows[start : start + size])


def _overlap(found: Tensor, wanted: Tensor) -> NDArray[np.float64]:
    """Return the share of ``wanted`` that was found, per user and head, ``(B * H,)``."""
    width = wanted.shape[-1]
    return overlap_at_k(found.flatten(0, 1).numpy(), wanted.flatten(0, 1).numpy(), width)


def quality_document(evaluation: Evaluation) -> dict[str, Any]:
    """Return an evaluation as JSON values."""
    index = evaluation.index_quality
    return {
        "users": evaluation.users,
        "table": {
            row.name: {
                "hit_rate_at_10": round(float(row.hit_rate.mean()), 6),
                "ndcg_at_10": round(float(row.ndcg.mean()), 6),
                "recall_at_100": round(float(row.recall.mean()), 6),
            }
            for row in evaluation.rows
        },
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


def _interval(interval: Interval) -> dict[str, float]:
    return {name: round(value, 6) for name, value in interval._asdict().items()}

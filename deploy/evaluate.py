"""How good a generation is, through the cluster on held-out interactions and beside exact search.

Shapes: U users with held-out items, N items, H heads, K ranks.
"""

import functools
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from silvershard.cluster import Client, DegradeMode, DegradePolicy, Query, Result
from silvershard.cluster.dialer import PLAIN, Dialer
from silvershard.deploy.errors import CommandError
from silvershard.deploy.movielens_users import before
from silvershard.deploy.recipe import Prepared, user_features
from silvershard.model.audit import IndexAudit
from silvershard.model.quality import (
    Interval,
    coverage_at_k,
    hit_rate_at_k,
    ndcg_at_k,
    overlap_at_k,
    paired_bootstrap,
    popularity_ranking,
    recall_at_k,
)
from silvershard.model.request import FeatureValues
from silvershard.model.retriever import Retriever
from silvershard.shard.load import load_retriever

SHORT, LONG, DEEP = 10, 100, 1000
DEPTHS = (SHORT, 20, LONG)
"""Ranks that the metrics are of."""
_BATCH = 64
_ENCODE_BATCH = 256
_AUDITED_USERS = 100
"""Users whose scan is compared with exact search at depth 1000; all of them would take a minute."""


class Row(NamedTuple):
    """One line of a quality table; metrics by ``k`` of ``DEPTHS``, per user ``(U,)``."""

    name: str
    hit_rate: dict[int, NDArray[np.float64]]
    ndcg: dict[int, NDArray[np.float64]]
    recall: dict[int, NDArray[np.float64]]
    coverage: dict[int, float]
    """Share of the catalogue that any user is shown."""

    @property
    def users(self) -> int:
        """Return U."""
        return len(self.hit_rate[SHORT])


class TaskRows(NamedTuple):
    """How well the held-out items that are positive for a head or task are found."""

    task: str
    rows: tuple[Row, ...]
    """By the head alone, by the task's score alone and by the served value, where there are."""


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
    """Everything that the quality tables show."""

    rows: tuple[Row, ...]
    tasks: tuple[TaskRows, ...]
    cold: tuple[Row, ...]
    """Popularity and the cluster for users without a history; empty where there are none."""
    lift_hit_rate: Interval
    """Of the cluster over popularity at 10, 95 %."""
    lift_ndcg: Interval
    index_quality: IndexQuality
    served: Served
    users: int
    held_out: int
    """Interactions of these users."""
    split: str
    """What was held out, in words."""


class Tested(NamedTuple):
    """Users with held-out items."""

    features: list[dict[str, FeatureValues]]
    """What a request says of each user."""
    histories: list[list[int]]
    """Everything before the held-out items, oldest first."""
    held_out: list[list[int]]
    """Item ids of each user, oldest first; at least one."""
    ratings: list[list[float]]
    """Of these items."""

    def positive(self, least: float) -> tuple[NDArray[np.int64], list[list[int]]]:
        """Return the users with held-out items rated ``least`` or more, and those items."""
        kept = [
            [item for item, rating in zip(*one, strict=True) if rating >= least]
            for one in zip(self.held_out, self.ratings, strict=True)
        ]
        users = [at for at, items in enumerate(kept) if items]
        return np.array(users, dtype=np.int64), [kept[at] for at in users]


def tested_users(prepared: Prepared) -> Tested:
    """Return the users that have a history and held-out items."""
    return _users(prepared, prepared.split.test_rows >= 0)


def cold_users(prepared: Prepared) -> Tested:
    """Return the users that have held-out items alone."""
    return _users(prepared, prepared.split.cold)


def _users(prepared: Prepared, chosen: NDArray[np.bool_]) -> Tested:
    split, data = prepared.split, prepared.data
    rows = np.flatnonzero(chosen)
    sets = [split.test_sets.row(int(row)) for row in rows]
    histories = [split.test_histories.row(int(row)).tolist() for row in rows]
    first = np.array([one[0] for one in sets], dtype=np.int64)
    further = user_features(prepared, before(data, first))
    return Tested(
        features=[
            {"history": history, **others}
            for history, others in zip(histories, further, strict=True)
        ],
        histories=histories,
        held_out=[data.rated_movie_ids[one].tolist() for one in sets],
        ratings=[data.ratings[one].tolist() for one in sets],
    )


def evaluate(
    prepared: Prepared,
    snapshot: Path,
    address: str,
    *,
    max_requests: int = _BATCH,
    min_rating: Mapping[str, float] | None = None,
    dialer: Dialer = PLAIN,
) -> Evaluation:
    """Measure a generation through the cluster that serves it, and beside it.

    Args:
        prepared: the data set that it was trained on, in the same split.
        snapshot: directory of the generation.
        address: of the router.
        max_requests: most requests in one call that the router accepts.
        min_rating: least rating of a positive by head or task, as in training; all where none.
        dialer: opens the channel to it.

    Raises:
        CommandError: if the cluster refuses a request, or no user has held-out items.
    """
    batch = min(max_requests, _BATCH)
    users = tested_users(prepared)
    if not users.histories:
        raise CommandError(f"no user is tested, {prepared.split.summary}")
    retriever, _ = load_retriever(snapshot)
    items = _embed(retriever, prepared)
    queries = _encode(retriever, users)
    asked = functools.partial(serve, address, batch=batch, dialer=dialer)
    served = asked(users, "asking the cluster")
    everything = asked(
        users, "asking every cluster of the index", nprobe=retriever.spec.num_clusters
    )
    item_ids = prepared.catalogue.item_ids
    row = _Judge(len(item_ids))
    rows = tuple(
        row(name, ranked, users.held_out)
        for name, ranked in (
            ("popularity", _popular(prepared, users)),
            ("brute force fp32, no reranker", _brute_force(items, queries, item_ids, users)),
            ("silvershard, all clusters", everything.item_ids),
            ("silvershard", served.item_ids),
        )
    )
    schema = retriever.spec.item_schema
    orders: dict[str, list[tuple[str, NDArray[np.int64]]]] = {}
    for at, head in enumerate(schema.heads):
        alone = _brute_force(items, queries[:, at : at + 1], item_ids, users)
        orders.setdefault(head, []).append(("head alone, brute force", alone))
    for task in schema.tasks if schema.allow_value else ():
        alone = asked(users, f"asking for {task}", value=task).item_ids
        orders.setdefault(task, []).append(("task alone", alone))
    tasks = []
    for task, ranked in orders.items():
        who, wanted = users.positive((min_rating or {}).get(task, -np.inf))
        judged = [
            row(name, one[who], wanted) for name, one in (*ranked, ("value", served.item_ids))
        ]
        tasks.append(TaskRows(task, tuple(judged)))
    return Evaluation(
        rows=rows,
        tasks=tuple(tasks),
        cold=_cold(prepared, asked, row),
        lift_hit_rate=paired_bootstrap(rows[-1].hit_rate[SHORT], rows[0].hit_rate[SHORT]),
        lift_ndcg=paired_bootstrap(rows[-1].ndcg[SHORT], rows[0].ndcg[SHORT]),
        index_quality=audit(retriever, prepared, items, queries),
        served=served,
        users=len(users.held_out),
        held_out=sum(map(len, users.held_out)),
        split=prepared.split.summary,
    )


class _Judge:
    """Makes the rows of a catalogue of N items."""

    def __init__(self, num_items: int) -> None:
        self._num_items = num_items

    def __call__(self, name: str, ranked: NDArray[np.int64], held_out: list[list[int]]) -> Row:
        return Row(
            name,
            {k: hit_rate_at_k(ranked, held_out, k) for k in DEPTHS},
            {k: ndcg_at_k(ranked, held_out, k) for k in DEPTHS},
            {k: recall_at_k(ranked, held_out, k) for k in DEPTHS},
            {k: coverage_at_k(ranked, self._num_items, k) for k in DEPTHS},
        )


def _cold(prepared: Prepared, asked: Callable[..., Served], row: _Judge) -> tuple[Row, ...]:
    """Return how users without a history are served, beside popularity."""
    users = cold_users(prepared)
    if not users.histories:
        return ()
    served = asked(users, "asking for new users").item_ids
    return (
        row("popularity", _popular(prepared, users), users.held_out),
        row("silvershard", served, users.held_out),
    )


def _bar(total: int, title: str) -> "tqdm[Any]":
    return tqdm(total=total, desc=title, delay=2, leave=False)


def serve(
    address: str,
    users: Tested,
    title: str,
    *,
    batch: int = _BATCH,
    nprobe: int = 0,
    value: str = "",
    dialer: Dialer = PLAIN,
) -> Served:
    """Ask the cluster for every user's best items, seen ones excluded, ``batch`` users a call.

    Raises:
        CommandError: if the cluster refuses a request.
    """
    ranked = np.full((len(users.histories), LONG), -1, dtype=np.int64)
    answers: list[Result] = []
    with Client(address, timeout_s=30.0, dialer=dialer) as client, _bar(len(ranked), title) as bar:
        for start in range(0, len(ranked), batch):
            some = slice(start, start + batch)
            queries = [
                Query(
                    features=features,
                    k=LONG,
                    exclude_ids=history,
                    nprobe=nprobe,
                    value=value,
                    return_task_scores=False,
                    degrade=DegradePolicy(DegradeMode.NEVER),
                )
                for features, history in zip(
                    users.features[some], users.histories[some], strict=True
                )
            ]
            for at, answer in enumerate(client.retrieve_batch(queries), start=start):
                if not isinstance(answer, Result):
                    raise CommandError(f"the cluster refused a request of the evaluation: {answer}")
                ranked[at, : len(answer.item_ids)] = answer.item_ids
                answers.append(answer)
            bar.update(len(queries))
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
    features = [retriever.spec.item_schema.check_features(one) for one in users.features]
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


def _first_unseen(ranking: Callable[[int], NDArray[np.int64]], users: Tested) -> NDArray[np.int64]:
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

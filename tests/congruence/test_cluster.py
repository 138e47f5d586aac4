"""The same answers over gRPC from clusters of any number of shards as from the module itself."""

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import grpc
import numpy as np
import pytest

from silvershard.cluster.client import Client, Query, Result
from silvershard.model.answer import Answer
from silvershard.model.request import Request
from silvershard.shard.load import load_retriever

RequestMaker = Callable[..., list[Request]]
Cluster = Callable[..., AbstractContextManager[Client]]


def query_of(request: Request) -> Query:
    return Query(**request.__dict__)


def assert_same(got: object, wanted: Answer, label: object) -> None:
    assert isinstance(got, Result), (label, got)
    assert got.plan == str(wanted.plan), label
    assert got.item_ids.tolist() == wanted.item_ids.tolist(), label
    assert got.scores.tobytes() == wanted.scores.numpy().tobytes(), label
    assert got.exhausted == wanted.exhausted, label
    assert got.generation == 1
    assert got.coverage.documents == 1.0
    assert not got.is_partial
    assert got.warnings == wanted.warnings, label
    for task, scores in wanted.task_scores.items():
        assert got.task_scores[task].tobytes() == scores.numpy().tobytes(), (label, task)
    counts = wanted.counts
    assert got.counts.addressed == counts.addressed
    assert got.counts.probed == counts.probed, label
    assert got.counts.ann_kept == counts.ann_kept, label
    assert got.counts.reranked == counts.reranked, label


@pytest.fixture(scope="module")
def requests(generation, request_maker: RequestMaker) -> list[Request]:
    return request_maker(generation, 120, seed=21)


@pytest.fixture(scope="module")
def expected(generation, requests: list[Request]) -> list[Answer]:
    whole = load_retriever(generation.path)[0]
    return [whole([request])[0] for request in requests]


@pytest.mark.parametrize(
    ("num_shards", "devices"),
    [(1, ("cpu",)), (2, ("cpu",)), (3, ("cpu",)), (7, ("cpu",)), (1, ("cpu", "cpu"))],
)
def test_every_cluster_gives_the_bytes_of_the_module(
    generation,
    requests: list[Request],
    expected: list[Answer],
    cluster: Cluster,
    tmp_path: Path,
    num_shards: int,
    devices: tuple[str, ...],
) -> None:
    with cluster(generation.path, num_shards, tmp_path, devices) as client:
        batched = client.retrieve_batch([query_of(one) for one in requests])
        for at, (got, wanted) in enumerate(zip(batched, expected, strict=True)):
            assert_same(got, wanted, at)
        for at, request in enumerate(requests[:40]):
            assert_same(client.retrieve(query_of(request)), expected[at], at)


def test_empty_shards_answer_like_the_module(
    tiny_generation, request_maker: RequestMaker, cluster: Cluster, tmp_path: Path
) -> None:
    requests = request_maker(tiny_generation, 40, seed=5)
    whole = load_retriever(tiny_generation.path)[0]
    with cluster(tiny_generation.path, 7, tmp_path) as client:
        for at, request in enumerate(requests):
            assert_same(client.retrieve(query_of(request)), whole([request])[0], at)


def test_stored_fields_and_stage_times_come_with_the_answer(
    generation, cluster: Cluster, tmp_path: Path
) -> None:
    catalogue = generation.catalogue
    row_of = {item: row for row, item in enumerate(catalogue.item_ids.tolist())}
    with cluster(generation.path, 3, tmp_path) as client:
        got = client.retrieve(
            features={"history": catalogue.item_ids[:5].tolist()},
            k=20,
            filter="genre:Comedy",
            return_fields=["title", "year"],
        )
    assert len(got.item_ids) == 20
    rows = [row_of[item] for item in got.item_ids.tolist()]
    assert got.fields["title"] == [f"Film {row}" for row in rows]
    assert got.fields["year"] == catalogue.fields["year"][rows].tolist()
    assert {"queue", "tower", "filter", "ann", "rerank", "value", "merge", "network"} <= set(
        got.timings_us
    )


def test_many_clients_at_once_get_the_answers_they_would_get_alone(
    generation,
    requests: list[Request],
    expected: list[Answer],
    cluster: Cluster,
    tmp_path: Path,
) -> None:
    """Requests from threads share micro-batches of every composition."""
    failures: list[str] = []
    with cluster(generation.path, 2, tmp_path) as client:

        def work(offset: int) -> None:
            try:
                for at in range(offset, len(requests), 6):
                    assert_same(client.retrieve(query_of(requests[at])), expected[at], at)
            except (AssertionError, grpc.RpcError, ValueError) as error:
                failures.append(repr(error)[:300])

        threads = [threading.Thread(target=work, args=(offset,)) for offset in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert failures == []


def test_scores_are_float32_and_ids_int64(generation, cluster: Cluster, tmp_path: Path) -> None:
    with cluster(generation.path, 1, tmp_path) as client:
        got = client.retrieve(k=3)
    assert got.item_ids.dtype == np.int64
    assert got.scores.dtype == np.float32

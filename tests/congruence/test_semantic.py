"""Answers with semantic candidates: the same alone, in batches, on shards and after a loss."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from silvershard.cluster.client import Client, Query, Result
from silvershard.model.answer import Answer
from silvershard.model.quality import same_ranking
from silvershard.model.request import Request
from silvershard.model.retriever import Retriever
from silvershard.shard.executor import ShardExecutor
from silvershard.shard.load import load_executor, load_retriever

Ask = Callable[[Sequence[ShardExecutor], Sequence[Request], str], list[Answer]]


def assert_same(got: Sequence[Answer], wanted: Sequence[Answer]) -> None:
    for at, (one, other) in enumerate(zip(got, wanted, strict=True)):
        compared = same_ranking(one, other)
        assert compared.same, (at, compared.difference)
        assert one.plan == other.plan, at
        assert one.exhausted == other.exhausted, at
        assert one.counts == other.counts, at
        assert one.warnings == other.warnings, at
        assert torch.equal(one.refined, other.refined), at
        for task, scores in one.task_scores.items():
            assert torch.equal(scores, other.task_scores[task]), (at, task)


def asking(requests: Sequence[Request]) -> list[Request]:
    """Requests for none, few, many and more semantic candidates than there are items."""
    generator = np.random.default_rng(3)
    sizes = (None, 0, 1, 7, 50, 700)
    return [replace(one, semantic_k=sizes[int(generator.integers(len(sizes)))]) for one in requests]


@pytest.fixture(scope="module", params=["union", "intersection"])
def films(request: pytest.FixtureRequest, publish_semantic: Callable[..., Any]) -> Any:
    return publish_semantic(head_merge=request.param)


@pytest.fixture(scope="module")
def whole(films: Any) -> Retriever:
    return load_retriever(films.path)[0]


@pytest.fixture(scope="module")
def requests(films: Any, request_maker: Callable[..., list[Request]]) -> list[Request]:
    return asking(request_maker(films, 90, seed=13))


@pytest.fixture(scope="module")
def expected(whole: Retriever, requests: list[Request]) -> list[Answer]:
    return [whole([one])[0] for one in requests]


def test_the_requests_cover_what_matters(
    whole: Retriever, requests: list[Request], expected: list[Answer]
) -> None:
    kept = [answer.counts.semantic_kept for answer in expected]
    asked = [answer.plan.semantic_k for answer in expected]
    assert sum(0 < one < wanted for one, wanted in zip(kept, asked, strict=True)) > 10
    assert sum(one == wanted > 0 for one, wanted in zip(kept, asked, strict=True)) > 10
    assert sum(wanted == 0 for wanted in asked) > 5
    without = whole([replace(one, semantic_k=0) for one in requests])
    changed = [
        one.item_ids.tolist() != other.item_ids.tolist()
        for one, other in zip(expected, without, strict=True)
    ]
    assert sum(changed) > 20


@pytest.mark.parametrize("batch", [2, 7, 90])
def test_a_request_does_not_depend_on_its_batch(
    whole: Retriever, requests: list[Request], expected: list[Answer], batch: int
) -> None:
    order = torch.randperm(90, generator=torch.Generator().manual_seed(batch)).tolist()
    got: dict[int, Answer] = {}
    for start in range(0, len(order), batch):
        rows = order[start : start + batch]
        got |= dict(zip(rows, whole([requests[row] for row in rows]), strict=True))
    assert_same([got[row] for row in range(90)], expected)


@pytest.mark.slow
@pytest.mark.parametrize(("shards", "devices"), [(1, 3), (2, 1), (3, 2), (7, 1)])
def test_shards_and_devices_give_the_answers_of_one_process(
    films: Any,
    ask_shards: Ask,
    requests: list[Request],
    expected: list[Answer],
    shards: int,
    devices: int,
) -> None:
    executors = [
        load_executor(films.path, shard, shards, devices=("cpu",) * devices)
        for shard in range(shards)
    ]
    assert_same(ask_shards(executors, requests, "key"), expected)


def test_threads_change_nothing(
    whole: Retriever, requests: list[Request], expected: list[Answer]
) -> None:
    torch.set_num_threads(2)
    try:
        got = whole(requests[:30])
    finally:
        torch.set_num_threads(1)
    assert_same(got, expected[:30])


def test_fewer_items_than_shards_are_found_by_all_of_them(
    publish_semantic: Callable[..., Any],
    ask_shards: Ask,
    request_maker: Callable[..., list[Request]],
) -> None:
    tiny = publish_semantic(items=5)
    requests = asking(request_maker(tiny, 30, seed=2))
    wanted = [load_retriever(tiny.path)[0]([one])[0] for one in requests]
    executors = [load_executor(tiny.path, shard, 7) for shard in range(7)]
    assert min(one.documents for one in executors) == 0
    assert_same(ask_shards(executors, requests, "tiny"), wanted)
    assert any(answer.counts.semantic_kept == 5 for answer in wanted)


def test_ties_at_the_cut_of_the_source_go_to_the_smaller_id(
    semantic_generation: Any, ask_shards: Ask
) -> None:
    """Films of equal codes have equal scores, so that only ids decide which of them pass."""
    retriever = load_retriever(semantic_generation.path)[0]
    base = Request(
        features={"history": semantic_generation.catalogue.item_ids[:6].tolist()},
        k=600,
        nprobe=1,
        ann_k=1,
    )
    executors = [load_executor(semantic_generation.path, shard, 3) for shard in range(3)]
    requests = [replace(base, semantic_k=size) for size in range(1, 40)]
    answers = [retriever([one])[0] for one in requests]
    assert_same(ask_shards(executors, requests, "ties"), answers)
    part, codes = retriever.indexes[0], []
    for fewer, more in pairwise(answers):
        new = set(more.item_ids.tolist()) - set(fewer.item_ids.tolist())
        slots = part.slots_of(torch.tensor(sorted(new), dtype=torch.int64))
        codes += part.semantic_codes.flatten(0, 1)[slots].tolist()
    assert sum(one == other for one, other in pairwise(codes)) > 3


def test_a_cluster_answers_as_one_process(
    films: Any,
    requests: list[Request],
    expected: list[Answer],
    cluster: Callable[..., AbstractContextManager[Client]],
    tmp_path: Path,
) -> None:
    with cluster(films.path, 3, tmp_path) as client:
        got = client.retrieve_batch([Query(**one.__dict__) for one in requests])
    for at, (one, other) in enumerate(zip(got, expected, strict=True)):
        assert isinstance(one, Result), (at, one)
        assert one.item_ids.tolist() == other.item_ids.tolist(), at
        assert one.scores.tobytes() == other.scores.numpy().tobytes(), at
        assert one.plan == str(other.plan), at
        assert one.counts.semantic_kept == other.counts.semantic_kept, at
        assert one.counts.reranked == other.counts.reranked, at
        assert one.exhausted == other.exhausted, at

"""The same answers, bit for bit, from one process and from any number of shards and devices."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch

from silvershard.model.answer import Answer
from silvershard.model.quality import same_ranking
from silvershard.model.request import Request
from silvershard.model.retriever import Retriever
from silvershard.shard.executor import ShardExecutor
from silvershard.shard.load import load_executor, load_retriever

Ask = Callable[[Sequence[ShardExecutor], Sequence[Request], str], list[Answer]]
RequestMaker = Callable[..., list[Request]]


def assert_same(got: Sequence[Answer], wanted: Sequence[Answer]) -> None:
    assert len(got) == len(wanted)
    for at, (one, other) in enumerate(zip(got, wanted, strict=True)):
        assert one.plan == other.plan, at
        compared = same_ranking(one, other)
        assert compared.same, (at, compared.difference)
        assert torch.equal(one.refined, other.refined), at
        assert one.exhausted == other.exhausted, at
        assert one.counts == other.counts, at
        assert one.warnings == other.warnings, at
        for task, scores in one.task_scores.items():
            assert torch.equal(scores, other.task_scores[task]), (at, task)


@pytest.fixture(scope="module")
def whole(generation) -> Retriever:
    return load_retriever(generation.path)[0]


@pytest.fixture(scope="module")
def requests(generation, request_maker: RequestMaker) -> list[Request]:
    return request_maker(generation, 200, seed=11)


@pytest.fixture(scope="module")
def expected(whole: Retriever, requests: list[Request]) -> list[Answer]:
    """Each request by itself, in one process."""
    return [whole([request])[0] for request in requests]


def test_the_requests_cover_what_matters(requests: list[Request], expected: list[Answer]) -> None:
    kinds = {answer.plan.kind for answer in expected}
    assert kinds == {"probe", "probe_wide", "all_pages"}
    assert any(answer.exhausted for answer in expected)
    assert any(len(answer.item_ids) == 0 for answer in expected)
    assert any(
        len(answer.item_ids) == request.k
        for answer, request in zip(expected, requests, strict=True)
    )
    ties = [int((answer.scores[1:] == answer.scores[:-1]).sum()) for answer in expected]
    assert sum(ties) > 100
    assert sum(tied > 0 for tied in ties) > 10
    assert any(request.exclude_ids for request in requests)
    assert any(request.filter and "NOT" in request.filter for request in requests)


def test_answers_that_end_between_ties_are_the_same(
    ask_shards: Ask, generation, whole: Retriever
) -> None:
    """Where the last place and the next have equal values, only the ids decide."""
    zero = {"rated": 0.0, "liked": 0.0}
    history = generation.catalogue.item_ids[:7].tolist()
    base = Request(features={"history": history}, k=300, exact=True, task_weights=zero)
    values = whole([base])[0].scores
    cuts = (torch.nonzero(values[1:] == values[:-1]).flatten() + 1).tolist()
    assert len(cuts) >= 5
    requests = [replace(base, k=cut) for cut in cuts[:20]]
    shards = [load_executor(generation.path, one, 3) for one in range(3)]
    assert_same(ask_shards(shards, requests, "ties"), [whole([one])[0] for one in requests])


@pytest.mark.parametrize("batch", [2, 16, 64, 200])
def test_a_request_does_not_depend_on_its_batch(
    whole: Retriever, requests: list[Request], expected: list[Answer], batch: int
) -> None:
    got: list[Answer] = []
    for start in range(0, len(requests), batch):
        got += whole(requests[start : start + batch])
    assert_same(got, expected)


def test_a_request_does_not_depend_on_its_place_in_the_batch(
    whole: Retriever, requests: list[Request], expected: list[Answer]
) -> None:
    order = torch.randperm(len(requests), generator=torch.Generator().manual_seed(5)).tolist()
    got = whole([requests[at] for at in order])
    assert_same(got, [expected[at] for at in order])


@pytest.mark.parametrize("num_shards", [1, 2, 3, 7])
def test_the_number_of_shards_does_not_matter(
    ask_shards: Ask, generation, requests: list[Request], expected: list[Answer], num_shards: int
) -> None:
    shards = [load_executor(generation.path, one, num_shards) for one in range(num_shards)]
    assert sum(shard.documents for shard in shards) == 600
    got: list[Answer] = []
    for start in range(0, len(requests), 40):
        got += ask_shards(shards, requests[start : start + 40], f"batch-{start}")
    assert_same(got, expected)
    alone = [ask_shards(shards, [request], "alone")[0] for request in requests[:40]]
    assert_same(alone, expected[:40])
    assert all(shard.num_open == 0 for shard in shards)


@pytest.mark.parametrize("devices", [("cpu", "cpu"), ("cpu", "cpu", "cpu")])
def test_the_devices_inside_a_shard_do_not_matter(
    ask_shards: Ask,
    generation,
    requests: list[Request],
    expected: list[Answer],
    devices: tuple[str, ...],
) -> None:
    one_shard = [load_executor(generation.path, 0, 1, devices=devices)]
    assert_same(ask_shards(one_shard, requests, "batch"), expected)
    two_shards = [load_executor(generation.path, one, 2, devices=devices) for one in range(2)]
    assert_same(ask_shards(two_shards, requests, "batch"), expected)


def test_the_number_of_threads_does_not_matter(
    whole: Retriever, requests: list[Request], expected: list[Answer]
) -> None:
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert_same(whole(requests[:60]), expected[:60])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("num_shards", [1, 2, 3, 7])
def test_empty_shards_and_k_above_the_catalogue_change_nothing(
    ask_shards: Ask, tiny_generation, request_maker: RequestMaker, num_shards: int
) -> None:
    requests = request_maker(tiny_generation, 60, seed=3)
    whole = load_retriever(tiny_generation.path)[0]
    shards = [load_executor(tiny_generation.path, one, num_shards) for one in range(num_shards)]
    if num_shards == 7:
        assert any(shard.documents == 0 for shard in shards)
    expected = [whole([request])[0] for request in requests]
    assert any(answer.exhausted and len(answer.item_ids) == 5 for answer in expected)
    assert_same(ask_shards(shards, requests, "batch"), expected)


def test_a_pinned_plan_gives_the_same_bytes_as_the_answer_that_named_it(
    whole: Retriever, requests: list[Request], expected: list[Answer]
) -> None:
    for request, answer in zip(requests[:50], expected[:50], strict=True):
        pinned = Request(
            **{
                **request.__dict__,
                "plan": str(answer.plan),
                "exact": False,
                "nprobe": 0,
                "ann_k": 0,
            }
        )
        again = whole([pinned])[0]
        assert torch.equal(again.item_ids, answer.item_ids)
        assert torch.equal(again.scores, answer.scores)

"""Remote tables, and tables on several devices, give the answers of local ones on any shards."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from silvershard.model.answer import Answer
from silvershard.model.encoder_config import HSTUEncoderConfig
from silvershard.model.ranker_config import SelfAttentionConfig
from silvershard.model.request import Request
from silvershard.shard.executor import ShardExecutor
from silvershard.shard.load import load_executor, load_retriever
from silvershard.shard.table_placement import TableSettings

MODEL = {
    "encoder": HSTUEncoderConfig(max_length=12, layers=1),
    "ranker": SelfAttentionConfig(session_rows=8),
}
REMOTE = ("history", "recent", "history_genres", "session")

Ask = Callable[[Sequence[ShardExecutor], Sequence[Request], str], list[Answer]]


@pytest.fixture(scope="module")
def local(publish_model: Any) -> Any:
    return publish_model("int8", **MODEL)


@pytest.fixture(scope="module")
def requests(local: Any, request_maker: Any) -> list[Request]:
    made: list[Request] = request_maker(local, 40, seed=4)
    return made


@pytest.fixture(scope="module")
def expected(local: Any, requests: list[Request]) -> list[Answer]:
    whole = load_retriever(local.path)[0]
    return [whole([request])[0] for request in requests]


def assert_same(answers: Sequence[Answer], expected: Sequence[Answer]) -> None:
    for got, wanted in zip(answers, expected, strict=True):
        assert torch.equal(got.item_ids, wanted.item_ids)
        assert torch.equal(got.scores, wanted.scores)
        for task, scores in wanted.task_scores.items():
            assert torch.equal(got.task_scores[task], scores)


def executors(path: Path, num_shards: int, **options: Any) -> list[ShardExecutor]:
    return [load_executor(path, shard, num_shards, **options) for shard in range(num_shards)]


@pytest.mark.parametrize("num_shards", [1, 2, 7])
def test_remote_tables_answer_like_local_ones_on_any_shards(
    publish_model: Any,
    requests: list[Request],
    expected: list[Answer],
    ask_shards: Ask,
    num_shards: int,
) -> None:
    remote = publish_model("int8", remote=REMOTE, **MODEL)
    shards = executors(remote.path, num_shards)
    assert_same(ask_shards(shards, requests, "all"), expected)
    alone = [ask_shards(shards, [request], "one")[0] for request in requests[:15]]
    assert_same(alone, expected[:15])


def test_tables_on_several_devices_answer_like_whole_ones(
    local: Any, requests: list[Request], expected: list[Answer], ask_shards: Ask
) -> None:
    settings = TableSettings(sharding={"history": "row", "session": "row", "recent": "table"})
    shards = executors(local.path, 2, devices=("cpu", "cpu", "cpu"), tables=settings)
    assert_same(ask_shards(shards, requests, "all"), expected)

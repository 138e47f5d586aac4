"""Every encoder, reranker, feature and precision: one answer alone, in batches and on shards."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from silvershard.model.answer import Answer
from silvershard.model.quality import same_ranking
from silvershard.model.request import Request
from silvershard.shard.load import load_executor, load_retriever

MODELS: dict[str, dict[str, Any]] = {
    "attention": {
        "encoder": {"kind": "attention", "max_length": 12},
        "ranker": {"kind": "self_attention", "session_rows": 7},
    },
    "hstu": {
        "encoder": {"kind": "hstu", "max_length": 20},
        "ranker": {"kind": "mixture_of_logits"},
        "precision": "int8",
    },
    "mean": {
        "encoder": {"kind": "mean", "max_length": 5},
        "ranker": {"kind": "self_attention", "session_rows": 20},
        "precision": "int4",
    },
    "features": {
        "user_ids": (
            {"name": "tags", "dtype": "string", "size": 5},
            {"name": "friends", "dtype": "int", "size": 7},
        ),
        "user_numbers": ({"name": "activity", "width": 2},),
        "item_numbers": ({"name": "price", "width": 1}, {"name": "colour", "width": 3}),
    },
    "quantised features": {
        "encoder": {"kind": "hstu", "max_length": 5},
        "user_ids": ({"name": "tags", "dtype": "string", "size": 5},),
        "user_numbers": ({"name": "age", "width": 1},),
        "item_numbers": ({"name": "price", "width": 1},),
        "precision": "int8",
    },
    "text": {"texts": True, "user_numbers": ({"name": "age", "width": 1},)},
    "quantised text": {
        "texts": True,
        "encoder": {"kind": "hstu", "max_length": 5},
        "precision": "int4",
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_a_model_answers_alike_alone_in_batches_and_on_shards(
    name: str,
    publish_model: Callable[..., Any],
    request_maker: Callable[..., list[Request]],
    ask_shards: Callable[..., list[Answer]],
) -> None:
    generation = publish_model(**MODELS[name])
    whole = load_retriever(generation.path)[0]
    requests = request_maker(generation, 24, seed=5)
    alone = [whole([request])[0] for request in requests]
    assert any(len(answer.item_ids) > 5 for answer in alone)
    for one, other in zip(whole(requests), alone, strict=True):
        assert same_ranking(one, other).same
    for shards, devices in ((2, ("cpu",)), (3, ("cpu", "cpu"))):
        executors = [
            load_executor(generation.path, shard, shards, devices=devices)
            for shard in range(shards)
        ]
        found = ask_shards(executors, requests, "key")
        for one, other in zip(found, alone, strict=True):
            compared = same_ranking(one, other)
            assert compared.same, compared.difference
            for task, scores in one.task_scores.items():
                assert torch.equal(scores, other.task_scores[task])

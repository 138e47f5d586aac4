"""Every encoder, reranker and table precision: the same answers alone, in batches and on shards."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from silvershard.model.answer import split_answers
from silvershard.model.compiled_request import compile_request
from silvershard.model.merge import Merge
from silvershard.model.quality import same_ranking
from silvershard.model.request import Request
from silvershard.model.retriever import assemble
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
}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_answers_alike_alone_in_batches_and_on_shards(
    name: str, publish_model: Callable[..., Any], request_maker: Callable[..., list[Request]]
) -> None:
    generation = publish_model(**MODELS[name])
    whole = load_retriever(generation.path)[0]
    requests = request_maker(generation, 24, seed=5)
    alone = [whole([request])[0] for request in requests]
    assert any(len(answer.item_ids) > 5 for answer in alone)
    for one, other in zip(whole(requests), alone, strict=True):
        assert same_ranking(one, other).same
    merge = Merge()
    for shards, devices in ((2, ("cpu",)), (3, ("cpu", "cpu"))):
        executors = [
            load_executor(generation.path, shard, shards, devices=devices)
            for shard in range(shards)
        ]
        spec = executors[0].spec
        compiled = [compile_request(request, spec) for request in requests]
        counts = [
            sum(int(one.count(request.scan[None])) for one in executors)
            if request.needs_count
            else None
            for request in compiled
        ]
        plans = [one.plan(spec, count) for one, count in zip(compiled, counts, strict=True)]
        encoded = executors[-1].encode([one.features for one in compiled])
        work = assemble(compiled, plans, encoded.embedding, encoded.user_state)
        firsts = [one.open("key", work, float("inf")) for one in executors]
        cutoffs = merge.cutoffs(firsts, work.ann_k)
        second = merge([one.close("key", cutoffs) for one in executors], int(work.k.max()))
        first = merge.candidates(firsts, 1)
        warnings = encoded.warnings
        found = split_answers(compiled, plans, warnings, first, second, spec, counts, {})
        for one, other in zip(found, alone, strict=True):
            compared = same_ranking(one, other)
            assert compared.same, compared.difference
            for task, scores in one.task_scores.items():
                assert torch.equal(scores, other.task_scores[task])

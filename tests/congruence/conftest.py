from collections.abc import Callable, Sequence

import pytest

from silvershard.model.answer import Answer, split_answers
from silvershard.model.compiled_request import compile_request
from silvershard.model.merge import Merge
from silvershard.model.request import Request
from silvershard.model.retriever import assemble
from silvershard.shard.executor import ShardExecutor


def ask(executors: Sequence[ShardExecutor], requests: Sequence[Request], key: str) -> list[Answer]:
    """The two rounds of a query over some shards, without processes or a network."""
    spec, merge = executors[0].spec, Merge()
    compiled = [compile_request(request, spec) for request in requests]
    eligible = [
        sum(int(one.count(request.scan[None])) for one in executors)
        if request.needs_count
        else None
        for request in compiled
    ]
    plans = [one.plan(spec, count) for one, count in zip(compiled, eligible, strict=True)]
    encoded = executors[-1].encode([one.features for one in compiled])
    work = assemble(compiled, plans, encoded.embedding, encoded.user_state)
    firsts = [one.open(key, work, float("inf")) for one in executors]
    cutoffs = merge.cutoffs(firsts, work.ann_k)
    second = merge([one.close(key, cutoffs) for one in executors], int(work.k.max()))
    for one in executors:
        one.release(key)
    first = merge.candidates(firsts, 1)
    return split_answers(compiled, plans, encoded.warnings, first, second, spec, eligible, {})


@pytest.fixture(scope="session")
def ask_shards() -> Callable[[Sequence[ShardExecutor], Sequence[Request], str], list[Answer]]:
    """``ask_shards(executors, requests, key)`` is a query over some shards."""
    return ask

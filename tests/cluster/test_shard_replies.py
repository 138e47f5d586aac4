from typing import Any

import pytest
import torch
from google.rpc import code_pb2

from silvershard.cluster import shard_pb2, tensors
from silvershard.cluster.consistency import Consistency, UpdateToken
from silvershard.cluster.freshness import Demand
from silvershard.cluster.shard_replies import demand_from, failed, set_round
from silvershard.model.request import RequestError
from silvershard.shard.errors import CandidatesExpired, GenerationError, Overloaded


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            tensors.TensorError("tensor 'k' is missing"),
            (code_pb2.INVALID_ARGUMENT, "MALFORMED_TENSOR", "tensor 'k' is missing", ""),
        ),
        (KeyError("secret"), (code_pb2.INTERNAL, "INTERNAL", "internal error e1", "")),
        (CandidatesExpired("a"), (code_pb2.ABORTED, "CANDIDATES_EXPIRED", None, "")),
        (Overloaded("full", 1.0), (code_pb2.RESOURCE_EXHAUSTED, None, None, "")),
        (
            RequestError("after", "too far"),
            (code_pb2.INVALID_ARGUMENT, None, "too far", "after"),
        ),
    ],
)
def test_an_error_is_told_in_words_and_a_bug_by_a_number(error: Exception, said: Any) -> None:
    reply = failed(shard_pb2.ShardReply(call_id=4, generation=2), error, "e1")
    found = (reply.code, reply.reason, reply.message, reply.field)
    assert [one for one, two in zip(found, said, strict=True) if two is not None] == [
        one for one in said if one is not None
    ]
    assert (reply.call_id, reply.generation) == (4, 2)


def test_a_generation_that_is_not_held_is_answered_with_the_one_that_is() -> None:
    reply = failed(shard_pb2.ShardReply(generation=2), GenerationError(2, 5))
    assert (reply.code, reply.generation) == (code_pb2.FAILED_PRECONDITION, 5)


def test_a_round_is_told_with_the_times_of_its_stages() -> None:
    reply = shard_pb2.ShardReply()
    set_round(reply, tensors.to_map({"count": torch.tensor([3])}), {"ann": 7})
    assert tensors.from_map(reply.tensors, tensors.COUNT)["count"].tolist() == [3]
    assert dict(reply.times_us) == {"ann": 7}


def test_a_demand_is_read_as_it_was_said() -> None:
    fresh = shard_pb2.Freshness(log_id=9, wait_us=250_000)
    fresh.after.add(partition=3, position=7)
    assert demand_from(fresh) == Demand(Consistency((UpdateToken(9, 3, 7),)), 0.25)
    fresh.max_staleness_us = 0
    assert demand_from(fresh).consistency.max_staleness_s == 0.0

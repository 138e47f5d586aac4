import math
from pathlib import Path

import pytest
import torch

from benchmarks import echo_cluster
from benchmarks import live_catalogue as live
from benchmarks.echo_cluster import CLOSE, ENCODE, OPEN, Sizes
from benchmarks.sleeping_shard import CANDIDATES, SleepingExecutor, request_features
from silvershard.cluster import retrieval_pb2, shard_pb2, tensors
from silvershard.cluster.codec import values_to
from silvershard.cluster.tensors import round_to_map
from silvershard.model.merge import Merge
from silvershard.model.types import RoundOne, RoundTwo, Work

EPOCH = 1795475659825101000


def call(**more: object) -> shard_pb2.ShardCall:
    made = shard_pb2.ShardCall(call_id=500, generation=1, epoch=EPOCH, remaining_us=1900000)
    made.MergeFrom(shard_pb2.ShardCall(**more))
    return made


def reply(found: dict[str, torch.Tensor] | RoundOne | RoundTwo) -> shard_pb2.ShardReply:
    is_map = isinstance(found, dict)
    return shard_pb2.ShardReply(
        call_id=500,
        generation=1,
        epoch=EPOCH,
        tensors=tensors.to_map(found) if is_map else round_to_map(found),
        times_us={} if is_map else found.times,
    )


def test_messages_are_about_as_large_as_those_of_a_request(tmp_path: Path) -> None:
    snapshot = live.publish(tmp_path, 300, 16)
    shards = [SleepingExecutor(snapshot, shard, 4) for shard in range(4)]
    features = request_features(7, 0, 0, 0)
    encode = call()
    user = encode.encode.users.add()
    for name, values in features.items():
        user.features[name].CopyFrom(values_to(name, values))
    encoded = shards[0].encode([features])
    none, one = torch.zeros(1, 0, 4, dtype=torch.int64), torch.ones(1, dtype=torch.int64)
    work = Work(
        embedding=encoded.embedding,
        user_state=encoded.user_state,
        scan=none,
        verify=none,
        exclude=torch.zeros(1, 0, dtype=torch.int64),
        value_ops=torch.zeros(1, 9, 2, dtype=torch.int32),
        value_constants=torch.zeros(1, 9),
        probes=one,
        ann_k=one * (CANDIDATES // 2),
        semantic_k=0 * one,
        k=one * 100,
        tasks=torch.ones(1, 1, dtype=torch.int8),
    )
    key = "0123456789ab/500"
    first = [shard.open(key, work, math.inf) for shard in shards]
    cutoffs = Merge().cutoffs(first, work.ann_k)
    second = shards[0].close(key, cutoffs)
    embeddings = {"embedding": encoded.embedding, "user_state": encoded.user_state}
    real = [
        Sizes(encode.ByteSize(), reply(embeddings).ByteSize()),
        Sizes(call(key=key, open=tensors.work_to_map(work)).ByteSize(), reply(first[0]).ByteSize()),
        Sizes(
            call(key=key, close=tensors.cutoffs_to_map(cutoffs)).ByteSize(),
            reply(second).ByteSize(),
        ),
    ]
    for found, stated in zip(real, (ENCODE, OPEN, CLOSE), strict=True):
        assert tuple(stated) == pytest.approx(tuple(found), rel=0.35)


def test_a_reply_is_as_long_as_its_call_asks_for() -> None:
    for sizes in (ENCODE, OPEN, CLOSE):
        asked = echo_cluster.message(sizes)
        assert (len(asked), len(echo_cluster.reply_to(asked))) == sizes


def test_an_answer_is_whole() -> None:
    made = retrieval_pb2.RetrieveResponse.FromString(echo_cluster.answer_of([5, 3]))
    assert list(made.item_ids) == [5, 3]
    assert made.coverage.documents == 1.0
    assert not made.coverage.degraded

import asyncio
import re
from typing import Any

import pytest

from silvershard.cluster import retrieval_pb2
from silvershard.cluster.client import Client, Query
from silvershard.cluster.load import Entry
from silvershard.cluster.load_channel import LoadChannels
from silvershard.cluster.load_outcome import Outcome, judge
from silvershard.shard.errors import DeadlineExceeded


def messages(*queries: Query) -> list[bytes]:
    with Client("127.0.0.1:1") as client:
        return [client.message(one).SerializeToString() for one in queries]


def test_requests_go_out_as_they_are_and_answers_come_back_as_bytes(make_cluster: Any) -> None:
    cluster = make_cluster(2)
    with cluster.client() as client:
        client.wait_until_ready(20)
        wanted = client.retrieve(k=7).item_ids.tolist()
    requests = messages(Query(k=7), Query(k=3, filter="nothing:1"))

    async def ask() -> list[Any]:
        address = cluster.router.address
        async with LoadChannels([address], requests) as channels:
            await channels.connect(20)
            assert channels.router_of(5) == address
            return [await channels.send(number, 10.0) for number in range(3)]

    first, refused, again = asyncio.run(ask())
    for reply in (first, again):
        answer = retrieval_pb2.RetrieveResponse.FromString(reply.body)
        assert (reply.code, list(answer.item_ids)) == ("OK", wanted)
    judged = judge(Entry(1, 0.0, 0.0, 0.1, *refused), 1.0)
    assert (judged.outcome, judged.code) == (Outcome.ERROR, "INVALID_ARGUMENT")
    assert "nothing" in judged.message


def test_a_call_that_takes_too_long_is_a_code(make_cluster: Any) -> None:
    cluster = make_cluster(1)

    async def ask() -> Any:
        async with LoadChannels([cluster.router.address], messages(Query(k=7))) as channels:
            await channels.connect(20)
            return await channels.send(0, 0.0)

    assert asyncio.run(ask()).code == "DEADLINE_EXCEEDED"


def test_a_router_that_is_not_there_is_named() -> None:
    async def connect() -> None:
        async with LoadChannels(["127.0.0.1:9"], messages(Query())) as channels:
            await channels.connect(0.2)

    with pytest.raises(DeadlineExceeded, match=re.escape("router at 127.0.0.1:9 could not be")):
        asyncio.run(connect())


def test_requests_and_routers_take_turns() -> None:
    async def turns() -> list[tuple[int, str]]:
        async with LoadChannels(["a:1", "b:2"], messages(*[Query()] * 3)) as channels:
            return [(channels.request_of(one), channels.router_of(one)) for one in range(4)]

    assert asyncio.run(turns()) == [(0, "a:1"), (1, "b:2"), (2, "a:1"), (0, "b:2")]

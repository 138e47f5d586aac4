"""The messages of a request over streams of gRPC, and nothing else: what no router can be below.

Usage: ``python -P benchmarks/echo_cluster.py shard PARENT`` and ``... front PARENT FILE``, followed
by the addresses of all shards, where FILE holds the items of the answer to each request as JSON.
Either prints one line of JSON with its address and serves until it is ended. For every request the
front sends one message to one shard and then twice one to each of them, of the sizes that a router
sends and gets, waits for all replies in between, and gives the answer that was made before.
"""

import asyncio
import json
import sys
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import grpc.aio

from silvershard.cluster import retrieval_pb2
from silvershard.cluster.listen import LINK_OPTIONS, server_options
from silvershard.cluster.server import SERVICE
from silvershard.deploy.processes import die_with_parent

METHOD = "/silvershard.benchmarks.Echo/Execute"


class Sizes(NamedTuple):
    """Bytes of a call to a shard, and of its reply."""

    call: int
    reply: int


ENCODE, OPEN, CLOSE = Sizes(45, 330), Sizes(700, 1370), Sizes(110, 2180)
"""As in the row beside it: 4 shards, 200 candidates, 100 items, one head of 64 dimensions."""

_NUMBER_BYTES = 4


def message(sizes: Sizes) -> bytes:
    """Return a call, which says how long its reply is to be."""
    return sizes.reply.to_bytes(_NUMBER_BYTES, "little").ljust(sizes.call, b"\0")


def reply_to(call: bytes) -> bytes:
    """Return what an echo answers."""
    return bytes(int.from_bytes(call[:_NUMBER_BYTES], "little"))


def answer_of(items: Sequence[int]) -> bytes:
    """Return an answer of full coverage, ready to be sent."""
    coverage = retrieval_pb2.Coverage(documents=1.0, shards_total=4, shards_full=4)
    made = retrieval_pb2.RetrieveResponse(
        item_ids=items, scores=[float(one) for one in items], coverage=coverage
    )
    return made.SerializeToString()


async def _echo(_: Any, context: grpc.aio.ServicerContext) -> None:
    await context.send_initial_metadata(())
    while True:
        call = await context.read()
        if call is grpc.aio.EOF:
            return
        await context.write(reply_to(call))


class Front:
    """Answers requests after all messages have come back."""

    def __init__(self, streams: Sequence[Any], answers: Sequence[bytes]) -> None:
        """Make a front over streams that are open."""
        self._streams = streams
        self._answers = answers
        self._waiting: list[deque[asyncio.Future[bytes]]] = [deque() for _ in streams]
        self._unsent: list[asyncio.Queue[bytes]] = [asyncio.Queue() for _ in streams]
        self._tasks = [
            asyncio.create_task(work(at))
            for at in range(len(streams))
            for work in (self._write, self._read)
        ]

    async def _write(self, at: int) -> None:
        while True:
            await self._streams[at].write(await self._unsent[at].get())

    async def _read(self, at: int) -> None:
        while True:
            reply = await self._streams[at].read()
            self._waiting[at].popleft().set_result(reply)

    def _send(self, at: int, call: bytes) -> asyncio.Future[bytes]:
        self._waiting[at].append(asyncio.get_running_loop().create_future())
        self._unsent[at].put_nowait(call)
        return self._waiting[at][-1]

    async def retrieve(self, request: bytes, _: grpc.aio.ServicerContext) -> bytes:
        """Return the answer to a request."""
        number = retrieval_pb2.RetrieveRequest.FromString(request).named.features["visited"].ints[0]
        await self._send(number % len(self._streams), message(ENCODE))
        for sizes in (OPEN, CLOSE):
            call = message(sizes)
            for waiting in [self._send(at, call) for at in range(len(self._streams))]:
                await waiting
        return self._answers[number]


async def _serve(handlers: Any) -> None:
    server = grpc.aio.server(options=server_options(1 << 20))
    server.add_generic_rpc_handlers(handlers)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(json.dumps({"address": f"127.0.0.1:{port}"}), flush=True)
    await server.wait_for_termination()


async def shard() -> None:
    """Serve one shard for ever."""
    service, name = METHOD.strip("/").split("/")
    handler = grpc.stream_stream_rpc_method_handler(_echo)
    await _serve([grpc.method_handlers_generic_handler(service, {name: handler})])


async def front(answers: Sequence[Sequence[int]], addresses: Sequence[str]) -> None:
    """Serve the front for ever."""
    channels = [grpc.aio.insecure_channel(one, options=LINK_OPTIONS) for one in addresses]
    streams = [channel.stream_stream(METHOD)() for channel in channels]
    for stream in streams:
        await stream.initial_metadata()
    made = Front(streams, [answer_of(items) for items in answers])
    handlers = {"Retrieve": grpc.unary_unary_rpc_method_handler(made.retrieve)}
    await _serve([grpc.method_handlers_generic_handler(SERVICE, handlers)])


def main() -> None:
    """Run the process."""
    role, parent, *rest = sys.argv[1:]
    die_with_parent(int(parent))
    if role == "shard":
        asyncio.run(shard())
    else:
        asyncio.run(front(json.loads(Path(rest[0]).read_text()), rest[1:]))


if __name__ == "__main__":
    main()

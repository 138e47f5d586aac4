import asyncio
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

from silvershard.cluster.client import Client
from silvershard.cluster.config import ListenSection, QuerySection, RouterConfig
from silvershard.cluster.router import Router
from silvershard.cluster.shard_map import ShardEntry, ShardMap
from silvershard.cluster.shard_server import ShardServer
from silvershard.model.answer import Answer, split_answers
from silvershard.model.compiled_request import compile_request
from silvershard.model.merge import Merge
from silvershard.model.request import Request
from silvershard.model.retriever import assemble
from silvershard.shard.executor import ShardExecutor
from silvershard.shard.load import load_executor


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
    cutoffs = merge.cutoffs(firsts, work.ann_k, work.semantic_k)
    second = merge([one.close(key, cutoffs) for one in executors], int(work.k.max()))
    for one in executors:
        one.release(key)
    first = merge.candidates(firsts, 1)
    return split_answers(compiled, plans, encoded.warnings, first, second, spec, eligible, {})


@pytest.fixture(scope="session")
def ask_shards() -> Callable[[Sequence[ShardExecutor], Sequence[Request], str], list[Answer]]:
    """``ask_shards(executors, requests, key)`` is a query over some shards."""
    return ask


@contextmanager
def _cluster(
    path: Path, num_shards: int, folder: Path, devices: Sequence[str] = ("cpu",)
) -> Iterator[Client]:
    """Shard servers and a router with real executors and sockets, in threads of this process."""
    servers = [
        ShardServer(load_executor(path, shard, num_shards, devices=devices))
        for shard in range(num_shards)
    ]
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    def run(work):  # type: ignore[no-untyped-def]
        return asyncio.run_coroutine_threadsafe(work, loop).result(60)

    started: list[ShardServer] = []
    router = None
    try:
        for server in servers:
            run(server.start())
            started.append(server)
        entries = tuple(
            ShardEntry(
                shard=server.executor.shard,
                replica=0,
                address=server.address,
                epoch=server.epoch,
                documents=server.executor.documents,
                pid=os.getpid(),
            )
            for server in servers
        )
        map_path = folder / f"map-{num_shards}-{len(devices)}.json"
        ShardMap(
            version=1,
            generation=1,
            snapshot=str(path),
            num_shards=num_shards,
            entries=entries,
        ).write_atomic(map_path)

        async def make_router() -> Router:
            # Answers must be whole here, so slow machines get time instead of partial answers.
            query = QuerySection(min_coverage=1.0, deadline_max_ms=60_000)
            listen = ListenSection(host="127.0.0.1", port=0)
            made = Router(RouterConfig(map_path=str(map_path), listen=listen, query=query))
            await made.start()
            return made

        router = run(make_router())
        with Client(router.address, timeout_s=60) as client:
            client.wait_until_ready(timeout_s=30)
            yield client
    finally:
        if router is not None:
            run(router.stop())
        for server in started:
            run(server.stop())
        loop.call_soon_threadsafe(loop.stop)
        thread.join(30)
        loop.close()


@pytest.fixture(scope="session")
def cluster() -> Callable[..., AbstractContextManager[Client]]:
    """``with cluster(path, num_shards, folder, devices) as client`` serves a generation."""
    return _cluster

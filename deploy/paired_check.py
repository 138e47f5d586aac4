"""The process that asks two sets of shards the same questions, and compares what they say.

Each set has a router here, which nobody else can reach. Questions are the golden requests of every
generation that is held, in exact mode, and one for everything. Updates go on meanwhile, so an
answer counts that is the same once: a difference is one that stays.

It prints what differs in one line, or nothing, and ends with exit code 0 if nothing does.

Shapes: K results.
"""

import argparse
import asyncio
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from silvershard.cluster.client import Client, Query, Result
from silvershard.cluster.codec import RequestRefused
from silvershard.cluster.config import ListenSection, ObservabilitySection, RouterConfig
from silvershard.cluster.degrade_policy import DegradeMode, DegradePolicy
from silvershard.cluster.dialer import peer_dialer
from silvershard.cluster.logs import log_to_stderr
from silvershard.cluster.shard_map import ShardMap
from silvershard.deploy.processes import die_with_parent, step_back
from silvershard.deploy.router_process import read_config
from silvershard.model.request import Request
from silvershard.shard.errors import RetrievalError

PATIENCE_S = 20.0
"""How long the answers to one question may differ, or fail to come."""
READY_S = 60.0
_PAUSE_S = 0.01
_TIMEOUT_S = 10.0

Ask = Callable[[Query], Result]


def compare(
    old: Ask,
    new: Ask,
    questions: Sequence[Query],
    *,
    patience_s: float = PATIENCE_S,
    clock: Callable[[], float] = time.monotonic,
    pause: Callable[[float], None] = time.sleep,
) -> str:
    """Ask two sets of shards; return the first difference that stays in words, empty if none does.

    Args:
        old: asks the set that serves.
        new: asks the other one.
        questions: what to ask.
        patience_s: how long the answers to one question may differ.
        clock: measures it.
        pause: waits for some seconds between two tries.
    """
    for number, question in enumerate(questions):
        give_up_s = clock() + patience_s
        while text := _difference(old, new, question):
            if clock() > give_up_s:
                return f"question {number} of {len(questions)}: {text}"
            pause(_PAUSE_S)
    return ""


def _difference(old: Ask, new: Ask, question: Query) -> str:
    """Return how two answers differ in words; the new one is not older than the old one."""
    from silvershard.shard.golden import difference

    try:
        exact = replace(question, exact=True)
        try:
            wanted = old(exact)
        except RequestRefused as error:
            if error.code != "INVALID_ARGUMENT":
                raise
            # Too many items would have to be kept. A plan, too, gives the same answer whatever the
            # number of shards.
            wanted = old(question)
            exact = replace(question, plan=wanted.plan)
        found = new(replace(exact, after=wanted.cut))
    except RetrievalError as error:
        return str(error)
    # The plan of an exact search names how many items there are, which updates change all the time.
    said = difference(replace(found, plan=wanted.plan), wanted)
    if said is None and dict(found.fields) != dict(wanted.fields):
        said = "the stored fields of the items are not the same"
    return f"generation {wanted.generation}: {said}" if said else ""


def questions_of(shard_map: ShardMap) -> list[Query]:
    """Return what to ask of every generation that a map offers.

    Raises:
        SnapshotError: if one of them is damaged.
    """
    from silvershard.shard.golden import read_golden
    from silvershard.shard.snapshot import open_snapshot

    found = []
    for generation, path in shard_map.hosted.items():
        snapshot = open_snapshot(Path(path))
        everything = Request(
            k=1000, return_fields=[one.name for one in snapshot.spec.item_schema.fields]
        )
        requests = [case.to_request() for case in read_golden(snapshot).cases]
        found += [
            Query(
                **{**request.__dict__, "plan": "", "nprobe": 0, "ann_k": 0},
                generation=generation,
                min_coverage=1.0,
                degrade=DegradePolicy(DegradeMode.NEVER),
            )
            for request in (everything, *requests)
        ]
    return found


@contextmanager
def asking(config: RouterConfig, shard_map: Path) -> Iterator[Ask]:
    """Ask the shards of a map through a router of this process.

    Args:
        config: settings of a router.
        shard_map: file of the map.

    Raises:
        DeadlineExceeded: if it does not reach every shard.
    """
    from silvershard.cluster.router import Router

    config = config.model_copy(
        update={
            "map_path": str(shard_map),
            "listen": ListenSection(port=0),
            "observability": ObservabilitySection(http=""),
        }
    )
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    router = asyncio.run_coroutine_threadsafe(_started(config, Router), loop).result()
    try:
        dialer = peer_dialer(config.security.peers)
        with Client(router.address, timeout_s=_TIMEOUT_S, dialer=dialer) as client:
            client.wait_until_ready(READY_S)
            yield client.retrieve
    finally:
        asyncio.run_coroutine_threadsafe(router.stop(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


async def _started(config: RouterConfig, make: Callable[[RouterConfig], Any]) -> Any:
    """Return a router that listens; it belongs to the running loop."""
    router = make(config)
    await router.start()
    return router


def check(config: RouterConfig, old: Path, new: Path) -> str:
    """Return what differs between the answers by two maps in words, empty if nothing does.

    Args:
        config: settings of a router.
        old: file of the map that is served.
        new: file of the other one.

    Raises:
        RetrievalError: if they cannot be compared.
    """
    import torch

    torch.set_num_threads(config.num_threads)
    questions = questions_of(ShardMap.read(new))
    with asking(config, old) as ask_old, asking(config, new) as ask_new:
        return compare(ask_old, ask_new, questions)


def main(argv: Sequence[str] | None = None) -> int:
    """Compare and return the exit code."""
    parser = argparse.ArgumentParser(prog="silvershard.deploy.paired_check", description=__doc__)
    parser.add_argument("--config", type=Path, required=True, help="RouterConfig as JSON")
    parser.add_argument("--old", type=Path, required=True, help="map of the set that serves")
    parser.add_argument("--new", type=Path, required=True, help="map of the other one")
    parser.add_argument("--parent", type=int, required=True, help="end with this process")
    options = parser.parse_args(argv)
    die_with_parent(options.parent)
    # Queries go first.
    step_back()
    log_to_stderr()
    try:
        found = check(read_config(options.config), options.old, options.new)
    except RetrievalError as error:
        found = f"the answers could not be compared: {error}"
    if found:
        sys.stdout.write(" ".join(found.split()) + "\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())

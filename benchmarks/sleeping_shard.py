"""A shard process without a model: it sleeps as long as each request says and answers by a rule.

Usage: ``python -P benchmarks/sleeping_shard.py SNAPSHOT SHARD NUM_SHARDS REPLICA``. It prints its
map entry as JSON and serves until it is ended. Server, protocol and tensors are those of the
product; only what a model would compute is replaced by a rule, so that everybody can tell what the
merge of all shards must be.

A request is four ids of the user feature ``visited``: its number, and the microseconds that
encoding, round one and round two take of a shard, what stands in for the model included. A batch
takes the sum of those of its requests.

Shapes: B requests, H heads, D embedding dimension, R candidates, K results, J candidates that all
shards together hold for a request.
"""

import asyncio
import ctypes
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from silvershard.cluster.shard_server import ShardServer
from silvershard.deploy.processes import die_with_parent
from silvershard.model.merge import passes
from silvershard.model.stages import Proceed, always
from silvershard.model.two_tower import Encoded
from silvershard.model.types import Cutoffs, RoundOne, RoundTwo, Work
from silvershard.shard.errors import CandidatesExpired
from silvershard.shard.partition import shard_partitions
from silvershard.shard.snapshot import open_snapshot

CANDIDATES = 400
"""J; more than pass the cut, so that the cut matters."""
_STRIDE = 173
"""Without a common divisor with ``CANDIDATES``, so that the order by value is another one."""
_PR_SET_TIMERSLACK = 29


def expected(number: int, ann_k: int, k: int) -> list[int]:
    """Return the items that a request must be answered with, best first."""
    kept = sorted(range(ann_k), key=lambda place: -(place * _STRIDE % CANDIDATES))
    return [number * CANDIDATES + place for place in kept[:k]]


def request_features(
    number: int, encode_us: int = 0, open_us: int = 0, close_us: int = 0
) -> dict[str, list[int]]:
    """Return the features of a request of so many microseconds per stage."""
    return {"visited": [number, encode_us, open_us, close_us]}


class SleepingExecutor:
    """Stands in for ``ShardExecutor``: one thread owns it."""

    def __init__(self, snapshot: Path, shard: int, num_shards: int) -> None:
        """Make one.

        Args:
            snapshot: a generation, of which only the manifest is read.
            shard: index of the shard.
            num_shards: S.
        """
        self.spec = open_snapshot(snapshot).spec
        self.shard = shard
        self.num_shards = num_shards
        self.cut: tuple[int, ...] = ()
        mine = shard_partitions(shard, num_shards, self.spec.num_partitions)
        self.documents = sum(self.spec.partition_documents[one] for one in mine)
        self._open: dict[str, tuple[Work, Tensor, Tensor]] = {}
        self._places = torch.arange(shard, CANDIDATES, num_shards)

    def encode(self, features: Sequence[Mapping[str, Any]]) -> Encoded:
        """Return embeddings that carry the four ids of each request."""
        began_s = time.perf_counter()
        ids = torch.tensor([list(one["visited"]) for one in features], dtype=torch.float32)
        embedding = torch.zeros(len(features), 1, self.spec.dim)
        embedding[:, 0, : ids.shape[1]] = ids
        found = Encoded(embedding, torch.zeros(len(features), 1), ((),) * len(features))
        _sleep(ids[:, 1], began_s)
        return found

    def open(
        self, key: str, work: Work, expires_at_s: float, proceed: Proceed = always
    ) -> RoundOne:
        """Return the best candidates of each request, in the order of their places."""
        began_s = time.perf_counter()
        proceed("ann")
        places = self._places[: int(work.ann_k.max())]
        item_ids = work.embedding[:, :, :1].long() * CANDIDATES + places  # (B, H, R)
        scores = (-places).float().expand(item_ids.shape).contiguous()
        self._open[key] = (work, scores, item_ids)
        batch = len(work.k)
        found = RoundOne(
            scores=scores,
            item_ids=item_ids,
            probed=torch.full((batch,), len(places)),
            eligible=torch.full((batch,), len(places)),
            semantic_scores=torch.zeros(batch, 0),
            semantic_item_ids=torch.zeros(batch, 0, dtype=torch.int64),
            times={},
        )
        return found._replace(times={"ann": _sleep(work.embedding[:, 0, 2], began_s)})

    def close(self, key: str, cutoffs: Cutoffs, proceed: Proceed = always) -> RoundTwo:
        """Return what passes the cut, ordered by value.

        Raises:
            CandidatesExpired: if ``key`` is not open.
        """
        began_s = time.perf_counter()
        if key not in self._open:
            raise CandidatesExpired(key)
        proceed("rerank")
        work, scores, item_ids = self._open[key]
        kept = passes(scores, item_ids, cutoffs)[:, 0]  # (B, R)
        values = (item_ids[:, 0] * _STRIDE % CANDIDATES).float().masked_fill(~kept, float("-inf"))
        width = min(int(work.k.max()), values.shape[1])
        best = values.topk(width, dim=1)
        empty = best.values == float("-inf")
        batch = len(work.k)
        found = RoundTwo(
            item_ids=item_ids[:, 0].gather(1, best.indices).masked_fill(empty, -1),
            values=best.values,
            refined=best.values,
            tasks=torch.zeros(batch, width, len(self.spec.item_schema.tasks)),
            kept=kept.sum(1),
            semantic_kept=torch.zeros(batch, dtype=torch.int64),
            reranked=kept.sum(1),
            times={},
        )
        return found._replace(times={"rerank": _sleep(work.embedding[:, 0, 3], began_s)})

    def is_open(self, key: str) -> bool:
        """Return whether a query has candidates open."""
        return key in self._open

    def release(self, key: str) -> None:
        """Give up the candidates of a query."""
        self._open.pop(key, None)


def _sleep(micros: Tensor, began_s: float) -> int:
    """Sleep until all requests of a batch have taken their time; return the microseconds spent."""
    left_s = began_s + float(micros.sum()) / 1e6 - time.perf_counter()
    if left_s > 0:
        time.sleep(left_s)
    return int((time.perf_counter() - began_s) * 1e6)


async def serve(snapshot: Path, shard: int, num_shards: int, replica: int) -> None:
    """Serve one replica of one shard for ever; print its map entry first."""
    executor: Any = SleepingExecutor(snapshot, shard, num_shards)
    server = ShardServer(executor, snapshot=str(snapshot), replica=replica)
    await server.start()
    entry = {
        "shard": shard,
        "replica": replica,
        "address": server.address,
        "epoch": server.epoch,
        "documents": executor.documents,
        "pid": os.getpid(),
    }
    print(json.dumps(entry), flush=True)
    await asyncio.Event().wait()


def main() -> None:
    """Run the process."""
    snapshot, *numbers, parent = sys.argv[1:]
    die_with_parent(int(parent))
    # By default the kernel lets a sleep take 50 microseconds longer.
    ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, 1)
    torch.set_num_threads(1)
    asyncio.run(serve(Path(snapshot), *map(int, numbers)))


if __name__ == "__main__":
    main()

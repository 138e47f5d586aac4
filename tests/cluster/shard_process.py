"""One shard as a process of its own: prints its map entry, then serves until it is ended."""

import asyncio
import ctypes
import json
import os
import signal
import sys
import time
from pathlib import Path

import torch

from silvershard.cluster.hosting import ready
from silvershard.cluster.log_reach import reach_log
from silvershard.cluster.shard_loader import ShardLoader
from silvershard.cluster.shard_server import ShardServer


async def main(snapshot: str, shard: str, num_shards: str, hang_in: str, log_url: str = "") -> None:
    torch.set_num_threads(1)
    log = reach_log(log_url) if log_url else None
    load = ShardLoader(int(shard), int(num_shards), log=log, headroom=0.5)
    loaded = ready(load(Path(snapshot)))
    executor = loaded.executor
    if hang_in:

        def hang(*_: object) -> None:
            sys.stdout.write("reached\n")
            sys.stdout.flush()
            time.sleep(3600)

        setattr(executor, hang_in, hang)
    server = ShardServer(loaded, snapshot=snapshot, load=load)
    await server.start()
    entry = {
        "shard": executor.shard,
        "replica": 0,
        "address": server.address,
        "epoch": server.epoch,
        "documents": executor.documents,
        "pid": os.getpid(),
    }
    sys.stdout.write(json.dumps(entry) + "\n")
    sys.stdout.flush()
    await asyncio.Event().wait()


if __name__ == "__main__":
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    asyncio.run(main(*sys.argv[1:]))

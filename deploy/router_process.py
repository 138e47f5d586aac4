"""The router process: a router that serves until it is told to stop, or until its parent ends.

Run it with ``python -P -m silvershard.deploy.router_process --config FILE``; FILE holds a
``RouterConfig`` as JSON. Once it listens it prints one line of JSON with its address. It ends on
SIGTERM, after the requests in flight, and on SIGUSR1 as one whose place another has taken.
"""

import argparse
import asyncio
import contextlib
import functools
import json
import logging
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError

from silvershard.cluster.config import RouterConfig
from silvershard.cluster.document import RELEASE
from silvershard.cluster.logs import log_to_stderr
from silvershard.deploy.processes import die_with_parent, identify
from silvershard.shard.errors import ConfigError, RetrievalError

_log = logging.getLogger(__name__)


def read_config(path: Path) -> RouterConfig:
    """Return the settings in a file.

    Raises:
        ConfigError: naming the setting that cannot be used.
    """
    try:
        return RouterConfig.model_validate_json(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"config {path}: {error.strerror or error}") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "file"
        raise ConfigError(f"config {path}: {where}: {first['msg']}") from None


async def serve(config: RouterConfig, *, ready_within_s: float = 0.0) -> None:
    """Run a router until SIGTERM, SIGINT or SIGUSR1; ``ready_within_s`` as for ``Router.start``."""
    # Its imports take longer than a parent may live, which is therefore watched before.
    import torch

    # The first operator of ours that runs imports it, which took 1.2 s: in a router that was the
    # first request with a filter, and everybody waited.
    import torch._dynamo

    from silvershard.cluster.router import Router

    torch.set_num_threads(config.num_threads)
    loop = asyncio.get_running_loop()
    stopped: asyncio.Future[bool] = loop.create_future()

    def stop(*, replaced: bool) -> None:
        if not stopped.done():
            stopped.set_result(replaced)

    for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        replaced = signum == signal.SIGUSR1
        loop.add_signal_handler(signum, functools.partial(stop, replaced=replaced))
    router = Router(config)
    try:
        await router.start(ready_within_s=ready_within_s)
        line = {
            "event": "listening",
            "address": router.address,
            "own": router.own_address,
            "http": router.http_address,
            "pid": os.getpid(),
            "release": RELEASE,
        }
        sys.stdout.write(json.dumps(line) + "\n")
        sys.stdout.flush()
        await stopped
    finally:
        await router.stop(replaced=stopped.done() and stopped.result())


def main(argv: Sequence[str] | None = None) -> int:
    """Run the router process and return its exit code."""
    parser = argparse.ArgumentParser(prog="silvershard.deploy.router_process")
    parser.add_argument("--config", type=Path, required=True, help="RouterConfig as JSON")
    parser.add_argument("--parent", type=int, default=0, help="end with this process")
    parser.add_argument(
        "--detach", type=Path, help="run on without a parent, and write the process to this file"
    )
    parser.add_argument(
        "--ready-within-s",
        type=float,
        default=0.0,
        help="listen only once every shard is reached, and give up after so many seconds",
    )
    options = parser.parse_args(argv)
    if options.detach:
        child = os.fork()
        if child:
            started = identify(child)
            options.detach.write_text(started.model_dump_json() if started else "")
            return 0
        os.setsid()
    if options.parent:
        die_with_parent(options.parent)
    log_to_stderr()
    try:
        config = read_config(options.config)
        with contextlib.suppress(asyncio.CancelledError):
            asyncio.run(serve(config, ready_within_s=options.ready_within_s))
    except TimeoutError:
        _log.error("not every shard was reached in %g s", options.ready_within_s)
        return 1
    except ConfigError as error:
        _log.error("%s", error)
        return 2
    except RetrievalError as error:
        _log.error("%s", error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

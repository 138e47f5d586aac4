"""Numbers of incarnations that grow wherever the next process of a replica starts.

Clocks of hosts differ, so the time alone would let a process that was cut off seem newer than the
one that took its place. A server counts them.
"""

import logging
import time
from collections.abc import Callable
from typing import Any

from silvershard.cluster.redis_server import RedisServer, ServerUnavailable

_TIMEOUT_S = 1.0
_RETRY_S = 0.5

# Numbers of Lua are exact up to 2^53, which microseconds reach in the year 2255.
_NEXT = """
local epoch = math.max((tonumber(redis.call('HGET', KEYS[1], ARGV[1])) or 0) + 1, tonumber(ARGV[2]))
redis.call('HSET', KEYS[1], ARGV[1], string.format('%.0f', epoch))
return string.format('%.0f', epoch)
"""
"""KEYS: the epochs. ARGV: whose; least number, so that a server that lost its data gives none that
was given before."""

_log = logging.getLogger(__name__)


def next_epoch(
    url: str,
    place: str,
    *,
    unix_us: Callable[[], int] = lambda: time.time_ns() // 1000,
    sleep: Callable[[float], None] = time.sleep,
) -> int:
    """Return an epoch that is larger than every earlier one of a place.

    It waits for a server that cannot be reached: who serves without an epoch could not be fenced.

    Args:
        url: of the control store, as for ``RedisServer``.
        place: such as ``shard-0-1``.
        unix_us: returns the time.
        sleep: waits for so many seconds.

    Raises:
        ConfigError: if the url cannot be used.
    """
    server = RedisServer(url, _TIMEOUT_S)
    script = server.client.register_script(_NEXT)
    said = ""
    try:
        while True:
            try:
                # What the client returns is as the server sent it, which its type does not say.
                found: Any = server.call(
                    lambda: script(keys=[f"{server.prefix}:epochs"], args=[place, unix_us()])
                )
                return int(found)
            except ServerUnavailable as error:
                if str(error) != said:
                    _log.warning("%s waits for its epoch: %s %s", place, server.url, error)
                said = str(error)
                sleep(_RETRY_S)
    finally:
        server.close()

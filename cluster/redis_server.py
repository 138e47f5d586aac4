"""A Redis server that keeps what it acknowledged, and calls to it that are tried again."""

import contextlib
import random
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar
from urllib.parse import parse_qs, urlencode, urlsplit

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from silvershard.shard.errors import ConfigError

T = TypeVar("T")

DURABLE = {"appendonly": "yes", "appendfsync": "always", "no-appendfsync-on-rewrite": "no"}
_FIRST_PAUSE_S = 0.01
_LONGEST_PAUSE_S = 0.5


class ServerUnavailable(Exception):
    """A call that could not be made; the text is the reason."""


class NotDurable(ServerUnavailable):
    """A server whose settings could lose what it acknowledges."""


class _Refused(redis.RedisError):
    """A connection to a server that is not durable."""


class RedisServer:
    """Connections to a server; any thread may call."""

    def __init__(self, url: str, timeout_s: float) -> None:
        """Connect to nothing yet.

        Args:
            url: ``redis://`` address, which may hold ``prefix``, by default ``silvershard``, and
                ``trust_durability=1`` where the settings of the server cannot be read.
            timeout_s: a call gives up when it has passed and the attempt under way, which takes as
                long at most, has ended.

        Raises:
            ConfigError: if the url cannot be used.
        """
        server, self.prefix, self._trusted = _split(url)
        self.url = _shown(server, self.prefix)
        """Without password."""
        self._timeout_s = timeout_s
        self._closed = False
        self._calls = 0
        self._calls_lock = threading.Lock()
        try:
            self.client = redis.Redis.from_url(
                server,
                protocol=2,
                retry=Retry(NoBackoff(), 0),
                socket_timeout=timeout_s,
                socket_connect_timeout=timeout_s,
                redis_connect_func=self._connected,
            )
        except ValueError as error:
            raise ConfigError(f"the url of a Redis server cannot be used: {error}") from None

    def _connected(self, connection: Any) -> None:
        """Refuse every connection, also a later one, to a server that is not durable."""
        connection.on_connect()
        needed = DURABLE
        try:
            if _setting(connection, "maxmemory") != "0":
                needed = {**DURABLE, "maxmemory-policy": "noeviction"}
            found = {name: _setting(connection, name) for name in needed}
        except redis.ResponseError as error:
            if self._trusted:
                return
            raise _Refused(
                f"the settings of the server cannot be read ({error}): allow CONFIG GET, or, where "
                "appendonly is known to be yes and appendfsync always, put trust_durability=1 into "
                "the url"
            ) from None
        for name, value in needed.items():
            if found[name] != value:
                raise _Refused(
                    f"{name} of the server must be {value}, got {found[name]}: run redis-cli "
                    f"CONFIG SET {name} {value} and redis-cli CONFIG REWRITE"
                )

    @contextlib.contextmanager
    def _under_way(self) -> Iterator[None]:
        """Keep connections until the last call has ended that was under way at ``close``."""
        with self._calls_lock:
            if self._closed:
                raise ServerUnavailable("is closed")
            self._calls += 1
        try:
            yield
        finally:
            with self._calls_lock:
                self._calls -= 1
                last = self._closed and self._calls == 0
            if last:
                self.client.close()

    def call(self, work: Callable[[], T]) -> T:
        """Do ``work``, again after a pause while the server cannot be reached.

        Raises:
            NotDurable: if the server could lose what it acknowledged.
            ServerUnavailable: if it cannot be reached, or answers with an error.
        """
        with self._under_way():
            return self._tried(work)

    def _tried(self, work: Callable[[], T]) -> T:
        give_up_s = time.monotonic() + self._timeout_s
        pause_s = _FIRST_PAUSE_S
        while True:
            try:
                return work()
            except (redis.AuthenticationError, redis.exceptions.AuthorizationError) as error:
                raise ServerUnavailable(f"access was refused: {error}") from None
            except (redis.ConnectionError, redis.TimeoutError, OSError) as error:
                # Nobody comes back together with all the others that lost the same server.
                pause_s = min(pause_s * random.uniform(1.5, 2.5), _LONGEST_PAUSE_S)
                if time.monotonic() + pause_s >= give_up_s:
                    raise ServerUnavailable(f"cannot be reached: {error}") from None
                time.sleep(pause_s)
            except _Refused as error:
                raise NotDurable(str(error)) from None
            except redis.RedisError as error:
                # What follows says where in a script.
                raise ServerUnavailable(str(error).partition(". script: ")[0]) from None

    def close(self) -> None:
        """Close the connections, once the calls under way have ended."""
        with self._calls_lock:
            self._closed = True
            idle = self._calls == 0
        if idle:
            self.client.close()


def _split(url: str) -> tuple[str, str, bool]:
    """Return the url without our own options, the prefix, and whether durability is trusted."""
    parts = urlsplit(url)
    options = parse_qs(parts.query, keep_blank_values=True)
    prefix = options.pop("prefix", ["silvershard"])[-1]
    trusted = options.pop("trust_durability", ["0"])[-1]
    if trusted not in ("0", "1") or not prefix:
        raise ConfigError(
            "the url of a Redis server takes trust_durability 0 or 1 and a prefix that is not "
            f"empty, got {trusted!r} and {prefix!r}"
        )
    query = urlencode(options, doseq=True)
    return parts._replace(query=query).geturl(), prefix, trusted == "1"


def _shown(server: str, prefix: str) -> str:
    parts = urlsplit(server)
    place = f"{parts.hostname or 'localhost'}:{parts.port or 6379}"
    return f"{parts.scheme}://{place}{parts.path}?prefix={prefix}"


def _setting(connection: Any, name: str) -> str:
    connection.send_command("CONFIG", "GET", name)
    found = connection.read_response()
    if len(found) != 2:
        raise redis.ResponseError(f"there is no setting {name}")
    return str(found[1].decode())

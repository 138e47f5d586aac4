"""The control store in Redis, for clusters of several hosts."""

from collections.abc import Callable
from typing import Any, TypeVar

from silvershard.cluster.redis_server import RedisServer, ServerUnavailable
from silvershard.deploy.control_store import ControlStore
from silvershard.shard.errors import StateError

T = TypeVar("T")

# Who reads it looks many times a second, and has other things to do while it is away.
_TIMEOUT_S = 1.0

_REPLACE = """
if (redis.call('HGET', KEYS[1], 'version') or '0') ~= ARGV[1] then return 0 end
redis.call('HSET', KEYS[1], 'version', ARGV[2], 'document', ARGV[3])
return 1
"""
"""KEYS: the document. ARGV: version that must be there, 0 for none; new version; document."""


class RedisControlStore(ControlStore):
    """The document under the key ``<prefix>:control`` of a server that keeps what it acknowledged.

    A change whose answer was lost is taken for refused where it was made; whoever makes it again
    sees that.
    """

    def __init__(self, url: str, timeout_s: float = _TIMEOUT_S) -> None:
        """Connect to nothing yet.

        Args:
            url: as for ``RedisServer``.
            timeout_s: after which a server that cannot be reached is an error.

        Raises:
            ConfigError: if the url cannot be used.
        """
        self._server = RedisServer(url, timeout_s)
        self._key = f"{self._server.prefix}:control"
        self._replace = self._server.client.register_script(_REPLACE)

    @property
    def place(self) -> str:
        """Return the address of the server, without its password."""
        return self._server.url

    def load(self) -> str:
        """See ``ControlStore.load``."""
        # What the client returns is as the server sent it, which its type does not say.
        found: Any = self._call(lambda: self._server.client.hget(self._key, "document"))
        return str(found.decode()) if found else ""

    def replace(self, document: str, version: int) -> bool:
        """See ``ControlStore.replace``."""
        args: list[int | str] = [version - 1, version, document]
        done = self._call(lambda: self._replace(keys=[self._key], args=args))
        return bool(done) or self.load() == document

    def _call(self, work: Callable[[], T]) -> T:
        try:
            return self._server.call(work)
        except ServerUnavailable as error:
            raise StateError(f"control store {self.place}: {error}") from None

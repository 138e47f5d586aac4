"""What the hosts of a cluster know of each other: documents beside the control store in Redis.

The supervisor writes the shard map and what runs; hosts copy both, so that everything on them goes
on without supervisor, Ray and store. Hosts write what they hold; the supervisor reads it.
"""

import time
from collections.abc import Callable
from typing import Any, Literal, TypeVar, get_args

import pydantic
from pydantic import BaseModel, Field

from silvershard.cluster.document import Document
from silvershard.deploy.config import Config
from silvershard.deploy.host_state import HostState
from silvershard.deploy.placement import Host
from silvershard.deploy.state import RouterRecord
from silvershard.shard.errors import StateError

T = TypeVar("T")
M = TypeVar("M", bound=BaseModel)

_TIMEOUT_S = 1.0

DocumentName = Literal["launch", "layout", "map", "record", "progress", "wanted", "order"]

_WRITE = """
if (redis.call('HGET', KEYS[1], 'term') or '0') ~= ARGV[1] then return 0 end
redis.call('HSET', KEYS[1], ARGV[2], ARGV[3])
return 1
"""
"""KEYS: the documents. ARGV: term of the writer, name, text."""


class Superseded(StateError):
    """A newer supervisor has taken over: whoever gets this must end."""


class PlacedHost(Document):
    """One host, and what was placed on it."""

    name: str = Field(min_length=1, description="what people call it")
    address: str = Field(min_length=1, description="its IP address, which Ray knows it by")
    cpus: float = Field(gt=0, description="cores that shard processes may use")
    memory_bytes: int = Field(ge=0, description="memory that silvershard may use")
    zone: str = Field(default="", description="what fails together; empty: a zone of its own")
    labels: dict[str, str] = Field(default_factory=dict, description="what placement can ask for")
    state: HostState = Field(default="up", description="what it was listed as")
    router: bool = Field(description="whether it has a router")
    copies: tuple[tuple[int, int], ...] = Field(
        default=(),
        description="shard and number of each copy that was started on it first; "
        "standbys come after replicas",
    )

    def listed(self) -> Host:
        """Return the host as placement knows it."""
        return Host(
            name=self.name,
            cpus=self.cpus,
            memory_bytes=self.memory_bytes,
            zone=self.zone,
            labels=self.labels,
            state=self.state,
            address=self.address,
        )


class Launched(Document):
    """What was started on several hosts."""

    config: Config = Field(description="settings")
    generation: int = Field(ge=1, description="generation that was live first")
    model: str = Field(description="logical model name")
    root: str = Field(description="state directory, the same path on every host")
    ray: str = Field(description="host:port of the Ray that was found")
    hosts: tuple[PlacedHost, ...] = Field(min_length=1, description="every host")
    since_unix_s: float = Field(description="when it was started")
    stopping: bool = Field(default=False, description="it is being ended")

    def host(self, name: str) -> PlacedHost:
        """Return the host that is called so; one that is not there is an error of the caller."""
        return next(one for one in self.hosts if one.name == name)

    def own_config(self, host: PlacedHost) -> Config:
        """Return the settings of a host, whose processes bind its own address."""
        listen = self.config.listen.model_copy(update={"host": host.address})
        return self.config.model_copy(update={"listen": listen})


class RouterOrder(Document):
    """That a host shall replace its router."""

    host: str = Field(description="its name")
    number: int = Field(ge=1, description="tells one order from every other one")


class HostReport(Document):
    """What a host says of itself."""

    host: str = Field(description="its name")
    beat: int = Field(ge=0, description="grows as long as its agent runs")
    incarnation: int = Field(default=0, ge=0, description="tells its agent from those before")
    release: str = Field(default="", description="release of silvershard that its agent runs")
    generations: tuple[int, ...] = Field(default=(), description="generations that it has on disk")
    staging: str = Field(default="", description="what it is fetching, or why it cannot")
    router: RouterRecord | None = Field(default=None, description="its router, if it has one")
    http: str = Field(default="", description="host:port of probes and metrics of that router")
    ordered: int = Field(default=0, ge=0, description="number of the order that is done")
    refused: str = Field(default="", description="why it was not carried out; empty: it was")


class ClusterStore:
    """The documents under ``<prefix>:cluster`` and ``<prefix>:hosts`` of a server."""

    def __init__(self, url: str, timeout_s: float = _TIMEOUT_S) -> None:
        """Connect to nothing yet.

        Args:
            url: of the control store, as for ``RedisServer``.
            timeout_s: after which a server that cannot be reached is an error.

        Raises:
            ConfigError: if the url cannot be used.
        """
        # A single machine needs no redis-py.
        from silvershard.cluster.redis_server import RedisServer

        self.url = url
        self._server = RedisServer(url, timeout_s)
        self._key = f"{self._server.prefix}:cluster"
        self._hosts = f"{self._server.prefix}:hosts"
        self._write = self._server.client.register_script(_WRITE)

    def begin(self, launched: Launched) -> bool:
        """Write down what is started; return False if something runs already.

        Raises:
            StateError: if the store cannot be used, as everything here does.
        """
        text = launched.model_dump_json()
        return bool(self._call(lambda: self._server.client.hsetnx(self._key, "launch", text)))

    def stopping(self, launched: Launched) -> None:
        """Write down that it is being ended."""
        text = launched.model_copy(update={"stopping": True}).model_dump_json()
        self._call(lambda: self._server.client.hset(self._key, "launch", text))

    def take_over(self) -> int:
        """Return a new term: from now on nobody of an earlier one can write."""
        found: Any = self._call(lambda: self._server.client.hincrby(self._key, "term", 1))
        return int(found)

    def check(self, term: int) -> None:
        """Return if nobody has taken over since a term began.

        Raises:
            Superseded: if another supervisor has.
        """
        # What the client returns is as the server sent it, which its type does not say.
        found: Any = self._call(lambda: self._server.client.hget(self._key, "term"))
        if int(found or 0) != term:
            raise Superseded("another supervisor has taken over")

    def write(self, term: int, name: DocumentName, text: str) -> None:
        """Replace a document.

        Raises:
            Superseded: if another supervisor has taken over.
        """
        done = self._call(lambda: self._write(keys=[self._key], args=[term, name, text]))
        if not done:
            raise Superseded("another supervisor has taken over")

    def text(self, name: DocumentName) -> str:
        """Return a document; empty where there is none."""
        # What the client returns is as the server sent it, which its type does not say.
        found: Any = self._call(lambda: self._server.client.hget(self._key, name))
        return str(found.decode()) if found else ""

    def read(self, kind: type[M], name: DocumentName) -> M | None:
        """Return a document as its class; None where there is none."""
        text = self.text(name)
        return _parsed(kind, text, self._server.url) if text else None

    def report(self, report: HostReport) -> None:
        """Write what a host says of itself."""
        text = report.model_dump_json()
        self._call(lambda: self._server.client.hset(self._hosts, report.host, text))

    def reports(self) -> dict[str, HostReport]:
        """Return what every host said last."""
        found: Any = self._call(lambda: self._server.client.hgetall(self._hosts))
        texts = [one.decode() for one in found.values()]
        made = [_parsed(HostReport, text, self._server.url) for text in texts]
        return {one.host: one for one in made}

    def clear(self) -> None:
        """Forget the cluster; terms go on, so that nobody who is late can write."""
        self._call(lambda: self._server.client.hdel(self._key, *get_args(DocumentName)))
        self._call(lambda: self._server.client.delete(self._hosts))

    def close(self) -> None:
        """Close the connections."""
        self._server.close()

    def _call(self, work: Callable[[], T]) -> T:
        from silvershard.cluster.redis_server import ServerUnavailable

        try:
            return self._server.call(work)
        except ServerUnavailable as error:
            raise StateError(f"control store {self._server.url}: {error}") from None


class Freshness:
    """Tells from what a host says whether it still says anything; clocks of hosts may differ."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._seen: dict[str, tuple[int, float]] = {}

    def silent_s(self, report: HostReport) -> float:
        """Return for how long a host has said nothing new."""
        beat, since_s = self._seen.get(report.host, (-1, 0.0))
        if beat != report.beat:
            since_s = self._clock()
            self._seen[report.host] = report.beat, since_s
        return self._clock() - since_s


def _parsed(kind: type[M], text: str, place: str) -> M:
    try:
        return kind.model_validate_json(text)
    except pydantic.ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(str(part) for part in problem["loc"]) or "content"
        raise StateError(f"control store {place}: {where}: {problem['msg']}") from None

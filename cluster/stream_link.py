"""A connection that is held by one bidirectional stream of calls and replies, again and again."""

import asyncio
import itertools
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

import grpc
import grpc.aio

from silvershard.cluster.config import PingSection
from silvershard.cluster.listen import LINK_OPTIONS

RECONNECT_S = 0.1

Dial = Callable[[str], grpc.aio.Channel]
"""Opens a channel to an address."""

_log = logging.getLogger(__name__)


def dial(address: str) -> grpc.aio.Channel:
    """Return a channel over the network, which connects when it is used first."""
    return grpc.aio.insecure_channel(address, options=LINK_OPTIONS)


class _Numbered(Protocol):
    @property
    def call_id(self) -> int: ...


Call = TypeVar("Call", bound=_Numbered)
Reply = TypeVar("Reply", bound=_Numbered)
Waiting = TypeVar("Waiting")


@dataclass(eq=False)
class Connection(Generic[Call, Waiting]):
    """One attempt to hold a stream."""

    outgoing: asyncio.Queue[Call] = field(default_factory=asyncio.Queue)
    pending: dict[int, Waiting] = field(default_factory=dict)
    """Who waits for the reply of each call."""


class StreamLink(ABC, Generic[Call, Reply, Waiting]):
    """One incarnation of a server; everything here runs on one event loop.

    It connects again whenever the stream breaks, and counts the looks in a row at which there was
    no sign of life since the one before.
    """

    def __init__(self, address: str, name: str, ping: PingSection, dial: Dial = dial) -> None:
        """Make a link that does not connect yet; ``start`` does.

        Args:
            address: of the server.
            name: what the log calls the server.
            ping: times between looks, and how many may be in vain.
            dial: opens the channels.
        """
        self._dial = dial
        self._address = address
        self._name = name
        self._ping = ping
        self._ids = itertools.count(1)
        self._connection: Connection[Call, Waiting] | None = None
        self._connected: bool | None = None
        """None: it has not been tried yet."""
        self._misses = 0
        self._heard = False
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def hung(self) -> bool:
        """Return True while there were so few signs of life that the server is not asked."""
        return self._misses >= self._ping.eject_after

    @property
    def reached(self) -> bool:
        """Return True while the server is connected and may be asked."""
        return self._connected is True and not self.hung

    def start(self) -> None:
        """Connect, and stay connected until ``aclose``; needs a running event loop."""
        self._connection = Connection()
        self._tasks = [
            asyncio.create_task(self._hold_stream()),
            asyncio.create_task(self._watch()),
        ]

    async def aclose(self) -> None:
        """Disconnect; calls in flight fail."""
        while pending := [task for task in self._tasks if not task.done()]:
            for task in pending:
                task.cancel()
            # A cancellation that reaches a call just as it ends may get lost in there.
            await asyncio.wait(pending, timeout=RECONNECT_S)
        self._lose("the link was closed")

    @abstractmethod
    def _open(self, channel: grpc.aio.Channel) -> Any:
        """Return a new stream of calls and replies on a channel."""

    @abstractmethod
    def _receive(self, connection: Connection[Call, Waiting], reply: Reply) -> None:
        """Hand a reply to whoever waits for it."""

    @abstractmethod
    def _fail(self, waiting: Waiting, message: str) -> None:
        """Tell whoever waits that there will be no reply."""

    @abstractmethod
    async def _watch(self) -> None:
        """Look for signs of life for ever, and count each look by ``_count_look``."""

    def _count_look(self) -> None:
        """Count a look; a pause of our own counts once."""
        self._misses = 0 if self._heard else self._misses + 1
        self._heard = False

    def _post(self, connection: Connection[Call, Waiting], call: Call, waiting: Waiting) -> None:
        """Send a call whose reply ``waiting`` waits for."""
        connection.pending[call.call_id] = waiting
        connection.outgoing.put_nowait(call)

    def _lose(self, message: str) -> None:
        """Fail every call in flight."""
        connection, self._connection = self._connection, None
        self._connected = False
        if connection is not None:
            for waiting in connection.pending.values():
                self._fail(waiting, message)

    async def _hold_stream(self) -> None:
        """Keep a stream for calls; when it breaks, connect again."""
        async with self._dial(self._address) as channel:
            while True:
                connection: Connection[Call, Waiting] = self._connection or Connection()
                stream = self._open(channel)
                writer = asyncio.create_task(self._write(stream, connection))
                try:
                    await stream.initial_metadata()
                    if not stream.done():
                        self._connection, self._connected = connection, True
                    async for reply in stream:
                        self._receive(connection, reply)
                    message = "the shard ended the connection"
                except grpc.aio.AioRpcError as error:
                    message = f"{error.code().name}: {error.details()}"
                except asyncio.CancelledError:
                    # A stream that was cancelled on this side looks like this task being cancelled.
                    if _is_cancelled():
                        raise
                    message = "the stream was cancelled"
                except Exception as error:  # noqa: BLE001  # bytes that are no reply; logged
                    message = f"malformed answer: {error}"
                    _log.error("%s at %s: %s", self._name, self._address, message)
                finally:
                    writer.cancel()
                    stream.cancel()
                self._lose(message)
                await asyncio.sleep(RECONNECT_S)

    async def _write(
        self, stream: grpc.aio.StreamStreamCall, connection: Connection[Call, Waiting]
    ) -> None:
        # A cancelled write cancels its stream, so writes never run in the tasks of callers.
        try:
            while True:
                await stream.write(await connection.outgoing.get())
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            stream.cancel()


def _is_cancelled() -> bool:
    """Return True while somebody wants the running task to end."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0

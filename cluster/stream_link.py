"""A connection that is held by one bidirectional stream of calls and replies, again and again."""

import asyncio
import itertools
import logging
from abc import ABC, abstractmethod
from collections import deque
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

import grpc
import grpc.aio

from silvershard.cluster.config import PingSection
from silvershard.cluster.dialer import PLAIN, Dials
from silvershard.cluster.listen import LINK_OPTIONS

RECONNECT_S = 0.1

_log = logging.getLogger(__name__)


class _Numbered(Protocol):
    @property
    def call_id(self) -> int: ...


Call = TypeVar("Call", bound=_Numbered)
Reply = TypeVar("Reply", bound=_Numbered)
Waiting = TypeVar("Waiting")


@dataclass(eq=False)
class Connection(Generic[Call, Waiting]):
    """One attempt to hold a stream."""

    outgoing: deque[Call] = field(default_factory=deque)
    """Calls that are not sent yet."""
    pending: dict[int, Waiting] = field(default_factory=dict)
    """Who waits for the reply of each call."""
    _writer: asyncio.Future[None] | None = None
    """Ends as soon as there is something to send."""

    def put(self, call: Call) -> None:
        """Send a call after those that wait."""
        self.outgoing.append(call)
        if self._writer is not None and not self._writer.done():
            self._writer.set_result(None)

    async def get(self) -> Call:
        """Wait for the next call to send; only one may wait at a time."""
        while not self.outgoing:
            self._writer = asyncio.get_running_loop().create_future()
            await self._writer
        return self.outgoing.popleft()


class StreamLink(ABC, Generic[Call, Reply, Waiting]):
    """One incarnation of a server; everything here runs on one event loop.

    It connects again whenever the stream breaks, and counts the looks in a row at which there was
    no sign of life since the one before.
    """

    def __init__(self, address: str, name: str, ping: PingSection, dialer: Dials = PLAIN) -> None:
        """Make a link that does not connect yet; ``start`` does.

        Args:
            address: of the server.
            name: what the log calls the server.
            ping: times between looks, and how many may be in vain.
            dialer: opens channels.
        """
        self._address = address
        self._name = name
        self._dialer = dialer
        self._ping = ping
        self._ids = itertools.count(1)
        self._connection: Connection[Call, Waiting] | None = None
        self._connected: bool | None = None
        """None: it has not been tried yet."""
        self._misses = 0
        self._heard = False
        self._tasks: list[asyncio.Task[None]] = []
        self.refusal = ""
        """Why nothing is asked of the server, which is there; empty if it may be asked."""

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

    def _refusal(self, metadata: Any) -> str:
        """Return why nothing is asked of a server, by its first metadata; empty if it may be."""
        return ""

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
        connection.put(call)

    def _lose(self, message: str) -> None:
        """Fail every call in flight."""
        connection, self._connection = self._connection, None
        self._connected = False
        if connection is not None:
            for waiting in connection.pending.values():
                self._fail(waiting, message)

    async def _hold_stream(self) -> None:
        """Keep a stream for calls; when it breaks, connect again."""
        async with self._dialer.aio_channel(self._address, LINK_OPTIONS) as channel:
            while True:
                connection: Connection[Call, Waiting] = self._connection or Connection()
                stream = self._open(channel)
                writer: asyncio.Task[None] | None = None
                try:
                    metadata = await stream.initial_metadata()
                    refusal = "" if stream.done() else self._refusal(metadata)
                    self._log_refusal(refusal)
                    if refusal:
                        message = refusal
                    else:
                        message = "the shard ended the connection"
                        if not stream.done():
                            self._connection, self._connected = connection, True
                            writer = asyncio.create_task(self._write(stream, connection))
                        async for reply in stream:
                            self._receive(connection, reply)
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
                    if writer is not None:
                        writer.cancel()
                    stream.cancel()
                self._lose(message)
                await asyncio.sleep(RECONNECT_S)

    def _log_refusal(self, refusal: str) -> None:
        if refusal and refusal != self.refusal:
            _log.error("%s at %s is not asked: %s", self._name, self._address, refusal)
        self.refusal = refusal

    async def _write(
        self, stream: grpc.aio.StreamStreamCall, connection: Connection[Call, Waiting]
    ) -> None:
        # A cancelled write cancels its stream, so writes never run in the tasks of callers.
        try:
            while True:
                await stream.write(await connection.get())
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            stream.cancel()


def _is_cancelled() -> bool:
    """Return True while somebody wants the running task to end."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0

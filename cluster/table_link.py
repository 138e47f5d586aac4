"""The connection of a client to one table shard: multiplexed calls, beats, fencing by epoch."""

import asyncio
import itertools
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import grpc
import grpc.aio

from silvershard.cluster import table_pb2, table_pb2_grpc
from silvershard.cluster.codec import code_name
from silvershard.cluster.config import PingSection
from silvershard.cluster.listen import LINK_OPTIONS
from silvershard.cluster.table_map import TableEntry

UNAVAILABLE = "UNAVAILABLE"

_RECONNECT_S = 0.1
_BEAT_LIVES_S = 60.0

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Refused:
    """Why a call has no answer."""

    code: str
    """Name of a gRPC status."""
    message: str


Outcome = table_pb2.TableReply | Refused
Done = Callable[[Outcome], None]


@dataclass(eq=False)
class _Waiting:
    done: Done | None
    sent_at_s: float


@dataclass(eq=False)
class _Connection:
    """One attempt to hold a stream."""

    outgoing: asyncio.Queue[table_pb2.TableCall] = field(default_factory=asyncio.Queue)
    pending: dict[int, _Waiting] = field(default_factory=dict)
    beat: int = 0
    """The call of the last beat."""


class TableLink:
    """One incarnation of one table shard; everything here runs on one event loop.

    Every answer, also that of a beat, brings the version of the shard and is handed to
    ``on_answer`` before its caller hears of it, in the order in which the shard gave them.
    """

    def __init__(
        self,
        entry: TableEntry,
        ping: PingSection,
        on_answer: Callable[["TableLink", table_pb2.TableReply, float], None],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Make a link that does not connect yet; ``start`` does.

        Args:
            entry: what to connect to.
            ping: times between beats, and how many may go unanswered.
            on_answer: takes this link, a usable answer, and when its call was sent.
            clock: seconds that only grow.
        """
        self.entry = entry
        self.version = 0
        """Newest version that an answer told of; whoever takes ``on_answer`` sets it."""
        self._ping = ping
        self._on_answer = on_answer
        self._clock = clock
        self._ids = itertools.count(1)
        self._connection: _Connection | None = None
        self._connected = False
        self._misses = 0
        self._heard = False
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def hung(self) -> bool:
        """Return True while so many beats are unanswered that the shard is not asked."""
        return self._misses >= self._ping.eject_after

    @property
    def reached(self) -> bool:
        """Return True while the shard is connected and may be asked."""
        return self._connected and not self.hung

    def start(self) -> None:
        """Connect, and stay connected until ``aclose``; needs a running event loop."""
        self._connection = _Connection()
        self._tasks = [
            asyncio.create_task(self._hold_stream()),
            asyncio.create_task(self._hold_beats()),
        ]

    async def aclose(self) -> None:
        """Disconnect; calls in flight fail."""
        pending = set(self._tasks)
        while pending:
            for task in pending:
                task.cancel()
            # A cancellation that reaches a call just as it ends may get lost in there.
            _, pending = await asyncio.wait(pending, timeout=_RECONNECT_S)
        self._lose("the link was closed")

    def send(self, call: table_pb2.TableCall, remaining_s: float, done: Done | None) -> int:
        """Send a call; ``done`` hears of its end, at once if there is nobody to ask.

        Args:
            call: its operation; the rest is filled in.
            remaining_s: time after which the shard need not begin.
            done: must not block; None: nobody waits.

        Returns:
            The number of the call, for ``forget``.
        """
        call.call_id = next(self._ids)
        connection = self._connection
        if connection is None or self.hung:
            if done is not None:
                done(Refused(UNAVAILABLE, f"no answer from {self.entry.address}"))
            return call.call_id
        self._post(connection, call, remaining_s, done)
        return call.call_id

    def forget(self, call_id: int) -> None:
        """Drop a call for which nobody waits any more; its answer still tells of changes."""
        waiting = self._connection.pending.get(call_id) if self._connection is not None else None
        if waiting is not None:
            waiting.done = None

    def _post(
        self,
        connection: _Connection,
        call: table_pb2.TableCall,
        remaining_s: float,
        done: Done | None,
    ) -> None:
        call.epoch = self.entry.epoch
        call.seen_version = self.version
        call.remaining_us = max(0, int(remaining_s * 1e6))
        connection.pending[call.call_id] = _Waiting(done, self._clock())
        connection.outgoing.put_nowait(call)

    def _receive(self, connection: _Connection, reply: table_pb2.TableReply) -> None:
        waiting = connection.pending.pop(reply.call_id, None)
        if waiting is None:
            return
        outcome: Outcome = reply
        if reply.epoch != self.entry.epoch:
            outcome = Refused(
                UNAVAILABLE, f"answered as epoch {reply.epoch}, {self.entry.epoch} was asked"
            )
        else:
            # Another incarnation on the same address is not a sign of life of this one.
            self._heard, self._misses = True, 0
            if reply.code:
                outcome = Refused(code_name(reply.code), reply.message)
            else:
                self._on_answer(self, reply, waiting.sent_at_s)
        if waiting.done is not None:
            waiting.done(outcome)

    def _lose(self, message: str) -> None:
        """Fail every call in flight."""
        connection, self._connection = self._connection, None
        self._connected = False
        if connection is not None:
            for waiting in connection.pending.values():
                if waiting.done is not None:
                    waiting.done(Refused(UNAVAILABLE, message))

    async def _hold_stream(self) -> None:
        """Keep a stream for calls; when it breaks, connect again."""
        async with grpc.aio.insecure_channel(self.entry.address, options=LINK_OPTIONS) as channel:
            stub = table_pb2_grpc.TableStub(channel)
            while True:
                connection = self._connection or _Connection()
                stream = stub.Execute()
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
                    _log.error("table shard at %s: %s", self.entry.address, message)
                finally:
                    writer.cancel()
                    stream.cancel()
                self._lose(message)
                await asyncio.sleep(_RECONNECT_S)

    async def _write(self, stream: grpc.aio.StreamStreamCall, connection: _Connection) -> None:
        try:
            while True:
                await stream.write(await connection.outgoing.get())
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            stream.cancel()

    async def _hold_beats(self) -> None:
        """Ask for no rows every now and then: it tells of changes, and that the shard lives."""
        every_s = self._ping.every_ms / 1e3
        while True:
            connection = self._connection
            # Beats must not pile up before a shard that hangs.
            if connection is not None and connection.beat not in connection.pending:
                connection.beat = next(self._ids)
                beat = table_pb2.TableCall(call_id=connection.beat, take=table_pb2.Take())
                self._post(connection, beat, _BEAT_LIVES_S, None)
            await asyncio.sleep(every_s)
            self._misses = 0 if self._heard else self._misses + 1
            self._heard = False


def _is_cancelled() -> bool:
    """Return True while somebody wants the running task to end."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0

"""The gRPC server of one table shard: rows as of the version that each call names."""

import asyncio
import logging
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field

import grpc
import grpc.aio
import numpy as np
from google.rpc import code_pb2
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from silvershard.cluster import table_pb2, table_pb2_grpc
from silvershard.cluster.codec import code_number, status_row
from silvershard.cluster.listen import bind, server_options
from silvershard.cluster.security import ALONE, Peers
from silvershard.cluster.table_follower import TableFollower
from silvershard.model.request import RequestError
from silvershard.shard.errors import DeadlineExceeded, Overloaded, RetrievalError
from silvershard.shard.table import TableShard
from silvershard.shard.table_rows import Ints

STALE_EPOCH = "STALE_EPOCH"

MAX_CALL_ROWS = 1 << 16
"""Rows that one call may take, so that none holds up the others for long."""

# Room for the frame of the largest call and reply.
_MIN_MESSAGE_BYTES = 1 << 20

_log = logging.getLogger(__name__)

_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


@dataclass(eq=False)
class _Stream:
    """What one client has asked for and not yet received."""

    replies: asyncio.Queue[table_pb2.TableReply] = field(default_factory=asyncio.Queue)
    unanswered: int = 0
    """Accepted calls whose reply is not on its way."""
    drained: asyncio.Event = field(default_factory=asyncio.Event)
    closed: bool = False


@dataclass(eq=False)
class _Job:
    call: table_pb2.TableCall
    stream: _Stream
    expires_at_s: float
    timer: asyncio.TimerHandle | None = None
    """Ends its wait for rows that are not applied yet."""


class TableServer:
    """Serves one shard of a table on a port of its own.

    The event loop does all the work: to take 1,000 rows costs it some 0.1 ms, less than a way to
    another thread and back. Between two calls it answers health checks. A call for rows as of a
    version that is not applied yet waits for it and holds up nobody.
    """

    def __init__(
        self,
        table: TableShard,
        *,
        epoch: int | None = None,
        host: str = "127.0.0.1",
        port: int = 0,
        peers: Peers = ALONE,
        max_queue: int = 1024,
        follower: TableFollower | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Make a server that does not listen yet.

        Args:
            table: the rows.
            epoch: incarnation, larger than that of every earlier one; by default the time in ns.
            host: address to bind.
            port: 0 lets the system choose a free one.
            peers: how it meets the other processes of its cluster.
            max_queue: calls that may wait or be on their way back; more are refused.
            follower: what keeps the rows up to date, for reports; None: they never change.
            clock: seconds that only grow.
        """
        self.table = table
        self.epoch = time.time_ns() if epoch is None else epoch
        self.address = ""
        self._host, self._port, self._peers = host, port, peers
        self._max_queue = max_queue
        self._follower = follower
        self._clock = clock
        self._pending = 0
        self._busy = False
        """A call ran in this turn of the event loop."""
        self._jobs: asyncio.Queue[_Job] = asyncio.Queue()
        self._waiting: set[_Job] = set()
        """For a version that is not applied yet."""
        self._loop: asyncio.AbstractEventLoop | None = None
        self._worker: asyncio.Task[None] | None = None
        self._server: grpc.aio.Server | None = None
        self._health = health.aio.HealthServicer()
        self._names = ("", f"table/{table.plan.name}/{table.shard}")

    async def start(self) -> None:
        """Bind the port and serve; ``address`` is set from then on.

        Raises:
            ConfigError: if the host is refused.
            StateError: if the port is in use.
        """
        self._loop = asyncio.get_running_loop()
        largest = MAX_CALL_ROWS * (8 + self.table.plan.record_bytes) + _MIN_MESSAGE_BYTES
        protection = self._peers.protection
        server = grpc.aio.server(
            interceptors=protection.interceptors, options=server_options(largest)
        )
        table_pb2_grpc.add_TableServicer_to_server(_Servicer(self), server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        self.address = bind(server, self._host, self._port, protection.door)
        await server.start()
        self._server = server
        self._worker = asyncio.create_task(self._work())
        for name in self._names:
            await self._health.set(name, _SERVING)

    async def stop(self, grace_s: float = 2.0) -> None:
        """Refuse new calls, wait for the running ones at most ``grace_s``, and free the port."""
        for name in self._names:
            await self._health.set(name, _NOT_SERVING)
        server, self._server = self._server, None
        if server is not None:
            await server.stop(grace_s)
        if self._worker is not None:
            self._worker.cancel()
        for job in self._waiting:
            if job.timer is not None:
                job.timer.cancel()

    def advanced(self) -> None:
        """Answer the calls that waited for rows that are applied by now; any thread may call it."""
        if self._waiting and self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._look_again)

    def report(self) -> table_pb2.TableState:
        """Return how far the rows are."""
        name, follower = self.table.plan.name, self._follower
        report = table_pb2.TableState(
            table=name,
            shard=self.table.shard,
            epoch=self.epoch,
            row_version=self.table.row_version,
        )
        if follower is not None:
            progress = follower.progress(name)
            report.log_id = follower.log_id
            report.partition = progress.partition
            report.position, report.end = progress.position, progress.end
            report.changes, report.rejected = progress.changes, follower.rejected
            report.trouble = follower.trouble
        return report

    async def execute(self, context: grpc.aio.ServicerContext) -> None:
        """Serve one client until it goes away; what waits for it then is dropped."""
        stream = _Stream()
        # Tells the client that it is connected, before there is anything to answer.
        await context.send_initial_metadata(())
        writer = asyncio.create_task(self._write(stream, context))
        try:
            while True:
                call = await context.read()
                if call is grpc.aio.EOF:
                    break
                reply = self._accept(call, stream)
                if reply is not None:
                    await context.write(reply)
                    self._sent(stream)
            while stream.unanswered:
                stream.drained.clear()
                await stream.drained.wait()
        finally:
            stream.closed = True
            self._pending -= stream.unanswered
            writer.cancel()

    async def _write(self, stream: _Stream, context: grpc.aio.ServicerContext) -> None:
        while True:
            await context.write(await stream.replies.get())
            self._sent(stream)

    def _sent(self, stream: _Stream) -> None:
        stream.unanswered -= 1
        self._pending -= 1
        stream.drained.set()

    def _accept(self, call: table_pb2.TableCall, stream: _Stream) -> table_pb2.TableReply | None:
        """Queue a call, or return its answer if nothing is in its way.

        The first call of a turn of the event loop runs at once if no other one waits: two turns
        less, and every turn looks for events, which takes some 20 us.
        """
        refusal = self._refusal(call)
        alone = not stream.unanswered
        stream.unanswered += 1
        self._pending += 1
        if refusal is not None:
            stream.replies.put_nowait(refusal)
            return None
        job = _Job(call, stream, self._clock() + call.remaining_us / 1e6)
        if not alone or self._busy or not self._jobs.empty():
            self._jobs.put_nowait(job)
            return None
        self._busy = True
        asyncio.get_running_loop().call_soon(self._rest)
        return self._run(job)

    def _rest(self) -> None:
        self._busy = False

    def _refusal(self, call: table_pb2.TableCall) -> table_pb2.TableReply | None:
        if call.epoch and call.epoch != self.epoch:
            reply = self._reply(call)
            reply.code = code_pb2.FAILED_PRECONDITION
            reply.reason = STALE_EPOCH
            reply.message = f"epoch {call.epoch} was asked for, this shard is epoch {self.epoch}"
            return reply
        if self._pending >= self._max_queue:
            return self._failure(call, Overloaded(f"{self._pending} calls are queued", 0.1))
        return None

    async def _work(self) -> None:
        while True:
            job = await self._jobs.get()
            if not job.stream.closed:
                reply = self._run(job)
                if reply is not None:
                    job.stream.replies.put_nowait(reply)
            # Lets calls, replies and health checks pass between two jobs.
            await asyncio.sleep(0)

    def _run(self, job: _Job) -> table_pb2.TableReply | None:
        """Answer a call; None if it waits for rows that are not applied yet."""
        try:
            if self._clock() >= job.expires_at_s:
                raise DeadlineExceeded("the time of the call ran out in the queue")
            return self._dispatch(job)
        except (RetrievalError, RequestError) as error:
            return self._failure(job.call, error)
        except Exception as error:  # noqa: BLE001  # a process border; the error is logged
            error_id = uuid.uuid4().hex[:12]
            _log.exception("internal error %s in shard %d", error_id, self.table.shard)
            return self._failure(job.call, error, error_id)

    def _dispatch(self, job: _Job) -> table_pb2.TableReply | None:
        call = job.call
        if call.WhichOneof("op") != "take":
            raise RequestError("op", "must name an operation")
        positions = _positions(call.take.positions)
        reply = self._reply(call)
        if not len(positions):
            return reply
        # Once the call is among those that wait, the follower tells of what it applies; a look
        # before that might miss it.
        self._waiting.add(job)
        if call.row_version > self.table.row_version:
            self._time(job)
            return None
        self._waiting.discard(job)
        reply.records = self.table.take(positions, call.row_version).tobytes()
        return reply

    def _time(self, job: _Job) -> None:
        if job.timer is None:
            left_s = max(job.expires_at_s - self._clock(), 0.0)
            job.timer = asyncio.get_running_loop().call_later(left_s, self._expire, job)

    def _expire(self, job: _Job) -> None:
        if job in self._waiting:
            self._waiting.discard(job)
            error = DeadlineExceeded(
                f"table {self.table.plan.name} is at row version {self.table.row_version}, "
                f"{job.call.row_version} was asked for"
            )
            job.stream.replies.put_nowait(self._failure(job.call, error))

    def _look_again(self) -> None:
        ready = [job for job in self._waiting if job.call.row_version <= self.table.row_version]
        for job in ready:
            self._waiting.discard(job)
            self._jobs.put_nowait(job)

    def _reply(self, call: table_pb2.TableCall) -> table_pb2.TableReply:
        return table_pb2.TableReply(call_id=call.call_id, epoch=self.epoch)

    def _failure(
        self, call: table_pb2.TableCall, error: Exception, error_id: str = ""
    ) -> table_pb2.TableReply:
        reply = self._reply(call)
        row = status_row(error)
        if row is None:
            reply.code, reply.reason = code_pb2.INTERNAL, "INTERNAL"
            reply.message = f"internal error {error_id}"
        else:
            reply.code, reply.reason = code_number(row.code), row.reason
            reply.message = str(error)
        return reply


def _positions(data: bytes) -> Ints:
    """Return the positions in a call.

    Raises:
        RequestError: if they are cut off, or too many.
    """
    if len(data) % 8:
        raise RequestError("positions", f"must have 8 bytes each, got {len(data)} bytes")
    if len(data) > 8 * MAX_CALL_ROWS:
        raise RequestError(
            "positions", f"must be at most {MAX_CALL_ROWS} in a call, got {len(data) // 8}"
        )
    return np.frombuffer(data, dtype="<i8").astype(np.int64, copy=False)


class _Servicer:
    """The names of the service in front of a server."""

    def __init__(self, server: TableServer) -> None:
        self._server = server

    async def Execute(self, _requests: object, context: grpc.aio.ServicerContext) -> None:
        await self._server.execute(context)

    async def Inspect(
        self, _request: table_pb2.TableInspect, _context: grpc.aio.ServicerContext
    ) -> table_pb2.TableState:
        return self._server.report()
